//! The stream ledger of `tidegate selftest`, as tests use it: with scripted
//! backends at its other end, and panics for faults.

use super::backend::{Script, script};
use super::{eventually, patience, secs};
use std::net::SocketAddr;
use std::ops::Deref;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;
use tidegate_lab::ledger;

pub use tidegate_lab::ledger::StreamSizes;

/// Both ends' records and the count of streams.
pub struct Ledger(ledger::Ledger);

impl Ledger {
    pub fn new(sizes: StreamSizes) -> Arc<Ledger> {
        Ledger::make(sizes, true, secs(20))
    }

    /// Without streams that end in a reset: every stream must be whole.
    pub fn without_aborts(sizes: StreamSizes) -> Arc<Ledger> {
        Ledger::make(sizes, false, secs(20))
    }

    /// The same with little patience, for tests that break streams on purpose.
    pub fn impatient(sizes: StreamSizes) -> Arc<Ledger> {
        Ledger::make(sizes, false, secs(1))
    }

    fn make(sizes: StreamSizes, aborts: bool, silence: Duration) -> Arc<Ledger> {
        Arc::new(Ledger(ledger::Ledger::new(sizes, aborts, patience(silence))))
    }

    /// The backend's end, for as many backends as wanted.
    pub fn script(self: &Arc<Ledger>) -> Script {
        let ledger = self.clone();
        script(move |conn| ledger.serve(&conn.socket, |_| {}))
    }

    /// Runs streams until `stop` is set.
    pub fn run_until(&self, addresses: &[SocketAddr], stop: &AtomicBool, at_once: usize) {
        self.run_from(1, addresses, stop, at_once);
    }

    /// Everything that differed, each with its seed.
    pub fn faults(&self) -> Vec<String> {
        self.0.faults().iter().map(ToString::to_string).collect()
    }

    /// Panics with the first differences, if there are any.
    #[track_caller]
    pub fn assert_clean(&self) {
        let faults = self.faults();
        let first: Vec<&String> = faults.iter().take(10).collect();
        assert!(faults.is_empty(), "{} of {} streams: {first:#?}", faults.len(), self.streams());
    }

    /// Waits until no record waits for its other end.
    pub fn settle(&self) {
        eventually(secs(20), "both ends of every stream have reported", || self.is_settled());
    }
}

impl Deref for Ledger {
    type Target = ledger::Ledger;

    fn deref(&self) -> &ledger::Ledger {
        &self.0
    }
}

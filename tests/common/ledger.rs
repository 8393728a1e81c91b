//! The stream ledger of `tidegate selftest` for tests: scripted backends serve its
//! backend end, and faults become panics.

use super::backend::{Script, script};
use super::{eventually, patience, secs};
use std::net::SocketAddr;
use std::ops::Deref;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;
use tidegate_lab::ledger;

pub use tidegate_lab::ledger::StreamSizes;

/// The records of both ends and the number of streams.
pub struct Ledger(ledger::Ledger);

impl Ledger {
    pub fn new(sizes: StreamSizes) -> Arc<Ledger> {
        Ledger::make(sizes, true, secs(20))
    }

    /// A ledger without streams that end in a reset: every stream must be complete.
    pub fn without_aborts(sizes: StreamSizes) -> Arc<Ledger> {
        Ledger::make(sizes, false, secs(20))
    }

    /// A ledger with a timeout of 1 s, for tests that break streams on purpose.
    pub fn impatient(sizes: StreamSizes) -> Arc<Ledger> {
        Ledger::make(sizes, false, secs(1))
    }

    fn make(sizes: StreamSizes, aborts: bool, silence: Duration) -> Arc<Ledger> {
        Arc::new(Ledger(ledger::Ledger::new(sizes, aborts, patience(silence))))
    }

    /// The script for the backend end. Any number of backends can run it.
    pub fn script(self: &Arc<Ledger>) -> Script {
        let ledger = self.clone();
        script(move |conn| ledger.serve(&conn.socket, |_| {}))
    }

    /// Runs streams until `stop` is set.
    pub fn run_until(&self, addresses: &[SocketAddr], stop: &AtomicBool, at_once: usize) {
        self.run_from(1, addresses, stop, at_once);
    }

    /// Every difference found, with the seed of its stream.
    pub fn faults(&self) -> Vec<String> {
        self.0.faults().iter().map(ToString::to_string).collect()
    }

    /// Panics with the first differences if any exist.
    #[track_caller]
    pub fn assert_clean(&self) {
        let faults = self.faults();
        let first: Vec<&String> = faults.iter().take(10).collect();
        assert!(faults.is_empty(), "{} of {} streams: {first:#?}", faults.len(), self.streams());
    }

    /// Waits until both ends of every stream have reported.
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

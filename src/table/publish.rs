//! One writer, many readers, one `ArcSwap`.
//!
//! The control thread publishes; each worker keeps a cached reader, so loading
//! the table costs one shared load and a compare while it has not changed.
//! Neither side ever waits for the other.

use super::Table;
use arc_swap::{ArcSwap, Cache};
use std::rc::Rc;
use std::sync::Arc;

/// The writing end; cloned into readers.
#[derive(Debug, Clone)]
pub struct TablePublisher {
    current: Arc<ArcSwap<Table>>,
}

/// A worker's reading end.
///
/// It keeps the table in an `Rc`, so that a session's hold on it touches no
/// cache line another core writes.
#[derive(Debug)]
pub struct TableReader {
    cache: Cache<Arc<ArcSwap<Table>>, Arc<Table>>,
    local: Rc<Arc<Table>>,
}

// === impl TablePublisher ===

impl TablePublisher {
    /// Starts with `first`.
    pub fn new(first: Arc<Table>) -> TablePublisher {
        TablePublisher { current: Arc::new(ArcSwap::new(first)) }
    }

    /// Replaces the table for every session that starts from now on.
    pub fn publish(&self, table: Arc<Table>) {
        self.current.store(table);
    }

    /// The table as of now.
    pub fn current(&self) -> Arc<Table> {
        self.current.load_full()
    }

    /// A reader for one worker.
    pub fn reader(&self) -> TableReader {
        let mut cache = Cache::new(Arc::clone(&self.current));
        let local = Rc::new(Arc::clone(cache.load()));
        TableReader { cache, local }
    }
}

// === impl TableReader ===

impl TableReader {
    /// The newest table.
    #[inline]
    pub fn load(&mut self) -> Rc<Arc<Table>> {
        let newest = self.cache.load();
        if !Arc::ptr_eq(newest, &self.local) {
            self.local = Rc::new(Arc::clone(newest));
        }
        Rc::clone(&self.local)
    }
}

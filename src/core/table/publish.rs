//! Publishes tables: one writer, many readers, one `ArcSwap`.
//!
//! The control thread publishes. Each worker keeps a cached reader. Loading an
//! unchanged table costs one shared load and a comparison. Neither side waits for the
//! other.

use super::Table;
use arc_swap::{ArcSwap, Cache};
use std::rc::Rc;
use std::sync::Arc;

/// The writing side; creates readers.
#[derive(Debug, Clone)]
pub struct TablePublisher {
    current: Arc<ArcSwap<Table>>,
}

/// A worker's reading end.
///
/// It keeps the table in an `Rc`, so that a session's hold on it touches no
/// cache line another core writes.
// The `Rc` costs one allocation per table. It saves every session two locked operations
// on the table's shared reference count.
/// The reading side of one worker.
///
/// It keeps the table in an `Rc`, so that a session's reference does not touch a cache
/// line that other cores write.
#[allow(clippy::redundant_allocation)]
#[derive(Debug)]
pub struct TableReader {
    cache: Cache<Arc<ArcSwap<Table>>, Arc<Table>>,
    local: Rc<Arc<Table>>,
}

// === impl TablePublisher ===

impl TablePublisher {
    /// Creates a publisher whose current table is `first`.
    pub fn new(first: Arc<Table>) -> TablePublisher {
        TablePublisher { current: Arc::new(ArcSwap::new(first)) }
    }

    /// Replaces the table for all sessions that start from now on.
    pub fn publish(&self, table: Arc<Table>) {
        self.current.store(table);
    }

    /// Returns the current table.
    pub fn current(&self) -> Arc<Table> {
        self.current.load_full()
    }

    /// Creates a reader for one worker.
    pub fn reader(&self) -> TableReader {
        let mut cache = Cache::new(Arc::clone(&self.current));
        let local = Rc::new(Arc::clone(cache.load()));
        TableReader { cache, local }
    }
}

// === impl TableReader ===

impl TableReader {
    /// Returns the newest table.
    #[inline]
    pub fn load(&mut self) -> Rc<Arc<Table>> {
        let newest = self.cache.load();
        if !Arc::ptr_eq(newest, &self.local) {
            self.local = Rc::new(Arc::clone(newest));
        }
        Rc::clone(&self.local)
    }
}

#[cfg(test)]
#[cfg(not(feature = "loom"))]
mod tests {
    use super::*;

    fn table(serial: u64) -> Arc<Table> {
        Arc::new(Table { serial, ..Table::empty() })
    }

    #[test]
    fn every_reader_sees_the_newest_table() {
        let publisher = TablePublisher::new(table(1));
        let (mut one, mut other) = (publisher.reader(), publisher.clone().reader());
        assert_eq!((one.load().serial, other.load().serial), (1, 1));
        publisher.publish(table(2));
        assert_eq!((one.load().serial, other.load().serial), (2, 2));
        assert_eq!(publisher.current().serial, 2);
    }

    #[test]
    fn session_keeps_its_table_and_releases_it_at_the_end() {
        let first = table(1);
        let publisher = TablePublisher::new(Arc::clone(&first));
        let mut reader = publisher.reader();
        let session = reader.load();
        publisher.publish(table(2));
        reader.load();
        assert_eq!(session.serial, 1);
        drop(session);
        assert_eq!(Arc::strong_count(&first), 1);
    }

    #[test]
    fn unchanged_table_is_not_reloaded() {
        let publisher = TablePublisher::new(table(1));
        let mut reader = publisher.reader();
        assert!(Rc::ptr_eq(&reader.load(), &reader.load()));
    }
}

//! Publishes tables to all planes, and starts builds of large tables.
//!
//! Owned by the control loop, which feeds finished builds to the controller. It never
//! changes the content of a table.

use super::builder::Builder;
use std::sync::Arc;
use tidegate_core::control::{BuildToken, ControlEvent};
use tidegate_core::table::Table;
use tidegate_core::table::build::PoolBuild;
use tidegate_core::table::publish::TablePublisher;
use tidegate_dataplane::accept::wait_queue::SlotWaiters;

/// A part of the process that routes connections with the published table.
#[derive(Debug)]
pub(super) enum Plane {
    /// The workers, which relay each connection.
    Proxy { tables: TablePublisher, waiters: Arc<SlotWaiters> },
}

/// All planes of this process.
#[derive(Debug)]
pub(super) struct Planes {
    planes: Vec<Plane>,
    builder: Builder,
}

// === impl Plane ===

impl Plane {
    /// Returns the name for the log.
    fn name(&self) -> &'static str {
        match self {
            Plane::Proxy { .. } => "proxy",
        }
    }

    /// Publishes `table` for all new connections.
    fn publish(&mut self, table: &Arc<Table>) {
        match self {
            Plane::Proxy { tables, waiters } => {
                tables.publish(Arc::clone(table));
                // Wakes waiting clients, because the table may have new backends.
                waiters.slot_freed();
            }
        }
    }
}

// === impl Planes ===

impl Planes {
    pub(super) fn new(planes: Vec<Plane>) -> Planes {
        Planes { planes, builder: Builder::new() }
    }

    /// Publishes `table` to every plane.
    pub(super) fn publish(&mut self, table: &Arc<Table>) {
        let (generation, serial) = (table.generation, table.serial);
        let serving = table.pools.iter().map(|pool| pool.serving.len()).sum::<usize>();
        let pools = table.pools.len();
        for plane in &mut self.planes {
            plane.publish(table);
            let plane = plane.name();
            tracing::debug!(generation, serial, pools, serving, plane, "table published");
        }
    }

    /// Starts to build a pool's part of a table.
    pub(super) fn build(&mut self, token: BuildToken, build: Box<PoolBuild>) {
        self.builder.build(token, build);
    }

    /// Waits for the next finished part. Never resolves while no build runs.
    pub(super) async fn wake(&mut self) -> ControlEvent {
        self.builder.made().await
    }
}

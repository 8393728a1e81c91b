//! What tables are published to, and the thread that builds the large ones.
//!
//! Owned by the control loop, which gives each table to all planes and feeds what is
//! built to the controller. It decides nothing about a table.

use super::builder::Builder;
use std::sync::Arc;
use tidegate_core::control::{BuildToken, ControlEvent};
use tidegate_core::table::Table;
use tidegate_core::table::build::PoolBuild;
use tidegate_core::table::publish::TablePublisher;
use tidegate_dataplane::accept::wait_queue::SlotWaiters;

/// Something that routes connections by the table in force.
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
    /// For the log.
    fn name(&self) -> &'static str {
        match self {
            Plane::Proxy { .. } => "proxy",
        }
    }

    /// Puts `table` in force for every connection that comes from now on.
    fn publish(&mut self, table: &Arc<Table>) {
        match self {
            Plane::Proxy { tables, waiters } => {
                tables.publish(Arc::clone(table));
                // A client that waits for a slot may have new backends to wait for.
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

    /// Has a pool's part of a table built.
    pub(super) fn build(&mut self, token: BuildToken, build: Box<PoolBuild>) {
        self.builder.build(token, build);
    }

    /// The next part that is built; never resolves while none is under way.
    pub(super) async fn wake(&mut self) -> ControlEvent {
        self.builder.made().await
    }
}

//! Builds the table parts of large pools on a separate thread.
//!
//! Owned by `planes`. Each [`ControlEffect::Build`] starts a build, and the control loop
//! feeds the result to the controller. If no thread can be started, the control thread
//! builds the part. The builder publishes nothing.
//!
//! [`ControlEffect::Build`]: tidegate_core::control::ControlEffect::Build

use std::sync::{Arc, mpsc as sync};
use std::time::Duration;
use tidegate_core::control::{BuildToken, ControlEvent};
use tidegate_core::table::PoolTable;
use tidegate_core::table::build::PoolBuild;
use tidegate_net::clock;
use tokio::sync::mpsc;

/// Time between two checks whether workers still use a replaced part. Dropping a part
/// with thousands of backends takes milliseconds, so this thread drops it instead of a
/// worker.
const RETIRE_STEP: Duration = Duration::from_millis(100);

/// Replaced parts that are kept at most. Beyond this, the last worker drops the part.
const RETIRED_MAX: usize = 8;

/// See the module's documentation. Queued builds are bounded by the number of pools: a
/// pool has at most one build at a time.
#[derive(Debug)]
pub(super) struct Builder {
    /// `None` until the first build.
    orders: Option<sync::Sender<BuildOrder>>,
    made: mpsc::UnboundedSender<ControlEvent>,
    results: mpsc::UnboundedReceiver<ControlEvent>,
}

type BuildOrder = (BuildToken, Box<PoolBuild>);

// === impl Builder ===

impl Builder {
    pub(super) fn new() -> Builder {
        let (made, results) = mpsc::unbounded_channel();
        Builder { orders: None, made, results }
    }

    /// Starts a build.
    pub(super) fn build(&mut self, token: BuildToken, build: Box<PoolBuild>) {
        if self.orders.is_none() {
            self.orders = start(self.made.clone());
        }
        let order = (token, build);
        let refused = match &self.orders {
            Some(orders) => orders.send(order).err().map(|refused| refused.0),
            None => Some(order),
        };
        if let Some(order) = refused {
            // The next build tries to start a thread again.
            self.orders = None;
            // Cannot fail: `self` owns the receiver.
            let _ = self.made.send(make(order));
        }
    }

    /// Waits for the next finished part. Never resolves while no build runs.
    pub(super) async fn made(&mut self) -> ControlEvent {
        match self.results.recv().await {
            Some(event) => event,
            None => std::future::pending().await,
        }
    }
}

fn start(made: mpsc::UnboundedSender<ControlEvent>) -> Option<sync::Sender<BuildOrder>> {
    let (orders, to_make) = sync::channel();
    let work = move || work(&to_make, &made);
    match std::thread::Builder::new().name("table-builder".to_owned()).spawn(work) {
        Ok(_) => Some(orders),
        Err(error) => {
            tracing::warn!(%error, "cannot start the table-builder thread; state changes can take effect late");
            None
        }
    }
}

fn work(orders: &sync::Receiver<BuildOrder>, made: &mpsc::UnboundedSender<ControlEvent>) {
    let mut retired: Vec<Arc<PoolTable>> = Vec::new();
    loop {
        let order = match retired.is_empty() {
            true => orders.recv().map_err(|_| sync::RecvTimeoutError::Disconnected),
            false => orders.recv_timeout(RETIRE_STEP),
        };
        match order {
            Ok(order) => {
                retired.extend(order.1.previous.clone());
                if made.send(make(order)).is_err() {
                    return;
                }
            }
            Err(sync::RecvTimeoutError::Timeout) => {}
            Err(sync::RecvTimeoutError::Disconnected) => return,
        }
        retired.retain(|part| Arc::strong_count(part) > 1);
        let more = retired.len().saturating_sub(RETIRED_MAX);
        retired.drain(..more);
    }
}

fn make((token, build): BuildOrder) -> ControlEvent {
    let began = clock::now();
    let built = Box::new(build.run());
    ControlEvent::Built { token, built, took: clock::now().saturating_duration_since(began) }
}

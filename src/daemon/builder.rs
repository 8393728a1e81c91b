//! Makes large pools' parts of tables on a thread of its own.
//!
//! Owned by the control loop, which hands over what [`ControlEffect::Build`] asks for and
//! feeds the results back as events. Where no thread can be started, the control thread
//! makes the part itself: late beats never. It publishes nothing.
//!
//! [`ControlEffect::Build`]: tidegate_core::control::ControlEffect::Build

use std::sync::{Arc, mpsc as sync};
use std::time::Duration;
use tidegate_core::control::{BuildToken, ControlEvent};
use tidegate_core::table::PoolTable;
use tidegate_core::table::build::PoolBuild;
use tidegate_net::clock;
use tokio::sync::mpsc;

/// How often a replaced part is looked at until no worker reads it any more: to drop
/// one of thousands of backends takes milliseconds, which are no worker's to spend.
const RETIRE_STEP: Duration = Duration::from_millis(100);

/// Replaced parts kept so at most; beyond that, the worker that lets go last drops it.
const RETIRED_MAX: usize = 8;

/// See the module's documentation. A pool has one part under way at a time, so there
/// are never more than pools.
#[derive(Debug)]
pub(super) struct Builder {
    /// `None` until the first part is asked for.
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

    /// Has it made.
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
            // The next one may find a thread again.
            self.orders = None;
            // The receiver is this very value's.
            let _ = self.made.send(make(order));
        }
    }

    /// The next part that is made; never where none is under way.
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

//! Reports and orders while the old process drains, as the control loop of either
//! side sends and takes them.
//!
//! Part of the control loop; `reports` carries them.

use super::incoming;
use super::message;
use super::reports::{Order, OrderedIntent, Report, Reporter};
use crate::app::control_loop::Control;
use crate::clock;
use crate::control::Effect;
use crate::control::elsewhere::HeldBackend;
use crate::health::Intent;
use crate::net::handover::Channel;
use crate::table::state::BackendId;
use std::time::Duration;
use tokio::sync::mpsc;

/// Orders that may wait for the control loop.
const ORDERS_MAX: usize = 16;

/// The process that took over.
#[derive(Debug)]
pub(super) struct Successor {
    pub(super) channel: Channel,
    /// What it understands; see `message`.
    pub(super) level: u16,
    /// `None` where it takes no reports.
    pub(super) reporter: Option<Reporter>,
    pub(super) orders: mpsc::Receiver<Order>,
    /// A first signal to stop says nothing new to a process that drains already.
    pub(super) signalled: bool,
}

// === impl Successor ===

impl Successor {
    pub(super) fn new(channel: Channel, level: u16) -> Successor {
        let (tell, orders) = mpsc::channel(ORDERS_MAX);
        let reporter = match (level, channel.try_clone(), channel.try_clone()) {
            (1.., Ok(to_read), Ok(to_write)) => {
                let listen = move || while pass_order_on(&to_read, &tell).is_some() {};
                let named = std::thread::Builder::new().name("successor".to_owned());
                named.spawn(listen).and_then(|_| Reporter::start(to_write)).ok()
            }
            _ => None,
        };
        Successor { channel, level, reporter, orders, signalled: false }
    }
}

/// Waits for one order; `None` when the next process is gone.
fn pass_order_on(channel: &Channel, tell: &mpsc::Sender<Order>) -> Option<()> {
    let order = message::receive(channel, clock::now() + incoming::DRAIN_MAX).ok()?;
    tell.blocking_send(order).ok()
}

// === impl Control ===

impl Control {
    pub(super) fn take_report(&mut self, report: &Report) {
        self.upgrades.elsewhere = report.sessions;
        let (backends, frontends) = (&report.backends, &report.frontends);
        let effects = self.controller.held_elsewhere(backends, frontends, clock::now());
        self.perform(effects);
        // Whoever waits for a cap may have room.
        self.shared.gate.opened();
    }

    /// Tells the next process what sessions are left, where it is time to.
    pub(in crate::app) fn report(&mut self) {
        let sessions = self.sessions();
        let reporter = self.upgrades.successor.as_mut().and_then(|next| next.reporter.as_mut());
        if let Some(reporter) = reporter {
            reporter.report(&self.controller, sessions, clock::now());
        }
    }

    /// Does what the next process wants, and has the one before do it, too.
    pub(super) fn obey(&mut self, order: &Order) {
        if let Some(HeldBackend { pool, name, address, .. }) = &order.cut
            && let Some(id) = self.controller.find_known(pool, name, address)
        {
            self.perform(vec![Effect::CutSessions(id)]);
        }
        if let Some(OrderedIntent { pool, backend, intent }) = &order.intent
            && let Some(intent) = Intent::named(intent)
            && let Ok(effects) = self.controller.set_intent(pool, backend, intent, clock::now())
        {
            self.perform(effects);
            self.order_intent(pool, backend, intent);
        }
        if let Some(ms) = order.end_within_ms {
            let time = Duration::from_millis(ms);
            self.end_within(time);
            self.order_end_within(time);
        }
    }

    /// Has the process before reset that backend's sessions, too.
    pub(in crate::app) fn order_cut(&self, id: BackendId) {
        if let Some(before) = &self.upgrades.predecessor
            && let Some(state) = self.controller.known(id)
        {
            let cut = HeldBackend {
                pool: state.pool.to_string(),
                name: state.name.to_string(),
                address: state.address_text.to_string(),
                sessions: 0,
            };
            before.order(&Order { cut: Some(cut), ..Order::default() });
        }
    }

    /// Has the process before know what an operator wants.
    pub(in crate::app) fn order_intent(&self, pool: &str, backend: &str, intent: Intent) {
        if let Some(before) = &self.upgrades.predecessor {
            let intent = OrderedIntent {
                pool: pool.to_owned(),
                backend: backend.to_owned(),
                intent: intent.name().to_owned(),
            };
            before.order(&Order { intent: Some(intent), ..Order::default() });
        }
    }

    /// Has the process before end by then.
    pub(in crate::app) fn order_end_within(&self, time: Duration) {
        if let Some(before) = &self.upgrades.predecessor {
            let ms = u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
            before.order(&Order { end_within_ms: Some(ms), ..Order::default() });
        }
    }
}

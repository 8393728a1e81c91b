//! What the new process has the one before do while that drains: orders, and how an
//! operator's intent gets there before its answer.
//!
//! Part of the control loop, on both sides. The frames are of `reports`; an older program
//! takes no orders.

use super::reports::{OldProcessOrder, OrderedIntent, held};
use crate::control_loop::Control;
use std::time::Duration;
use tidegate_core::control::ControlEffect;
use tidegate_core::control::sessions_elsewhere::HeldBackend;
use tidegate_core::health::Intent;
use tidegate_core::table::state::BackendId;
use tidegate_net::clock;
use tokio::sync::oneshot;

/// How long an operator waits for the process before to be told of an intent, and for the
/// disk. To put it into the kernel's queue takes microseconds unless that process is
/// stopped.
const INTENT_KEPT_MAX: Duration = Duration::from_secs(1);

impl Control {
    /// Does what the next process wants, and has the one before do it, too.
    pub(super) fn obey(&mut self, order: &OldProcessOrder) {
        if let Some(HeldBackend { pool, name, address, .. }) = &order.cut
            && let Some(id) = self.controller.find_known(pool, name, address)
        {
            self.apply_effects(vec![ControlEffect::ResetSessions(id)]);
        }
        if let Some(OrderedIntent { pool, backend, intent }) = &order.intent
            && let Some(intent) = Intent::named(intent)
            && let Ok(effects) = self.controller.set_intent(pool, backend, intent, clock::now())
        {
            self.apply_effects(effects);
            self.order_intent(pool, backend, intent);
        }
        if let Some(ms) = order.end_within_ms {
            let time = Duration::from_millis(ms);
            self.lifecycle.end_within(time);
            self.order_end_within(time);
        }
    }

    /// Has the process before reset that backend's sessions, too.
    pub(crate) fn order_cut(&self, id: BackendId) {
        if let Some(before) = &self.upgrades.predecessor
            && let Some(state) = self.controller.known(id)
        {
            let cut = Some(held(state));
            before.order(&OldProcessOrder { cut, ..OldProcessOrder::default() });
        }
    }

    /// Has the process before know what an operator wants; gives what tells that it is
    /// sent.
    pub(crate) fn order_intent(
        &self,
        pool: &str,
        backend: &str,
        intent: Intent,
    ) -> Option<oneshot::Receiver<()>> {
        let intent = OrderedIntent {
            pool: pool.to_owned(),
            backend: backend.to_owned(),
            intent: intent.name().to_owned(),
        };
        let before = self.upgrades.predecessor.as_ref()?;
        before.order(&OldProcessOrder { intent: Some(intent), ..OldProcessOrder::default() })
    }

    /// Leaves operators' intents with the supervisor and on disk; gives what resolves once
    /// they are on disk, where they are to be.
    pub(crate) fn keep_intents(&mut self) -> Option<oneshot::Receiver<()>> {
        self.supervised.write_intents(&self.controller);
        self.state.write(|| self.controller.save_intents(clock::now()))
    }

    /// Answers an operator whose intent is in force, once it is `written` to the disk.
    /// Without a supervisor the process before has to have it as well: it is `sent` there,
    /// and that process goes on if this one ends.
    pub(crate) fn answer_intent<T: Send + 'static>(
        &self,
        sent: Option<oneshot::Receiver<()>>,
        written: Option<oneshot::Receiver<()>>,
        reply: oneshot::Sender<T>,
        done: T,
    ) {
        let sent = sent.filter(|_| self.supervised.link().is_none());
        if sent.is_none() && written.is_none() {
            let _ = reply.send(done);
            return;
        }
        // The control loop has other things to do meanwhile.
        tokio::spawn(async move {
            for kept in [sent, written].into_iter().flatten() {
                if tokio::time::timeout(INTENT_KEPT_MAX, kept).await.is_err() {
                    tracing::warn!(
                        "operator intent is in effect but not stored yet; it is lost if this process ends now"
                    );
                }
            }
            let _ = reply.send(done);
        });
    }

    /// Has the process before end by then.
    pub(crate) fn order_end_within(&self, time: Duration) {
        if let Some(before) = &self.upgrades.predecessor {
            let ms = u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
            before
                .order(&OldProcessOrder { end_within_ms: Some(ms), ..OldProcessOrder::default() });
        }
    }
}

//! Orders of the new process to an old process that drains, and the storage of operator
//! intents.
//!
//! Part of the control loop, in both processes. `reports` defines the frames. An order is
//! forwarded to the old process of the old process. An older program ignores orders.

use super::reports::{OldProcessOrder, OrderedIntent, held};
use crate::control_loop::Control;
use std::time::Duration;
use tidegate_core::control::sessions_elsewhere::HeldBackend;
use tidegate_core::health::Intent;
use tidegate_core::outcome::Cause;
use tidegate_core::table::state::BackendId;
use tidegate_net::clock;
use tokio::sync::oneshot;

/// Maximum delay of an answer to an operator, until the intent is sent to the old process
/// and written to disk. Sending takes microseconds, unless the old process is stopped.
const INTENT_KEPT_MAX: Duration = Duration::from_secs(1);

impl Control {
    /// Executes an order of the new process and forwards it to the old process.
    pub(super) fn execute_order(&mut self, order: &OldProcessOrder) {
        if let Some(HeldBackend { pool, name, address, .. }) = &order.cut
            && let Some(id) = self.controller.find_known(pool, name, address)
        {
            // An older program names no cause: it orders resets for `on_removal` only.
            let cause = Cause::named(&order.cut_cause).unwrap_or(Cause::BackendRemoved);
            self.reset_sessions(id, cause);
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

    /// Orders the old process to reset the sessions of a backend.
    pub(crate) fn order_cut(&self, id: BackendId, cause: Cause) {
        if let Some(old_process) = &self.upgrades.old_process
            && let Some(state) = self.controller.known(id)
        {
            let (cut, cut_cause) = (Some(held(state)), cause.name().to_owned());
            old_process.order(&OldProcessOrder { cut, cut_cause, ..OldProcessOrder::default() });
        }
    }

    /// Sends an operator's intent to the old process. The returned receiver completes once
    /// it is sent.
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
        let old_process = self.upgrades.old_process.as_ref()?;
        old_process.order(&OldProcessOrder { intent: Some(intent), ..OldProcessOrder::default() })
    }

    /// Stores the operators' intents with the supervisor and on disk. The returned receiver
    /// completes once they are on disk; `None` if no state directory is configured.
    pub(crate) fn keep_intents(&mut self) -> Option<oneshot::Receiver<()>> {
        self.supervised.write_intents(&self.controller);
        self.state.write_intents(|| self.controller.save_intents(clock::now()))
    }

    /// Answers an operator once the intent is `written` to disk. Without a supervisor, the
    /// answer also waits until the intent is `sent` to the old process, which accepts again
    /// if this process exits.
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
        // A separate task, so that the control loop does not wait.
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

    /// Orders the old process to exit within `time`.
    pub(crate) fn order_end_within(&self, time: Duration) {
        if let Some(old_process) = &self.upgrades.old_process {
            let ms = u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
            old_process
                .order(&OldProcessOrder { end_within_ms: Some(ms), ..OldProcessOrder::default() });
        }
    }
}

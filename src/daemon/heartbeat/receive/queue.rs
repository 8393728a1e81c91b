//! The queue of accepted heartbeats between the receiving thread and the control thread.
//!
//! The receiving thread pushes, the control thread pops. The size is bounded. At the
//! bound, heartbeats of the same sender are merged: only their number and the newest
//! heartbeat remain.

use super::{ReceivedHeartbeat, lock};
use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex};
use tokio::sync::Notify;

/// Heartbeats that wait without merging. Enough for 400 senders with 10 heartbeats per
/// second for one second. Beyond this, one heartbeat per sender is kept.
pub const QUEUE_MAX: usize = 4096;

/// See the module's documentation.
#[derive(Debug, Default)]
pub(super) struct HeartbeatQueue {
    waiting: Mutex<QueuedHeartbeat>,
    arrived: Notify,
}

#[derive(Debug, Default)]
struct QueuedHeartbeat {
    in_order: VecDeque<ReceivedHeartbeat>,
    /// The newest heartbeat of each sender that arrived while `in_order` was full. Newer
    /// than those in `in_order`. Bounded by the number of senders of the verifier.
    newest: HashMap<(Arc<str>, Arc<str>), ReceivedHeartbeat>,
}

// === impl HeartbeatQueue ===

impl HeartbeatQueue {
    /// Queues a batch. Returns the number of merged heartbeats.
    pub(super) fn push(&self, batch: impl Iterator<Item = ReceivedHeartbeat>) -> u64 {
        let mut waiting = lock(&self.waiting);
        let merged = batch.map(|arrived| u64::from(waiting.push(arrived))).sum();
        drop(waiting);
        self.arrived.notify_one();
        merged
    }

    pub(super) fn pop(&self) -> Option<ReceivedHeartbeat> {
        lock(&self.waiting).pop()
    }

    /// Wakes the control thread without a new heartbeat.
    pub(super) fn wake(&self) {
        self.arrived.notify_one();
    }

    pub(super) async fn arrived(&self) {
        self.arrived.notified().await;
    }
}

// === impl QueuedHeartbeat ===

impl QueuedHeartbeat {
    /// Returns whether the heartbeat was merged with an older one.
    fn push(&mut self, arrived: ReceivedHeartbeat) -> bool {
        if self.newest.is_empty() && self.in_order.len() < QUEUE_MAX {
            self.in_order.push_back(arrived);
            return false;
        }
        let sender = (Arc::clone(&arrived.heartbeat.pool), Arc::clone(&arrived.heartbeat.name));
        let before = self.newest.get(&sender).map_or(0, |older| older.stands_for);
        let stands_for = arrived.stands_for.saturating_add(before);
        self.newest.insert(sender, ReceivedHeartbeat { stands_for, ..arrived });
        before > 0
    }

    fn pop(&mut self) -> Option<ReceivedHeartbeat> {
        if self.in_order.is_empty() && !self.newest.is_empty() {
            let mut newest: Vec<ReceivedHeartbeat> =
                self.newest.drain().map(|(_, one)| one).collect();
            newest.sort_by_key(|one| one.at);
            self.in_order = newest.into();
        }
        self.in_order.pop_front()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::{Duration, Instant};
    use tidegate_heartbeat::{Heartbeat, SenderState};

    fn arrived(name: &str, sequence: u64, began: Instant) -> ReceivedHeartbeat {
        let heartbeat = Heartbeat {
            pool: "web".into(),
            name: name.into(),
            address: "10.0.0.1:80".parse().unwrap(),
            incarnation: 1,
            sequence,
            interval: Duration::from_millis(100),
            state: SenderState::Ready,
            weight: 1,
            in_flight: 0,
            load: 0,
            key_id: 1,
        };
        ReceivedHeartbeat { heartbeat, at: began + Duration::from_millis(sequence), stands_for: 1 }
    }

    #[test]
    fn heartbeats_are_popped_in_the_order_of_arrival() {
        let (queue, began) = (HeartbeatQueue::default(), tidegate_net::clock::now());
        queue.push((0..10).map(|n| arrived("a", n, began)));
        let out: Vec<u64> =
            std::iter::from_fn(|| queue.pop()).map(|a| a.heartbeat.sequence).collect();
        assert_eq!(out, (0..10).collect::<Vec<_>>());
    }

    #[test]
    fn full_queue_keeps_the_newest_of_each_sender_and_counts_the_rest() {
        let (queue, began) = (HeartbeatQueue::default(), tidegate_net::clock::now());
        let sent = 3 * QUEUE_MAX as u64;
        let merged =
            queue.push((0..sent).flat_map(|n| ["a", "b"].map(|name| arrived(name, n, began))));
        let out: Vec<ReceivedHeartbeat> = std::iter::from_fn(|| queue.pop()).collect();
        assert_eq!(out.len(), QUEUE_MAX + 2);
        assert_eq!(merged, 2 * sent - out.len() as u64);
        for name in ["a", "b"] {
            let of = |one: &&ReceivedHeartbeat| &*one.heartbeat.name == name;
            let seen: u64 = out.iter().filter(of).map(|one| u64::from(one.stands_for)).sum();
            assert_eq!(seen, sent);
            assert_eq!(out.iter().rfind(of).unwrap().heartbeat.sequence, sent - 1);
        }
    }

    #[test]
    fn order_is_kept_while_merged_heartbeats_are_popped() {
        let (queue, began) = (HeartbeatQueue::default(), tidegate_net::clock::now());
        queue.push((0..=QUEUE_MAX as u64 + 1).map(|n| arrived("a", n, began)));
        let mut last = None;
        while let Some(out) = queue.pop() {
            assert!(last < Some(out.heartbeat.sequence));
            last = Some(out.heartbeat.sequence);
            if last == Some(QUEUE_MAX as u64 + 1) {
                queue.push([arrived("a", QUEUE_MAX as u64 + 2, began)].into_iter());
            }
        }
        assert_eq!(last, Some(QUEUE_MAX as u64 + 2));
    }
}

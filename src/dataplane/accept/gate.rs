//! Where listeners and sessions wait for a slot below some cap.
//!
//! One for the whole process. Whoever gives a slot back calls [`SlotWaiters::slot_freed`];
//! whoever found a cap reached waits and tries again: listeners in
//! [`SlotWaiters::wait_until`], all at once; clients that were let in to wait for a
//! backend of their pool in a line, first come, first served over all workers.
//! It keeps no count of slots itself: the caps are `InFlight`s, and waiting here
//! costs nothing until a cap is really reached.

use std::collections::{BTreeMap, HashMap};
use std::future::poll_fn;
use std::sync::atomic::{AtomicUsize, Ordering, fence};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use tokio::sync::Notify;

/// See the module's documentation.
#[derive(Debug, Default)]
pub struct SlotWaiters {
    /// Listeners, and places in lines.
    waiting: AtomicUsize,
    opened: Notify,
    /// Places in lines.
    queued: AtomicUsize,
    lines: Mutex<PoolQueues>,
}

#[derive(Debug, Default)]
struct PoolQueues {
    next: u64,
    /// By pool; only those in which somebody waits.
    by_pool: HashMap<Arc<str>, PoolQueue>,
}

/// The clients that wait for one pool, in the order they came; each with whom to
/// wake, once it has looked.
type PoolQueue = BTreeMap<u64, Option<Waker>>;

/// A place in a pool's line; dropping it lets the next one come forward.
#[derive(Debug)]
pub struct QueueTicket {
    gate: Arc<SlotWaiters>,
    pool: Arc<str>,
    number: u64,
}

struct WaitGuard<'a>(&'a SlotWaiters);

impl SlotWaiters {
    /// Nobody waits.
    pub fn new() -> SlotWaiters {
        SlotWaiters::default()
    }

    /// A slot came free somewhere (or the table changed): everybody who waits
    /// looks again. One shared load while nobody does.
    #[inline]
    pub fn slot_freed(&self) {
        // Pairs with the fence in `wait_until`: either this load sees the
        // waiter, or the waiter's check sees the slot that was given back.
        fence(Ordering::SeqCst);
        if self.waiting.load(Ordering::Relaxed) > 0 {
            self.wake();
        }
    }

    #[cold]
    fn wake(&self) {
        self.opened.notify_waiters();
        if self.queued.load(Ordering::Relaxed) > 0 {
            // The first of each line: a reload may have sent them to other pools.
            self.lock().by_pool.values_mut().for_each(wake_first);
        }
    }

    /// Clients in the line of that pool.
    #[inline]
    pub fn queued(&self, pool: &str) -> usize {
        if self.queued.load(Ordering::Relaxed) == 0 {
            return 0;
        }
        self.lock().by_pool.get(pool).map_or(0, PoolQueue::len)
    }

    /// Clients in each line in which there are any.
    pub fn all_queued(&self) -> HashMap<Arc<str>, usize> {
        self.lock().by_pool.iter().map(|(pool, line)| (Arc::clone(pool), line.len())).collect()
    }

    /// A place at the end of the line of `pool`.
    pub fn join(self: &Arc<SlotWaiters>, pool: &Arc<str>) -> QueueTicket {
        let mut lines = self.lock();
        let number = lines.next;
        lines.next += 1;
        lines.by_pool.entry(Arc::clone(pool)).or_default().insert(number, None);
        self.queued.fetch_add(1, Ordering::SeqCst);
        self.waiting.fetch_add(1, Ordering::SeqCst);
        QueueTicket { gate: Arc::clone(self), pool: Arc::clone(pool), number }
    }

    fn lock(&self) -> MutexGuard<'_, PoolQueues> {
        // Nothing under the lock can panic half-way.
        self.lines.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until `attempt` gives something. It is called again each time the
    /// gate opens; dropping the future is safe at any point.
    pub async fn wait_until<T>(&self, mut attempt: impl FnMut() -> Option<T>) -> T {
        let _waiting = WaitGuard::enter(self);
        loop {
            let mut opened = std::pin::pin!(self.opened.notified());
            opened.as_mut().enable();
            fence(Ordering::SeqCst);
            if let Some(result) = attempt() {
                return result;
            }
            opened.await;
        }
    }
}

fn wake_first(line: &mut PoolQueue) {
    if let Some(mut first) = line.first_entry()
        && let Some(waker) = first.get_mut().take()
    {
        waker.wake();
    }
}

// === impl QueueTicket ===

impl QueueTicket {
    /// Waits until it is first and `attempt` gives something. That is called
    /// again each time the gate opens; dropping the future is safe at any point.
    pub async fn wait_until<T>(&self, mut attempt: impl FnMut() -> Option<T>) -> T {
        poll_fn(|cx| match self.notify_next(cx) {
            // Whoever gives a slot back from here on finds this one's waker.
            true => attempt().map_or(Poll::Pending, Poll::Ready),
            false => Poll::Pending,
        })
        .await
    }

    /// Whether it is first; leaves word whom to wake in any case.
    fn notify_next(&self, cx: &Context<'_>) -> bool {
        let mut lines = self.gate.lock();
        let Some(line) = lines.by_pool.get_mut(&self.pool) else { return false };
        let first = line.first_key_value().is_some_and(|(number, _)| *number == self.number);
        if let Some(waker) = line.get_mut(&self.number) {
            *waker = Some(cx.waker().clone());
        }
        drop(lines);
        fence(Ordering::SeqCst);
        first
    }
}

impl Drop for QueueTicket {
    fn drop(&mut self) {
        let mut lines = self.gate.lock();
        if let Some(line) = lines.by_pool.get_mut(&self.pool) {
            line.remove(&self.number);
            wake_first(line);
            if line.is_empty() {
                lines.by_pool.remove(&self.pool);
            }
        }
        self.gate.queued.fetch_sub(1, Ordering::SeqCst);
        drop(lines);
        self.gate.waiting.fetch_sub(1, Ordering::SeqCst);
        // The line is shorter: listeners may let somebody else in.
        self.gate.opened.notify_waiters();
    }
}

// === impl WaitGuard ===

impl<'a> WaitGuard<'a> {
    fn enter(gate: &'a SlotWaiters) -> WaitGuard<'a> {
        gate.waiting.fetch_add(1, Ordering::SeqCst);
        WaitGuard(gate)
    }
}

impl Drop for WaitGuard<'_> {
    fn drop(&mut self) {
        self.0.waiting.fetch_sub(1, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tidegate_core::balance::in_flight::InFlight;

    /// Polls once; whether it is ready.
    fn poll(place: &QueueTicket, slot: &InFlight) -> bool {
        let mut waited = std::pin::pin!(place.wait_until(|| slot.try_enter(1).then_some(())));
        waited.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_ready()
    }

    #[test]
    fn a_line_is_served_in_order_whoever_asks_first() {
        let (gate, slot) = (Arc::new(SlotWaiters::new()), InFlight::new());
        let places: Vec<QueueTicket> = (0..3).map(|_| gate.join(&"web".into())).collect();
        assert!(
            !poll(&places[2], &slot) && !poll(&places[1], &slot),
            "a slot is free, but not theirs"
        );
        assert!(poll(&places[0], &slot));
        assert_eq!(gate.queued("web"), 3);
    }

    #[test]
    fn whoever_leaves_the_line_lets_the_next_one_come_forward() {
        let (gate, slot) = (Arc::new(SlotWaiters::new()), InFlight::new());
        let [first, second, third] = [(); 3].map(|()| gate.join(&"web".into()));
        let other = gate.join(&"other".into());
        assert!(poll(&other, &InFlight::new()), "another pool's line");
        drop(second);
        assert!(poll(&first, &slot));
        drop(first);
        assert!(!poll(&third, &slot), "first in line, and no slot");
        slot.leave();
        assert!(poll(&third, &slot));
        drop((third, other));
        assert!(gate.all_queued().is_empty());
        assert_eq!(gate.waiting.load(Ordering::SeqCst), 0);
    }

    #[test]
    fn no_wake_up_is_lost_in_a_line_between_threads_fighting_for_one_slot() {
        let gate = Arc::new(SlotWaiters::new());
        let slot = Arc::new(InFlight::new());
        let threads = (0..4).map(|_| {
            let (gate, slot) = (Arc::clone(&gate), Arc::clone(&slot));
            std::thread::spawn(move || {
                let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
                runtime.block_on(async {
                    for _ in 0..2_000 {
                        let place = gate.join(&"web".into());
                        place.wait_until(|| slot.try_enter(1).then_some(())).await;
                        drop(place);
                        slot.leave();
                        gate.slot_freed();
                    }
                });
            })
        });
        threads.collect::<Vec<_>>().into_iter().for_each(|thread| thread.join().unwrap());
        assert_eq!((slot.get(), gate.waiting.load(Ordering::SeqCst)), (0, 0));
    }

    #[test]
    fn no_wake_up_is_lost_between_threads_fighting_for_one_slot() {
        let gate = Arc::new(SlotWaiters::new());
        let slot = Arc::new(InFlight::new());
        let threads: Vec<_> = (0..4)
            .map(|_| {
                let (gate, slot) = (Arc::clone(&gate), Arc::clone(&slot));
                std::thread::spawn(move || {
                    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
                    runtime.block_on(async {
                        for _ in 0..2_000 {
                            gate.wait_until(|| slot.try_enter(1).then_some(())).await;
                            slot.leave();
                            gate.slot_freed();
                        }
                    });
                })
            })
            .collect();
        for thread in threads {
            thread.join().unwrap();
        }
        assert_eq!(slot.get(), 0);
        assert_eq!(gate.waiting.load(Ordering::SeqCst), 0);
    }
}

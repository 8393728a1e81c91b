//! Waiting for a slot below a cap. One instance per process.
//!
//! Called by listeners and by sessions that found a cap reached. It never counts slots:
//! `InFlight` does.
//!
//! - Listeners and retries wait in [`SlotWaiters::wait_until`]. Every freed slot wakes all of
//!   them.
//! - A client waits in the queue of its pool ([`QueueTicket`]). The queue is first come, first
//!   served over all workers. Every freed slot wakes the first client of each queue.
//!
//! Code that frees a slot calls [`SlotWaiters::slot_freed`]. While nothing waits, a freed slot
//! costs one fence and one load.

use std::collections::{BTreeMap, HashMap};
use std::future::poll_fn;
use std::sync::atomic::{AtomicUsize, Ordering, fence};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use tokio::sync::Notify;

/// Everything that waits for a slot.
#[derive(Debug, Default)]
pub struct SlotWaiters {
    /// Callers of `wait_until`, plus tickets in all queues.
    waiting: AtomicUsize,
    freed: Notify,
    /// Tickets in all queues.
    queued: AtomicUsize,
    queues: Mutex<PoolQueues>,
}

#[derive(Debug, Default)]
struct PoolQueues {
    next: u64,
    /// Queues by pool name. Empty queues are removed.
    by_pool: HashMap<Arc<str>, PoolQueue>,
}

/// The queue of one pool by ticket number, oldest client first. The waker is set once the
/// client has polled.
type PoolQueue = BTreeMap<u64, Option<Waker>>;

/// A client's place in a pool's queue. Dropping it wakes the next client.
#[derive(Debug)]
pub struct QueueTicket {
    waiters: Arc<SlotWaiters>,
    pool: Arc<str>,
    number: u64,
}

struct WaitGuard<'a>(&'a SlotWaiters);

impl SlotWaiters {
    /// Returns an instance in which nothing waits.
    pub fn new() -> SlotWaiters {
        SlotWaiters::default()
    }

    /// Wakes the waiters after a slot was freed or the table changed. Costs a fence and a
    /// shared load while nothing waits.
    #[inline]
    pub fn slot_freed(&self) {
        // Pairs with the fences in `wait_until` and `register`: either this load sees the
        // waiter, or the waiter's check sees the freed slot.
        fence(Ordering::SeqCst);
        if self.waiting.load(Ordering::Relaxed) > 0 {
            self.wake();
        }
    }

    #[cold]
    fn wake(&self) {
        self.freed.notify_waiters();
        if self.queued.load(Ordering::Relaxed) > 0 {
            // The first client of every queue: a reload can have changed the pool of a client.
            self.lock().by_pool.values_mut().for_each(wake_first);
        }
    }

    /// Whether any client or listener waits.
    pub fn any_waiting(&self) -> bool {
        self.waiting.load(Ordering::Relaxed) > 0
    }

    /// Returns the number of clients in the queue of a pool.
    #[inline]
    pub fn queued(&self, pool: &str) -> usize {
        if self.queued.load(Ordering::Relaxed) == 0 {
            return 0;
        }
        self.lock().by_pool.get(pool).map_or(0, PoolQueue::len)
    }

    /// Returns the length of each queue that is not empty.
    pub fn all_queued(&self) -> HashMap<Arc<str>, usize> {
        self.lock().by_pool.iter().map(|(pool, queue)| (Arc::clone(pool), queue.len())).collect()
    }

    /// Takes the last place in the queue of `pool`.
    pub fn join(self: &Arc<SlotWaiters>, pool: &Arc<str>) -> QueueTicket {
        let mut queues = self.lock();
        let number = queues.next;
        queues.next += 1;
        queues.by_pool.entry(Arc::clone(pool)).or_default().insert(number, None);
        self.queued.fetch_add(1, Ordering::SeqCst);
        self.waiting.fetch_add(1, Ordering::SeqCst);
        QueueTicket { waiters: Arc::clone(self), pool: Arc::clone(pool), number }
    }

    fn lock(&self) -> MutexGuard<'_, PoolQueues> {
        // No code under the lock can panic between two related changes.
        self.queues.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until `attempt` returns a value. Calls it first and after each freed slot. The
    /// future can be dropped at any point.
    pub async fn wait_until<T>(&self, mut attempt: impl FnMut() -> Option<T>) -> T {
        let _waiting = WaitGuard::enter(self);
        loop {
            let mut freed = std::pin::pin!(self.freed.notified());
            freed.as_mut().enable();
            fence(Ordering::SeqCst);
            if let Some(result) = attempt() {
                return result;
            }
            freed.await;
        }
    }
}

fn wake_first(queue: &mut PoolQueue) {
    if let Some(mut first) = queue.first_entry()
        && let Some(waker) = first.get_mut().take()
    {
        waker.wake();
    }
}

// === impl QueueTicket ===

impl QueueTicket {
    /// Waits until the client is first in its queue and `attempt` returns a value. Calls
    /// `attempt` again after each freed slot. The future can be dropped at any point.
    pub async fn wait_until<T>(&self, mut attempt: impl FnMut() -> Option<T>) -> T {
        poll_fn(|cx| match self.register(cx) {
            // The waker is registered before `attempt`, so no freed slot is missed.
            true => attempt().map_or(Poll::Pending, Poll::Ready),
            false => Poll::Pending,
        })
        .await
    }

    /// Stores the waker. Returns whether the client is first in its queue.
    fn register(&self, cx: &Context<'_>) -> bool {
        let mut queues = self.waiters.lock();
        let Some(queue) = queues.by_pool.get_mut(&self.pool) else { return false };
        let first = queue.first_key_value().is_some_and(|(number, _)| *number == self.number);
        if let Some(waker) = queue.get_mut(&self.number) {
            *waker = Some(cx.waker().clone());
        }
        drop(queues);
        fence(Ordering::SeqCst);
        first
    }
}

impl Drop for QueueTicket {
    fn drop(&mut self) {
        let mut queues = self.waiters.lock();
        if let Some(queue) = queues.by_pool.get_mut(&self.pool) {
            queue.remove(&self.number);
            wake_first(queue);
            if queue.is_empty() {
                queues.by_pool.remove(&self.pool);
            }
        }
        self.waiters.queued.fetch_sub(1, Ordering::SeqCst);
        drop(queues);
        self.waiters.waiting.fetch_sub(1, Ordering::SeqCst);
        // The queue is shorter, so a listener can admit another client.
        self.waiters.freed.notify_waiters();
    }
}

// === impl WaitGuard ===

impl<'a> WaitGuard<'a> {
    fn enter(waiters: &'a SlotWaiters) -> WaitGuard<'a> {
        waiters.waiting.fetch_add(1, Ordering::SeqCst);
        WaitGuard(waiters)
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

    /// Polls once and returns whether the ticket got the slot.
    fn poll(ticket: &QueueTicket, slot: &InFlight) -> bool {
        let mut waited = std::pin::pin!(ticket.wait_until(|| slot.try_enter(1).then_some(())));
        waited.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_ready()
    }

    #[test]
    fn queue_is_served_in_order_of_arrival_whichever_client_polls_first() {
        let (waiters, slot) = (Arc::new(SlotWaiters::new()), InFlight::new());
        let tickets: Vec<QueueTicket> = (0..3).map(|_| waiters.join(&"web".into())).collect();
        assert!(
            !poll(&tickets[2], &slot) && !poll(&tickets[1], &slot),
            "the free slot goes to the first client"
        );
        assert!(poll(&tickets[0], &slot));
        assert_eq!(waiters.queued("web"), 3);
    }

    #[test]
    fn client_that_leaves_the_queue_makes_the_next_client_first() {
        let (waiters, slot) = (Arc::new(SlotWaiters::new()), InFlight::new());
        let [first, second, third] = [(); 3].map(|()| waiters.join(&"web".into()));
        let other = waiters.join(&"other".into());
        assert!(poll(&other, &InFlight::new()), "another pool's queue");
        drop(second);
        assert!(poll(&first, &slot));
        drop(first);
        assert!(!poll(&third, &slot), "first in the queue, but no slot is free");
        slot.leave();
        assert!(poll(&third, &slot));
        drop((third, other));
        assert!(waiters.all_queued().is_empty());
        assert_eq!(waiters.waiting.load(Ordering::SeqCst), 0);
    }

    #[test]
    fn queue_loses_no_wake_up_between_threads_that_compete_for_one_slot() {
        let waiters = Arc::new(SlotWaiters::new());
        let slot = Arc::new(InFlight::new());
        let threads = (0..4).map(|_| {
            let (waiters, slot) = (Arc::clone(&waiters), Arc::clone(&slot));
            std::thread::spawn(move || {
                let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
                runtime.block_on(async {
                    for _ in 0..2_000 {
                        let ticket = waiters.join(&"web".into());
                        ticket.wait_until(|| slot.try_enter(1).then_some(())).await;
                        drop(ticket);
                        slot.leave();
                        waiters.slot_freed();
                    }
                });
            })
        });
        threads.collect::<Vec<_>>().into_iter().for_each(|thread| thread.join().unwrap());
        assert_eq!((slot.get(), waiters.waiting.load(Ordering::SeqCst)), (0, 0));
    }

    #[test]
    fn wait_until_loses_no_wake_up_between_threads_that_compete_for_one_slot() {
        let waiters = Arc::new(SlotWaiters::new());
        let slot = Arc::new(InFlight::new());
        let threads: Vec<_> = (0..4)
            .map(|_| {
                let (waiters, slot) = (Arc::clone(&waiters), Arc::clone(&slot));
                std::thread::spawn(move || {
                    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
                    runtime.block_on(async {
                        for _ in 0..2_000 {
                            waiters.wait_until(|| slot.try_enter(1).then_some(())).await;
                            slot.leave();
                            waiters.slot_freed();
                        }
                    });
                })
            })
            .collect();
        for thread in threads {
            thread.join().unwrap();
        }
        assert_eq!(slot.get(), 0);
        assert_eq!(waiters.waiting.load(Ordering::SeqCst), 0);
    }
}

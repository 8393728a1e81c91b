//! Where listeners and sessions wait for a slot below a cap.
//!
//! One for the whole process. Every release of a slot calls [`SlotWaiters::slot_freed`].
//! Listeners that found a cap reached wait in [`SlotWaiters::wait_until`], all at once.
//! Clients that were admitted to wait for a backend of their pool stand in a queue: first
//! come, first served over all workers. It keeps no count of slots itself: the caps are
//! `InFlight`s, and waiting here costs nothing until a cap is reached.

use std::collections::{BTreeMap, HashMap};
use std::future::poll_fn;
use std::sync::atomic::{AtomicUsize, Ordering, fence};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use tokio::sync::Notify;

/// See the module's documentation.
#[derive(Debug, Default)]
pub struct SlotWaiters {
    /// Listeners, and places in queues.
    waiting: AtomicUsize,
    opened: Notify,
    /// Places in queues.
    queued: AtomicUsize,
    queues: Mutex<PoolQueues>,
}

#[derive(Debug, Default)]
struct PoolQueues {
    next: u64,
    /// By pool; only those in which a client waits.
    by_pool: HashMap<Arc<str>, PoolQueue>,
}

/// The clients that wait for one pool, in the order they came; each with its waker, once
/// it has looked.
type PoolQueue = BTreeMap<u64, Option<Waker>>;

/// A place in a pool's queue; dropping it lets the next one come forward.
#[derive(Debug)]
pub struct QueueTicket {
    waiters: Arc<SlotWaiters>,
    pool: Arc<str>,
    number: u64,
}

struct WaitGuard<'a>(&'a SlotWaiters);

impl SlotWaiters {
    /// Nothing waits.
    pub fn new() -> SlotWaiters {
        SlotWaiters::default()
    }

    /// A slot came free somewhere (or the table changed): all that wait look again. One
    /// shared load while none do.
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
            // The first of each queue: a reload may have sent them to other pools.
            self.lock().by_pool.values_mut().for_each(wake_first);
        }
    }

    /// Clients in the queue of that pool.
    #[inline]
    pub fn queued(&self, pool: &str) -> usize {
        if self.queued.load(Ordering::Relaxed) == 0 {
            return 0;
        }
        self.lock().by_pool.get(pool).map_or(0, PoolQueue::len)
    }

    /// Clients in each queue in which there are any.
    pub fn all_queued(&self) -> HashMap<Arc<str>, usize> {
        self.lock().by_pool.iter().map(|(pool, queue)| (Arc::clone(pool), queue.len())).collect()
    }

    /// A place at the end of the queue of `pool`.
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
        // Nothing under the lock can panic half-way.
        self.queues.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until `attempt` gives something. It is called again each time a slot
    /// comes free; dropping the future is safe at any point.
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

fn wake_first(queue: &mut PoolQueue) {
    if let Some(mut first) = queue.first_entry()
        && let Some(waker) = first.get_mut().take()
    {
        waker.wake();
    }
}

// === impl QueueTicket ===

impl QueueTicket {
    /// Waits until it is first and `attempt` gives something. That is called
    /// again each time a slot comes free; dropping the future is safe at any point.
    pub async fn wait_until<T>(&self, mut attempt: impl FnMut() -> Option<T>) -> T {
        poll_fn(|cx| match self.notify_next(cx) {
            // A release from here on finds this one's waker.
            true => attempt().map_or(Poll::Pending, Poll::Ready),
            false => Poll::Pending,
        })
        .await
    }

    /// Whether it is first; leaves its waker in any case.
    fn notify_next(&self, cx: &Context<'_>) -> bool {
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
        // The queue is shorter: listeners can admit another client.
        self.waiters.opened.notify_waiters();
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

    /// Polls once; whether it is ready.
    fn poll(place: &QueueTicket, slot: &InFlight) -> bool {
        let mut waited = std::pin::pin!(place.wait_until(|| slot.try_enter(1).then_some(())));
        waited.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_ready()
    }

    #[test]
    fn a_queue_is_served_in_order_whichever_asks_first() {
        let (waiters, slot) = (Arc::new(SlotWaiters::new()), InFlight::new());
        let places: Vec<QueueTicket> = (0..3).map(|_| waiters.join(&"web".into())).collect();
        assert!(
            !poll(&places[2], &slot) && !poll(&places[1], &slot),
            "a slot is free, but not theirs"
        );
        assert!(poll(&places[0], &slot));
        assert_eq!(waiters.queued("web"), 3);
    }

    #[test]
    fn leaving_the_queue_lets_the_next_one_come_forward() {
        let (waiters, slot) = (Arc::new(SlotWaiters::new()), InFlight::new());
        let [first, second, third] = [(); 3].map(|()| waiters.join(&"web".into()));
        let other = waiters.join(&"other".into());
        assert!(poll(&other, &InFlight::new()), "another pool's queue");
        drop(second);
        assert!(poll(&first, &slot));
        drop(first);
        assert!(!poll(&third, &slot), "first in the queue, and no slot");
        slot.leave();
        assert!(poll(&third, &slot));
        drop((third, other));
        assert!(waiters.all_queued().is_empty());
        assert_eq!(waiters.waiting.load(Ordering::SeqCst), 0);
    }

    #[test]
    fn no_wake_up_is_lost_in_a_queue_between_threads_fighting_for_one_slot() {
        let waiters = Arc::new(SlotWaiters::new());
        let slot = Arc::new(InFlight::new());
        let threads = (0..4).map(|_| {
            let (waiters, slot) = (Arc::clone(&waiters), Arc::clone(&slot));
            std::thread::spawn(move || {
                let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
                runtime.block_on(async {
                    for _ in 0..2_000 {
                        let place = waiters.join(&"web".into());
                        place.wait_until(|| slot.try_enter(1).then_some(())).await;
                        drop(place);
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
    fn no_wake_up_is_lost_between_threads_fighting_for_one_slot() {
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

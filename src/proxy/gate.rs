//! Where listeners and sessions wait for a slot below some cap.
//!
//! One for the whole process. Whoever gives a slot back calls [`Gate::opened`];
//! whoever found a cap reached waits in [`Gate::wait_until`] and tries again.
//! It keeps no count itself: the caps are `InFlight`s, and waiting here costs
//! nothing until a cap is really reached.

use std::sync::atomic::{AtomicUsize, Ordering, fence};
use tokio::sync::Notify;

/// See the module's documentation.
#[derive(Debug, Default)]
pub struct Gate {
    waiting: AtomicUsize,
    opened: Notify,
}

struct Waiting<'a>(&'a Gate);

impl Gate {
    /// Nobody waits.
    pub fn new() -> Gate {
        Gate::default()
    }

    /// A slot came free somewhere (or the table changed): everybody who waits
    /// looks again. One shared load while nobody does.
    #[inline]
    pub fn opened(&self) {
        // Pairs with the fence in `wait_until`: either this load sees the
        // waiter, or the waiter's check sees the slot that was given back.
        fence(Ordering::SeqCst);
        if self.waiting.load(Ordering::Relaxed) > 0 {
            self.opened.notify_waiters();
        }
    }

    /// Waits until `attempt` gives something. It is called again each time the
    /// gate opens; dropping the future is safe at any point.
    pub async fn wait_until<T>(&self, mut attempt: impl FnMut() -> Option<T>) -> T {
        let _waiting = Waiting::enter(self);
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

// === impl Waiting ===

impl<'a> Waiting<'a> {
    fn enter(gate: &'a Gate) -> Waiting<'a> {
        gate.waiting.fetch_add(1, Ordering::SeqCst);
        Waiting(gate)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.waiting.fetch_sub(1, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::balance::in_flight::InFlight;
    use std::sync::Arc;

    #[test]
    fn no_wake_up_is_lost_between_threads_fighting_for_one_slot() {
        let gate = Arc::new(Gate::new());
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
                            gate.opened();
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

//! A two-level timer wheel with one timer per session. Arm, re-arm and cancel take constant
//! time.
//!
//! Owned by the relay engine. Pure: the caller passes the time as a number of ticks.
//!
//! The design follows Varghese and Lauck, "Hashed and hierarchical timing wheels" (1987),
//! schemes 6 and 7. The lists are linked through one array, so a timer costs 24 bytes and no
//! allocation.

/// Ticks in the fine level, which holds the timers due in the current block.
const FINE: u64 = 256;

/// Blocks of [`FINE`] ticks in the coarse level. Timers further away wait in its last block
/// and are placed again when that block begins.
const COARSE: u64 = 512;

const SLOTS: usize = (FINE + COARSE) as usize;
const WORDS: usize = SLOTS / 64;
const NONE: u32 = u32::MAX;

/// Timers by key, and the current tick.
#[derive(Debug)]
pub struct TimerWheel {
    /// The last tick that `advance` has processed.
    now: u64,
    /// First node of each slot: fine slots, then coarse slots.
    heads: Box<[u32; SLOTS]>,
    /// One bit per slot: set if the slot is not empty.
    occupied: [u64; WORDS],
    /// Nodes by key.
    nodes: Vec<TimerNode>,
}

#[derive(Debug, Clone, Copy)]
struct TimerNode {
    due: u64,
    previous: u32,
    next: u32,
    /// `NONE`: not armed.
    slot: u32,
}

impl TimerWheel {
    /// Returns a wheel without timers at the tick `now`.
    pub fn new(now: u64) -> TimerWheel {
        TimerWheel { now, heads: Box::new([NONE; SLOTS]), occupied: [0; WORDS], nodes: Vec::new() }
    }

    /// Arms the timer `key` for the tick `due`, or for the next tick if `due` has passed.
    /// Replaces an earlier due tick. Keys index an array, so they should be small.
    pub fn arm(&mut self, key: u32, due: u64) {
        self.cancel(key);
        let needed = key as usize + 1;
        if self.nodes.len() < needed {
            let vacant = TimerNode { due: 0, previous: NONE, next: NONE, slot: NONE };
            self.nodes.resize(needed, vacant);
        }
        self.place(key, due.max(self.now + 1));
    }

    /// Disarms the timer `key`, if it is armed.
    pub fn cancel(&mut self, key: u32) {
        let Some(node) = self.nodes.get(key as usize).copied() else { return };
        if node.slot == NONE {
            return;
        }
        if node.previous == NONE {
            self.heads[node.slot as usize] = node.next;
        } else {
            self.nodes[node.previous as usize].next = node.next;
        }
        if node.next != NONE {
            self.nodes[node.next as usize].previous = node.previous;
        }
        self.nodes[key as usize].slot = NONE;
        if self.heads[node.slot as usize] == NONE {
            self.set_occupied(node.slot as usize, false);
        }
    }

    /// Returns the earliest tick at which `advance` has work. That is never later than the
    /// earliest timer. For a timer in a later block it is the start of that block.
    pub fn next_due(&self) -> Option<u64> {
        let position = self.now % FINE;
        let block = self.now / FINE;
        if let Some(slot) = self.first_occupied(position as usize + 1, FINE as usize) {
            return Some(block * FINE + slot as u64);
        }
        let here = (FINE + block % COARSE) as usize;
        let ahead = self.first_occupied(here + 1, SLOTS).map(|slot| slot - here).or_else(|| {
            let before = self.first_occupied(FINE as usize, here + 1)?;
            Some(before + COARSE as usize - here)
        })?;
        Some((block + ahead as u64) * FINE)
    }

    /// Advances to the tick `now`. Disarms all timers due by then and appends them to `fired`.
    /// Timers of the same tick have no defined order.
    pub fn advance(&mut self, now: u64, fired: &mut Vec<u32>) {
        while let Some(due) = self.next_due().filter(|due| *due <= now) {
            self.now = due;
            if due % FINE == 0 {
                self.cascade(due / FINE);
            }
            let mut key = self.take_slot((due % FINE) as usize);
            while key != NONE {
                let node = &mut self.nodes[key as usize];
                node.slot = NONE;
                fired.push(key);
                key = node.next;
            }
        }
        self.now = self.now.max(now);
    }

    /// Moves the timers of the block that begins now to the fine level.
    fn cascade(&mut self, block: u64) {
        let mut key = self.take_slot((FINE + block % COARSE) as usize);
        while key != NONE {
            let TimerNode { due, next, .. } = self.nodes[key as usize];
            self.place(key, due);
            key = next;
        }
    }

    /// Links `key` into the slot of `due`, which must not be before `now`.
    fn place(&mut self, key: u32, due: u64) {
        let (block, current) = (due / FINE, self.now / FINE);
        let slot = if block == current {
            (due % FINE) as usize
        } else {
            let block = block.min(current + COARSE - 1);
            (FINE + block % COARSE) as usize
        };
        let next = std::mem::replace(&mut self.heads[slot], key);
        if next != NONE {
            self.nodes[next as usize].previous = key;
        }
        self.nodes[key as usize] = TimerNode { due, previous: NONE, next, slot: slot as u32 };
        self.set_occupied(slot, true);
    }

    fn take_slot(&mut self, slot: usize) -> u32 {
        self.set_occupied(slot, false);
        std::mem::replace(&mut self.heads[slot], NONE)
    }

    fn set_occupied(&mut self, slot: usize, occupied: bool) {
        let bit = 1 << (slot % 64);
        if occupied {
            self.occupied[slot / 64] |= bit;
        } else {
            self.occupied[slot / 64] &= !bit;
        }
    }

    /// Returns the first occupied slot in `from..to`.
    fn first_occupied(&self, from: usize, to: usize) -> Option<usize> {
        let mut slot = from;
        while slot < to {
            let rest = self.occupied[slot / 64] >> (slot % 64);
            if rest != 0 {
                let found = slot + rest.trailing_zeros() as usize;
                return (found < to).then_some(found);
            }
            slot = (slot / 64 + 1) * 64;
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    #[derive(Debug, Clone)]
    enum Step {
        Arm(u32, u64),
        Cancel(u32),
        Advance(u64),
    }

    fn step() -> impl Strategy<Value = Step> {
        let distance = prop_oneof![0..4u64, 0..600u64, 0..300_000u64, 0..3_000_000_000u64];
        prop_oneof![
            (0..40u32, distance.clone()).prop_map(|(key, ahead)| Step::Arm(key, ahead)),
            (0..40u32).prop_map(Step::Cancel),
            distance.prop_map(Step::Advance),
        ]
    }

    proptest! {
        #[test]
        fn wheel_fires_the_same_timers_as_a_sorted_map(
            start in prop_oneof![0..5u64, 0..1u64 << 40],
            steps in prop::collection::vec(step(), 1..200),
        ) {
            let mut now = start;
            let mut wheel = TimerWheel::new(now);
            let mut model: BTreeMap<u32, u64> = BTreeMap::new();
            for step in steps {
                match step {
                    Step::Arm(key, ahead) => {
                        wheel.arm(key, now + ahead);
                        model.insert(key, (now + ahead).max(now + 1));
                    }
                    Step::Cancel(key) => {
                        wheel.cancel(key);
                        model.remove(&key);
                    }
                    Step::Advance(ahead) => {
                        now += ahead;
                        let mut fired = Vec::new();
                        wheel.advance(now, &mut fired);
                        fired.sort_unstable();
                        let due: Vec<u32> =
                            model.iter().filter(|(_, due)| **due <= now).map(|(key, _)| *key).collect();
                        model.retain(|_, due| *due > now);
                        prop_assert_eq!(fired, due);
                    }
                }
                let earliest = model.values().min();
                prop_assert_eq!(wheel.next_due().is_some(), earliest.is_some());
                if let (Some(next), Some(earliest)) = (wheel.next_due(), earliest) {
                    prop_assert!(next <= *earliest && next > now);
                }
            }
        }
    }
}

//! What a bad line does to packets, one direction of it: pure, seeded.
//!
//! The pump offers each packet with the time and the settings in force and does
//! as told. Every kind of impairment draws from a stream of its own, the same
//! number of draws for every packet, so that the n-th packet's loss depends on
//! the seed and on n alone. It never sends, waits or reads a clock.

use fastrand::Rng;
use std::time::{Duration, Instant};

/// How a direction treats packets; the default is a perfect line.
///
/// Chances are shares of all packets, 0 to 1.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Impairment {
    /// Time on the way.
    pub delay: Duration,
    /// Each packet's delay is up to so much shorter or longer, evenly spread.
    /// Jitter alone never reorders: a packet waits for the one before it.
    pub jitter: Duration,
    pub loss: Loss,
    /// Packets that arrive twice.
    pub duplicate: f64,
    /// Packets held back by `reorder_by`, so that later ones overtake them.
    pub reorder: f64,
    pub reorder_by: Duration,
    /// Packets with one bit flipped, anywhere.
    pub corrupt: f64,
    /// Bits a second; `None` for as fast as may be.
    pub rate: Option<u64>,
    /// Bytes that may wait for their turn at that rate; more are dropped.
    pub queue: usize,
    /// Larger packets vanish, and nobody is told: a path that swallows what it
    /// cannot carry (RFC 2923 section 2.1).
    pub largest: Option<usize>,
    /// Nothing gets through. What was on the way already does.
    pub partition: bool,
}

/// Which packets are lost.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Loss {
    None,
    /// Each with this chance, whatever became of the others.
    Independent(f64),
    /// Two states after Gilbert (1960) and Elliott (1963): each packet enters a
    /// burst with chance `enter` and leaves it with chance `leave`, and within
    /// a burst is lost with chance `lost`. Bursts last 1/`leave` packets on
    /// average; `enter`/(`enter`+`leave`)·`lost` of all packets are lost.
    Bursts {
        enter: f64,
        leave: f64,
        lost: f64,
    },
}

/// What becomes of one packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    Partitioned,
    Lost,
    /// The queue of a limited rate was full.
    Overflowed,
    /// It arrives then, `copies` times (1 or 2), with bit `flip` flipped.
    Arrives {
        at: Instant,
        copies: u8,
        held_back: bool,
        flip: Option<usize>,
    },
}

/// One direction's memory.
#[derive(Debug)]
pub struct Channel {
    losses: Rng,
    delays: Rng,
    duplicates: Rng,
    reorders: Rng,
    corruptions: Rng,
    in_burst: bool,
    /// When the line has sent what is queued for it.
    idle_at: Option<Instant>,
    /// When the latest packet in order arrives.
    latest: Option<Instant>,
}

// === impl Impairment ===

impl Default for Impairment {
    fn default() -> Impairment {
        Impairment {
            delay: Duration::ZERO,
            jitter: Duration::ZERO,
            loss: Loss::None,
            duplicate: 0.0,
            reorder: 0.0,
            reorder_by: Duration::from_millis(2),
            corrupt: 0.0,
            rate: None,
            queue: 256 * 1024,
            largest: None,
            partition: false,
        }
    }
}

// === impl Channel ===

impl Channel {
    pub fn new(seed: u64) -> Channel {
        let mut seeds = Rng::with_seed(seed);
        let mut next = || Rng::with_seed(seeds.u64(..));
        Channel {
            losses: next(),
            delays: next(),
            duplicates: next(),
            reorders: next(),
            corruptions: next(),
            in_burst: false,
            idle_at: None,
            latest: None,
        }
    }

    /// Decides about the next packet, of `bytes` bytes.
    pub fn offer(&mut self, bytes: usize, now: Instant, how: &Impairment) -> Fate {
        let lost = self.is_lost(how.loss);
        let delay = jittered(how.delay, how.jitter, self.delays.f64());
        let copies = if self.duplicates.f64() < how.duplicate { 2 } else { 1 };
        let held_back = self.reorders.f64() < how.reorder;
        let (chance, bit) = (self.corruptions.f64(), self.corruptions.f64());
        let flip = (chance < how.corrupt).then_some((bit * (bytes * 8) as f64) as usize);
        if how.partition {
            return Fate::Partitioned;
        }
        if lost || how.largest.is_some_and(|largest| bytes > largest) {
            return Fate::Lost;
        }
        let Some(sent) = self.sent_by(bytes, now, how) else { return Fate::Overflowed };
        let at = sent + delay;
        let at = self.latest.map_or(at, |latest| at.max(latest));
        if held_back {
            return Fate::Arrives { at: at + how.reorder_by, copies, held_back, flip };
        }
        self.latest = Some(at);
        Fate::Arrives { at, copies, held_back, flip }
    }

    fn is_lost(&mut self, loss: Loss) -> bool {
        let (turn, chance) = (self.losses.f64(), self.losses.f64());
        match loss {
            Loss::None => false,
            Loss::Independent(share) => chance < share,
            Loss::Bursts { enter, leave, lost } => {
                self.in_burst = if self.in_burst { turn >= leave } else { turn < enter };
                self.in_burst && chance < lost
            }
        }
    }

    /// When the last bit is on the line; `None` where the queue is full.
    fn sent_by(&mut self, bytes: usize, now: Instant, how: &Impairment) -> Option<Instant> {
        let Some(rate) = how.rate else { return Some(now) };
        let begins = self.idle_at.map_or(now, |idle| idle.max(now));
        let waiting = (begins - now).as_secs_f64() * rate as f64 / 8.0;
        if waiting + bytes as f64 > how.queue as f64 {
            return None;
        }
        let sent = begins + Duration::from_secs_f64(bytes as f64 * 8.0 / rate as f64);
        self.idle_at = Some(sent);
        Some(sent)
    }
}

fn jittered(delay: Duration, jitter: Duration, draw: f64) -> Duration {
    (delay + jitter.mul_f64(2.0 * draw)).saturating_sub(jitter)
}

//! What one direction of an impaired link does to packets: pure and seeded.
//!
//! The pump offers each packet with the time and the current settings, and applies the
//! decision. Each kind of impairment has its own random stream with the same number of draws
//! per packet, so the loss of packet n depends only on the seed and n. This module never sends,
//! waits or reads a clock.

use fastrand::Rng;
use std::time::{Duration, Instant};

/// How a direction treats packets. The default is a perfect link.
///
/// Probabilities are from 0 to 1.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Impairment {
    /// Delay of each packet.
    pub delay: Duration,
    /// Each packet's delay is shorter or longer by up to this much, uniformly distributed. Jitter
    /// alone never reorders, because a packet waits for the previous packet.
    pub jitter: Duration,
    pub loss: Loss,
    /// Share of packets that arrive twice.
    pub duplicate: f64,
    /// Share of packets that are held back by `reorder_by`, so that later packets overtake them.
    pub reorder: f64,
    pub reorder_by: Duration,
    /// Share of packets with one flipped bit at a random position.
    pub corrupt: f64,
    /// Bits per second. `None` means no limit.
    pub rate: Option<u64>,
    /// Bytes that can wait because of the rate. Further packets are dropped.
    pub queue: usize,
    /// Larger packets are dropped without a notification: a path MTU black hole (RFC 2923
    /// section 2.1).
    pub largest: Option<usize>,
    /// Drops every packet. Packets already in transit arrive.
    pub partition: bool,
}

/// Which packets are lost.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Loss {
    None,
    /// Each packet is lost with this probability, independent of all others.
    Independent(f64),
    /// The two-state model of Gilbert (1960) and Elliott (1963). Each packet enters a burst with
    /// probability `enter` and leaves it with probability `leave`. Within a burst it is lost with
    /// probability `lost`. Bursts last 1/`leave` packets on average, and
    /// `enter`/(`enter`+`leave`)·`lost` of all packets are lost.
    Bursts {
        enter: f64,
        leave: f64,
        lost: f64,
    },
}

/// The fate of one packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    Partitioned,
    Lost,
    /// The queue of a limited rate was full.
    Overflowed,
    /// It arrives at `at`, `copies` times (1 or 2), with bit `flip` flipped.
    Arrives {
        at: Instant,
        copies: u8,
        held_back: bool,
        flip: Option<usize>,
    },
}

/// The state of one direction.
#[derive(Debug)]
pub struct Channel {
    losses: Rng,
    delays: Rng,
    duplicates: Rng,
    reorders: Rng,
    corruptions: Rng,
    in_burst: bool,
    /// When the link has sent everything in its queue.
    idle_at: Option<Instant>,
    /// When the latest packet that is in order arrives.
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

    /// Decides the fate of the next packet, which has `bytes` bytes.
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

    /// Returns when the last bit is sent, or `None` if the queue is full.
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

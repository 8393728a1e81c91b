//! The path between a backend and Tidegate in virtual time: loss and delay.
//!
//! Used by every simulated detector with the same seed, hence with the same losses. It does
//! not know the content of the datagrams.

use fastrand::Rng;

/// Virtual time in microseconds.
pub(crate) type Micros = u64;

pub(crate) const MILLI: Micros = 1_000;
pub(crate) const SECOND: Micros = 1_000_000;

/// Timeout of one try of a probe.
pub(crate) const TRY: Micros = 100 * MILLI;

/// Mean length of a burst: as for an overflowing queue or a route change, and longer than
/// one heartbeat interval.
pub(crate) const BURST: f64 = 150_000.0;

/// Shortest one-way delay; the mean of the jitter is added.
const DELAY_MIN: f64 = 700.0;
const JITTER_DEVIATION: f64 = 5_000.0;

/// Mean additional delay of one datagram in a thousand.
const HELD_UP_ONE_IN: u64 = 1_000;
const HELD_UP: f64 = 20_000.0;

/// Pattern of the losses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Pattern {
    /// Each datagram is lost independently.
    Independent,
    /// Gilbert's model in continuous time: all datagrams are lost during bursts. The lengths
    /// of bursts and pauses are exponentially distributed.
    Bursts,
}

/// One direction. Calls must be in order of time.
#[derive(Debug, Clone)]
pub(crate) struct Direction {
    pattern: Pattern,
    loss: f64,
    rng: Rng,
    bad: bool,
    until: f64,
}

/// Both directions.
#[derive(Debug, Clone)]
pub(crate) struct Link {
    there: Direction,
    back: Direction,
    rng: Rng,
    dead: bool,
}

// === impl Direction ===

impl Direction {
    pub(crate) fn new(pattern: Pattern, loss: f64, seed: u64) -> Direction {
        Direction { pattern, loss, rng: Rng::with_seed(seed), bad: false, until: 0.0 }
    }

    /// Whether a datagram sent at `at` is lost.
    pub(crate) fn loses(&mut self, at: Micros) -> bool {
        match self.pattern {
            Pattern::Independent => self.rng.f64() < self.loss,
            Pattern::Bursts => {
                while self.until < at as f64 {
                    self.bad = !self.bad;
                    let mean = if self.bad { BURST } else { BURST * (1.0 - self.loss) / self.loss };
                    self.until += exponential(&mut self.rng, mean);
                }
                self.bad
            }
        }
    }
}

// === impl Link ===

impl Link {
    pub(crate) fn new(pattern: Pattern, loss: f64, seed: u64) -> Link {
        Link {
            there: Direction::new(pattern, loss, seed ^ 0x7265_7175_6573_7473),
            back: Direction::new(pattern, loss, seed ^ 0x616e_7377_6572_7321),
            rng: Rng::with_seed(seed),
            dead: false,
        }
    }

    /// Returns the same path to a failed backend.
    pub(crate) fn failed_backend(&self) -> Link {
        Link { dead: true, ..self.clone() }
    }

    /// Returns when a heartbeat sent at `at` arrives; `None`: it is lost.
    pub(crate) fn heartbeat(&mut self, at: Micros) -> Option<Micros> {
        if self.dead || self.back.loses(at) { None } else { Some(at + self.delay()) }
    }

    /// Returns when the answer to a connect begun at `at` arrives; `None` if the SYN or the
    /// SYN-ACK is lost.
    pub(crate) fn connect(&mut self, at: Micros) -> Option<Micros> {
        if self.dead || self.there.loses(at) {
            return None;
        }
        let there = at + self.delay();
        if self.back.loses(there) { None } else { Some(there + self.delay()) }
    }

    /// As [`Link::connect`], with the kernels' retransmissions after 1 s: of the SYN, and of
    /// the SYN-ACK of a SYN that arrived. `None` after `timeout`.
    pub(crate) fn connect_patiently(&mut self, at: Micros, timeout: Micros) -> Option<Micros> {
        let arrived = !self.there.loses(at);
        if arrived && self.returns(at) {
            return Some(at + 2 * self.delay());
        }
        let again = at + SECOND;
        if timeout <= SECOND {
            return None;
        }
        let answered_again = arrived && self.returns(again);
        let answered = answered_again || (!self.there.loses(again) && self.returns(again));
        answered.then(|| again + 2 * self.delay())
    }

    /// Whether an answer to a datagram sent at `at` arrives.
    fn returns(&mut self, at: Micros) -> bool {
        let there = at + self.delay();
        !self.back.loses(there)
    }

    fn delay(&mut self) -> Micros {
        // The sum of four uniform numbers is nearly normal and bounded.
        let bits = self.rng.u64(..);
        let sum: u64 = (0..4).map(|part| (bits >> (16 * part)) & 0xffff).sum();
        let jitter = sum as f64 / 65_536.0 / (1.0_f64 / 3.0).sqrt() * JITTER_DEVIATION;
        let held_up = bits.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
        let late = held_up.is_multiple_of(HELD_UP_ONE_IN);
        let late = if late { exponential(&mut self.rng, HELD_UP) } else { 0.0 };
        (DELAY_MIN + jitter + late) as Micros
    }
}

fn exponential(rng: &mut Rng, mean: f64) -> f64 {
    -(1.0 - rng.f64()).ln() * mean
}

//! Pools in virtual time: which backends become suspect, how soon, and which never do.

use super::*;
use crate::table::state::LOG_UNIT;

const SLOW: Duration = Duration::from_secs(1);

/// A pool in virtual time.
struct Pool {
    now: Instant,
    counts: Vec<FirstByteCounts>,
    detectors: Vec<SlowDetector>,
    slow: Duration,
}

impl Pool {
    fn new(backends: usize) -> Pool {
        let mut pool = Pool {
            now: tidegate_net::clock::now(),
            counts: vec![FirstByteCounts::default(); backends],
            detectors: vec![SlowDetector::default(); backends],
            slow: SLOW,
        };
        pool.look();
        pool
    }

    /// Adds sessions at a backend, each answered after `micros`.
    fn answer(&mut self, backend: usize, sessions: u64, micros: f64) {
        let counts = &mut self.counts[backend];
        counts.questions += sessions;
        counts.answers += sessions;
        counts.answer_log2 += (micros.log2() * LOG_UNIT) as u64 * sessions;
    }

    /// Adds sessions at a backend without an answer.
    fn ask(&mut self, backend: usize, sessions: u64) {
        self.counts[backend].questions += sessions;
    }

    /// Runs the next check and returns its verdicts, by backend.
    fn look(&mut self) -> Vec<(usize, SlowVerdict)> {
        self.now += LOOK_INTERVAL;
        for (detector, counts) in self.detectors.iter_mut().zip(&self.counts) {
            detector.take(*counts, self.now);
        }
        let view = PoolView::of(self.detectors.iter());
        let mut found = Vec::new();
        for (index, detector) in self.detectors.iter_mut().enumerate() {
            let Some(verdict) = detector.judge(&view, self.slow, self.now) else { continue };
            match verdict {
                SlowVerdict::Suspect(_) => detector.suspect(self.now),
                SlowVerdict::Clear(_) => drop(detector.clear()),
            }
            found.push((index, verdict));
        }
        found
    }

    /// Runs checks for `span`, with `step` before each. Returns time, backend and whether
    /// it became suspect, per verdict.
    fn run(
        &mut self,
        span: Duration,
        mut step: impl FnMut(&mut Pool),
    ) -> Vec<(Duration, usize, bool)> {
        let start = self.now;
        let mut found = Vec::new();
        while self.now < start + span {
            step(self);
            for (index, verdict) in self.look() {
                let bad = matches!(verdict, SlowVerdict::Suspect(_));
                found.push((self.now - start, index, bad));
            }
        }
        found
    }

    /// Returns a pool whose backends have answered in 1 ms for 3 s.
    fn warmed(backends: usize) -> Pool {
        let mut pool = Pool::new(backends);
        let quick = |pool: &mut Pool| (0..backends).for_each(|b| pool.answer(b, 5, 1e3));
        assert_eq!(pool.run(Duration::from_secs(3), quick), []);
        pool
    }
}

fn secs(n: u64) -> Duration {
    Duration::from_secs(n)
}

#[test]
fn backend_that_hangs_while_others_answer_is_suspect_within_two_seconds() {
    let mut pool = Pool::warmed(3);
    let found = pool.run(secs(5), |pool| {
        pool.answer(0, 5, 1e3);
        pool.answer(1, 5, 1e3);
        pool.ask(2, 1);
    });
    assert_eq!(found.len(), 1, "{found:?}");
    let (after, index, bad) = found[0];
    assert!(index == 2 && bad && after <= secs(2), "{found:?}");
}

#[test]
fn clients_that_give_up_do_not_hide_the_hang() {
    let mut pool = Pool::warmed(2);
    let found = pool.run(secs(3), |pool| {
        pool.answer(0, 20, 1e3);
        pool.ask(1, 4);
        // Each client gives up after about one check; four wait at any time.
        pool.counts[1].unanswered = pool.counts[1].questions - pool.counts[1].answers - 4;
    });
    assert!(matches!(found[..], [(_, 1, true)]), "{found:?}");
}

#[test]
fn time_without_checks_does_not_count_as_a_hang() {
    let mut pool = Pool::warmed(2);
    pool.ask(1, 5);
    pool.answer(0, 9, 1e3);
    pool.look();
    pool.now += secs(5);
    assert_eq!(pool.look(), [], "this process may have been stopped");
    let found = pool.run(secs(3), |pool| pool.answer(0, 9, 1e3));
    assert!(matches!(found[..], [(_, 1, true)]), "{found:?}");
}

#[test]
fn two_waiting_sessions_are_no_hang() {
    let mut pool = Pool::warmed(2);
    pool.ask(1, 2);
    assert_eq!(pool.run(secs(60), |pool| pool.answer(0, 5, 1e3)), []);
}

#[test]
fn occasional_answers_are_no_hang() {
    let mut pool = Pool::warmed(2);
    let mut looks = 0;
    let found = pool.run(secs(20), |pool| {
        looks += 1;
        pool.answer(0, 5, 1e3);
        pool.ask(1, 1);
        if looks % 4 == 0 {
            pool.answer(1, 1, 1e3);
        }
    });
    assert_eq!(found, []);
}

#[test]
fn pool_without_answers_suspects_no_backend() {
    let mut pool = Pool::warmed(3);
    assert_eq!(pool.run(secs(60), |pool| (0..3).for_each(|b| pool.ask(b, 5))), []);
}

#[test]
fn pool_that_stops_all_at_once_suspects_no_backend() {
    let mut pool = Pool::warmed(3);
    (0..3).for_each(|backend| pool.ask(backend, 4 + backend as u64));
    assert_eq!(pool.run(secs(60), |_| {}), []);
}

#[test]
fn clients_that_all_wait_at_one_backend_do_not_hide_the_hang() {
    let mut pool = Pool::warmed(3);
    (0..3).for_each(|backend| pool.answer(backend, 20, 1e3));
    pool.ask(2, 8);
    let found = pool.run(secs(10), |_| {});
    assert!(matches!(found[..], [(after, 2, true)] if after <= secs(2)), "{found:?}");
}

#[test]
fn only_backend_of_a_pool_is_never_suspect() {
    let mut pool = Pool::warmed(1);
    assert_eq!(pool.run(secs(60), |pool| pool.ask(0, 5)), []);
}

#[test]
fn pool_of_long_polls_suspects_no_backend() {
    let mut pool = Pool::new(3);
    let mut looks = 0u64;
    // Each poll takes 10 s, and four begin at each check.
    let found = pool.run(secs(120), |pool| {
        looks += 1;
        for backend in 0..3 {
            pool.ask(backend, 4);
            // The answers of the backends begin at different moments.
            if looks >= 50 + 3 * backend as u64 {
                pool.counts[backend].questions -= 4;
                pool.answer(backend, 4, 1e7);
            }
        }
    });
    assert_eq!(found, []);
}

#[test]
fn waiting_subscribers_make_no_backend_suspect() {
    let mut pool = Pool::warmed(2);
    pool.ask(0, 100);
    pool.ask(1, 100);
    let mut looks = 0;
    let found = pool.run(secs(20), |pool| {
        looks += 1;
        pool.answer(0, u64::from(looks % 5 == 0), 1e3);
    });
    assert_eq!(found, []);
}

#[test]
fn backend_ten_times_slower_is_suspect_and_cleared_when_quick() {
    let mut pool = Pool::warmed(3);
    let found = pool.run(secs(3), |pool| {
        pool.answer(0, 5, 2e4);
        pool.answer(1, 5, 2e4);
        pool.answer(2, 5, 3e5);
    });
    assert!(matches!(found[..], [(after, 2, true)] if after <= secs(2)), "{found:?}");
    let found = pool.run(secs(20), |pool| {
        pool.answer(0, 5, 2e4);
        pool.answer(1, 5, 2e4);
        pool.answer(2, 1, 3e4);
    });
    assert!(matches!(found[..], [(after, 2, false)] if after <= secs(2)), "{found:?}");
}

#[test]
fn neither_means_below_the_bound_nor_single_long_answers_are_slow() {
    let mut pool = Pool::warmed(2);
    let found = pool.run(secs(20), |pool| {
        pool.answer(0, 5, 1e3);
        pool.answer(1, 5, 9e4);
    });
    assert_eq!(found, [], "90 ms is below a tenth of 1 s");
    let mut pool = Pool::warmed(2);
    let found = pool.run(secs(20), |pool| {
        pool.answer(0, 10, 1e3);
        pool.answer(1, 9, 1e3);
        pool.answer(1, 1, 3e7);
    });
    assert_eq!(found, [], "one answer in ten takes 30 s");
}

#[test]
fn quick_answers_clear_a_hang_and_late_answers_do_not() {
    let mut pool = Pool::warmed(2);
    let hang = |pool: &mut Pool| {
        pool.answer(0, 5, 1e3);
        pool.ask(1, 1);
    };
    assert_eq!(pool.run(secs(4), hang).len(), 1);
    let waiting = pool.counts[1].waiting();
    pool.counts[1].questions -= waiting;
    pool.answer(1, waiting, 2e6);
    assert_eq!(pool.look(), [], "the late answers");
    let found = pool.run(secs(20), |pool| {
        pool.answer(0, 5, 1e3);
        pool.answer(1, 5, 1e3);
    });
    assert!(matches!(found[..], [(after, 1, false)] if after <= secs(5)), "{found:?}");
}

#[test]
fn pool_median_excludes_the_backend_itself() {
    let view = PoolView { usuals: vec![1.0, 2.0, 2.0, 9.0], ..PoolView::default() };
    let usual = |own| view.pool_median_without(own).map(|s| (s * 1e6).log2().round());
    assert_eq!(usual(Some(9.0)), Some(2.0));
    assert_eq!(usual(Some(1.0)), Some(2.0));
    assert_eq!(usual(None), Some(2.0));
    let two = PoolView { usuals: vec![1.0, 9.0], ..PoolView::default() };
    assert_eq!(two.pool_median_without(Some(1.0)).map(|s| (s * 1e6).log2().round()), Some(9.0));
    let one = PoolView { usuals: vec![1.0], ..PoolView::default() };
    assert_eq!(one.pool_median_without(Some(1.0)), None);
}

//! Pools in virtual time: who is found gray, how soon, and who never.

use super::*;
use crate::table::state::LOG_UNIT;

const SLOW: Duration = Duration::from_secs(1);

/// A pool in virtual time.
struct Pool {
    now: Instant,
    counts: Vec<FirstByteCounts>,
    watches: Vec<SlowDetector>,
    slow: Duration,
}

impl Pool {
    fn new(backends: usize) -> Pool {
        let mut pool = Pool {
            now: tidegate_net::clock::now(),
            counts: vec![FirstByteCounts::default(); backends],
            watches: vec![SlowDetector::default(); backends],
            slow: SLOW,
        };
        pool.look();
        pool
    }

    /// So many sessions at that backend, each answered after so long.
    fn answer(&mut self, backend: usize, sessions: u64, micros: f64) {
        let counts = &mut self.counts[backend];
        counts.questions += sessions;
        counts.answers += sessions;
        counts.answer_log2 += (micros.log2() * LOG_UNIT) as u64 * sessions;
    }

    fn ask(&mut self, backend: usize, sessions: u64) {
        self.counts[backend].questions += sessions;
    }

    /// The next look: who became a suspect or was cleared.
    fn look(&mut self) -> Vec<(usize, SlowVerdict)> {
        self.now += LOOK_INTERVAL;
        for (watch, counts) in self.watches.iter_mut().zip(&self.counts) {
            watch.take(*counts, self.now);
        }
        let view = PoolView::of(self.watches.iter());
        let mut found = Vec::new();
        for (index, watch) in self.watches.iter_mut().enumerate() {
            let Some(verdict) = watch.judge(&view, self.slow, self.now) else { continue };
            match verdict {
                SlowVerdict::Suspect(_) => watch.suspect(self.now),
                SlowVerdict::Clear(_) => drop(watch.clear()),
            }
            found.push((index, verdict));
        }
        found
    }

    /// Looks for that long, `step` before each; what was found, and when.
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

    /// All backends answer in a millisecond for a while.
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
        // Each gave up after a look or so; four wait at any time.
        pool.counts[1].unanswered = pool.counts[1].questions - pool.counts[1].answers - 4;
    });
    assert!(matches!(found[..], [(_, 1, true)]), "{found:?}");
}

#[test]
fn unobserved_time_does_not_count_as_silence() {
    let mut pool = Pool::warmed(2);
    pool.ask(1, 5);
    pool.answer(0, 9, 1e3);
    pool.look();
    pool.now += secs(5);
    assert_eq!(pool.look(), [], "we may have been stopped, and it not");
    let found = pool.run(secs(3), |pool| pool.answer(0, 9, 1e3));
    assert!(matches!(found[..], [(_, 1, true)]), "{found:?}");
}

#[test]
fn too_few_that_wait_are_no_evidence() {
    let mut pool = Pool::warmed(2);
    pool.ask(1, 2);
    assert_eq!(pool.run(secs(60), |pool| pool.answer(0, 5, 1e3)), []);
}

#[test]
fn one_answer_now_and_then_is_not_hanging() {
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
fn missing_answers_leave_no_request_hanging() {
    let mut pool = Pool::warmed(3);
    assert_eq!(pool.run(secs(60), |pool| (0..3).for_each(|b| pool.ask(b, 5))), []);
}

#[test]
fn simultaneous_stops_leave_no_process_hanging() {
    let mut pool = Pool::warmed(3);
    (0..3).for_each(|backend| pool.ask(backend, 4 + backend as u64));
    assert_eq!(pool.run(secs(60), |_| {}), []);
}

#[test]
fn clients_that_are_all_stuck_at_once_do_not_hide_it() {
    let mut pool = Pool::warmed(3);
    (0..3).for_each(|backend| pool.answer(backend, 20, 1e3));
    pool.ask(2, 8);
    let found = pool.run(secs(10), |_| {});
    assert!(matches!(found[..], [(after, 2, true)] if after <= secs(2)), "{found:?}");
}

#[test]
fn backend_alone_is_never_suspect() {
    let mut pool = Pool::warmed(1);
    assert_eq!(pool.run(secs(60), |pool| pool.ask(0, 5)), []);
}

#[test]
fn pool_of_long_polls_suspects_no_backend() {
    let mut pool = Pool::new(3);
    let mut looks = 0u64;
    // Each poll takes ten seconds, and a few begin at each look.
    let found = pool.run(secs(120), |pool| {
        looks += 1;
        for backend in 0..3 {
            pool.ask(backend, 4);
            // They do not come back at the same moment everywhere.
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
fn backend_ten_times_slower_is_suspect_and_cleared_when_it_is_not() {
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
fn below_a_tenth_of_the_bound_no_backend_is_slow_and_one_long_answer_is_no_mean() {
    let mut pool = Pool::warmed(2);
    let found = pool.run(secs(20), |pool| {
        pool.answer(0, 5, 1e3);
        pool.answer(1, 5, 9e4);
    });
    assert_eq!(found, [], "90 ms where the bound is a second");
    let mut pool = Pool::warmed(2);
    let found = pool.run(secs(20), |pool| {
        pool.answer(0, 10, 1e3);
        pool.answer(1, 9, 1e3);
        pool.answer(1, 1, 3e7);
    });
    assert_eq!(found, [], "one in ten takes half a minute");
}

#[test]
fn hanging_one_is_cleared_by_quick_answers_not_by_those_that_waited() {
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
fn median_of_the_others_leaves_oneself_out() {
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

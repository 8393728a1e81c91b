//! Whose loop does not turn: asks every worker for its pulse and names the one
//! that stays silent.
//!
//! Owned by the control loop, which calls [`Watchdog::look`] a few times a second.
//! It mends nothing: a thread cannot be ended from outside. Nobody is blamed for a
//! time in which the watcher itself did not run (a stopped process, a machine
//! that was asleep, a CPU quota used up), nor for one spent waiting for a CPU.

use crate::telemetry::counters::WorkerCounters;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Between two looks: an idle worker is woken so often.
pub(super) const STEP: Duration = Duration::from_millis(250);

/// A loop that has not turned for so long is stalled. A turn takes milliseconds;
/// what takes a second has been waited for by every session of the worker.
pub(super) const STALLED_AFTER: Duration = Duration::from_secs(1);

/// A look that comes so much too late finds everybody excused.
const LATE_MAX: Duration = Duration::from_millis(250);

/// What the kernel says of a thread.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct ThreadFacts {
    /// The letter of proc_pid_stat(5); `None` where it cannot be read.
    pub(super) state: Option<char>,
    /// How long it has waited for a CPU, in all.
    pub(super) waited: Duration,
}

/// The watcher.
#[derive(Debug)]
pub(super) struct Watchdog {
    watched: Vec<Watched>,
    /// When to look next.
    next_look: Instant,
}

#[derive(Debug, Clone, Copy)]
struct Watched {
    /// Since when it owes an answer.
    since: Instant,
    /// Waited for a CPU by the first look it owed one.
    waited: Option<Duration>,
    stalled: bool,
}

/// Something worth a line in the log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Finding {
    /// That worker's loop does not turn.
    Stalled {
        /// Its number.
        worker: usize,
        /// For how long.
        time: Duration,
        /// What its thread is doing.
        state: Option<char>,
    },
    /// It turns again.
    Turns {
        /// Its number.
        worker: usize,
        /// How long it did not.
        time: Duration,
    },
}

// === impl Watchdog ===

impl Watchdog {
    pub(super) fn new(workers: usize, now: Instant) -> Watchdog {
        let watched = Watched { since: now, waited: None, stalled: false };
        Watchdog { watched: vec![watched; workers], next_look: now + STEP }
    }

    /// When [`Watchdog::look`] is wanted.
    pub(super) fn next_look(&self) -> Instant {
        self.next_look
    }

    /// Takes the answers and asks anew; `wake` has a worker notice the question,
    /// `facts` asks the kernel about its thread.
    pub(super) fn look(
        &mut self,
        now: Instant,
        workers: &[Arc<WorkerCounters>],
        wake: impl Fn(usize),
        facts: impl Fn(i32) -> ThreadFacts,
    ) -> Vec<Finding> {
        let excused = now.saturating_duration_since(self.next_look) >= LATE_MAX;
        self.next_look = now + STEP;
        let mut findings = Vec::new();
        for (worker, (watched, counters)) in self.watched.iter_mut().zip(workers).enumerate() {
            let pulse = &counters.pulse;
            let facts = || pulse.thread().map(&facts).unwrap_or_default();
            if pulse.ask() {
                if std::mem::take(&mut watched.stalled) {
                    let time = now.saturating_duration_since(watched.since);
                    findings.push(Finding::Turns { worker, time });
                    pulse.set_stalled(None);
                }
                (watched.since, watched.waited) = (now, None);
            } else if watched.stalled {
                pulse.set_stalled(Some(now.saturating_duration_since(watched.since)));
            } else if excused {
                (watched.since, watched.waited) = (now, None);
            } else {
                let ThreadFacts { state, waited } = facts();
                let starved = waited.saturating_sub(*watched.waited.get_or_insert(waited));
                let time = now.saturating_duration_since(watched.since);
                if time.saturating_sub(starved) >= STALLED_AFTER {
                    watched.stalled = true;
                    counters.stalls.add(1);
                    pulse.set_stalled(Some(time));
                    findings.push(Finding::Stalled { worker, time, state });
                }
            }
            wake(worker);
        }
        findings
    }
}

/// How long the worst of them has not turned.
pub(super) fn longest_stall(workers: &[Arc<WorkerCounters>]) -> Option<Duration> {
    workers.iter().filter_map(|worker| worker.pulse.stalled_for()).max()
}

/// What the kernel says of a thread of this process (proc_pid_stat(5); the second
/// number of `schedstat` is nanoseconds spent waiting for a CPU).
pub(super) fn thread_facts(thread: i32) -> ThreadFacts {
    let read = |file| std::fs::read_to_string(format!("/proc/self/task/{thread}/{file}"));
    let after_name =
        |stat: String| stat.rsplit_once(") ").and_then(|(_, rest)| rest.chars().next());
    let waited = |text: String| text.split(' ').nth(1).and_then(|nanos| nanos.parse().ok());
    ThreadFacts {
        state: read("stat").ok().and_then(after_name),
        waited: read("schedstat")
            .ok()
            .and_then(waited)
            .map_or(Duration::ZERO, Duration::from_nanos),
    }
}

/// The letter in words.
pub(super) fn in_words(state: Option<char>) -> &'static str {
    match state {
        Some('R') => "running",
        Some('S') => "asleep",
        Some('D') => "blocked in the kernel",
        Some('T' | 't') => "stopped",
        _ => "unknown",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock;
    use crate::proxy::close::{Cause, Phase};

    struct World {
        now: Instant,
        workers: Vec<Arc<WorkerCounters>>,
        watchdog: Watchdog,
        waited: Duration,
    }

    impl World {
        fn new() -> World {
            let now = clock::now();
            let one = || Arc::new(WorkerCounters::new(Cause::COUNT, Phase::COUNT));
            let workers = vec![one(), one()];
            workers.iter().for_each(|worker| worker.pulse.runs_on(1));
            World { now, workers, watchdog: Watchdog::new(2, now), waited: Duration::ZERO }
        }

        /// `turning` workers answer, then time passes, then the watcher looks.
        fn step(&mut self, turning: &[usize], time: Duration) -> Vec<Finding> {
            turning.iter().for_each(|worker| self.workers[*worker].pulse.answer());
            self.now += time;
            let facts = ThreadFacts { state: Some('R'), waited: self.waited };
            self.watchdog.look(self.now, &self.workers, |_| {}, |_| facts)
        }

        fn steps(&mut self, turning: &[usize], count: u32) -> Vec<Finding> {
            (0..count).flat_map(|_| self.step(turning, STEP)).collect()
        }
    }

    #[test]
    fn who_does_not_turn_is_named_once_and_then_cleared() {
        let mut world = World::new();
        assert_eq!(world.steps(&[0, 1], 10), []);
        let found = world.steps(&[0], 10);
        let [Finding::Stalled { worker: 1, time, state: Some('R') }] = found[..] else {
            panic!("{found:?}")
        };
        assert!(time >= STALLED_AFTER && time <= STALLED_AFTER + STEP, "{time:?}");
        assert_eq!(world.workers[1].stalls.get(), 1);
        let stalled = longest_stall(&world.workers).unwrap();
        assert!(stalled >= STEP * 9, "{stalled:?}");
        let found = world.steps(&[0, 1], 3);
        assert!(matches!(found[..], [Finding::Turns { worker: 1, .. }]), "{found:?}");
        assert_eq!(longest_stall(&world.workers), None);
    }

    #[test]
    fn a_watcher_that_did_not_run_itself_blames_nobody() {
        let mut world = World::new();
        world.steps(&[0, 1], 2);
        for _ in 0..20 {
            assert_eq!(world.step(&[], Duration::from_secs(30)), []);
        }
        assert_eq!(world.steps(&[0, 1], 10), []);
    }

    #[test]
    fn who_waits_for_a_cpu_is_starved_and_not_stalled() {
        let mut world = World::new();
        world.steps(&[0, 1], 2);
        for _ in 0..40 {
            world.waited += STEP;
            assert_eq!(world.step(&[0], STEP), []);
        }
        let found = world.steps(&[0], 5);
        assert!(matches!(found[..], [Finding::Stalled { worker: 1, .. }]), "{found:?}");
    }

    #[test]
    fn the_kernel_knows_this_thread() {
        let facts = thread_facts(crate::net::cpu::current_thread());
        assert_eq!(in_words(facts.state), "running");
        assert_eq!(thread_facts(-1), ThreadFacts::default());
    }
}

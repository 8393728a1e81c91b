//! Whose loop does not turn: asks every worker for its pulse and names the one
//! that stays silent.
//!
//! Owned by the control loop, which calls [`Watchdog::look`] a few times a second.
//! It mends nothing: a thread cannot be ended from outside. Nobody is blamed for a
//! time in which the watcher itself did not run (a stopped process, a machine
//! that was asleep, a CPU quota used up), nor for one spent waiting for a CPU.

use std::sync::Arc;
use std::time::{Duration, Instant};
use tidegate_core::metrics::counters::WorkerCounters;

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
    /// How long it has waited for a CPU, in all; the kernel adds to it only once the
    /// thread runs at last.
    pub(super) waited: Duration,
    /// How long it has run, in all.
    pub(super) ran: Duration,
}

/// The watcher.
#[derive(Debug)]
pub(super) struct Watchdog {
    watched: Vec<WorkerWatch>,
    /// When to look next.
    next_look: Instant,
}

#[derive(Debug, Clone, Copy)]
struct WorkerWatch {
    /// Since when it owes an answer.
    since: Instant,
    /// What the kernel said at the first look at which it owed one.
    first: Option<ThreadFacts>,
    /// What the kernel said last, and when.
    last: Option<(Instant, ThreadFacts)>,
    /// It was found waiting for a CPU that long, beyond what the kernel has added up.
    in_line: Duration,
    stalled: bool,
}

/// Something worth a line in the log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum WatchdogEvent {
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
    Responsive {
        /// Its number.
        worker: usize,
        /// How long it did not.
        time: Duration,
    },
}

// === impl Watchdog ===

impl Watchdog {
    pub(super) fn new(workers: usize, now: Instant) -> Watchdog {
        let watched = WorkerWatch::new(now);
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
    ) -> Vec<WatchdogEvent> {
        let excused = now.saturating_duration_since(self.next_look) >= LATE_MAX;
        self.next_look = now + STEP;
        let mut findings = Vec::new();
        for (worker, (watched, counters)) in self.watched.iter_mut().zip(workers).enumerate() {
            let pulse = &counters.pulse;
            let facts = || pulse.thread().map(&facts).unwrap_or_default();
            if pulse.request_progress() {
                if std::mem::take(&mut watched.stalled) {
                    let time = now.saturating_duration_since(watched.since);
                    findings.push(WatchdogEvent::Responsive { worker, time });
                    pulse.set_stalled(None);
                }
                *watched = WorkerWatch::new(now);
            } else if watched.stalled {
                pulse.set_stalled(Some(now.saturating_duration_since(watched.since)));
            } else if excused {
                *watched = WorkerWatch::new(now);
            } else {
                let facts = facts();
                let (state, starved) = (facts.state, watched.starved(facts, now));
                let time = now.saturating_duration_since(watched.since);
                if time.saturating_sub(starved) >= STALLED_AFTER {
                    watched.stalled = true;
                    counters.stalls.add(1);
                    pulse.set_stalled(Some(time));
                    findings.push(WatchdogEvent::Stalled { worker, time, state });
                }
            }
            wake(worker);
        }
        findings
    }
}

// === impl WorkerWatch ===

impl WorkerWatch {
    fn new(since: Instant) -> WorkerWatch {
        WorkerWatch { since, first: None, last: None, in_line: Duration::ZERO, stalled: false }
    }

    /// How long it has waited for a CPU since the first look. While it waits the
    /// kernel has not added that up: a thread that may run, and has not run since the
    /// last look, was waiting all the while.
    fn starved(&mut self, facts: ThreadFacts, now: Instant) -> Duration {
        let first = *self.first.get_or_insert(facts);
        if let Some((at, last)) = self.last.replace((now, facts)) {
            if facts.waited > last.waited {
                // It ran: what it waited for is in the kernel's sum from now on.
                self.in_line = Duration::ZERO;
            }
            // Nobody has run for no time at all: then the kernel does not say.
            let stood = facts.ran == last.ran && !facts.ran.is_zero();
            if stood && facts.state == Some('R') && last.state == Some('R') {
                self.in_line += now.saturating_duration_since(at);
            }
        }
        facts.waited.saturating_sub(first.waited) + self.in_line
    }
}

/// How long the worst of them has not turned.
pub(super) fn longest_stall(workers: &[Arc<WorkerCounters>]) -> Option<Duration> {
    workers.iter().filter_map(|worker| worker.pulse.stalled_for()).max()
}

/// What the kernel says of a thread of this process (proc_pid_stat(5); the second
/// numbers of `schedstat` are nanoseconds spent on a CPU and waiting for one).
pub(super) fn thread_facts(thread: i32) -> ThreadFacts {
    let read = |file| std::fs::read_to_string(format!("/proc/self/task/{thread}/{file}"));
    let after_name =
        |stat: String| stat.rsplit_once(") ").and_then(|(_, rest)| rest.chars().next());
    let times = read("schedstat").unwrap_or_default();
    let mut times = times.split(' ').map(|nanos| nanos.parse().unwrap_or(0));
    let mut next = || Duration::from_nanos(times.next().unwrap_or(0));
    let (ran, waited) = (next(), next());
    ThreadFacts { state: read("stat").ok().and_then(after_name), waited, ran }
}

/// The letter in words.
pub(super) fn thread_state_name(state: Option<char>) -> &'static str {
    match state {
        Some('R') => "running",
        Some('S') => "sleeping",
        Some('D') => "blocked in the kernel",
        Some('T' | 't') => "stopped",
        _ => "unknown",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tidegate_core::outcome::{Cause, Phase};
    use tidegate_net::clock;

    struct World {
        now: Instant,
        workers: Vec<Arc<WorkerCounters>>,
        watchdog: Watchdog,
        facts: ThreadFacts,
    }

    impl World {
        fn new() -> World {
            let now = clock::now();
            let one = || Arc::new(WorkerCounters::new(Cause::COUNT, Phase::COUNT));
            let workers = vec![one(), one()];
            workers.iter().for_each(|worker| worker.pulse.set_thread(1));
            let facts = ThreadFacts { state: Some('R'), ..ThreadFacts::default() };
            World { now, workers, watchdog: Watchdog::new(2, now), facts }
        }

        /// `turning` workers answer, then time passes, then the watcher looks.
        fn step(&mut self, turning: &[usize], time: Duration) -> Vec<WatchdogEvent> {
            turning.iter().for_each(|worker| self.workers[*worker].pulse.report_progress());
            self.now += time;
            let facts = self.facts;
            self.watchdog.look(self.now, &self.workers, |_| {}, |_| facts)
        }

        /// The same for threads that run all the while.
        fn steps(&mut self, turning: &[usize], count: u32) -> Vec<WatchdogEvent> {
            let step = |_| {
                self.facts.ran += STEP;
                self.step(turning, STEP)
            };
            (0..count).flat_map(step).collect()
        }
    }

    #[test]
    fn stalled_worker_is_reported_once_and_then_cleared() {
        let mut world = World::new();
        assert_eq!(world.steps(&[0, 1], 10), []);
        let found = world.steps(&[0], 10);
        let [WatchdogEvent::Stalled { worker: 1, time, state: Some('R') }] = found[..] else {
            panic!("{found:?}")
        };
        assert!(time >= STALLED_AFTER && time <= STALLED_AFTER + STEP, "{time:?}");
        assert_eq!(world.workers[1].stalls.get(), 1);
        let stalled = longest_stall(&world.workers).unwrap();
        assert!(stalled >= STEP * 9, "{stalled:?}");
        let found = world.steps(&[0, 1], 3);
        assert!(matches!(found[..], [WatchdogEvent::Responsive { worker: 1, .. }]), "{found:?}");
        assert_eq!(longest_stall(&world.workers), None);
    }

    #[test]
    fn late_watchdog_reports_no_stall() {
        let mut world = World::new();
        world.steps(&[0, 1], 2);
        for _ in 0..20 {
            assert_eq!(world.step(&[], Duration::from_secs(30)), []);
        }
        assert_eq!(world.steps(&[0, 1], 10), []);
    }

    #[test]
    fn worker_waiting_for_a_cpu_is_not_stalled() {
        let mut world = World::new();
        world.steps(&[0, 1], 2);
        for _ in 0..40 {
            world.facts.waited += STEP;
            assert_eq!(world.step(&[0], STEP), []);
        }
        let found = world.steps(&[0], 5);
        assert!(matches!(found[..], [WatchdogEvent::Stalled { worker: 1, .. }]), "{found:?}");
    }

    #[test]
    fn worker_waiting_for_a_cpu_is_starved_before_the_kernel_accounts_it() {
        let mut world = World::new();
        world.steps(&[0, 1], 2);
        // May run, and does not: neither of its times grows.
        for _ in 0..40 {
            assert_eq!(world.step(&[0], STEP), []);
        }
        // It runs at last, for a moment, and waits again.
        world.facts.waited += STEP * 40;
        world.facts.ran += Duration::from_micros(50);
        for _ in 0..40 {
            assert_eq!(world.step(&[0], STEP), []);
        }
        // A loop without an end runs, and one that waits for a lock may not.
        let found = world.steps(&[0], 6);
        assert!(matches!(found[..], [WatchdogEvent::Stalled { worker: 1, .. }]), "{found:?}");
        let mut world = World::new();
        world.facts.state = Some('S');
        world.steps(&[0, 1], 2);
        let found: Vec<WatchdogEvent> = (0..10).flat_map(|_| world.step(&[0], STEP)).collect();
        assert!(matches!(found[..], [WatchdogEvent::Stalled { worker: 1, .. }]), "{found:?}");
    }

    #[test]
    fn the_kernel_knows_this_thread() {
        let facts = thread_facts(tidegate_net::cpu::current_thread());
        assert_eq!(thread_state_name(facts.state), "running");
        assert_eq!(thread_facts(-1), ThreadFacts::default());
    }
}

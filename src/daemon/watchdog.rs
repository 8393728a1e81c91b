//! Detects stalled workers: requests a progress report from every worker and reports
//! those that do not answer.
//!
//! Owned by `worker_set`, which calls [`Watchdog::check`] every [`STEP`]. It only reports:
//! a thread cannot be ended by another thread.
//!
//! Two times do not count as a stall:
//!
//! - a time in which the control thread did not run either (stopped process, suspended
//!   host, exhausted CPU quota),
//! - a time in which the worker was ready to run but waited for a CPU.

use std::sync::Arc;
use std::time::{Duration, Instant};
use tidegate_core::metrics::counters::WorkerCounters;

/// Time between two checks. Each check wakes all workers.
pub(super) const STEP: Duration = Duration::from_millis(250);

/// A loop without a complete turn for this time is stalled. A turn takes milliseconds. A
/// turn of one second delays every session of the worker.
pub(super) const STALLED_AFTER: Duration = Duration::from_secs(1);

/// If a check is late by this time, the control thread did not run, so no worker is
/// reported.
const LATE_MAX: Duration = Duration::from_millis(250);

/// Kernel data about a thread.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct ThreadFacts {
    /// The state letter of proc_pid_stat(5); `None` if it cannot be read.
    pub(super) state: Option<char>,
    /// Total time spent waiting for a CPU. The kernel adds a wait only when the thread
    /// runs again.
    pub(super) waited: Duration,
    /// Total time spent running.
    pub(super) ran: Duration,
}

/// Detector of stalled workers.
#[derive(Debug)]
pub(super) struct Watchdog {
    watched: Vec<WorkerWatch>,
    /// When the next check is due.
    next_check: Instant,
}

#[derive(Debug, Clone, Copy)]
struct WorkerWatch {
    /// When the open request was sent.
    since: Instant,
    /// Thread data at the first check without an answer.
    first: Option<ThreadFacts>,
    /// Thread data at the last check.
    last: Option<(Instant, ThreadFacts)>,
    /// Observed wait for a CPU that the kernel has not added to `waited` yet.
    unaccounted: Duration,
    stalled: bool,
}

/// A change to log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum WatchdogEvent {
    /// The event loop of a worker makes no progress.
    Stalled {
        /// Number of the worker.
        worker: usize,
        /// Length of the stall so far.
        time: Duration,
        /// State letter of the thread.
        state: Option<char>,
    },
    /// The event loop makes progress again.
    Responsive {
        /// Number of the worker.
        worker: usize,
        /// Length of the stall.
        time: Duration,
    },
}

// === impl Watchdog ===

impl Watchdog {
    pub(super) fn new(workers: usize, now: Instant) -> Watchdog {
        let watched = WorkerWatch::new(now);
        Watchdog { watched: vec![watched; workers], next_check: now + STEP }
    }

    /// Returns when [`Watchdog::check`] is due.
    pub(super) fn next_check(&self) -> Instant {
        self.next_check
    }

    /// Takes the progress reports and requests new ones. `wake` wakes a worker so that it
    /// answers. `facts` reads the kernel data of a thread.
    pub(super) fn check(
        &mut self,
        now: Instant,
        workers: &[Arc<WorkerCounters>],
        wake: impl Fn(usize),
        facts: impl Fn(i32) -> ThreadFacts,
    ) -> Vec<WatchdogEvent> {
        let late = now.saturating_duration_since(self.next_check) >= LATE_MAX;
        self.next_check = now + STEP;
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
            } else if late {
                *watched = WorkerWatch::new(now);
            } else {
                let facts = facts();
                let (state, cpu_wait) = (facts.state, watched.cpu_wait(facts, now));
                let time = now.saturating_duration_since(watched.since);
                if time.saturating_sub(cpu_wait) >= STALLED_AFTER {
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
        WorkerWatch { since, first: None, last: None, unaccounted: Duration::ZERO, stalled: false }
    }

    /// Returns how long the thread has waited for a CPU since the first check. The kernel
    /// does not report a wait before its end. Therefore a thread that was runnable at two
    /// checks and did not run in between is assumed to have waited for the whole time.
    fn cpu_wait(&mut self, facts: ThreadFacts, now: Instant) -> Duration {
        let first = *self.first.get_or_insert(facts);
        if let Some((at, last)) = self.last.replace((now, facts)) {
            if facts.waited > last.waited {
                // The thread ran, so the kernel's sum includes the wait.
                self.unaccounted = Duration::ZERO;
            }
            // A total of zero means that the kernel does not report the time.
            let did_not_run = facts.ran == last.ran && !facts.ran.is_zero();
            if did_not_run && facts.state == Some('R') && last.state == Some('R') {
                self.unaccounted += now.saturating_duration_since(at);
            }
        }
        facts.waited.saturating_sub(first.waited) + self.unaccounted
    }
}

/// Returns the longest current stall.
pub(super) fn longest_stall(workers: &[Arc<WorkerCounters>]) -> Option<Duration> {
    workers.iter().filter_map(|worker| worker.pulse.stalled_for()).max()
}

/// Reads the kernel data of a thread of this process (proc_pid_stat(5)). The first two
/// numbers of `schedstat` are the nanoseconds spent on a CPU and waiting for a CPU.
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

/// Returns the name of a state letter for the log.
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

    struct Setup {
        now: Instant,
        workers: Vec<Arc<WorkerCounters>>,
        watchdog: Watchdog,
        facts: ThreadFacts,
    }

    impl Setup {
        fn new() -> Setup {
            let now = clock::now();
            let one = || Arc::new(WorkerCounters::new(Cause::COUNT, Phase::COUNT));
            let workers = vec![one(), one()];
            workers.iter().for_each(|worker| worker.pulse.set_thread(1));
            let facts = ThreadFacts { state: Some('R'), ..ThreadFacts::default() };
            Setup { now, workers, watchdog: Watchdog::new(2, now), facts }
        }

        /// The workers in `turning` answer, `time` passes, then the watchdog checks.
        fn step(&mut self, turning: &[usize], time: Duration) -> Vec<WatchdogEvent> {
            turning.iter().for_each(|worker| self.workers[*worker].pulse.report_progress());
            self.now += time;
            let facts = self.facts;
            self.watchdog.check(self.now, &self.workers, |_| {}, |_| facts)
        }

        /// Runs `count` steps with threads that run the whole time.
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
        let mut setup = Setup::new();
        assert_eq!(setup.steps(&[0, 1], 10), []);
        let found = setup.steps(&[0], 10);
        let [WatchdogEvent::Stalled { worker: 1, time, state: Some('R') }] = found[..] else {
            panic!("{found:?}")
        };
        assert!(time >= STALLED_AFTER && time <= STALLED_AFTER + STEP, "{time:?}");
        assert_eq!(setup.workers[1].stalls.get(), 1);
        let stalled = longest_stall(&setup.workers).unwrap();
        assert!(stalled >= STEP * 9, "{stalled:?}");
        let found = setup.steps(&[0, 1], 3);
        assert!(matches!(found[..], [WatchdogEvent::Responsive { worker: 1, .. }]), "{found:?}");
        assert_eq!(longest_stall(&setup.workers), None);
    }

    #[test]
    fn late_watchdog_reports_no_stall() {
        let mut setup = Setup::new();
        setup.steps(&[0, 1], 2);
        for _ in 0..20 {
            assert_eq!(setup.step(&[], Duration::from_secs(30)), []);
        }
        assert_eq!(setup.steps(&[0, 1], 10), []);
    }

    #[test]
    fn worker_waiting_for_a_cpu_is_not_stalled() {
        let mut setup = Setup::new();
        setup.steps(&[0, 1], 2);
        for _ in 0..40 {
            setup.facts.waited += STEP;
            assert_eq!(setup.step(&[0], STEP), []);
        }
        let found = setup.steps(&[0], 5);
        assert!(matches!(found[..], [WatchdogEvent::Stalled { worker: 1, .. }]), "{found:?}");
    }

    #[test]
    fn worker_waiting_for_a_cpu_is_not_stalled_before_the_kernel_accounts_the_wait() {
        let mut setup = Setup::new();
        setup.steps(&[0, 1], 2);
        // The thread is runnable and does not run: neither time increases.
        for _ in 0..40 {
            assert_eq!(setup.step(&[0], STEP), []);
        }
        // The thread runs for 50 µs and waits again.
        setup.facts.waited += STEP * 40;
        setup.facts.ran += Duration::from_micros(50);
        for _ in 0..40 {
            assert_eq!(setup.step(&[0], STEP), []);
        }
        // An endless loop runs, and a thread that waits for a lock sleeps. Both stall.
        let found = setup.steps(&[0], 6);
        assert!(matches!(found[..], [WatchdogEvent::Stalled { worker: 1, .. }]), "{found:?}");
        let mut setup = Setup::new();
        setup.facts.state = Some('S');
        setup.steps(&[0, 1], 2);
        let found: Vec<WatchdogEvent> = (0..10).flat_map(|_| setup.step(&[0], STEP)).collect();
        assert!(matches!(found[..], [WatchdogEvent::Stalled { worker: 1, .. }]), "{found:?}");
    }

    #[test]
    fn kernel_data_of_this_thread_is_readable() {
        let facts = thread_facts(tidegate_net::cpu::current_thread());
        assert_eq!(thread_state_name(facts.state), "running");
        assert_eq!(thread_facts(-1), ThreadFacts::default());
    }
}

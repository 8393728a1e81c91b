//! The pace of table parts that another thread builds, while newcomers of a registry are verified.

use super::registry::{discovered_tables, guards, many};
use super::*;

/// How long each build takes.
const BUILD: Duration = Duration::from_millis(15);

/// A pool whose part is detached, and the end of its running build.
struct Slow {
    bench: Bench,
    running: Option<(Instant, ControlEvent)>,
}

impl Slow {
    /// The registry lists `count` members, none of which is verified.
    fn new(count: usize) -> Slow {
        let mut bench = Bench::new(discovering_with(unprobed(&[]), guards()));
        bench.controller.detach_builds_above(4);
        let mut slow = Slow { bench, running: None };
        slow.tell(count);
        slow
    }

    /// The registry lists `count` members.
    fn tell(&mut self, count: usize) {
        let key = SourceKey { pool: "web".into(), backend: None };
        let (told, at) = (whole_of(many(0, count)), self.bench.now);
        self.apply(ControlEvent::Told { key, told, at });
    }

    fn apply(&mut self, event: ControlEvent) {
        let effects = self.bench.controller.apply(event, self.bench.now);
        self.note(effects);
    }

    /// Begins requested builds, which end [`BUILD`] later.
    fn note(&mut self, effects: Vec<ControlEffect>) {
        let now = self.bench.now;
        for effect in effects {
            match effect {
                ControlEffect::Build { token, build } => {
                    assert!(self.running.is_none(), "a pool has one running build");
                    let built = Box::new(build.run());
                    let event = ControlEvent::Built { token, built, took: BUILD };
                    self.running = Some((now + BUILD, event));
                }
                ControlEffect::Probe { backend, token, .. } => {
                    self.bench.asked.push((backend, token));
                }
                _ => {}
            }
        }
    }

    fn pass_millisecond(&mut self) {
        self.bench.now += Duration::from_millis(1);
        let now = self.bench.now;
        if let Some((_, event)) = self.running.take_if(|(end, _)| *end <= now) {
            self.apply(event);
        }
        self.apply(ControlEvent::Tick);
    }

    /// Lets milliseconds pass, and answers all connects.
    fn pass_and_answer(&mut self, millis: u128) {
        for _ in 0..millis {
            self.pass_millisecond();
            (0..self.bench.asked.len()).for_each(|_| self.answer_one());
        }
    }

    fn answer_one(&mut self) {
        let (backend, token) = self.bench.asked.remove(0);
        let outcome = ProbeOutcome::success(Duration::ZERO);
        self.apply(ControlEvent::Probed { backend, token, outcome });
    }
}

#[test]
fn builds_for_newcomers_use_a_tenth_of_the_other_threads_time() {
    let mut slow = Slow::new(1_200);
    (0..200).for_each(|_| slow.pass_millisecond());
    let (before, mut answers) = (discovered_tables(&slow.bench), 0);
    for _ in 0..1_500 {
        slow.pass_millisecond();
        if !slow.bench.asked.is_empty() {
            slow.answer_one();
            answers += 1;
        }
    }
    assert_eq!(answers, 1_200, "newcomers are verified over the whole time");
    let tables = discovered_tables(&slow.bench) - before;
    assert!((7..=11).contains(&tables), "{tables} tables in 1.5 s; a build takes 15 ms");
    (0..200).for_each(|_| slow.pass_millisecond());
    assert_eq!(slow.bench.serving().len(), 1_200);
}

#[test]
fn backend_that_is_drained_during_the_pace_is_shut_and_built_at_once() {
    let mut slow = Slow::new(20);
    slow.pass_and_answer(400);
    assert_eq!(slow.bench.serving().len(), 20);
    slow.tell(21);
    while slow.bench.serving().len() < 21 {
        slow.pass_and_answer(1);
    }
    assert!(slow.running.is_none(), "the next changes of the registry wait for 135 ms");
    let state = slow.bench.status("s1").state;
    let now = slow.bench.now;
    let effects = slow.bench.controller.set_intent("web", "s1", Intent::Draining, now).unwrap();
    slow.note(effects);
    assert!(!state.in_flight.try_enter(0), "shut at once");
    slow.pass_and_answer(2 * BUILD.as_millis());
    assert_eq!(slow.bench.serving().len(), 20, "the other thread rests as long as it has built");
}

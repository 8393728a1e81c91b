//! Slow and hanging backends: which become suspect, and when they are cleared.

use super::*;
use crate::table::state::LOG_UNIT;

pub(super) fn watched(backends: &[&str]) -> PoolConfig {
    let ejection = EjectionSpec {
        failures: 5,
        time: Duration::from_secs(10),
        max_ejected_percent: 50,
        early_resets: true,
        slow_first_byte: Some(Duration::from_secs(1)),
    };
    PoolConfig { ejection: Some(ejection), ..unprobed(backends) }
}

impl Bench {
    /// Counts sessions answered in 1 ms, as a worker does.
    pub(super) fn quick(&self, name: &str, sessions: u64) {
        let state = self.status(name).state;
        let counters = state.counters.of(1);
        counters.questions.add(sessions);
        counters.answers.add(sessions);
        counters.answer_log2.add((1e3f64.log2() * LOG_UNIT) as u64 * sessions);
    }

    fn ask(&self, name: &str) {
        self.status(name).state.counters.of(0).questions.add(1);
    }

    /// Runs `looks` checks: the quick backends answer, the hanging ones do not.
    pub(super) fn looks(
        &mut self,
        looks: u32,
        quick: &[&str],
        hanging: &[&str],
    ) -> Vec<ControlEffect> {
        (0..looks)
            .flat_map(|_| {
                quick.iter().for_each(|name| self.quick(name, 5));
                hanging.iter().for_each(|name| self.ask(name));
                self.pass(Duration::from_millis(200))
            })
            .collect()
    }
}

#[test]
fn hanging_backend_keeps_a_tenth_of_its_weight_until_it_answers() {
    let mut bench = Bench::new(watched(&["a", "b", "c"]));
    bench.looks(10, &["a", "b", "c"], &[]);
    let effects = bench.looks(10, &["a", "b"], &["c"]);
    assert_eq!(publishes(&effects), 1);
    assert!(logs(&effects)[0].starts_with("c: unknown -> suspect: "), "{:?}", logs(&effects));
    let c = bench.status("c");
    assert_eq!((c.observation, c.effective_weight, c.eligible), (Observation::Suspect, 1.0, true));
    let table = bench.controller.current_table();
    let weights: Vec<u32> = table.pools[0]
        .balancer
        .as_ref()
        .unwrap()
        .candidates()
        .map(|candidate| candidate.weight)
        .collect();
    assert_eq!(weights, [1000, 1000, 100]);
    let effects = bench.looks(10, &["a", "b", "c"], &[]);
    assert!(logs(&effects)[0].starts_with("c: suspect -> unknown: "), "{:?}", logs(&effects));
    assert_eq!(bench.status("c").effective_weight, 10.0);
}

#[test]
fn suspects_are_capped_by_max_ejected_and_at_least_one_is_allowed() {
    let mut bench = Bench::new(watched(&["a", "b", "c"]));
    bench.looks(10, &["a", "b", "c"], &[]);
    let effects = bench.looks(50, &["a"], &["b", "c"]);
    assert_eq!(logs(&effects).len(), 1, "{:?}", logs(&effects));
    let mut bench = Bench::new(watched(&["a", "b"]));
    bench.looks(10, &["a", "b"], &[]);
    assert_eq!(logs(&bench.looks(50, &["a"], &["b"])).len(), 1);
}

#[test]
fn detector_switched_off_by_a_reload_suspects_no_backend() {
    let mut bench = Bench::new(watched(&["a", "b"]));
    bench.looks(10, &["a", "b"], &[]);
    bench.looks(10, &["a"], &["b"]);
    assert_eq!(bench.status("b").observation, Observation::Suspect);
    let effects = bench.configure(unprobed(&["a", "b"]));
    assert!(logs(&effects)[0].starts_with("b: suspect -> unknown: "), "{:?}", logs(&effects));
    assert_eq!(bench.controller.next_due(), None, "no check is scheduled");
}

#[test]
fn reload_that_keeps_a_suspect_keeps_the_suspicion() {
    let mut bench = Bench::new(watched(&["a", "b"]));
    bench.looks(10, &["a", "b"], &[]);
    bench.looks(10, &["a"], &["b"]);
    bench.configure(watched(&["a", "b", "c"]));
    assert_eq!(bench.status("b").observation, Observation::Suspect);
    bench.configure(watched(&["b"]));
    assert_ne!(
        bench.status("b").observation,
        Observation::Suspect,
        "no other backend to compare with"
    );
}

#[test]
fn backend_down_by_probes_is_not_suspect() {
    let probed = PoolConfig { probe: Some(Arc::new(probe_spec())), ..watched(&["a", "b"]) };
    let mut bench = Bench::up(probed);
    bench.looks(10, &["a", "b"], &[]);
    bench.looks(10, &["a"], &["b"]);
    assert_eq!(bench.status("b").observation, Observation::Suspect);
    bench.refuse("b", 1, 3);
    assert_eq!(bench.status("b").observation, Observation::Down);
    assert_eq!(bench.serving(), ["a"]);
}

//! Views over upgrades and restarts.

use super::*;
use crate::control::SavedViews;
use crate::control::handover::Saved;

const CONFIRM: Duration = Duration::from_secs(10);

fn guarded() -> ViewGuards {
    ViewGuards {
        empty: EmptyAnswer::Confirm,
        min_backends: 1,
        max_removed: 50,
        confirm_after: CONFIRM,
        ..open_guards()
    }
}

impl Bench {
    /// Returns the bench after an upgrade: a new process with the state of this one.
    pub(super) fn upgraded(&self, pool: PoolConfig) -> Bench {
        let saved = self.controller.save(self.now);
        let text = serde_json::to_string(&saved).unwrap();
        let saved: Saved = serde_json::from_str(&text).unwrap();
        let mut next = self.started(pool);
        let effects = next.controller.adopt(&saved, next.now);
        assert!(next.controller.serves_as(&saved));
        next.note(effects);
        next
    }

    /// Returns a bench that starts now.
    fn started(&self, pool: PoolConfig) -> Bench {
        let controller = Controller::new(2, 1);
        let mut bench = Bench { controller, began: self.now, now: self.now, asked: vec![] };
        bench.configure(pool);
        bench
    }

    /// Returns a bench after a restart with the saved views of this one.
    pub(super) fn restarted(&mut self, pool: PoolConfig) -> Bench {
        let saved = self.controller.save_views(self.now);
        let text = serde_json::to_string(&saved).unwrap();
        let saved: SavedViews = serde_json::from_str(&text).unwrap();
        let mut next = self.started(pool);
        let effects = next.controller.adopt_views(&saved, next.now);
        next.note(effects);
        next
    }
}

#[test]
fn members_stay_in_rotation_over_an_upgrade_until_their_source_answers() {
    let pool = || naming(discovering(unprobed(&["a"])));
    let mut bench = Bench::new(pool());
    bench.list(&["b", "c"]);
    bench.resolve(&[4001]);
    bench.answer_for(PACE * 2, &["c"]);
    assert_eq!(bench.serving(), ["a", "b", "db@127.0.0.1:4001"]);
    let mut next = bench.upgraded(pool());
    assert_eq!(next.serving(), ["a", "b", "db@127.0.0.1:4001"]);
    assert!(next.status("c").unverified, "the verification continues");
    let (why, detail) = (SourceFailure::Timeout, "no answer".to_owned());
    next.told(None, Told::Failed { why, detail });
    next.answer_for(Duration::from_secs(60), &["c"]);
    assert_eq!(next.serving(), ["a", "b", "db@127.0.0.1:4001"], "no member leaves");
    next.list(&["b", "c"]);
    next.answer_for(Duration::from_secs(6), &[]);
    assert_eq!(next.serving(), ["a", "b", "c", "db@127.0.0.1:4001"]);
}

#[test]
fn held_answer_stays_held_over_an_upgrade_and_is_confirmed_in_time() {
    let pool = || discovering_with(unprobed(&[]), guarded());
    let mut bench = Bench::new(pool());
    bench.list(&["b", "c", "d"]);
    bench.answer_for(Duration::from_secs(1), &[]);
    bench.list(&["b"]);
    bench.answer_for(Duration::from_secs(4), &[]);
    assert_eq!(bench.serving().len(), 3);
    let mut next = bench.upgraded(pool());
    assert_eq!(next.serving().len(), 3);
    assert!(next.sources()[0].view.restored);
    next.list(&["b"]);
    next.answer_for(Duration::from_secs(1), &[]);
    assert_eq!(next.serving().len(), 3, "5 of 10 seconds");
    next.answer_for(Duration::from_secs(6), &[]);
    next.list(&["b"]);
    next.answer_for(Duration::from_secs(1), &[]);
    assert_eq!(next.serving(), ["b"]);
}

#[test]
fn drain_of_a_name_survives_upgrade_and_reports_of_intents() {
    let pool = || naming(unprobed(&["a"]));
    let mut bench = Bench::new(pool());
    bench.resolve(&[4001]);
    bench.operator("db", Intent::Draining);
    let mut next = bench.upgraded(pool());
    next.resolve(&[4001, 4002]);
    assert_eq!(next.status("db@127.0.0.1:4001").intent, Intent::Draining);
    assert_eq!(next.status("db@127.0.0.1:4002").intent, Intent::Draining, "it joins later");
    let mut crashed = bench.started(pool());
    let intents = bench.controller.save_intents(bench.now);
    let effects = crashed.controller.adopt_intents(&intents, crashed.now);
    crashed.note(effects);
    crashed.resolve(&[4003]);
    assert_eq!(crashed.status("db@127.0.0.1:4003").intent, Intent::Draining);
    let ready = bench.started(pool()).controller.save_intents(bench.now);
    let effects = crashed.controller.adopt_intents(&ready, crashed.now);
    crashed.note(effects);
    assert_eq!(crashed.status("db@127.0.0.1:4003").intent, Intent::Ready);
}

#[test]
fn start_without_the_registry_serves_from_the_saved_view() {
    let pool = || discovering_with(unprobed(&[]), guarded());
    let mut bench = Bench::new(pool());
    assert!(!bench.controller.views_changed());
    bench.list(&["b", "c"]);
    bench.answer_for(PACE * 2, &[]);
    assert!(bench.controller.views_changed());
    let mut next = bench.restarted(pool());
    assert!(!bench.controller.views_changed());
    assert_eq!(next.serving(), ["b", "c"], "at once");
    assert_eq!(next.controller.undecided_pools(), 0);
    next.answer_for(Duration::from_secs(60), &["b"]);
    assert_eq!(next.serving(), ["c"], "the connects decide");
    let mut next = bench.restarted(discovering_with(unprobed(&["a"]), guarded()));
    assert_eq!(next.serving(), ["a"], "another backend serves: verify first");
    next.answer_for(PACE * 2, &[]);
    assert_eq!(next.serving(), ["a", "b", "c"]);
}

#[test]
fn restored_members_of_a_pool_with_probes_wait_for_their_first_result() {
    let mut bench = Bench::new(discovering(pool(&[])));
    bench.list(&["b", "c"]);
    bench.answer_for(Duration::from_secs(1), &[]);
    let mut next = bench.restarted(discovering(pool(&[])));
    assert_eq!(next.controller.undecided_pools(), 1);
    next.answer_for(Duration::from_secs(1), &["b"]);
    assert_eq!(next.serving(), ["c"]);
    assert_eq!(next.controller.undecided_pools(), 0);
}

#[test]
fn saved_view_is_ignored_after_an_answer_and_for_unknown_sources() {
    let mut bench = Bench::new(discovering(unprobed(&[])));
    bench.list(&["b", "c"]);
    let saved = bench.controller.save_views(bench.now);
    let mut next = bench.started(discovering(unprobed(&[])));
    next.list(&["x"]);
    let effects = next.controller.adopt_views(&saved, next.now);
    next.note(effects);
    assert_eq!(next.names_in_status(), ["x"]);
    let mut next = bench.started(unprobed(&["a"]));
    let effects = next.controller.adopt_views(&saved, next.now);
    next.note(effects);
    assert_eq!(next.names_in_status(), ["a"]);
}

#[test]
fn saved_view_of_another_question_serves_until_the_first_answer() {
    let mut bench = Bench::new(discovering_with(unprobed(&[]), guarded()));
    bench.list(&["b", "c", "d"]);
    let mut other = discovering_with(unprobed(&[]), guarded());
    let spec = Arc::make_mut(other.discover.as_mut().unwrap());
    spec.question = SourceQuestion::File { path: "/others.json".into() };
    let mut next = bench.restarted(other);
    assert_eq!(next.serving(), ["b", "c", "d"]);
    next.list(&["x"]);
    next.answer_for(Duration::from_secs(1), &[]);
    assert_eq!(next.serving(), ["x"]);
}

#[test]
fn message_of_a_process_without_views_is_read() {
    let bench = Bench::new(discovering(unprobed(&["a"])));
    let mut next = bench.started(discovering(unprobed(&["a"])));
    let saved: Saved =
        serde_json::from_str("{\"generation\":3,\"pools\":[{\"name\":\"web\"}]}").unwrap();
    let effects = next.controller.adopt(&saved, next.now);
    next.note(effects);
    assert_eq!(next.serving(), ["a"]);
}

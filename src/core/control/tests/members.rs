//! Member sources: origins of backends, joining and leaving.

use super::*;
use crate::model;
use tidegate_heartbeat::SenderState;

const SOURCE: MemberSource = MemberSource::Numbered(0);
const OTHER: MemberSource = MemberSource::Numbered(1);

impl Bench {
    /// Applies a member set; each member is `name` or `name@port`.
    fn members(
        &mut self,
        source: MemberSource,
        revision: u64,
        names: &[&str],
    ) -> Vec<ControlEffect> {
        let set = names.iter().map(|text| backend(text)).collect();
        self.apply(ControlEvent::Members { source, pool: "web".into(), revision, set })
    }

    fn hear_from(&mut self, name: &str, sequence: u64, state: SenderState) -> Vec<ControlEffect> {
        let BackendConfig { name, address: BackendAddr::Tcp(address), .. } = backend(name) else {
            unreachable!("backends of the bench have addresses")
        };
        let heartbeat = Heartbeat {
            pool: "web".into(),
            name,
            address,
            incarnation: 1,
            sequence,
            interval: Duration::from_millis(100),
            state,
            weight: 10,
            in_flight: 0,
            load: 0,
            key_id: 1,
        };
        self.apply(ControlEvent::Heartbeat { heartbeat, at: self.now, stands_for: 1 })
    }

    fn origins(&self, name: &str) -> Origins {
        self.status(name).origins
    }

    fn ignored_members(&self) -> Vec<(&'static str, u64)> {
        let ignored = self.controller.ignored_members().into_iter();
        ignored.filter(|(_, count)| *count > 0).map(|(why, count)| (why.name(), count)).collect()
    }
}

/// Origins of several sources.
fn all(sources: &[MemberSource]) -> Origins {
    sources.iter().fold(Origins::default(), |origins, source| origins.with(*source))
}

fn heartbeat_spec() -> model::HeartbeatSpec {
    model::HeartbeatSpec {
        register: true,
        require: false,
        interval: Duration::from_millis(100),
        ttl: Duration::from_secs(10),
        forget_after: Duration::from_secs(60),
        backends_max: 10,
        weight_max: 100,
    }
}

fn open_pool(backends: &[&str]) -> PoolConfig {
    PoolConfig { heartbeat: Some(Arc::new(heartbeat_spec())), ..unprobed(backends) }
}

#[test]
fn next_member_set_replaces_the_previous_one() {
    let mut bench = Bench::new(unprobed(&["a"]));
    let joined = bench.members(SOURCE, 1, &["b", "c"]);
    assert_eq!(
        logs(&joined),
        [
            "b: new -> unknown: added by a member source",
            "c: new -> unknown: added by a member source"
        ]
    );
    assert_eq!(bench.serving(), ["a", "b", "c"]);
    bench.members(SOURCE, 2, &["c", "d"]);
    bench.pass(publish::pacer::PACE);
    assert_eq!(bench.serving(), ["a", "c", "d"]);
    bench.members(SOURCE, 3, &[]);
    bench.pass(publish::pacer::PACE);
    assert_eq!(bench.serving(), ["a"]);
    assert!(bench.ignored_members().is_empty());
}

#[test]
fn backend_leaves_with_its_last_origin() {
    let mut bench = Bench::new(unprobed(&["a", "b"]));
    bench.members(SOURCE, 1, &["b"]);
    bench.members(OTHER, 1, &["b"]);
    assert_eq!(bench.origins("b"), all(&[MemberSource::File, SOURCE, OTHER]));
    bench.configure(unprobed(&["a"]));
    assert_eq!(bench.origins("b"), all(&[SOURCE, OTHER]));
    assert_eq!(bench.serving(), ["a", "b"]);
    bench.members(SOURCE, 2, &[]);
    assert_eq!(bench.origins("b"), all(&[OTHER]));
    bench.members(OTHER, 2, &[]);
    bench.pass(publish::pacer::PACE);
    assert_eq!(bench.serving(), ["a"]);
}

#[test]
fn file_takes_precedence_for_names_and_addresses() {
    let mut bench = Bench::new(unprobed(&["a"]));
    bench.members(SOURCE, 1, &["a@4711", "x@1097", "b"]);
    assert_eq!(bench.serving(), ["a", "b"]);
    assert_eq!(bench.ignored_members(), [("conflict", 2)]);
    bench.configure(unprobed(&["a", "b@4712"]));
    assert_eq!(bench.status("b").state.address_text.as_ref(), "127.0.0.1:4712");
    assert_eq!(bench.origins("b"), all(&[MemberSource::File]));
    bench.configure(unprobed(&["a"]));
    assert_eq!(bench.origins("b"), all(&[SOURCE]), "its set still applies");
    assert_eq!(bench.status("b").state.address_text.as_ref(), "127.0.0.1:1098");
}

#[test]
fn outdated_and_invalid_member_sets_are_ignored_and_counted() {
    let mut bench = Bench::new(PoolConfig { hash_slots: 3, ..unprobed(&["a"]) });
    bench.members(SOURCE, 5, &["b"]);
    let serving = bench.serving();
    assert!(bench.members(SOURCE, 4, &["c"]).is_empty());
    assert!(bench.members(OTHER, 1, &["c", "d"]).is_empty());
    assert!(bench.members(MemberSource::File, 9, &["c"]).is_empty());
    assert!(bench.members(MemberSource::Numbered(MemberSource::NUMBERED_MAX), 1, &[]).is_empty());
    let unknown = ControlEvent::Members {
        source: SOURCE,
        pool: "nope".into(),
        revision: 6,
        set: vec![backend("c")],
    };
    assert!(bench.apply(unknown).is_empty());
    assert_eq!(bench.serving(), serving);
    assert_eq!(
        bench.ignored_members(),
        [("unknown-pool", 1), ("unknown-source", 2), ("older-revision", 1), ("too-many", 1)]
    );
    assert!(bench.members(SOURCE, 5, &["b"]).is_empty(), "the same set again");
}

#[test]
fn member_of_a_source_waits_for_probes_and_heartbeats() {
    let mut bench = Bench::up(pool(&["a"]));
    bench.members(SOURCE, 1, &["b"]);
    assert_eq!(bench.serving(), ["a"]);
    let spec = model::HeartbeatSpec { register: false, require: true, ..heartbeat_spec() };
    let mut bench = Bench::new(PoolConfig { heartbeat: Some(Arc::new(spec)), ..unprobed(&["a"]) });
    bench.members(SOURCE, 1, &["b"]);
    bench.pass(publish::pacer::PACE);
    assert!(!bench.serving().contains(&"b".to_owned()), "heartbeats are required");
}

#[test]
fn backend_removed_from_the_file_registers_with_its_next_heartbeat() {
    let mut bench = Bench::new(open_pool(&["a", "b"]));
    bench.hear_from("b", 1, SenderState::Ready);
    assert_eq!(bench.origins("b"), all(&[MemberSource::File]));
    let id = bench.id("b");
    bench.configure(open_pool(&["a"]));
    assert_eq!(bench.controller.status(bench.now).pools[0].backends.len(), 1);
    bench.hear_from("b", 2, SenderState::Ready);
    assert_eq!(bench.origins("b"), all(&[MemberSource::Heartbeats]));
    assert_eq!(bench.id("b"), id, "the id is kept");
}

#[test]
fn stopping_registered_backend_stays_while_a_source_lists_it() {
    let mut bench = Bench::new(open_pool(&["a"]));
    bench.hear_from("b", 1, SenderState::Ready);
    bench.members(SOURCE, 1, &["b"]);
    assert_eq!(bench.origins("b"), all(&[MemberSource::Heartbeats, SOURCE]));
    bench.hear_from("b", 2, SenderState::Stopping);
    bench.pass(Duration::from_secs(80));
    assert_eq!(bench.origins("b"), all(&[SOURCE]), "heartbeats are no longer an origin");
    assert_eq!(bench.serving(), ["a", "b"]);
    bench.members(SOURCE, 2, &[]);
    bench.pass(publish::pacer::PACE);
    assert_eq!(bench.serving(), ["a"]);
}

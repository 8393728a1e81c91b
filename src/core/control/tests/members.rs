//! Member sources: origins of backends, joining and leaving.

use super::*;
use crate::model;
use tidegate_heartbeat::SenderState;

impl Bench {
    /// Lets the `discover` table of the pool list these members, each `name` or `name@port`.
    pub(super) fn list(&mut self, names: &[&str]) -> Vec<ControlEffect> {
        self.told(None, whole(names))
    }

    /// Lets the name `db` have these ports of 127.0.0.1.
    pub(super) fn resolve(&mut self, ports: &[u16]) -> Vec<ControlEffect> {
        let names: Vec<String> = ports.iter().map(|port| format!("{port}@{port}")).collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        self.told(Some("db"), whole(&names))
    }

    pub(super) fn hear_from(
        &mut self,
        name: &str,
        sequence: u64,
        state: SenderState,
    ) -> Vec<ControlEffect> {
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
    PoolConfig { heartbeat: Some(Arc::new(heartbeat_spec())), ..discovering(unprobed(backends)) }
}

#[test]
fn next_set_of_a_source_replaces_the_previous_one() {
    let mut bench = Bench::new(discovering(unprobed(&["a"])));
    let joined = bench.list(&["b", "c"]);
    assert_eq!(
        logs(&joined),
        [
            "-: members of a source have changed",
            "b: new -> unknown: added by a member source: file",
            "c: new -> unknown: added by a member source: file"
        ]
    );
    bench.answer_all_for(publish::pacer::PACE, None);
    assert_eq!(bench.serving(), ["a", "b", "c"]);
    let moved = bench.list(&["c", "d"]);
    assert!(
        logs(&moved)[0].starts_with("b: unknown -> removed: removed by its member source: file"),
        "{:?}",
        logs(&moved)
    );
    bench.answer_all_for(publish::pacer::PACE * 2, None);
    assert_eq!(bench.serving(), ["a", "c", "d"]);
    assert!(bench.ignored_members().is_empty());
}

#[test]
fn backend_leaves_with_its_last_origin() {
    let mut bench = Bench::new(discovering(unprobed(&["a", "b"])));
    bench.list(&["b", "z"]);
    assert_eq!(bench.origins("b"), all(&[MemberSource::File, MemberSource::Discovery]));
    bench.configure(discovering(unprobed(&["a"])));
    assert_eq!(bench.origins("b"), all(&[MemberSource::Discovery]));
    assert_eq!(bench.serving(), ["a", "b"], "it was in rotation, so it needs no connect");
    bench.list(&["z"]);
    bench.answer_all_for(publish::pacer::PACE * 2, None);
    assert_eq!(bench.serving(), ["a", "z"]);
}

#[test]
fn file_takes_precedence_for_names_and_addresses() {
    let mut bench = Bench::new(discovering(unprobed(&["a"])));
    bench.list(&["a@4711", "x@1097", "b"]);
    bench.answer_all_for(publish::pacer::PACE * 2, None);
    assert_eq!(bench.serving(), ["a", "b"]);
    assert_eq!(bench.ignored_members(), [("conflict", 2)]);
    bench.list(&["a@4711", "x@1097", "b", "c"]);
    assert_eq!(bench.ignored_members(), [("conflict", 2)], "each counts once");
    bench.configure(discovering(unprobed(&["a", "b@4712"])));
    assert_eq!(bench.status("b").state.address_text.as_ref(), "127.0.0.1:4712");
    assert_eq!(bench.origins("b"), all(&[MemberSource::File]));
    bench.configure(discovering(unprobed(&["a"])));
    assert_eq!(bench.origins("b"), all(&[MemberSource::Discovery]), "its set still applies");
    assert_eq!(bench.status("b").state.address_text.as_ref(), "127.0.0.1:1098");
}

#[test]
fn names_take_precedence_over_the_registry() {
    let mut bench = Bench::new(naming(discovering(unprobed(&["a"]))));
    bench.list(&["x@4711", "db", "b"]);
    bench.resolve(&[4711]);
    let member = bench.status("db@127.0.0.1:4711");
    assert_eq!(member.origins, all(&[MemberSource::Names]));
    assert_eq!((member.weight, member.connections_max), (7, 5));
    assert_eq!(bench.ignored_members(), [("conflict", 2)], "the address, and the name db");
}

#[test]
fn what_an_unknown_source_tells_is_ignored_and_counted() {
    let mut bench = Bench::new(discovering(unprobed(&["a"])));
    assert!(bench.told(Some("nobody"), whole(&["b"])).is_empty());
    let key = model::SourceKey { pool: "nope".into(), backend: None };
    let unknown = ControlEvent::Told { key, told: whole(&["c"]), at: bench.now };
    assert!(bench.apply(unknown).is_empty());
    assert_eq!(bench.ignored_members(), [("unknown-pool", 1), ("unknown-source", 1)]);
    assert_eq!(bench.serving(), ["a"]);
}

#[test]
fn more_members_than_hash_slots_and_own_addresses_are_ignored() {
    let mut bench = Bench::new(PoolConfig { hash_slots: 3, ..discovering(unprobed(&["a"])) });
    bench.list(&["b", "c", "d", "own@80"]);
    let ignored = bench.ignored_members();
    assert_eq!(ignored, [("too-many", 1), ("conflict", 1)]);
    let status = bench.controller.status(bench.now);
    assert_eq!(status.pools[0].backends.len(), 3);
}

#[test]
fn member_of_a_source_waits_for_probes_and_heartbeats() {
    let mut bench = Bench::up(discovering(pool(&["a"])));
    bench.list(&["b"]);
    assert_eq!(bench.serving(), ["a"]);
    let spec = model::HeartbeatSpec { register: false, require: true, ..heartbeat_spec() };
    let heartbeat = Some(Arc::new(spec));
    let mut bench = Bench::new(PoolConfig { heartbeat, ..discovering(unprobed(&["a"])) });
    bench.list(&["b"]);
    bench.answer_all_for(publish::pacer::PACE, None);
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
    bench.list(&["b", "z"]);
    assert_eq!(bench.origins("b"), all(&[MemberSource::Heartbeats, MemberSource::Discovery]));
    bench.answer_asked(None);
    bench.hear_from("b", 2, SenderState::Stopping);
    bench.answer_all_for(Duration::from_secs(80), None);
    let origins = bench.origins("b");
    assert_eq!(origins, all(&[MemberSource::Discovery]), "heartbeats are no longer an origin");
    assert_eq!(bench.serving(), ["a", "b", "z"]);
    bench.list(&["z"]);
    bench.pass(publish::pacer::PACE * 2);
    assert_eq!(bench.serving(), ["a", "z"]);
}

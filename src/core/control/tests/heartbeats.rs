//! Heartbeats: registration, silence and weights.

use super::*;
use crate::model;
use crate::suspicion::TRY_TIMEOUT_MAX;
use tidegate_heartbeat::SenderState;

mod lateness;

const INTERVAL: Duration = Duration::from_millis(100);
const TTL: Duration = Duration::from_secs(10);
const FORGET: Duration = Duration::from_secs(60);

fn spec() -> model::HeartbeatSpec {
    model::HeartbeatSpec {
        register: true,
        require: false,
        interval: INTERVAL,
        ttl: TTL,
        forget_after: FORGET,
        backends_max: 1000,
        weight_max: 100,
    }
}

/// Returns a pool with heartbeats and registration, without probes.
fn open_pool(backends: &[&str]) -> PoolConfig {
    PoolConfig { heartbeat: Some(Arc::new(spec())), ..unprobed(backends) }
}

fn heartbeat(name: &str, sequence: u64) -> Heartbeat {
    let BackendConfig { name, address: BackendAddr::Tcp(address), .. } = backend(name) else {
        unreachable!("backends of the bench have addresses")
    };
    Heartbeat {
        pool: "web".into(),
        name,
        address,
        incarnation: 1,
        sequence,
        interval: INTERVAL,
        state: SenderState::Ready,
        weight: 10,
        in_flight: 0,
        load: 0,
        key_id: 1,
    }
}

impl Bench {
    fn hear(&mut self, heartbeat: Heartbeat) -> Vec<ControlEffect> {
        self.apply(ControlEvent::Heartbeat { heartbeat, at: self.now, stands_for: 1 })
    }

    /// Delivers heartbeats of all `names` for `span`. Every probe succeeds at once, except
    /// those of backends in `failed`.
    fn beat(&mut self, names: &[&str], failed: &[&str], span: Duration) -> Vec<ControlEffect> {
        let end = self.now + span;
        let mut effects = Vec::new();
        while self.now < end {
            for name in names {
                let sequence = (self.now - self.began).as_millis() as u64 / 100 + 1;
                effects.extend(self.hear(heartbeat(name, sequence)));
            }
            let next = (self.now + INTERVAL).min(end);
            effects.extend(self.serve_until(next, failed));
        }
        effects
    }

    fn serve_until(&mut self, end: Instant, failed: &[&str]) -> Vec<ControlEffect> {
        let mut effects = self.answer_but(failed);
        while let Some(due) = self.controller.next_due().filter(|due| *due <= end) {
            self.now = due;
            effects.extend(self.apply(ControlEvent::Tick));
            effects.extend(self.answer_but(failed));
        }
        self.now = end;
        effects
    }

    /// Reports results of all requested probes; those of backends in `failed` time out.
    fn answer_but(&mut self, failed: &[&str]) -> Vec<ControlEffect> {
        let asked = std::mem::take(&mut self.asked);
        let mut effects = Vec::new();
        for (id, token) in asked {
            let name = self.name_of(id);
            let failed = failed.contains(&name.as_str()).then_some("connect timed out");
            effects.extend(self.answer(id, token, failed));
        }
        effects
    }

    fn name_of(&self, id: BackendId) -> String {
        let entry = self.controller.state.backends.get(id);
        entry.map_or_else(String::new, |entry| entry.state.name.to_string())
    }

    fn names(&self) -> Vec<String> {
        let status = self.controller.status(self.now);
        status.pools[0].backends.iter().map(|b| b.state.name.to_string()).collect()
    }

    fn ignored(&self, wanted: HeartbeatIgnored) -> u64 {
        self.controller.heartbeats.ignored()[wanted as usize].1
    }
}

#[test]
fn registered_backend_is_eligible_after_a_confirmed_connect() {
    let mut bench = Bench::new(open_pool(&[]));
    let effects = bench.hear(heartbeat("a", 1));
    assert_eq!(probes(&effects), 1, "probed at once");
    assert_eq!(bench.names(), ["a"]);
    assert!(bench.serving().is_empty(), "not yet");
    let effects = bench.answer_but(&[]);
    bench.pass(publish::pacer::PACE);
    assert_eq!(bench.serving(), ["a"], "{:?}", logs(&effects));
    let status = bench.status("a");
    assert_eq!(
        (status.origins, status.observation),
        (Origins::of(MemberSource::Heartbeats), Observation::Up)
    );
    assert_eq!((status.weight, status.effective_weight), (10, 10.0));
}

#[test]
fn registered_backend_that_refuses_connects_is_never_eligible() {
    let mut bench = Bench::new(open_pool(&["z"]));
    let effects = bench.beat(&["a"], &["a"], Duration::from_secs(5));
    assert!(probes(&effects) > 3, "the probe is repeated");
    assert_eq!((bench.serving(), bench.status("a").eligible), (vec!["z".into()], false));
}

#[test]
fn registered_backend_of_a_probed_pool_also_needs_a_probe_result() {
    let mut bench = Bench::up(PoolConfig { heartbeat: Some(Arc::new(spec())), ..pool(&["z"]) });
    bench.beat(&["a"], &[], Duration::from_secs(1));
    assert_eq!(bench.serving(), ["z", "a"]);
    bench.beat(&["a"], &["a"], Duration::from_secs(10));
    assert_eq!(bench.status("a").heartbeat_health, crate::health::HeartbeatHealth::OnTime);
    assert_eq!(bench.serving(), ["z"], "the host works, the service does not");
}

#[test]
fn empty_pool_waits_for_the_first_result_of_a_new_member() {
    let mut bench = Bench::new(PoolConfig { heartbeat: Some(Arc::new(spec())), ..pool(&[]) });
    bench.pass(GRACE * 10);
    bench.hear(heartbeat("a", 1));
    assert!(!bench.status("a").eligible);
    bench.beat(&["a"], &[], Duration::from_secs(1));
    assert_eq!(bench.serving(), ["a"]);
}

#[test]
fn stopping_sender_is_removed_at_once_and_its_sessions_finish() {
    let mut bench = Bench::new(open_pool(&["z"]));
    bench.beat(&["a"], &[], Duration::from_secs(1));
    let state = bench.status("a").state;
    assert!(state.in_flight.try_enter(0));
    let effects = bench.hear(Heartbeat { state: SenderState::Stopping, ..heartbeat("a", 99) });
    assert_eq!((bench.serving(), bench.names()), (vec!["z".into()], vec!["z".into()]));
    let said = logs(&effects).join("\n");
    assert!(said.contains("the sender reported stopping; open sessions: 1 (finish"), "{said}");
    assert_eq!(bench.controller.status(bench.now).leaving.len(), 1);
    bench.hear(Heartbeat { state: SenderState::Stopping, ..heartbeat("a", 100) });
    assert_eq!(bench.names(), ["z"], "a repeated stopping registers no backend");
}

#[test]
fn draining_sender_keeps_its_sessions_and_gets_no_new_sessions() {
    let mut bench = Bench::new(open_pool(&["z"]));
    bench.beat(&["a"], &[], Duration::from_secs(1));
    bench.hear(Heartbeat { state: SenderState::Draining, ..heartbeat("a", 50) });
    assert_eq!(bench.serving(), ["z"]);
    assert_eq!(bench.names(), ["z", "a"]);
    bench.hear(heartbeat("a", 51));
    bench.pass(publish::pacer::PACE);
    assert_eq!(bench.serving(), ["z", "a"]);
}

#[test]
fn silence_is_confirmed_before_a_removal() {
    let mut bench = Bench::new(open_pool(&["z"]));
    bench.beat(&["a", "b", "c"], &[], Duration::from_secs(30));
    let effects = bench.beat(&["b", "c"], &["a"], Duration::from_millis(1500));
    let said = logs(&effects).join("\n");
    assert!(said.contains("a: up -> suspect: no heartbeat for"), "{said}");
    assert!(said.contains("a: suspect -> down:"), "{said}");
    assert_eq!(bench.serving(), ["z", "b", "c"]);
}

#[test]
fn silent_but_answering_backend_keeps_a_tenth_of_its_weight_until_ttl() {
    let mut bench = Bench::new(open_pool(&["z"]));
    bench.beat(&["a", "b", "c"], &[], Duration::from_secs(30));
    bench.beat(&["b", "c"], &[], Duration::from_secs(2));
    let status = bench.status("a");
    assert_eq!((status.observation, status.effective_weight), (Observation::Suspect, 1.0));
    let effects = bench.beat(&["b", "c"], &[], TTL);
    assert!(logs(&effects).join("\n").contains("no heartbeat for 10s (ttl)"));
    assert_eq!(bench.status("a").observation, Observation::Down);
    bench.beat(&["b", "c"], &[], FORGET);
    assert_eq!(bench.names(), ["z", "b", "c"]);
}

#[test]
fn configured_backend_stays_after_its_heartbeats_expire_unless_required() {
    for require in [false, true] {
        let heartbeat = Some(Arc::new(model::HeartbeatSpec { require, ..spec() }));
        let mut bench = Bench::new(PoolConfig { heartbeat, ..unprobed(&["z"]) });
        assert_eq!(bench.status("z").eligible, !require);
        bench.beat(&["z", "a"], &[], Duration::from_secs(5));
        assert_eq!(bench.serving(), ["z", "a"]);
        bench.beat(&["a"], &[], TTL + Duration::from_secs(1));
        assert_eq!(bench.status("z").eligible, !require);
        bench.beat(&["a"], &[], FORGET * 2);
        assert_eq!(bench.names(), ["z", "a"], "configured backends are never dropped");
    }
}

#[test]
fn backends_that_answer_probes_stay_while_no_heartbeats_arrive() {
    let mut bench = Bench::new(open_pool(&[]));
    bench.beat(&["a", "b", "c"], &[], Duration::from_secs(30));
    bench.serve_until(bench.now + TTL * 3, &[]);
    assert_eq!(bench.serving(), ["a", "b", "c"]);
    assert!(bench.controller.status(bench.now).heartbeat.unwrap().silent);
}

#[test]
fn silence_removes_at_most_max_ejected() {
    let names = ["a", "b", "c", "d", "e", "f"];
    let mut bench = Bench::new(open_pool(&[]));
    bench.beat(&names, &[], Duration::from_secs(30));
    for failed in 1..=4 {
        bench.beat(&names[failed..], &names[..failed], Duration::from_secs(4));
    }
    let down = |name: &&&str| bench.status(name).observation == Observation::Down;
    assert_eq!(names.iter().filter(down).count(), 3, "50 % of 6");
}

#[test]
fn late_control_thread_makes_no_backend_suspect() {
    let mut bench = Bench::new(open_pool(&[]));
    bench.beat(&["a", "b"], &[], Duration::from_secs(30));
    bench.now += Duration::from_secs(5);
    let effects = bench.apply(ControlEvent::Tick);
    assert_eq!(bench.serving(), ["a", "b"]);
    let log = logs(&effects).join("\n");
    assert!(log.contains("silence ignored; the lost time does not count: the control"), "{log}");
    assert_eq!(bench.status("a").observation, Observation::Up);
}

#[test]
fn heartbeat_with_a_configured_name_or_address_is_rejected() {
    let mut bench = Bench::new(open_pool(&["z"]));
    bench.hear(heartbeat("z@77", 1));
    let port = |name: &str| backend(name).address;
    let BackendAddr::Tcp(address) = port("z") else { unreachable!() };
    bench.hear(Heartbeat { address, ..heartbeat("a", 1) });
    assert_eq!(bench.names(), ["z"]);
    assert_eq!(
        (
            bench.ignored(HeartbeatIgnored::ConfiguredName),
            bench.ignored(HeartbeatIgnored::ConfiguredAddress)
        ),
        (1, 1)
    );
    bench.hear(Heartbeat { address: ([127, 0, 0, 1], 80).into(), ..heartbeat("a", 1) });
    assert_eq!(bench.ignored(HeartbeatIgnored::OwnAddress), 1, "sessions would loop");
}

#[test]
fn later_of_two_senders_with_one_name_takes_precedence() {
    let mut bench = Bench::new(open_pool(&["z"]));
    bench.beat(&["a"], &[], Duration::from_secs(1));
    let old = bench.id("a");
    bench.hear(Heartbeat { incarnation: 2, ..heartbeat("a@77", 1) });
    assert_ne!(bench.id("a"), old);
    bench.hear(heartbeat("a", 100));
    assert_eq!(bench.ignored(HeartbeatIgnored::OlderSender), 1);
    assert_eq!(bench.names(), ["z", "a"]);
}

#[test]
fn registrations_are_capped_and_one_notice_is_logged() {
    let heartbeat_spec = model::HeartbeatSpec { backends_max: 2, ..spec() };
    let heartbeat_spec = Some(Arc::new(heartbeat_spec));
    let mut bench = Bench::new(PoolConfig { heartbeat: heartbeat_spec, ..unprobed(&[]) });
    let effects: Vec<ControlEffect> =
        ["a", "b", "c", "d"].iter().flat_map(|name| bench.hear(heartbeat(name, 1))).collect();
    assert_eq!((bench.names().len(), bench.ignored(HeartbeatIgnored::PoolFull)), (2, 2));
    let full = logs(&effects).iter().filter(|line| line.contains("pool is full")).count();
    assert_eq!(full, 1);
}

#[test]
fn requested_weight_is_capped_and_load_reduces_it() {
    let mut bench = Bench::new(open_pool(&["z"]));
    bench.beat(&["a"], &[], Duration::from_secs(1));
    bench.hear(Heartbeat { weight: 900, ..heartbeat("a", 50) });
    bench.hear(Heartbeat { weight: 900, ..heartbeat("z", 50) });
    assert_eq!((bench.status("a").weight, bench.status("z").weight), (100, 10));
    for sequence in 51..200 {
        bench.hear(Heartbeat { weight: 5, load: 1000, ..heartbeat("a", sequence) });
    }
    assert_eq!(bench.status("a").effective_weight, 1.25, "a quarter of 5");
}

#[test]
fn small_changes_of_weight_cause_no_table() {
    let mut bench = Bench::new(open_pool(&["z"]));
    let said = |weight, sequence| Heartbeat { weight, ..heartbeat("a", sequence) };
    bench.hear(said(50, 1));
    bench.answer_but(&[]);
    bench.pass(publish::pacer::PACE);
    let effects: Vec<ControlEffect> =
        (2..100).flat_map(|n| bench.hear(said(50 + (n % 5) as u16, n))).collect();
    assert_eq!((publishes(&effects), bench.status("a").weight), (0, 50));
    bench.pass(publish::pacer::PACE);
    assert_eq!(publishes(&bench.hear(said(55, 100))), 1);
}

#[test]
fn starting_sender_is_probed_when_it_reports_ready() {
    let mut bench = Bench::new(open_pool(&["z"]));
    let starting = |n| Heartbeat { state: SenderState::Starting, ..heartbeat("a", n) };
    let effects: Vec<ControlEffect> = (1..50).flat_map(|n| bench.hear(starting(n))).collect();
    assert_eq!((probes(&effects), bench.status("a").eligible), (0, false));
    bench.hear(heartbeat("a", 50));
    bench.answer_but(&[]);
    assert_eq!(bench.serving(), ["z", "a"]);
}

#[test]
fn reload_keeps_registered_backends_and_a_file_can_adopt_them() {
    let mut bench = Bench::new(open_pool(&["z"]));
    bench.beat(&["a", "b"], &[], Duration::from_secs(1));
    let (a, b) = (bench.id("a"), bench.id("b"));
    bench.configure(open_pool(&["z", "a"]));
    assert_eq!((bench.id("a"), bench.id("b")), (a, b));
    assert_eq!(bench.status("a").origins, Origins::of(MemberSource::File));
    assert_eq!(bench.serving(), ["z", "a", "b"]);
    bench.configure(unprobed(&["z", "a"]));
    assert_eq!(bench.names(), ["z", "a"], "registration is off");
    assert_eq!(bench.serving(), ["z", "a"]);
}

#[test]
fn requiring_heartbeats_removes_no_backend_before_it_could_send_one() {
    let mut bench = Bench::new(unprobed(&["z", "a"]));
    let required = Arc::new(model::HeartbeatSpec { require: true, ..spec() });
    bench.configure(PoolConfig { heartbeat: Some(required), ..unprobed(&["z", "a"]) });
    assert_eq!(bench.serving(), ["z", "a"]);
    bench.beat(&["z"], &[], TTL + Duration::from_secs(1));
    assert_eq!(bench.serving(), ["z"]);
}

#[test]
fn thousand_changes_per_second_cause_ten_tables_per_second() {
    let mut bench = Bench::new(open_pool(&["z"]));
    let sender = |n: u64, sequence, state| Heartbeat {
        name: format!("s{n}").into(),
        address: ([127, 1, (n / 250) as u8, (n % 250) as u8], 1000).into(),
        state,
        ..heartbeat("a", sequence)
    };
    let (mut tables, end) = (0, bench.now + Duration::from_secs(3));
    let mut n = 0;
    while bench.now < end {
        let mut effects = bench.hear(sender(n, 1, SenderState::Ready));
        effects.extend(bench.answer_but(&[]));
        if n >= 200 {
            effects.extend(bench.hear(sender(n - 200, 2, SenderState::Stopping)));
        }
        n += 1;
        effects.extend(bench.serve_until(bench.now + Duration::from_millis(1), &[]));
        tables += publishes(&effects);
    }
    assert_eq!(n, 3000);
    assert!((25..=31).contains(&tables), "{tables} tables in 3 s");
    assert!(bench.serving().len() > 100);
    bench.pass(publish::pacer::PACE);
    assert_eq!(bench.serving().len(), bench.names().len());
}

#[test]
fn failure_is_published_at_once_with_delayed_changes() {
    let mut bench = Bench::new(open_pool(&["z"]));
    bench.beat(&["a", "b", "c"], &[], Duration::from_secs(10));
    bench.hear(heartbeat("d", 1));
    bench.hear(heartbeat("e", 1));
    let effects = bench.refuse("a", 1, 1);
    assert_eq!(publishes(&effects), 1, "suspect, with a tenth of its weight");
    let (id, token) = *bench.asked.last().unwrap();
    let effects = bench.answer(id, token, Some(crate::health::REFUSED));
    assert_eq!((publishes(&effects), bench.status("a").observation), (1, Observation::Down));
}

#[test]
fn late_backend_starts_slowly_and_a_whole_pool_does_not() {
    let slow = Some(Duration::from_secs(10));
    let mut bench = Bench::new(PoolConfig { slow_start: slow, ..open_pool(&["z"]) });
    bench.beat(&["a"], &[], Duration::from_secs(1));
    assert_eq!(bench.status("a").ramp_percent, 100, "the whole pool has just come up");
    bench.beat(&["a"], &[], Duration::from_secs(10));
    bench.beat(&["a", "b"], &[], Duration::from_secs(1));
    let b = bench.status("b");
    assert!(b.ramp_percent <= 15 && b.effective_weight <= 1.5, "{b:?}");
    bench.beat(&["a", "b"], &[], Duration::from_secs(5));
    assert!((40..70).contains(&bench.status("b").ramp_percent));
    bench.beat(&["a", "b"], &[], Duration::from_secs(5));
    assert_eq!(bench.status("b").effective_weight, 10.0);
}

#[test]
fn slow_start_reduces_the_cap_and_bounds_the_share() {
    let slow = Some(Duration::from_secs(10));
    let mut pool = PoolConfig { slow_start: slow, ..unprobed(&["a", "b"]) };
    pool.backends[1].connections_max = 50;
    let mut bench = Bench::new(pool);
    bench.pass(Duration::from_secs(20));
    bench.operator("b", Intent::Draining);
    bench.operator("b", Intent::Ready);
    let explained = bench.controller.explain("web", "b", bench.now).unwrap();
    assert_eq!((explained.connections_max, explained.weight.ramp), (5, 10));
    assert_eq!(slow_starts(&bench), [false, true]);
    bench.pass(Duration::from_secs(11));
    let explained = bench.controller.explain("web", "b", bench.now).unwrap();
    assert_eq!((explained.connections_max, explained.weight.ramp), (50, 100));
    assert_eq!(slow_starts(&bench), [false, false]);
}

fn slow_starts(bench: &Bench) -> Vec<bool> {
    let table = bench.controller.current_table();
    table.pools[0].balancer.as_ref().unwrap().candidates().map(|one| one.slow_start).collect()
}

#[test]
fn explanation_holds_guards_heartbeats_and_history() {
    let mut bench = Bench::new(open_pool(&["z"]));
    bench.beat(&["a", "b", "c"], &[], Duration::from_secs(30));
    bench.beat(&["b", "c"], &["a"], Duration::from_secs(2));
    let explained = bench.controller.explain("web", "a", bench.now).unwrap();
    let history: Vec<(&str, &str)> = explained.history.iter().map(|t| (t.from, t.to)).collect();
    assert_eq!(
        history,
        [("suspect", "down"), ("up", "suspect"), ("unknown", "up"), ("new", "unknown")]
    );
    let reading = explained.backend.heartbeats.unwrap().reading;
    assert_eq!(reading.state, crate::suspicion::DetectorState::Down);
    assert!(reading.silence.unwrap() >= Duration::from_secs(2) - INTERVAL);
    assert_eq!(explained.weight.health, 0);
    assert_eq!(
        bench.controller.explain("web", "nobody", bench.now).unwrap_err(),
        OperatorError::UnknownBackend
    );
}

#[test]
fn confirmation_probes_do_not_displace_regular_probes() {
    let mut bench = Bench::up(PoolConfig { heartbeat: Some(Arc::new(spec())), ..pool(&["z"]) });
    bench.beat(&["a", "b", "c"], &[], Duration::from_secs(10));
    bench.beat(&["b", "c"], &[], Duration::from_secs(1));
    let effects = bench.beat(&["b", "c"], &[], Duration::from_secs(20));
    let id = bench.controller.state.find_backend("web", "a").unwrap();
    let regular = effects.iter().filter(|effect| {
        matches!(effect, ControlEffect::Probe { backend, spec, .. } if *backend == id && spec.interval > TRY_TIMEOUT_MAX)
    });
    assert!(regular.count() >= 5, "one every 2 s");
}

/// Returns the controller of a new process with the state of `old`.
fn upgraded(old: &Bench, pool: PoolConfig) -> Bench {
    let text = serde_json::to_string(&old.controller.save(old.now)).unwrap();
    let saved = serde_json::from_str(&text).unwrap();
    let mut next =
        Bench { controller: Controller::new(2, 2), began: old.began, now: old.now, asked: vec![] };
    next.configure(pool);
    // First with the offer, then with the final state.
    for _ in 0..2 {
        let effects = next.controller.adopt(&saved, next.now);
        next.note(effects);
    }
    next
}

/// Delivers heartbeats of these names at an interval of 5 s.
fn slowly(bench: &mut Bench, names: &[&str], times: std::ops::Range<u64>) {
    let interval = Duration::from_secs(5);
    for sequence in times {
        for name in names {
            bench.hear(Heartbeat { interval, ..heartbeat(name, sequence) });
        }
        let next = bench.now + interval;
        bench.serve_until(next, &[]);
    }
}

fn slow_pool() -> PoolConfig {
    let slow = model::HeartbeatSpec { interval: Duration::from_secs(5), ..spec() };
    PoolConfig { heartbeat: Some(Arc::new(slow)), ..unprobed(&["z"]) }
}

#[test]
fn registered_backends_are_eligible_after_an_upgrade_before_any_heartbeat() {
    let mut old = Bench::new(slow_pool());
    slowly(&mut old, &["a", "b", "c"], 1..20);
    old.hear(Heartbeat { state: SenderState::Draining, ..heartbeat("b", 30) });
    old.operator("c", Intent::Draining);
    assert_eq!(old.serving(), ["z", "a"]);
    let mut next = upgraded(&old, slow_pool());
    assert_eq!(next.names(), ["z", "a", "b", "c"]);
    assert_eq!(next.serving(), ["z", "a"]);
    assert_eq!(next.status("b").requested, crate::health::RequestedState::Draining);
    let reading = |bench: &Bench| bench.status("a").heartbeats.unwrap().reading;
    assert_eq!(reading(&next).beats_total, reading(&old).beats_total);
    assert_eq!(reading(&next).sequence, reading(&old).sequence);
    assert_eq!(next.status("a").last_transition.unwrap().to, "up");
    // Its heartbeats continue, and then the backend fails.
    slowly(&mut next, &["a", "b", "c"], 31..36);
    assert_eq!(reading(&next).lost_total, reading(&old).lost_total + 11);
    assert_eq!(next.serving(), ["z", "a", "b"]);
    next.serve_until(next.now + Duration::from_secs(200), &["a", "b", "c"]);
    assert_eq!(next.serving(), ["z"]);
}

#[test]
fn sender_stopping_during_an_upgrade_is_removed_in_the_new_process() {
    let mut old = Bench::new(slow_pool());
    slowly(&mut old, &["a", "b"], 1..5);
    let mut next = upgraded(&old, slow_pool());
    next.hear(Heartbeat { interval: Duration::from_secs(5), ..heartbeat("b", 9) });
    for name in ["a", "b"] {
        old.hear(Heartbeat { state: SenderState::Stopping, ..heartbeat(name, 8) });
    }
    let saved = old.controller.save(old.now);
    next.controller.adopt(&saved, next.now);
    assert_eq!(next.names(), ["z", "b"], "this process has received heartbeats of b");
}

#[test]
fn ten_thousand_slow_senders_survive_an_upgrade() {
    let many = || {
        let slow = model::HeartbeatSpec {
            interval: Duration::from_secs(5),
            backends_max: 20_000,
            ..spec()
        };
        PoolConfig { heartbeat: Some(Arc::new(slow)), ..unprobed(&[]) }
    };
    let mut old = Bench::new(many());
    for number in 0..10_000u32 {
        let address = (std::net::Ipv4Addr::from_bits(0x0a00_0001 + number), 80).into();
        let name = format!("n{number}").into();
        old.hear(Heartbeat {
            name,
            address,
            interval: Duration::from_secs(5),
            ..heartbeat("a", 1)
        });
    }
    old.answer_but(&[]);
    old.pass(publish::pacer::PACE);
    assert_eq!(old.serving().len(), 10_000);
    let next = upgraded(&old, many());
    assert_eq!(next.serving().len(), 10_000);
}

mod alone {
    use super::*;

    fn cost_with(pools: usize) -> Duration {
        let pool = |number: usize| PoolConfig {
            name: if number + 1 == pools { "web".into() } else { format!("p{number}").into() },
            ..open_pool(&["z"])
        };
        let mut bench = Bench::new(open_pool(&["z"]));
        bench.apply(ControlEvent::Configure(config((0..pools).map(pool).collect())));
        bench.hear(heartbeat("a", 1));
        bench.answer_but(&[]);
        let round = |bench: &mut Bench, round: u64| {
            let began = tidegate_net::clock::now();
            for sequence in 2 + round * 300..302 + round * 300 {
                bench.now += Duration::from_millis(1);
                bench.hear(heartbeat("a", sequence));
            }
            tidegate_net::clock::now() - began
        };
        (0..5).map(|at| round(&mut bench, at)).min().unwrap()
    }

    #[test]
    fn cost_of_a_heartbeat_does_not_depend_on_the_number_of_pools() {
        // A scan of all pools per heartbeat would take several times the slack.
        let (few, many, slack) = (cost_with(2), cost_with(5_000), Duration::from_millis(20));
        assert!(many < few * 4 + slack, "{few:?} with 2 pools, {many:?} with 5,000");
    }
}

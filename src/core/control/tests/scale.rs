//! Many backends: one step of the controller handles a bounded number of backends.

use super::*;
use crate::control::publish::detached_build::AT_ONCE_MAX;
use crate::control::source_ports::{PortLimits, PortLook, PortWatch, Reuse};
use crate::model;
use crate::table::build::PoolBuild;
use tidegate_heartbeat::SenderState;

const MANY: usize = 20_000;

fn large(pools: usize, each: usize) -> Arc<Config> {
    let ejection = EjectionSpec {
        failures: 5,
        time: Duration::from_secs(10),
        max_ejected_percent: 50,
        early_resets: true,
        slow_first_byte: Some(Duration::from_secs(1)),
    };
    let heartbeat = model::HeartbeatSpec {
        register: true,
        require: false,
        interval: Duration::from_millis(100),
        ttl: Duration::from_secs(10),
        forget_after: Duration::from_secs(60),
        backends_max: 1000,
        weight_max: 100,
    };
    let one = |n: usize| {
        let backends = (0..each).map(|k| {
            let [_, b, c, d] = u32::try_from(n * each + k).unwrap().to_be_bytes();
            BackendConfig {
                name: format!("b{k}").into(),
                address: BackendAddr::Tcp(([10, b, c, d], 80).into()),
                ..backend("x")
            }
        });
        PoolConfig {
            name: format!("pool{n}").into(),
            ejection: Some(ejection),
            heartbeat: Some(Arc::new(heartbeat.clone())),
            backends: backends.collect(),
            ..unprobed(&[])
        }
    };
    let mut config = Arc::unwrap_or_clone(config((0..pools).map(one).collect()));
    let first = config.frontends.remove(0);
    config.frontends = (0..pools)
        .map(|n| FrontendConfig {
            name: format!("f{n}").into(),
            binds: vec![Bind::tcp(([127, 0, 0, 1], 1000 + u16::try_from(n).unwrap()).into())],
            pool: format!("pool{n}").into(),
            ..first.clone()
        })
        .collect();
    Arc::new(config)
}

/// Performs all ticks within `span` and returns their number.
fn ticks(
    controller: &mut Controller,
    now: &mut Instant,
    span: Duration,
) -> (u32, Vec<ControlEffect>) {
    let end = *now + span;
    let (mut ticks, mut effects) = (0, Vec::new());
    while let Some(due) = controller.next_due().filter(|due| *due <= end) {
        *now = due;
        effects.extend(controller.apply(ControlEvent::Tick, due));
        ticks += 1;
    }
    *now = end;
    (ticks, effects)
}

#[test]
fn check_of_many_backends_takes_turns_and_finds_the_hanging_backend() {
    for (pools, each) in [(1, 3_000), (300, 10)] {
        let mut now = tidegate_net::clock::now();
        let mut controller = Controller::new(2, 1);
        controller.apply(ControlEvent::Configure(large(pools, each)), now);
        let states: Vec<_> = controller.backends().map(Arc::clone).collect();
        let (hanging, others) = states.split_last().unwrap();
        let mut logged = Vec::new();
        for round in 0..20 {
            for state in others.iter().rev().take(9).chain((round < 10).then_some(hanging)) {
                let counters = state.counters.of(1);
                counters.questions.add(5);
                counters.answers.add(5);
                counters.answer_log2.add(5 * 10 * crate::table::state::LOG_UNIT as u64);
            }
            hanging.counters.of(0).questions.add(u64::from(round >= 10));
            let look = Duration::from_millis(200);
            let (ticks, effects) = ticks(&mut controller, &mut now, look);
            assert!(round == 0 || (5..=8).contains(&ticks), "{ticks} turns in a check");
            logged.extend(logs(&effects));
        }
        assert_eq!(logged.len(), 1, "{logged:?}");
        let name = &hanging.name;
        assert!(logged[0].starts_with(&format!("{name}: unknown -> suspect: ")), "{logged:?}");
    }
}

#[test]
fn change_in_one_pool_shares_the_other_pools_of_the_table() {
    let now = tidegate_net::clock::now();
    let mut controller = Controller::new(2, 1);
    controller.apply(ControlEvent::Configure(large(5, 3)), now);
    let before = controller.current_table();
    controller.set_intent("pool2", "b1", Intent::Draining, now).unwrap();
    let after = controller.current_table();
    assert_eq!(after.serial, before.serial + 1);
    let same_pool = |at: usize| Arc::ptr_eq(&before.pools[at], &after.pools[at]);
    let same_route = |at: usize| Arc::ptr_eq(&before.frontends[at], &after.frontends[at]);
    assert_eq!([0, 1, 2, 3, 4].map(same_pool), [true, true, false, true, true]);
    assert_eq!([0, 1, 2, 3, 4].map(same_route), [true, true, false, true, true]);
    assert_eq!(after.pools[2].serving.len(), 2);
    let route = after.frontend_at(&model::BindKey::tcp(([127, 0, 0, 1], 1002).into())).unwrap();
    assert!(Arc::ptr_eq(&route.pool, &after.pools[2]));
    assert!(Arc::ptr_eq(after.frontend(&route.state).unwrap(), route));
}

#[test]
fn state_saved_in_slices_is_complete_and_a_reload_ends_it() {
    let mut now = tidegate_net::clock::now();
    let mut controller = Controller::new(2, 1);
    controller.apply(ControlEvent::Configure(large(3, 4)), now);
    controller.set_intent("pool1", "b2", Intent::Draining, now).unwrap();
    now += Duration::from_secs(1);
    let mut saving = controller.begin_save(now);
    let mut slices = 1;
    while controller.save_on(&mut saving, 5) {
        slices += 1;
    }
    assert_eq!(slices, 4);
    let in_slices = controller.end_save(saving).without_counts();
    assert_eq!(in_slices, controller.save(now).without_counts());
    assert_eq!(in_slices.pools.iter().map(|pool| pool.backends.len()).sum::<usize>(), 12);

    let saving = controller.begin_save(now);
    assert!(controller.can_continue(&saving));
    controller.apply(ControlEvent::Configure(large(2, 4)), now);
    assert!(!controller.can_continue(&saving));
}

/// Returns a controller with one pool of five backends whose table part is detached.
fn detached() -> (Controller, Instant) {
    let now = tidegate_net::clock::now();
    let mut controller = Controller::new(2, 1);
    controller.detach_builds_above(4);
    controller.apply(ControlEvent::Configure(large(1, 5)), now);
    (controller, now)
}

fn in_table(controller: &Controller) -> Vec<String> {
    let table = controller.current_table();
    table.pools[0].serving.iter().map(|state| state.name.to_string()).collect()
}

fn the_build(effects: Vec<ControlEffect>) -> ControlEvent {
    let mut builds = effects.into_iter().filter_map(|effect| match effect {
        ControlEffect::Build { token, build } => Some(built(token, *build)),
        _ => None,
    });
    let first = builds.next().expect("one build");
    assert!(builds.next().is_none(), "a pool has one running build");
    first
}

fn set(
    controller: &mut Controller,
    name: &str,
    intent: Intent,
    now: Instant,
) -> Vec<ControlEffect> {
    controller.set_intent("pool0", name, intent, now).unwrap()
}

fn enters(controller: &Controller, name: &str) -> bool {
    let state = controller.backends().find(|state| &*state.name == name).unwrap();
    let enters = state.in_flight.try_enter(0);
    if enters {
        state.in_flight.leave();
    }
    enters
}

#[test]
fn backend_removed_from_a_large_pool_gets_no_session_before_its_table_is_built() {
    let (mut controller, now) = detached();
    let effects = set(&mut controller, "b1", Intent::Draining, now);
    assert_eq!((publishes(&effects), in_table(&controller).len()), (0, 5));
    assert!(!enters(&controller, "b1"), "shut at once");
    let effects = controller.apply(the_build(effects), now);
    assert_eq!(publishes(&effects), 1);
    assert_eq!(in_table(&controller), ["b0", "b2", "b3", "b4"]);
    assert!(enters(&controller, "b1"), "reopened, because the table lacks the backend");
    let effects = set(&mut controller, "b1", Intent::Ready, now);
    controller.apply(the_build(effects), now);
    assert_eq!(in_table(&controller).len(), 5);
}

#[test]
fn changes_during_a_build_cause_another_build() {
    let (mut controller, now) = detached();
    let first = the_build(set(&mut controller, "b1", Intent::Draining, now));
    for name in ["b2", "b3"] {
        let effects = set(&mut controller, name, Intent::Draining, now);
        assert!(!effects.iter().any(|effect| matches!(effect, ControlEffect::Build { .. })));
        assert!(!enters(&controller, name));
    }
    set(&mut controller, "b3", Intent::Ready, now);
    assert!(enters(&controller, "b3"), "eligible all the time");
    let effects = controller.apply(first, now);
    assert_eq!((publishes(&effects), in_table(&controller).len()), (1, 4));
    assert!(enters(&controller, "b1") && !enters(&controller, "b2"));
    let effects = controller.apply(the_build(effects), now);
    assert_eq!((publishes(&effects), in_table(&controller).len()), (1, 3));
    assert!(enters(&controller, "b2"));
}

#[test]
fn builds_use_at_most_half_of_the_other_threads_time() {
    let (mut controller, now) = detached();
    let ControlEvent::Built { token, built, .. } =
        the_build(set(&mut controller, "b1", Intent::Draining, now))
    else {
        unreachable!("it is what was asked for")
    };
    set(&mut controller, "b2", Intent::Draining, now);
    let took = Duration::from_millis(30);
    let begins = |effects: &[ControlEffect]| {
        effects.iter().filter(|effect| matches!(effect, ControlEffect::Build { .. })).count()
    };
    let effects = controller.apply(ControlEvent::Built { token, built, took }, now);
    assert_eq!((publishes(&effects), begins(&effects)), (1, 0));
    assert_eq!(controller.next_due(), Some(now + took));
    assert!(!enters(&controller, "b2"));
    assert_eq!(begins(&controller.apply(ControlEvent::Tick, now + took)), 1);
}

#[test]
fn build_from_before_a_reload_is_ignored_and_no_backend_stays_shut() {
    let (mut controller, now) = detached();
    let overtaken = the_build(set(&mut controller, "b1", Intent::Draining, now));
    controller.apply(ControlEvent::Configure(large(1, 6)), now);
    assert_eq!(in_table(&controller), ["b0", "b2", "b3", "b4", "b5"]);
    assert!(enters(&controller, "b1"));
    let effects = controller.apply(overtaken, now);
    assert_eq!((publishes(&effects), in_table(&controller).len()), (0, 5));
    let effects = set(&mut controller, "b5", Intent::Draining, now);
    controller.apply(the_build(effects), now);
    assert_eq!(in_table(&controller), ["b0", "b2", "b3", "b4"]);
}

#[test]
fn next_build_of_a_large_pool_lists_its_current_members() {
    let (mut controller, mut now) = detached();
    let hear = |controller: &mut Controller, n: usize, sequence: u64, state, now| {
        let heartbeat = Heartbeat { state, ..beat_of("pool0", n, sequence) };
        let mut effects =
            controller.apply(ControlEvent::Heartbeat { heartbeat, at: now, stands_for: 1 }, now);
        // A connect confirms the backend, and the builds run.
        while !effects.is_empty() {
            let events = effects.into_iter().filter_map(|effect| match effect {
                ControlEffect::Probe { backend, token, .. } => {
                    let outcome = ProbeOutcome::success(Duration::from_millis(1));
                    Some(ControlEvent::Probed { backend, token, outcome })
                }
                ControlEffect::Build { token, build } => Some(built(token, *build)),
                _ => None,
            });
            let events: Vec<ControlEvent> = events.collect();
            effects = controller.apply_all(events, now);
        }
    };
    for sequence in 1..=30 {
        hear(&mut controller, 7, sequence, SenderState::Ready, now);
        if sequence > 10 {
            hear(&mut controller, 8, sequence - 10, SenderState::Ready, now);
        }
        now += Duration::from_millis(100);
    }
    assert_eq!(in_table(&controller), ["b0", "b1", "b2", "b3", "b4", "b7", "b8"]);
    hear(&mut controller, 7, 31, SenderState::Stopping, now);
    let settle = |controller: &mut Controller, now| {
        let (mut at, mut effects) = (now, Vec::new());
        for _ in 0..20 {
            at += Duration::from_millis(20);
            effects.extend(controller.apply(ControlEvent::Tick, at));
            let events: Vec<ControlEvent> = effects.drain(..).filter_map(unanswered).collect();
            effects = controller.apply_all(events, at);
        }
    };
    settle(&mut controller, now);
    let table = in_table(&controller);
    assert!(!table.contains(&"b7".to_owned()) && table.len() >= 5, "{table:?}");
}

#[test]
fn pools_up_to_the_bound_are_built_at_once() {
    let now = tidegate_net::clock::now();
    let mut controller = Controller::new(2, 1);
    controller.apply(ControlEvent::Configure(large(1, AT_ONCE_MAX)), now);
    let effects = set(&mut controller, "b1", Intent::Draining, now);
    assert_eq!(publishes(&effects), 1);
    controller.apply(ControlEvent::Configure(large(1, AT_ONCE_MAX + 1)), now);
    let effects = set(&mut controller, "b2", Intent::Draining, now);
    assert_eq!(publishes(&effects), 0);
    the_build(effects);
}

/// Prints the longest step and the median as a row.
fn row(what: &str, mut steps: Vec<Duration>) {
    steps.sort();
    let (median, longest) = (steps[steps.len() / 2], steps[steps.len() - 1]);
    println!("{what:36} {median:>12.1?} {longest:>12.1?}  x{}", steps.len());
}

fn timed<T>(step: impl FnOnce() -> T) -> (Duration, T) {
    let began = tidegate_net::clock::now();
    let done = step();
    (tidegate_net::clock::now() - began, done)
}

/// Returns a heartbeat of backend number `n` of the pool.
fn beat_of(pool: &str, n: usize, sequence: u64) -> Heartbeat {
    let [_, b, c, d] = u32::try_from(n).unwrap().to_be_bytes();
    Heartbeat {
        pool: pool.into(),
        name: format!("b{n}").into(),
        address: ([10, b, c, d], 80).into(),
        incarnation: 1,
        sequence,
        interval: Duration::from_millis(100),
        state: SenderState::Ready,
        weight: 10,
        in_flight: 0,
        load: 0,
        key_id: 1,
    }
}

/// Runs the builds, and records the time of building and of applying them.
fn build_detached(
    controller: &mut Controller,
    effects: Vec<ControlEffect>,
    now: Instant,
    parts: &mut Vec<(Duration, Duration)>,
) {
    for effect in effects {
        if let ControlEffect::Build { token, build } = effect {
            let (made, event) = timed(|| built(token, *build));
            let (taken, _) = timed(|| controller.apply(event, now));
            parts.push((made, taken));
        }
    }
}

/// Prints the costs; asserts nothing.
#[test]
fn costs() {
    if std::env::var_os("TIDEGATE_LONG").is_none() {
        return;
    }
    for (pools, each) in [(1, MANY), (20, MANY / 20), (200, MANY / 200), (MANY / 10, 10)] {
        for senders in [200.min(each), each] {
            println!("--- {pools} pools of {each}; {senders} of the first one send heartbeats");
            println!("{:36} {:>12} {:>12}", "step", "median", "longest");
            costs_of(pools, each, senders);
        }
    }
}

/// Returns the event that follows from an effect if no backend answers.
fn unanswered(effect: ControlEffect) -> Option<ControlEvent> {
    match effect {
        ControlEffect::Probe { backend, token, .. } => {
            let outcome = ProbeOutcome::failure("connect timed out");
            Some(ControlEvent::Probed { backend, token, outcome })
        }
        ControlEffect::Build { token, build } => Some(built(token, *build)),
        _ => None,
    }
}

fn built(token: BuildToken, build: PoolBuild) -> ControlEvent {
    ControlEvent::Built { token, built: Box::new(build.run()), took: Duration::ZERO }
}

fn costs_of(pools: usize, each: usize, senders: usize) {
    let mut now = tidegate_net::clock::now();
    let mut controller = Controller::new(2, 1);
    let config = large(pools, each);
    let (took, _) = timed(|| controller.apply(ControlEvent::Configure(config), now));
    row("first configuration", vec![took]);
    let mut turns = Vec::new();
    let end = now + Duration::from_millis(600);
    while let Some(due) = controller.next_due().filter(|due| *due <= end) {
        now = due;
        turns.push(timed(|| controller.apply(ControlEvent::Tick, now)).0);
    }
    row("turn of comparing first bytes", turns);

    let mut beats = Vec::new();
    for sequence in 1..=30 {
        now += Duration::from_millis(100);
        let heard = (0..senders).map(|n| ControlEvent::Heartbeat {
            heartbeat: beat_of("pool0", n, sequence),
            at: now,
            stands_for: 1,
        });
        let heard: Vec<ControlEvent> = heard.collect();
        let (took, effects) = timed(|| controller.apply_all(heard, now));
        beats.push(took / u32::try_from(senders).unwrap());
        let asked = effects.into_iter().filter_map(|effect| match effect {
            ControlEffect::Probe { backend, token, .. } => Some(ControlEvent::Probed {
                backend,
                token,
                outcome: ProbeOutcome::success(Duration::from_millis(1)),
            }),
            _ => None,
        });
        let asked: Vec<ControlEvent> = asked.collect();
        controller.apply_all(asked, now);
        if let Some(due) = controller.next_due().filter(|due| *due <= now) {
            controller.apply(ControlEvent::Tick, due);
        }
    }
    row("one heartbeat", beats);
    let (watch, state) = (&mut controller.heartbeats, &mut controller.state);
    row("guard tick", (0..20).map(|_| timed(|| watch.guard_tick(state, now)).0).collect());
    let pool = state.pools.iter().next().unwrap().id;
    row(
        "look at one pool",
        (0..20).map(|_| timed(|| watch.check_guard(state, Some(pool), now)).0).collect(),
    );
    row(
        "look at all pools",
        (0..20).map(|_| timed(|| watch.check_guard(state, None, now)).0).collect(),
    );

    // The last sender stops, and its address does not answer.
    let (mut silent, mut tables) = (Vec::new(), 0);
    for sequence in 31..=45 {
        now += Duration::from_millis(100);
        let (took, effects) = timed(|| controller.apply(ControlEvent::Tick, now));
        silent.push(took);
        let mut effects = effects;
        while !effects.is_empty() {
            tables += publishes(&effects);
            let answers: Vec<ControlEvent> = effects.into_iter().filter_map(unanswered).collect();
            let (took, next) = timed(|| controller.apply_all(answers, now));
            silent.push(took);
            effects = next;
        }
        let heard = (0..senders - 1).map(|n| ControlEvent::Heartbeat {
            heartbeat: beat_of("pool0", n, sequence),
            at: now,
            stands_for: 1,
        });
        let heard: Vec<ControlEvent> = heard.collect();
        controller.apply_all(heard, now);
    }
    row("step of a silence", silent);
    println!("{tables} tables made for it");

    let (mut ejections, mut parts) = (Vec::new(), Vec::new());
    for n in 0..4 {
        let id = controller.state.backends.iter().nth(n * 2 + 1).unwrap().state.id;
        let fail = |in_a_row| ControlEvent::ConnectFailed {
            backend: id,
            failure: ConnectFailure::Refused,
            in_a_row,
            begun: now,
        };
        let (took, effects) = timed(|| controller.apply_all((1..=5).map(fail), now));
        ejections.push(took);
        build_detached(&mut controller, effects, now, &mut parts);
    }
    row("ejection", ejections);
    let mut drains = Vec::new();
    for n in 0..4 {
        let name = format!("b{n}");
        let intent = Intent::Draining;
        let (took, effects) = timed(|| controller.set_intent("pool0", &name, intent, now).unwrap());
        drains.push(took);
        build_detached(&mut controller, effects, now, &mut parts);
    }
    row("drain", drains);
    if !parts.is_empty() {
        let (made, taken): (Vec<_>, Vec<_>) = parts.into_iter().unzip();
        row("a pool's part (another thread)", made);
        row("taking it", taken);
    }
    row("save intents", (0..4).map(|_| timed(|| controller.save_intents(now)).0).collect());
    row("begin a picture", (0..4).map(|_| timed(|| controller.begin_status(now)).0).collect());
    let mut picture = controller.begin_status(now);
    row(
        "gather 32",
        (0..4).map(|_| timed(|| controller.gather(&mut picture, 32, now)).0).collect(),
    );
    row(
        "known backends",
        (0..4).map(|_| timed(|| controller.all_known().collect::<Vec<_>>()).0).collect(),
    );
    row("undecided pools", (0..4).map(|_| timed(|| controller.undecided_pools()).0).collect());
    let (took, mut saving) = timed(|| controller.begin_save(now));
    row("begin to save", vec![took]);
    let mut slices = Vec::new();
    loop {
        let (took, more) = timed(|| controller.save_on(&mut saving, 32));
        slices.push(took);
        if !more {
            break;
        }
    }
    row("save 32", slices);
    row("end of saving", vec![timed(|| controller.end_save(saving)).0]);
    row("save at once (upgrade)", vec![timed(|| controller.save(now)).0]);
    let late = Duration::from_millis(60);
    let excuse = |controller: &mut Controller| {
        controller.heartbeats.ignore_silence(&mut controller.state, late, now);
    };
    row("excuse all", (0..4).map(|_| timed(|| excuse(&mut controller)).0).collect());
    let mut ports = PortWatch::default();
    let limits = PortLimits { ports: 100, reuse: Reuse::Loopback };
    let mut look = PortLook::default();
    let (took, ()) = timed(|| ports.sample(&mut look, controller.backends().take(1000), limits));
    row("ports of 1,000", vec![took]);
    row("ports done", vec![timed(|| ports.complete(look)).0]);
    let mut reloads = Vec::new();
    for n in 0..4 {
        let mut config = Arc::unwrap_or_clone(large(pools, each));
        let pool = Arc::make_mut(&mut config.pools[0]);
        pool.backends[n].weight += 1;
        let config = Arc::new(config);
        reloads.push(timed(|| controller.apply(ControlEvent::Configure(config), now)).0);
    }
    row("reload", reloads);
}

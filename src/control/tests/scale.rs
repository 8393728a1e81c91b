//! Many backends: one step of the controller costs a bounded number of them.

use super::*;
use crate::control::ports::{PortLimits, PortLook, PortWatch, Reuse};

const MANY: usize = 20_000;

fn large(pools: usize, each: usize) -> Arc<Config> {
    let ejection = EjectionSpec {
        failures: 5,
        time: Duration::from_secs(10),
        max_ejected_percent: 50,
        early_resets: true,
        slow_first_byte: Some(Duration::from_secs(1)),
    };
    let one = |n: usize| {
        let backends = (0..each).map(|k| {
            let [_, b, c, d] = u32::try_from(n * each + k).unwrap().to_be_bytes();
            Backend {
                name: format!("b{k}").into(),
                address: BackendAddress::Tcp(([10, b, c, d], 80).into()),
                ..backend("x")
            }
        });
        Pool {
            name: format!("pool{n}").into(),
            ejection: Some(ejection),
            backends: backends.collect(),
            ..unprobed(&[])
        }
    };
    let mut config = Arc::unwrap_or_clone(config((0..pools).map(one).collect()));
    let first = config.frontends.remove(0);
    config.frontends = (0..pools)
        .map(|n| Frontend {
            name: format!("f{n}").into(),
            binds: vec![([127, 0, 0, 1], 1000 + u16::try_from(n).unwrap()).into()],
            pool: format!("pool{n}").into(),
            ..first.clone()
        })
        .collect();
    Arc::new(config)
}

fn timed<T>(what: &str, step: impl FnOnce() -> T) -> T {
    let began = crate::clock::now();
    let done = step();
    println!("{what}: {:?}", crate::clock::now() - began);
    done
}

/// Every tick that is wanted until `now` has gone on by `span`; how many there were.
fn ticks(controller: &mut Controller, now: &mut Instant, span: Duration) -> (u32, Vec<Effect>) {
    let end = *now + span;
    let (mut ticks, mut effects) = (0, Vec::new());
    while let Some(due) = controller.next_due().filter(|due| *due <= end) {
        *now = due;
        effects.extend(controller.apply(Event::Tick, due));
        ticks += 1;
    }
    *now = end;
    (ticks, effects)
}

#[test]
fn look_at_many_takes_turns_and_finds_the_one_that_hangs() {
    for (pools, each) in [(1, 3_000), (300, 10)] {
        let mut now = crate::clock::now();
        let mut controller = Controller::new(2, 1);
        controller.apply(Event::Configure(large(pools, each)), now);
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
            assert!(round == 0 || (5..=8).contains(&ticks), "{ticks} turns in a look");
            logged.extend(logs(&effects));
        }
        assert_eq!(logged.len(), 1, "{logged:?}");
        let name = &hanging.name;
        assert!(logged[0].starts_with(&format!("{name}: unknown -> suspect: ")), "{logged:?}");
    }
}

#[test]
fn change_in_one_pool_leaves_everything_else_of_the_table_as_it_is() {
    let now = crate::clock::now();
    let mut controller = Controller::new(2, 1);
    controller.apply(Event::Configure(large(5, 3)), now);
    let before = controller.current_table();
    controller.set_intent("pool2", "b1", Intent::Draining, now).unwrap();
    let after = controller.current_table();
    assert_eq!(after.serial, before.serial + 1);
    let same_pool = |at: usize| Arc::ptr_eq(&before.pools[at], &after.pools[at]);
    let same_route = |at: usize| Arc::ptr_eq(&before.frontends[at], &after.frontends[at]);
    assert_eq!([0, 1, 2, 3, 4].map(same_pool), [true, true, false, true, true]);
    assert_eq!([0, 1, 2, 3, 4].map(same_route), [true, true, false, true, true]);
    assert_eq!(after.pools[2].serving.len(), 2);
    let route = after.route(([127, 0, 0, 1], 1002).into()).unwrap();
    assert!(Arc::ptr_eq(&route.pool, &after.pools[2]));
    assert!(Arc::ptr_eq(after.frontend(&route.state).unwrap(), route));
}

#[test]
fn what_is_saved_in_slices_is_the_same_and_a_reload_ends_it() {
    let mut now = crate::clock::now();
    let mut controller = Controller::new(2, 1);
    controller.apply(Event::Configure(large(3, 4)), now);
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
    assert!(controller.can_go_on(&saving));
    controller.apply(Event::Configure(large(2, 4)), now);
    assert!(!controller.can_go_on(&saving));
}

/// For a look at the figures; nothing depends on them.
#[test]
fn costs() {
    if std::env::var_os("TIDEGATE_LONG").is_none() {
        return;
    }
    for (pools, each) in [(1, MANY), (MANY / 10, 10)] {
        println!("--- {pools} pools of {each}");
        let mut now = crate::clock::now();
        let mut controller = Controller::new(2, 1);
        let config = large(pools, each);
        timed("configure", || controller.apply(Event::Configure(config), now));
        for _ in 0..3 {
            let end = now + Duration::from_millis(200);
            let mut longest = Duration::ZERO;
            let mut turns = 0;
            let began = crate::clock::now();
            while let Some(due) = controller.next_due().filter(|due| *due <= end) {
                now = due;
                let began = crate::clock::now();
                controller.apply(Event::Tick, now);
                longest = longest.max(crate::clock::now() - began);
                turns += 1;
            }
            now = end;
            let all = crate::clock::now() - began;
            println!("gray: {turns} turns, longest {longest:?}, all {all:?}");
        }
        for n in 0..4 {
            let id = *controller.backends.keys().nth(n * 3 + 1).unwrap();
            let fail = |in_a_row| Event::ConnectFailed {
                backend: id,
                failure: ConnectFailure::Refused,
                in_a_row,
                begun: now,
            };
            let effects = timed("ejection", || controller.apply_all((1..=5).map(fail), now));
            assert_eq!(publishes(&effects), 1);
        }
        let effects =
            timed("drain", || controller.set_intent("pool0", "b9", Intent::Draining, now).unwrap());
        assert_eq!(publishes(&effects), 1);
        let mut saving = timed("begin to save", || controller.begin_save(now));
        timed("save 32", || controller.save_on(&mut saving, 32));
        timed("save the rest", || while controller.save_on(&mut saving, 32) {});
        timed("end of saving", || controller.end_save(saving));
        let mut ports = PortWatch::default();
        let limits = PortLimits { ports: 100, reuse: Reuse::Loopback };
        let mut look = PortLook::default();
        timed("ports", || ports.look(&mut look, controller.backends().take(1000), limits));
        timed("ports done", || ports.complete(look));
        timed("guard tick", || controller.guard_tick(now));
    }
}

//! Tests of table builds: what a table contains and what it inherits from the previous
//! one.

use super::*;
use crate::balance::PickKey;
use crate::balance::trial::TrialPhase;
use crate::model;
use crate::model::{BackendAddr, Backups, Bind, ClientAddr, PeerAddr, Policy, RouteConfig, Tiers};
use crate::table::NoBackend;
use crate::table::routes::ConnectionFacts;
use crate::table::state::{BackendId, FrontendId, PoolId};
use crate::testing;
use std::net::{IpAddr, Ipv4Addr};
use std::ops::RangeInclusive;

// === helpers ===

fn pool(name: &str, balance: Policy, backends: u8) -> PoolInput {
    PoolInput {
        id: PoolId(1),
        spec: Arc::new(model::PoolConfig { balance, ..testing::pool(name) }),
        backends: (0..backends).map(|i| backend(name, i)).collect(),
        stand_ins: vec![],
        undecided: false,
    }
}

fn backend(pool: &str, number: u8) -> BackendInput {
    let address = BackendAddr::Tcp(([127, 0, 0, 1], 8_000 + u16::from(number)).into());
    let name = format!("{}", char::from(b'a' + number)).into();
    BackendInput {
        state: Arc::new(BackendState::new(BackendId(number.into()), pool.into(), name, address, 1)),
        effective_weight: 1,
        connections_max: 0,
        slow_start: false,
        tier: 0,
        eligible: true,
        on_trial: false,
        undecided: false,
        in_service: true,
    }
}

/// The same backend as the controller passes it for the next table.
fn again(backend: &BackendInput) -> BackendInput {
    BackendInput { state: Arc::clone(&backend.state), ..*backend }
}

fn pool_again(pool: &PoolInput) -> PoolInput {
    PoolInput {
        id: pool.id,
        spec: Arc::clone(&pool.spec),
        backends: pool.backends.iter().map(again).collect(),
        stand_ins: vec![],
        undecided: pool.undecided,
    }
}

fn table(pools: Vec<PoolInput>, previous: Option<&Table>) -> Table {
    let frontends = Vec::new();
    build(&TableInput { generation: 1, serial: 1, connections_max: 0, frontends, pools }, previous)
}

fn draw(draw: u64) -> PickKey {
    PickKey { client: IpAddr::V4(Ipv4Addr::LOCALHOST), draw, at: 0 }
}

fn only_balancer(pool: &PoolTable) -> Arc<Balancer> {
    let [only] = pool.balancer.as_ref().unwrap().tiers() else { panic!("several tiers") };
    Arc::clone(&only.balancer)
}

fn serving(pool: &PoolTable) -> String {
    pool.serving.iter().map(|b| &*b.name).collect()
}

/// The names of `count` consecutive picks.
fn picks(pool: &PoolTable, count: u64) -> String {
    (0..count).map(|n| pool.pick(draw(n), &[]).unwrap().backend().name.to_string()).collect()
}

// === serving backends ===

#[test]
fn eligible_primaries_serve_and_backups_wait() {
    let mut web = pool("web", Policy::WeightedRoundRobin, 4);
    web.backends[1].eligible = false;
    web.backends[3].tier = 1;
    assert_eq!(serving(&table(vec![web], None).pools[0]), "ac");
}

#[test]
fn backups_serve_only_when_no_primary_is_eligible() {
    let mut web = pool("web", Policy::WeightedRoundRobin, 3);
    web.backends[2].tier = 1;
    for primary in &mut web.backends[..2] {
        primary.eligible = false;
    }
    assert_eq!(serving(&table(vec![web], None).pools[0]), "c");
}

#[test]
fn first_eligible_backup_of_a_tier_serves_alone_with_backups_one() {
    let mut random = fastrand::Rng::with_seed(7);
    for round in 0..2_000 {
        let policy = Policy::ALL[round % Policy::ALL.len()];
        let mut web = pool("web", policy, 6);
        let rule = if random.bool() { Backups::One } else { Backups::All };
        web.spec = Arc::new(model::PoolConfig { backups: rule, ..(*web.spec).clone() });
        for backend in &mut web.backends {
            backend.tier = random.u8(..3);
            backend.eligible = random.u8(..3) > 0;
            backend.on_trial = backend.eligible && random.u8(..4) == 0;
        }
        let mut expected = String::new();
        let mut filled = false;
        for tier in 0..3 {
            let filled_before = filled;
            for b in web.backends.iter().filter(|b| b.eligible && b.tier == tier) {
                let one = tier > 0 && rule == Backups::One;
                if !(filled_before || filled && one) {
                    expected.push_str(&b.state.name);
                }
                filled |= !b.on_trial;
            }
        }
        let described = format!("{rule:?} {:?}", web.backends);
        assert_eq!(serving(&table(vec![web], None).pools[0]), expected, "{described}");
    }
}

#[test]
fn refuse_resets_clients_without_eligible_backends() {
    let mut web = pool("web", Policy::LeastConnections, 2);
    web.backends.iter_mut().for_each(|b| b.eligible = false);
    let table = table(vec![web], None);
    assert_eq!(table.pools[0].pick(draw(0), &[]).unwrap_err(), NoBackend::NoneEligible);
    assert!(table.pools[0].has_room(), "no slot will become free: accept, then reject");
}

#[test]
fn clients_wait_for_an_eligible_backend_until_queue_max() {
    let mut web = pool("web", Policy::LeastConnections, 2);
    let spec =
        model::PoolConfig { when_none_eligible: WhenNoneEligible::Wait, ..(*web.spec).clone() };
    web.spec = Arc::new(spec);
    web.backends.iter_mut().for_each(|b| b.eligible = false);
    let waiting = table(vec![web], None);
    let reason = waiting.pools[0].pick(draw(0), &[]).unwrap_err();
    assert_eq!((reason, reason.queues()), (NoBackend::Awaited, true));
    assert!(!waiting.pools[0].has_room(), "more clients wait in the listen queue");
}

#[test]
fn try_all_serves_every_backend_including_backups() {
    let mut web = pool("web", Policy::Random, 3);
    let spec =
        model::PoolConfig { when_none_eligible: WhenNoneEligible::TryAll, ..(*web.spec).clone() };
    web.spec = Arc::new(spec);
    web.backends.iter_mut().for_each(|b| b.eligible = false);
    web.backends[0].in_service = false;
    web.backends[2].tier = 1;
    assert_eq!(serving(&table(vec![web], None).pools[0]), "bc");
}

#[test]
fn reservation_holds_a_slot_until_it_is_dropped() {
    let mut web = pool("web", Policy::SourceHash, 1);
    web.backends[0].connections_max = 1;
    let table = table(vec![web], None);
    let reserved = table.pools[0].pick(draw(0), &[]).unwrap();
    assert!(!table.pools[0].has_room());
    assert_eq!(table.pools[0].pick(draw(0), &[]).unwrap_err(), NoBackend::AtCapacity);
    assert_eq!(table.pools[0].pick(draw(0), &[0]).unwrap_err(), NoBackend::Exhausted);
    drop(reserved);
    assert!(table.pools[0].has_room());
    assert_eq!(table.pools[0].serving[0].in_flight.get(), 0);
}

// === inheritance from the previous table ===

#[test]
fn health_change_in_one_pool_leaves_other_pools_unchanged() {
    let (web, db) = (pool("web", Policy::SourceHash, 3), pool("db", Policy::SourceHash, 3));
    let first = table(vec![pool_again(&web), pool_again(&db)], None);
    let mut web_later = pool_again(&web);
    web_later.backends[0].eligible = false;
    let second = table(vec![web_later, pool_again(&db)], Some(&first));
    assert!(Arc::ptr_eq(&first.pools[1], &second.pools[1]));
    assert!(!Arc::ptr_eq(&first.pools[0], &second.pools[0]));
    assert_eq!(serving(&second.pools[0]), "bc");
}

#[test]
fn reload_with_other_timeouts_keeps_the_balancer() {
    let web = pool("web", Policy::SourceHash, 3);
    let first = table(vec![pool_again(&web)], None);
    let mut later = pool_again(&web);
    later.spec = Arc::new(model::PoolConfig { connect_attempts: 1, ..(*web.spec).clone() });
    let second = table(vec![later], Some(&first));
    let balancer = |table: &Table| only_balancer(&table.pools[0]);
    assert!(Arc::ptr_eq(&balancer(&first), &balancer(&second)));
    assert_eq!(second.pools[0].spec.connect_attempts, 1);
}

#[test]
fn change_that_affects_picks_builds_a_new_balancer() {
    let changes: [fn(&mut PoolInput); 4] = [
        |pool| pool.backends[1].effective_weight = 2,
        |pool| pool.backends[1].connections_max = 2,
        |pool| pool.backends.swap(0, 1),
        |pool| pool.spec = self::pool("web", Policy::Random, 0).spec,
    ];
    for (number, change) in changes.into_iter().enumerate() {
        let web = pool("web", Policy::TwoChoices, 3);
        let first = table(vec![pool_again(&web)], None);
        let mut later = pool_again(&web);
        change(&mut later);
        let second = table(vec![later], Some(&first));
        let (before, now) = (only_balancer(&first.pools[0]), only_balancer(&second.pools[0]));
        let same = Arc::ptr_eq(&before, &now);
        assert!(!same, "change {number}");
    }
}

#[test]
fn new_backend_at_an_old_address_has_its_own_count() {
    let web = pool("web", Policy::LeastConnections, 2);
    let first = table(vec![pool_again(&web)], None);
    let mut later = pool_again(&web);
    later.backends[1] = backend("web", 1);
    let second = table(vec![later], Some(&first));
    let reserved = second.pools[0].pick(draw(0), &[0]).unwrap();
    assert_eq!(reserved.backend().in_flight.get(), 1);
    assert_eq!(first.pools[0].serving[1].in_flight.get(), 0);
}

#[test]
fn round_robin_continues_after_a_cap_change() {
    let web = pool("web", Policy::WeightedRoundRobin, 3);
    let first = table(vec![pool_again(&web)], None);
    assert_eq!(picks(&first.pools[0], 2), "ab");
    let mut later = pool_again(&web);
    later.backends[0].connections_max = 10;
    let second = table(vec![later], Some(&first));
    assert_eq!(picks(&second.pools[0], 1), "c");
    // A session that still holds the old table takes from the same sequence.
    assert_eq!(picks(&first.pools[0], 1), "a");
    assert_eq!(picks(&second.pools[0], 1), "b");
}

#[test]
fn round_robin_keeps_its_relative_position_after_a_removal() {
    let web = pool("web", Policy::WeightedRoundRobin, 4);
    let first = table(vec![pool_again(&web)], None);
    assert_eq!(picks(&first.pools[0], 2), "ab");
    let mut later = pool_again(&web);
    later.backends.truncate(2);
    let second = table(vec![later], Some(&first));
    assert_eq!(picks(&second.pools[0], 3), "bab");
}

#[test]
fn removed_pool_returns_with_a_new_position() {
    let (web, db) =
        (pool("web", Policy::WeightedRoundRobin, 2), pool("db", Policy::WeightedRoundRobin, 2));
    let first = table(vec![pool_again(&web), pool_again(&db)], None);
    assert_eq!(picks(&first.pools[1], 1), "a");
    let second = table(vec![pool_again(&web)], Some(&first));
    assert_eq!(second.pools.len(), 1);
    let third = table(vec![pool_again(&web), pool_again(&db)], Some(&second));
    assert_eq!(picks(&third.pools[1], 1), "a");
}

// === routes ===

fn frontend(binds: &[Bind], routes: Vec<RouteConfig>) -> FrontendInput {
    let spec = testing::frontend("main", 80, &testing::pool("db"));
    FrontendInput {
        state: Arc::new(FrontendState::new(FrontendId(1), "main".into(), 1, 1)),
        spec: model::FrontendConfig { binds: binds.to_vec(), routes, ..spec },
    }
}

/// Builds a table with this frontend and the pools `web` and `db`.
fn routed(frontend: FrontendInput) -> Table {
    let pools = vec![pool("web", Policy::Random, 1), pool("db", Policy::Random, 1)];
    let frontends = vec![frontend];
    build(&TableInput { generation: 1, serial: 1, connections_max: 0, frontends, pools }, None)
}

#[test]
fn every_bind_leads_to_its_frontend_and_pool() {
    let binds = ["127.0.0.1:80", "[::1]:80"].map(|bind| Bind::tcp(bind.parse().unwrap()));
    let table = routed(frontend(&binds, vec![]));
    for bind in binds {
        let route = table.frontend_at(&bind.key).unwrap();
        assert!(Arc::ptr_eq(&route.pool, &table.pools[1]));
    }
    assert!(table.frontend_at(&"127.0.0.1:81".parse().unwrap()).is_none());
    assert!(Table::empty().frontend_at(&"127.0.0.1:80".parse().unwrap()).is_none());
}

fn route(sources: &[&str], ports: &[RangeInclusive<u16>], target: RouteTarget) -> RouteConfig {
    let sources = sources.iter().map(|range| range.parse().unwrap()).collect();
    RouteConfig { sources, ports: ports.to_vec(), addresses: vec![], target }
}

/// Returns the pool of the connection, or `refused` if a route rejects it.
fn taken(table: &Table, client: &str, local: &str) -> String {
    let client = ClientAddr::of_peer(PeerAddr::new(format!("{client}:5000").parse().unwrap()));
    let facts = ConnectionFacts { client, local: Some(local.parse().unwrap()) };
    let frontend = &table.frontends[0];
    let pool = frontend.pool_of(frontend.route(&facts));
    pool.map_or("refused".to_owned(), |pool| pool.spec.name.to_string())
}

#[test]
fn all_255_routes_of_a_frontend_are_checked() {
    let routes = (1..=255).map(|port| route(&[], &[port..=port], RouteTarget::Pool("web".into())));
    let table = routed(frontend(&[], routes.collect()));
    assert_eq!(taken(&table, "192.0.2.1", "127.0.0.1:255"), "web");
    assert_eq!(taken(&table, "192.0.2.1", "127.0.0.1:256"), "db");
}

#[test]
fn first_route_with_all_conditions_met_is_used() {
    let web = || RouteTarget::Pool("web".into());
    let mut here = route(&[], &[], web());
    here.addresses = vec!["127.0.0.2/32".parse().unwrap()];
    let routes = vec![
        route(&["10.1.0.0/16"], &[443..=443], RouteTarget::Refuse),
        route(&["10.0.0.0/8", "fd00::/8"], &[80..=80, 440..=450], web()),
        here,
    ];
    let table = routed(frontend(&[], routes));
    for (client, local, expected) in [
        ("10.1.2.3", "127.0.0.1:443", "refused"),
        ("10.1.2.3", "127.0.0.1:80", "web"),
        ("10.2.0.0", "127.0.0.1:443", "web"),
        ("10.2.0.0", "127.0.0.1:451", "db"),
        ("[fd00::1]", "[::1]:450", "web"),
        ("[::ffff:10.2.0.0]", "127.0.0.1:443", "web"),
        ("192.0.2.1", "127.0.0.1:443", "db"),
        ("192.0.2.1", "127.0.0.2:443", "web"),
    ] {
        assert_eq!(taken(&table, client, local), expected, "{client} to {local}");
    }
    assert!(table.frontends[0].needs_local_address());
}

#[test]
fn changed_pool_is_replaced_in_every_route_to_it() {
    let to_web = route(&["10.0.0.0/8"], &[], RouteTarget::Pool("web".into()));
    let refuses = route(&["10.0.0.0/9"], &[], RouteTarget::Refuse);
    let first = routed(frontend(&[], vec![refuses, to_web]));
    let changed = build_pool(&pool("web", Policy::Random, 2), Some(&first.pools[0]));
    let second = update(&first, 2, vec![(0, Arc::clone(&changed))]);
    let pools: Vec<_> = second.frontends[0].pools().collect();
    assert!(Arc::ptr_eq(pools[0], &changed) && Arc::ptr_eq(pools[1], &first.pools[1]));
    assert_eq!(taken(&second, "10.200.0.1", "127.0.0.1:80"), "web");
    assert_eq!(taken(&second, "10.0.0.1", "127.0.0.1:80"), "refused");
}

// === trials ===

#[test]
fn unused_trial_goes_to_the_next_session() {
    let pool = pool("web", Policy::Random, 1);
    let table = table(vec![pool_again(&pool)], None);
    let in_flight = &pool.backends[0].state.in_flight;
    in_flight.begin_trial();
    // Dropped before its session connects, as after a panic.
    drop(table.pools[0].pick(draw(0), &[]).unwrap());
    assert_eq!((in_flight.get(), in_flight.trial()), (0, TrialPhase::Open));
    let mut pick = table.pools[0].pick(draw(1), &[]).unwrap();
    assert!(pick.take_trial().is_some() && pick.take_trial().is_none());
    // The trial was taken, so the drop does not reopen it.
    drop(pick);
    assert_eq!((in_flight.get(), in_flight.trial()), (0, TrialPhase::Claimed));
}

// === spill ===

/// A pool whose members have these tiers.
fn spilling(policy: Policy, tiers: &[u8]) -> PoolInput {
    let mut web = pool("web", policy, tiers.len() as u8);
    web.spec = Arc::new(model::PoolConfig { tiers: Tiers::Spill, ..(*web.spec).clone() });
    for (backend, tier) in web.backends.iter_mut().zip(tiers) {
        backend.tier = *tier;
    }
    web
}

fn tier_loads(pool: &PoolTable) -> Vec<(u8, u8)> {
    let tiers = pool.balancer.iter().flat_map(|balancer| balancer.tiers());
    tiers.map(|tier| (tier.tier, tier.load)).collect()
}

#[test]
fn sessions_spill_to_the_next_tier_as_backends_become_ineligible() {
    for policy in Policy::ALL {
        let mut web = spilling(policy, &[0, 0, 1, 0, 0, 1]);
        let full = build_pool(&web, None);
        assert_eq!((serving(&full), tier_loads(&full)), ("abde".into(), vec![(0, 100)]));
        web.backends[0].eligible = false;
        web.backends[1].eligible = false;
        let half = build_pool(&web, Some(&full));
        assert_eq!((&*serving(&half), tier_loads(&half)), ("decf", vec![(0, 70), (1, 30)]));
        let picked = (0..2_000).map(|n| {
            let client = IpAddr::V4(Ipv4Addr::from_bits(n));
            half.rehearse(PickKey { client, draw: n.into(), at: 0 }, &[]).0.unwrap().index
        });
        let upper = picked.filter(|index| half.tier_of(*index) == Some(1)).count();
        assert!((500..700).contains(&upper), "{policy:?}: {upper}");
        assert_eq!(half.left_out.total(), 2, "the two of the lower tier");
        // The unchanged tier keeps its balancer when the other one is empty.
        web.backends[3].eligible = false;
        web.backends[4].eligible = false;
        let none = build_pool(&web, Some(&half));
        assert_eq!((&*serving(&none), tier_loads(&none)), ("cf", vec![(1, 100)]));
        let of = |pool: &PoolTable, place: usize| {
            Arc::clone(&pool.balancer.as_ref().unwrap().tiers()[place].balancer)
        };
        assert!(Arc::ptr_eq(&of(&half, 1), &of(&none, 0)));
    }
}

#[test]
fn share_of_a_tier_follows_its_number_of_members() {
    let mut web = spilling(Policy::Random, &[0, 0, 1]);
    web.backends[1].eligible = false;
    let half = build_pool(&web, None);
    assert_eq!(tier_loads(&half), [(0, 70), (1, 30)]);
    // A member that is not eligible joins.
    web.backends.push(backend("web", 3));
    web.backends[3].eligible = false;
    let third = build_pool(&web, Some(&half));
    assert_eq!(tier_loads(&third), [(0, 46), (1, 54)]);
    assert!(Arc::ptr_eq(&build_pool(&web, Some(&third)), &third), "nothing has changed");
}

#[test]
fn pool_without_eligible_backends_does_not_spill() {
    let mut web = spilling(Policy::Random, &[0, 0, 1]);
    web.backends.iter_mut().for_each(|backend| backend.eligible = false);
    assert_eq!(serving(&build_pool(&web, None)), "");
    let rule = WhenNoneEligible::TryAll;
    web.spec = Arc::new(model::PoolConfig { when_none_eligible: rule, ..(*web.spec).clone() });
    let all = build_pool(&web, None);
    assert_eq!((&*serving(&all), all.tier), ("abc", ServingTier::FailOpen));
    assert_eq!((tier_loads(&all), all.tier_of(2)), (vec![(0, 100)], None));
}

#[test]
fn session_on_trial_reaches_a_backend_of_a_tier_that_spills() {
    let mut web = spilling(Policy::WeightedRoundRobin, &[0, 0, 1]);
    web.backends[0].eligible = false;
    web.backends[1].on_trial = true;
    web.backends[1].state.in_flight.begin_trial();
    let pool = build_pool(&web, None);
    assert_eq!(tier_loads(&pool), [(0, 70), (1, 30)]);
    let sessions: Vec<_> = (0..50).map(|n| pool.pick(draw(n), &[]).unwrap()).collect();
    let trials = sessions.iter().filter(|session| session.is_on_trial()).count();
    assert_eq!(trials, 1, "all others spill while the trial is open");
}

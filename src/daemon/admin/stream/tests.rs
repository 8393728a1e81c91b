//! Property: a viewer that applies the changes has what a new snapshot shows.

use super::changes::{Change, ShownToViewers};
use super::picture::Picture;
use super::selection::StreamSelection;
use crate::admin::AdminSnapshot;
use proptest::prelude::*;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;
use tidegate_api::stream::{StreamBackendDoc, StreamSnapshotDoc};
use tidegate_core::control::{BackendStatus, ControlStatus, PoolStatus};
use tidegate_core::health::{Intent, Observation};
use tidegate_core::model::BackendAddr;
use tidegate_core::table::state::{BackendId, BackendState};

const BACKENDS: u32 = 12;

/// One event of the balancer.
#[derive(Debug, Clone, Copy)]
enum Step {
    Session(usize),
    Ramp(usize, u32),
    Down(usize, bool),
    Drain(usize, bool),
    Generation,
    Remove(usize),
    Queue(usize),
}

/// What a client has: the snapshot, and the backends of each pool by place.
struct Client {
    snapshot: StreamSnapshotDoc,
    pools: Vec<BTreeMap<u64, StreamBackendDoc>>,
}

// === impl Client ===

impl Client {
    fn new(snapshot: StreamSnapshotDoc) -> Client {
        let places = |backends: &[StreamBackendDoc]| {
            let place = |(at, one): (usize, &StreamBackendDoc)| {
                (one.index.unwrap_or(at as u64), one.clone())
            };
            backends.iter().enumerate().map(place).collect()
        };
        let pools = snapshot.pools.iter().map(|pool| places(&pool.backends)).collect();
        Client { snapshot, pools }
    }

    fn apply(&mut self, change: &Change) {
        match change {
            Change::Transition(told) => {
                let named = |one: &&mut StreamBackendDoc| one.backend.name == told.backend;
                let mut all = self.pools.iter_mut().flat_map(BTreeMap::values_mut);
                *all.find(named).expect("a known backend") = told.row.clone();
            }
            Change::Delta(delta) => {
                self.snapshot.apply(delta);
                for (pool, newer) in self.pools.iter_mut().zip(&delta.pools) {
                    newer.leave.iter().for_each(|place| drop(pool.remove(place)));
                    for one in &newer.enter {
                        pool.insert(one.index.expect("its place"), one.clone());
                    }
                    for row in &newer.rows {
                        pool.get_mut(&row.0).expect("a known place").apply(row);
                    }
                }
                for (pool, newer) in self.snapshot.pools.iter_mut().zip(&delta.pools) {
                    if let Some(map) = &newer.map {
                        pool.map = Some(map.clone());
                    }
                }
            }
        }
    }
}

fn control(now: Instant) -> ControlStatus {
    let backend = |id: u32| {
        let (name, address) = (format!("b{id}").into(), BackendAddr::Unix("/run/a.sock".into()));
        let state = BackendState::new(BackendId(id), "web".into(), name, address, 1);
        BackendStatus { observation: Observation::Up, ..BackendStatus::plain(state, now) }
    };
    ControlStatus {
        generation: 1,
        frontends: Vec::new(),
        pools: vec![
            PoolStatus::plain("web", (1..=BACKENDS).map(backend).collect()),
            PoolStatus::plain("db", vec![backend(90)]),
        ],
        published: Vec::new(),
        heartbeat: None,
        leaving: Vec::new(),
    }
}

fn take(step: Step, control: &mut ControlStatus, queued: &mut usize) {
    let backends = &mut control.pools[0].backends;
    let count = backends.len();
    match step {
        Step::Session(at) => drop(backends[at % count].state.in_flight.try_enter(0)),
        Step::Ramp(at, share) => backends[at % count].ramp_percent = share,
        Step::Down(at, down) => {
            let backend = &mut backends[at % count];
            backend.observation = if down { Observation::Down } else { Observation::Up };
            backend.eligible = !down;
            backend.effective_weight = if down { 0.0 } else { 2.0 };
        }
        Step::Drain(at, drained) => {
            backends[at % count].intent = if drained { Intent::Draining } else { Intent::Ready };
        }
        Step::Generation => control.generation += 1,
        Step::Remove(at) if count > 2 => drop(backends.remove(at % count)),
        Step::Remove(_) => {}
        Step::Queue(clients) => *queued = clients,
    }
}

fn picture(control: &ControlStatus, queued: usize, now: Instant) -> Picture {
    let mut snapshot = AdminSnapshot::plain(control.clone(), now);
    snapshot.queued.insert("web".into(), queued);
    Picture::of(Arc::new(snapshot), "here")
}

fn step() -> impl Strategy<Value = Step> {
    let at = 0_usize..12;
    prop_oneof![
        4 => at.clone().prop_map(Step::Session),
        2 => (at.clone(), 1_u32..=100).prop_map(|(at, share)| Step::Ramp(at, share)),
        3 => (at.clone(), any::<bool>()).prop_map(|(at, down)| Step::Down(at, down)),
        2 => (at.clone(), any::<bool>()).prop_map(|(at, drained)| Step::Drain(at, drained)),
        1 => Just(Step::Generation),
        1 => at.prop_map(Step::Remove),
        1 => (0_usize..4).prop_map(Step::Queue),
    ]
}

proptest! {
    #[test]
    fn changes_applied_to_a_snapshot_equal_the_next_snapshot(
        moments in prop::collection::vec((prop::collection::vec(step(), 0..6), any::<bool>()), 1..25),
        query in prop::sample::select(vec!["", "backends=top:3", "pools=web", "pools=db"]),
    ) {
        let (now, selection) = (tidegate_net::clock::now(), StreamSelection::parse(query).unwrap());
        let (mut control, mut queued) = (control(now), 0);
        let (snapshot, mut shown) =
            ShownToViewers::begin(&picture(&control, queued, now), &selection);
        let mut client = Client::new(snapshot);
        for (steps, regular) in moments {
            steps.into_iter().for_each(|step| take(step, &mut control, &mut queued));
            let picture = picture(&control, queued, now);
            match shown.advance(&picture, &selection, regular) {
                Some(changes) => changes.iter().for_each(|change| client.apply(change)),
                None => {
                    let (snapshot, newer) = ShownToViewers::begin(&picture, &selection);
                    (shown, client) = (newer, Client::new(snapshot));
                }
            }
            if regular {
                let expected = Client::new(shown.snapshot(&picture));
                prop_assert_eq!(&client.pools, &expected.pools);
                let heads = |client: &Client| {
                    let pools = client.snapshot.pools.iter();
                    let parts = pools.map(|one| (one.pool.clone(), one.counts.clone(), one.map.clone()));
                    (client.snapshot.head.clone(), parts.collect::<Vec<_>>())
                };
                prop_assert_eq!(heads(&client), heads(&expected));
            }
        }
    }
}

#[test]
fn selection_has_the_worst_backends_and_a_map_of_all() {
    let now = tidegate_net::clock::now();
    let mut control = control(now);
    control.pools[0].backends[7].observation = Observation::Down;
    control.pools[0].backends[3].observation = Observation::Suspect;
    let selection = StreamSelection::parse("pools=web&backends=top:2").unwrap();
    let (snapshot, _) = ShownToViewers::begin(&picture(&control, 0, now), &selection);
    let [web, db] = &*snapshot.pools else { panic!("two pools") };
    let names: Vec<&str> = web.backends.iter().map(|one| &*one.backend.name).collect();
    assert_eq!(names, ["b4", "b8"]);
    assert_eq!((web.map.as_deref(), web.total), (Some("000300010000"), 12));
    assert_eq!((web.counts["down"], web.counts["suspect"], web.counts["up"]), (1, 1, 10));
    assert_eq!((db.backends.len(), db.total), (0, 1));
}

#[test]
fn quiet_second_is_a_short_text() {
    let now = tidegate_net::clock::now();
    let (control, selection) = (control(now), StreamSelection::default());
    let (_, mut shown) = ShownToViewers::begin(&picture(&control, 0, now), &selection);
    let changes = shown.advance(&picture(&control, 0, now), &selection, true).unwrap();
    let [Change::Delta(delta)] = &*changes else { panic!("{changes:?}") };
    assert!(delta.pools.iter().all(|pool| pool.rows.is_empty()));
    assert!(shown.advance(&picture(&control, 0, now), &selection, false).unwrap().is_empty());
}

//! Properties of the view over drawn sequences of answers, times and local health.
//!
//! The model of a removal is a list of readings: [`Readings`] knows for each address for how
//! long and how often trusted answers in a row lack it.

use super::*;
use proptest::collection::vec;
use proptest::prelude::*;
use std::collections::BTreeMap;

/// Addresses that are drawn: `10.0.0.1` to `10.0.0.8`.
const ADDRESSES: u8 = 8;

/// An event of a sequence.
#[derive(Debug, Clone)]
enum Event {
    Whole { members: Vec<Announced>, trusted: bool, unreadable: Unreadable },
    Failed,
    Alive,
    Pass(u64),
    Up(Vec<u8>),
    Guards(Box<ViewGuards>),
}

/// Trusted complete answers in a row that lack an address: the first, the last, their number.
#[derive(Debug, Default)]
struct Readings(BTreeMap<u8, (Instant, Instant, u32)>);

fn drawn_guards() -> impl Strategy<Value = ViewGuards> {
    let empty =
        prop_oneof![Just(EmptyAnswer::Keep), Just(EmptyAnswer::Confirm), Just(EmptyAnswer::Accept)];
    let critical = prop_oneof![
        Just(CriticalRule::Drain),
        Just(CriticalRule::Suspect),
        Just(CriticalRule::Remove)
    ];
    let times = (1_u64..20, 1_u64..20, proptest::option::weighted(0.2, 30_u64..90));
    let hold = prop_oneof![3 => Just(0_u64), 1 => 5_u64..30];
    let counts = (0_u8..=100, 1_u32..4, 1_u32..4, prop_oneof![Just(1000_u32), 3_u32..8]);
    (empty, critical, times, counts, hold).prop_map(|(empty, critical, times, counts, hold)| {
        ViewGuards {
            empty,
            critical,
            confirm_after: secs(times.0),
            hold_empty: secs(hold),
            overlap: secs(times.1),
            stale_for: times.2.map(secs),
            max_removed: counts.0,
            missing: counts.1,
            min_backends: counts.2,
            backends_max: counts.3,
            ..guards()
        }
    })
}

fn drawn_member() -> impl Strategy<Value = Announced> {
    let wish = prop_oneof![
        6 => Just(Wish::Sessions),
        1 => Just(Wish::Starting),
        1 => Just(Wish::Draining),
        2 => Just(Wish::Critical)
    ];
    let name = prop_oneof![8 => Just(None), 1 => (1..=ADDRESSES).prop_map(Some)];
    let weight = proptest::option::weighted(0.3, 0_u16..300);
    (1..=ADDRESSES, name, wish, weight).prop_map(|(number, name, wish, weight)| Announced {
        name: format!("s{}", name.unwrap_or(number)).into(),
        weight,
        ..with_wish(number, wish)
    })
}

fn drawn_unreadable() -> impl Strategy<Value = Unreadable> {
    let named = vec(1..=ADDRESSES, 1..3).prop_map(|numbers| {
        let mut unreadable = Unreadable::default();
        numbers.iter().for_each(|number| unreadable.add(&format!("s{number}")));
        unreadable
    });
    prop_oneof![
        5 => Just(Unreadable::default()),
        1 => Just(Unreadable::unnamed(1)),
        1 => named
    ]
}

/// The keys of members whose name is that of another address.
fn keys(members: &[Announced]) -> Arc<[(SocketAddr, Arc<str>)]> {
    let own = (1..=ADDRESSES).map(one);
    let own: BTreeMap<SocketAddr, Arc<str>> = own.map(|own| (own.address, own.name)).collect();
    let key = |member: &Announced| Some((member.address, own.get(&member.address)?.clone()));
    members.iter().filter_map(key).collect()
}

fn drawn_event() -> impl Strategy<Value = Event> {
    let members = prop_oneof![
        8 => vec(drawn_member(), 0..10),
        1 => Just(Vec::new()),
        3 => Just((1..=6).map(one).collect::<Vec<_>>())
    ];
    prop_oneof![
        8 => (members, prop::bool::weighted(0.8), drawn_unreadable())
            .prop_map(|(members, trusted, unreadable)| Event::Whole { members, trusted, unreadable }),
        1 => Just(Event::Failed),
        1 => Just(Event::Alive),
        5 => (0_u64..15_000).prop_map(Event::Pass),
        3 => vec(1..=ADDRESSES, 0..9).prop_map(Event::Up),
    ]
}

fn with_changes_of_guards() -> impl Strategy<Value = Event> {
    prop_oneof![
        9 => drawn_event(),
        1 => drawn_guards().prop_map(|guards| Event::Guards(Box::new(guards)))
    ]
}

impl Bench {
    /// Applies an event, with steps at and after the time that passes.
    fn apply(&mut self, event: &Event) {
        match event {
            Event::Whole { members, trusted, unreadable } => {
                let set = set_of(members.clone());
                let set = WholeSet {
                    trusted: *trusted,
                    unreadable: unreadable.clone(),
                    keys: keys(members),
                    ..set
                };
                self.check_change(|bench| bench.take(&Told::Whole(set)));
            }
            Event::Failed => self.check_change(Bench::fail),
            Event::Alive => self.check_change(|bench| bench.take(&Told::Alive)),
            Event::Pass(ms) => {
                self.pass(Duration::from_millis(*ms));
                self.check_change(|bench| bench.view.step(bench.now, &bench.sight));
            }
            Event::Up(numbers) => {
                self.down(1..=ADDRESSES);
                self.up(numbers.iter().copied());
            }
            Event::Guards(guards) => self.view.set_guards(guards.as_ref().clone()),
        }
    }

    /// A call reports exactly whether the members differ.
    fn check_change(&mut self, call: impl FnOnce(&mut Bench) -> bool) {
        let before: Vec<ViewMember> = self.view.members().cloned().collect();
        let reported = call(self);
        let differs = !self.view.members().eq(before.iter());
        assert_eq!(reported, differs, "{before:?} {:?}", self.view.entries);
    }

    /// What holds after each call.
    fn check(&self) {
        let members: Vec<&ViewMember> = self.view.members().collect();
        assert!(members.is_sorted_by_key(|member| member.address));
        let names: BTreeSet<&str> = members.iter().map(|member| &*member.name).collect();
        let addresses: BTreeSet<SocketAddr> = members.iter().map(|member| member.address).collect();
        assert_eq!((names.len(), addresses.len()), (members.len(), members.len()));
        assert!(members.iter().all(|member| (1..=100).contains(&member.weight)));
        assert!(!names.contains(""));
        let status = self.status();
        let held = members.iter().filter(|member| member.held.is_some()).count();
        assert_eq!((status.members, status.held), (members.len() as u32, held as u32));
    }

    fn set(&self) -> BTreeSet<u8> {
        self.addresses().into_iter().collect()
    }
}

impl Readings {
    /// Notes the trusted answer, unless the guards treat it as no evidence.
    fn note(&mut self, listed: &BTreeSet<u8>, guards: &ViewGuards, now: Instant) {
        let is_small = listed.len() < guards.min_backends as usize;
        if is_small && guards.empty == EmptyAnswer::Keep {
            self.0.retain(|number, _| !listed.contains(number));
            return;
        }
        for number in 1..=ADDRESSES {
            if listed.contains(&number) {
                self.0.remove(&number);
            } else {
                let known = self.0.entry(number).or_insert((now, now, 0));
                (known.1, known.2) = (now, known.2 + 1);
            }
        }
    }

    fn is_absent(&self, number: u8, missing: u32) -> bool {
        self.0.get(&number).is_some_and(|(_, _, count)| *count >= missing)
    }

    fn is_confirmed(&self, number: u8, after: Duration) -> bool {
        self.0.get(&number).is_some_and(|(first, last, _)| *last - *first >= after)
    }
}

/// The last complete answer, and the readings so far.
#[derive(Debug, Default)]
struct Answers {
    /// The addresses that it lists, and whether it is trusted.
    last: Option<(BTreeSet<u8>, bool)>,
    readings: Readings,
}

impl Answers {
    /// Notes an answer or a repetition of the last one. Returns false for other events.
    fn note(&mut self, event: &Event, guards: &ViewGuards, now: Instant) -> bool {
        match event {
            Event::Whole { members, trusted, .. } => {
                self.last = Some((listed(members, guards), *trusted));
            }
            Event::Alive => {}
            _ => return false,
        }
        if let Some((set, true)) = &self.last {
            self.readings.note(set, guards, now);
        }
        true
    }
}

/// The trusted answers so far: when each was given, and the number of its members that no
/// confirmed answer has removed.
#[derive(Debug, Default)]
struct Window(Vec<(Instant, usize)>);

impl Window {
    fn confirmed(&mut self, removed: usize) {
        self.0.iter_mut().for_each(|(_, size)| *size = size.saturating_sub(removed));
    }

    fn largest(&self, now: Instant, window: Duration) -> usize {
        let recent = self.0.iter().filter(|(at, _)| now - *at < window);
        recent.map(|(_, size)| *size).max().unwrap_or(0)
    }
}

/// The addresses that the answer lists, as far as `backends_max` permits.
fn listed(members: &[Announced], guards: &ViewGuards) -> BTreeSet<u8> {
    let number = |member: &Announced| match member.address.ip() {
        std::net::IpAddr::V4(ip) => ip.octets()[3],
        std::net::IpAddr::V6(_) => 0,
    };
    let all: BTreeSet<u8> = members.iter().map(number).collect();
    all.into_iter().take(guards.backends_max as usize).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 250, ..ProptestConfig::default() })]

    #[test]
    fn no_sequence_of_answers_breaks_the_view(
        guards in drawn_guards(),
        events in vec(with_changes_of_guards(), 0..40),
    ) {
        let mut bench = Bench::new(guards);
        for event in &events {
            bench.apply(event);
            bench.check();
            bench.view.take_notices();
        }
    }

    #[test]
    fn a_member_leaves_by_enough_trusted_answers_and_the_floor_by_confirmed_ones(
        guards in drawn_guards(),
        events in vec(drawn_event(), 0..40),
    ) {
        let guards = ViewGuards { critical: CriticalRule::Drain, ..guards };
        let mut bench = Bench::new(guards.clone());
        let mut answers = Answers::default();
        for event in &events {
            let is_answer = answers.note(event, &guards, bench.now);
            let Answers { last, readings } = &answers;
            let before = bench.set();
            bench.apply(event);
            let after = bench.set();
            let is_floor = is_answer && after.len() < guards.min_backends as usize;
            for gone in before.difference(&after) {
                prop_assert!(readings.is_absent(*gone, guards.missing), "{gone}");
                let is_sure = readings.is_confirmed(*gone, guards.confirm_after);
                prop_assert!(!is_floor || is_sure || guards.empty == EmptyAnswer::Accept);
            }
            if let Some((set, _)) = last.as_ref().filter(|_| is_answer) {
                prop_assert!(set.is_subset(&after), "newcomers join at once");
            }
        }
    }

    #[test]
    fn no_sequence_of_answers_removes_more_than_the_share_within_one_window(
        guards in drawn_guards(),
        events in vec(drawn_event(), 0..60),
    ) {
        let guards = ViewGuards {
            empty: EmptyAnswer::Confirm,
            critical: CriticalRule::Drain,
            missing: 1,
            overlap: Duration::ZERO,
            ..guards
        };
        let mut bench = Bench::new(guards.clone());
        let (mut answers, mut window) = (Answers::default(), Window::default());
        // Without eligible members, none stays as the last one.
        for event in events.iter().filter(|event| !matches!(event, Event::Up(_))) {
            let is_answer = answers.note(event, &guards, bench.now);
            let before = bench.set();
            bench.apply(event);
            let Answers { last: Some((set, trusted)), readings } = &answers else { continue };
            if !is_answer {
                continue;
            }
            let left = bench.set();
            let gone = before.difference(&left);
            let is_sure = |number: &&u8| readings.is_confirmed(**number, guards.confirm_after);
            let (sure, unsure): (Vec<&u8>, Vec<&u8>) = gone.partition(is_sure);
            window.confirmed(sure.len());
            if !unsure.is_empty() {
                let largest = window.largest(bench.now, guards.confirm_after);
                let floor = largest * (100 - usize::from(guards.max_removed));
                prop_assert!(set.len() * 100 >= floor, "{} of {largest}", set.len());
                prop_assert!(set.len() >= guards.min_backends as usize);
            }
            if *trusted {
                window.0.push((bench.now, set.len()));
            }
        }
    }

    #[test]
    fn the_order_of_an_answer_means_nothing(
        guards in drawn_guards(),
        events in vec(with_changes_of_guards(), 0..30),
    ) {
        let mut bench = Bench::new(guards.clone());
        let mut other = Bench { view: View::new(guards), now: bench.now, sight: Seen::default() };
        for event in events {
            bench.apply(&event);
            let event = match event {
                Event::Whole { mut members, trusted, unreadable } => {
                    // Of equal address and name the first counts, so these keep their order.
                    members.sort_by(|a, b| (b.address, &b.name).cmp(&(a.address, &a.name)));
                    Event::Whole { members, trusted, unreadable }
                }
                event => event,
            };
            other.apply(&event);
            prop_assert!(bench.view.members().eq(other.view.members()));
        }
    }

    #[test]
    fn a_repeated_answer_changes_nothing(
        guards in drawn_guards(),
        events in vec(drawn_event(), 0..30),
        members in vec(drawn_member(), 0..10),
    ) {
        let missing = guards.missing;
        let mut bench = Bench::new(guards);
        events.iter().for_each(|event| bench.apply(event));
        for _ in 0..missing {
            bench.whole(members.clone());
        }
        prop_assert!(!bench.whole(members));
        prop_assert!(!bench.take(&Told::Alive));
    }

    #[test]
    fn each_set_is_reached_by_repeated_trusted_answers(
        guards in drawn_guards(),
        events in vec(drawn_event(), 0..30),
        numbers in vec(1..=ADDRESSES, 3..9),
        empties in any::<bool>(),
    ) {
        let numbers = if empties && guards.empty != EmptyAnswer::Keep { vec![] } else { numbers };
        let wanted: BTreeSet<u8> = numbers.into_iter().collect();
        prop_assume!(wanted.is_empty() || wanted.len() >= guards.min_backends as usize);
        let mut bench = Bench::new(guards.clone());
        events.iter().for_each(|event| bench.apply(event));
        let time = guards.confirm_after.max(guards.hold_empty) + guards.overlap + secs(u64::from(guards.missing) + 2);
        for _ in 0..time.as_secs() {
            bench.tell(wanted.iter().copied());
            bench.pass(secs(1));
        }
        let most = guards.backends_max as usize;
        prop_assert_eq!(bench.set(), wanted.into_iter().take(most).collect::<BTreeSet<_>>());
        prop_assert!(bench.view.has_answer());
        prop_assert!(bench.view.members().all(|member| member.wish.serves() && member.held.is_none()));
    }

    #[test]
    fn a_restored_view_decides_like_the_saved_one(
        guards in drawn_guards(),
        before in vec(drawn_event(), 0..30),
        after in vec(drawn_event(), 0..15),
    ) {
        let mut bench = Bench::new(guards.clone());
        before.iter().for_each(|event| bench.apply(event));
        let saved = bench.view.save(bench.now);
        let text = serde_json::to_string(&saved).unwrap();
        let read: SavedView = serde_json::from_str(&text).unwrap();
        prop_assert_eq!(&read, &saved);
        let view = View::restore(guards, &read, bench.now);
        prop_assert_eq!(&view.save(bench.now), &saved);
        prop_assert!(view.members().eq(bench.view.members()));
        let mut other = Bench { view, now: bench.now, sight: bench.sight.clone() };
        // The set that a sign of life repeats is not saved.
        for event in after.iter().filter(|event| !matches!(event, Event::Alive)) {
            bench.apply(event);
            other.apply(event);
            prop_assert!(bench.view.members().eq(other.view.members()), "{event:?}");
            prop_assert_eq!(bench.view.has_answer(), other.view.has_answer());
        }
    }
}

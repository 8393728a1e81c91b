//! Fuzz target: arbitrary bytes as the file with the views of member sources.
//!
//! Called by the fuzzer and by the mutation test. It checks:
//!
//! - Nothing panics, also not in the hours after the start.
//! - A restored view has valid members, whatever the file says.
//! - A restored view, saved and restored again, is the same view.

use crate::saved_views::{decode, encode};
use std::collections::HashSet;
use std::net::SocketAddr;
use std::time::{Duration, Instant, UNIX_EPOCH};
use tidegate_core::control::{MEMBERS_MAX, SavedViews};
use tidegate_core::discovery::labels::MemberLabels;
use tidegate_core::discovery::view::{LocalSight, SavedView, View};
use tidegate_core::discovery::{Announced, SourceFailure, Told, Unreadable, WholeSet};
use tidegate_core::model::{AnnouncedWeights, CriticalRule, EmptyAnswer, ViewGuards};
use tidegate_net::clock;

/// The wall clock when the file is read, in seconds since 1970.
const WALL: u64 = 1_800_000_000;

/// A host that finds every second port up.
struct HalfUp;

impl LocalSight for HalfUp {
    fn is_up(&self, address: SocketAddr) -> bool {
        address.port().is_multiple_of(2)
    }

    fn is_eligible(&self, address: SocketAddr) -> bool {
        self.is_up(address)
    }

    fn is_listed_elsewhere(&self, address: SocketAddr) -> bool {
        address.port().is_multiple_of(3)
    }

    fn has_eligible_outside(&self, lists: &dyn Fn(SocketAddr) -> bool) -> bool {
        !lists(SocketAddr::from(([10, 0, 0, 1], 2)))
    }
}

fn guards() -> ViewGuards {
    ViewGuards {
        empty: EmptyAnswer::Confirm,
        max_removed: 50,
        confirm_after: Duration::from_secs(10),
        hold_empty: Duration::from_secs(5),
        min_backends: 1,
        missing: 2,
        overlap: Duration::from_secs(10),
        stale_for: Some(Duration::from_secs(60)),
        backends_max: 1000,
        weight_max: 100,
        weights: AnnouncedWeights::Use,
        addresses: vec!["10.0.0.0/8".parse().expect("a range"), "::/0".parse().expect("a range")],
        critical: CriticalRule::Drain,
    }
}

/// See the module's documentation.
pub fn check(data: &[u8]) {
    let wall = UNIX_EPOCH + Duration::from_secs(WALL);
    let views = match decode(data, wall) {
        Ok(views) => views,
        Err(problem) => return assert!(!problem.is_empty()),
    };
    let again = decode(&encode(&views, wall), wall).expect("an encoded file");
    assert_eq!(again, views);
    check_views(&views, clock::now());
}

fn check_views(views: &SavedViews, now: Instant) {
    for source in &views.sources {
        let view = View::restore(guards(), &source.view, now);
        check_members(&view);
        let saved = view.save(now);
        let again = View::restore(guards(), &saved, now);
        assert_eq!(again.save(now), saved);
        check_later(view, &saved, now);
    }
}

/// Members have unique names and addresses in order, and weights in bounds.
fn check_members(view: &View) {
    let members: Vec<_> = view.members().collect();
    let names: HashSet<&str> = members.iter().map(|member| &*member.name).collect();
    assert!(members.len() <= MEMBERS_MAX && names.len() == members.len());
    assert!(members.is_sorted_by(|one, other| one.address < other.address));
    for member in members {
        assert!(member.address.port() != 0 && (1..=100).contains(&member.weight), "{member:?}");
    }
}

/// Lets the times of the view pass, with a failure, a partial answer and its repetitions.
fn check_later(mut view: View, saved: &SavedView, mut now: Instant) {
    let half = saved.members.iter().step_by(2).map(|member| Announced {
        name: member.name.clone(),
        address: member.address,
        weight: Some(member.weight),
        tier: member.tier,
        wish: member.wish,
        raw: member.raw.clone(),
        labels: MemberLabels::default(),
    });
    let (why, detail) = (SourceFailure::Timeout, String::new());
    let whole = WholeSet {
        members: half.collect(),
        version: String::new(),
        trusted: true,
        unreadable: Unreadable::default(),
        keys: [].into(),
    };
    for told in [Told::Failed { why, detail }, Told::Whole(whole), Told::Alive, Told::Alive] {
        view.take(&told, now, &HalfUp);
        check_members(&view);
        for _ in 0..3 {
            let Some(due) = view.next_due() else { break };
            now = now.max(due);
            view.step(now, &HalfUp);
            check_members(&view);
        }
        view.status(now);
        view.take_notices();
        now += Duration::from_secs(10);
    }
}

//! What the next process and the operator read: saved views and notices.

use super::*;

fn restored(bench: &Bench, guards: ViewGuards) -> View {
    let saved = bench.view.save(bench.now);
    let text = serde_json::to_string(&saved).unwrap();
    let saved: SavedView = serde_json::from_str(&text).unwrap();
    View::restore(guards, &saved, bench.now)
}

#[test]
fn a_restored_view_has_its_members_and_is_marked_until_an_answer() {
    let mut bench = Bench::with(guards(), 3);
    bench.pass(secs(5));
    let view = restored(&bench, guards());
    assert!(view.members().eq(bench.view.members()));
    assert!(view.has_answer());
    assert_eq!(view.status(bench.now).confirmed, Some(secs(5)));
    assert!(view.status(bench.now).restored);
    bench.view = view;
    bench.fail();
    assert!(bench.status().restored);
    assert!(!bench.tell([1, 2, 3]));
    assert!(!bench.status().restored);
}

#[test]
fn the_first_answer_after_a_restart_is_judged_by_the_saved_view() {
    let mut bench = Bench::with(guards(), 3);
    bench.view = restored(&bench, guards());
    bench.tell([1]);
    assert_eq!(bench.held(2), Some(HeldReason::MaxRemoved));
    bench.pass(secs(6));
    bench.view = restored(&bench, guards());
    bench.pass(secs(4));
    bench.tell([1]);
    assert_eq!(bench.addresses(), [1], "an absence continues over a restart");
}

#[test]
fn members_outside_of_changed_ranges_are_not_restored() {
    let bench = Bench::with(guards(), 3);
    let narrow = ViewGuards { addresses: vec!["10.0.0.2/31".parse().unwrap()], ..guards() };
    let view = restored(&bench, narrow);
    let names: Vec<&str> = view.members().map(|member| &*member.name).collect();
    assert_eq!(names, ["s2", "s3"]);
}

#[test]
fn a_saved_view_with_invalid_values_gives_a_valid_view() {
    let text = r#"{"answered":true,"members":[
        {"name":"b","address":"10.0.0.2:80","weight":0,"since_ms":18446744073709551615},
        {"name":"a","address":"10.0.0.1:80","weight":9999,"since_ms":0,"leaves_in_ms":5},
        {"name":"c","address":"10.0.0.2:80","weight":1,"since_ms":0},
        {"name":"a","address":"10.0.0.3:80","weight":1,"since_ms":0},
        {"name":"x y","address":"10.0.0.4:80","weight":1,"since_ms":0,"held":"small"},
        {"name":"a@10.0.0.5:80","address":"10.0.0.5:80","weight":1,"since_ms":0},
        {"name":"z","address":"[::ffff:10.0.0.6]:80","weight":1,"since_ms":0},
        {"name":"z","address":"192.0.2.1:80","weight":1,"since_ms":0}]}"#;
    let saved: SavedView = serde_json::from_str(text).unwrap();
    let view = View::restore(guards(), &saved, clock::now());
    let members: Vec<(&str, u16)> = view.members().map(|one| (&*one.name, one.weight)).collect();
    let expected = [("a", 100), ("b", 1), ("10.0.0.4:80", 1), ("a@10.0.0.5:80", 1)];
    assert_eq!(members, expected);
}

#[test]
fn notices_report_each_event_once() {
    let mut bench = Bench::with(guards(), 3);
    let version = "index 1".to_owned();
    let joined = NoticeKind::Changed { joined: 3, left: 0, members: 3, version: version.clone() };
    assert_eq!(bench.notices(), [joined]);
    bench.pass(secs(20));
    bench.fail();
    let (why, detail) = (SourceFailure::Connect, "refused".to_owned());
    assert_eq!(bench.notices(), [NoticeKind::Kept { why, detail, age: secs(20) }]);
    bench.pass(secs(20));
    bench.tell([]);
    let held = NoticeKind::Held { reason: HeldReason::Small, removes: 3, members: 3 };
    assert_eq!(bench.notices(), [NoticeKind::Recovered { after: secs(20) }, held]);
    bench.pass(secs(20));
    bench.tell([]);
    let left = NoticeKind::Changed { joined: 0, left: 3, members: 0, version };
    assert_eq!(bench.notices(), [NoticeKind::Confirmed { removed: 3 }, left]);
}

#[test]
fn notices_of_one_kind_are_10_s_apart_and_count_the_suppressed_ones() {
    let mut bench = Bench::with(guards(), 1);
    bench.view.take_notices();
    for _ in 0..30 {
        bench.fail();
        bench.pass(secs(1));
    }
    let notices = bench.view.take_notices();
    assert_eq!(notices.len(), 1, "a notice that is not taken is replaced");
    assert_eq!(notices[0].suppressed, 9);
    bench.fail();
    let notices = bench.view.take_notices();
    assert_eq!((notices.len(), notices[0].suppressed), (1, 9));
}

#[test]
fn refused_announcements_are_reported_when_their_number_changes() {
    let mut bench = Bench::new(guards());
    let outside = || Announced { address: "192.0.2.1:80".parse().unwrap(), ..one(9) };
    let counts = RefusedCounts { addresses: 1, ..RefusedCounts::default() };
    bench.whole([one(1), outside()]);
    assert!(
        bench
            .notices()
            .contains(&NoticeKind::Refused { counts, unreadable: Unreadable::default() })
    );
    bench.pass(secs(60));
    bench.whole([one(1), outside()]);
    assert!(bench.notices().is_empty());
    bench.whole([one(1)]);
    bench.pass(secs(60));
    bench.whole([one(1), outside()]);
    assert_eq!(
        bench.notices(),
        [NoticeKind::Refused { counts, unreadable: Unreadable::default() }]
    );
}

#[test]
fn a_member_costs_less_than_1_kib() {
    let kept = size_of::<member::Entry>() + size_of::<Announced>();
    assert!(kept <= 512, "{kept} bytes, and its texts");
}

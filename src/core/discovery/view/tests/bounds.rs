//! What an answer can offer: addresses, names, weights and numbers.

use super::*;

#[test]
fn order_and_version_of_an_answer_mean_nothing() {
    let mut bench = Bench::with(guards(), 4);
    let mut set = set_of([3, 1, 4, 2].map(one));
    set.version = "index 2".to_owned();
    assert!(!bench.take(&Told::Whole(set)));
    assert_eq!(bench.addresses(), [1, 2, 3, 4]);
    assert_eq!(bench.status().version, "index 2");
    assert_eq!(bench.status().answers.same, 2);
}

#[test]
fn addresses_outside_of_the_ranges_and_of_no_backend_are_refused() {
    let mut bench = Bench::new(guards());
    let addresses = [
        "192.0.2.1:80",
        "127.0.0.1:80",
        "10.0.0.1:0",
        "0.0.0.0:80",
        "224.0.0.1:80",
        "255.255.255.255:80",
        "10.0.0.9:80",
        "[fd00::1]:80",
        "[ff02::1]:80",
        "[2001:db8::1]:80",
    ];
    bench.whole(
        (1..).zip(addresses).map(|(number, address)| Announced {
            address: address.parse().unwrap(),
            ..one(number)
        }),
    );
    assert_eq!(bench.names(), ["s7", "s8"]);
    assert_eq!(bench.status().refused.addresses, 8);
    assert_eq!(bench.status().announced, 10);
}

#[test]
fn loopback_and_link_local_addresses_need_a_range_of_their_own() {
    let ips = ["127.0.0.1", "169.254.1.1", "::1", "fe80::1", "192.0.2.1", "2001:db8::1"];
    let permitted = |ranges: &[&str]| {
        let addresses = ranges.iter().map(|range| range.parse().unwrap()).collect();
        let guards = ViewGuards { addresses, ..guards() };
        ips.map(|ip| guards.permit(ip.parse().unwrap()))
    };
    let (yes, no) = (true, false);
    assert_eq!(permitted(&["0.0.0.0/0", "::/0"]), [no, no, no, no, yes, yes]);
    assert_eq!(permitted(&["0.0.0.0/0", "127.0.0.1/32"]), [yes, no, no, no, yes, no]);
    assert_eq!(permitted(&["127.0.0.0/8", "169.254.0.0/16"]), [yes, yes, no, no, no, no]);
    assert_eq!(permitted(&["126.0.0.0/7", "::1/128", "fe80::/64"]), [no, no, yes, yes, no, no]);
    let names = ViewGuards::of_name(&crate::model::DnsConfig::default());
    assert!(ips.iter().all(|ip| names.permit(ip.parse().unwrap())), "the file has the name");
}

#[test]
fn an_ipv4_mapped_address_is_an_ipv4_address() {
    let mut bench = Bench::new(guards());
    let address = "[::ffff:10.0.0.1]:80".parse().unwrap();
    bench.whole([Announced { address, ..one(1) }]);
    assert_eq!(bench.addresses(), [1]);
    assert_eq!(bench.member(1).name.as_ref(), "s1");
    assert!(!bench.tell([1]));
}

#[test]
fn of_two_names_with_one_address_the_first_is_a_member() {
    let mut bench = Bench::new(guards());
    let other = Announced { name: "r9".into(), ..one(1) };
    bench.whole([one(1), other, one(2)]);
    assert_eq!(bench.names(), ["r9", "s2"]);
    assert_eq!(bench.status().refused.duplicate, 1);
}

#[test]
fn an_invalid_name_is_replaced_by_the_address_and_counted() {
    let mut bench = Bench::new(guards());
    let named = |number, name: &str| Announced { name: name.into(), ..one(number) };
    let long = "x".repeat(65);
    bench.whole([
        named(1, "a b"),
        named(2, ""),
        named(3, &long),
        named(4, ".."),
        named(5, "10.0.0.5:80"),
        named(6, "good-name_1.x"),
        named(7, "10.0.0.8:80"),
        named(8, "[::ffff:10.0.0.8]:80"),
    ]);
    let names = bench.names();
    assert_eq!(names[..5], [1, 2, 3, 4, 5].map(|number| at(number).to_string()));
    assert_eq!(names[5..], ["good-name_1.x", "10.0.0.7:80", "10.0.0.8:80"]);
    assert_eq!(bench.status().refused.bad_name, 5);
}

#[test]
fn weights_are_clamped_and_a_weight_of_0_drains() {
    let mut bench = Bench::new(guards());
    let weights = [None, Some(0), Some(7), Some(100), Some(101), Some(u16::MAX)];
    bench.whole((1..).zip(weights).map(|(number, weight)| Announced { weight, ..one(number) }));
    let weights: Vec<u16> = bench.view.members().map(|member| member.weight).collect();
    assert_eq!(weights, [1, 1, 7, 100, 100, 100]);
    assert_eq!(bench.wish(2), MemberWish::Draining);
    assert_eq!(bench.wish(3), MemberWish::Sessions);
    assert_eq!(bench.status().refused.weight_clamped, 2);
}

#[test]
fn ignored_weights_are_1_and_do_not_drain() {
    let mut bench = Bench::new(ViewGuards { weights: AnnouncedWeights::Ignore, ..guards() });
    let weighted = |number, weight| Announced { weight: Some(weight), ..one(number) };
    bench.whole([weighted(1, 0), weighted(2, 900)]);
    assert!(bench.view.members().all(|member| member.weight == 1 && member.wish.serves()));
    assert_eq!(bench.status().refused, RefusedCounts::default());
}

#[test]
fn beyond_the_bound_the_first_by_address_are_members() {
    let mut bench = Bench::new(ViewGuards { backends_max: 3, ..guards() });
    bench.tell([5, 4, 3, 2, 1]);
    assert_eq!(bench.addresses(), [1, 2, 3]);
    assert_eq!(bench.status().refused.too_many, 2);
}

#[test]
fn no_view_has_more_than_the_bound_of_all_views() {
    let guards = ViewGuards { backends_max: u32::MAX, missing: 9, ..guards() };
    let mut bench = Bench::new(guards);
    let many = |from: u32, count: u32| {
        (from..from + count).map(move |number| {
            let [_, a, b, c] = number.to_be_bytes();
            let address = SocketAddr::from(([10, a, b, c], 80));
            Announced { name: format!("n{number}").into(), address, ..one(1) }
        })
    };
    bench.whole(many(0, 12_000));
    assert_eq!(bench.view.members().count(), MEMBERS_MAX);
    assert_eq!(bench.status().refused.too_many, 2_000);
    // None of the absent members has left yet, so the newcomers have no room.
    bench.whole(many(20_000, 10_000));
    assert_eq!(bench.view.members().count(), MEMBERS_MAX);
    assert_eq!(bench.status().refused.too_many, 10_000);
    for _ in 0..9 {
        bench.whole(many(20_000, 10_000));
    }
    assert_eq!(bench.view.members().count(), MEMBERS_MAX);
    assert!(bench.view.members().any(|member| member.name.as_ref() == "n29999"));
}

#[test]
fn texts_of_a_source_are_bounded() {
    let mut bench = Bench::new(guards());
    let raw = "ü".repeat(100).into();
    let mut set = set_of([Announced { raw, ..one(1) }]);
    set.version = "v".repeat(10_000);
    bench.take(&Told::Whole(set));
    assert_eq!(bench.member(1).raw.len(), RAW_BYTES_MAX);
    assert_eq!(bench.status().version.len(), TEXT_BYTES_MAX);
    let detail = "ü".repeat(1000);
    bench.take(&Told::Failed { why: SourceFailure::Protocol, detail });
    assert!(bench.status().last_word.unwrap().detail.len() <= TEXT_BYTES_MAX);
}

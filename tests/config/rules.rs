//! The meaning of rules, and rules without effect: ranges, binds, and keys that need other keys.

use super::*;
use tidegate_core::limits::access_list::Access;

#[test]
fn registration_keys_without_registration_give_warnings() {
    let (directory, path) = with_key(&[7; 32], 0o600);
    let text = fs::read_to_string(&path).unwrap();
    let keys = "register = false\nbackends_max = 5\nforget_after = \"5s\"\n";
    let backend = "[[pool.web.backend]]\naddress = \"10.0.0.1:80\"\n";
    fs::write(&path, text.replace("register = true\n", keys) + backend).unwrap();
    let said: Vec<_> = config::load(&path)
        .unwrap()
        .warnings
        .iter()
        .map(|warning| warning.message.clone())
        .collect();
    let expected = ["backends_max", "forget_after"]
        .map(|key| format!("{key} has no effect without register = true"));
    assert_eq!(said, expected);
    drop(directory);
}

#[test]
fn ipv4_ranges_written_as_ipv6_are_ipv4_ranges() {
    let directory = tempfile::tempdir().unwrap();
    let list = directory.path().join("deny.txt");
    fs::write(&list, "::ffff:192.0.2.0/120\n").unwrap();
    let rules = format!(
        "[frontend.web.sources]\ndeny = [\"::ffff:10.0.0.1\", \"::ffff:172.16.0.0/108\"]\n\
         deny_file = \"{}\"\n",
        list.display()
    );
    let path = directory.path().join("t.toml");
    fs::write(&path, MINIMAL.replace("[pool.web.probe]", &rules)).unwrap();
    let loaded = config::load(&path).unwrap();
    assert_eq!(loaded.warnings, []);
    let access = &loaded.config.frontends[0].sources.as_ref().unwrap().access;
    let denied = |ip: &str| access.of(ip.parse().unwrap()) == Access::Denied;
    for ip in ["10.0.0.1", "172.16.0.9", "172.31.0.9", "192.0.2.255"] {
        assert!(denied(ip), "{ip}");
    }
    for ip in ["10.0.0.2", "172.32.0.1", "192.0.3.0", "::1"] {
        assert!(!denied(ip), "{ip}");
    }
    let key = HEARTBEATS.replace("\"10.0.0.0/8\"", "\"::ffff:10.0.0.0/104\"");
    let key = &config::parse(&key, "t").unwrap().heartbeat.unwrap().keys[0];
    assert_eq!(key.addresses[0].to_string(), "10.0.0.0/8");
}

#[test]
fn star_bind_is_both_families_and_zones_can_be_interface_names() {
    let path = root().join("tests/config_cases/valid/binds_and_expects.toml");
    let config = config::load(&path).unwrap().config;
    let web = &config.frontends[0];
    let binds: Vec<String> = web.binds.iter().map(|bind| bind.key.to_string()).collect();
    // The index of the loopback interface is 1 on Linux.
    let expected =
        ["0.0.0.0:80", "[::]:80", "192.0.2.1:443", "0.0.0.0:81", "[::]:81", "[fe80::1%1]:82"];
    assert_eq!(binds, expected);
    let options = |at: usize| {
        let options = web.binds[at].options;
        (options.freebind, options.if_ipv6)
    };
    assert_eq!(
        [0, 1, 2, 5].map(options),
        [(false, false), (false, true), (true, false), (false, false)]
    );
    assert_eq!(config.pools[0].backends[0].address.to_string(), "unix:@name");
    let probe = config.pools[0].probe.as_ref().unwrap();
    let tidegate_core::model::ProbeKind::SendExpect { expect, .. } = &probe.kind else {
        panic!("{probe:?}")
    };
    assert_eq!(*expect, tidegate_core::model::Expect::Contains("role:master".into()));
}

#[test]
fn sender_identity_and_configuration_accept_the_same_names() {
    let mut texts: Vec<String> = (0..=255_u8).map(|b| char::from(b).to_string()).collect();
    texts.extend(["", "..", "a.", "a/b", "10.0.0.1:80", "ä"].map(str::to_owned));
    texts.extend(
        [tidegate_heartbeat::wire::NAME_BYTES_MAX, tidegate_heartbeat::wire::NAME_BYTES_MAX + 1]
            .map(|length| "x".repeat(length)),
    );
    for text in texts {
        let quoted = toml::Value::String(text.clone());
        let file = format!(
            "[frontend.f]\nbind = \"127.0.0.1:80\"\npool = {quoted}\n\
             [[pool.{quoted}.backend]]\naddress = \"10.0.0.1:80\""
        );
        let configured = tidegate_config::parse(&file, "t.toml").is_ok();
        let fit = tidegate_heartbeat::wire::SenderIdentity::new(
            &text,
            "a",
            "10.0.0.1:80".parse().unwrap(),
        )
        .is_ok();
        assert_eq!(fit, configured, "{text:?}");
    }
}

//! Random registries, `discover` tables and settings of name resolution.

use super::*;

/// Draws `[registry.NAME]` for each kind: `main`, `e`, `k` and `z`.
pub(super) fn registries() -> Drawn {
    let tls = one_of(&[
        "",
        "tls = false\n",
        "tls = true\n",
        "tls = true\nca_file = \"/ca\"\n",
        "tls = true\ncert_file = \"/c\"\nkey_file = \"/k\"\nserver_name = \"a.b\"\n",
    ]);
    let timeout = || keys(vec![("timeout", time(100, 60 * SECOND))]);
    let servers = one_of(&["\"127.0.0.1:1\"", "[\"[::1]:1\", \"localhost:2\", \"127.0.0.2:3\"]"]);
    let token = keys(vec![("token_file", quoted(&["/t"]))]);
    let user = one_of(&["", "user = \"a\"\npassword_file = \"/p\"\n"]);
    let kube = one_of(&[
        "",
        "kubeconfig = \"/k\"\n",
        "token_file = \"/t\"\n",
        "servers = \"unix:/kube\"\n",
        "servers = \"10.0.0.1:6443\"\ntls = true\ntoken_file = \"/t\"\n",
    ]);
    let consul = (tls.clone(), timeout(), servers.clone(), token).prop_map(
        |(tls, timeout, servers, token)| {
            format!(
                "[registry.main]\nkind = \"consul\"\nservers = {servers}\n{tls}{timeout}{token}"
            )
        },
    );
    let with_user = |name: &'static str, kind: &'static str| {
        (tls.clone(), timeout(), servers.clone(), user.clone()).prop_map(
            move |(tls, timeout, servers, user)| {
                format!(
                    "[registry.{name}]\nkind = \"{kind}\"\nservers = {servers}\n{tls}{timeout}{user}"
                )
            },
        )
    };
    let kubernetes = (kube, timeout()).prop_map(|(keys, timeout)| {
        format!("[registry.k]\nkind = \"kubernetes\"\n{keys}{timeout}")
    });
    (consul, with_user("e", "etcd"), kubernetes, with_user("z", "zookeeper"))
        .prop_map(|(consul, etcd, kubernetes, zookeeper)| consul + &etcd + &kubernetes + &zookeeper)
        .boxed()
}

pub(super) fn dns() -> Drawn {
    keys(vec![
        (
            "servers",
            one_of(&["\"system\"", "\"10.0.0.53:53\"", "[\"10.0.0.53:53\", \"[fd00::53]:53\"]"]),
        ),
        ("hold_nxdomain", time(SECOND, DAY)),
        ("ttl_min", quoted(&["1s", "30s"])),
        ("ttl_max", quoted(&["30s", "5m", "1d"])),
    ])
    .prop_map(|keys| format!("[dns]\n{keys}"))
    .boxed()
}

fn question() -> BoxedStrategy<String> {
    let with = |line: &'static str, rest: Drawn| rest.prop_map(move |keys| format!("{line}{keys}"));
    let file = one_of(&["kind = \"file\"\npath = \"/etc/a b.json\"\n"]);
    let http = keys(vec![
        ("interval", time(SECOND, DAY)),
        ("ca_file", quoted(&["/ca"])),
        ("token_file", quoted(&["/t"])),
    ]);
    let addresses = keys(vec![
        ("record", quoted(&["auto", "address", "srv"])),
        ("family", quoted(&["both", "ipv4", "ipv6"])),
    ]);
    let records = keys(vec![
        ("record", quoted(&["auto", "srv"])),
        ("family", quoted(&["both", "ipv4", "ipv6"])),
        ("port", number(1..=65_535)),
    ]);
    let consul = keys(vec![
        ("tags", one_of(&["\"a\"", "[\"b\", \"c d\"]"])),
        ("datacenter", quoted(&["dc1"])),
        ("namespace", quoted(&["team"])),
        ("filter", one_of(&["'Service.Meta.v == \"2\"'"])),
        ("max_stale", time(1, DAY)),
    ]);
    let kubernetes = keys(vec![
        ("namespace", quoted(&["default", "a-b"])),
        ("port", one_of(&["8080", "\"http\"", "\"8080\""])),
    ]);
    let prefix = keys(vec![("prefix", quoted(&["/", "/a/", "/tidegate/services/web/"]))]);
    let format = keys(vec![("format", quoted(&["json", "curator"]))]);
    prop_oneof![
        file,
        with("kind = \"http\"\nurl = \"https://a.b:1/c?d=e\"\n", http),
        with("kind = \"dns\"\nname = \"db.Internal.\"\nport = 5432\n", addresses),
        with("kind = \"dns\"\nname = \"_pg._tcp.db\"\n", records),
        with("from = \"main\"\nservice = \"web\"\n", consul),
        with("from = \"e\"\n", prefix),
        with("from = \"k\"\nservice = \"web\"\n", kubernetes),
        with("from = \"z\"\npath = \"/services/web\"\n", format),
    ]
    .boxed()
}

/// Draws the keys of `[pool.NAME.discover]`.
pub(super) fn discover() -> Drawn {
    let counts = one_of(&[
        "",
        "min_backends = 1\n",
        "min_backends = 7\nbackends_max = 7\n",
        "backends_max = 200\nempty = \"keep\"\n",
        "min_backends = 0\nempty = \"accept\"\n",
        "empty = \"confirm\"\n",
    ]);
    let ranges = one_of(&[
        "\"0.0.0.0/0\"",
        "[\"fd00::/8\", \"10.0.0.0/8\", \"127.0.0.0/8\"]",
        "[\"10.0.0.0/8\", \"172.16.0.0/12\", \"192.168.0.0/16\", \"100.64.0.0/10\", \"fc00::/7\"]",
    ]);
    let wait = || prop_oneof![quoted(&["0s"]), time(1, 3600 * SECOND)].boxed();
    let guards = keys(vec![
        ("addresses", ranges),
        ("weights", quoted(&["use", "ignore"])),
        ("weight_max", number(1..=1000)),
        ("max_removed", quoted(&["0%", "50%", "100%"])),
        ("confirm_after", time(SECOND, 3600 * SECOND)),
        ("missing", number(1..=100)),
        ("overlap", wait()),
        ("stale_for", prop_oneof![quoted(&["forever"]), time(10 * SECOND, 30 * DAY)].boxed()),
        ("critical", quoted(&["drain", "suspect", "remove"])),
        ("first_wait", wait()),
    ]);
    (question(), counts, guards)
        .prop_map(|(question, counts, guards)| question + &counts + &guards)
        .boxed()
}

//! Property test: random valid files over all keys are written as texts with the same
//! model.

use super::*;
use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::TestRunner;
use std::collections::BTreeSet;

mod discovery;

/// A strategy of values as TOML text.
type Drawn = BoxedStrategy<String>;

const POOLS: [&str; 3] = ["web", "a.b", "-0_"];

/// Pools of the roles of one database.
const ROLES: &str = "[pool.rw]
of = \"db\"
role = \"primary\"
[pool.db]
probe.kind = \"redis\"
backend = [{ address = \"127.0.0.1:9\" }]
[pool.ro]
of = \"db\"
role = \"replica\"
balance = \"random\"
";

fn one_of(values: &'static [&'static str]) -> Drawn {
    prop::sample::select(values).prop_map(str::to_owned).boxed()
}

fn quoted(values: &'static [&'static str]) -> Drawn {
    prop::sample::select(values).prop_map(|text| format!("\"{text}\"")).boxed()
}

fn number(range: std::ops::RangeInclusive<u32>) -> Drawn {
    let (min, max) = (*range.start(), *range.end());
    prop_oneof![Just(min), Just(max), range].prop_map(|number| number.to_string()).boxed()
}

/// Draws a duration from `min` to `max`, in milliseconds.
fn time(min: u64, max: u64) -> Drawn {
    let round = (min..=max).prop_map(move |time| (time / 1000 * 1000).max(min));
    prop_oneof![Just(min), Just(max), min..=max, round]
        .prop_map(|time| format!("\"{time}ms\""))
        .boxed()
}

fn timer(min: u64, max: u64) -> Drawn {
    prop_oneof![1 => quoted(&["off"]), 3 => time(min, max)].boxed()
}

fn flag() -> Drawn {
    one_of(&["true", "false"])
}

/// Draws a subset of these keys, one per line.
fn keys(keys: Vec<(&'static str, Drawn)>) -> Drawn {
    let line = |(key, value): (&'static str, Drawn)| {
        prop::option::of(value.prop_map(move |value| format!("{key} = {value}\n")))
    };
    let lines: Vec<_> = keys.into_iter().map(line).collect();
    lines.prop_map(|lines| lines.into_iter().flatten().collect()).boxed()
}

const SECOND: u64 = 1000;
const DAY: u64 = 24 * 3600 * SECOND;
const COUNT: std::ops::RangeInclusive<u32> = 0..=10_000_000;

fn globals() -> Drawn {
    let account = one_of(&["", "user = \"www-data\"\n", "user = \"7\"\ngroup = \"x_y\"\n"]);
    let process = keys(vec![
        ("workers", prop_oneof![quoted(&["auto"]), number(1..=256)].boxed()),
        ("pin", flag()),
        ("engine", quoted(&["auto", "io_uring", "epoll"])),
        ("spin", quoted(&["off", "1us", "50us", "1ms", "999us999ns"])),
        ("leave_delay", prop_oneof![quoted(&["0s"]), time(1, 30 * DAY)].boxed()),
        ("drain_timeout", time(1, 30 * DAY)),
        ("upgrade_timeout", time(SECOND, 50 * SECOND)),
        ("connections_max", number(1..=10_000_000)),
        ("buffers_max", quoted(&["1MiB", "1048577B", "256MiB", "1TiB", "3GiB"])),
        ("state", quoted(&["off", "/var/lib/tidegate"])),
        ("sandbox", quoted(&["auto", "on", "off"])),
        ("probe_helper", flag()),
    ]);
    let listen = one_of(&[
        "",
        "listen = \"unix:/tmp/a b\"\n",
        "listen = \"127.0.0.1:9900\"\n",
        "listen = \"[::1]:9900\"\ntoken_file = \"t\"\n",
        "listen = \"0.0.0.0:9900\"\ntoken_file = '/etc/\"t\\é'\n",
        "listen = \"0.0.0.0:9900\"\nread_token_file = \"r\"\n",
    ]);
    let admin = keys(vec![("backend_metrics_max", number(0..=1_000_000))]);
    let log = keys(vec![
        ("level", quoted(&["error", "warn", "info", "debug", "trace"])),
        ("format", quoted(&["text", "json"])),
        ("target", quoted(&["stderr", "syslog:/dev/log", "syslog:tcp:[::1]:601"])),
        ("facility", quoted(&["user", "daemon", "local3"])),
        ("access_facility", quoted(&["daemon", "local0", "local7"])),
        (
            "access",
            quoted(&[
                "off",
                "stdout",
                "syslog:udp:192.0.2.1:514",
                "syslog:unix:/a'b",
                "./a'b",
                "/var/log/\\\"x\\\\\\u007f",
            ]),
        ),
    ]);
    (process, account, admin, listen, log)
        .prop_map(|(process, account, admin, listen, log)| {
            format!("[process]\n{process}{account}[admin]\n{admin}{listen}[log]\n{log}")
        })
        .boxed()
}

fn sources() -> Drawn {
    let lists = keys(vec![
        ("allow", one_of(&["[]", "\"10.0.0.0/8\"", "[\"::/0\", \"10.0.0.0/7\", \"::/0\"]"])),
        ("deny", one_of(&["[]", "\"10.1.2.3\"", "[\"2001:db8::/32\", \"::ffff:11.0.0.0/104\"]"])),
        ("allow_file", quoted(&["/etc/allow", "a b"])),
        ("deny_file", quoted(&["/etc/deny"])),
    ]);
    let rate = quoted(&["off", "100/s", "7/s", "999999/s", "60/m", "7/m", "1000000/h", "1/h"]);
    let rate = (rate, prop::option::of(number(1..=1_000_000))).prop_map(|(rate, burst)| {
        let burst = burst.map_or(String::new(), |burst| format!("burst = {burst}\n"));
        format!("rate = {rate}\n{burst}")
    });
    let caps = number(COUNT).prop_map(|max| format!("connections_max = {max}\n"));
    let limits = prop_oneof![rate.clone(), caps.clone(), (rate, caps).prop_map(|(a, b)| a + &b)];
    let prefixes = keys(vec![("prefix_v4", number(0..=32)), ("prefix_v6", number(0..=128))]);
    let limits = (limits, prefixes).prop_map(|(limits, prefixes)| limits + &prefixes);
    let limits = prop_oneof![Just(String::new()), limits];
    (lists, limits).prop_map(|(lists, limits)| lists + &limits).boxed()
}

/// Routes that do not cover each other. `;` ends a line.
const ROUTES: [&str; 4] = [
    "sources = \"10.0.0.0/9\";ports = \"N0-N9\";refuse = true",
    "sources = [\"10.0.0.0/8\", \"fd00::/8\", \"::1\"];pool = \"web\"",
    "sources = \"0.0.0.0/0\";ports = [N1, \"N1-N2\"];pool = \"a.b\"",
    "ports = N1;refuse = true;sources = \"2001:db8::/32\"",
];

/// Draws the frontend of that number. Its ports are unique.
fn frontend(number_of_it: usize) -> Drawn {
    let bind = one_of(&[
        "\"0.0.0.0:N1\"",
        "[\"*:N1\"]",
        "{ address = \"192.0.2.1:N1\", freebind = true }",
        "[\"[::]:N1\", \"127.0.0.1:N2\", \"127.0.0.1:N1\", \"*:N3\"]",
        "[{ address = \"*:N1\" }, { address = \"[fe80::1%3]:N2\", freebind = true }]",
        "{ address = \"*:N1-N5\", interface = \"eth0\", backlog = 7, mark = 4294967295, dscp = 63 }",
        "[\"0.0.0.0:N1\", \"unix:/run/N1.sock\", { address = \"unix:/run/N2.sock\", mode = \"0666\", backlog = 7 }]",
        "[\"unix:@N1\", \"*:N1-N5\", \"unix:/N1-N3\"]",
        "[\"0.0.0.0:N1\", { address = \"unix:/run/N1.sock\", proxy_protocol = true }]",
    ]);
    // Together they are an error.
    let first = match number_of_it % 2 {
        0 => ("client_first", timer(1, 30 * DAY)),
        _ => ("first_byte_timeout", timer(1, 30 * DAY)),
    };
    let keys = keys(vec![
        first,
        ("idle_timeout", timer(1, 30 * DAY)),
        ("half_closed_timeout", timer(1, 30 * DAY)),
        ("session_max", timer(1, 30 * DAY)),
        ("stalled_timeout", timer(SECOND, 32_767 * SECOND)),
        ("keepalive", quoted(&["off", "1s", "1m", "32767s"])),
        ("user_timeout", timer(1, 24 * DAY)),
        ("download_rate", quoted(&["off", "1KiB/s", "1500B/s", "1TiB/s"])),
        ("upload_rate", quoted(&["off", "3MiB/s"])),
        ("connections_max", number(COUNT)),
        // The model has no disabled parts, so nothing writes `false`.
        ("enabled", one_of(&["true"])),
    ]);
    let headers = self::keys(vec![
        ("others", quoted(&["refuse", "direct"])),
        ("timeout", quoted(&["3s", "10ms", "1m"])),
    ]);
    let from = one_of(&["\"10.0.0.0/8\"", "[\"::1\", \"192.0.2.1\"]"]);
    let headers = (from, headers).prop_map(|(from, keys)| format!("from = {from}\n{keys}"));
    let sources = (prop::option::of(sources()), prop::option::of(headers));
    let routes = prop::sample::subsequence(&ROUTES[..], 0..=ROUTES.len());
    let routes = routes.prop_map(|routes| {
        let text = |route: &str| format!("[[frontend.fN0.route]]\n{}\n", route.replace(';', "\n"));
        routes.into_iter().map(text).collect::<String>()
    });
    (bind, prop::sample::select(&POOLS[..]), keys, sources, routes)
        .prop_map(move |(bind, pool, keys, (sources, headers), routes)| {
            let bind = match headers {
                Some(_) => "[{ address = \"0.0.0.0:N8\", proxy_protocol = true }, \"0.0.0.0:N1\"]"
                    .to_owned(),
                None => bind,
            };
            let bind = bind.replace('N', &format!("{}", 100 + number_of_it));
            let mut text =
                format!("[frontend.f{number_of_it}]\nbind = {bind}\npool = \"{pool}\"\n{keys}");
            if let Some(headers) = headers {
                text += &format!("[frontend.f{number_of_it}.proxy_protocol]\n{headers}");
            }
            if let Some(sources) = sources {
                text += &format!("[frontend.f{number_of_it}.sources]\n{sources}");
            }
            let routes = routes.replace("fN0", &format!("f{number_of_it}"));
            text + &routes.replace('N', &format!("{}", 100 + number_of_it))
        })
        .boxed()
}

fn probe() -> Drawn {
    let send_expect = keys(vec![(
        "send",
        one_of(&["''", r#""PING\r\n""#, r#""\"\\\t\u0001\u00e9'''""#, "{ hex = 'ff00' }"]),
    )]);
    let expect = one_of(&[
        r#""+PONG""#,
        r#"{ starts = "\n" }"#,
        r#"{ contains = "a\"'b\u007f" }"#,
        "{ regex = 'a|\\xff' }",
        "{ hex = 'ff 0a' }",
        "{ hex = '61' }",
    ]);
    let send_expect = (send_expect, expect)
        .prop_map(|(send, expect)| format!("kind = \"send-expect\"\n{send}expect = {expect}\n"));
    let http = keys(vec![
        ("path", quoted(&["/", "/health?a=b"])),
        ("host", quoted(&["www.example.com"])),
        ("method", quoted(&["GET", "HEAD", "'"])),
        ("status", quoted(&["200-399", "200", "100-299, 304,500-500"])),
        ("http", quoted(&["1.0", "1.1"])),
        ("headers", one_of(&["{ A = 'b' }", "{ X-Y = 'a \"b\"', A = '' }"])),
        ("expect", one_of(&["'x'", "{ contains = 'x' }", "{ starts = '200' }"])),
    ]);
    let http = http.prop_map(|keys| format!("kind = \"http\"\n{keys}"));
    let kind = prop_oneof![
        one_of(&["", "kind = \"tcp\"\n"]),
        send_expect,
        http,
        one_of(&[
            "kind = 'exec'\ncommand = ['/c', \"{port} \\u0001'\"]\n",
            "kind = 'exec'\ncommand = ['/c']\nexit_codes = 'nagios'\n",
        ]),
        one_of(&["kind = 'redis'\n", "kind = 'redis'\nuser = 'a'\npassword_file = '/p'\n",]),
        one_of(&[
            "kind = 'postgres'\n",
            "kind = 'postgres'\nuser = 'a'\npassword_file = '/p'\ndatabase = 'b'\n",
            "kind = 'mysql'\n",
            "kind = 'mysql'\nuser = 'a'\npassword_file = '/p'\n",
            "kind = 'smtp'\n",
            "kind = 'ldap'\n",
            "kind = 'agent'\n",
            "kind = 'agent'\nsend = 'a'\n",
            "kind = 'dns'\nname = 'a.b.'\n",
            "kind = 'dns'\nname = '.'\nrecord = 'soa'\ntransport = 'tcp'\nrcode = 'any'\n",
        ]),
        one_of(&[
            "kind = 'steps'\nsteps = [{ send = 'a' }, { expect = { contains = 'b' } }, { send = { hex = 'ff' } }]\n"
        ])
    ];
    let counts = keys(vec![("rise", number(1..=100)), ("fall", number(1..=100))]);
    let time = prop_oneof![10u64..3000, 10u64..=30 * DAY];
    let times = (prop::collection::vec(time, 3), prop::array::uniform3(any::<bool>())).prop_map(
        |(mut times, given)| {
            // Sorted, because timeout <= fast_interval <= interval.
            times.sort_unstable();
            let longest = if given[2] { times[2] } else { 2 * SECOND };
            let times = ["timeout", "fast_interval", "interval"].into_iter().zip(times).zip(given);
            let given = times.filter(|(_, given)| *given);
            given.map(|((key, time), _)| format!("{key} = \"{}ms\"\n", time.min(longest))).collect()
        },
    );
    let target = keys(vec![
        // With an address, because a port alone has no effect if all backends are Unix sockets.
        ("port", one_of(&["1\naddress = '192.0.2.9'", "65535\naddress = '::1'"])),
        ("source", quoted(&["192.0.2.8", "127.0.0.1"])),
        (
            "tls",
            one_of(&[
                "true",
                "{ verify = 'off' }",
                "{ verify = '/ca.pem', name = 'a.b', alpn = ['h2'] }",
            ]),
        ),
        ("down_interval", one_of(&["'30d'"])),
    ]);
    (kind, target, counts, times)
        .prop_map(|(kind, target, counts, times): (_, _, _, String)| {
            let target = if kind.contains("exec") { String::new() } else { target };
            let port = match kind.contains("agent") && !target.contains("port") {
                true => "port = 9\naddress = '192.0.2.9'\n",
                false => "",
            };
            kind + port + &target + &counts + &times
        })
        .boxed()
}

fn heartbeat() -> Drawn {
    let others = keys(vec![
        ("register", flag()),
        ("require", flag()),
        ("forget_after", time(1, 30 * DAY)),
        ("backends_max", number(1..=10_000)),
        ("weight_max", number(1..=1000)),
    ]);
    let interval = one_of(&["", "interval = '20ms'\n", "interval = '3333ms'\n"]);
    let ttl = one_of(&["", "ttl = '10s'\n", "ttl = '30d'\n"]);
    (others, interval, ttl).prop_map(|(others, interval, ttl)| others + &interval + &ttl).boxed()
}

fn backend() -> Drawn {
    let keys = keys(vec![
        ("weight", number(1..=1000)),
        ("connections_max", number(COUNT)),
        ("enabled", one_of(&["true"])),
    ]);
    let address = one_of(&[
        "192.0.2.N:80",
        "[2001:db8::N]:80",
        "[fe80::N%2]:80",
        "unix:/run/é N",
        "unix:@N",
        "db-N.Internal:080",
        "srv:_pg._tcp.bN.",
    ]);
    let tier = one_of(&[
        "",
        "backup = true\n",
        "backup = false\n",
        "tier = 1\n",
        "tier = 9\n",
        "tier = 0\nbackup = false\n",
    ]);
    (address, any::<bool>(), keys, tier)
        .prop_map(|(address, named, keys, tier)| {
            let name = if named { "name = \"b.N\"\n" } else { "" };
            format!("{name}address = \"{address}\"\n{keys}{tier}")
        })
        .boxed()
}

/// Draws a pool, and whether it expects heartbeats.
fn pool(name: &'static str) -> BoxedStrategy<(String, bool)> {
    let keys = keys(vec![
        (
            "balance",
            quoted(&[
                "weighted-round-robin",
                "least-connections",
                "random",
                "two-choices",
                "peak-ewma",
                "source-hash",
            ]),
        ),
        ("hash_slots", one_of(&["20_011", "65_537", "5_000_011"])),
        ("source", one_of(&["[]", "\"10.0.0.5\"", "[\"10.0.0.6\", \"2001:db8::7\"]"])),
        ("connect_timeout", time(1, 30 * DAY)),
        ("connect_attempts", number(1..=16)),
        (
            "queue_max",
            prop_oneof![
                number(0..=1_000_000),
                one_of(&[
                    "7\nwhen_none_eligible = \"wait\"",
                    "0\nwhen_none_eligible = \"try-all\"",
                    "0\nwhen_none_eligible = \"refuse\"",
                ]),
            ]
            .boxed(),
        ),
        ("queue_timeout", prop_oneof![quoted(&["5s", "30s"]), time(1, 30 * DAY)].boxed()),
        ("startup_grace", time(1, 30 * DAY)),
        ("on_removal", quoted(&["keep", "close-after 30s", "close-after 1ms"])),
        ("backups", quoted(&["all", "one"])),
        ("on_down", quoted(&["keep", "reset", "close-after 5s"])),
        ("slow_start", timer(100, 3600 * SECOND)),
        (
            "proxy_protocol",
            one_of(&[
                "\"off\"",
                "\"v1\"",
                "\"v2\"",
                "{ version = \"v2\", crc32c = true }",
                "{ version = \"v2\", send = [\"alpn\", \"unique-id\"], pass = [0xEA, \"0xE0-0xE8\"] }",
            ]),
        ),
    ]);
    let ejection = self::keys(vec![
        ("failures", number(1..=1000)),
        ("time", time(1, 30 * DAY)),
        ("max_ejected", quoted(&["0%", "50%", "100%"])),
        ("early_resets", flag()),
        ("slow_first_byte", timer(100, 30 * DAY)),
    ]);
    let ejection = prop_oneof![
        one_of(&["", "ejection = \"off\"\n"]),
        ejection.prop_map(move |keys| format!("[pool.\"{name}\".ejection]\n{keys}")),
    ];
    let backends = prop::collection::vec(backend(), 1..4);
    let (probe, heartbeat) = (prop::option::of(probe()), prop::option::of(heartbeat()));
    let discover = prop::option::of(discovery::discover());
    let tiers = one_of(&[
        "",
        "tiers = \"spill\"\n",
        "tiers = \"strict\"\non_recover = \"close-after 5s\"\n",
        "on_recover = \"keep\"\n",
    ]);
    (keys, ejection, probe, heartbeat, discover, backends, tiers)
        .prop_map(move |(keys, ejection, probe, heartbeat, discover, backends, tiers)| {
            // Without a source, all backends can be of one tier.
            let valid = discover.is_some()
                && !(tiers.contains("spill") && keys.contains("backups = \"one\""));
            let tiers = if valid { &*tiers } else { "" };
            let mut text = format!("[pool.\"{name}\"]\n{keys}{tiers}{ejection}");
            let tables = [("probe", &probe), ("heartbeat", &heartbeat), ("discover", &discover)];
            for (table, keys) in tables {
                if let Some(keys) = keys {
                    text += &format!("[pool.\"{name}\".{table}]\n{keys}");
                }
            }
            let registers = heartbeat.as_ref().is_some_and(|keys| keys.contains("register = true"));
            let least = if registers || discover.is_some() { 1 } else { 0 };
            for (number, keys) in backends.iter().enumerate().skip(least) {
                let keys = keys.replace('N', &(number + 1).to_string());
                text += &format!("[[pool.\"{name}\".backend]]\n{keys}");
            }
            (text, heartbeat.is_some())
        })
        .boxed()
}

/// Returns `[heartbeat]` with a key for these pools, or nothing if the list is empty.
fn receiver(pools: &[&str], listen: &str, id: &str) -> String {
    if pools.is_empty() {
        return String::new();
    }
    format!(
        "[heartbeat]\nlisten = {listen}\n[[heartbeat.key]]\nid = {id}\nfile = \"/etc/hb key\"\n\
         pools = {pools:?}\naddresses = [\"10.0.0.0/8\", \"::1\"]\n"
    )
}

fn file() -> Drawn {
    let frontends = (1..4usize).prop_flat_map(|count| (0..count).map(frontend).collect::<Vec<_>>());
    let pools = POOLS.map(pool);
    let listen = one_of(&["\"0.0.0.0:7946\"", "[\"127.0.0.1:7946\", \"[::1]:7946\"]"]);
    let sources = (discovery::registries(), discovery::dns());
    (globals(), frontends, pools, listen, number(1..=u32::MAX), sources)
        .prop_map(|(globals, frontends, pools, listen, id, (registries, dns))| {
            let with = pools.iter().zip(POOLS).filter(|((_, heartbeats), _)| *heartbeats);
            let with: Vec<&str> = with.map(|(_, name)| name).collect();
            let pools: String = pools.iter().map(|(text, _)| text.as_str()).collect();
            let receiver = receiver(&with, &listen, &id);
            // Only a helper runs commands.
            let globals = match pools.contains("'exec'") {
                true => globals
                    .replace("probe_helper = false\n", "")
                    .replace("probe_helper = true\n", "")
                    .replace("[process]\n", "[process]\nprobe_helper = true\n"),
                false => globals,
            };
            globals + &frontends.concat() + &pools + ROLES + &receiver + &registries + &dns
        })
        .boxed()
}

proptest! {
    #[test]
    fn random_file_is_written_as_a_text_with_the_same_model(text in file()) {
        written_from(&text);
    }
}

/// Returns the names of keys and tables in a text, including those in commented examples.
fn names(text: &str) -> BTreeSet<&str> {
    let lines = text.lines().map(|line| line.trim_start_matches(['#', ' ']));
    let keys = lines.clone().filter_map(|line| line.split_once(" = ").map(|(key, _)| key));
    let headers = lines.filter(|line| line.starts_with('['));
    let headers =
        headers.filter_map(|line| line.trim_matches(['[', ']', '"']).rsplit(['.', '"']).next());
    let is_name = |name: &&str| name.bytes().all(|b| b.is_ascii_lowercase() || b"_46".contains(&b));
    keys.chain(headers).filter(is_name).collect()
}

#[test]
fn every_key_of_the_full_file_is_drawn() {
    let full = std::fs::read_to_string(root().join("config/full.toml")).unwrap();
    let mut runner = TestRunner::deterministic();
    let texts = (0..200).map(|_| file().new_tree(&mut runner).unwrap().current());
    let texts = texts.collect::<String>();
    let missing: Vec<_> = names(&full).difference(&names(&texts)).copied().collect();
    assert!(missing.is_empty(), "never drawn: {missing:?}");
}

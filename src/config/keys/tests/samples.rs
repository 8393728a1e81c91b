//! Samples of values that the tables describe in words: good ones, then bad ones.

use super::{RECEIVED_HEADERS, strings};

/// Good and bad values that the table describes in words: lengths of texts and lists, and the
/// forms that are named.
pub(super) fn forms(header: &str, name: &str) -> (Vec<String>, Vec<String>) {
    let text = |start: &str, bytes: usize| format!("'{start}{}'", "x".repeat(bytes - start.len()));
    let list = |count: usize, each: fn(usize) -> String| {
        format!("[{}]", (1..=count).map(each).collect::<Vec<_>>().join(", "))
    };
    let bounded = |start, min: usize, max: usize| {
        let mut bad = vec![text(start, max + 1)];
        bad.extend((min > 0).then(|| "''".to_owned()));
        (vec![text(start, min.max(start.len())), text(start, max)], bad)
    };
    let words: (&[&str], &[&str]) = match name {
        "proxy_protocol" => (
            &["'off'", "'v2'", "{ version = 'v1' }"],
            &["'v3'", "2", "{}", "{ version = 'v1', send = [] }"],
        ),
        "send" if header == "proxy_protocol" => (
            &["['authority', 'alpn', 'ssl', 'unique-id']"],
            &["['sni']", "'alpn'", "['alpn', 'alpn']"],
        ),
        "pass" => (
            &["[0xEA, '0xE0-0xE8', '0xF0']"],
            &["[256]", "['0x03']", "['0x00-0x10']", "['0xEF-0xE0']", "['E0']", "'0xE0'"],
        ),
        "from" if header == RECEIVED_HEADERS => {
            (&["'10.0.0.0/8'", "['::1', '192.0.2.1']"], &["[]", "'10.0.0.1/8'", "1"])
        }
        "download_rate" | "upload_rate" => (
            &["'off'", "'1KiB/s'", "'1TiB/s'"],
            &["'1023B/s'", "'1025GiB/s'", "'1MiB'", "'1MB/s'", "1"],
        ),
        "command" => {
            let each = |number| if number == 1 { "'/c'".to_owned() } else { "'{port}'".to_owned() };
            let long = |bytes| format!("['/c', {}]", text("", bytes));
            let bad = ["'/c'", "[]", "['c']", "['/{pool}']", "[1]"].map(str::to_owned);
            let bad = bad.into_iter().chain([list(65, each), long(8_191)]);
            return (vec![list(64, each), long(8_190)], bad.collect());
        }
        "send" => return bounded("", 0, 4_096),
        "starts" | "contains" => return bounded("", 1, 1_024),
        "path" if header == "[pool.NAME.discover]" => (&["'/a'"], &["'/a/'", "''"]),
        "path" => return bounded("/", 1, 2_048),
        "host" => return bounded("", 1, 255),
        "method" => return bounded("", 1, 32),
        "listen" if header == "[heartbeat]" => {
            let each = |number| format!("'127.0.0.{number}:9'");
            return (vec![list(16, each)], vec![list(17, each)]);
        }
        "addresses" if matches!(header, "[[heartbeat.key]]" | "[pool.NAME.discover]") => {
            let each = |number| format!("'10.0.0.{number}'");
            return (vec![list(64, each)], vec![list(65, each)]);
        }
        "servers" => {
            let most = if header == "[dns]" { 8 } else { 16 };
            let each = |number| format!("'127.0.0.{number}:9'");
            return (vec![list(most, each)], vec![list(most + 1, each), "'10.0.0.5'".to_owned()]);
        }
        "tags" => {
            let each = |number| format!("'{number}'");
            return (vec![list(16, each)], vec![list(17, each)]);
        }
        "service" | "datacenter" | "filter" => return bounded("", 1, 1_024),
        "user" if header == "[registry.NAME]" => return bounded("", 1, 256),
        "user" | "database" if header == "[pool.NAME.probe]" => return bounded("", 1, 64),
        "prefix" => (&["'/'", "'a/'"], &["'/a'", "''"]),
        "namespace" => (&["'default'"], &["''", "'A b'"]),
        "name" if header == "[pool.NAME.discover]" => {
            (&["'db'", "'db.internal.'", "'_pg._tcp.db'"], &["''", "'a b'", "'10.0.0.1'", "'a:1'"])
        }
        "port" => (&["1", "65535"], &["0", "65536", "'http'"]),
        "url" => (
            &["'http://a'", "'https://[::1]:1/a?b'"],
            &["'a'", "'ftp://a/'", "'http://u@a/'", "'http://a:0/'"],
        ),
        "server_name" => (&["'a.b'", "'10.0.0.1'", "'::1'"], &["''", "'a:1'"]),
        "from" => (&["'x'"], &["'y'", "1"]),
        "source" => {
            let each = |number| format!("'10.0.0.{number}'");
            return (vec![list(64, each)], vec![list(65, each)]);
        }
        "status" => {
            let each = |number| format!("{}", 199 + number);
            let codes =
                |count| format!("'{}'", (1..=count).map(each).collect::<Vec<_>>().join(","));
            return (
                vec![codes(32), "'100-599'".to_owned()],
                vec![codes(33), "'99-200'".to_owned(), "'200-600'".to_owned()],
            );
        }
        "user" => (&["'tidegate'", "'7'"], &["'root'", "'0'"]),
        "group" => (&["'tidegate'", "'7'"], &["'a b'"]),
        "state" => (&["'off'", "'/var/lib/tidegate'"], &["'relative'"]),
        "listen" => (&["'unix:/a'", "'127.0.0.1:9'"], &["'127.0.0.1'"]),
        "token_file" | "read_token_file" | "allow_file" | "deny_file" | "file" | "ca_file"
        | "cert_file" | "key_file" | "password_file" | "kubeconfig" => (&["'/a'"], &["'/a/'"]),
        "target" => (
            &["'stderr'", "'syslog:/dev/log'", "'syslog:udp:192.0.2.1:514'"],
            &["'syslog'", "'syslog:log'", "'syslog:tcp:host:1'"],
        ),
        "access" => (
            &["'off'", "'stdout'", "'./file'", "'syslog:unix:/x'", "'syslog:tcp:[::1]:601'"],
            &["'file'", "'syslog:unix:x'"],
        ),
        "bind" => (
            &["'[::1]:1'", "['*:1', { address = '127.0.0.1:2' }]", "['[::1]:1', 'unix:/x.sock']"],
            &["'127.0.0.1:65536'", "'127.0.0.1'", "'unix:'"],
        ),
        "address" if header.contains("probe") => {
            (&["'192.0.2.7'", "'::1'"], &["'192.0.2.7:1'", "'localhost'"])
        }
        "address" if header == "bind" => {
            (&["'192.0.2.7:1'", "'[::1]:1-9'", "'*:1-9'"], &["'localhost:1'", "'192.0.2.7:9-1'"])
        }
        "mode" => (&["'0666'", "'600'"], &["'0o660'", "'444'", "'1777'"]),
        "interface" => (&["'lo'"], &["''", "'a b'", "'0123456789abcdef'"]),
        "address" => (
            &["'192.0.2.7:1'", "'localhost:1'", "'srv:_a._tcp.b'", "'unix:@a'"],
            &[
                "'192.0.2.7:+65535'",
                "'192.0.2.7:+x'",
                "'192.0.2.256:1'",
                "'a'",
                "'srv:a:1'",
                "'a b:1'",
            ],
        ),
        "pool" | "pools" => (&["'x'"], &["1"]),
        "sources" | "addresses" | "allow" | "deny" => {
            (&["'127.0.0.0/8'", "['127.0.0.1']"], &["'127.0.0.0/33'"])
        }
        "ports" => (&["1", "'1-9'", "[1]"], &["0", "65536", "'9-1'"]),
        "rate" => (
            &["'off'", "'1/s'", "'1000000/s'", "'30/m'", "'500/h'"],
            &["'0/s'", "'1000001/s'", "'1/d'"],
        ),
        "ejection" => (&["'off'"], &["'on'"]),
        "expect" => (&["'x'", "{ contains = 'x' }"], &["''", "{ starts = 'x', contains = 'x' }"]),
        "steps" => (
            &["[{ send = 'x' }, { expect = 'y' }]", "[{ expect = { regex = 'a|b' } }]"],
            &["[]", "[{ send = 'x' }]", "[{ send = 'x', expect = 'y' }]", "'x'", "[1]"],
        ),
        "headers" => (
            &["{ A = 'b c' }", "{}"],
            &["{ 'a b' = 'c' }", "{ Host = 'a' }", "{ A = \"b\\r\\nC: d\" }", "{ A = 1 }"],
        ),
        "on_down" => (
            &["'keep'", "'reset'", "'close-after 5s'"],
            &["'close'", "'close-after 0s'", "'close-after 31d'"],
        ),
        "of" => (&["'other'"], &["'x'", "'nowhere'", "1"]),
        "tls" => (&["true", "false", "{ verify = 'off' }"], &["'on'", "{ verify = 'on' }"]),
        "verify" => (&["'system'", "'off'", "'./ca.pem'", "'/ca'"], &["'on'", "'/ca/'"]),
        "alpn" => {
            let each = |number| format!("'p{number}'");
            return (vec!["'h2'".to_owned(), list(8, each)], vec![list(9, each), "''".to_owned()]);
        }
        "regex" => (&["'a+'", "'(?i)ok'"], &["'a('", "'a*'", "''"]),
        "hex" => (&["'0a ff'"], &["'0'", "'0g'", "''", "'+1'"]),
        "name" => (&["'a'"], &["''", "'a b'"]),
        name => panic!("no samples of {name}"),
    };
    (strings(words.0), strings(words.1))
}

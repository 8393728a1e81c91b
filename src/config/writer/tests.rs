//! Tests of the writer against the reader: omitted keys, the form of every kind of value,
//! and the files that the configuration names.

use super::*;
use expect_test::expect;
use std::path::{Path, PathBuf};

mod drawn;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// Returns the written text. Checks that it is read as the same model and that this model
/// gives the same text.
#[track_caller]
fn written(config: &Config) -> String {
    let text = write(config);
    let again = crate::parse(&text, "written").unwrap_or_else(|why| panic!("{why}\nin\n{text}"));
    assert_eq!(again, *config, "\n{text}");
    assert_eq!(write(&again), text);
    text
}

#[track_caller]
fn written_from(text: &str) -> String {
    written(&crate::parse(text, "given").unwrap_or_else(|why| panic!("{why}\nin\n{text}")))
}

#[test]
fn keys_equal_to_their_default_are_left_out() {
    let sparse = expect![[r#"
        [frontend.web]
        bind = ["0.0.0.0:8080"]
        pool = "web"

        [pool.web.probe]

        [[pool.web.backend]]
        address = "10.0.0.11:8080"
    "#]];
    let full = std::fs::read_to_string(root().join("config/full.toml")).unwrap();
    let unnamed = full.replace("name = \"a\"", "");
    sparse.assert_eq(&written_from(&unnamed));
}

#[test]
fn every_kind_of_value_has_its_form() {
    expect![[r#"
        [process]
        workers = 4
        spin = "50us"
        buffers_max = "1GiB"

        [frontend.web]
        bind = ["*:80", { address = "192.0.2.1:443", interface = "eth1", freebind = true, backlog = 7, mark = 9, dscp = 46 }, "[fe80::1%3]:81-83"]
        pool = "db.main"
        idle_timeout = "off"
        keepalive = "1m30s"

        [frontend.web.sources]
        allow = ["10.0.0.0/8"]
        deny = ["10.1.2.3/32"]
        prefix_v4 = 24
        connections_max = 0

        [pool."db.main"]
        source = ["10.0.0.5"]
        connect_timeout = "2s"
        queue_max = 10
        queue_timeout = "5s"
        on_removal = "close-after 30s"

        [pool."db.main".probe]
        kind = "send-expect"
        send = """
        PING\r
        """
        expect = { contains = "role:master" }
        fast_interval = "200ms"

        [pool."db.main".ejection]
        max_ejected = "10%"
        slow_first_byte = "off"

        [pool."db.main".heartbeat]

        [[pool."db.main".backend]]
        name = "a"
        address = "unix:/run/db"

        [heartbeat]
        listen = ["0.0.0.0:7946"]

        [[heartbeat.key]]
        id = 1
        file = "/etc/tidegate/hb.key"
        pools = ["db.main"]
        addresses = ["10.0.0.0/8"]
    "#]]
    .assert_eq(&written_from(
        r#"
        process = { workers = 4, spin = "50us", buffers_max = "1024MiB", pin = true }
        frontend.web.bind = ["*:80", { address = "192.0.2.1:443", freebind = true, interface = "eth1", backlog = 7, mark = 9, dscp = 46 }, "[fe80::1%3]:81-82", "[fe80::1%3]:83"]
        frontend.web.pool = "db.main"
        frontend.web.idle_timeout = "off"
        frontend.web.keepalive = "90s"
        frontend.web.sources = { allow = "10.0.0.0/8", deny = "10.1.2.3", prefix_v4 = 24, rate = "off" }
        [pool."db.main"]
        source = "10.0.0.5"
        connect_timeout = "2s"
        queue_max = 10
        queue_timeout = "5s"
        on_removal = "close-after 30s"
        ejection = { max_ejected = "10%", slow_first_byte = "off" }
        probe = { kind = "send-expect", send = "PING\r\n", expect.contains = "role:master", fast_interval = "200ms", timeout = "200ms" }
        heartbeat = { weight_max = 100 }
        [[pool."db.main".backend]]
        name = "a"
        address = "unix:/run/db"
        [heartbeat]
        listen = "0.0.0.0:7946"
        [[heartbeat.key]]
        id = 1
        file = "/etc/tidegate/hb.key"
        pools = "db.main"
        addresses = "10.0.0.0/8"
        "#,
    ));
}

#[test]
fn every_valid_file_is_written_as_a_text_with_the_same_model() {
    let mut count = 0;
    for directory in ["config", "tests/config_cases/valid"] {
        for entry in std::fs::read_dir(root().join(directory)).unwrap() {
            let path = entry.unwrap().path();
            if path.extension().is_some_and(|extension| extension == "toml") {
                written_from(&std::fs::read_to_string(&path).unwrap());
                count += 1;
            }
        }
    }
    assert!(count >= 18, "only {count} files");
}

#[test]
fn written_text_names_files_and_holds_no_secret() {
    use std::os::unix::fs::OpenOptionsExt;
    let directory = std::env::temp_dir().join(format!("tidegate-writer-{}", std::process::id()));
    std::fs::create_dir_all(&directory).unwrap();
    let file = |name: &str, text: &str| {
        let path = directory.join(name);
        let mut options = std::fs::OpenOptions::new();
        let mut file = options.create(true).write(true).mode(0o600).open(&path).unwrap();
        std::io::Write::write_all(&mut file, text.as_bytes()).unwrap();
        path
    };
    let secret = "0123456789abcdefghijklmnopqrstuvwxyz";
    let key = file("key", secret);
    let allow = file("allow", "192.0.2.0/24\n");
    let given = format!(
        r#"
        frontend.x = {{ bind = "127.0.0.1:1", pool = "x", sources.allow_file = {allow:?} }}
        pool.x.heartbeat.register = true
        [heartbeat]
        listen = "127.0.0.1:1"
        key = [{{ id = 1, file = {key:?}, pools = "x", addresses = "127.0.0.1" }}]
        "#
    );
    let first = crate::load(&file("given.toml", &given)).unwrap();
    let text = write(&first.config);
    assert!(!text.contains(secret) && !text.contains("192.0.2.0"), "{text}");
    let second = crate::load(&file("written.toml", &text)).unwrap();
    std::fs::remove_dir_all(&directory).unwrap();
    assert_eq!(second.config, first.config);
}

//! Configuration files: valid files load, and invalid files give exactly the expected text next
//! to them. No input crashes the parser. `UPDATE_EXPECT=1` rewrites the expected texts. Review
//! them afterwards.

// A failed unwrap fails the test, outside of test functions too.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tidegate_core::model;

use proptest::prelude::*;
use tidegate_config::{self as config, Loaded, Problems};
use tidegate_core::model::Config;

#[path = "config/discovery.rs"]
mod discovery;
#[path = "config/includes.rs"]
mod includes;
#[path = "config/rules.rs"]
mod rules;
#[path = "config/schema.rs"]
mod schema;

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn toml_files(directory: &str) -> Vec<PathBuf> {
    let entries = fs::read_dir(root().join(directory)).unwrap();
    let mut files: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    files.retain(|path| path.extension().is_some_and(|ext| ext == "toml"));
    files.sort();
    files
}

fn bare_name(path: &Path) -> String {
    path.file_name().unwrap().to_string_lossy().into_owned()
}

/// Loads a file. Messages contain its bare name instead of its path.
fn load_case(path: &Path) -> Result<Loaded, Problems> {
    let name = bare_name(path);
    config::load(path).map_err(|mut problems| {
        problems.file = name.as_str().into();
        for problem in &mut problems.list {
            let full = path.display().to_string();
            problem.message = problem.message.replace(&full, &name);
            problem.file = name.as_str().into();
        }
        problems
    })
}

/// Compares the result with the expected text and returns the differing lines.
fn compare(path: &Path, actual: &str) -> Result<(), String> {
    let kept = path.with_extension("expected");
    if std::env::var_os("UPDATE_EXPECT").is_some() {
        fs::write(&kept, actual).unwrap();
        return Ok(());
    }
    let expected = fs::read_to_string(&kept).unwrap_or_default();
    if expected == actual {
        return Ok(());
    }
    let mut diff = format!("\n=== {}\n", bare_name(path));
    let (mut old, mut new) = (expected.lines(), actual.lines());
    loop {
        match (old.next(), new.next()) {
            (None, None) => return Err(diff),
            (a, b) if a == b => diff += &format!("  {}\n", a.unwrap_or_default()),
            (a, b) => {
                for line in a.into_iter() {
                    diff += &format!("- {line}\n");
                }
                for line in b.into_iter() {
                    diff += &format!("+ {line}\n");
                }
            }
        }
    }
}

fn check_cases(directory: &str, least: usize, outcome: impl Fn(&Path) -> String) {
    let files = toml_files(directory);
    assert!(files.len() >= least, "only {} cases in {directory}", files.len());
    let failures: Vec<String> =
        files.iter().filter_map(|path| compare(path, &outcome(path)).err()).collect();
    assert!(failures.is_empty(), "{}", failures.concat());
}

#[test]
fn invalid_files_give_the_expected_text() {
    check_cases("tests/config_cases/invalid", 50, |path| match load_case(path) {
        Ok(_) => panic!("{} was accepted", bare_name(path)),
        Err(problems) => problems.render(false),
    });
}

#[test]
fn valid_files_load_with_the_expected_warnings() {
    check_cases("tests/config_cases/valid", 8, |path| match config::load(path) {
        Ok(loaded) => {
            let full = path.display().to_string();
            let warnings = loaded.warnings.iter().map(|warning| warning.to_string() + "\n");
            warnings.collect::<String>().replace(&full, &bare_name(path))
        }
        Err(problems) => panic!("{} was rejected:\n{problems}", bare_name(path)),
    });
}

#[test]
fn shipped_files_load_without_warnings() {
    let files = toml_files("config");
    assert!(files.len() >= 4);
    for path in files {
        let loaded = config::load(&path).unwrap_or_else(|problems| panic!("{problems}"));
        assert_eq!(loaded.warnings, [], "{}", path.display());
    }
}

const MINIMAL: &str = r#"
[frontend.web]
bind = "0.0.0.0:8080"
pool = "web"
[pool.web.probe]
[[pool.web.backend]]
address = "10.0.0.11:8080"
"#;

fn minimal() -> Config {
    config::parse(MINIMAL, "minimal.toml").unwrap()
}

#[test]
fn full_file_states_the_built_in_defaults() {
    let full = config::load(&root().join("config/full.toml")).unwrap().config;
    let minimal = minimal();
    assert_eq!(full.process, minimal.process);
    assert_eq!(full.admin, minimal.admin);
    assert_eq!(full.log, minimal.log);
    assert_eq!(full.frontends, minimal.frontends);
    assert_eq!(full.dns, minimal.dns);
    let (full, minimal) = (&full.pools[0], &minimal.pools[0]);
    let first = full.backends[0].clone();
    assert_eq!((&*first.name, &*minimal.backends[0].name), ("a", "10.0.0.11:8080"));
    let named = model::BackendConfig { name: minimal.backends[0].name.clone(), ..first };
    let full = model::PoolConfig { backends: vec![named], ..model::PoolConfig::clone(full) };
    assert_eq!(full, **minimal);
}

#[test]
fn full_file_contains_every_key() {
    let text = fs::read_to_string(root().join("config/full.toml")).unwrap();
    let keys = "workers pin engine spin leave_delay drain_timeout upgrade_timeout connections_max buffers_max user group sandbox state listen token_file read_token_file level \
        format access bind pool client_first first_byte_timeout idle_timeout half_closed_timeout session_max stalled_timeout keepalive \
        user_timeout balance connect_timeout queue_max queue_timeout connect_attempts when_none_eligible backups tiers \
        startup_grace on_removal on_down on_recover kind interval fast_interval timeout rise fall send \
        expect path host method status failures time max_ejected \
        early_resets slow_first_byte name address weight \
        backup tier slow_start register require ttl forget_after backends_max weight_max id \
        file pools addresses freebind contains \
        from service tags datacenter namespace filter max_stale prefix format record family port url ca_file \
        weights min_backends empty max_removed confirm_after missing overlap stale_for critical first_wait \
        servers tls cert_file key_file server_name password_file kubeconfig hold_nxdomain ttl_min ttl_max";
    for key in keys.split(' ') {
        let names_key = |line: &str| {
            let mut names = line.trim_start_matches(['#', ' ']).split(['=', '{', ',']);
            names.any(|name| name.trim() == key)
        };
        assert!(text.lines().any(names_key), "{key} is missing");
    }
}

#[test]
fn ejection_can_be_switched_off_by_one_word() {
    let text = MINIMAL.replace("[pool.web.probe]", "[pool.web]\nejection = \"off\"");
    assert_eq!(config::parse(&text, "t").unwrap().pools[0].ejection, None);
    assert!(minimal().pools[0].ejection.is_some());
}

const HEARTBEATS: &str = r#"
[frontend.web]
bind = "0.0.0.0:8080"
pool = "web"
[heartbeat]
listen = ["0.0.0.0:7946", "[::]:7946"]
[[heartbeat.key]]
id = 1
file = "KEY"
pools = "web"
addresses = ["10.0.0.0/8", "127.0.0.1"]
[pool.web]
slow_start = "10s"
[pool.web.heartbeat]
register = true
"#;

#[test]
fn pool_with_registration_needs_no_configured_backend() {
    let config = config::parse(HEARTBEATS, "t").unwrap();
    let pool = &config.pools[0];
    let spec = pool.heartbeat.as_ref().unwrap();
    assert!(pool.backends.is_empty() && spec.register && !spec.require);
    assert_eq!(pool.slow_start, Some(Duration::from_secs(10)));
    assert_eq!((spec.interval.as_millis(), spec.ttl.as_secs()), (100, 10));
    assert_eq!((spec.forget_after.as_secs(), spec.backends_max, spec.weight_max), (60, 1000, 100));
    let key = &config.heartbeat.unwrap().keys[0];
    assert_eq!(key.addresses[1].to_string(), "127.0.0.1/32");
    assert_eq!(key.secret, None, "a text alone opens no file");
    let problems = config::parse(&HEARTBEATS.replace("true", "false"), "t").unwrap_err();
    assert!(problems.to_string().contains("pool \"web\" has no backend"), "{problems}");
}

/// Writes a configuration and a key file with this content and mode.
fn with_key(secret: &[u8], mode: u32) -> (tempfile::TempDir, PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let key = directory.path().join("hb.key");
    fs::write(&key, secret).unwrap();
    fs::set_permissions(&key, fs::Permissions::from_mode(mode)).unwrap();
    let path = directory.path().join("t.toml");
    fs::write(&path, HEARTBEATS.replace("KEY", &key.display().to_string())).unwrap();
    (directory, path)
}

#[test]
fn changed_key_file_changes_the_configuration() {
    let (directory, path) = with_key(&[7; 32], 0o600);
    let first = config::load(&path).unwrap();
    let again = config::load(&path).unwrap();
    assert_eq!(first, again);
    assert!(!format!("{first:?}").contains("7, 7"), "the secret is shown");
    fs::write(directory.path().join("hb.key"), [8; 32]).unwrap();
    let changed = config::load(&path).unwrap();
    assert_eq!(changed.digest, first.digest);
    assert_ne!(changed.config, first.config);
}

#[test]
fn unusable_key_files_are_problems_with_their_place() {
    for (secret, mode, why) in [
        (&[7; 32][..], 0o640, "is accessible to others than its owner (mode 0640)"),
        (&[7; 31][..], 0o600, "holds 31 bytes; 32 to 1024 are needed"),
        (&[7; 5000][..], 0o600, "holds more than 1024 bytes; 32 to 1024 are needed"),
    ] {
        let (_directory, path) = with_key(secret, mode);
        let problems = config::load(&path).unwrap_err();
        let problem = &problems.list[0];
        assert!(problem.message.contains(why), "{problem}");
        assert_eq!((problem.line, problem.column), (9, 8));
    }
}

#[test]
fn order_of_ranges_does_not_change_the_configuration() {
    let read = |allow: &str| {
        let text = MINIMAL.replace(
            "[pool.web.probe]",
            &format!("[frontend.web.sources]\nallow = [{allow}]\n[pool.web.probe]"),
        );
        assert_ne!(text, MINIMAL);
        config::parse(&text, "t.toml").unwrap()
    };
    let one = read(r#""10.0.0.0/8", "192.0.2.0/24""#);
    assert_eq!(one, read(r#""192.0.2.0/24", "10.0.0.0/8""#));
    assert_ne!(one, read(r#""192.0.2.0/24", "11.0.0.0/8""#));
}

#[test]
fn probe_defaults_follow_the_configured_times() {
    let times = |keys: &str| {
        let text = MINIMAL.replace("[pool.web.probe]", &format!("[pool.web.probe]\n{keys}"));
        let config = config::parse(&text, "t").unwrap();
        let probe = config.pools[0].probe.clone().unwrap();
        [probe.interval, probe.fast_interval, probe.timeout].map(|time| time.as_millis())
    };
    assert_eq!(times(""), [2000, 1000, 1000]);
    assert_eq!(times("interval = '300ms'"), [300, 300, 300]);
    assert_eq!(times("timeout = '100ms'"), [2000, 500, 100]);
    assert_eq!(times("interval = '10s'\ntimeout = '5s'"), [10000, 5000, 5000]);
    assert_eq!(times("fast_interval = '200ms'"), [2000, 200, 200]);
}

#[test]
fn sections_keep_the_order_of_the_file() {
    let text = r#"
        frontend.z = { bind = "127.0.0.1:1", pool = "y" }
        frontend.a = { bind = "127.0.0.1:2", pool = "b" }
        [[pool.y.backend]]
        address = "127.0.0.1:3"
        [[pool.b.backend]]
        address = "127.0.0.1:4"
    "#;
    let config = config::parse(text, "t").unwrap();
    assert_eq!(config.frontends.iter().map(|f| &*f.name).collect::<Vec<_>>(), ["z", "a"]);
    assert_eq!(config.pools.iter().map(|p| &*p.name).collect::<Vec<_>>(), ["y", "b"]);
}

#[test]
fn byte_order_mark_is_skipped_and_is_no_column() {
    assert_eq!(config::parse(&format!("\u{feff}{MINIMAL}"), "t").unwrap(), minimal());
    let problems = config::parse("\u{feff}x = 1\n", "t").unwrap_err();
    let unknown = problems.list.iter().find(|p| p.message.contains("unknown")).unwrap();
    assert_eq!((unknown.line, unknown.column), (1, 1));
}

#[test]
fn digest_depends_on_the_bytes() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("t.toml");
    let digest = |text: &str| {
        fs::write(&file, text).unwrap();
        config::load(&file).unwrap().digest
    };
    let first = digest(MINIMAL);
    assert_ne!(digest(&format!("{MINIMAL}\n")), first);
    assert_eq!(digest(MINIMAL), first);
}

#[test]
fn problems_serialise_with_their_place_and_message() {
    let problems = config::parse("[frontend", "t.toml").unwrap_err();
    let json = serde_json::to_value(&problems).unwrap();
    assert_eq!(
        json,
        serde_json::json!([{
            "file": "t.toml",
            "line": 1,
            "column": 10,
            "message": problems.list[0].message,
            "help": "is the file complete?",
        }])
    );
}

#[test]
fn coloured_output_differs_only_in_escapes() {
    let problems = config::parse("x = 1", "t").unwrap_err();
    let coloured = problems.render(true);
    assert!(coloured.contains("\u{1b}["));
    let plain: String = coloured
        .split('\u{1b}')
        .enumerate()
        .map(|(at, part)| if at == 0 { part } else { part.split_once('m').unwrap().1 })
        .collect();
    let trimmed = |text: &str| text.lines().map(|l| l.trim_end().to_owned()).collect::<Vec<_>>();
    assert_eq!(trimmed(&plain), trimmed(&problems.render(false)));
}

// === paths that are no regular file ===

fn load_error(path: &Path) -> String {
    let problems = config::load(path).unwrap_err();
    assert_eq!((problems.list[0].line, problems.list[0].column), (1, 1));
    problems.list[0].message.clone()
}

#[test]
fn missing_file_is_rejected() {
    let directory = tempfile::tempdir().unwrap();
    let message = load_error(&directory.path().join("none.toml"));
    assert_eq!(message, "cannot open the file: no such file or directory");
}

#[test]
fn directory_is_rejected() {
    let directory = tempfile::tempdir().unwrap();
    assert_eq!(load_error(directory.path()), "this is a directory, not a file");
}

#[test]
fn fifo_is_rejected_without_waiting_for_a_writer() {
    let directory = tempfile::tempdir().unwrap();
    let fifo = directory.path().join("fifo");
    let made = std::process::Command::new("mkfifo").arg(&fifo).status().unwrap();
    assert!(made.success());
    let (send, done) = std::sync::mpsc::channel();
    std::thread::spawn(move || send.send(load_error(&fifo)));
    let message = done.recv_timeout(Duration::from_secs(10)).expect("the load blocked");
    assert_eq!(message, "this is not a regular file");
}

#[test]
fn loop_of_links_is_rejected() {
    let directory = tempfile::tempdir().unwrap();
    let link = directory.path().join("t.toml");
    std::os::unix::fs::symlink("t.toml", &link).unwrap();
    assert_eq!(load_error(&link), "cannot open the file: too many levels of symbolic links");
}

#[test]
fn file_larger_than_16_mib_is_rejected() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("t.toml");
    let file = fs::File::create(&path).unwrap();
    file.set_len(config::FILE_BYTES_MAX as u64 + 1).unwrap();
    assert_eq!(load_error(&path), "the file is larger than 16 MiB");
}

#[test]
fn invalid_utf8_is_rejected_with_its_place() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("t.toml");
    fs::write(&path, b"# caf\xc3\xa9\n# \xc3\xa9 caf\xe9 x\n").unwrap();
    let problems = config::load(&path).unwrap_err();
    let problem = &problems.list[0];
    assert_eq!((problem.line, problem.column), (2, 8));
    assert_eq!(problem.message, "the byte 0xe9 is not UTF-8 text");
}

// === large and invalid input ===

fn large(backends: usize) -> String {
    let mut text = Vec::new();
    writeln!(text, "[frontend.web]\nbind = '127.0.0.1:1'\npool = 'web'").unwrap();
    for n in 0..backends {
        let (a, b, c) = (n >> 16 & 255, n >> 8 & 255, n & 255);
        writeln!(
            text,
            "[[pool.web.backend]]\nname = 'backend-{n}'\naddress = '10.{a}.{b}.{c}:8080'\nweight = 10\n"
        )
        .unwrap();
    }
    String::from_utf8(text).unwrap()
}

#[test]
fn number_of_backends_is_limited() {
    let config = config::parse(&large(config::BACKENDS_MAX), "t").unwrap();
    assert_eq!(config.pools[0].backends.len(), config::BACKENDS_MAX);
    let problems = config::parse(&large(config::BACKENDS_MAX + 1), "t").unwrap_err();
    assert_eq!(problems.list[0].message, "100001 backends are more than the 100000 allowed");
}

#[test]
fn number_of_reported_problems_is_limited() {
    let text = large(5_000).replace("weight = 10", "weight = 0\nwieght = 1");
    let problems = config::parse(&text, "t").unwrap_err();
    assert_eq!(problems.list.len(), config::PROBLEMS_MAX);
    assert_eq!(problems.omitted, 10_000 - config::PROBLEMS_MAX);
}

#[test]
fn very_long_dotted_keys_are_rejected() {
    for key in ["a.", "'=' . ", "a . \"b\" ."] {
        let problems = config::parse(&(key.repeat(500_000) + "z = 1"), "t").unwrap_err();
        assert_eq!(problems.list[0].message, "this dotted key has too many parts");
    }
}

#[test]
fn deeply_nested_brackets_are_rejected() {
    for open in ["x = [", "x = {a=", "[", "[["] {
        let text = open.to_owned() + &open.trim_start_matches("x = ").repeat(200_000);
        assert!(config::parse(&text, "t").is_err());
    }
}

/// Checks that every place is in the file: on an existing line, at most one column past its end.
fn assert_places(text: &str, problems: &Problems) {
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let lines: Vec<&str> = text.split('\n').collect();
    assert!(!problems.list.is_empty());
    for problem in &problems.list {
        let line = lines.get(problem.line - 1).expect("a line of the file");
        assert!((1..=line.chars().count() + 1).contains(&problem.column), "{problem}");
        assert!(!problem.message.contains('\n'), "{problem}");
    }
    let places = problems.list.iter().map(|problem| (problem.line, problem.column));
    assert!(places.is_sorted());
    let _ = problems.render(true);
}

fn check_any(text: &str) {
    if let Err(problems) = config::parse(text, "t.toml") {
        assert_places(text, &problems);
    }
}

#[derive(Debug, Clone)]
enum Mutation {
    Insert(prop::sample::Index, String),
    Delete(prop::sample::Index, usize),
    Truncate(prop::sample::Index),
    CopyLine(prop::sample::Index, prop::sample::Index),
}

impl Mutation {
    fn apply(&self, text: &str) -> String {
        let chars: Vec<char> = text.chars().collect();
        let lines: Vec<&str> = text.lines().collect();
        let place = |index: &prop::sample::Index| index.index(chars.len() + 1);
        let text = |chars: &[char]| chars.iter().collect::<String>();
        match self {
            Mutation::Insert(at, extra) => {
                let at = place(at);
                text(&chars[..at]) + extra + &text(&chars[at..])
            }
            Mutation::Delete(at, count) => {
                let at = place(at);
                text(&chars[..at]) + &text(&chars[(at + count).min(chars.len())..])
            }
            Mutation::Truncate(at) => text(&chars[..place(at)]),
            Mutation::CopyLine(from, to) => {
                let mut lines = lines.clone();
                if !lines.is_empty() {
                    lines.insert(to.index(lines.len()), lines[from.index(lines.len())]);
                }
                lines.join("\n")
            }
        }
    }
}

fn mutation() -> impl Strategy<Value = Mutation> {
    let pieces = prop_oneof![
        prop::sample::select(vec![
            "=",
            "[",
            "]",
            "[[",
            "]]",
            "{",
            "}",
            ",",
            ".",
            "\"",
            "'",
            "\"\"\"",
            "\n",
            "\r\n",
            "#",
            "0",
            "-1",
            "1.5",
            "\"off\"",
            "\"10s\"",
            "[pool.x]\n",
            "[[pool.web.backend]]\n",
            "weight = 0\n",
            "é",
            "\u{0}",
            "\t",
            "99999999999999999999",
            "true",
            "unix:/a",
            "[::1]:80",
            "1979-05-27",
        ])
        .prop_map(str::to_owned),
        ".{0,8}",
    ];
    let any = any::<prop::sample::Index>;
    prop_oneof![
        4 => (any(), pieces).prop_map(|(at, piece)| Mutation::Insert(at, piece)),
        3 => (any(), 1..20_usize).prop_map(|(at, count)| Mutation::Delete(at, count)),
        1 => any().prop_map(Mutation::Truncate),
        2 => (any(), any()).prop_map(|(from, to)| Mutation::CopyLine(from, to)),
    ]
}

proptest! {
    #[test]
    fn any_text_gives_a_result(text in "(?s).{0,200}") {
        check_any(&text);
    }

    #[test]
    fn any_toml_like_text_gives_a_result(text in "([a-c.=\"'\\[\\]{},# \n0-9-]|pool|frontend|backend|bind){0,60}") {
        check_any(&text);
    }

    #[test]
    fn mutated_valid_files_give_a_result(
        which in any::<prop::sample::Index>(),
        mutations in prop::collection::vec(mutation(), 1..6),
    ) {
        let mut files = toml_files("tests/config_cases/valid");
        files.extend(toml_files("config"));
        let mut text = fs::read_to_string(&files[which.index(files.len())]).unwrap();
        for mutation in &mutations {
            text = mutation.apply(&text);
        }
        check_any(&text);
    }
}

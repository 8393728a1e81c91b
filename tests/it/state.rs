//! `[process] state`: drains survive the exit of every process.
//!
//! The tests change the file in the state directory only to damage or age it.

use crate::common::backend::{self, ScriptedBackend};
use crate::common::client;
use crate::common::conf::{Conf, Pool};
use crate::common::proxy::TestProxy;
use crate::common::{Engine, eventually, on_every_engine, secs};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use tempfile::TempDir;

on_every_engine!(
    drain_survives_a_restart,
    drain_survives_a_kill_of_every_process,
    undrain_survives_a_restart,
    drain_survives_an_upgrade_and_a_restart,
    drain_is_lost_at_a_restart_without_a_state_directory,
    damaged_state_file_is_renamed_and_the_start_succeeds,
    change_of_the_state_directory_needs_a_restart,
    write_to_a_missing_state_directory_is_counted,
);

struct Site {
    state: TempDir,
    _backends: [ScriptedBackend; 2],
    proxy: TestProxy,
}

// === impl Site ===

impl Site {
    fn start(engine: Engine) -> Site {
        let state = tempfile::tempdir().expect("temp dir");
        let key = format!("state = \"{}\"", directory(&state).display());
        Site::start_with(engine, state, &key)
    }

    fn start_with(engine: Engine, state: TempDir, key: &str) -> Site {
        let backends = ["a", "b"].map(|name| ScriptedBackend::start(backend::name(name)));
        let pool = Pool::new("web")
            .backend("a", backends[0].address())
            .backend("b", backends[1].address());
        let proxy = TestProxy::start(Conf::simple(engine, pool).process(key));
        Site { state, _backends: backends, proxy }
    }

    /// Checks that ten sessions all go to `b`.
    fn only_b_serves(&self) {
        for _ in 0..10 {
            assert_eq!(client::ask(self.proxy.addr("web")).expect("an answer"), "b");
        }
        assert_eq!(self.proxy.backend("web", "a")["intent"], "draining");
    }

    fn both_serve(&self) {
        let answers: Vec<String> =
            (0..10).map(|_| client::ask(self.proxy.addr("web")).expect("an answer")).collect();
        assert!(answers.iter().any(|name| name == "a"), "{answers:?}");
    }

    fn file(&self) -> PathBuf {
        directory(&self.state).join("intents.json")
    }
}

fn directory(state: &TempDir) -> PathBuf {
    state.path().join("state")
}

fn mode(path: &Path) -> u32 {
    std::fs::metadata(path).expect("the path exists").permissions().mode() & 0o777
}

fn drain_survives_a_restart(engine: Engine) {
    let mut site = Site::start(engine);
    site.proxy.cli_ok(&["drain", "web/a"]);
    site.only_b_serves();
    assert_eq!((mode(&directory(&site.state)), mode(&site.file())), (0o700, 0o600));
    site.proxy.restart();
    site.only_b_serves();
    assert_eq!(site.proxy.backend("web", "a")["sessions_total"], 0);
}

fn drain_survives_a_kill_of_every_process(engine: Engine) {
    let mut site = Site::start(engine);
    site.proxy.cli_ok(&["drain", "web/a"]);
    // Kills the supervisor and the serving process.
    site.proxy.kill();
    let text = std::fs::read_to_string(site.file()).expect("the intents");
    let mut intents: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    let since = intents["intents"][0]["since"].as_u64().expect("a time");
    intents["intents"][0]["since"] = (since - 3600).into();
    std::fs::write(site.file(), intents.to_string()).expect("an older intent");
    site.proxy.start_again();
    site.only_b_serves();
    let age = site.proxy.explained("web", "a")["intent_seconds"].as_f64();
    assert!(age.is_some_and(|age| age > 3600.0), "{age:?}");
}

fn undrain_survives_a_restart(engine: Engine) {
    let mut site = Site::start(engine);
    site.proxy.cli_ok(&["drain", "web/a"]);
    site.proxy.restart();
    site.proxy.cli_ok(&["undrain", "web/a"]);
    site.proxy.restart();
    site.both_serve();
}

fn drain_survives_an_upgrade_and_a_restart(engine: Engine) {
    let mut site = Site::start(engine);
    let before = site.proxy.upgrade();
    site.proxy.wait_gone(before, secs(10));
    site.proxy.cli_ok(&["drain", "web/a"]);
    let before = site.proxy.upgrade();
    site.proxy.wait_gone(before, secs(10));
    site.only_b_serves();
    site.proxy.restart();
    site.only_b_serves();
}

fn drain_is_lost_at_a_restart_without_a_state_directory(engine: Engine) {
    let state = tempfile::tempdir().expect("temp dir");
    let mut site = Site::start_with(engine, state, "state = \"off\"");
    site.proxy.cli_ok(&["drain", "web/a"]);
    site.only_b_serves();
    site.proxy.restart();
    site.both_serve();
    assert_eq!(std::fs::read_dir(site.state.path()).expect("a directory").count(), 0);
}

fn damaged_state_file_is_renamed_and_the_start_succeeds(engine: Engine) {
    let mut site = Site::start(engine);
    site.proxy.cli_ok(&["drain", "web/a"]);
    let whole = std::fs::read_to_string(site.file()).expect("the intents");
    site.proxy.kill();
    for damaged in [&whole[..whole.len() / 2], &whole.replace("\"version\": 1", "\"version\": 9")] {
        std::fs::write(site.file(), damaged).expect("write the damaged text");
        site.proxy.start_again();
        site.both_serve();
        let aside = site.file().with_extension("json.rejected");
        assert_eq!(std::fs::read_to_string(aside).expect("the damaged text"), *damaged);
        site.proxy.kill();
    }
    let log = site.proxy.log();
    assert!(log.contains("cannot read operator intents"), "{log}");
    assert!(log.contains("unsupported version 9; this binary reads version 1"), "{log}");
}

fn change_of_the_state_directory_needs_a_restart(engine: Engine) {
    let site = Site::start(engine);
    let text = site.proxy.render(&site.proxy.conf()).replace("/state\"", "/other\"");
    site.proxy.rewrite_by_rename(&text);
    let answer = site.proxy.cli_ok(&["reload"]);
    let warning = "[process] state changed in the file; it takes effect at the next start";
    assert!(answer.contains(warning), "{answer}");
    site.proxy.cli_ok(&["drain", "web/a"]);
    assert!(site.file().exists() && !site.state.path().join("other").exists());
}

fn write_to_a_missing_state_directory_is_counted(engine: Engine) {
    let site = Site::start(engine);
    let failures = || site.proxy.metric("tidegate_state_write_failures_total", &[]);
    assert_eq!(failures(), 0.0);
    std::fs::remove_dir_all(directory(&site.state)).expect("remove it");
    site.proxy.cli_ok(&["drain", "web/a"]);
    site.only_b_serves();
    eventually(secs(5), "the failure is counted", || failures() == 1.0);
    assert!(site.proxy.log().contains("cannot write operator intents"), "{}", site.proxy.log());
}

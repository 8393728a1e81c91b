//! The commands of docs/quickstart.md, run in an empty directory as they are written, but
//! for the ports.

use crate::pages::{blocks, page};
use std::fs;
use std::net::TcpListener;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

#[test]
fn the_commands_of_the_quickstart_lead_to_answers_of_both_services() {
    let directory = tempfile::tempdir().unwrap();
    let admin = format!("unix:{}/admin.sock", directory.path().display());
    let script = commands(&page("docs/quickstart.md"), &admin);
    let program = Path::new(env!("CARGO_BIN_EXE_tidegate")).parent().unwrap().display().to_string();
    let output = fs::File::create(directory.path().join("output")).unwrap();
    let mut shell = Command::new("timeout")
        .args(["--kill-after=5", "60", "bash", "-e", "-c", &script])
        .current_dir(directory.path())
        .env("PATH", format!("{program}:{}", std::env::var("PATH").unwrap()))
        .env("TIDEGATE_ADMIN", &admin)
        // Its own group, so that nothing it starts outlives it.
        .process_group(0)
        .stdin(Stdio::null())
        .stdout(output.try_clone().unwrap())
        .stderr(output)
        .spawn()
        .unwrap();
    let group = rustix::process::Pid::from_child(&shell);
    let status = shell.wait().unwrap();
    // Nothing is left of it if all went well.
    let _ = rustix::process::kill_process_group(group, rustix::process::Signal::KILL);
    let printed = fs::read_to_string(directory.path().join("output")).unwrap();
    assert!(status.success(), "{status}: {printed}");
    for line in [
        "answer from a",
        "answer from b",
        "tidegate.toml: ok: 1 frontend, 1 pool, 2 backends",
        "TAKES new sessions",
        "web/a has no sessions",
        "reloaded; generation 2 is in force",
        "upgraded: process",
        "draining; the balancer exits",
    ] {
        assert!(printed.contains(line), "no {line:?} in:\n{printed}");
    }
}

/// Everything from "Start two services" to the end of "Change it while it runs", with free
/// ports and an admin socket that no other balancer of the machine uses.
fn commands(text: &str, admin: &str) -> String {
    let (_, rest) = text.split_once("\n## Start two services").unwrap();
    let (steps, _) = rest.split_once("\n## How commands find").unwrap();
    let mut script = blocks(steps, "sh").join("\n");
    assert!(script.contains("tidegate upgrade") && script.contains("curl"), "{script}");
    let ports: Vec<TcpListener> =
        (0..3).map(|_| TcpListener::bind("127.0.0.1:0").unwrap()).collect();
    for (written, free) in ["8080", "9001", "9002"].iter().zip(&ports) {
        script = script.replace(written, &free.local_addr().unwrap().port().to_string());
    }
    script.replace("[frontend.web]", &format!("[admin]\nlisten = \"{admin}\"\n\n[frontend.web]"))
}

//! The admin client of the command line: its output and its exit codes.

use crate::harness::{Api, Control, EXPLANATION, STATUS, TOKEN, eventually};
use std::process::{Command, Stdio};
use std::sync::atomic::Ordering;

#[test]
fn client_reads_and_changes_over_the_unix_socket() {
    let api = Api::unix(Control::Answers);
    let said = |arguments: &[&str]| {
        let output = api.cli(arguments);
        assert_eq!(output.status.code(), Some(0), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    assert_eq!(said(&["status", "--json"]).trim_end(), STATUS);
    assert!(said(&["status"]).starts_with("tidegate 0.1.0: serving"));
    assert!(said(&["reload"]).contains("generation 4"));
    assert!(
        said(&["drain", "web/unix:/run/b.sock"]).starts_with("web/unix:/run/b.sock is draining")
    );
    assert!(said(&["undrain", "web/[::1]:80"]).starts_with("web/[::1]:80 is ready"));
    assert!(said(&["shutdown"]).starts_with("draining"));
    assert!(api.shut_down.load(Ordering::Relaxed));
}

#[test]
fn client_exits_1_on_a_rejection_with_the_reason_on_stderr() {
    let api = Api::unix(Control::RejectsTheFile);
    let unknown = api.cli(&["drain", "web/x"]);
    assert_eq!(unknown.status.code(), Some(1));
    let text = String::from_utf8(unknown.stderr).unwrap();
    assert_eq!(
        text,
        "tidegate: unknown backend: pool \"web\" has no backend \"x\"; tidegate status lists \
         its backends\n"
    );
    assert!(unknown.stdout.is_empty());
    let refused = api.cli(&["reload"]);
    assert_eq!(refused.status.code(), Some(1));
    let text = String::from_utf8(refused.stderr).unwrap();
    let problems = "t.toml:3:7: error: no such pool\n\nt.toml:9:7: error: unknown key\n";
    assert!(text.starts_with(problems), "{text}");
}

#[test]
fn client_exits_2_on_usage_and_3_without_an_answer() {
    let mut api = Api::unix(Control::Answers);
    assert_eq!(api.cli(&["drain", "web"]).status.code(), Some(2));
    api.stop();
    let unreachable = api.cli(&["status"]);
    assert_eq!(unreachable.status.code(), Some(3));
    let text = String::from_utf8(unreachable.stderr).unwrap();
    assert!(text.starts_with("tidegate: cannot reach the balancer at unix:/"), "{text}");
}

#[test]
fn client_exits_3_on_an_unexpected_document() {
    let api = Api::unix(Control::Answers);
    let response = api.cli(&["explain", "web/a"]);
    assert_eq!((response.status.code(), response.stdout.len()), (Some(3), 0), "{response:?}");
    let text = String::from_utf8(response.stderr).unwrap();
    let start = "tidegate: cannot read the response to GET /v1/pools/web/backends/a/explain: ";
    assert!(text.starts_with(&format!("{start}missing field `address`")), "{text}");
    assert_eq!(text.lines().count(), 1, "{text}");
    let raw = api.cli(&["explain", "web/a", "--json"]);
    assert_eq!(String::from_utf8(raw.stdout).unwrap().trim_end(), EXPLANATION);
}

#[test]
fn client_sends_its_token_over_tcp() {
    let api = Api::tcp("127.0.0.1:0", Some(TOKEN));
    let file = api.dir.path().join("token");
    std::fs::write(&file, format!("{TOKEN}\n")).unwrap();
    let file = file.to_str().unwrap();
    assert_eq!(api.cli(&["status"]).status.code(), Some(0));
    assert_eq!(api.cli(&["drain", "web/a"]).status.code(), Some(1));
    assert_eq!(api.cli(&["drain", "web/a", "--token-file", file]).status.code(), Some(0));
    let missing = api.cli(&["drain", "web/a", "--token-file", "/no/such/file"]);
    assert_eq!(missing.status.code(), Some(1));
}

#[test]
fn closed_standard_output_is_no_failure() {
    let api = Api::unix(Control::Answers);
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let mut child = Command::new(env!("CARGO_BIN_EXE_tidegate"))
        .args(["status", "--admin", &api.address.to_string()])
        .stdout(writer)
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    eventually("the client exits", || child.try_wait().unwrap().is_some());
    let output = child.wait_with_output().unwrap();
    assert_eq!((output.status.code(), output.stderr.as_slice()), (Some(0), &b""[..]));
}

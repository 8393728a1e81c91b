//! `tidegate demo` as users run it: the program, its output, its exit code and the files that it
//! leaves.

// A failed unwrap fails the test, outside of test functions too.
#![allow(clippy::unwrap_used)]

use rustix::process::{Pid, Signal, kill_process};
use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::net::{SocketAddr, TcpStream};
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::time::Duration;
use tempfile::TempDir;
use tidegate_net::clock;

/// The timeout for each expected line.
const LINE_MAX: Duration = Duration::from_secs(30);

/// A running demo with its own temporary directory.
struct Demo {
    child: Child,
    lines: Receiver<String>,
    seen: Vec<String>,
    directory: TempDir,
}

fn command(directory: &TempDir, arguments: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tidegate"));
    command.arg("demo").args(arguments.split_whitespace());
    command.env("TMPDIR", directory.path()).env("TERM", "xterm").env_remove("NO_COLOR");
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// Runs a demo until it exits. Returns its output and its temporary directory.
fn run(arguments: &str) -> (Output, TempDir) {
    let directory = TempDir::new().unwrap();
    let output = command(&directory, arguments).output().unwrap();
    (output, directory)
}

fn text(output: &Output) -> String {
    let (out, err) = (&output.stdout, &output.stderr);
    format!("{}{}", String::from_utf8_lossy(out), String::from_utf8_lossy(err))
}

fn is_empty(directory: &TempDir) -> bool {
    fs::read_dir(directory.path()).unwrap().next().is_none()
}

/// Returns the word after `label` in the introduction.
fn word_after<'a>(text: &'a str, label: &str) -> &'a str {
    let rest = text.lines().find_map(|line| line.trim_start().strip_prefix(label)).unwrap();
    rest.split_whitespace().next().unwrap()
}

impl Demo {
    fn start(arguments: &str) -> Demo {
        let directory = TempDir::new().unwrap();
        let mut child = command(&directory, arguments).spawn().unwrap();
        let (sender, lines) = mpsc::channel();
        let output = BufReader::new(child.stdout.take().unwrap());
        std::thread::spawn(move || {
            for line in output.lines() {
                if sender.send(line.unwrap()).is_err() {
                    return;
                }
            }
        });
        Demo { child, lines, seen: Vec::new(), directory }
    }

    fn wait_for(&mut self, wanted: &str) {
        while !self.seen.last().is_some_and(|line| line.contains(wanted)) {
            match self.lines.recv_timeout(LINE_MAX) {
                Ok(line) => self.seen.push(line),
                Err(_) => panic!("no line with {wanted:?} in {:#?}", self.seen),
            }
        }
    }

    fn interrupt(&self) {
        let pid = Pid::from_raw(self.child.id().try_into().unwrap()).unwrap();
        kill_process(pid, Signal::INT).unwrap();
    }

    /// Waits until the demo exits. Returns the exit code and standard error.
    fn end(&mut self) -> (Option<i32>, String) {
        let status = self.child.wait().unwrap();
        let mut errors = String::new();
        self.child.stderr.take().unwrap().read_to_string(&mut errors).unwrap();
        self.seen.extend(self.lines.iter());
        (status.code(), errors)
    }
}

impl Drop for Demo {
    fn drop(&mut self) {
        // The demo has already exited in a test that passes.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn three_backends_show_split_failover_and_recovery() {
    let began = clock::now();
    let (output, directory) = run("--backends 3 --for 5s");
    let (text, took) = (text(&output), clock::now() - began);
    assert_eq!(output.status.code(), Some(0), "{text}");
    for expected in [
        "a balancer and 3 backends on this machine",
        "All backends are up\n   backend  weight  expected     got   share\n   b1            5 ",
        "is killed: its port refuses connections and its connections are reset",
        "removed from rotation after ",
        " 0 of them started after the removal",
        "cause backend-reset",
        "returned to rotation after ",
        "`tidegate explain` on b1: down: ",
        "`: Attempt 1: b1 (turn) failed after ",
        ": refused. Attempt 2: b",
        " (retry) connected after ",
        " was answered by b",
        "`tidegate explain --client 127.0.0.1 --frontend demo`: b",
        " is next, b1 is skipped. The next client was answered by b",
        ": b1 refused, b",
        "forecast: the next client goes to b",
        "All backends are up again\n",
        "The configuration changes under load: b3 gets weight 3\n   generation 2 is in effect after ",
        "reload: 0 of ",
        "The binary is upgraded in place, to itself\n   process ",
        "5 of 5 long-lived connections are open\n",
        "Draining\n",
        "Summary\n",
        "drained: all sessions finished, none was reset\n",
    ] {
        assert!(text.contains(expected), "no {expected:?} in\n{text}");
    }
    assert_eq!(text.matches("0 failed; split exactly by weight").count(), 4, "{text}");
    assert!(took < Duration::from_secs(20), "took {took:?}\n{text}");
    assert!(is_empty(&directory), "files are left");
}

#[test]
fn addresses_refuse_after_the_demo() {
    let (output, _directory) = run("--backends 2 --for 5s");
    let text = text(&output);
    let frontend: SocketAddr = word_after(&text, "frontend").parse().unwrap();
    let admin = word_after(&text, "admin API").strip_prefix("http://").unwrap().parse().unwrap();
    for address in [frontend, admin] {
        let refused = TcpStream::connect(address).unwrap_err();
        assert_eq!(refused.kind(), std::io::ErrorKind::ConnectionRefused, "{address}");
    }
}

#[test]
fn output_without_a_terminal_has_no_control_characters() {
    let (output, _directory) = run("--backends 1 --for 5s");
    let odd = |byte: &&u8| byte.is_ascii_control() && **byte != b'\n';
    assert_eq!(output.stdout.iter().chain(&output.stderr).find(odd), None, "{}", text(&output));
    assert!(output.stderr.is_empty(), "{}", text(&output));
}

#[test]
fn one_backend_runs_without_a_failover() {
    let (output, directory) = run("--backends 1 --for 5s");
    let text = text(&output);
    assert_eq!(output.status.code(), Some(0), "{text}");
    assert!(text.contains("Only one backend: no failover to show."));
    assert!(!text.contains("is killed"), "{text}");
    assert!(is_empty(&directory), "files are left");
}

#[test]
fn sixty_four_backends_finish_in_time() {
    let began = clock::now();
    let (output, directory) = run("--backends 64 --for 5s");
    let (text, took) = (text(&output), clock::now() - began);
    assert_eq!(output.status.code(), Some(0), "{text}");
    assert!(text.contains("+52 more"), "{text}");
    // With this many probes the drain once never ended.
    assert!(took < Duration::from_secs(20), "took {took:?}\n{text}");
    assert!(is_empty(&directory), "files are left");
}

#[test]
fn short_duration_is_extended_with_a_notice() {
    let (output, _directory) = run("--backends 1 --for 10ms");
    let text = text(&output);
    assert_eq!(output.status.code(), Some(0), "{text}");
    assert!(
        text.starts_with("--for 10ms is too short for the whole demonstration; it takes 5s\n"),
        "{text}"
    );
}

#[test]
fn early_interrupt_cleans_up_and_exits_with_3() {
    let mut demo = Demo::start("--backends 3 --for 60s");
    demo.wait_for("All backends are up");
    demo.interrupt();
    let (code, errors) = demo.end();
    assert_eq!(code, Some(3), "{errors}");
    let why = "tidegate: demo: check failed: interrupted before the demonstration was complete\n";
    assert_eq!(errors, why);
    assert!(is_empty(&demo.directory), "files are left");
}

#[test]
fn printed_commands_work_and_an_edited_configuration_is_applied() {
    let mut demo = Demo::start("--backends 1 --for 60s");
    demo.wait_for("tail -f ");
    let config = PathBuf::from(word_after(&demo.seen.join("\n"), "configuration"));
    let program = env!("CARGO_BIN_EXE_tidegate");
    let commands: Vec<String> = demo.seen.iter().map(|line| line.trim().to_owned()).collect();
    let commands = commands.iter().filter(|line| line.starts_with(program));
    let mut ran = 0;
    for line in commands {
        let output = Command::new("sh").arg("-c").arg(line).output().unwrap();
        assert!(output.status.success(), "{line}: {}", text(&output));
        ran += 1;
    }
    assert_eq!(ran, 4, "status, explain, undrain and upgrade");

    let changed = fs::read_to_string(&config).unwrap().replace("weight = 6", "weight = 7");
    fs::write(&config, changed).unwrap();
    demo.wait_for("configuration change applied: generation 3");
    fs::write(&config, "[nonsense]\n").unwrap();
    demo.wait_for("configuration change rejected");

    demo.interrupt();
    let (code, errors) = demo.end();
    assert_eq!((code, errors.as_str()), (Some(0), ""), "{:#?}", demo.seen);
    assert!(is_empty(&demo.directory), "files are left");
}

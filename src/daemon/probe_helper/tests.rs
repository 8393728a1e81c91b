//! The balancer's end together with a runner on another thread.

use super::process::HelperSocket;
use super::runner::CommandRunner;
use super::*;
use crate::event_log::EventLog;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;
use tempfile::TempDir;
use tidegate_core::metrics::counters::WorkerCounters;
use tidegate_core::model::CommandSubject;
use tidegate_core::outcome::{Cause, Phase};
use tidegate_net::clock;
use tidegate_net::packets::Packets;

const LONG: Duration = Duration::from_secs(30);

/// A balancer's end, its counters and events, and a configuration with one command per pool.
struct HelperTest {
    helper: ProbeHelper,
    counters: Arc<WorkerCounters>,
    events: EventLog,
    /// The runner's end, before it starts.
    other: Option<Packets>,
    commands: Vec<Vec<String>>,
    dir: TempDir,
}

impl HelperTest {
    fn new(scripts: &[&str]) -> HelperTest {
        let dir = tempfile::tempdir().unwrap();
        let (own, other) = Packets::pair(Duration::from_secs(1)).unwrap();
        let counters = Arc::new(WorkerCounters::new(Cause::COUNT, Phase::COUNT));
        let events = EventLog::new();
        let socket = HelperSocket::inherited(OwnedFd::from(own));
        let helper = ProbeHelper::new(Some(socket), Arc::clone(&counters), events.clone());
        let commands: Vec<Vec<String>> = scripts.iter().map(|script| sh(script)).collect();
        let test = HelperTest { helper, counters, events, other: Some(other), commands, dir };
        test.write(&test.commands);
        test
    }

    /// Starts the runner on a thread.
    fn started(scripts: &[&str]) -> HelperTest {
        let mut test = HelperTest::new(scripts);
        let runner = CommandRunner::new(test.other.take().unwrap(), &test.file(), false);
        std::thread::spawn(move || runner.run().unwrap());
        test
    }

    fn file(&self) -> PathBuf {
        self.dir.path().join("t.toml")
    }

    fn write(&self, commands: &[Vec<String>]) {
        let mut text = "[process]\nprobe_helper = true\n".to_owned();
        for (at, command) in commands.iter().enumerate() {
            text += &format!(
                "[frontend.f{at}]\nbind = \"127.0.0.1:{}\"\npool = \"p{at}\"\n[pool.p{at}]\n\
                 probe = {{ kind = \"exec\", command = {command:?} }}\n\
                 backend = [{{ address = \"127.0.0.2:1\" }}]\n",
                at + 1
            );
        }
        std::fs::write(self.file(), text).unwrap();
    }

    /// Runs the command of a pool.
    async fn run(&self, at: usize, timeout: Duration) -> CommandResult {
        let (pool, backend) = (format!("p{at}"), format!("b{at}"));
        let (address, port) = ("127.0.0.2".to_owned(), "81".to_owned());
        let subject = CommandSubject { pool, backend, address, port };
        self.helper.run(subject, &self.commands[at], timeout).await
    }
}

fn sh(script: &str) -> Vec<String> {
    ["/bin/sh", "-c", script].map(str::to_owned).to_vec()
}

fn on_runtime(test: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        tokio::time::timeout(Duration::from_secs(60), test).await.expect("the test ends in time");
    });
}

/// Waits until a process does not exist, not even as a zombie.
fn await_end(pid: &str) {
    let deadline = clock::now() + LONG;
    while PathBuf::from(format!("/proc/{pid}")).exists() {
        assert!(clock::now() < deadline, "process {pid} still exists");
        clock::pause(Duration::from_millis(10));
    }
}

/// Waits until a process does not run. Its new parent reaps it.
fn await_death(pid: &str) {
    let deadline = clock::now() + LONG;
    loop {
        let state = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        if state.is_empty() || state.contains(") Z ") {
            return;
        }
        assert!(clock::now() < deadline, "process {pid} still runs: {state}");
        clock::pause(Duration::from_millis(10));
    }
}

/// Waits for the text that a command writes into a file.
async fn written(file: &std::path::Path) -> String {
    let deadline = clock::now() + LONG;
    loop {
        let text = std::fs::read_to_string(file).unwrap_or_default();
        if text.ends_with('\n') {
            return text.trim().to_owned();
        }
        assert!(clock::now() < deadline, "{} stays empty", file.display());
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[test]
fn exit_code_and_first_line_are_returned() {
    let test = HelperTest::started(&[
        "echo first; echo second; exit 3",
        "exit 0",
        "printf '%3000s' x; exit 1",
        "echo no >&2; kill -9 $$",
        "head -c 1000000 /dev/zero; printf '\\nmore\\n'",
    ]);
    on_runtime(async {
        assert_eq!(test.run(0, LONG).await, CommandResult::Exited(3, b"first".to_vec()));
        assert_eq!(test.run(1, LONG).await, CommandResult::Exited(0, Vec::new()));
        let CommandResult::Exited(1, line) = test.run(2, LONG).await else { panic!() };
        assert_eq!(line, [b' '; message::TEXT_BYTES_MAX]);
        assert_eq!(test.run(3, LONG).await, CommandResult::Signalled(9));
        // The output is read to its end, so that no command waits for a reader.
        let CommandResult::Exited(0, line) = test.run(4, LONG).await else { panic!() };
        assert_eq!(line, [0; message::TEXT_BYTES_MAX]);
    });
}

#[test]
fn command_gets_its_values_and_nothing_of_the_environment() {
    let script = "echo $# $0 $1 $TIDEGATE_POOL $TIDEGATE_BACKEND $TIDEGATE_ADDRESS \
                  $TIDEGATE_PORT $HAPROXY_SERVER_NAME $HAPROXY_SERVER_PORT $HOME $PWD";
    let signals = "while read name value; do case $name in SigBlk:) echo $value; esac; done \
                   < /proc/self/status";
    let mut test = HelperTest::new(&[script, signals, "ls -l /proc/$$/fd | grep -c socket"]);
    test.commands[0].extend(["{pool}".to_owned(), "{address}:{port}".to_owned()]);
    test.write(&test.commands);
    let runner = CommandRunner::new(test.other.take().unwrap(), &test.file(), false);
    std::thread::spawn(move || {
        let _ = tidegate_net::signals::block();
        tidegate_net::signals::outlive().unwrap();
        runner.run().unwrap();
    });
    on_runtime(async {
        let wanted = "1 p0 127.0.0.2:81 p0 b0 127.0.0.2 81 b0 81 /";
        assert_eq!(test.run(0, LONG).await, CommandResult::Exited(0, wanted.into()));
        let wanted = "0000000000000000";
        assert_eq!(test.run(1, LONG).await, CommandResult::Exited(0, wanted.into()));
        // `grep -c` prints 0 and exits with 1: no socket is inherited.
        assert_eq!(test.run(2, LONG).await, CommandResult::Exited(1, b"0".to_vec()));
    });
}

#[test]
fn whole_process_group_is_killed_at_the_timeout_and_reaped() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("pids");
    let script = format!("sleep 1000 & echo $$ $! > {}; echo waiting; wait", file.display());
    let test = HelperTest::started(&[&script]);
    on_runtime(async {
        let (result, pids) = tokio::join!(test.run(0, Duration::from_secs(2)), written(&file));
        assert_eq!(result, CommandResult::TimedOut(b"waiting".to_vec()));
        let (shell, sleep) = pids.split_once(' ').unwrap();
        await_end(shell);
        await_death(sleep);
    });
}

#[test]
fn process_left_behind_does_not_delay_the_result_and_is_killed() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("pid");
    // The process in the background holds the output open.
    let script = format!("sleep 1000 & echo $! > {}; echo done", file.display());
    let test = HelperTest::started(&[&script]);
    on_runtime(async {
        assert_eq!(test.run(0, LONG).await, CommandResult::Exited(0, b"done".to_vec()));
        let pid = written(&file).await;
        await_death(&pid);
    });
}

#[test]
fn dropped_probe_kills_its_command() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("pid");
    let test = HelperTest::started(&[&format!("echo $$ > {}; sleep 1000", file.display())]);
    on_runtime(async {
        let pid = tokio::select! {
            result = test.run(0, LONG * 10) => panic!("{result:?}"),
            pid = written(&file) => pid,
        };
        await_end(&pid);
    });
}

#[test]
fn error_of_the_program_is_a_local_error() {
    let mut test = HelperTest::new(&["", "", ""]);
    test.commands[0] = vec!["/does/not/exist".to_owned()];
    test.commands[1] = vec!["/etc".to_owned()];
    test.commands[2] = vec!["/bin/sh".to_owned(), "a\u{1}".to_owned()];
    test.write(&test.commands[..2]);
    let runner = CommandRunner::new(test.other.take().unwrap(), &test.file(), false);
    std::thread::spawn(move || runner.run().unwrap());
    on_runtime(async {
        let CommandResult::NotRun(libc::ENOENT, why) = test.run(0, LONG).await else { panic!() };
        assert!(why.starts_with("cannot start /does/not/exist: No such file"), "{why}");
        let CommandResult::NotRun(libc::EACCES, _) = test.run(1, LONG).await else { panic!() };
        let CommandResult::NotRun(0, why) = test.run(2, LONG).await else { panic!() };
        assert!(why.ends_with("t.toml does not have this command"), "{why}");
    });
}

#[test]
fn commands_beyond_the_cap_wait_and_are_counted_and_never_fail() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("go");
    let wait = format!("until [ -e {} ]; do sleep 0.05; done", file.display());
    let test = HelperTest::started(&[&wait, "exit 0"]);
    on_runtime(async {
        let running = (0..COMMANDS_RUNNING_MAX).map(|_| test.run(0, LONG * 2));
        let mut running: Vec<_> = running.map(Box::pin).collect();
        // The first poll of each takes its slot.
        for one in &mut running {
            assert!(futures_poll(one.as_mut()).await.is_none());
        }
        assert_eq!(test.counters.commands_waited.get(), 0);
        let started: Instant = clock::now();
        let CommandResult::NotRun(0, why) = test.run(1, LONG).await else { panic!() };
        assert_eq!(why, "not examined: 64 other commands ran for 3s");
        assert!(started.elapsed() >= COMMAND_WAIT_MAX);
        assert_eq!(test.counters.commands_waited.get(), 1);
        let waiting = async {
            std::fs::write(&file, "").unwrap();
            test.run(1, LONG).await
        };
        let all = async {
            for one in running {
                assert_eq!(one.await, CommandResult::Exited(0, Vec::new()));
            }
        };
        let (waited, ()) = tokio::join!(waiting, all);
        assert!(matches!(waited, CommandResult::Exited(0, _) | CommandResult::NotRun(0, _)));
        assert_eq!(test.run(1, LONG).await, CommandResult::Exited(0, Vec::new()));
    });
}

/// Polls a future once.
async fn futures_poll<F: Future>(mut future: std::pin::Pin<&mut F>) -> Option<F::Output> {
    std::future::poll_fn(|task| {
        std::task::Poll::Ready(match future.as_mut().poll(task) {
            std::task::Poll::Ready(output) => Some(output),
            std::task::Poll::Pending => None,
        })
    })
    .await
}

#[test]
fn helper_that_ends_is_a_local_error_an_event_and_counted_once() {
    let mut test = HelperTest::new(&["exit 0"]);
    on_runtime(async {
        assert!(!test.helper.has_ended());
        // A request that no runner answers: its end of the socket closes with the request in it.
        let other = test.other.take().unwrap();
        let lost = async {
            tokio::time::sleep(Duration::from_millis(20)).await;
            let _ = other.receive().unwrap();
        };
        let (result, ()) = tokio::join!(test.run(0, LONG), lost);
        let CommandResult::NotRun(0, why) = result else { panic!("{result:?}") };
        assert!(why.starts_with("the probe helper ended before its reply"), "{why}");
        assert_eq!((test.helper.has_ended(), test.counters.helper_failures.get()), (true, 1));
        drop(other);
        for _ in 0..2 {
            let CommandResult::NotRun(0, why) = test.run(0, LONG).await else { panic!() };
            assert!(why.starts_with("the probe helper has ended"), "{why}");
        }
        assert_eq!(test.counters.helper_failures.get(), 1);
        let events = test.events.after(0).events;
        assert!(events[0].text.starts_with("probe helper ended unexpectedly"), "{events:?}");
    });
}

#[test]
fn runner_ends_with_the_socket_and_kills_what_runs() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("pid");
    let script = format!("echo $$ > {}; sleep 1000", file.display());
    let mut test = HelperTest::new(&[&script]);
    let runner = CommandRunner::new(test.other.take().unwrap(), &test.file(), false);
    let runner = std::thread::spawn(move || runner.run());
    on_runtime(async {
        let pid = tokio::select! {
            result = test.run(0, LONG * 10) => panic!("{result:?}"),
            pid = written(&file) => pid,
        };
        drop(test);
        runner.join().unwrap().unwrap();
        await_end(&pid);
    });
}

#[test]
fn process_without_a_helper_runs_no_command() {
    let counters = Arc::new(WorkerCounters::new(Cause::COUNT, Phase::COUNT));
    let helper = ProbeHelper::new(None, counters, EventLog::new());
    on_runtime(async {
        let subject = CommandSubject::new(
            "web",
            "a",
            &tidegate_core::model::BackendAddr::Tcp("127.0.0.1:1".parse().unwrap()),
        );
        let CommandResult::NotRun(0, why) = helper.run(subject, &sh("exit 0"), LONG).await else {
            panic!()
        };
        assert!(why.contains("takes effect with `tidegate upgrade`"), "{why}");
        assert!(!helper.has_ended());
    });
}

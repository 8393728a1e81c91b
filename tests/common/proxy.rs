//! The Tidegate process under test: a child process, its admin API and its files.
//!
//! A test calls [`TestProxy::start`]. Dropping the handle runs the leak check: no
//! sessions, no extra descriptors, and exit code 0 after SIGTERM. If the test has
//! already failed, dropping prints the child's log instead. The handle uses only what
//! an operator has: files, signals, CLI, admin API, `/proc`.

use super::conf::Conf;
use super::http::{self, Answer};
use super::upgrade::Serving;
use super::{eventually, eventually_some, ms, proc, secs, within};
use rustix::process::Signal;
use serde_json::Value;
use std::fs::File;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::time::Duration;

/// The program under test.
pub const PROGRAM: &str = env!("CARGO_BIN_EXE_tidegate");

/// A running Tidegate process.
pub struct TestProxy {
    dir: tempfile::TempDir,
    conf: Conf,
    config_path: PathBuf,
    child: Child,
    /// The process that serves and the process that receives signals.
    serving: Serving,
    /// Open descriptors after the start or after the last [`TestProxy::rebaseline`].
    fd_baseline: usize,
    exited: Option<ExitStatus>,
}

impl TestProxy {
    /// Starts Tidegate and waits until it is ready and runs on the requested engine.
    #[track_caller]
    pub fn start(conf: Conf) -> TestProxy {
        let proxy = TestProxy::start_under(conf, &[]);
        let status = proxy.status();
        let wanted = proxy.conf.engine.name();
        assert_eq!(status["engine"], wanted, "why: {}", status["engine_reason"]);
        proxy
    }

    /// Starts Tidegate under a wrapper such as `["prlimit", "--nofile=64"]`, on any engine.
    #[track_caller]
    pub fn start_under(mut conf: Conf, wrapper: &[&str]) -> TestProxy {
        for _ in 0..3 {
            match TestProxy::try_start(conf.clone(), wrapper) {
                Ok(proxy) => return proxy,
                Err(log) if log.to_lowercase().contains("in use") => conf.move_ports(),
                Err(log) => panic!("Tidegate did not start:\n{log}"),
            }
        }
        panic!("the addresses were in use three times");
    }

    /// Starts Tidegate. If it exits before it is ready, returns its log as the error.
    pub fn try_start(conf: Conf, wrapper: &[&str]) -> Result<TestProxy, String> {
        TestProxy::try_start_as(conf, wrapper, false)
    }

    /// Starts Tidegate without a supervisor (`run --single`).
    #[track_caller]
    pub fn start_single(conf: Conf) -> TestProxy {
        TestProxy::start_single_under(conf, &[])
    }

    /// Starts Tidegate without a supervisor under a wrapper.
    #[track_caller]
    pub fn start_single_under(conf: Conf, wrapper: &[&str]) -> TestProxy {
        TestProxy::try_start_as(conf, wrapper, true)
            .unwrap_or_else(|log| panic!("Tidegate did not start:\n{log}"))
    }

    fn try_start_as(conf: Conf, wrapper: &[&str], single: bool) -> Result<TestProxy, String> {
        // Directly under /tmp, because the path of a Unix socket has at most 107 bytes.
        let dir = tempfile::Builder::new().prefix("tg-").tempdir_in("/tmp").expect("temp dir");
        let config_path = dir.path().join("tidegate.toml");
        std::fs::write(&config_path, render(&conf, dir.path())).expect("write the config");
        let child = spawn(&config_path, dir.path(), wrapper, single);
        let serving = Serving::new(single);
        let (fd_baseline, exited) = (0, None);
        let mut proxy = TestProxy { dir, conf, config_path, child, serving, fd_baseline, exited };
        proxy.wait_ready()?;
        proxy.rebaseline();
        Ok(proxy)
    }

    // --- state of the process ---

    /// The first address on which the frontend of this name listens.
    #[track_caller]
    pub fn addr(&self, frontend: &str) -> SocketAddr {
        self.conf.address(frontend)
    }

    /// A copy of the current configuration, to change and reload.
    pub fn conf(&self) -> Conf {
        self.conf.clone()
    }

    /// The process that serves.
    pub fn pid(&self) -> u32 {
        self.serving.pid()
    }

    /// The process to signal: the supervisor, or the serving process without a supervisor.
    pub fn service(&self) -> u32 {
        self.serving.service(&self.child)
    }

    /// Processes of the service other than the serving process.
    pub fn others(&self) -> Vec<u32> {
        self.serving.others()
    }

    /// Finds the serving process again after a crash.
    pub fn find_serving(&mut self) {
        self.serving.find(&self.child);
    }

    /// Makes `pid` the serving process after an upgrade.
    pub fn serve_by(&mut self, pid: u32) {
        self.serving.becomes(pid);
    }

    /// Pids of the earlier serving processes, running or not.
    pub fn pids_before(&self) -> Vec<u32> {
        self.serving.before()
    }

    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    pub fn config_path(&self) -> &Path {
        &self.config_path
    }

    /// The admin address in the form of the command line.
    pub fn admin(&self) -> String {
        admin_address(self.dir.path())
    }

    pub fn fd_count(&self) -> usize {
        proc::fd_count(self.pid())
    }

    pub fn rss_kib(&self) -> u64 {
        proc::rss_kib(self.pid())
    }

    pub fn threads(&self) -> u64 {
        proc::threads(self.pid())
    }

    pub fn cpu_time(&self) -> Duration {
        proc::cpu_time(self.pid())
    }

    /// What the process has written to standard error.
    pub fn log(&self) -> String {
        read_log(self.dir.path())
    }

    // --- admin API and command line ---

    /// Sends one admin request. Panics if it gets no answer.
    #[track_caller]
    pub fn admin_request(&self, method: &str, target: &str) -> Answer {
        let socket = self.dir.path().join("admin.sock");
        http::over_unix(&socket, method, target)
            .unwrap_or_else(|error| panic!("{method} {target}: {error}\n{}", self.log()))
    }

    /// `/v1/status`
    #[track_caller]
    pub fn status(&self) -> Value {
        let answer = self.admin_request("GET", "/v1/status");
        assert_eq!(answer.status, 200, "{}", answer.body);
        answer.json()
    }

    #[track_caller]
    pub fn generation(&self) -> u64 {
        self.status()["generation"].as_u64().expect("a generation")
    }

    /// One backend of `/v1/status`.
    #[track_caller]
    pub fn backend(&self, pool: &str, name: &str) -> Value {
        let status = self.status();
        find(&find(&status["pools"], pool)["backends"], name).clone()
    }

    /// Returns the `explain` answer for one backend.
    #[track_caller]
    pub fn explained(&self, pool: &str, name: &str) -> Value {
        let path = format!("/v1/pools/{pool}/backends/{name}/explain");
        let answer = self.admin_request("GET", &path);
        assert_eq!(answer.status, 200, "{}", answer.body);
        answer.json()
    }

    /// Returns the detector's data on one backend's heartbeats, or null before the first
    /// heartbeat.
    #[track_caller]
    pub fn sender(&self, pool: &str, name: &str) -> Value {
        self.explained(pool, name)["heartbeat"]["sender"].clone()
    }

    /// Waits until `count` more heartbeats of the backend have been accepted.
    #[track_caller]
    pub fn wait_heartbeats(&self, pool: &str, name: &str, count: u64) {
        let taken = || self.sender(pool, name)["received_total"].as_u64().unwrap_or(0);
        let wanted = taken() + count;
        let what = format!("{pool}/{name} has {count} more accepted heartbeats");
        eventually(secs(10), &what, || taken() >= wanted);
    }

    /// One frontend of `/v1/status`.
    #[track_caller]
    pub fn frontend(&self, name: &str) -> Value {
        find(&self.status()["frontends"], name).clone()
    }

    /// Waits until the backend's field `field` has the value `value`.
    #[track_caller]
    pub fn wait_backend(&self, pool: &str, name: &str, field: &str, value: impl Into<Value>) {
        let value = value.into();
        let what = format!("{pool}/{name} has {field} = {value}");
        eventually(secs(10), &what, || self.backend(pool, name)[field] == value);
    }

    /// Returns the sum of all samples of the metric whose labels include `labels`. Panics if
    /// the metric does not exist.
    #[track_caller]
    pub fn metric(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        let text = self.admin_request("GET", "/metrics").body;
        let family = ["_bucket", "_sum", "_count"].iter().find_map(|part| name.strip_suffix(part));
        let declared = [Some(name), family].into_iter().flatten();
        let exists =
            declared.map(|name| format!("# TYPE {name} ")).any(|line| text.contains(&line));
        assert!(exists, "no metric {name} in:\n{text}");
        sum_samples(&text, name, labels)
    }

    /// Runs one subcommand against this process.
    pub fn cli(&self, arguments: &[&str]) -> Output {
        Command::new(PROGRAM)
            .args(arguments)
            .args(["--admin", &self.admin()])
            .output()
            .expect("run the program")
    }

    /// Runs one subcommand, expects exit code 0 and returns standard output.
    #[track_caller]
    pub fn cli_ok(&self, arguments: &[&str]) -> String {
        let output = self.cli(arguments);
        assert_eq!(output.status.code(), Some(0), "{arguments:?}: {output:?}");
        String::from_utf8(output.stdout).expect("UTF-8 output")
    }

    // --- configuration ---

    /// Renders `conf`, replaces the file by rename and requests a reload, which must
    /// succeed.
    #[track_caller]
    pub fn reload(&mut self, conf: Conf) -> Value {
        self.rewrite_by_rename(&render(&conf, self.dir.path()));
        let answer = self.admin_request("POST", "/v1/reload");
        assert_eq!(answer.status, 200, "{}", answer.body);
        self.conf = conf;
        answer.json()
    }

    /// Renders `conf` as the text of this process's configuration file.
    pub fn render(&self, conf: &Conf) -> String {
        render(conf, self.dir.path())
    }

    /// Records `conf` as the current configuration. Tidegate is not notified.
    pub fn adopt(&mut self, conf: Conf) {
        self.conf = conf;
    }

    /// Overwrites the file in place.
    pub fn rewrite_in_place(&self, text: &str) {
        std::fs::write(&self.config_path, text).expect("write the config");
    }

    /// Replaces the file by renaming a new one over it.
    pub fn rewrite_by_rename(&self, text: &str) {
        self.rewrite_by_rename_bytes(text.as_bytes());
    }

    /// Replaces the file by rename with content that can be invalid text.
    pub fn rewrite_by_rename_bytes(&self, text: &[u8]) {
        let new = self.dir.path().join(".tidegate.toml.new");
        std::fs::write(&new, text).expect("write the config");
        std::fs::rename(new, &self.config_path).expect("rename the config");
    }

    /// Replaces the file as Kubernetes does for a ConfigMap. The file is a link to
    /// `..data/tidegate.toml`. `..data` is a link to a directory and is replaced by rename.
    pub fn rewrite_by_symlink_swap(&self, text: &str) {
        use std::os::unix::fs::symlink;
        let dir = self.dir.path();
        let version = format!("..v{}", fastrand::u64(..));
        std::fs::create_dir(dir.join(&version)).expect("create the version directory");
        std::fs::write(dir.join(&version).join("tidegate.toml"), text).expect("write");
        symlink(&version, dir.join("..data_tmp")).expect("link the version");
        std::fs::rename(dir.join("..data_tmp"), dir.join("..data")).expect("swap ..data");
        if !self.config_path.is_symlink() {
            symlink("..data/tidegate.toml", dir.join(".link")).expect("link the file");
            std::fs::rename(dir.join(".link"), &self.config_path).expect("place the link");
        }
    }

    // --- signals, exit and restart ---

    /// Sends a signal to the supervisor, which passes on signals that a process can catch.
    /// SIGSTOP and SIGCONT go directly to the serving process.
    pub fn signal(&self, signal: Signal) {
        let direct = matches!(signal, Signal::STOP | Signal::CONT);
        proc::signal(if direct { self.pid() } else { self.service() }, signal);
    }

    pub fn sigterm(&self) {
        self.signal(Signal::TERM);
    }

    pub fn sighup(&self) {
        self.signal(Signal::HUP);
    }

    /// Waits until the process exits without a signal of the harness. Returns its exit code.
    #[track_caller]
    pub fn wait_exit(&mut self, timeout: Duration) -> Option<i32> {
        let status = within(timeout, || self.serving.try_wait(&mut self.child));
        let Some(status) = status else {
            let threads = [self.service(), self.pid()].map(proc::thread_states).concat();
            panic!("the process still runs after {timeout:?}\n{}{threads:#?}", self.log());
        };
        self.exited = Some(status);
        status.code()
    }

    /// Stops the process with SIGTERM and starts it again with the same file.
    #[track_caller]
    pub fn restart(&mut self) {
        self.check_for_leaks();
        self.start_again();
    }

    /// Starts the process again with the same file after it has exited.
    #[track_caller]
    pub fn start_again(&mut self) {
        assert!(self.exited.is_some(), "the process still runs");
        self.child = spawn(&self.config_path, self.dir.path(), &[], false);
        self.serving = Serving::new(false);
        self.exited = None;
        self.wait_ready().unwrap_or_else(|log| panic!("no restart:\n{log}"));
        self.rebaseline();
    }

    /// Makes the current number of descriptors the new baseline, after a reload that adds or
    /// removes listeners.
    pub fn rebaseline(&mut self) {
        // The server end of the last admin connection can still be closing.
        let mut last = self.fd_count();
        self.fd_baseline = eventually_some(secs(5), "a steady number of descriptors", || {
            // Long enough for the count to change.
            std::thread::sleep(ms(20));
            let count = self.fd_count();
            let steady = count == last;
            last = count;
            steady.then_some(count)
        });
    }

    /// Checks that no session is left, that descriptors are back at the baseline, and that
    /// the process exits with code 0 within 5 s of SIGTERM. Dropping the handle calls it.
    #[track_caller]
    pub fn check_for_leaks(&mut self) {
        if self.exited.is_some() {
            return;
        }
        let none_left = within(secs(10), || (sum_active(&self.status()) == 0).then_some(()));
        assert!(
            none_left.is_some(),
            "sessions left: {:#}\nsockets of the process: {:#?}",
            self.status(),
            proc::tcp_sockets(self.pid())
        );
        // A member source has up to two more connections while it reads a list again.
        let source = 2 * self.render(&self.conf).matches(".discover]").count();
        let most = self.fd_baseline + source;
        let as_before = within(secs(5), || (self.fd_count() <= most).then_some(()));
        assert!(
            as_before.is_some(),
            "{} descriptors open, {} at the start: {:#?}",
            self.fd_count(),
            self.fd_baseline,
            proc::fds(self.pid())
        );
        self.sigterm();
        // With a busy disk, the last lines and the state need up to 4 s (`access_log::CLOSE_MAX`
        // and both constants `FLUSH_MAX` of the daemon).
        let code = self.wait_exit(secs(5));
        assert_eq!(code, Some(0), "SIGTERM without sessions gives exit code 0\n{}", self.log());
    }

    fn wait_ready(&mut self) -> Result<(), String> {
        let socket = self.dir.path().join("admin.sock");
        let ready = || http::over_unix(&socket, "GET", "/ready").is_ok_and(|a| a.status == 200);
        let result =
            within(secs(20), || match self.child.try_wait().expect("wait for the child") {
                Some(status) => Some(Err(status)),
                None => ready().then_some(Ok(())),
            });
        match result {
            Some(Ok(())) => {
                self.serving.find(&self.child);
                Ok(())
            }
            Some(Err(status)) => {
                self.exited = Some(status);
                Err(format!("{status}\n{}", self.log()))
            }
            None => Err(format!("not ready in time\n{}", self.log())),
        }
    }
}

impl Drop for TestProxy {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- Tidegate's log ---\n{}--- end of log ---", self.log());
        } else {
            // A failed check panics. The child must be reaped before the panic continues.
            let checked =
                std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| self.check_for_leaks()));
            if let Err(failure) = checked {
                eprintln!("--- Tidegate's log ---\n{}--- end of log ---", self.log());
                self.kill();
                std::panic::resume_unwind(failure);
            }
        }
        self.kill();
    }
}

impl TestProxy {
    /// Kills and reaps the child.
    pub fn kill(&mut self) {
        if self.exited.is_none() {
            self.exited = self.serving.kill(&mut self.child);
        }
    }
}

fn spawn(config: &Path, dir: &Path, wrapper: &[&str], single: bool) -> Child {
    let log = File::options().create(true).append(true).open(dir.join("stderr")).expect("log");
    let mut words: Vec<&str> = wrapper.to_vec();
    let pid_file = dir.join("pid");
    words.extend([PROGRAM, "run", "--config"]);
    Command::new(words[0])
        .args(&words[1..])
        .arg(config)
        .arg("--pid-file")
        .arg(pid_file)
        .args(single.then_some("--single"))
        .stdin(Stdio::null())
        .stdout(log.try_clone().expect("a second handle of the log"))
        .stderr(log)
        .spawn()
        .expect("start Tidegate")
}

fn render(conf: &Conf, dir: &Path) -> String {
    conf.render(&admin_address(dir), &access_log_path(dir).to_string_lossy())
}

fn access_log_path(dir: &Path) -> PathBuf {
    dir.join("access.log")
}

fn admin_address(dir: &Path) -> String {
    format!("unix:{}", dir.join("admin.sock").display())
}

fn read_log(dir: &Path) -> String {
    std::fs::read_to_string(dir.join("stderr")).unwrap_or_default()
}

#[track_caller]
fn find<'a>(list: &'a Value, name: &str) -> &'a Value {
    list.as_array()
        .and_then(|items| items.iter().find(|item| item["name"] == name))
        .unwrap_or_else(|| panic!("no {name:?} in {list:#}"))
}

/// Sessions that are open on any frontend or backend, including removed backends.
pub fn sum_active(status: &Value) -> u64 {
    let active = |items: &Value| -> u64 {
        let items = items.as_array().into_iter().flatten();
        items.map(|item| item["sessions_active"].as_u64().expect("sessions_active")).sum()
    };
    let pools = status["pools"].as_array().into_iter().flatten();
    let serving = pools.map(|pool| active(&pool["backends"])).sum::<u64>();
    active(&status["frontends"]) + active(&status["leaving"]) + serving
}

/// See [`TestProxy::metric`].
pub fn sum_samples(text: &str, name: &str, labels: &[(&str, &str)]) -> f64 {
    text.lines()
        .filter_map(|line| {
            let rest = line.strip_prefix(name)?;
            let (set, value) = match rest.strip_prefix('{') {
                Some(rest) => rest.rsplit_once("} ")?,
                None => ("", rest.strip_prefix(' ')?),
            };
            let wanted = |(key, value): &(&str, &str)| set.contains(&format!("{key}=\"{value}\""));
            labels.iter().all(wanted).then(|| value.trim().parse::<f64>().expect("a number"))
        })
        .sum()
}

impl TestProxy {
    /// Returns the access log, one JSON object per line.
    pub fn access_log(&self) -> Vec<Value> {
        std::fs::read_to_string(access_log_path(self.dir.path()))
            .unwrap_or_default()
            .lines()
            .map(|line| serde_json::from_str(line).expect("one JSON object per line"))
            .collect()
    }

    /// Returns the lines of the access log that do not contain `text`. Reads line by line,
    /// because the log can be long.
    pub fn access_lines_without(&self, text: &str) -> String {
        let file =
            std::fs::File::open(access_log_path(self.dir.path())).expect("the access log exists");
        let lines = std::io::BufRead::lines(std::io::BufReader::new(file)).map_while(Result::ok);
        lines.filter(|line| !line.contains(text)).collect::<Vec<_>>().join("\n")
    }

    /// Waits until the access log has `count` lines and returns them.
    #[track_caller]
    pub fn wait_access_log(&self, count: usize) -> Vec<Value> {
        eventually(secs(10), &format!("{count} lines in the access log"), || {
            let text = std::fs::read_to_string(access_log_path(self.dir.path()));
            text.is_ok_and(|text| text.lines().count() >= count && text.ends_with('\n'))
        });
        self.access_log()
    }
}

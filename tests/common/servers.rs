//! Real servers and load tools: nginx, redis, wrk, redis-benchmark, iperf3.
//!
//! Each program runs on its own ports and files. Dropping its handle kills it and its
//! children by pid. A test calls [`super::have`] first. No system service and no system
//! configuration is used.

use super::ports::free_port;
use super::{eventually, proc, secs};
use rustix::process::Signal;
use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

/// Finds a program on the PATH, in the sbin directories, which a user's PATH often omits, and
/// in those of PostgreSQL.
pub fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let extra = ["/usr/sbin", "/sbin", "/usr/local/sbin"].map(PathBuf::from);
    let versions = std::fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten();
    std::env::split_paths(&path)
        .chain(extra)
        .chain(versions.map(|version| version.path().join("bin")))
        .map(|dir| dir.join(program))
        .find(|file| file.is_file())
}

/// A child process. Dropping it kills and reaps the process and kills its children.
pub struct Running {
    child: Child,
    reaped: bool,
}

impl Running {
    pub fn start(command: &mut Command) -> Running {
        let child = command.stdin(Stdio::null()).spawn();
        let child = child.unwrap_or_else(|error| panic!("start {command:?}: {error}"));
        Running { child, reaped: false }
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Sends SIGKILL to the process and its children.
    pub fn kill(&mut self) {
        if self.reaped {
            return;
        }
        // Stopped first, so that it starts no more children. Children are listed before the
        // kill, because a killed parent lists none.
        proc::signal(self.pid(), Signal::STOP);
        let children = proc::children(self.pid());
        for pid in &children {
            proc::signal(*pid, Signal::KILL);
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
        // Another process reaps orphans, so a zombie is sufficient here.
        super::eventually(secs(10), "the children have ended", || {
            children.iter().all(|pid| proc::is_dead(*pid))
        });
        self.reaped = true;
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.kill();
    }
}

/// nginx with one worker, which answers every request with its name.
pub struct Nginx {
    pub name: String,
    pub address: SocketAddr,
    running: Running,
    dir: tempfile::TempDir,
}

impl Nginx {
    pub fn start(name: &str) -> Nginx {
        Nginx::start_with(name, &format!("location / {{ return 200 \"{name}\"; }}"))
    }

    /// Starts nginx with these lines of its only server.
    pub fn start_with(name: &str, lines: &str) -> Nginx {
        let dir = tempfile::Builder::new().prefix("tg-nginx-").tempdir_in("/tmp").expect("dir");
        let address = SocketAddr::from(([127, 0, 0, 1], free_port()));
        let running = start_nginx(dir.path(), &nginx_config(lines, address));
        let nginx = Nginx { name: name.into(), address, running, dir };
        nginx.wait_until_ready();
        nginx
    }

    /// Kills it and starts it again at its address, with other lines of its server.
    pub fn restart_with(&mut self, lines: &str) {
        self.kill();
        self.running = start_nginx(self.dir.path(), &nginx_config(lines, self.address));
        self.wait_until_ready();
    }

    fn wait_until_ready(&self) {
        eventually(secs(10), "nginx answers", || super::http::over_tcp(self.address, "/").is_ok());
    }

    /// Stops its processes. The kernel continues to accept connections for it.
    pub fn pause(&self) {
        self.signal(Signal::STOP);
    }

    /// Continues the stopped processes.
    pub fn resume(&self) {
        self.signal(Signal::CONT);
    }

    fn signal(&self, signal: Signal) {
        let master = self.running.pid();
        for pid in super::proc::children(master).into_iter().chain([master]) {
            super::proc::signal(pid, signal);
        }
    }

    /// Sends SIGKILL to the master and its worker.
    pub fn kill(&mut self) {
        self.running.kill();
    }
}

fn start_nginx(dir: &Path, text: &str) -> Running {
    let config = dir.join("nginx.conf");
    std::fs::write(&config, text).expect("write nginx.conf");
    let log = std::fs::File::create(dir.join("error.log")).expect("error log");
    Running::start(
        Command::new(find("nginx").expect("the test checked for nginx"))
            .arg("-p")
            .arg(dir)
            .arg("-c")
            .arg(&config)
            .args(["-e", "stderr"])
            .stdout(Stdio::null())
            .stderr(log),
    )
}

fn nginx_config(lines: &str, address: SocketAddr) -> String {
    let is_root = rustix::process::geteuid().is_root();
    let user = if is_root { "user root;" } else { "" };
    format!(
        "{user}
daemon off;
master_process on;
worker_processes 1;
worker_rlimit_nofile 8192;
pid nginx.pid;
error_log stderr error;
events {{ worker_connections 4096; }}
http {{
    access_log off;
    client_body_temp_path body;
    proxy_temp_path proxy;
    fastcgi_temp_path fastcgi;
    uwsgi_temp_path uwsgi;
    scgi_temp_path scgi;
    keepalive_requests 100000000;
    keepalive_timeout 600s;
    server {{
        listen {address} backlog=4096;
        default_type text/plain;
        {lines}
    }}
}}
"
    )
}

/// redis-server without persistence.
pub struct Redis {
    pub address: SocketAddr,
    running: Running,
    dir: tempfile::TempDir,
}

impl Redis {
    pub fn start() -> Redis {
        let dir = tempfile::Builder::new().prefix("tg-redis-").tempdir_in("/tmp").expect("dir");
        let address = SocketAddr::from(([127, 0, 0, 1], free_port()));
        let running = start_redis(dir.path(), address);
        Redis { address, running, dir }
    }

    /// Sends SIGKILL.
    pub fn kill(&mut self) {
        self.running.kill();
    }

    /// Starts it again at its address, empty and as a primary.
    pub fn restart(&mut self) {
        self.running = start_redis(self.dir.path(), self.address);
    }

    /// Makes it a replica; `None`: a primary.
    pub fn follow(&self, primary: Option<SocketAddr>) {
        let command = primary.map_or("REPLICAOF NO ONE".to_owned(), |primary| {
            format!("REPLICAOF {} {}", primary.ip(), primary.port())
        });
        let reply = Redis::ask(self.address, &command);
        assert!(reply.as_ref().is_ok_and(|reply| reply.starts_with("+OK")), "{reply:?}");
    }

    /// Sends an inline command in a new connection. Returns the first line of the reply, and of
    /// a text the text.
    pub fn ask(address: SocketAddr, command: &str) -> std::io::Result<String> {
        let mut stream = TcpStream::connect_timeout(&address, secs(5))?;
        stream.set_read_timeout(Some(secs(5)))?;
        stream.write_all(format!("{command}\r\n").as_bytes())?;
        let mut lines = BufReader::new(stream).lines();
        let mut next =
            || lines.next().unwrap_or_else(|| Err(std::io::ErrorKind::UnexpectedEof.into()));
        let line = next()?;
        if line.starts_with('$') { next() } else { Ok(line) }
    }
}

fn start_redis(dir: &Path, address: SocketAddr) -> Running {
    let running = Running::start(
        Command::new(find("redis-server").expect("the test checked for redis-server"))
            .args(["--port", &address.port().to_string(), "--bind", "127.0.0.1"])
            .args(["--save", "", "--appendonly", "no", "--repl-diskless-sync-delay", "0", "--dir"])
            .arg(dir)
            .stdout(Stdio::null())
            .stderr(Stdio::null()),
    );
    eventually(secs(10), "redis listens", || TcpStream::connect(address).is_ok());
    running
}

/// Returns the output of redis-benchmark. Panics on a non-zero exit or an error line.
#[track_caller]
pub fn redis_benchmark(address: SocketAddr, arguments: &[&str]) -> String {
    let output =
        Command::new(find("redis-benchmark").expect("the test checked for redis-benchmark"))
            .args(["-h", &address.ip().to_string(), "-p", &address.port().to_string()])
            .args(arguments)
            .output()
            .expect("run redis-benchmark");
    let text = String::from_utf8_lossy(&output.stdout).replace('\r', "\n")
        + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "redis-benchmark {arguments:?}: {text}");
    let error = text.lines().find(|line| {
        let line = line.to_lowercase();
        // redis-benchmark sends CONFIG first and warns if it gets no answer. This is no
        // traffic error.
        (line.contains("error") || line.contains("could not"))
            && !line.contains("fetch server config")
    });
    assert!(error.is_none(), "redis-benchmark {arguments:?}: {text}");
    text
}

/// The counts in wrk's report.
#[derive(Debug, Clone, Default)]
pub struct WrkReport {
    pub requests: u64,
    pub connect_errors: u64,
    pub read_errors: u64,
    pub write_errors: u64,
    pub timeouts: u64,
    pub bad_status: u64,
    pub text: String,
}

impl WrkReport {
    pub fn errors(&self) -> u64 {
        self.connect_errors + self.read_errors + self.write_errors + self.timeouts + self.bad_status
    }
}

/// wrk running in the background.
pub struct Wrk(Child);

impl Wrk {
    /// Starts wrk with one thread, `connections` connections and a duration of `seconds`.
    pub fn start(address: SocketAddr, connections: u32, seconds: u32) -> Wrk {
        let child = Command::new(find("wrk").expect("the test checked for wrk"))
            .args(["-t1", &format!("-c{connections}"), &format!("-d{seconds}s")])
            .args(["--timeout", "5s", &format!("http://{address}/")])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn();
        Wrk(child.expect("start wrk"))
    }

    /// Waits until wrk exits and parses its report.
    #[track_caller]
    pub fn report(mut self) -> WrkReport {
        use std::io::Read;
        let mut text = String::new();
        let stdout = self.0.stdout.as_mut().expect("piped");
        stdout.read_to_string(&mut text).expect("wrk prints text");
        let status = self.0.wait().expect("wait for wrk");
        assert!(status.success(), "wrk failed: {text}");
        parse_wrk(&text)
    }
}

impl Drop for Wrk {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Parses wrk's report.
#[track_caller]
pub fn parse_wrk(text: &str) -> WrkReport {
    let number_after = |line: &str, word: &str| -> u64 {
        let rest = line.split_once(word).map_or("", |(_, rest)| rest);
        let digits: String = rest.trim().chars().take_while(char::is_ascii_digit).collect();
        digits.parse().unwrap_or_else(|_| panic!("no number after {word:?} in {line:?}"))
    };
    let mut report = WrkReport { text: text.into(), ..WrkReport::default() };
    for line in text.lines() {
        if let Some(rest) = line.split(" requests in ").next()
            && line.contains(" requests in ")
        {
            report.requests = rest.trim().parse().expect("a count of requests");
        }
        if line.contains("Socket errors:") {
            report.connect_errors = number_after(line, "connect");
            report.read_errors = number_after(line, "read");
            report.write_errors = number_after(line, "write");
            report.timeouts = number_after(line, "timeout");
        }
        if line.contains("Non-2xx or 3xx responses:") {
            report.bad_status = number_after(line, "responses:");
        }
    }
    assert!(report.requests > 0 || text.contains("0 requests in"), "no wrk report: {text}");
    report
}

/// An iperf3 server.
pub struct Iperf3 {
    pub address: SocketAddr,
    _running: Running,
}

impl Iperf3 {
    pub fn start() -> Iperf3 {
        let address = SocketAddr::from(([127, 0, 0, 1], free_port()));
        let running = Running::start(
            Command::new(find("iperf3").expect("the test checked for iperf3"))
                .args(["-s", "-B", "127.0.0.1", "-p", &address.port().to_string()])
                .stdout(Stdio::null())
                .stderr(Stdio::null()),
        );
        // iperf3 would count a bare connect as a failed test, so the socket table is read
        // instead.
        eventually(secs(10), "iperf3 listens", || {
            let hex = format!("0100007F:{:04X} 00000000:0000 0A", address.port());
            std::fs::read_to_string("/proc/net/tcp").is_ok_and(|table| table.contains(&hex))
        });
        Iperf3 { address, _running: running }
    }
}

/// Runs an iperf3 client and returns the bits per second that the receiver measured.
#[track_caller]
pub fn iperf3_client(address: SocketAddr, arguments: &[&str]) -> f64 {
    let output = Command::new(find("iperf3").expect("the test checked for iperf3"))
        .args(["-c", &address.ip().to_string(), "-p", &address.port().to_string(), "-J"])
        .args(arguments)
        .output()
        .expect("run iperf3");
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "iperf3 {arguments:?}: {text}");
    let report: serde_json::Value = serde_json::from_str(&text).expect("iperf3 -J prints JSON");
    report["end"]["sum_received"]["bits_per_second"].as_f64().expect("a rate")
}

/// An idle echo server in a separate process, so that its descriptors do not count
/// against the test's limit.
pub struct IdleBackend {
    pub address: SocketAddr,
    _running: Running,
}

impl IdleBackend {
    pub fn start() -> IdleBackend {
        let address = SocketAddr::from(([127, 0, 0, 1], free_port()));
        let running = Running::start(
            Command::new("python3")
                .args(["-c", include_str!("idle_backend.py"), &address.port().to_string()])
                .stdout(Stdio::null()),
        );
        eventually(secs(10), "the idle backend listens", || TcpStream::connect(address).is_ok());
        IdleBackend { address, _running: running }
    }
}

/// Returns the wrapper command that makes io_uring_setup(2) fail with EPERM, as default
/// container profiles do.
pub fn without_io_uring() -> Vec<&'static str> {
    vec!["python3", "-c", include_str!("without_io_uring.py")]
}

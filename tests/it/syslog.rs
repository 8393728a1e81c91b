//! Logs to syslog: rsyslogd over each transport, receivers that restart, and one that hangs.

use crate::common::backend::{self, ScriptedBackend};
use crate::common::conf::{Conf, Pool};
use crate::common::ports::free_port;
use crate::common::proxy::TestProxy;
use crate::common::servers::{Running, find};
use crate::common::{Engine, client, eventually, have, on_every_engine, secs};
use std::net::TcpListener;
use std::os::unix::net::UnixDatagram;
use std::path::PathBuf;
use std::process::Command;
use std::time::Instant;

on_every_engine!(
    rsyslogd_gets_both_logs_over_every_transport,
    lines_wait_for_a_receiver_that_restarts,
    receiver_that_hangs_delays_no_session_and_no_exit,
);

/// rsyslogd with a socket of its host, a socket for RFC 5424, UDP and TCP.
struct Rsyslogd {
    dir: tempfile::TempDir,
    port: u16,
    running: Running,
}

/// A received message: priority, application, process, kind and text.
type Received = (String, String, String, String, String);

impl Rsyslogd {
    fn start() -> Rsyslogd {
        let dir = tempfile::Builder::new().prefix("tg-syslog-").tempdir_in("/tmp").expect("dir");
        let port = free_port();
        let running = Rsyslogd::run(dir.path(), port);
        Rsyslogd { dir, port, running }
    }

    fn run(dir: &std::path::Path, port: u16) -> Running {
        let at = dir.display();
        let config = format!(
            "module(load=\"imuxsock\" SysSock.Use=\"off\")\nmodule(load=\"imudp\")\n\
             module(load=\"imtcp\")\n\
             input(type=\"imuxsock\" Socket=\"{at}/local\" RateLimit.Interval=\"0\")\n\
             input(type=\"imuxsock\" Socket=\"{at}/unix\" UseSpecialParser=\"off\" \
             RateLimit.Interval=\"0\")\n\
             input(type=\"imudp\" address=\"127.0.0.1\" port=\"{port}\")\n\
             input(type=\"imtcp\" address=\"127.0.0.1\" port=\"{port}\")\n\
             template(name=\"t\" type=\"string\" \
             string=\"%pri%|%app-name%|%procid%|%msgid%|%msg%\\n\")\n\
             *.* action(type=\"omfile\" file=\"{at}/received\" template=\"t\")\n"
        );
        std::fs::write(dir.join("conf"), config).expect("write");
        let program = find("rsyslogd").expect("rsyslogd");
        let arguments = ["-n", "-f", &format!("{at}/conf"), "-i", &format!("{at}/pid")];
        let errors = std::fs::File::create(dir.join("errors")).expect("create");
        let running = Running::start(Command::new(program).args(arguments).stderr(errors));
        eventually(secs(10), "rsyslogd listens", || {
            dir.join("unix").exists() && std::net::TcpStream::connect(("127.0.0.1", port)).is_ok()
        });
        running
    }

    fn received(&self) -> Vec<Received> {
        let text = std::fs::read_to_string(self.dir.path().join("received")).unwrap_or_default();
        let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
        let parse = |line: &str| -> Option<Received> {
            let mut parts = line.splitn(5, '|').map(|part| part.trim_start().to_owned());
            Some((parts.next()?, parts.next()?, parts.next()?, parts.next()?, parts.next()?))
        };
        whole.lines().filter_map(parse).collect()
    }

    /// The numbers of the sessions in received access-log lines, sorted.
    fn sessions(&self) -> Vec<u64> {
        let received = self.received();
        let lines = received.iter().filter(|line| line.4.starts_with("{\"time\""));
        let parsed = lines.map(|line| serde_json::from_str::<serde_json::Value>(&line.4));
        let mut numbers: Vec<u64> =
            parsed.map(|line| line.expect("JSON")["session"].as_u64().expect("a number")).collect();
        numbers.sort_unstable();
        numbers
    }

    fn receivers(&self) -> [String; 4] {
        let (at, port) = (self.dir.path().display(), self.port);
        [
            format!("syslog:{at}/local"),
            format!("syslog:unix:{at}/unix"),
            format!("syslog:udp:127.0.0.1:{port}"),
            format!("syslog:tcp:127.0.0.1:{port}"),
        ]
    }
}

/// A balancer with one backend, and these receivers of the access log and the log.
fn start(engine: Engine, access: &str, log: &str) -> (ScriptedBackend, TestProxy) {
    let a = ScriptedBackend::start(backend::name("a"));
    let mut conf = Conf::simple(engine, Pool::new("web").backend("a", a.address()));
    conf.access = Some(access.to_owned());
    conf.log = log.to_owned();
    (a, TestProxy::start(conf))
}

fn serve(proxy: &TestProxy, count: usize) {
    for _ in 0..count {
        assert_eq!(client::ask(proxy.addr("web")).expect("an answer"), "a");
    }
}

fn rsyslogd_gets_both_logs_over_every_transport(engine: Engine) {
    if !have(&["rsyslogd"]) {
        return;
    }
    let syslog = Rsyslogd::start();
    for receiver in syslog.receivers() {
        let known = syslog.received().len();
        let (_a, mut proxy) = start(
            engine,
            &receiver,
            &format!("target = \"{receiver}\"\nfacility = \"user\"\naccess_facility = \"local3\""),
        );
        let before = syslog.sessions().len();
        serve(&proxy, 50);
        eventually(secs(10), "every session is logged", || syslog.sessions().len() == before + 50);
        let local = receiver.ends_with("/local");
        let kind = |kind: &str| if local { "-".to_owned() } else { kind.to_owned() };
        let pid = proxy.pid().to_string();
        let has = |priority: &str, kind: String, text: &str| {
            let new = &syslog.received()[known..];
            new.iter().any(|line| {
                line.0 == priority
                    && (&*line.1, &line.2, &line.3) == ("tidegate", &pid, &kind)
                    && line.4.contains(text)
            })
        };
        // Facility user (1), severity info (6). Facility local3 (19).
        eventually(secs(10), "the start is logged", || has("14", kind("log"), "started version="));
        assert!(has("158", kind("access"), "\"frontend\":\"web\""), "{receiver}");
        proxy.rewrite_by_rename("nonsense");
        assert_eq!(proxy.admin_request("POST", "/v1/reload").status, 422);
        // Severity error (3).
        eventually(secs(10), "the error is logged", || has("11", kind("log"), "reload"));
        proxy.sigterm();
        assert_eq!(proxy.wait_exit(secs(20)), Some(0));
    }
}

fn lines_wait_for_a_receiver_that_restarts(engine: Engine) {
    if !have(&["rsyslogd"]) {
        return;
    }
    let mut syslog = Rsyslogd::start();
    let [_, unix, _, tcp] = syslog.receivers();
    let mut starts = [unix, tcp].map(|receiver| start(engine, &receiver, ""));
    for (_, proxy) in &starts {
        serve(proxy, 10);
    }
    eventually(secs(10), "the first sessions are logged", || syslog.sessions().len() == 20);
    // The connections to the receiver are open now.
    starts.iter_mut().for_each(|(_, proxy)| proxy.rebaseline());
    syslog.running.kill();
    for (_, proxy) in &starts {
        serve(proxy, 40);
    }
    std::fs::remove_file(syslog.dir.path().join("unix")).expect("remove the socket");
    syslog.running = Rsyslogd::run(syslog.dir.path(), syslog.port);
    eventually(secs(20), "the sessions of the outage are logged", || {
        syslog.sessions().len() == 100
    });
    for (_, proxy) in &starts {
        assert_eq!(proxy.metric("tidegate_access_log_dropped_total", &[]), 0.0);
    }
}

fn receiver_that_hangs_delays_no_session_and_no_exit(engine: Engine) {
    let dir = tempfile::tempdir_in("/tmp").expect("dir");
    let path: PathBuf = dir.path().join("log");
    let _unix = UnixDatagram::bind(&path).expect("bind");
    let tcp = TcpListener::bind("127.0.0.1:0").expect("bind");
    let tcp = format!("syslog:tcp:{}", tcp.local_addr().expect("an address"));
    let unix = format!("syslog:{}", path.display());
    for (access, log) in [(&unix, &tcp), (&tcp, &unix)] {
        let log = format!("target = \"{log}\"\nlevel = \"trace\"");
        let (_a, mut proxy) = start(engine, access, &log);
        // Several lines of the log per session: more than the socket of a host holds.
        serve(&proxy, 500);
        assert_eq!(proxy.admin_request("GET", "/v1/status").status, 200);
        assert_eq!(proxy.admin_request("POST", "/v1/reload").status, 200);
        let begin = Instant::now();
        proxy.sigterm();
        assert_eq!(proxy.wait_exit(secs(20)), Some(0));
        // CLOSE_MAX of the access log and FLUSH_MAX of the log.
        assert!(begin.elapsed() < secs(10), "{:?}", begin.elapsed());
    }
}

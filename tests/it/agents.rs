//! Agents next to backends: what they say, and what follows from it.
//!
//! HAProxy asks the same agents in one test, and must do the same.

use crate::common::backend::{self, ScriptedBackend};
use crate::common::client::connect;
use crate::common::conf::{Conf, Pool};
use crate::common::ports::free_port;
use crate::common::proxy::TestProxy;
use crate::common::servers::{Running, find};
use crate::common::{Engine, eventually, have, secs};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// A listener that answers each connection with its current line. `None`: it never answers.
#[derive(Clone)]
struct Agent {
    address: SocketAddr,
    line: Arc<Mutex<Option<String>>>,
    /// What the last client has sent, if it sent something.
    asked: Arc<Mutex<String>>,
}

impl Agent {
    fn start() -> Agent {
        Agent::on(TcpListener::bind("127.0.0.1:0").unwrap())
    }

    /// Two agents with the same port, at 127.0.0.1 and 127.0.0.2.
    fn pair() -> (Agent, Agent) {
        loop {
            let first = TcpListener::bind("127.0.0.1:0").unwrap();
            let port = first.local_addr().unwrap().port();
            if let Ok(second) = TcpListener::bind(("127.0.0.2", port)) {
                return (Agent::on(first), Agent::on(second));
            }
        }
    }

    fn on(listener: TcpListener) -> Agent {
        let address = listener.local_addr().unwrap();
        let agent = Agent { address, line: Arc::default(), asked: Arc::default() };
        agent.says("up ready 100%\n");
        let own = agent.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let own = own.clone();
                std::thread::spawn(move || own.answer(stream));
            }
        });
        agent
    }

    fn says(&self, line: &str) {
        *self.line.lock().unwrap() = Some(line.to_owned());
    }

    fn hangs(&self) {
        *self.line.lock().unwrap() = None;
    }

    fn answer(&self, mut stream: TcpStream) {
        let line = self.line.lock().unwrap().clone();
        stream.set_read_timeout(Some(Duration::from_millis(20))).unwrap();
        let mut asked = [0; 64];
        if let Ok(count @ 1..) = stream.read(&mut asked) {
            *self.asked.lock().unwrap() = String::from_utf8_lossy(&asked[..count]).into_owned();
        }
        match line {
            Some(line) => drop(stream.write_all(line.as_bytes())),
            None => drop(stream.read(&mut [0; 1])),
        }
    }
}

const FAST: &str = "interval = \"100ms\"\ntimeout = \"100ms\"";

/// A balancer of one backend with an agent.
struct Scene {
    proxy: TestProxy,
    agent: Agent,
    _backend: ScriptedBackend,
}

impl Scene {
    fn start(keys: &str) -> Scene {
        let agent = Agent::start();
        let backend = ScriptedBackend::start(backend::greet("a"));
        let port = agent.address.port();
        let pool = Pool::new("web")
            .probe(&format!("kind = \"agent\"\nport = {port}\n{FAST}\n{keys}"))
            .backend_with("a", backend.address(), "weight = 10\nconnections_max = 50");
        let proxy = TestProxy::start(Conf::simple(Engine::Epoll, pool));
        proxy.wait_backend("web", "a", "observation", "up");
        Scene { proxy, agent, _backend: backend }
    }

    fn expect(&self, field: &str, value: impl Into<serde_json::Value>) {
        self.proxy.wait_backend("web", "a", field, value);
    }

    fn why(&self) -> String {
        self.proxy.explained("web", "a")["why"].as_str().unwrap().to_owned()
    }
}

#[test]
fn agent_sets_weight_and_cap_and_drains_its_backend() {
    let scene = Scene::start("send = \"state?\\n\"");
    let agent = &scene.agent;
    agent.says("40%,maxconn:7\r\n");
    scene.expect("effective_weight", 4);
    let explained = scene.proxy.explained("web", "a");
    assert_eq!(explained["connections_max_in_force"], 7, "{explained:#}");
    assert_eq!(*agent.asked.lock().unwrap(), "state?\n");
    let text = scene.proxy.cli_ok(&["explain", "web/a"]);
    assert!(text.contains("up, ready, 40% of the weight, at most 7 sessions"), "{text}");
    agent.says("drain # a job runs\n");
    scene.expect("eligible", false);
    assert!(scene.why().starts_with("its agent says drain; "), "{}", scene.why());
    assert_eq!(scene.proxy.backend("web", "a")["intent"], "ready", "no operator has drained it");
    let status = scene.proxy.cli_ok(&["status"]);
    assert!(status.contains("draining (agent)"), "{status}");
    agent.says("ready");
    scene.expect("eligible", true);
    scene.expect("effective_weight", 4);
    scene.proxy.cli_ok(&["drain", "web/a"]);
    agent.says("ready up 100%\n");
    scene.expect("weight", 10);
    std::thread::sleep(Duration::from_millis(300));
    let a = scene.proxy.backend("web", "a");
    assert_eq!((&a["eligible"], &a["intent"]), (&false.into(), &"draining".into()), "{a:#}");
    scene.proxy.cli_ok(&["undrain", "web/a"]);
    scene.expect("effective_weight", 10);
}

#[test]
fn agent_takes_its_backend_down_at_once_and_a_silent_agent_after_fall_probes() {
    let scene = Scene::start("fall = 3");
    scene.agent.says("down#disk full\n");
    scene.expect("observation", "down");
    let last = scene.proxy.backend("web", "a")["last_transition"]["reason"].clone();
    assert_eq!(last, "1 probe failed: the agent says down: \"disk full\"");
    scene.agent.says("70%\n");
    std::thread::sleep(Duration::from_millis(300));
    scene.expect("observation", "down");
    scene.agent.says("up\n");
    scene.expect("observation", "up");
    scene.agent.hangs();
    scene.expect("observation", "down");
    let last = scene.proxy.backend("web", "a")["last_transition"]["reason"].clone();
    assert!(last.as_str().unwrap().starts_with("3 probes failed in a row"), "{last}");
    scene.agent.says(&format!("{}\n", "x".repeat(5000)));
    let long = "the first line is longer than 1024 bytes";
    eventually(secs(10), long, || {
        scene.proxy.explained("web", "a")["last_probe"]["detail"] == long
    });
}

#[test]
fn haproxy_and_tidegate_do_the_same_for_the_words_of_an_agent() {
    if !have(&["haproxy"]) {
        return;
    }
    let (one, _other) = Agent::pair();
    let port = one.address.port();
    let backends = [("a", 1), ("b", 2)].map(|(name, host)| {
        let address = SocketAddr::from(([127, 0, 0, host], free_port()));
        (name, ScriptedBackend::start_on(address, backend::greet(name)))
    });
    let dir = tempfile::Builder::new().prefix("tg-agent-").tempdir_in("/tmp").unwrap();
    let anchor = SocketAddr::from(([127, 0, 0, 1], free_port()));
    let servers: String = backends
        .iter()
        .map(|(name, at)| {
            let agent = format!("agent-check agent-port {port} agent-inter 100ms");
            format!("  server {name} {} weight 10 {agent}\n", at.address())
        })
        .collect();
    let text = format!(
        "defaults\n  mode tcp\n  timeout connect 2s\n  timeout client 2s\n  timeout server 2s\n\
         listen web\n  bind {anchor}\n  balance roundrobin\n{servers}"
    );
    let file = dir.path().join("haproxy.cfg");
    std::fs::write(&file, text).unwrap();
    let mut command = Command::new(find("haproxy").unwrap());
    command.args(["-db", "-f"]).arg(&file).stdout(Stdio::null()).stderr(Stdio::null());
    let _running = Running::start(&mut command);
    eventually(secs(10), "HAProxy listens", || TcpStream::connect(anchor).is_ok());
    let pool = Pool::new("web").probe(&format!("kind = \"agent\"\nport = {port}\n{FAST}"));
    let pool = backends
        .iter()
        .fold(pool, |pool, (name, at)| pool.backend_with(name, at.address(), "weight = 10"));
    let proxy = TestProxy::start(Conf::simple(Engine::Epoll, pool).workers(1));
    let lines = [
        ("up ready 100%\n", (15, 15)),
        ("50%\n", (10, 20)),
        ("drain\n", (0, 30)),
        ("up\n", (0, 30)),
        ("ready\n", (10, 20)),
        ("maint 100%\n", (0, 30)),
        ("ready\n", (15, 15)),
        ("down # broken\n", (0, 30)),
        ("100%\n", (0, 30)),
        ("up\n", (15, 15)),
        ("0%\n", (0, 30)),
        ("100% fail\n", (0, 30)),
        ("up,ready\t20%\r\n", (5, 25)),
    ];
    for (line, expected) in lines {
        one.says(line);
        for (name, at) in [("HAProxy", anchor), ("Tidegate", proxy.addr("web"))] {
            eventually(secs(10), &format!("{name} after {line:?}: {expected:?}"), || {
                split(at) == expected
            });
        }
    }
}

/// How many of 30 sessions `a` and `b` get.
fn split(at: SocketAddr) -> (usize, usize) {
    let greeted = |_| {
        let mut first = [0];
        connect(at).read_exact(&mut first).expect("a greeting");
        first[0]
    };
    let all: Vec<u8> = (0..30).map(greeted).collect();
    let of_a = all.iter().filter(|first| **first == b'a').count();
    (of_a, all.len() - of_a)
}

//! A small site: a client, Tidegate and its backends, each on a separate host.
//!
//! An ideal cable joins the client to Tidegate. A separate [`Link`] joins each backend, so that
//! a test can partition one backend while the others serve. Tests start programs on these
//! hosts and use the admin socket by its path, which network namespaces do not hide. This
//! module checks nothing.

use crate::common::backend::{Script, ScriptedBackend};
use crate::common::conf::{Conf, Pool};
use crate::common::proxy::{PROGRAM, TestProxy};
use crate::common::servers::Running;
use crate::common::{Engine, eventually, proc, secs};
use crate::link::Link;
use crate::netns::Namespace;
use rustix::process::Signal;
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::process::{Command, Stdio};

/// The address of all frontends.
pub const FRONTEND: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 1);

/// The port of every backend, each on a separate host.
const BACKEND_PORT: u16 = 9000;

/// Names of the backends, in order.
const NAMES: [&str; 5] = ["a", "b", "c", "d", "e"];

pub struct Hosts {
    pub backends: Vec<Host>,
    pub client: Namespace,
    pub balancer: Namespace,
}

/// A backend's host and its link. End *a* is Tidegate's.
pub struct Host {
    pub name: &'static str,
    pub link: Link,
    pub namespace: Namespace,
}

/// An echoing backend in a separate process.
pub struct Service {
    running: Running,
}

// === impl Hosts ===

impl Hosts {
    /// A site with `backends` backends (at most 5) on perfect links.
    #[track_caller]
    pub fn new(backends: usize, seed: u64) -> Hosts {
        let (client, balancer) = (Namespace::new("client"), Namespace::new("lb"));
        client.join_by_veth("10.77.0.2/24", &balancer, &format!("{FRONTEND}/24"), "client0");
        // Without this setting the client's ports would all be in TIME_WAIT before the end of a
        // long run.
        client.sysctl("ipv4/tcp_tw_reuse", "1");
        let backends = (1..).zip(&NAMES[..backends]).map(|(number, name)| {
            let namespace = Namespace::new(name);
            let link = Link::join(&balancer, &namespace, number, seed + u64::from(number));
            Host { name, link, namespace }
        });
        Hosts { backends: backends.collect(), client, balancer }
    }

    /// The pool `web` with all backends of the site.
    pub fn pool(&self) -> Pool {
        let pool = Pool::new("web");
        self.backends.iter().fold(pool, |pool, host| pool.backend(host.name, host.address()))
    }

    /// A configuration with a frontend `web` that the client can reach and with this pool.
    pub fn conf(&self, engine: Engine, pool: Pool) -> Conf {
        Conf::new(engine).frontend_on(&FRONTEND.to_string(), "web", "web", "").pool(pool)
    }

    /// Starts Tidegate on its host.
    #[track_caller]
    pub fn start(&self, conf: Conf) -> TestProxy {
        self.balancer.run(|| TestProxy::start(conf))
    }

    /// Starts Tidegate and waits until every backend is up.
    #[track_caller]
    pub fn start_and_wait_all_up(&self, conf: Conf) -> TestProxy {
        let proxy = self.start(conf);
        for host in &self.backends {
            proxy.wait_backend("web", host.name, "observation", "up");
        }
        proxy
    }
}

// === impl Host ===

impl Host {
    /// The address of its backend.
    pub fn address(&self) -> SocketAddr {
        SocketAddr::from((self.link.b(), BACKEND_PORT))
    }

    /// Starts a scripted backend on this host, in the test process.
    pub fn serve(&self, script: Script) -> ScriptedBackend {
        self.namespace.run(|| ScriptedBackend::start_on(self.address(), script))
    }

    /// Starts an echo server on this host in a separate process, to be killed or stopped.
    #[track_caller]
    pub fn start_echo(&self) -> Service {
        let mut command = Command::new(PROGRAM);
        command.args(["backend", "--threads", "1", "--listen", &self.address().to_string()]);
        command.arg("echo").stdout(Stdio::null());
        let running = self.namespace.run(|| Running::start(&mut command));
        self.namespace.run(|| {
            eventually(secs(10), "the echo server listens", || {
                TcpStream::connect(self.address()).is_ok()
            });
        });
        Service { running }
    }
}

// === impl Service ===

impl Service {
    pub fn pid(&self) -> u32 {
        self.running.pid()
    }

    pub fn kill(&mut self) {
        self.running.kill();
    }

    /// Sends SIGSTOP. The kernel continues to accept connections, but the service does not
    /// answer.
    pub fn pause(&self) {
        proc::signal(self.pid(), Signal::STOP);
    }

    /// Sends SIGCONT.
    pub fn resume(&self) {
        proc::signal(self.pid(), Signal::CONT);
    }
}

//! The ways a balancer can watch its backends, as the trials compare them.
//!
//! A way adds to the configuration and may run a program beside each service;
//! it also says how soon it promises to see which fault. Nothing here makes
//! faults or measures.

use crate::common::conf::{Conf, Pool};
use crate::common::ms;
use crate::common::proxy::PROGRAM;
use crate::common::servers::Running;
use crate::hosts::Host;
use crate::testbed::Fault;
use std::process::{Command, Stdio};
use std::time::Duration;

pub trait Watch {
    /// For the notes.
    fn name(&self) -> &'static str;

    /// Adds to the pool what it needs where links lose that share of packets, each way.
    fn pool(&self, pool: Pool, loss: f64) -> Pool;

    /// Adds to the rest of the configuration what it needs.
    fn conf(&self, conf: Conf) -> Conf {
        conf
    }

    /// Starts what must run beside the service of that name on that host.
    fn start_beside(&self, _host: &Host, _name: &str) -> Option<Running> {
        None
    }

    /// How long it watches a backend before it knows it.
    fn warms_up(&self) -> Duration {
        ms(100)
    }

    /// Whether each failure keeps a backend out longer than the one before.
    fn bears_grudges(&self) -> bool {
        false
    }

    /// How soon the backend must be out of service, or at less weight, after
    /// that fault; `None` where this way promises nothing.
    fn promises(&self, fault: Fault) -> Option<Duration>;
}

/// Probes five times a second that ask the program, not only its kernel.
pub struct FastProbes;

impl Watch for FastProbes {
    fn name(&self) -> &'static str {
        "probes"
    }

    fn pool(&self, pool: Pool, _loss: f64) -> Pool {
        pool.probe(
            "kind = \"send-expect\"\nsend = \"hello\"\nexpect = \"hello\"\ninterval = \"200ms\"\n\
             fast_interval = \"100ms\"\ntimeout = \"100ms\"\nfall = 2\nrise = 1",
        )
    }

    /// An interval with its jitter until the first probe that fails, its
    /// timeout, and the same once more at the fast interval: 220 + 110 + 110
    /// ms; the rest is the machine's. A starved program still answers a probe
    /// now and then.
    fn promises(&self, fault: Fault) -> Option<Duration> {
        (fault != Fault::Starved).then_some(ms(700))
    }
}

/// Heartbeats ten times a second from a sidecar on each host, and probes that
/// ask the program now and then.
pub struct Heartbeats {
    key: tempfile::NamedTempFile,
}

const HEARTBEAT_PORT: u16 = 7946;

impl Heartbeats {
    pub fn new() -> Heartbeats {
        // Made with mode 0600, as keys must have.
        let key = tempfile::NamedTempFile::new_in("/tmp").expect("a key file");
        std::fs::write(key.path(), [7; 32]).expect("write the key");
        Heartbeats { key }
    }
}

impl Watch for Heartbeats {
    fn name(&self) -> &'static str {
        "heartbeats"
    }

    fn pool(&self, pool: Pool, loss: f64) -> Pool {
        // One probe in ten loses its SYN or the answer where the link loses 5 % each way,
        // and four in a row would come once in a hundred runs. The kernel sends a SYN
        // again after 1 s (RFC 6298): with time for that, once in a million.
        let timeout = if loss > 0.0 { "1500ms" } else { "500ms" };
        let probe = format!(
            "kind = \"send-expect\"\nsend = \"hello\"\nexpect = \"hello\"\ninterval = \"2s\"\n\
             timeout = \"{timeout}\"\nfast_interval = \"{timeout}\"\nfall = 4\nrise = 1"
        );
        pool.probe(&probe).heartbeat("interval = \"100ms\"\nttl = \"10s\"")
    }

    fn conf(&self, mut conf: Conf) -> Conf {
        conf.heartbeat = format!(
            "[heartbeat]\nlisten = \"0.0.0.0:{HEARTBEAT_PORT}\"\n[[heartbeat.key]]\nid = 1\n\
             file = \"{}\"\npools = [\"web\"]\naddresses = [\"10.77.0.0/16\"]\n",
            self.key.path().display()
        );
        conf
    }

    fn start_beside(&self, host: &Host, name: &str) -> Option<Running> {
        let to = format!("{}:{HEARTBEAT_PORT}", host.link.a());
        let mut command = Command::new(PROGRAM);
        command.args(["heartbeat", "--to", &to, "--pool", "web", "--name", name]);
        command.args(["--address", &host.address().to_string(), "--key-id", "1", "--key-file"]);
        command.arg(self.key.path()).args(["--interval", "100ms", "--check", "tcp"]);
        command.stdout(Stdio::null());
        Some(host.namespace.run(|| Running::start(&mut command)))
    }

    /// A dozen heartbeats, to know their rhythm.
    fn warms_up(&self) -> Duration {
        ms(1200)
    }

    fn bears_grudges(&self) -> bool {
        true
    }

    /// Less weight after half a second of silence, at the losses assumed of a
    /// newcomer or with one heartbeat in twenty lost; the rest is the machine's.
    /// Nothing is promised where heartbeats go on: it is the probes that see
    /// it, in their own time.
    fn promises(&self, fault: Fault) -> Option<Duration> {
        match fault {
            Fault::Cut | Fault::AllFrozen | Fault::Killed => Some(ms(750)),
            _ => None,
        }
    }
}

//! The detection methods that the trials compare.
//!
//! A method adds to the configuration and can run a program next to each service. It also states
//! how soon it detects which fault. It causes no faults and measures nothing.

use crate::common::conf::{Conf, Pool};
use crate::common::ms;
use crate::common::proxy::PROGRAM;
use crate::common::servers::Running;
use crate::hosts::Host;
use crate::testbed::Fault;
use std::process::{Command, Stdio};
use std::time::Duration;

pub trait Watch {
    /// The name for the notes.
    fn name(&self) -> &'static str;

    /// Adds to the pool what the method needs on links that lose the share `loss` of packets.
    fn pool(&self, pool: Pool, loss: f64) -> Pool;

    /// Adds to the rest of the configuration what the method needs.
    fn conf(&self, conf: Conf) -> Conf {
        conf
    }

    /// Starts the program that the method needs next to the service on the host, if any.
    fn start_sidecar(&self, _host: &Host, _name: &str) -> Option<Running> {
        None
    }

    /// How long the method must observe a backend before the first fault.
    fn warm_up(&self) -> Duration {
        ms(100)
    }

    /// Returns true if each failure keeps a backend out longer than the previous failure.
    fn lengthens_ejections(&self) -> bool {
        false
    }

    /// The time in which the backend must get less weight or leave rotation after the fault.
    /// `None`
    /// if the method promises nothing.
    fn promises(&self, fault: Fault) -> Option<Duration>;
}

/// Probes with an interval of 200 ms that the program must answer.
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

    /// One interval with its jitter until the first failed probe, its timeout, and another
    /// probe at
    /// the fast interval: 220 + 110 + 110 ms. The rest is reserve for the machine. A program
    /// with 1 %
    /// of a CPU still answers some probes.
    fn promises(&self, fault: Fault) -> Option<Duration> {
        (fault != Fault::CpuLimited).then_some(ms(700))
    }
}

/// Heartbeats with an interval of 100 ms from a sidecar on each host, and probes every 2 s.
pub struct Heartbeats {
    key: tempfile::NamedTempFile,
}

const HEARTBEAT_PORT: u16 = 7946;

impl Heartbeats {
    pub fn new() -> Heartbeats {
        // Created with mode 0600, as key files must be.
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
        // With 5 % loss in each direction one probe in ten loses its SYN or the answer, and
        // four in a
        // row would occur once in a hundred runs. The kernel resends a SYN after 1 s (RFC
        // 6298). With
        // time for that, four in a row occur once in a million runs.
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

    fn start_sidecar(&self, host: &Host, name: &str) -> Option<Running> {
        let to = format!("{}:{HEARTBEAT_PORT}", host.link.a());
        let mut command = Command::new(PROGRAM);
        command.args(["heartbeat", "--to", &to, "--pool", "web", "--name", name]);
        command.args(["--address", &host.address().to_string(), "--key-id", "1", "--key-file"]);
        command.arg(self.key.path()).args(["--interval", "100ms", "--check", "tcp"]);
        command.stdout(Stdio::null());
        Some(host.namespace.run(|| Running::start(&mut command)))
    }

    /// Twelve heartbeats, from which the detector learns the interval.
    fn warm_up(&self) -> Duration {
        ms(1200)
    }

    fn lengthens_ejections(&self) -> bool {
        true
    }

    /// Less weight after 0.5 s of silence, with the loss assumed for a new backend or with 5 %
    /// of the
    /// heartbeats lost. The rest is reserve for the machine. Nothing is promised if heartbeats
    /// continue: then only the probes detect the fault.
    fn promises(&self, fault: Fault) -> Option<Duration> {
        match fault {
            Fault::Partitioned | Fault::HostStopped | Fault::Killed => Some(ms(750)),
            _ => None,
        }
    }
}

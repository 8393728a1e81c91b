//! The ways a balancer can watch its backends, as the trials compare them.
//!
//! A way adds to the configuration and may run a program beside each service;
//! it also says how soon it promises to see which fault. Nothing here makes
//! faults or measures.

use crate::common::conf::{Conf, Pool};
use crate::common::ms;
use crate::common::servers::Running;
use crate::hosts::Host;
use crate::trials::Fault;
use std::time::Duration;

pub trait Watch {
    /// For the notes.
    fn name(&self) -> &'static str;

    /// Adds to the pool what it needs.
    fn pool(&self, pool: Pool) -> Pool;

    /// Adds to the rest of the configuration what it needs.
    fn conf(&self, conf: Conf) -> Conf {
        conf
    }

    /// Starts what must run beside the service of that name on that host.
    fn start_beside(&self, _host: &Host, _name: &str) -> Option<Running> {
        None
    }

    /// Trials of a fault, unless the long versions are asked for.
    fn trials(&self) -> usize;

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

    fn pool(&self, pool: Pool) -> Pool {
        pool.probe(
            "kind = \"send-expect\"\nsend = \"hello\"\nexpect = \"hello\"\ninterval = \"200ms\"\n\
             fast_interval = \"100ms\"\ntimeout = \"100ms\"\nfall = 2\nrise = 1",
        )
    }

    fn trials(&self) -> usize {
        10
    }

    /// An interval with its jitter until the first probe that fails, its
    /// timeout, and the same once more at the fast interval: 220 + 110 + 110
    /// ms; the rest is the machine's. A starved program still answers a probe
    /// now and then.
    fn promises(&self, fault: Fault) -> Option<Duration> {
        (fault != Fault::Starved).then_some(ms(700))
    }
}

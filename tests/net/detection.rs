//! How soon each fault of a backend is seen, by each way of watching.
//!
//! One test a fault and way; the histograms go to the notes. What the trials
//! do and measure is in [`crate::trials`].

use crate::common::exclusive;
use crate::testbed::Fault;
use crate::trials;
use crate::watch::{FastProbes, Heartbeats};

/// One test for each fault and share of packets lost, alone on the machine.
macro_rules! trials {
    ($way:ident, $watch:expr, $($name:ident: $fault:expr, $loss:expr);+ $(;)?) => {
        mod $way {
            mod alone {
                use super::super::*;

                $(#[test]
                fn $name() {
                    let _share = exclusive::alone();
                    trials::run(&$watch, $fault, $loss);
                })+
            }
        }
    };
}

trials!(
    probes,
    FastProbes,
    killed_backend_is_seen: Fault::Killed, 0.0;
    frozen_backend_is_seen: Fault::Frozen, 0.0;
    cut_backend_is_seen: Fault::Cut, 0.0;
    backend_cut_one_way_is_seen: Fault::CutOneWay, 0.0;
    starved_backend_is_reported: Fault::Starved, 0.0;
);

trials!(
    heartbeats,
    Heartbeats::new(),
    killed_backend_is_seen: Fault::Killed, 0.0;
    frozen_host_is_seen: Fault::AllFrozen, 0.0;
    cut_backend_is_seen: Fault::Cut, 0.0;
    cut_backend_is_seen_among_losses: Fault::Cut, 0.05;
    starved_backend_is_reported: Fault::Starved, 0.0;
);

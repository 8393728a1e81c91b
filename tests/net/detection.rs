//! How soon each fault of a backend is seen, by each way of watching.
//!
//! One test a fault and way; the histograms go to the notes. What the trials
//! do and measure is in [`crate::trials`].

use crate::common::turn;
use crate::trials::{self, Fault};
use crate::watch::FastProbes;

/// Tests `NAME` of one way of watching, each alone on the machine.
macro_rules! trials {
    ($way:ident, $watch:expr, $($name:ident: $fault:expr),+ $(,)?) => {
        mod $way {
            mod alone {
                use super::super::*;

                $(#[test]
                fn $name() {
                    let _turn = turn::alone();
                    trials::run(&$watch, $fault);
                })+
            }
        }
    };
}

trials!(
    probes,
    FastProbes,
    killed_backend_is_seen: Fault::Killed,
    frozen_backend_is_seen: Fault::Frozen,
    cut_backend_is_seen: Fault::Cut,
    backend_cut_one_way_is_seen: Fault::CutOneWay,
    starved_backend_is_reported: Fault::Starved,
);

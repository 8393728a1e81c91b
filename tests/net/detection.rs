//! How soon each fault of a backend is detected, by each detection method.
//!
//! One test per fault and method. The histograms go to the notes. [`crate::trials`] runs and
//! measures the trials.

use crate::common::exclusive;
use crate::testbed::Fault;
use crate::trials;
use crate::watch::{FastProbes, Heartbeats};

/// Makes one test per fault and packet loss, two at a time (`.config/nextest.toml`).
macro_rules! trials {
    ($way:ident, $watch:expr, $($name:ident: $fault:expr, $loss:expr);+ $(;)?) => {
        mod $way {
            mod quiet {
                use super::super::*;

                $(#[test]
                fn $name() {
                    let _share = exclusive::shared();
                    trials::run(&$watch, $fault, $loss);
                })+
            }
        }
    };
}

trials!(
    probes,
    FastProbes,
    killed_backend_is_detected: Fault::Killed, 0.0;
    stopped_backend_is_detected: Fault::Stopped, 0.0;
    partitioned_backend_is_detected: Fault::Partitioned, 0.0;
    one_way_partitioned_backend_is_detected: Fault::PartitionedOneWay, 0.0;
    cpu_limited_backend_is_reported: Fault::CpuLimited, 0.0;
);

trials!(
    heartbeats,
    Heartbeats::new(),
    killed_backend_is_detected: Fault::Killed, 0.0;
    stopped_host_is_detected: Fault::HostStopped, 0.0;
    partitioned_backend_is_detected: Fault::Partitioned, 0.0;
    partitioned_backend_is_detected_with_packet_loss: Fault::Partitioned, 0.05;
    cpu_limited_backend_is_reported: Fault::CpuLimited, 0.0;
);

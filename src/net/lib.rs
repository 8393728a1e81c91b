//! Wrappers of system calls: sockets, readiness, CPU affinity, limits, and the rights of
//! this process.
//!
//! Used by workers, probes, the admin API, `daemon` and the supervisor. It has no policy:
//! it never refers to sessions, pools or the configuration. Functions that block say so.

pub mod budget;
pub mod cells;
pub mod children;
pub mod clock;
pub mod confinement;
pub mod cpu;
pub mod datagram;
pub mod epoll;
#[cfg(any(test, feature = "fake"))]
pub mod fake;
pub mod fd_channel;
pub mod file_watch;
pub mod holders;
mod ioctl;
pub mod limits;
pub mod listen;
pub mod ntp;
pub mod packets;
pub mod pipe;
pub mod ports;
pub mod privileges;
pub mod reactor;
pub mod ring;
pub mod sandbox;
pub mod signals;
pub mod sock_diag;
mod sockopt;
pub mod stream;
pub mod timer;

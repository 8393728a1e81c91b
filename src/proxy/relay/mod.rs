//! The engine seam: what a session asks of whatever moves its bytes.
//!
//! A session opens a [`Flow`] for its client, connects it, and awaits one
//! completion. One long-lived engine task a worker drives all flows; a task
//! each measured 10 to 25 % more CPU. The readiness engine (`readiness`) works
//! on an epoll set of its own; `pump` is the state machine of one session.

mod flow;
mod pump;
mod readiness;

pub use flow::{ConnectEnd, Flow, Limits, Meter, Relayed};
pub use readiness::Engine;

//! `tidegate shutdown`: have the running balancer drain and exit.
//!
//! Called by the command line; the admin API does the work. It does not wait
//! for the end.

use hyper::Method;
use tidegate_api::answers::StateDoc;
use tidegate_client::command::Exit;
use tidegate_client::http::{ClientArgs, ask, report};

/// Asks and says that draining has begun.
pub fn main(args: &ClientArgs) -> Exit {
    report(args, ask(args, Method::POST, "/v1/shutdown"), |_: &StateDoc| {
        "draining; the balancer exits when its sessions have ended or drain_timeout has passed"
            .to_owned()
    })
}

//! `tidegate shutdown`: drains the running balancer and stops it.
//!
//! Called by the command line. It sends the request to the admin API and does not wait for
//! the exit.

use hyper::Method;
use tidegate_api::answers::StateDoc;
use tidegate_client::command::Exit;
use tidegate_client::http::{ClientArgs, ask, report};

/// Requests the shutdown and prints that the drain has begun.
pub fn main(args: &ClientArgs) -> Exit {
    report(args, ask(args, Method::POST, "/v1/shutdown"), |_: &StateDoc| {
        "draining; exits when all sessions have ended or drain_timeout has passed".to_owned()
    })
}

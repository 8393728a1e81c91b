//! `tidegate ready`: whether the balancer takes new clients, as an exit code.
//!
//! Called by the command line, by health checks and by routers every moment. It prints
//! nothing unless the balancer is not ready.

use hyper::{Method, StatusCode};
use std::io::{self, Write};
use std::time::Duration;
use tidegate_client::command::Exit;
use tidegate_client::http::{ClientArgs, exchange, fail, printable};

/// Shown with `--help`.
pub const HELP: &str = "\
Example:
  tidegate ready && echo \"accepts new clients\"

Exit codes: 0 ready; 3 not ready (starting, leaving, draining, a stalled
worker) or no answer.";

/// A balancer that is ready needs a thousandth of it.
const ANSWER_MAX: Duration = Duration::from_secs(2);

/// Asks once.
pub fn main(args: &ClientArgs) -> Exit {
    let answer = match exchange(args, Method::GET, "/ready", ANSWER_MAX) {
        Ok(answer) => answer,
        Err(error) => return fail(args, &error),
    };
    if args.json {
        // A closed standard output changes nothing about the answer.
        let _ = writeln!(io::stdout(), "{}", answer.text.trim_end());
    }
    let why = match answer.status {
        StatusCode::OK => return Exit::Fine,
        StatusCode::SERVICE_UNAVAILABLE if args.json => return Exit::Failed,
        StatusCode::SERVICE_UNAVAILABLE => match answer.refusal() {
            Some(refusal) => format!("not ready: {}", refusal.detail),
            None => "not ready: no reason given".to_owned(),
        },
        _ => "not an admin API".to_owned(),
    };
    // With standard error closed the text has no reader.
    let _ = writeln!(io::stderr(), "tidegate: {}", printable(&why));
    Exit::Failed
}

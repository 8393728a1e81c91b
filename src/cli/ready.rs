//! `tidegate ready`: returns an exit code that tells whether the balancer accepts new
//! clients.
//!
//! Called by the command line. Health checks run it often, so it prints nothing if the
//! balancer is ready.

use hyper::{Method, StatusCode};
use std::io::{self, Write};
use std::time::Duration;
use tidegate_client::command::Exit;
use tidegate_client::http::{ClientArgs, exchange, fail, printable};

/// Help after the options.
pub const HELP: &str = "\
Example:
  tidegate ready && echo \"accepts new clients\"

Exit codes: 0 ready; 3 not ready (starting, leaving, draining, a stalled
worker) or no answer.";

/// Timeout for the answer: about 1,000 times what a ready balancer needs.
const ANSWER_MAX: Duration = Duration::from_secs(2);

/// Asks once and prints the reason if the balancer is not ready.
pub fn main(args: &ClientArgs) -> Exit {
    let answer = match exchange(args, Method::GET, "/ready", ANSWER_MAX) {
        Ok(answer) => answer,
        Err(error) => return fail(args, &error),
    };
    if args.json {
        // The exit code counts even if standard output is closed.
        let _ = writeln!(io::stdout(), "{}", answer.text.trim_end());
    }
    let why = match answer.status {
        StatusCode::OK => return Exit::Fine,
        StatusCode::SERVICE_UNAVAILABLE if args.json => return Exit::Failed,
        StatusCode::SERVICE_UNAVAILABLE => match answer.error_document() {
            Some(rejection) => format!("not ready: {}", rejection.detail),
            None => "not ready: no reason given".to_owned(),
        },
        _ => "not an admin API".to_owned(),
    };
    // If standard error is closed, the reason is lost.
    let _ = writeln!(io::stderr(), "tidegate: {}", printable(&why));
    Exit::Failed
}

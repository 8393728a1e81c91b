//! `tidegate drain` and `undrain`: take one backend out, and put it back.
//!
//! Called by the command line; the admin API does the work.

use super::client::{ask, printable, report, segment};
use super::{DrainArgs, Exit};
use hyper::Method;

/// One backend of one pool.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// Pool name.
    pub pool: String,
    /// Backend name; may hold slashes.
    pub backend: String,
}

/// Parses `POOL/BACKEND`.
///
/// # Errors
/// There is no slash, or nothing before or after the first one.
pub fn target(text: &str) -> Result<Target, String> {
    match text.split_once('/') {
        Some((pool, backend)) if !pool.is_empty() && !backend.is_empty() => {
            Ok(Target { pool: pool.to_owned(), backend: backend.to_owned() })
        }
        _ => Err("expected POOL/BACKEND, such as web/10.0.0.11:8080".to_owned()),
    }
}

/// No new sessions for it.
pub fn drain(args: &DrainArgs) -> Exit {
    change(args, "drain", "takes no new sessions; the ones it has run to their end")
}

/// New sessions again.
pub fn undrain(args: &DrainArgs) -> Exit {
    change(args, "undrain", "takes new sessions as its health allows")
}

fn change(args: &DrainArgs, action: &str, effect: &str) -> Exit {
    let Target { pool, backend } = &args.target;
    let path = format!("/v1/pools/{}/backends/{}/{action}", segment(pool), segment(backend));
    report(&args.client, ask(&args.client, Method::POST, &path), |_| {
        printable(&format!("{pool}/{backend} {effect}"))
    })
}

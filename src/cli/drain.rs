//! `tidegate drain` and `undrain`: take one backend out, and put it back.
//!
//! Called by the command line; the admin API does the work. Waiting is done here,
//! by asking again and again.

use super::DrainArgs;
use clap::Args;
use hyper::Method;
use serde_json::Value;
use std::time::Duration;
use tidegate_client::command::{Exit, duration};
use tidegate_client::http::{ClientArgs, ClientError, ask, printable, report, segment};
use tidegate_net::clock;

/// Shown with `--help`.
pub const HELP: &str = "\
Example:
  tidegate drain web/10.0.0.11:8080
  tidegate drain web/10.0.0.11:8080 --wait=5m && ssh 10.0.0.11 reboot

Exit codes with --wait: 0 no session is left on it; 3 some are, and how many.";

/// `tidegate drain`
#[derive(Debug, Args)]
pub struct DrainOrder {
    /// Whom.
    #[command(flatten)]
    pub what: DrainArgs,
    /// Wait until it has no sessions, at most for TIME, such as 30s or 5m.
    #[arg(long, value_name = "TIME", num_args = 0..=1, require_equals = true, value_parser = duration)]
    pub wait: Option<Option<Duration>>,
}

/// How often a backend is looked at while somebody waits for its sessions. Twice
/// in a row there have to be none: one that was routed by the table before may
/// be about to come.
const LOOK: Duration = Duration::from_millis(200);

/// One backend of one pool.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BackendRef {
    /// Pool name.
    pub pool: String,
    /// Backend name; may hold slashes.
    pub backend: String,
}

/// Parses `POOL/BACKEND`.
///
/// # Errors
/// There is no slash, or nothing before or after the first one.
pub fn target(text: &str) -> Result<BackendRef, String> {
    match text.split_once('/') {
        Some((pool, backend)) if !pool.is_empty() && !backend.is_empty() => {
            Ok(BackendRef { pool: pool.to_owned(), backend: backend.to_owned() })
        }
        _ => Err("expected POOL/BACKEND, such as web/10.0.0.11:8080".to_owned()),
    }
}

/// No new sessions for it.
pub fn drain(order: &DrainOrder) -> Exit {
    let args = &order.what;
    let done = change(args, "drain", "takes no new sessions; the ones it has run to their end");
    match order.wait {
        Some(limit) if done == Exit::Fine => wait(args, limit),
        _ => done,
    }
}

/// Until it has no sessions, or the time is over.
fn wait(args: &DrainArgs, limit: Option<Duration>) -> Exit {
    let began = clock::now();
    let mut none_before = false;
    loop {
        let left = match sessions(&args.client, &args.target) {
            Ok(left) => left,
            Err(error) => return report(&args.client, Err(error), |_| String::new()),
        };
        if left == 0 && none_before {
            let BackendRef { pool, backend } = &args.target;
            let said = serde_json::json!({"pool": pool, "backend": backend, "sessions": 0});
            return report(&args.client, Ok(said.to_string()), |_| {
                printable(&format!("{pool}/{backend} has no sessions"))
            });
        }
        none_before = left == 0;
        if limit.is_some_and(|limit| clock::now() >= began + limit) {
            let BackendRef { pool, backend } = &args.target;
            let s = if left == 1 { "" } else { "s" };
            let text = format!("{pool}/{backend} has {left} session{s} left");
            return report(&args.client, Err(ClientError::Unreachable(text)), |_| String::new());
        }
        clock::pause(LOOK);
    }
}

/// Sessions of that backend, also where it has left the configuration meanwhile.
fn sessions(client: &ClientArgs, target: &BackendRef) -> Result<u64, ClientError> {
    let get = |path: &str| -> Result<Value, ClientError> {
        let unlike = |error| ClientError::Unreachable(format!("the answer is no JSON: {error}"));
        serde_json::from_str(&ask(client, Method::GET, path)?).map_err(unlike)
    };
    let BackendRef { pool, backend } = target;
    // Cheap however many backends there are.
    match get(&format!("/v1/pools/{}/backends/{}/explain", segment(pool), segment(backend))) {
        Ok(one) if one["sessions_active"].as_u64().is_some_and(|open| open > 0) => {
            return Ok(one["sessions_active"].as_u64().unwrap_or(0));
        }
        // It may have left the configuration.
        Ok(_) | Err(ClientError::Refused(_)) => {}
        Err(error) => return Err(error),
    }
    Ok(count(&get("/v1/status")?, target))
}

fn count(status: &Value, target: &BackendRef) -> u64 {
    let list = |value: &Value| value.as_array().cloned().unwrap_or_default();
    let named = |value: &Value, key: &str, name: &str| value[key] == name;
    let open = |backend: &Value| backend["sessions_active"].as_u64().unwrap_or(0);
    let pools = list(&status["pools"]);
    let pool = pools.iter().find(|pool| named(pool, "name", &target.pool));
    let configured: u64 = list(pool.map_or(&Value::Null, |pool| &pool["backends"]))
        .iter()
        .filter(|backend| named(backend, "name", &target.backend))
        .map(open)
        .sum();
    let leaving: u64 = list(&status["leaving"])
        .iter()
        .filter(|one| named(one, "pool", &target.pool) && named(one, "name", &target.backend))
        .map(open)
        .sum();
    configured + leaving
}

/// New sessions again.
pub fn undrain(args: &DrainArgs) -> Exit {
    change(args, "undrain", "takes new sessions as its health allows")
}

fn change(args: &DrainArgs, action: &str, effect: &str) -> Exit {
    let BackendRef { pool, backend } = &args.target;
    let path = format!("/v1/pools/{}/backends/{}/{action}", segment(pool), segment(backend));
    report(&args.client, ask(&args.client, Method::POST, &path), |_| {
        printable(&format!("{pool}/{backend} {effect}"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn sessions_are_counted_wherever_the_backend_is_shown() {
        let status = json!({
            "pools": [
                {"name": "web", "backends": [
                    {"name": "a", "sessions_active": 3}, {"name": "b", "sessions_active": 5}]},
                {"name": "db", "backends": [{"name": "a", "sessions_active": 7}]},
            ],
            "leaving": [{"pool": "web", "name": "a", "sessions_active": 1}],
        });
        let target = |text: &str| super::target(text).unwrap();
        assert_eq!(count(&status, &target("web/a")), 4);
        assert_eq!(count(&status, &target("db/a")), 7);
        assert_eq!(count(&status, &target("web/gone")), 0);
    }
}

//! `tidegate drain` and `tidegate undrain`: stop and allow new sessions on a backend.
//!
//! Called by the command line. It sends the request to the admin API. With `--wait` it
//! polls until the backend has no sessions.

use super::DrainArgs;
use clap::Args;
use hyper::Method;
use std::time::Duration;
use tidegate_api::answers::{DrainedDoc, IntentDoc};
use tidegate_api::explain::ExplainDoc;
use tidegate_api::status::StatusDoc;
use tidegate_client::command::{Exit, duration, print, print_json};
use tidegate_client::http::{ClientArgs, ClientError, ask, backend_path, fail, printable, report};
use tidegate_net::clock;

/// Help after the options.
pub const HELP: &str = "\
Example:
  tidegate drain web/10.0.0.11:8080
  tidegate drain web/10.0.0.11:8080 --wait=5m && ssh 10.0.0.11 reboot

Exit codes with --wait: 0 no session is left; 3 sessions are left when TIME has
passed.";

/// `tidegate drain`
#[derive(Debug, Args)]
pub struct DrainOrder {
    /// The backend.
    #[command(flatten)]
    pub what: DrainArgs,
    /// Wait until the backend has no sessions, at most TIME, for example 30s.
    #[arg(long, value_name = "TIME", num_args = 0..=1, require_equals = true, value_parser = duration)]
    pub wait: Option<Option<Duration>>,
}

/// Interval for polling the sessions of a backend. Two polls in a row must find none,
/// because a session that was routed with the previous table can still arrive.
const POLL_INTERVAL: Duration = Duration::from_millis(200);

/// One backend of one pool.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BackendRef {
    /// Pool name.
    pub pool: String,
    /// Backend name; can contain slashes.
    pub backend: String,
}

/// Parses `POOL/BACKEND`.
///
/// # Errors
/// The slash, the pool or the backend is missing.
pub fn target(text: &str) -> Result<BackendRef, String> {
    match text.split_once('/') {
        Some((pool, backend)) if !pool.is_empty() && !backend.is_empty() => {
            Ok(BackendRef { pool: pool.to_owned(), backend: backend.to_owned() })
        }
        _ => Err("expected POOL/BACKEND, for example web/10.0.0.11:8080".to_owned()),
    }
}

/// Drains a backend.
pub fn drain(order: &DrainOrder) -> Exit {
    let args = &order.what;
    let done = change(args, "drain", "draining: no new sessions; open sessions continue");
    match order.wait {
        Some(limit) if done == Exit::Fine => wait(args, limit),
        _ => done,
    }
}

/// Waits until the backend has no sessions, at most `limit`.
fn wait(args: &DrainArgs, limit: Option<Duration>) -> Exit {
    let began = clock::now();
    let BackendRef { pool, backend } = &args.target;
    let mut none_before = false;
    loop {
        let left = match sessions(&args.client, &args.target) {
            Ok(left) => left,
            Err(error) => return fail(&args.client, &error),
        };
        if left == 0 && none_before {
            let (backend, pool) = (backend.clone(), pool.clone());
            match args.client.json {
                true => print_json(&DrainedDoc { backend, pool, sessions: 0 }),
                false => print(&printable(&format!("{pool}/{backend} has no sessions"))),
            }
            return Exit::Fine;
        }
        none_before = left == 0;
        if limit.is_some_and(|limit| clock::now() >= began + limit) {
            let s = if left == 1 { "" } else { "s" };
            let text = format!("{pool}/{backend} has {left} session{s} left; it stays draining");
            return fail(&args.client, &ClientError::Unreachable(text));
        }
        clock::pause(POLL_INTERVAL);
    }
}

/// Returns the sessions of the backend, even if it was removed from the configuration.
fn sessions(client: &ClientArgs, target: &BackendRef) -> Result<u64, ClientError> {
    // `explain` costs the same for any number of backends.
    match ask(client, Method::GET, &backend_path(&target.pool, &target.backend, "explain")) {
        Ok(answer) => {
            let open = answer.document::<ExplainDoc>()?.sessions_active;
            if open > 0 {
                return Ok(open.into());
            }
        }
        // The backend can have been removed from the configuration.
        Err(ClientError::Refused(..)) => {}
        Err(error) => return Err(error),
    }
    Ok(count(&ask(client, Method::GET, "/v1/status")?.document()?, target))
}

/// Counts the sessions of a backend. If its address is a name, its members are `NAME@IP:PORT`.
fn count(status: &StatusDoc, target: &BackendRef) -> u64 {
    let BackendRef { pool, backend } = target;
    let pools = status.pools.iter().filter(|one| one.name == *pool);
    let backends = pools.flat_map(|pool| &pool.backends);
    let is_one = backends.clone().any(|one| one.name == *backend);
    let is_meant = |name: &str| match name.strip_prefix(&**backend) {
        Some(rest) => rest.is_empty() || (!is_one && rest.starts_with('@')),
        None => false,
    };
    let backends = backends.filter(|one| is_meant(&one.name));
    let leaving = status.leaving.iter().filter(|one| one.pool == *pool && is_meant(&one.name));
    let open =
        backends.map(|one| one.sessions_active).chain(leaving.map(|one| one.sessions_active));
    open.map(u64::from).sum()
}

/// Undrains a backend.
pub fn undrain(args: &DrainArgs) -> Exit {
    change(args, "undrain", "ready: gets new sessions if it is healthy")
}

fn change(args: &DrainArgs, action: &str, effect: &str) -> Exit {
    let BackendRef { pool, backend } = &args.target;
    let answer = ask(&args.client, Method::POST, &backend_path(pool, backend, action));
    report(&args.client, answer, |_: &IntentDoc| format!("{pool}/{backend} is {effect}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sessions_of_removed_backends_are_counted_too() {
        let mut status = crate::testing::status();
        let mut other = status.pools[0].clone();
        other.name = "db".to_owned();
        other.backends[0].sessions_active = 7;
        status.pools[0].backends[0].sessions_active = 3;
        status.pools.push(other);
        (status.leaving[0].name, status.leaving[0].sessions_active) = ("a".to_owned(), 1);
        let target = |text: &str| super::target(text).unwrap();
        assert_eq!(count(&status, &target("web/a")), 4);
        assert_eq!(count(&status, &target("db/a")), 7);
        assert_eq!(count(&status, &target("web/gone")), 0);
        assert_eq!(count(&status, &target("db/pg")), 0);
        status.pools[1].backends[1].name = "pg@10.0.0.1:5432".to_owned();
        status.pools[1].backends[1].sessions_active = 2;
        assert_eq!(count(&status, &target("db/pg")), 2, "members of a name count");
        assert_eq!(count(&status, &target("db/p")), 0);
    }
}

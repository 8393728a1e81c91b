//! `tidegate rebalance`: closes idle sessions of backends above their share, at a rate, until the
//! pool is even.
//!
//! Called by the command line. The admin API chooses and closes the sessions; this module asks it
//! once per second and decides when to stop.

use super::completions;
use super::table::{TextColumn, TextTable, cell_text, plural, terminal_width};
use clap::Args;
use hyper::Method;
use std::time::Duration;
use tidegate_api::sessions::{RebalanceDoc, RebalancedBackendDoc};
use tidegate_client::command::{Exit, duration, print, print_json};
use tidegate_client::http::{ClientArgs, ClientError, ask, fail, printable, segment};
use tidegate_net::clock;

/// Help after the options.
pub const HELP: &str = "\
Example:
  tidegate rebalance web --dry-run
  tidegate rebalance web --to 10% --rate 20/s --idle 5s

Closes sessions in order (FIN to both sides), the idlest first. Their clients
connect again, and the policy of the pool spreads them. A session with bytes on
their way, or with a byte after it was chosen, stays open. The targets are shares
of the sessions at the start, so clients that do not return cause no more closes.

Exit codes: 0 the pool is even; 1 unknown pool, or a pool with source-hash, which
sends each client to the same backend again; 3 no progress for 30 seconds.";

/// `tidegate rebalance`
#[derive(Debug, Args)]
pub struct RebalanceArgs {
    /// Name of the pool.
    #[arg(value_name = "POOL", add = completions::pools())]
    pub pool: String,
    /// How far above its share a backend can stay.
    #[arg(long, value_name = "PERCENT", default_value = "10%", value_parser = tolerance)]
    pub to: f64,
    /// Sessions that are closed per second, from 1 to 1,000.
    #[arg(long, value_name = "RATE", default_value = "5/s", value_parser = rate)]
    pub rate: u64,
    /// Close only sessions without a byte for this time.
    #[arg(long, value_name = "TIME", default_value = "1s", value_parser = duration)]
    pub idle: Duration,
    /// Show what would be closed, and close nothing.
    #[arg(long)]
    pub dry_run: bool,
    /// How to reach the balancer.
    #[command(flatten)]
    pub client: ClientArgs,
}

/// Time between two requests.
const PACE: Duration = Duration::from_secs(1);

/// Time without a lower excess after which the command stops.
const NO_PROGRESS_MAX: Duration = Duration::from_secs(30);

/// Longest estimate in seconds.
const ESTIMATE_MAX: u64 = 1_000_000;

/// What all requests have done.
#[derive(Debug, Default)]
struct RebalanceTotals {
    closed: u64,
    spoke: u64,
}

/// Shows the pool, and closes sessions.
pub fn main(args: &RebalanceArgs) -> Exit {
    let first = match step(args, None, true) {
        Ok(first) => first,
        Err(error) => return fail(&args.client, &error),
    };
    let estimate = match estimate(&first, args.rate) {
        Some((sessions, seconds)) if first.excess > 0 => format!(
            "\nabout {} in {seconds} s, if every client connects again",
            plural(sessions, "session")
        ),
        _ => String::new(),
    };
    if args.dry_run || first.excess == 0 {
        return show(args, &first, &estimate);
    }
    if !args.client.json {
        print(&printable(&format!("{}{estimate}", render(&first, terminal_width()))));
    }
    let began = clock::now();
    match run(args, &first) {
        Ok((last, totals)) => {
            let took = clock::now().saturating_duration_since(began).as_secs();
            finish(args, &last, &totals, took)
        }
        Err(error) => fail(&args.client, &error),
    }
}

/// Closes sessions each second until the pool is even, or nothing changes.
fn run(
    args: &RebalanceArgs,
    first: &RebalanceDoc,
) -> Result<(RebalanceDoc, RebalanceTotals), ClientError> {
    let (mut totals, mut least, mut since) =
        (RebalanceTotals::default(), first.excess, clock::now());
    loop {
        let began = clock::now();
        let done = step(args, Some(first.total), false)?;
        totals.closed += done.ended;
        totals.spoke += done.spoke;
        if done.excess < least {
            (least, since) = (done.excess, began);
        }
        let waited = began.saturating_duration_since(since);
        if done.excess == 0 || waited >= NO_PROGRESS_MAX {
            return Ok((done, totals));
        }
        if !args.client.json {
            eprintln!("closed {}; {} above their shares", totals.closed, done.excess);
        }
        clock::pause(PACE.saturating_sub(clock::now().saturating_duration_since(began)));
    }
}

fn step(
    args: &RebalanceArgs,
    total: Option<u64>,
    dry_run: bool,
) -> Result<RebalanceDoc, ClientError> {
    let RebalanceArgs { pool, to, rate, idle, .. } = args;
    let total = total.map_or_else(String::new, |total| format!("&total={total}"));
    let path = format!(
        "/v1/pools/{}/rebalance?to={to}&limit={rate}&idle={}&dry_run={dry_run}{total}",
        segment(pool),
        idle.as_secs_f64()
    );
    ask(&args.client, Method::POST, &path)?.document()
}

/// Returns how many sessions will be closed, and the time in seconds. Clients that connect again
/// get a backend by its share, so some of them return to a backend above its share.
fn estimate(document: &RebalanceDoc, rate: u64) -> Option<(u64, u64)> {
    let total = document.total as f64;
    let below = document.backends.iter().filter(|backend| backend.excess == 0);
    let away = below.map(|backend| backend.expected).sum::<f64>() / total;
    if away.is_nan() || away <= 0.0 {
        return None;
    }
    let (mut excess, mut closed, mut seconds) = (document.excess as f64, 0.0, 0);
    while excess >= 0.5 && seconds < ESTIMATE_MAX {
        let now = excess.min(rate as f64);
        excess -= now * away;
        closed += now;
        seconds += 1;
    }
    Some((closed.round() as u64, seconds))
}

fn show(args: &RebalanceArgs, document: &RebalanceDoc, last_line: &str) -> Exit {
    if args.client.json {
        print_json(document);
    } else {
        print(&printable(&format!("{}{last_line}", render(document, terminal_width()))));
    }
    Exit::Fine
}

fn finish(args: &RebalanceArgs, last: &RebalanceDoc, totals: &RebalanceTotals, took: u64) -> Exit {
    let closed = plural(totals.closed, "session");
    let spoke = match totals.spoke {
        0 => String::new(),
        spoke => format!("; {} stayed open because a byte moved", plural(spoke, "session")),
    };
    let exit = show(args, last, &format!("\n{closed} closed in {took} s{spoke}"));
    if last.excess == 0 {
        return exit;
    }
    let text = format!(
        "{} above their shares, and no fewer for {} s: the others are not idle for {:?}, or their \
         clients return to the same backends",
        plural(last.excess, "session"),
        NO_PROGRESS_MAX.as_secs(),
        args.idle
    );
    fail(&args.client, &ClientError::Unreachable(text))
}

fn render(document: &RebalanceDoc, width: Option<usize>) -> String {
    let RebalanceDoc { pool, total, excess, backends, .. } = document;
    let sessions = plural(*total, "session");
    let head = match excess {
        0 => format!("pool {pool} is even: {sessions}"),
        _ => format!("pool {pool}: {sessions}, {excess} above the shares of their backends"),
    };
    let mut table = TextTable::new([
        TextColumn::left("BACKEND", 0),
        TextColumn::right("SESSIONS", 0),
        TextColumn::right("SHARE", 0),
        TextColumn::right("TO CLOSE", 0),
    ]);
    for RebalancedBackendDoc { backend, sessions, expected, excess } in backends {
        let row =
            [cell_text(backend), sessions.to_string(), expected.to_string(), excess.to_string()];
        table.row(row.into(), String::new());
    }
    format!("{head}\n\n{}", table.finish(width))
}

/// Parses a percentage, with or without its sign.
fn tolerance(text: &str) -> Result<f64, String> {
    let number: Option<f64> = text.trim_end_matches('%').trim().parse().ok();
    let percent = number.filter(|percent| (0.0..=1000.0).contains(percent));
    percent
        .map(|percent| percent / 100.0)
        .ok_or_else(|| "expected a percentage, such as 10%".into())
}

/// Parses a number per second: `5` or `5/s`.
fn rate(text: &str) -> Result<u64, String> {
    let number = text.strip_suffix("/s").unwrap_or(text).parse().ok();
    let rate = number.filter(|rate| (1..=1000).contains(rate));
    rate.ok_or_else(|| "expected a number per second from 1 to 1000, such as 5/s".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentages_and_rates_are_read_with_and_without_their_unit() {
        assert_eq!([tolerance("10%").unwrap(), tolerance("2.5").unwrap()], [0.1, 0.025]);
        assert_eq!([rate("5/s").unwrap(), rate("1000").unwrap()], [5, 1000]);
        assert!(tolerance("-1%").is_err() && tolerance("ten").is_err());
        assert!(rate("0").is_err() && rate("5/min").is_err() && rate("1001/s").is_err());
    }

    #[test]
    fn estimate_counts_clients_that_return_to_the_same_backends() {
        let backend = |sessions, excess| RebalancedBackendDoc {
            backend: "a".into(),
            sessions,
            expected: 333.3,
            excess,
        };
        let mut backends = vec![backend(500, 133); 4];
        backends.extend(vec![backend(0, 0); 2]);
        let document = RebalanceDoc { total: 2_000, excess: 532, backends, ..Default::default() };
        let (sessions, seconds) = estimate(&document, 100).unwrap();
        assert!((1_550..1_650).contains(&sessions), "{sessions}");
        assert!((17..40).contains(&seconds), "{seconds}");
        assert!(estimate(&RebalanceDoc::default(), 5).is_none());
    }

    #[test]
    fn table_has_the_sessions_and_the_share_of_each_backend() {
        let backend = |name: &str, sessions, excess| RebalancedBackendDoc {
            backend: name.into(),
            sessions,
            expected: 50.0,
            excess,
        };
        let backends = vec![backend("a", 100, 45), backend("b\u{1b}[2J", 0, 0)];
        let pool = "web".to_owned();
        let document =
            RebalanceDoc { pool, total: 100, excess: 45, backends, ..Default::default() };
        let text = render(&document, None);
        assert!(text.starts_with("pool web: 100 sessions, 45 above the shares"), "{text}");
        assert!(text.contains("100     50        45") && !text.contains('\u{1b}'), "{text}");
    }
}

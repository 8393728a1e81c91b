//! `tidegate sessions`: lists the open sessions of the running balancer, and ends some of them.
//!
//! Called by the command line. It sends the conditions to the admin API and shows the answer.

use super::completions;
use super::table::{TextColumn, TextTable, age, cell_text, plural, size, terminal_width};
use clap::{Args, Subcommand, ValueEnum};
use hyper::Method;
use std::fmt::Write;
use std::time::Duration;
use tidegate_api::sessions::{OpenSessionDoc, SessionsDoc, SessionsEndedDoc};
use tidegate_client::command::{Exit, duration, print, print_json};
use tidegate_client::http::{ClientArgs, ClientError, ask, fail, printable, report, segment};
use tidegate_core::model::SIZE_UNITS;
use tidegate_net::clock;

/// Help after the options.
pub const HELP: &str = "\
Example:
  tidegate sessions --pool web --older 1h
  tidegate sessions --client 10.0.0.0/8 --sort bytes --limit 10
  tidegate sessions close --backend b7 --idle 1m --rate 20 --yes
  tidegate explain --session 4711

All conditions must hold. The totals above the list count all sessions that match.
Sessions of a process that an upgrade has replaced are counted, but not listed.";

/// `tidegate sessions`
#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true)]
pub struct SessionsArgs {
    /// What to do with sessions, instead of listing them.
    #[command(subcommand)]
    pub end: Option<EndCommand>,
    /// Which sessions.
    #[command(flatten)]
    pub conditions: SessionConditions,
    /// Which sessions are listed first: the oldest, the idlest or those with the most bytes.
    #[arg(long, value_enum, default_value_t = SortKey::Age)]
    pub sort: SortKey,
    /// List at most N sessions, up to 1,000.
    #[arg(long, value_name = "N", default_value_t = 100)]
    pub limit: usize,
    /// How to reach the balancer.
    #[command(flatten)]
    pub client: ClientArgs,
}

/// The ways to end sessions.
#[derive(Debug, Subcommand)]
pub enum EndCommand {
    /// Close sessions in order: FIN to both sides.
    ///
    /// Sessions with bytes on their way are not closed, so no byte is lost.
    #[command(after_help = END_HELP)]
    Close(EndArgs),
    /// Reset sessions: RST to both sides. Bytes on their way are lost.
    #[command(after_help = END_HELP)]
    Reset(EndArgs),
}

/// `tidegate sessions close` and `tidegate sessions reset`
#[derive(Debug, Args)]
pub struct EndArgs {
    /// Only these sessions.
    #[arg(value_name = "SESSION")]
    pub sessions: Vec<u64>,
    /// Which sessions.
    #[command(flatten)]
    pub conditions: SessionConditions,
    /// Which sessions are ended first.
    #[arg(long, value_enum, default_value_t = SortKey::Idle)]
    pub sort: SortKey,
    /// End at most N sessions.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub limit: Option<u64>,
    /// End at most N sessions per second.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=1000))]
    pub rate: Option<u64>,
    /// End more than one session. Without it, the sessions are only shown.
    #[arg(long, short)]
    pub yes: bool,
    /// How to reach the balancer.
    #[command(flatten)]
    pub client: ClientArgs,
}

/// Help after the options of `close` and `reset`.
const END_HELP: &str = "\
Example:
  tidegate sessions close 4711
  tidegate sessions close --pool web --older 1h --limit 100 --rate 10 --yes

Exit codes: 0 all chosen sessions are ended; 1 no session or condition is given,
or --yes is missing; 3 sessions are left that have bytes on their way.";

/// Conditions on sessions.
#[derive(Debug, Args)]
pub struct SessionConditions {
    /// Only sessions of this frontend.
    #[arg(long, value_name = "FRONTEND", add = completions::frontends())]
    pub frontend: Option<String>,
    /// Only sessions of this pool.
    #[arg(long, value_name = "POOL", add = completions::pools())]
    pub pool: Option<String>,
    /// Only sessions of this backend.
    #[arg(long, value_name = "BACKEND")]
    pub backend: Option<String>,
    /// Only sessions of clients in this range, or of this address. The PORT of a client is not
    /// part of it.
    #[arg(long = "client", value_name = "RANGE")]
    pub range: Option<String>,
    /// Only sessions that were accepted at least TIME ago, for example 1h.
    #[arg(long, value_name = "TIME", value_parser = duration)]
    pub older: Option<Duration>,
    /// Only sessions without a byte for at least TIME.
    #[arg(long, value_name = "TIME", value_parser = duration)]
    pub idle: Option<Duration>,
    /// Only sessions with at least SIZE bytes in both directions together, for example 1GiB.
    #[arg(long, value_name = "SIZE", value_parser = bytes)]
    pub bytes: Option<u64>,
}

/// The order of the list.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum SortKey {
    /// The oldest first.
    Age,
    /// Those without a byte for the longest time first.
    Idle,
    /// Those with the most bytes first.
    Bytes,
}

/// How long sessions that cannot be closed are tried again. A peer acknowledges its last bytes
/// within this time.
const PATIENCE: Duration = Duration::from_secs(1);

/// Time between two tries.
const TRY_AGAIN: Duration = Duration::from_millis(100);

/// Time between two batches at a rate.
const PACE: Duration = Duration::from_secs(1);

/// Most sessions that one request ends.
const BATCH_MAX: u64 = 1_000;

/// Prints the list, or ends sessions.
pub fn main(args: &SessionsArgs) -> Exit {
    match &args.end {
        Some(EndCommand::Close(end)) => end_sessions(end, "close", "closed"),
        Some(EndCommand::Reset(end)) => end_sessions(end, "reset", "reset"),
        None => {
            let query = query(&args.conditions, args.sort, args.limit as u64);
            let answer = ask(&args.client, Method::GET, &format!("/v1/sessions?{query}"));
            report(&args.client, answer, |document| render(document, terminal_width()))
        }
    }
}

/// Shows the chosen sessions, or ends them.
fn end_sessions(args: &EndArgs, action: &str, done: &str) -> Exit {
    if !args.has_condition() {
        let text = format!("give the sessions to {action}: their numbers, or a condition");
        return fail(&args.client, &ClientError::Request(text));
    }
    let shown = ask(&args.client, Method::GET, &format!("/v1/sessions?{}", args.query(100)));
    let document = match shown.and_then(|answer| answer.document::<SessionsDoc>()) {
        Ok(document) => document,
        Err(error) => return fail(&args.client, &error),
    };
    let chosen = document.matched.min(args.limit.unwrap_or(u64::MAX));
    if chosen > 1 && !args.yes {
        print(&printable(&render(&document, terminal_width())));
        let text = format!("{chosen} sessions would be {done}; add --yes to {action} them");
        return fail(&args.client, &ClientError::Request(text));
    }
    match end_all(args, action, chosen) {
        Ok(all) => report_end(args, &all, chosen, done),
        Err(error) => fail(&args.client, &error),
    }
}

/// Ends the chosen sessions in batches. Stops if none of the rest can be ended for [`PATIENCE`].
fn end_all(args: &EndArgs, action: &str, chosen: u64) -> Result<SessionsEndedDoc, ClientError> {
    let mut all = SessionsEndedDoc { matched: chosen, ..SessionsEndedDoc::default() };
    let mut stuck_since = None;
    while all.ended < chosen {
        let began = clock::now();
        let batch = args.rate.unwrap_or(BATCH_MAX).min(chosen - all.ended);
        let path = format!("/v1/sessions/{action}?{}", args.query(batch));
        let done: SessionsEndedDoc = ask(&args.client, Method::POST, &path)?.document()?;
        all.ended += done.ended;
        all.busy = done.busy;
        if done.ended > 0 {
            stuck_since = None;
        } else if done.matched == 0 || began >= *stuck_since.get_or_insert(began) + PATIENCE {
            return Ok(all);
        } else {
            clock::pause(TRY_AGAIN);
        }
        if args.rate.is_some() && all.ended < chosen {
            clock::pause(PACE.saturating_sub(clock::now().saturating_duration_since(began)));
        }
    }
    Ok(SessionsEndedDoc { busy: 0, ..all })
}

fn report_end(args: &EndArgs, all: &SessionsEndedDoc, chosen: u64, done: &str) -> Exit {
    if args.client.json {
        print_json(all);
    } else {
        print(&format!("{} {done}", plural(all.ended, "session")));
    }
    if all.ended < chosen && all.busy > 0 {
        let left = plural(chosen - all.ended, "session");
        let text = format!("{left} left: bytes are on their way, or no backend is connected");
        return fail(&args.client, &ClientError::Unreachable(text));
    }
    Exit::Fine
}

// === impl EndArgs ===

impl EndArgs {
    /// Whether a session or a condition is given.
    fn has_condition(&self) -> bool {
        let SessionConditions { frontend, pool, backend, range, older, idle, bytes } =
            &self.conditions;
        let names = [frontend, pool, backend, range].into_iter().any(Option::is_some);
        names || older.or(*idle).is_some() || bytes.is_some() || !self.sessions.is_empty()
    }

    fn query(&self, limit: u64) -> String {
        let mut text = query(&self.conditions, self.sort, limit);
        for session in &self.sessions {
            // Writing to a string cannot fail.
            let _ = write!(text, "&session={session}");
        }
        text
    }
}

fn query(conditions: &SessionConditions, sort: SortKey, limit: u64) -> String {
    let sort = match sort {
        SortKey::Age => "age",
        SortKey::Idle => "idle",
        SortKey::Bytes => "bytes",
    };
    let mut path = format!("sort={sort}&limit={limit}");
    let SessionConditions { frontend, pool, backend, range, older, idle, bytes } = conditions;
    let names = [("frontend", frontend), ("pool", pool), ("backend", backend), ("client", range)];
    for (key, value) in names {
        if let Some(value) = value {
            // Writing to a string cannot fail.
            let _ = write!(path, "&{key}={}", segment(value));
        }
    }
    for (key, time) in [("older", older), ("idle", idle)] {
        if let Some(time) = time {
            let _ = write!(path, "&{key}={}", time.as_secs_f64());
        }
    }
    if let Some(bytes) = bytes {
        let _ = write!(path, "&bytes={bytes}");
    }
    path
}

/// Parses a number of bytes, with or without a unit.
fn bytes(text: &str) -> Result<u64, String> {
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    let shift = match unit.trim() {
        "" => Some(0),
        unit => SIZE_UNITS.into_iter().find(|(name, _)| *name == unit).map(|(_, shift)| shift),
    };
    let number = number.parse::<u64>().ok();
    let size = number.zip(shift).and_then(|(number, shift)| number.checked_mul(1 << shift));
    size.ok_or_else(|| "expected a size, for example 64KiB or 1GiB".to_owned())
}

fn render(document: &SessionsDoc, width: Option<usize>) -> String {
    let SessionsDoc { sessions, matched, open, elsewhere } = document;
    let mut text = format!("{}; {matched} match", plural(*open, "open session"));
    if *elsewhere > 0 {
        let more = plural(*elsewhere, "session");
        let _ = write!(text, "; {more} of a replaced process are not listed");
    }
    if sessions.is_empty() {
        return text;
    }
    let mut table = TextTable::new([
        TextColumn::right("SESSION", 0),
        TextColumn::left("CLIENT", 0),
        TextColumn::left("FRONTEND", 2),
        TextColumn::left("BACKEND", 0),
        TextColumn::left("PHASE", 1),
        TextColumn::right("AGE", 0),
        TextColumn::right("IDLE", 0),
        TextColumn::right("IN", 3),
        TextColumn::right("OUT", 3),
    ]);
    for session in sessions {
        table.row(row(session), String::new());
    }
    format!("{text}\n\n{}", table.finish(width))
}

fn row(session: &OpenSessionDoc) -> Vec<String> {
    let backend = match (&session.pool, &session.backend) {
        (Some(pool), Some(backend)) => format!("{}/{}", cell_text(pool), cell_text(backend)),
        _ => "-".to_owned(),
    };
    vec![
        session.session.to_string(),
        cell_text(&session.client),
        cell_text(&session.frontend),
        backend,
        cell_text(&session.phase),
        age(session.age_seconds),
        age(session.idle_seconds),
        size(session.bytes_in),
        size(session.bytes_out),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Cli, Command};
    use clap::Parser;

    fn args(line: &str) -> SessionsArgs {
        let words = ["tidegate", "sessions"].into_iter().chain(line.split_whitespace());
        match Cli::try_parse_from(words).unwrap().command {
            Command::Sessions(args) => *args,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn conditions_become_a_query() {
        let line = "--frontend web --pool p/q --backend a --client 10.0.0.0/8 --older 1m --idle 500ms \
                    --bytes 2KiB --sort idle --limit 7";
        let wanted = "sort=idle&limit=7&frontend=web&pool=p%2Fq&backend=a&client=10.0.0.0%2F8&older=60\
                      &idle=0.5&bytes=2048";
        let of = |line: &str| {
            let args = args(line);
            query(&args.conditions, args.sort, args.limit as u64)
        };
        assert_eq!((&*of(line), &*of("")), (wanted, "sort=age&limit=100"));
    }

    #[test]
    fn sessions_to_end_need_a_number_or_a_condition() {
        let end = |line: &str| match args(line).end {
            Some(EndCommand::Close(end) | EndCommand::Reset(end)) => end,
            None => panic!("no subcommand"),
        };
        assert!(!end("close --yes").has_condition() && !end("reset --limit 3").has_condition());
        let some = ["close 7", "reset --pool web", "close --older 1h", "close --bytes 1GiB"];
        assert!(some.into_iter().all(|line| end(line).has_condition()));
        assert_eq!(end("close 7 8").query(5), "sort=idle&limit=5&session=7&session=8");
    }

    #[test]
    fn sizes_have_a_binary_unit_or_none() {
        assert_eq!(["7", "64KiB", "1 GiB"].map(|text| bytes(text).unwrap()), [7, 65_536, 1 << 30]);
        for wrong in ["", "KiB", "1KB", "-1", "99999999999TiB"] {
            assert!(bytes(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn list_has_the_totals_and_a_row_per_session() {
        let session = OpenSessionDoc {
            session: 4711,
            worker: 1,
            client: "10.1.2.3:4000".to_owned(),
            frontend: "web".to_owned(),
            pool: Some("app".to_owned()),
            backend: Some("a\u{1b}[2J".to_owned()),
            phase: "data".to_owned(),
            age_seconds: 61.0,
            idle_seconds: 0.2,
            bytes_in: 10,
            bytes_out: 2_048,
        };
        let setup = OpenSessionDoc { pool: None, backend: None, ..session.clone() };
        let sessions = vec![session, setup];
        let document = SessionsDoc { sessions, matched: 2, open: 90, elsewhere: 3 };
        let text = render(&document, None);
        let lines: Vec<&str> = text.lines().collect();
        let head = "90 open sessions; 2 match; 3 sessions of a replaced process are not listed";
        assert_eq!(lines[0], head);
        assert!(
            lines[3].contains("4711  10.1.2.3:4000  web") && lines[3].contains("1m 1s"),
            "{text}"
        );
        assert!(lines[4].contains("  -  ") && !text.contains('\u{1b}'), "{text}");
        let none = SessionsDoc { open: 1, ..SessionsDoc::default() };
        assert_eq!(render(&none, None), "1 open session; 0 match");
    }
}

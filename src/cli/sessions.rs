//! `tidegate sessions`: lists the open sessions of the running balancer.
//!
//! Called by the command line. It sends the conditions to the admin API and shows the answer.

use super::completions;
use super::table::{TextColumn, TextTable, age, cell_text, plural, size, terminal_width};
use clap::{Args, ValueEnum};
use hyper::Method;
use std::fmt::Write;
use std::time::Duration;
use tidegate_api::sessions::{OpenSessionDoc, SessionsDoc};
use tidegate_client::command::{Exit, duration};
use tidegate_client::http::{ClientArgs, ask, report, segment};
use tidegate_core::model::SIZE_UNITS;

/// Help after the options.
pub const HELP: &str = "\
Example:
  tidegate sessions --pool web --older 1h
  tidegate sessions --client 10.0.0.0/8 --sort bytes --limit 10
  tidegate explain --session 4711

All conditions must hold. The totals above the list count all sessions that match.
Sessions of a process that an upgrade has replaced are counted, but not listed.";

/// `tidegate sessions`
#[derive(Debug, Args)]
pub struct SessionsArgs {
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

/// Prints the list.
pub fn main(args: &SessionsArgs) -> Exit {
    let answer = ask(&args.client, Method::GET, &path(args));
    report(&args.client, answer, |document| render(document, terminal_width()))
}

fn path(args: &SessionsArgs) -> String {
    let sort = match args.sort {
        SortKey::Age => "age",
        SortKey::Idle => "idle",
        SortKey::Bytes => "bytes",
    };
    let mut path = format!("/v1/sessions?sort={sort}&limit={}", args.limit);
    let SessionConditions { frontend, pool, backend, range, older, idle, bytes } = &args.conditions;
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
            Command::Sessions(args) => args,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn conditions_become_a_query() {
        let line = "--frontend web --pool p/q --backend a --client 10.0.0.0/8 --older 1m --idle 500ms \
                    --bytes 2KiB --sort idle --limit 7";
        let query = "/v1/sessions?sort=idle&limit=7&frontend=web&pool=p%2Fq&backend=a\
                     &client=10.0.0.0%2F8&older=60&idle=0.5&bytes=2048";
        assert_eq!(path(&args(line)), query);
        assert_eq!(path(&args("")), "/v1/sessions?sort=age&limit=100");
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

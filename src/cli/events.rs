//! `tidegate events`: shows what has happened to the running balancer.
//!
//! Called by the command line. It reads the events of the admin API. With `--follow` it waits
//! for further ones, also over upgrades and restarts of the balancer.

use super::completions;
use super::table::cell_text;
use clap::Args;
use hyper::Method;
use std::fmt::Write;
use std::time::{Duration, UNIX_EPOCH};
use tidegate_api::events::{EventDoc, EventsDoc};
use tidegate_client::command::{Exit, duration, print, print_json};
use tidegate_client::http::{
    ClientArgs, ClientError, ask_within, fail, printable, report, segment,
};
use tidegate_net::clock;

/// Help after the options.
pub const HELP: &str = "\
Example:
  tidegate events --since 1h --pool web
  tidegate events --follow --level bad --level warn
  tidegate events --kind operator --kind config

Kinds: state, operator, config, process, limit. Levels: good, info, warn, bad.
The balancer keeps its last 10,000 events, also over upgrades; a restart loses
them.";

/// `tidegate events`
#[derive(Debug, Args)]
pub struct EventsArgs {
    /// Only events of this pool and its backends.
    #[arg(long, value_name = "POOL", add = completions::pools())]
    pub pool: Option<String>,
    /// Only events of this kind; can be repeated.
    #[arg(long, value_name = "KIND", value_parser = ["state", "operator", "config", "process", "limit"])]
    pub kind: Vec<String>,
    /// Only events of this level; can be repeated.
    #[arg(long, value_name = "LEVEL", value_parser = ["good", "info", "warn", "bad"])]
    pub level: Vec<String>,
    /// Only events of the last TIME, for example 1h.
    #[arg(long, value_name = "TIME", value_parser = duration)]
    pub since: Option<Duration>,
    /// Only the newest N events.
    #[arg(long, short = 'n', value_name = "N", default_value_t = 100)]
    pub last: usize,
    /// Wait for further events and print them. With --json, each is one line.
    #[arg(long, short)]
    pub follow: bool,
    /// How to reach the balancer.
    #[command(flatten)]
    pub client: ClientArgs,
}

/// How long the balancer waits for an event before it answers that there is none.
const WAIT_SECONDS: u64 = 30;

/// Timeout for that answer.
const ANSWER_MAX: Duration = Duration::from_secs(WAIT_SECONDS + 15);

/// Pause between two questions, if the balancer did not wait or did not answer.
const PAUSE: Duration = Duration::from_secs(1);

/// Prints the events.
pub fn main(args: &EventsArgs) -> Exit {
    let path = first_question(args);
    let answer = ask_within(&args.client, Method::GET, &path, ANSWER_MAX);
    if !args.follow {
        return report(&args.client, answer, shown);
    }
    match answer.and_then(|answer| answer.document::<EventsDoc>()) {
        Ok(document) => follow(args, &document),
        Err(error) => fail(&args.client, &error),
    }
}

/// Prints all further events. Ends only if the balancer rejects the question.
fn follow(args: &EventsArgs, first: &EventsDoc) -> Exit {
    print_each(args, first);
    let mut after = first.last;
    let mut reachable = true;
    loop {
        let asked = clock::now();
        let path = format!("{}&after={after}&wait={WAIT_SECONDS}", filter(args));
        let answer = ask_within(&args.client, Method::GET, &path, ANSWER_MAX);
        let mut found = false;
        match answer.and_then(|answer| answer.document::<EventsDoc>()) {
            Ok(document) => {
                if document.last < after {
                    eprintln!("tidegate: the balancer has restarted; its events begin again");
                } else if document.lost > 0 {
                    eprintln!("tidegate: {} events are no longer kept", document.lost);
                }
                found = !document.events.is_empty();
                (after, reachable) = (document.last, true);
                print_each(args, &document);
            }
            Err(ClientError::Unreachable(text)) => {
                if std::mem::replace(&mut reachable, false) {
                    eprintln!("tidegate: {}; retrying", printable(&text));
                }
            }
            Err(error) => return fail(&args.client, &error),
        }
        if !found && clock::now() < asked + PAUSE {
            clock::pause(PAUSE);
        }
    }
}

fn print_each(args: &EventsArgs, document: &EventsDoc) {
    for event in &document.events {
        match args.client.json {
            true => print_json(event),
            false => print(&printable(&line(event))),
        }
    }
}

fn first_question(args: &EventsArgs) -> String {
    let mut path = format!("{}&limit={}", filter(args), args.last);
    if let Some(since) = args.since {
        let now = clock::wall().duration_since(UNIX_EPOCH).unwrap_or_default();
        let since = now.saturating_sub(since);
        // Writing to a string cannot fail.
        let _ = write!(path, "&since={}.{:03}", since.as_secs(), since.subsec_millis());
    }
    path
}

/// Returns the path with the filters.
fn filter(args: &EventsArgs) -> String {
    let mut path = "/v1/events?".to_owned();
    let pool = args.pool.iter().map(|pool| ("pool", pool));
    let kinds = args.kind.iter().map(|kind| ("kind", kind));
    let levels = args.level.iter().map(|level| ("level", level));
    for (key, value) in pool.chain(kinds).chain(levels) {
        let _ = write!(path, "&{key}={}", segment(value));
    }
    path
}

fn shown(document: &EventsDoc) -> String {
    match document.events.is_empty() {
        true => "no event matches".to_owned(),
        false => document.events.iter().map(|event| line(event)).collect::<Vec<_>>().join("\n"),
    }
}

/// Returns one line for an event, and one for each change of a reload.
fn line(event: &EventDoc) -> String {
    let EventDoc { at, level, subject, text, who, changes, .. } = event;
    let millis = Duration::from_millis((at * 1_000.0).round() as u64);
    let time = humantime::format_rfc3339_millis(UNIX_EPOCH + millis);
    let by = match who.is_empty() {
        true => String::new(),
        false => format!(" [by {}]", cell_text(who)),
    };
    let mut lines = format!("{time} {level:<4} {}: {}{by}", cell_text(subject), cell_text(text));
    for change in changes {
        let _ = write!(lines, "\n    {}", cell_text(change));
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Cli, Command};
    use clap::Parser;
    use tidegate_api::names::{EventKindName, EventLevelName};

    fn args(line: &str) -> EventsArgs {
        let words = ["tidegate", "events"].into_iter().chain(line.split_whitespace());
        match Cli::try_parse_from(words).unwrap().command {
            Command::Events(args) => args,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn filters_become_a_query() {
        let args = args("--pool a/b --kind state --kind limit --level bad -n 5");
        let query = "/v1/events?&pool=a%2Fb&kind=state&kind=limit&level=bad&limit=5";
        assert_eq!(first_question(&args), query);
    }

    #[test]
    fn event_is_one_line_with_its_originator_and_changes() {
        let event = EventDoc {
            seq: 9,
            at: 1_764_590_000.125,
            kind: EventKindName::Config,
            level: EventLevelName::Info,
            subject: "generation 7".to_owned(),
            text: "applied\u{1b}[31m".to_owned(),
            who: "uid 0, pid 7".to_owned(),
            changes: vec!["backend web/a changed".to_owned()],
        };
        let text = printable(&line(&event));
        let (first, change) = text.split_once('\n').unwrap();
        assert!(
            first.starts_with("2025-12-01T11:53:20.125Z info generation 7: applied"),
            "{first}"
        );
        assert!(first.ends_with("[by uid 0, pid 7]") && !first.contains('\u{1b}'), "{first}");
        assert_eq!(change, "    backend web/a changed");
    }
}

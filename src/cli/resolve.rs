//! `tidegate check --resolve`: asks every member source of a valid file once and prints
//! what it announces.
//!
//! Called by `check`. It uses the same sources and guards as `run`, connects to no backend
//! and changes nothing.

use super::table::{cell_text, plural};
use std::fmt::Write;
use std::net::SocketAddr;
use std::time::Duration;
use tidegate_core::discovery::view::{LocalSight, View};
use tidegate_core::discovery::{SourceFailure, Told, WholeSet};
use tidegate_core::model::{Config, SourceKey, SourceQuestion, ViewGuards};
use tidegate_discovery::thread::ask_once;
use tidegate_net::clock;

/// Longest wait for one source.
const ANSWER_MAX: Duration = Duration::from_secs(10);

/// Members printed per source. The number of the others is printed.
const MEMBERS_SHOWN_MAX: usize = 100;

/// Prints the answer of every member source to standard output. Returns whether all of them
/// answered.
pub(super) fn print_all(config: &Config) -> bool {
    let mut answered = true;
    for (key, question, guards) in config.member_sources() {
        let what = title(&key, &question);
        match ask_once(&question, &config.dns, ANSWER_MAX).unwrap_or_else(local_failure) {
            Told::Whole(set) => print!("{what}: {}", set_text(&set, guards)),
            Told::Failed { why, detail } => {
                answered = false;
                println!("{what}: NO ANSWER: {why}: {}", cell_text(&detail));
            }
            Told::Alive => {
                answered = false;
                println!("{what}: NO ANSWER within {}s", ANSWER_MAX.as_secs());
            }
        }
    }
    answered
}

fn local_failure(error: std::io::Error) -> Told {
    Told::Failed { why: SourceFailure::Local, detail: error.to_string() }
}

fn title(key: &SourceKey, question: &SourceQuestion) -> String {
    let pool = cell_text(&key.pool);
    match &key.backend {
        Some(backend) => {
            let SourceQuestion::Dns(name) = question else { return pool };
            format!("{pool}/{}: {}", cell_text(backend), cell_text(&name.to_string()))
        }
        None => format!("{pool}: {}", question.kind()),
    }
}

/// Describes a complete answer as the guards of its view accept it.
fn set_text(set: &WholeSet, guards: ViewGuards) -> String {
    let mut view = View::new(guards);
    let now = clock::now();
    view.take(&Told::Whole(set.clone()), now, &NobodyIsUp);
    let status = view.status(now);
    let mut text = plural(status.members, "member");
    if !set.version.is_empty() {
        let _ = write!(text, ", {}", cell_text(&set.version));
    }
    if !set.trusted {
        text.push_str(", not trusted: its server does not know its leader");
    }
    let refused = status.announced.saturating_sub(status.members);
    if refused > 0 {
        let _ = write!(text, ", {} refused by the guards", refused);
    }
    text.push('\n');
    for member in view.members().take(MEMBERS_SHOWN_MAX) {
        let raw = if member.raw.is_empty() { "" } else { ", " };
        let tier = match member.tier {
            0 => String::new(),
            tier => format!(", tier {tier}"),
        };
        let _ = writeln!(
            text,
            "  {} {} weight {}, {}{raw}{}{tier}",
            cell_text(&member.name),
            member.address,
            member.weight,
            member.wish.name(),
            cell_text(&member.raw),
        );
    }
    let more = view.members().count().saturating_sub(MEMBERS_SHOWN_MAX);
    if more > 0 {
        let _ = writeln!(text, "  and {more} more");
    }
    text
}

/// Before the first session no member is known to be up.
struct NobodyIsUp;

impl LocalSight for NobodyIsUp {
    fn is_up(&self, _: SocketAddr) -> bool {
        false
    }

    fn is_eligible(&self, _: SocketAddr) -> bool {
        false
    }

    fn is_listed_elsewhere(&self, _: SocketAddr) -> bool {
        false
    }

    fn has_eligible_outside(&self, _: &dyn Fn(SocketAddr) -> bool) -> bool {
        false
    }
}

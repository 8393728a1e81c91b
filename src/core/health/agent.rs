//! What the agent of a backend says about it: its weight, its cap, its wish and its verdict.
//!
//! A probe of kind `agent` makes the report, and the controller applies it. What an answer
//! does not mention stays as it was. An agent only reduces: it never overrides the intent of
//! an operator, and never raises a weight or a cap above the configuration. Nothing here opens
//! a connection.

use crate::model::Words;
use std::fmt;

/// One answer of an agent.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct AgentReport {
    /// Share of the configured weight, in percent.
    pub share: Option<u32>,
    /// Cap on the sessions of the backend; 0: none.
    pub connections_max: Option<u32>,
    /// Whether it wants new sessions.
    pub wish: Option<AgentWish>,
    /// Whether the service works.
    pub verdict: Option<AgentVerdict>,
    /// The quoted text after `#`; empty: none.
    pub comment: String,
}

/// What the agent wants for its backend.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum AgentWish {
    /// New sessions.
    #[default]
    Ready,
    /// No new sessions.
    Drain,
    /// No new sessions, for maintenance.
    Maint,
}

/// What the agent says about the service.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AgentVerdict {
    /// It works.
    Up,
    /// It does not work.
    Down,
    /// It does not work, because of an error.
    Fail,
    /// It does not work, because it was stopped.
    Stopped,
}

/// All that the answers of an agent say together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AgentState {
    /// Share of the configured weight, in percent; at most 100.
    pub share: u32,
    /// Cap on the sessions of the backend; 0: none.
    pub connections_max: u32,
    /// Whether it wants new sessions.
    pub wish: AgentWish,
    /// `None`: no answer has said it.
    pub verdict: Option<AgentVerdict>,
}

// === impl AgentWish ===

impl Words for AgentWish {
    const WORDS: &'static [(&'static str, AgentWish)] =
        &[("ready", AgentWish::Ready), ("drain", AgentWish::Drain), ("maint", AgentWish::Maint)];
}

// === impl AgentVerdict ===

impl Words for AgentVerdict {
    const WORDS: &'static [(&'static str, AgentVerdict)] = &[
        ("up", AgentVerdict::Up),
        ("down", AgentVerdict::Down),
        ("fail", AgentVerdict::Fail),
        ("stopped", AgentVerdict::Stopped),
    ];
}

// === impl AgentState ===

impl AgentState {
    /// Returns what is known after another answer.
    pub fn after(self, report: &AgentReport) -> AgentState {
        AgentState {
            share: report.share.map_or(self.share, |share| share.min(100)),
            connections_max: report.connections_max.unwrap_or(self.connections_max),
            wish: report.wish.unwrap_or(self.wish),
            verdict: report.verdict.or(self.verdict),
        }
    }

    /// Whether the agent wants new sessions.
    pub fn serves(self) -> bool {
        self.wish == AgentWish::Ready && self.share > 0
    }

    /// Returns the word that excludes new sessions, or `ready`.
    pub fn wish_word(self) -> &'static str {
        match (self.wish, self.share) {
            (AgentWish::Ready, 0) => "0%",
            (wish, _) => wish.word(),
        }
    }

    /// Whether the agent says that the service does not work.
    pub fn is_down(self) -> bool {
        self.verdict.is_some_and(|verdict| verdict != AgentVerdict::Up)
    }

    /// Returns this share of a share of a weight; at least 1 if that one is.
    pub fn reduce(self, percent: u32) -> u32 {
        match percent {
            0 => 0,
            _ => (percent * self.share / 100).max(1),
        }
    }

    /// Returns the lower one of both caps; 0: none.
    pub fn cap(self, configured: u32) -> u32 {
        match (configured, self.connections_max) {
            (cap, 0) | (0, cap) => cap,
            (configured, said) => configured.min(said),
        }
    }
}

impl Default for AgentState {
    fn default() -> Self {
        AgentState { share: 100, connections_max: 0, wish: AgentWish::Ready, verdict: None }
    }
}

// === impl AgentReport ===

impl AgentReport {
    /// Returns why the answer fails the probe, if it does. `state` includes this answer.
    pub fn failure(&self, state: AgentState) -> Option<String> {
        let verdict = state.verdict.filter(|_| state.is_down())?;
        let word = verdict.word();
        Some(match (self.verdict, self.comment.as_str()) {
            (None, _) => format!("the agent has said {word}, and not up since then"),
            (Some(_), "") => format!("the agent says {word}"),
            (Some(_), comment) => format!("the agent says {word}: {comment}"),
        })
    }
}

impl fmt::Display for AgentReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let words = [
            self.verdict.map(|verdict| verdict.word().to_owned()),
            self.wish.map(|wish| wish.word().to_owned()),
            self.share.map(|share| format!("{share}%")),
            self.connections_max.map(|most| format!("maxconn:{most}")),
        ];
        let words: Vec<String> = words.into_iter().flatten().collect();
        write!(f, "agent says {}", words.join(" "))?;
        if !self.comment.is_empty() {
            write!(f, ": {}", self.comment)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn share(share: u32) -> AgentReport {
        AgentReport { share: Some(share), ..AgentReport::default() }
    }

    fn verdict(verdict: AgentVerdict) -> AgentReport {
        AgentReport { verdict: Some(verdict), ..AgentReport::default() }
    }

    #[test]
    fn answer_changes_only_what_it_mentions() {
        let wish = AgentReport { wish: Some(AgentWish::Drain), ..AgentReport::default() };
        let state = AgentState::default().after(&wish).after(&share(40));
        assert_eq!((state.wish, state.share, state.verdict), (AgentWish::Drain, 40, None));
        assert!(!state.serves());
        let ready = AgentReport { wish: Some(AgentWish::Ready), ..AgentReport::default() };
        assert!(state.after(&ready).serves());
    }

    #[test]
    fn agent_reduces_and_never_raises() {
        let state = AgentState::default().after(&share(250));
        assert_eq!((state.share, state.reduce(100), state.cap(0)), (100, 100, 0));
        let half = state.after(&share(50));
        assert_eq!(
            (half.reduce(100), half.reduce(10), half.reduce(1), half.reduce(0)),
            (50, 5, 1, 0)
        );
        let capped = AgentState { connections_max: 30, ..state };
        assert_eq!((capped.cap(0), capped.cap(20), capped.cap(40)), (30, 20, 30));
    }

    #[test]
    fn down_holds_until_the_agent_says_up() {
        let report = AgentReport { comment: "\"disk\"".into(), ..verdict(AgentVerdict::Fail) };
        let state = AgentState::default().after(&report);
        assert_eq!(report.failure(state).unwrap(), "the agent says fail: \"disk\"");
        let weight = share(50);
        let state = state.after(&weight);
        let reason = weight.failure(state).unwrap();
        assert_eq!(reason, "the agent has said fail, and not up since then");
        let up = verdict(AgentVerdict::Up);
        assert_eq!(up.failure(state.after(&up)), None);
        assert_eq!(weight.failure(AgentState::default().after(&weight)), None);
    }
}

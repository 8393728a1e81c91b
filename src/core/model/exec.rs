//! `kind = "exec"`: a command that says whether a backend works.
//!
//! `config` builds the values, and the probe helper of `daemon` runs the commands. Nothing here
//! starts a process.

use super::text_forms::words;
use super::{BackendAddr, PoolConfig, ProbeKind};
use serde::Serialize;

/// `kind = "exec"`
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ExecProbe {
    /// The absolute path of a program and its arguments, with placeholders.
    pub command: Vec<String>,
    /// What the exit codes mean.
    pub exit_codes: ExitCodes,
}

/// `exit_codes = ...`
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExitCodes {
    /// 0: success, 1: failure, every other code: no evidence.
    Plain,
    /// Those of monitoring plugins. 0 and 1 (`WARNING`): success, 2 (`CRITICAL`): failure,
    /// every other code: no evidence.
    Nagios,
    /// Those of HAProxy's `external-check`. 0: success, every other code: failure.
    Haproxy,
}

words!(ExitCodes: "plain" => Plain, "nagios" => Nagios, "haproxy" => Haproxy);

/// What the exit code of a command says about its backend.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExitMeaning {
    /// The backend works.
    Success,
    /// The backend does not work.
    Failure,
    /// Nothing: the state stays.
    Undecided,
}

/// The values of the placeholders of a command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CommandSubject {
    /// The pool.
    pub pool: String,
    /// The backend.
    pub backend: String,
    /// Its IP address, or the path of its Unix socket.
    pub address: String,
    /// Its port; [`NO_PORT`] if it is a Unix socket.
    pub port: String,
}

/// The port of a Unix socket, as HAProxy names it.
pub const NO_PORT: &str = "NOT_USED";

// === impl ExitCodes ===

impl ExitCodes {
    /// Returns what an exit code means.
    pub fn meaning(self, code: i32) -> ExitMeaning {
        match (self, code) {
            (_, 0) | (ExitCodes::Nagios, 1) => ExitMeaning::Success,
            (ExitCodes::Plain, 1) | (ExitCodes::Nagios, 2) | (ExitCodes::Haproxy, _) => {
                ExitMeaning::Failure
            }
            (ExitCodes::Plain | ExitCodes::Nagios, _) => ExitMeaning::Undecided,
        }
    }
}

// === impl CommandSubject ===

impl CommandSubject {
    /// Returns the values for a backend that is probed at `address`.
    pub fn new(pool: &str, backend: &str, address: &BackendAddr) -> CommandSubject {
        let (address, port) = match address {
            BackendAddr::Tcp(socket) | BackendAddr::ClientPort(socket, _) => {
                (socket.ip().to_string(), socket.port().to_string())
            }
            BackendAddr::Unix(path) => (path.display().to_string(), NO_PORT.to_owned()),
        };
        CommandSubject { pool: pool.to_owned(), backend: backend.to_owned(), address, port }
    }

    /// Returns an argument with the values in the place of `{pool}`, `{backend}`, `{address}` and
    /// `{port}`. A value is never searched for placeholders.
    pub fn fill(&self, argument: &str) -> String {
        let mut filled = String::with_capacity(argument.len());
        let mut rest = argument;
        while let Some(at) = rest.find('{') {
            filled.push_str(&rest[..at]);
            rest = &rest[at..];
            let known = self.placeholders().into_iter().find(|(name, _)| rest.starts_with(name));
            let (length, value) = known.map_or((1, "{"), |(name, value)| (name.len(), value));
            filled.push_str(value);
            rest = &rest[length..];
        }
        filled.push_str(rest);
        filled
    }

    fn placeholders(&self) -> [(&'static str, &str); 4] {
        [
            ("{pool}", &self.pool),
            ("{backend}", &self.backend),
            ("{address}", &self.address),
            ("{port}", &self.port),
        ]
    }
}

// === impl PoolConfig ===

impl PoolConfig {
    /// Returns the command of the pool's probes.
    pub fn exec_probe(&self) -> Option<&ExecProbe> {
        match &self.probe.as_ref()?.kind {
            ProbeKind::Exec(probe) => Some(probe),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exit_codes_mean_what_their_convention_says() {
        use ExitMeaning::{Failure, Success, Undecided};
        let cases = [
            (ExitCodes::Plain, [Success, Failure, Undecided, Undecided, Undecided]),
            (ExitCodes::Nagios, [Success, Success, Failure, Undecided, Undecided]),
            (ExitCodes::Haproxy, [Success, Failure, Failure, Failure, Failure]),
        ];
        for (codes, wanted) in cases {
            assert_eq!([0, 1, 2, 3, 127].map(|code| codes.meaning(code)), wanted, "{codes:?}");
        }
    }

    #[test]
    fn placeholders_are_filled_once() {
        let address = BackendAddr::Tcp("[::1]:80".parse().unwrap());
        let subject = CommandSubject::new("web", "{port}", &address);
        assert_eq!(subject.fill("{pool}/{backend}"), "web/{port}");
        assert_eq!(subject.fill("http://[{address}]:{port}/"), "http://[::1]:80/");
        assert_eq!(subject.fill("${HOME} {{print $1}} {port"), "${HOME} {{print $1}} {port");
        let socket = CommandSubject::new("web", "a", &BackendAddr::Unix("/run/a".into()));
        assert_eq!(socket.fill("{address} {port}"), "/run/a NOT_USED");
    }
}

//! What the supervisor and the processes it starts say to each other: a fixed set of
//! short messages, a byte that names each and at most two texts.
//!
//! Used by `parent` and `link`. It reads whatever bytes come; what it does not know is
//! none. Either side may be of an older or newer program than the other: an upgrade leaves
//! old processes to drain, and the supervisor changes its program while they do. So a
//! message keeps its number and its meaning for good.

use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

/// What a process tells the supervisor. Descriptors go along where it says so.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum ChildReport {
    /// *Keep these listening sockets of mine*: at most 64 at once, under that name.
    Hold(String),
    /// *Close what you keep under that name.*
    Release(String),
    /// *I serve, by the configuration in force.*
    Ready,
    /// *I read the configuration again.*
    Reloading,
    /// *I drain and end.*
    Stopping,
    /// *I am alive, and so are my workers.*
    Beat,
    /// *Start my successor.* With the way to it and its standard error; where a path is
    /// named, also the connection over which it was asked for.
    Start(Wish),
    /// *End the successor that you have started.*
    End,
    /// *My successor serves; it is the service from now on.*
    Serves,
    /// *I have let go of my sockets; I could not go on any more.*
    LetGo,
    /// *I go on, as you have told me.*
    GoesOn,
}

/// What another successor than usual is to be.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Wish {
    /// This program.
    pub binary: Option<PathBuf>,
    /// With this configuration file.
    pub config: Option<PathBuf>,
}

/// What the supervisor tells a process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum SupervisorOrder {
    /// *These are yours*: sockets kept under that name.
    Held(String),
    /// *That was all; begin*. With the descriptors of [`super::store::STORES`] files.
    /// How many times in a row it was tried, and what became of the process before.
    Begin(u8, String),
    /// *Your successor is this process.*
    Started(u32),
    /// *There will be none*; why.
    Refused(String),
    /// *Your successor has ended*, with that wait status.
    Ended(i32),
    /// The same; it was the service for less than a second: *go on*.
    GoOn(i32),
}

// === impl ChildReport ===

impl ChildReport {
    pub(super) fn encode(&self) -> Vec<u8> {
        match self {
            ChildReport::Hold(name) => encoded(1, name.as_bytes()),
            ChildReport::Release(name) => encoded(2, name.as_bytes()),
            ChildReport::Ready => vec![3],
            ChildReport::Reloading => vec![4],
            ChildReport::Stopping => vec![5],
            ChildReport::Beat => vec![6],
            ChildReport::Start(wish) => encoded(7, &wish.encode()),
            ChildReport::End => vec![8],
            ChildReport::Serves => vec![9],
            ChildReport::LetGo => vec![10],
            ChildReport::GoesOn => vec![11],
        }
    }

    pub(super) fn decode(bytes: &[u8]) -> Option<ChildReport> {
        let (kind, rest) = bytes.split_first()?;
        let text = || String::from_utf8(rest.to_vec()).ok();
        Some(match kind {
            1 => ChildReport::Hold(text()?),
            2 => ChildReport::Release(text()?),
            3 => ChildReport::Ready,
            4 => ChildReport::Reloading,
            5 => ChildReport::Stopping,
            6 => ChildReport::Beat,
            7 => ChildReport::Start(Wish::decode(rest)),
            8 => ChildReport::End,
            9 => ChildReport::Serves,
            10 => ChildReport::LetGo,
            11 => ChildReport::GoesOn,
            _ => return None,
        })
    }
}

// === impl Wish ===

impl Wish {
    /// Paths hold no NUL: one parts them.
    fn encode(&self) -> Vec<u8> {
        let bytes = |path: &Option<PathBuf>| -> Vec<u8> {
            path.as_deref()
                .map_or_else(Vec::new, |path: &Path| path.as_os_str().as_bytes().to_vec())
        };
        [bytes(&self.binary), vec![0], bytes(&self.config)].concat()
    }

    fn decode(bytes: &[u8]) -> Wish {
        let path = |bytes: Option<&[u8]>| {
            let bytes = bytes.filter(|bytes| !bytes.is_empty())?;
            Some(PathBuf::from(std::ffi::OsString::from_vec(bytes.to_vec())))
        };
        let mut parts = bytes.split(|byte| *byte == 0);
        Wish { binary: path(parts.next()), config: path(parts.next()) }
    }

    /// Whether it is the usual successor.
    pub(super) fn is_usual(&self) -> bool {
        *self == Wish::default()
    }
}

// === impl SupervisorOrder ===

impl SupervisorOrder {
    pub(super) fn encode(&self) -> Vec<u8> {
        match self {
            SupervisorOrder::Held(name) => encoded(1, name.as_bytes()),
            SupervisorOrder::Begin(attempt, before) => {
                encoded(2, &[&[*attempt], before.as_bytes()].concat())
            }
            SupervisorOrder::Started(pid) => encoded(3, &pid.to_le_bytes()),
            SupervisorOrder::Refused(why) => encoded(4, why.as_bytes()),
            SupervisorOrder::Ended(status) => encoded(5, &status.to_le_bytes()),
            SupervisorOrder::GoOn(status) => encoded(6, &status.to_le_bytes()),
        }
    }

    pub(super) fn decode(bytes: &[u8]) -> Option<SupervisorOrder> {
        let (kind, rest) = bytes.split_first()?;
        let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).ok();
        let number = || rest.try_into().ok().map(i32::from_le_bytes);
        Some(match kind {
            1 => SupervisorOrder::Held(text(rest)?),
            2 => {
                let (attempt, before) = rest.split_first()?;
                SupervisorOrder::Begin(*attempt, text(before)?)
            }
            3 => SupervisorOrder::Started(rest.try_into().ok().map(u32::from_le_bytes)?),
            4 => SupervisorOrder::Refused(text(rest)?),
            5 => SupervisorOrder::Ended(number()?),
            6 => SupervisorOrder::GoOn(number()?),
            _ => return None,
        })
    }
}

fn encoded(kind: u8, body: &[u8]) -> Vec<u8> {
    [&[kind], body].concat()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn every_message_survives_the_way() {
        let wish = Wish { binary: None, config: Some("/etc/b c.toml".into()) };
        for report in [
            ChildReport::Hold("a".into()),
            ChildReport::Release("b".into()),
            ChildReport::Ready,
            ChildReport::Reloading,
            ChildReport::Stopping,
            ChildReport::Beat,
            ChildReport::Start(Wish::default()),
            ChildReport::Start(wish),
            ChildReport::End,
            ChildReport::Serves,
            ChildReport::LetGo,
            ChildReport::GoesOn,
        ] {
            assert_eq!(ChildReport::decode(&report.encode()), Some(report));
        }
        for order in [
            SupervisorOrder::Held("a".into()),
            SupervisorOrder::Begin(3, "process 7 was killed".into()),
            SupervisorOrder::Started(77),
            SupervisorOrder::Refused("no".into()),
            SupervisorOrder::Ended(256),
            SupervisorOrder::GoOn(9),
        ] {
            assert_eq!(SupervisorOrder::decode(&order.encode()), Some(order));
        }
    }

    proptest! {
        #[test]
        fn whatever_bytes_come_are_a_message_or_none(bytes in prop::collection::vec(any::<u8>(), 0..80)) {
            let _ = (ChildReport::decode(&bytes), SupervisorOrder::decode(&bytes));
        }
    }
}

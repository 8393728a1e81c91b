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
pub(super) enum Report {
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
pub(super) enum Order {
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

// === impl Report ===

impl Report {
    pub(super) fn encode(&self) -> Vec<u8> {
        match self {
            Report::Hold(name) => encoded(1, name.as_bytes()),
            Report::Release(name) => encoded(2, name.as_bytes()),
            Report::Ready => vec![3],
            Report::Reloading => vec![4],
            Report::Stopping => vec![5],
            Report::Beat => vec![6],
            Report::Start(wish) => encoded(7, &wish.encode()),
            Report::End => vec![8],
            Report::Serves => vec![9],
            Report::LetGo => vec![10],
            Report::GoesOn => vec![11],
        }
    }

    pub(super) fn decode(bytes: &[u8]) -> Option<Report> {
        let (kind, rest) = bytes.split_first()?;
        let text = || String::from_utf8(rest.to_vec()).ok();
        Some(match kind {
            1 => Report::Hold(text()?),
            2 => Report::Release(text()?),
            3 => Report::Ready,
            4 => Report::Reloading,
            5 => Report::Stopping,
            6 => Report::Beat,
            7 => Report::Start(Wish::decode(rest)),
            8 => Report::End,
            9 => Report::Serves,
            10 => Report::LetGo,
            11 => Report::GoesOn,
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

// === impl Order ===

impl Order {
    pub(super) fn encode(&self) -> Vec<u8> {
        match self {
            Order::Held(name) => encoded(1, name.as_bytes()),
            Order::Begin(attempt, before) => encoded(2, &[&[*attempt], before.as_bytes()].concat()),
            Order::Started(pid) => encoded(3, &pid.to_le_bytes()),
            Order::Refused(why) => encoded(4, why.as_bytes()),
            Order::Ended(status) => encoded(5, &status.to_le_bytes()),
            Order::GoOn(status) => encoded(6, &status.to_le_bytes()),
        }
    }

    pub(super) fn decode(bytes: &[u8]) -> Option<Order> {
        let (kind, rest) = bytes.split_first()?;
        let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).ok();
        let number = || rest.try_into().ok().map(i32::from_le_bytes);
        Some(match kind {
            1 => Order::Held(text(rest)?),
            2 => {
                let (attempt, before) = rest.split_first()?;
                Order::Begin(*attempt, text(before)?)
            }
            3 => Order::Started(rest.try_into().ok().map(u32::from_le_bytes)?),
            4 => Order::Refused(text(rest)?),
            5 => Order::Ended(number()?),
            6 => Order::GoOn(number()?),
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
            Report::Hold("a".into()),
            Report::Release("b".into()),
            Report::Ready,
            Report::Reloading,
            Report::Stopping,
            Report::Beat,
            Report::Start(Wish::default()),
            Report::Start(wish),
            Report::End,
            Report::Serves,
            Report::LetGo,
            Report::GoesOn,
        ] {
            assert_eq!(Report::decode(&report.encode()), Some(report));
        }
        for order in [
            Order::Held("a".into()),
            Order::Begin(3, "process 7 was killed".into()),
            Order::Started(77),
            Order::Refused("no".into()),
            Order::Ended(256),
            Order::GoOn(9),
        ] {
            assert_eq!(Order::decode(&order.encode()), Some(order));
        }
    }

    proptest! {
        #[test]
        fn whatever_bytes_come_are_a_message_or_none(bytes in prop::collection::vec(any::<u8>(), 0..80)) {
            let _ = (Report::decode(&bytes), Order::decode(&bytes));
        }
    }
}

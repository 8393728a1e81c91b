//! The messages between the supervisor and its children: a byte for the kind, and at most
//! two texts.
//!
//! Used by `parent` and `link`. Unknown messages are ignored. Decoding never panics.
//!
//! The two sides can run different releases: old processes drain after an upgrade, and the
//! supervisor changes its binary while they do. Therefore the number and the meaning of a
//! message never change.

use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

/// A message of a child to the supervisor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum ChildReport {
    /// Hold copies of the attached listening sockets under this name; at most 64 per
    /// message.
    Hold(String),
    /// Close the sockets under this name.
    Release(String),
    /// The child serves with the configuration in force.
    Ready,
    /// The child reloads the configuration.
    Reloading,
    /// The child drains and exits.
    Stopping,
    /// The child and its workers are responsive.
    Alive,
    /// Start a new process. Attached are its channel and its standard error, and for a
    /// change of a path the admin connection of the request.
    Start(SuccessorChanges),
    /// Kill the new process.
    End,
    /// The new process serves and provides the service.
    Serves,
    /// The child has closed its sockets and cannot resume the service.
    SocketsClosed,
    /// The child has resumed the service after [`SupervisorOrder::Resume`].
    Resumed,
}

/// The differences of a new process from the old process. Empty for a usual upgrade.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SuccessorChanges {
    /// Its program.
    pub binary: Option<PathBuf>,
    /// Its configuration file.
    pub config: Option<PathBuf>,
}

/// A message of the supervisor to a child.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum SupervisorOrder {
    /// The attached sockets were held under this name.
    Held(String),
    /// All sockets are sent; begin. Attached are the files of [`super::store::STORES`]
    /// stores. The fields: number of this start in a row, and how the previous process
    /// ended.
    Begin(u8, String),
    /// The process ID of the new process.
    Started(u32),
    /// No new process is started, for this reason.
    Refused(String),
    /// The new process has ended with this wait status.
    Ended(i32),
    /// The new process has ended with this wait status within a second; resume the service.
    Resume(i32),
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
            ChildReport::Alive => vec![6],
            ChildReport::Start(changes) => encoded(7, &changes.encode()),
            ChildReport::End => vec![8],
            ChildReport::Serves => vec![9],
            ChildReport::SocketsClosed => vec![10],
            ChildReport::Resumed => vec![11],
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
            6 => ChildReport::Alive,
            7 => ChildReport::Start(SuccessorChanges::decode(rest)),
            8 => ChildReport::End,
            9 => ChildReport::Serves,
            10 => ChildReport::SocketsClosed,
            11 => ChildReport::Resumed,
            _ => return None,
        })
    }
}

// === impl SuccessorChanges ===

impl SuccessorChanges {
    /// Encodes both paths with a NUL between them, because paths hold no NUL.
    fn encode(&self) -> Vec<u8> {
        let bytes = |path: &Option<PathBuf>| -> Vec<u8> {
            path.as_deref()
                .map_or_else(Vec::new, |path: &Path| path.as_os_str().as_bytes().to_vec())
        };
        [bytes(&self.binary), vec![0], bytes(&self.config)].concat()
    }

    fn decode(bytes: &[u8]) -> SuccessorChanges {
        let path = |bytes: Option<&[u8]>| {
            let bytes = bytes.filter(|bytes| !bytes.is_empty())?;
            Some(PathBuf::from(std::ffi::OsString::from_vec(bytes.to_vec())))
        };
        let mut parts = bytes.split(|byte| *byte == 0);
        SuccessorChanges { binary: path(parts.next()), config: path(parts.next()) }
    }

    /// Returns whether the new process has the same program and configuration.
    pub(super) fn is_empty(&self) -> bool {
        *self == SuccessorChanges::default()
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
            SupervisorOrder::Resume(status) => encoded(6, &status.to_le_bytes()),
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
            6 => SupervisorOrder::Resume(number()?),
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
    fn decoded_message_equals_the_encoded_message() {
        let changes = SuccessorChanges { binary: None, config: Some("/etc/b c.toml".into()) };
        for report in [
            ChildReport::Hold("a".into()),
            ChildReport::Release("b".into()),
            ChildReport::Ready,
            ChildReport::Reloading,
            ChildReport::Stopping,
            ChildReport::Alive,
            ChildReport::Start(SuccessorChanges::default()),
            ChildReport::Start(changes),
            ChildReport::End,
            ChildReport::Serves,
            ChildReport::SocketsClosed,
            ChildReport::Resumed,
        ] {
            assert_eq!(ChildReport::decode(&report.encode()), Some(report));
        }
        for order in [
            SupervisorOrder::Held("a".into()),
            SupervisorOrder::Begin(3, "process 7 was killed".into()),
            SupervisorOrder::Started(77),
            SupervisorOrder::Refused("no".into()),
            SupervisorOrder::Ended(256),
            SupervisorOrder::Resume(9),
        ] {
            assert_eq!(SupervisorOrder::decode(&order.encode()), Some(order));
        }
    }

    proptest! {
        #[test]
        fn decoding_arbitrary_bytes_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..80)) {
            let _ = (ChildReport::decode(&bytes), SupervisorOrder::decode(&bytes));
        }
    }
}

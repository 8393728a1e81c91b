//! The state that a supervisor hands over to the program that it executes: its children
//! and its descriptors.
//!
//! Written and read by `reexec`. It is JSON of at most [`BYTES_MAX`] bytes in a memory
//! file; descriptors are given by their numbers. It is written only if no change is in
//! progress (one child serves, the others drain), so it has no times and no partial steps.
//! All numbers are checked when it is read: in the trial, and after execve(2).

use super::program::Program;
use rustix::process::Pid;
use serde::{Deserialize, Serialize};
use std::collections::HashSet;
use std::ffi::OsString;
use std::os::fd::RawFd;
use tidegate_net::{fd_channel, packets};

/// Version of the format. A change of the format increases it. A program reads or rejects
/// older versions.
pub(super) const VERSION: u32 = 1;

/// Longest state: enough for the largest number of sockets with a name each.
pub(super) const BYTES_MAX: usize = 16 * 1024 * 1024;

/// Most children: one serves, the others drain.
pub(super) const CHILDREN_MAX: usize = 1024;

/// Most descriptors: held sockets, a link per child, and the stores.
const DESCRIPTORS_MAX: usize = fd_channel::FDS_MAX + CHILDREN_MAX + packets::FDS_MAX;

/// First number after the standard descriptors (stdin(3)).
const FIRST: RawFd = 3;

/// The state of a supervisor.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct State {
    version: u32,
    /// The program of the next process.
    pub(super) program: Program,
    pub(super) stores: Vec<RawFd>,
    pub(super) children: Vec<Described>,
    /// Path of the PID file, and whether it is written.
    pub(super) pid_file: Option<(OsString, bool)>,
}

/// A child in the state.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Described {
    pub(super) pid: i32,
    /// True: it serves. False: it drains.
    pub(super) main: bool,
    pub(super) program: Program,
    /// The held sockets by their names.
    pub(super) held: Vec<(String, Vec<RawFd>)>,
    pub(super) link: Option<RawFd>,
}

// === impl State ===

impl State {
    pub(super) fn new(
        program: Program,
        stores: Vec<RawFd>,
        children: Vec<Described>,
        pid_file: Option<(OsString, bool)>,
    ) -> State {
        State { version: VERSION, program, stores, children, pid_file }
    }

    /// Encodes the state.
    ///
    /// # Errors
    /// A message: the state exceeds a bound.
    pub(super) fn encode(&self) -> Result<Vec<u8>, String> {
        self.check()?;
        let bytes = serde_json::to_vec(self).map_err(|error| error.to_string())?;
        if bytes.len() > BYTES_MAX {
            return Err(format!(
                "the state has {} bytes; at most {BYTES_MAX} are allowed",
                bytes.len()
            ));
        }
        Ok(bytes)
    }

    /// Decodes an untrusted state.
    ///
    /// # Errors
    /// A message: the bytes are malformed, or the state exceeds a bound.
    pub(super) fn decode(bytes: &[u8]) -> Result<State, String> {
        if bytes.len() > BYTES_MAX {
            return Err(format!("the state has more than {BYTES_MAX} bytes"));
        }
        let state: State = serde_json::from_slice(bytes).map_err(|error| error.to_string())?;
        state.check()?;
        Ok(state)
    }

    fn check(&self) -> Result<(), String> {
        if self.version != VERSION {
            return Err(format!(
                "unsupported state version {}; this binary reads version {VERSION}",
                self.version
            ));
        }
        if self.children.len() > CHILDREN_MAX || self.stores.len() > packets::FDS_MAX {
            return Err("too many processes or stores".to_owned());
        }
        if self.children.iter().filter(|child| child.main).count() != 1 {
            return Err("not exactly one process serves".to_owned());
        }
        let mut pids = HashSet::new();
        if !self.children.iter().all(|one| one.pid().is_some() && pids.insert(one.pid)) {
            return Err("a process ID is missing or used twice".to_owned());
        }
        let (count, mut seen) = (self.descriptors().count(), HashSet::new());
        if count > DESCRIPTORS_MAX || !self.descriptors().all(|fd| fd >= FIRST && seen.insert(fd)) {
            return Err(
                "a descriptor is out of range or used twice, or there are too many".to_owned()
            );
        }
        Ok(())
    }

    /// Returns all descriptors in the state.
    pub(super) fn descriptors(&self) -> impl Iterator<Item = RawFd> {
        let held = self.children.iter().flat_map(|child| &child.held);
        let links = self.children.iter().filter_map(|child| child.link);
        held.flat_map(|(_, sockets)| sockets).chain(&self.stores).copied().chain(links)
    }
}

// === impl Described ===

impl Described {
    pub(super) fn pid(&self) -> Option<Pid> {
        // For kill(2), a number of 0 or below means several processes.
        Some(self.pid).filter(|pid| *pid > 0).and_then(Pid::from_raw)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::os::unix::ffi::OsStringExt;

    fn state() -> State {
        let program = Program::of_this_process(vec!["run".into(), OsString::from_vec(vec![255])]);
        let program = program.unwrap();
        let child = |pid, main, fds: [RawFd; 3]| Described {
            pid,
            main,
            program: program.clone(),
            held: vec![("a".into(), fds[..2].to_vec())],
            link: Some(fds[2]),
        };
        let children = vec![child(10, false, [3, 4, 5]), child(11, true, [6, 7, 8])];
        let pid_file = Some((OsString::from_vec(vec![b'/', 254]), true));
        State::new(program.clone(), vec![9, 10], children, pid_file)
    }

    #[test]
    fn decoded_state_equals_the_encoded_state() {
        let bytes = state().encode().unwrap();
        assert_eq!(State::decode(&bytes).unwrap(), state());
    }

    /// The format of version 1, which released programs read.
    #[test]
    fn format_of_version_1_is_unchanged() {
        let program = r#"{"name":{"Unix":[97]},"directory":{"Unix":[47]},"file":{"Unix":[47,97]},"arguments":[{"Unix":[114]}]}"#;
        let text = format!(
            r#"{{"version":1,"program":{program},"stores":[3,4],"children":[{{"pid":7,"main":true,"program":{program},"held":[["b",[5]]],"link":6}},{{"pid":8,"main":false,"program":{program},"held":[],"link":null}}],"pid_file":[{{"Unix":[47,98]}},true]}}"#
        );
        let state = State::decode(text.as_bytes()).unwrap();
        assert_eq!(String::from_utf8(state.encode().unwrap()).unwrap(), text);
        assert_eq!((VERSION, state.children[1].link), (1, None));
    }

    #[test]
    fn invalid_state_is_rejected() {
        let changes: [fn(&mut State); 12] = [
            |state| state.version += 1,
            |state| state.children.clear(),
            |state| state.children[0].main = true,
            |state| state.children[1].main = false,
            |state| state.children[0].pid = 0,
            |state| state.children[0].pid = -7,
            |state| state.children[0].pid = state.children[1].pid,
            |state| state.children[0].link = Some(2),
            |state| state.children[0].link = Some(-1),
            |state| state.children[0].held[0].1[0] = state.children[1].held[0].1[0],
            |state| state.stores[0] = state.stores[1],
            |state| state.stores = (100..200).collect(),
        ];
        for (number, change) in changes.into_iter().enumerate() {
            let mut state = state();
            change(&mut state);
            assert!(state.encode().is_err(), "{number}");
            let bytes = serde_json::to_vec(&state).unwrap();
            assert!(State::decode(&bytes).is_err(), "{number}");
        }
    }

    #[test]
    fn unknown_field_and_truncated_state_are_rejected() {
        let text = String::from_utf8(state().encode().unwrap()).unwrap();
        let more = text.replacen('{', "{\"more\":1,", 1);
        assert!(State::decode(more.as_bytes()).unwrap_err().contains("more"));
        assert!(State::decode(&text.as_bytes()[..text.len() - 1]).is_err());
    }

    proptest! {
        #[test]
        fn changed_byte_gives_a_valid_state_or_an_error(at in 0..300_usize, byte: u8) {
            let mut bytes = state().encode().unwrap();
            let at = at % bytes.len();
            bytes[at] = byte;
            if let Ok(state) = State::decode(&bytes) {
                prop_assert!(state.check().is_ok());
            }
        }
    }
}

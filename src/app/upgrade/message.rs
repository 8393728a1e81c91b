//! What the old and the new process say to each other, in order: *hello* (new),
//! *offer* (old, with the sockets), *ready* (new), *commit* (old), *serving*
//! (new), and, when the old one's last session has ended, *farewell* (old).
//!
//! Used by `outgoing` and `incoming`. Bodies are JSON: fields may be absent in
//! what an older program says, and what a newer one adds is ignored. Nothing here
//! reads or writes a socket.

use super::counts::Counts;
use crate::app::binds::Holder;
use crate::control::handover::Saved;
use crate::net::handover::{Channel, ChannelError, Frame};
use crate::telemetry::histograms::{SavedSeries, Series};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::net::SocketAddr;
use std::os::fd::BorrowedFd;
use std::time::Instant;

/// The order of messages and what each must hold. A program may speak several.
pub(super) const PROTOCOL: u16 = 1;

/// What a frame's body is.
pub(super) trait Message: Serialize + DeserializeOwned {
    const KIND: u16;
    const NAME: &'static str;
}

/// *I am up; this is what I speak.*
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Hello {
    /// Lowest and highest protocol.
    pub(super) protocols: (u16, u16),
    /// Of the program.
    pub(super) version: String,
    pub(super) pid: u32,
}

/// *These sockets are yours if you want them*. Descriptors: standard error, the
/// admin listener if there is one, `listeners`, `heartbeats`, each in order.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Offer {
    pub(super) protocol: u16,
    /// Of the program.
    pub(super) version: String,
    pub(super) admin: Option<OfferedAdmin>,
    pub(super) listeners: Vec<OfferedBind>,
    /// Where heartbeats are received: a datagram socket each.
    #[serde(default)]
    pub(super) heartbeats: Vec<SocketAddr>,
    /// XXH3 of the configuration in force.
    #[serde(default)]
    pub(super) digest: u64,
    #[serde(default)]
    pub(super) state: Saved,
    /// Layers of `net::confinement` that the new process has inherited and can
    /// neither loosen nor put up again.
    #[serde(default)]
    pub(super) confined: Vec<String>,
}

/// The admin listener.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(in crate::app) struct OfferedAdmin {
    /// As the configuration has it.
    pub(in crate::app) listen: String,
    /// Device and inode of the socket's file.
    pub(in crate::app) file: Option<(u64, u64)>,
}

/// One address and how many sockets it has.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct OfferedBind {
    pub(super) address: SocketAddr,
    pub(super) sockets: u32,
    pub(super) holder: Holder,
}

/// *My configuration is good, my table is built; I wait for your word.*
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Ready {
    /// Addresses that are no longer configured.
    pub(super) not_taken: Vec<SocketAddr>,
    pub(super) admin_taken: bool,
    /// Of the configuration that will be in force.
    pub(super) generation: u64,
}

/// *Go on with this.* Everything as of now, histograms included.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(in crate::app) struct Commit {
    pub(super) state: Saved,
    pub(super) counts: Counts,
    #[serde(default)]
    pub(super) latency: Vec<SavedLatency>,
    /// Of all backends somebody has tried lately.
    #[serde(default)]
    pub(super) estimates: Vec<SavedEstimate>,
}

/// What `peak-ewma` goes by of one backend.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct SavedEstimate {
    pub(super) pool: String,
    pub(super) backend: String,
    pub(super) address: String,
    /// See `Latency::save`.
    pub(super) micros: [f32; 2],
}

/// One backend's histograms.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct SavedLatency {
    pub(super) pool: String,
    pub(super) backend: String,
    pub(super) address: String,
    pub(super) series: [SavedSeries; Series::COUNT],
}

/// *I accept from now on; stop accepting.*
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Serving {}

/// *My last session has ended.* Counts as in [`Commit`], replacing those;
/// histograms since then, to be added.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Farewell(pub(super) Commit);

/// Why a message is not what was waited for.
#[derive(Debug, thiserror::Error)]
pub(super) enum MessageError {
    #[error("{0}")]
    Channel(#[from] ChannelError),
    #[error("message {found} came instead of {NAME}", NAME = .wanted)]
    Unexpected { found: u16, wanted: &'static str },
    #[error("{name} makes no sense: {error}")]
    Senseless { name: &'static str, error: serde_json::Error },
}

macro_rules! messages {
    ($($message:ty = $kind:literal $name:literal),+ $(,)?) => {$(
        impl Message for $message {
            const KIND: u16 = $kind;
            const NAME: &'static str = $name;
        }
    )+};
}

messages! {
    Hello = 1 "hello",
    Offer = 2 "offer",
    Ready = 3 "ready",
    Commit = 4 "commit",
    Serving = 5 "serving",
    Farewell = 6 "farewell",
}

pub(super) fn encode(message: &impl Message) -> Vec<u8> {
    serde_json::to_vec(message).expect("plain data with string keys always serialises")
}

pub(super) fn decode<M: Message>(frame: &Frame) -> Result<M, MessageError> {
    if frame.kind != M::KIND {
        return Err(MessageError::Unexpected { found: frame.kind, wanted: M::NAME });
    }
    serde_json::from_slice(&frame.body)
        .map_err(|error| MessageError::Senseless { name: M::NAME, error })
}

pub(super) fn send<M: Message>(
    channel: &Channel,
    message: &M,
    fds: &[BorrowedFd<'_>],
    deadline: Instant,
) -> Result<(), MessageError> {
    Ok(channel.send(M::KIND, &encode(message), fds, deadline)?)
}

/// Waits for that message; descriptors that come with it are closed.
pub(super) fn receive<M: Message>(channel: &Channel, deadline: Instant) -> Result<M, MessageError> {
    decode(&channel.receive(deadline)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn frame(kind: u16, body: Vec<u8>) -> Frame {
        Frame { kind, body, fds: Vec::new() }
    }

    #[test]
    fn an_offer_survives_the_way_and_what_is_newer_is_passed_over() {
        let offer = Offer {
            protocol: 1,
            version: "9".to_owned(),
            admin: Some(OfferedAdmin { listen: "unix:/x".to_owned(), file: Some((1, 2)) }),
            listeners: vec![OfferedBind {
                address: "[::1]:80".parse().unwrap(),
                sockets: 2,
                holder: Holder::Manager,
            }],
            heartbeats: vec!["127.0.0.1:7946".parse().unwrap()],
            digest: u64::MAX,
            state: Saved { generation: 3, ..Saved::default() },
            confined: vec!["seccomp".to_owned()],
        };
        let text = String::from_utf8(encode(&offer)).unwrap();
        let newer = text.replacen('{', "{\"more\":[1],", 1);
        let got: Offer = decode(&frame(2, newer.into_bytes())).unwrap();
        assert_eq!(got, offer);
    }

    #[test]
    fn another_message_than_the_awaited_one_is_named() {
        let error = decode::<Ready>(&frame(5, b"{}".to_vec())).unwrap_err();
        assert_eq!(error.to_string(), "message 5 came instead of ready");
        let error = decode::<Ready>(&frame(3, b"{}".to_vec())).unwrap_err();
        assert!(error.to_string().starts_with("ready makes no sense: missing field"), "{error}");
    }

    proptest! {
        #[test]
        fn whatever_body_comes_is_a_message_or_an_error(kind in 0u16..8, body in prop::collection::vec(any::<u8>(), 0..300)) {
            let frame = frame(kind, body);
            let _ = decode::<Hello>(&frame);
            let _ = decode::<Offer>(&frame);
            let _ = decode::<Ready>(&frame);
            let _ = decode::<Commit>(&frame);
            let _ = decode::<Farewell>(&frame);
        }

        #[test]
        fn an_offer_with_a_changed_byte_is_an_offer_or_an_error(at: prop::sample::Index, byte: u8) {
            let offer = Offer {
                protocol: 1, version: String::new(), admin: None, heartbeats: vec![], digest: 7,
                listeners: vec![OfferedBind { address: ([127, 0, 0, 1], 80).into(), sockets: 2, holder: Holder::Nobody }],
                state: Saved::default(), confined: vec![],
            };
            let mut body = encode(&offer);
            let at = at.index(body.len());
            body[at] = byte;
            let _ = decode::<Offer>(&frame(2, body));
        }
    }
}

//! What the old and the new process say to each other, in order: *hello* (new),
//! *offer* (old, with the sockets), *ready* (new), *commit* (old), *serving*
//! (new), then *reports* (old) and *orders* (new), and, when the old one's last
//! session has ended, *farewell* (old). *Commit* and *farewell* are followed by
//! as many *parts* as they announce.
//!
//! Used by `outgoing` and `incoming`. Bodies are JSON: fields may be absent in
//! what an older program says, and what a newer one adds is ignored.

use super::counts::HandoverCounts;
use super::reports::{OldProcessOrder, OldProcessReport};
use crate::binds::SocketOwner;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::net::SocketAddr;
use std::os::fd::BorrowedFd;
use std::time::Instant;
use tidegate_core::control::handover::Saved;
use tidegate_core::metrics::histograms::{SavedSeries, Series};
use tidegate_core::model::BindKey;
use tidegate_net::fd_channel::{ChannelError, ChannelFrame, HandoverChannel};

/// The order of messages and what each must hold. A program may speak several.
pub(super) const PROTOCOL: u16 = 1;

/// What a program of that protocol understands beyond its first form; 1 is parts,
/// reports and orders, and the least that this program works with.
pub(super) const LEVEL: u16 = 1;

/// Histograms go in parts of about so many bytes: neither side holds the text of
/// all of them at once, and no number of backends is too many for a frame.
const PART_BYTES: usize = 4 * 1024 * 1024;

/// Parts of one message: 16 GB.
const PARTS_MAX: u32 = 4_096;

/// What a frame's body is.
pub(super) trait UpgradeMessage: Serialize + DeserializeOwned {
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
    /// See [`LEVEL`].
    #[serde(default)]
    pub(super) level: u16,
}

/// *These sockets are yours if you want them*. Descriptors: standard error, the
/// admin listener if there is one, `listeners`, `heartbeats`, each in order, and the
/// file of the shared counts if there is one, which an older program leaves alone.
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
    /// See [`LEVEL`].
    #[serde(default)]
    pub(super) level: u16,
    /// The file of the shared counts comes last.
    #[serde(default)]
    pub(super) counts: bool,
}

/// The admin listener.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct OfferedAdmin {
    /// As the configuration has it.
    pub(crate) listen: String,
    /// Device and inode of the socket's file.
    pub(crate) file: Option<(u64, u64)>,
}

/// One address and how many sockets it has.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct OfferedBind {
    pub(super) address: BindKey,
    pub(super) sockets: u32,
    pub(super) holder: SocketOwner,
}

/// *My configuration is good, my table is built; I wait for your word.*
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Ready {
    /// Addresses that are no longer configured.
    pub(super) not_taken: Vec<BindKey>,
    pub(super) admin_taken: bool,
    /// Of the configuration that will be in force.
    pub(super) generation: u64,
    /// It counts in the file that was offered.
    #[serde(default)]
    pub(super) shares: bool,
}

/// *Go on with this.* Everything as of now, histograms included.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Commit {
    pub(super) state: Saved,
    pub(super) counts: HandoverCounts,
    #[serde(default)]
    pub(super) latency: Vec<SavedLatency>,
    /// Of all backends somebody has tried lately.
    #[serde(default)]
    pub(super) estimates: Vec<SavedEstimate>,
    /// So many parts follow.
    #[serde(default)]
    pub(super) parts: u32,
}

/// More of a [`Commit`].
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub(super) struct Part {
    pub(super) latency: Vec<SavedLatency>,
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
pub(super) struct FinalCounts(pub(super) Commit);

/// Why a message is not what was waited for.
#[derive(Debug, thiserror::Error)]
pub(super) enum MessageError {
    #[error("{0}")]
    Channel(#[from] ChannelError),
    #[error("expected message {wanted}, received {found}")]
    Unexpected { found: u16, wanted: &'static str },
    #[error("too many parts: {0}, at most {PARTS_MAX}")]
    TooManyParts(u32),
    #[error("cannot decode {name}: {error}")]
    Senseless { name: &'static str, error: serde_json::Error },
}

macro_rules! messages {
    ($($message:ty = $kind:literal $name:literal),+ $(,)?) => {$(
        impl UpgradeMessage for $message {
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
    FinalCounts = 6 "farewell",
    Part = 7 "part",
    OldProcessReport = 8 "report",
    OldProcessOrder = 9 "order",
}

pub(super) fn encode(message: &impl UpgradeMessage) -> Vec<u8> {
    serde_json::to_vec(message).expect("plain data with string keys always serialises")
}

pub(super) fn decode<M: UpgradeMessage>(frame: &ChannelFrame) -> Result<M, MessageError> {
    if frame.kind != M::KIND {
        return Err(MessageError::Unexpected { found: frame.kind, wanted: M::NAME });
    }
    serde_json::from_slice(&frame.body)
        .map_err(|error| MessageError::Senseless { name: M::NAME, error })
}

pub(super) fn send<M: UpgradeMessage>(
    channel: &HandoverChannel,
    message: &M,
    fds: &[BorrowedFd<'_>],
    deadline: Instant,
) -> Result<(), MessageError> {
    Ok(channel.send(M::KIND, &encode(message), fds, deadline)?)
}

/// Waits for that message; descriptors that come with it are closed.
pub(super) fn receive<M: UpgradeMessage>(
    channel: &HandoverChannel,
    deadline: Instant,
) -> Result<M, MessageError> {
    decode(&channel.receive(deadline)?)
}

/// Sends *commit* or *farewell*, with its histograms in parts.
pub(super) fn send_known<M: UpgradeMessage + AsMut<Commit>>(
    channel: &HandoverChannel,
    mut message: M,
    deadline: Instant,
) -> Result<(), MessageError> {
    let parts = in_parts(std::mem::take(&mut message.as_mut().latency));
    message.as_mut().parts = u32::try_from(parts.len()).unwrap_or(u32::MAX);
    send(channel, &message, &[], deadline)?;
    for latency in parts {
        send(channel, &Part { latency }, &[], deadline)?;
    }
    Ok(())
}

fn in_parts(latency: Vec<SavedLatency>) -> Vec<Vec<SavedLatency>> {
    let mut parts: Vec<Vec<SavedLatency>> = Vec::new();
    let mut room = 0;
    for one in latency {
        // A value and its count take some ten digits each.
        let values: usize = one.series.iter().map(|series| series.values.len()).sum();
        let size = 20 * values + one.pool.len() + one.backend.len() + one.address.len() + 300;
        if size > room {
            parts.push(Vec::new());
            room = PART_BYTES;
        }
        room = room.saturating_sub(size);
        parts.extend(parts.is_empty().then(Vec::new));
        if let Some(part) = parts.last_mut() {
            part.push(one);
        }
    }
    parts
}

/// The message in that frame, with the parts that follow it.
pub(super) fn receive_known<M: UpgradeMessage + AsMut<Commit>>(
    channel: &HandoverChannel,
    frame: &ChannelFrame,
    deadline: Instant,
) -> Result<M, MessageError> {
    let mut message: M = decode(frame)?;
    let known = message.as_mut();
    if known.parts > PARTS_MAX {
        return Err(MessageError::TooManyParts(known.parts));
    }
    for _ in 0..std::mem::take(&mut known.parts) {
        let Part { latency } = receive(channel, deadline)?;
        known.latency.extend(latency);
    }
    Ok(message)
}

// === impl Commit ===

impl AsMut<Commit> for Commit {
    fn as_mut(&mut self) -> &mut Commit {
        self
    }
}

// === impl FinalCounts ===

impl AsMut<Commit> for FinalCounts {
    fn as_mut(&mut self) -> &mut Commit {
        &mut self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn frame(kind: u16, body: Vec<u8>) -> ChannelFrame {
        ChannelFrame { kind, body, fds: Vec::new() }
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
                holder: SocketOwner::ServiceManager,
            }],
            heartbeats: vec!["127.0.0.1:7946".parse().unwrap()],
            digest: u64::MAX,
            state: Saved { generation: 3, ..Saved::default() },
            confined: vec!["seccomp".to_owned()],
            level: LEVEL,
            counts: true,
        };
        let text = String::from_utf8(encode(&offer)).unwrap();
        let newer = text.replacen('{', "{\"more\":[1],", 1);
        let got: Offer = decode(&frame(2, newer.into_bytes())).unwrap();
        assert_eq!(got, offer);
    }

    #[test]
    fn another_message_than_the_awaited_one_is_named() {
        let error = decode::<Ready>(&frame(5, b"{}".to_vec())).unwrap_err();
        assert_eq!(error.to_string(), "expected message ready, received 5");
        let error = decode::<Ready>(&frame(3, b"{}".to_vec())).unwrap_err();
        assert!(error.to_string().starts_with("cannot decode ready: missing field"), "{error}");
    }

    /// What a hundred thousand backends with every bucket filled would take is far
    /// above what a frame holds.
    #[test]
    fn histograms_of_any_size_come_whole_in_frames_of_bounded_size() {
        let values: Vec<(u64, u64)> = (0..2_000).map(|n| (n * 1_000, 1 + n)).collect();
        let series = SavedSeries { values, sum_seconds: 1, sum_nanos: 2 };
        let latency: Vec<SavedLatency> = (0..300)
            .map(|n| SavedLatency {
                pool: "web".to_owned(),
                backend: format!("b{n}"),
                address: "10.0.0.1:80".to_owned(),
                series: [(); Series::COUNT].map(|()| series.clone()),
            })
            .collect();
        let known = Commit { latency, ..Commit::default() };
        let parts = in_parts(known.latency.clone());
        assert!(parts.len() > 2);
        for part in parts {
            assert!(encode(&Part { latency: part }).len() <= PART_BYTES + 200_000);
        }
        let (one, other) = HandoverChannel::pair().unwrap();
        let other = HandoverChannel::from(std::os::unix::net::UnixStream::from(other));
        let deadline = tidegate_net::clock::now() + std::time::Duration::from_secs(30);
        let sent = known.clone();
        let sender = std::thread::spawn(move || send_known(&one, sent, deadline));
        let frame = other.receive(deadline).unwrap();
        let got: Commit = receive_known(&other, &frame, deadline).unwrap();
        sender.join().unwrap().unwrap();
        assert!(got == known);
    }

    proptest! {
        #[test]
        fn whatever_body_comes_is_a_message_or_an_error(kind in 0u16..11, body in prop::collection::vec(any::<u8>(), 0..300)) {
            let frame = frame(kind, body);
            let _ = decode::<Hello>(&frame);
            let _ = decode::<Offer>(&frame);
            let _ = decode::<Ready>(&frame);
            let _ = decode::<Commit>(&frame);
            let _ = decode::<FinalCounts>(&frame);
            let _ = decode::<Part>(&frame);
            let _ = decode::<OldProcessReport>(&frame);
            let _ = decode::<OldProcessOrder>(&frame);
        }

        #[test]
        fn an_offer_with_a_changed_byte_is_an_offer_or_an_error(at: prop::sample::Index, byte: u8) {
            let offer = Offer {
                protocol: 1, version: String::new(), admin: None, heartbeats: vec![], digest: 7,
                listeners: vec![OfferedBind { address: BindKey::tcp(([127, 0, 0, 1], 80).into()), sockets: 2, holder: SocketOwner::Process }],
                state: Saved::default(), confined: vec![], level: 0, counts: false,
            };
            let mut body = encode(&offer);
            let at = at.index(body.len());
            body[at] = byte;
            let _ = decode::<Offer>(&frame(2, body));
        }
    }
}

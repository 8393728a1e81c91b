//! The messages between the old and the new process.
//!
//! Used by `outgoing` and `incoming`. Bodies are JSON. Fields can be missing in messages of
//! an older program, and unknown fields of a newer program are ignored.
//!
//! | order | message | sender |
//! |---|---|---|
//! | 1 | *hello* | new process |
//! | 2 | *offer*, with the sockets | old process |
//! | 3 | *ready* | new process |
//! | 4 | *commit*, followed by its *parts* | old process |
//! | 5 | *serving* | new process |
//! | 6, repeated | *report* | old process |
//! | 6, repeated | *order* | new process |
//! | 7, after the last session | *final counts*, followed by their *parts* | old process |

use super::counts::HandoverCounts;
use super::reports::{OldProcessOrder, OldProcessReport};
use crate::binds::SocketOwner;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::net::SocketAddr;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Instant;
use tidegate_api::events::EventDoc;
use tidegate_core::control::handover::Saved;
use tidegate_core::metrics::histograms::{SavedSeries, Series};
use tidegate_core::model::BindKey;
use tidegate_net::fd_channel::{ChannelError, ChannelFrame, HandoverChannel};

/// Version of the message order and of the required fields. A program can support several.
pub(super) const PROTOCOL: u16 = 1;

/// Extensions of the protocol that a program supports. Level 1 adds parts, reports and
/// orders. This program requires level 1 or higher.
pub(super) const LEVEL: u16 = 1;

/// Approximate size of a part with histograms. Parts bound the memory of both processes
/// and the size of a frame for any number of backends.
const PART_BYTES: usize = 4 * 1024 * 1024;

/// Events in a part: 3 MiB of usual size, 16 MiB in all with texts of the longest size.
const EVENTS_PER_PART: usize = 5_000;

/// Cap on parts of one message, 16 GiB together.
const PARTS_MAX: u32 = 4_096;

/// The body of a frame.
pub(super) trait UpgradeMessage: Serialize + DeserializeOwned {
    const KIND: u16;
    const NAME: &'static str;
}

/// *hello*: the new process has started and supports these protocols.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Hello {
    /// Lowest and highest supported protocol.
    pub(super) protocols: (u16, u16),
    /// Version of the program.
    pub(super) version: String,
    pub(super) pid: u32,
    /// See [`LEVEL`].
    #[serde(default)]
    pub(super) level: u16,
}

/// *offer*: sockets and state of the old process. Descriptors in order: standard error, the
/// admin listener if there is one, `listeners`, `heartbeats`, the file of the shared counts if
/// there is one, and the socket of the probe helper if there is one. An older program ignores
/// the last descriptors.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Offer {
    pub(super) protocol: u16,
    /// Version of the program.
    pub(super) version: String,
    pub(super) admin: Option<OfferedAdmin>,
    pub(super) listeners: Vec<OfferedBind>,
    /// Addresses of the heartbeat sockets, one datagram socket each.
    #[serde(default)]
    pub(super) heartbeats: Vec<SocketAddr>,
    /// XXH3 of the configuration in force.
    #[serde(default)]
    pub(super) digest: u64,
    #[serde(default)]
    pub(super) state: Saved,
    /// Sandbox layers that the new process inherits. It can neither loosen nor repeat them.
    #[serde(default)]
    pub(super) confined: Vec<String>,
    /// See [`LEVEL`].
    #[serde(default)]
    pub(super) level: u16,
    /// Whether a descriptor is the file of the shared counts.
    #[serde(default)]
    pub(super) counts: bool,
    /// Whether the last descriptor is the socket of the probe helper.
    #[serde(default)]
    pub(super) helper: bool,
}

/// The admin listener.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct OfferedAdmin {
    /// The configured address.
    pub(crate) listen: String,
    /// Device and inode number of the socket file.
    pub(crate) file: Option<(u64, u64)>,
}

/// One address and the number of its sockets.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct OfferedBind {
    pub(super) address: BindKey,
    pub(super) sockets: u32,
    pub(super) holder: SocketOwner,
}

/// *ready*: the configuration is valid and the table is built.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Ready {
    /// Offered addresses that are not in the new configuration.
    pub(super) not_taken: Vec<BindKey>,
    pub(super) admin_taken: bool,
    /// Generation of the new configuration.
    pub(super) generation: u64,
    /// Whether the new process uses the offered file of shared counts.
    #[serde(default)]
    pub(super) shares: bool,
}

/// *commit*: the current state and counts of the old process.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Commit {
    pub(super) state: Saved,
    pub(super) counts: HandoverCounts,
    #[serde(default)]
    pub(super) latency: Vec<SavedLatency>,
    /// Latency estimates of the backends that have one.
    #[serde(default)]
    pub(super) estimates: Vec<SavedEstimate>,
    /// The events so far, oldest first.
    #[serde(default)]
    pub(super) events: Vec<Arc<EventDoc>>,
    /// Number of parts that follow.
    #[serde(default)]
    pub(super) parts: u32,
}

/// *part*: histograms or events of a [`Commit`].
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub(super) struct Part {
    pub(super) latency: Vec<SavedLatency>,
    pub(super) events: Vec<Arc<EventDoc>>,
}

/// The latency estimate of one backend, which `peak-ewma` uses.
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

/// *serving*: the new process accepts, and the old process must stop accepting.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Serving {}

/// *final counts*: the last session has ended. The counts replace those of [`Commit`]. The
/// histograms cover only the time after it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct FinalCounts(pub(super) Commit);

/// Why a message could not be sent or received.
#[derive(Debug, thiserror::Error)]
pub(super) enum MessageError {
    #[error("{0}")]
    Channel(#[from] ChannelError),
    #[error("expected message {wanted}, received {found}")]
    Unexpected { found: u16, wanted: &'static str },
    #[error("too many parts: {0}, at most {PARTS_MAX}")]
    TooManyParts(u32),
    #[error("cannot decode {name}: {error}")]
    Invalid { name: &'static str, error: serde_json::Error },
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
    FinalCounts = 6 "final counts",
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
        .map_err(|error| MessageError::Invalid { name: M::NAME, error })
}

pub(super) fn send<M: UpgradeMessage>(
    channel: &HandoverChannel,
    message: &M,
    fds: &[BorrowedFd<'_>],
    deadline: Instant,
) -> Result<(), MessageError> {
    Ok(channel.send(M::KIND, &encode(message), fds, deadline)?)
}

/// Waits for a message of this kind. Descriptors received with it are closed.
pub(super) fn receive<M: UpgradeMessage>(
    channel: &HandoverChannel,
    deadline: Instant,
) -> Result<M, MessageError> {
    decode(&channel.receive(deadline)?)
}

/// Sends *commit* or *final counts*, with the histograms and the events in parts.
pub(super) fn send_known<M: UpgradeMessage + AsMut<Commit>>(
    channel: &HandoverChannel,
    mut message: M,
    deadline: Instant,
) -> Result<(), MessageError> {
    let known = message.as_mut();
    let latency = in_parts(std::mem::take(&mut known.latency));
    let events = std::mem::take(&mut known.events);
    let latency = latency.into_iter().map(|latency| Part { latency, ..Part::default() });
    let events = events.chunks(EVENTS_PER_PART);
    let events = events.map(|events| Part { events: events.to_vec(), ..Part::default() });
    let parts: Vec<Part> = latency.chain(events).collect();
    message.as_mut().parts = u32::try_from(parts.len()).unwrap_or(u32::MAX);
    send(channel, &message, &[], deadline)?;
    for part in &parts {
        send(channel, part, &[], deadline)?;
    }
    Ok(())
}

fn in_parts(latency: Vec<SavedLatency>) -> Vec<Vec<SavedLatency>> {
    let mut parts: Vec<Vec<SavedLatency>> = Vec::new();
    let mut left = 0;
    for one in latency {
        // A value and its count have about ten digits each.
        let values: usize = one.series.iter().map(|series| series.values.len()).sum();
        let size = 20 * values + one.pool.len() + one.backend.len() + one.address.len() + 300;
        if size > left {
            parts.push(Vec::new());
            left = PART_BYTES;
        }
        left = left.saturating_sub(size);
        parts.extend(parts.is_empty().then(Vec::new));
        if let Some(part) = parts.last_mut() {
            part.push(one);
        }
    }
    parts
}

/// Decodes the message in the frame and receives the parts that follow it.
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
        let Part { latency, events } = receive(channel, deadline)?;
        known.latency.extend(latency);
        known.events.extend(events);
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
    use tidegate_api::names::{EventKindName, EventLevelName};

    fn event() -> EventDoc {
        EventDoc {
            seq: 7,
            at: 1_764_590_000.125,
            kind: EventKindName::Config,
            level: EventLevelName::Warn,
            subject: "generation 3".to_owned(),
            text: "applied".to_owned(),
            who: "SIGHUP".to_owned(),
            changes: vec!["backend web/a changed".to_owned()],
        }
    }

    fn frame(kind: u16, body: Vec<u8>) -> ChannelFrame {
        ChannelFrame { kind, body, fds: Vec::new() }
    }

    #[test]
    fn offer_round_trips_and_unknown_fields_are_ignored() {
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
            helper: true,
        };
        let text = String::from_utf8(encode(&offer)).unwrap();
        let newer = text.replacen('{', "{\"more\":[1],", 1);
        let got: Offer = decode(&frame(2, newer.into_bytes())).unwrap();
        assert_eq!(got, offer);
    }

    #[test]
    fn unexpected_message_is_named_in_the_error() {
        let error = decode::<Ready>(&frame(5, b"{}".to_vec())).unwrap_err();
        assert_eq!(error.to_string(), "expected message ready, received 5");
        let error = decode::<Ready>(&frame(3, b"{}".to_vec())).unwrap_err();
        assert!(error.to_string().starts_with("cannot decode ready: missing field"), "{error}");
    }

    /// The histograms of 100,000 backends with all buckets filled exceed the size of a
    /// frame.
    #[test]
    fn large_histograms_are_sent_in_bounded_frames() {
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
        let events = std::iter::repeat_with(|| Arc::new(event())).take(12_000).collect();
        let known = Commit { latency, events, ..Commit::default() };
        let parts = in_parts(known.latency.clone());
        assert!(parts.len() > 2);
        for part in parts {
            assert!(
                encode(&Part { latency: part, ..Part::default() }).len() <= PART_BYTES + 200_000
            );
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
        fn any_body_is_a_message_or_an_error(kind in 0u16..11, body in prop::collection::vec(any::<u8>(), 0..300)) {
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
        fn offer_with_a_changed_byte_is_an_offer_or_an_error(at: prop::sample::Index, byte: u8) {
            let offer = Offer {
                protocol: 1, version: String::new(), admin: None, heartbeats: vec![], digest: 7,
                listeners: vec![OfferedBind { address: BindKey::tcp(([127, 0, 0, 1], 80).into()), sockets: 2, holder: SocketOwner::Process }],
                state: Saved::default(), confined: vec![], level: 0, counts: false, helper: false,
            };
            let mut body = encode(&offer);
            let at = at.index(body.len());
            body[at] = byte;
            let _ = decode::<Offer>(&frame(2, body));
        }
    }
}

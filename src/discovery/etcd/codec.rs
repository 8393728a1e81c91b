//! Requests and answers of the version 3 JSON gateway of etcd.
//!
//! The [gateway](super::gateway) sends these requests and reads these answers; the watch
//! reads its lines with [`StreamLine::parse`]. The gateway writes 64-bit numbers as texts,
//! keys and values in base64, and leaves out zeros (etcd API, `rpc.proto`, `kv.proto`).
//! Nothing here does I/O.

use crate::parse::at_most;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::de::{self, Deserializer, Visitor};
use serde::{Deserialize, Serialize, Serializer};
use std::fmt;
use std::marker::PhantomData;
use std::str::FromStr;
use tidegate_core::control::MEMBERS_MAX;
use tidegate_core::discovery::SourceFailure;

/// Most entries of an answer: one more than a set can have.
pub const LISTED_MAX: usize = MEMBERS_MAX + 1;

/// Most events of a message. A message has up to 1,000 revisions, and a revision has up to
/// 128 events (`--max-txn-ops`).
const EVENTS_MAX: usize = 1_000_000;

/// Ranges in one transaction; servers accept 128 (`--max-txn-ops`).
pub const RANGES_PER_TRANSACTION: usize = 64;

/// Codes of gRPC that the gateway passes on in `code` and `grpc_code`.
mod grpc {
    pub(super) const INVALID_ARGUMENT: u32 = 3;
    pub(super) const DEADLINE_EXCEEDED: u32 = 4;
    pub(super) const NOT_FOUND: u32 = 5;
    pub(super) const PERMISSION_DENIED: u32 = 7;
    pub(super) const RESOURCE_EXHAUSTED: u32 = 8;
    pub(super) const FAILED_PRECONDITION: u32 = 9;
    pub(super) const OUT_OF_RANGE: u32 = 11;
    pub(super) const UNIMPLEMENTED: u32 = 12;
    pub(super) const UNAVAILABLE: u32 = 14;
    pub(super) const UNAUTHENTICATED: u32 = 16;
}

/// Bytes that the gateway transports in base64.
#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Base64Bytes(pub Vec<u8>);

/// What every answer begins with.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct EtcdHeader {
    /// Identity of the cluster. A restored backup can have the former one.
    #[serde(deserialize_with = "number")]
    pub cluster_id: u64,
    /// Revision of the store. It goes back only if a backup was restored.
    #[serde(deserialize_with = "number")]
    pub revision: i64,
    /// Term of the leader. It goes back only if a backup was restored.
    #[serde(deserialize_with = "number")]
    pub raft_term: u64,
}

/// Body of `/v3/kv/range`, and a range within a transaction.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct RangeRequest {
    /// First key.
    pub key: Base64Bytes,
    /// First key after the range.
    pub range_end: Base64Bytes,
    /// Most entries; 0 means no limit.
    #[serde(skip_serializing_if = "is_zero")]
    pub limit: i64,
    /// Entries that were changed before this revision are left out. They still count.
    #[serde(skip_serializing_if = "is_zero")]
    pub min_mod_revision: i64,
    /// Leaves out the values.
    #[serde(skip_serializing_if = "is_false")]
    pub keys_only: bool,
    /// Leaves out the entries.
    #[serde(skip_serializing_if = "is_false")]
    pub count_only: bool,
}

/// Answer of `/v3/kv/range`.
#[derive(Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct RangeAnswer {
    /// Of the whole answer; within a transaction it has a revision only.
    pub header: EtcdHeader,
    /// In the order of the keys.
    #[serde(deserialize_with = "at_most::<_, _, LISTED_MAX>")]
    pub kvs: Vec<KeyValue>,
    /// Entries of the range, also those that were left out.
    #[serde(deserialize_with = "number")]
    pub count: i64,
}

/// An entry of the store.
#[derive(Debug, Default, PartialEq, Eq, Deserialize)]
pub struct KeyValue {
    /// The whole key, which is never empty.
    pub key: Base64Bytes,
    /// Empty for deletions and with `keys_only`.
    #[serde(default)]
    pub value: Base64Bytes,
    /// Revision of the last change.
    #[serde(default, deserialize_with = "number")]
    pub mod_revision: i64,
    /// The entry ends with this lease; 0: it has none.
    #[serde(default, deserialize_with = "number")]
    pub lease: i64,
}

/// Body of `/v3/kv/txn` with reads only. The server answers all of them at one revision.
#[derive(Debug, Default, Serialize)]
pub struct ReadTransaction {
    /// The reads.
    pub success: Vec<ReadStep>,
}

/// A read within a transaction.
#[derive(Debug, Serialize)]
pub struct ReadStep {
    /// The read.
    pub request_range: RangeRequest,
}

/// Answer of `/v3/kv/txn`.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub struct ReadTransactionAnswer {
    /// Of the whole answer.
    pub header: EtcdHeader,
    /// In the order of the reads.
    #[serde(deserialize_with = "at_most::<_, _, RANGES_PER_TRANSACTION>")]
    pub responses: Vec<ReadStepAnswer>,
}

/// Answer of a read within a transaction.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub struct ReadStepAnswer {
    /// What was read.
    pub response_range: RangeAnswer,
}

/// One message of the body of `/v3/watch`. The body has several of them, one after another.
#[derive(Debug, Serialize)]
pub struct WatchRequest {
    /// The new watch.
    pub create_request: WatchCreate,
}

/// A new watch.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct WatchCreate {
    /// First key.
    pub key: Base64Bytes,
    /// First key after the range.
    pub range_end: Base64Bytes,
    /// First revision that is reported.
    pub start_revision: i64,
    /// Unique in the stream, above 0.
    pub watch_id: i64,
}

/// A line of the answer of `/v3/watch`.
#[derive(Debug, PartialEq, Eq)]
pub enum StreamLine {
    /// A message of a watch.
    Watch(WatchMessage),
    /// The stream ends.
    Ended(GatewayRefusal),
}

/// A message of a watch.
#[derive(Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct WatchMessage {
    /// The revision is 0 if `canceled` because of a compaction.
    pub header: EtcdHeader,
    /// As requested, or −1 if the watch was not created.
    #[serde(deserialize_with = "number")]
    pub watch_id: i64,
    /// Answers a [`WatchCreate`], in the order of the requests.
    pub created: bool,
    /// The watch ends.
    pub canceled: bool,
    /// Why, in words of the server; may be empty.
    pub cancel_reason: String,
    /// Above 0: the history begins at this revision, which is after the requested one.
    #[serde(deserialize_with = "number")]
    pub compact_revision: i64,
    /// In the order of the revisions; a message has all events of a revision.
    #[serde(deserialize_with = "at_most::<_, _, EVENTS_MAX>")]
    pub events: Vec<WatchEvent>,
}

/// A change of an entry.
#[derive(Debug, Default, PartialEq, Eq, Deserialize)]
pub struct WatchEvent {
    /// What happened.
    #[serde(default, rename = "type")]
    pub kind: StoreEventKind,
    /// A deletion has key and revision only.
    pub kv: KeyValue,
}

/// What happened to an entry.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum StoreEventKind {
    /// Created or changed.
    #[default]
    Put,
    /// Deleted, or its lease ended.
    Delete,
}

/// An answer that refuses a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GatewayRefusal {
    /// The class.
    pub why: SourceFailure,
    /// What the server wrote.
    pub message: String,
    /// Another token can help: it expired, or users and roles changed.
    pub token: bool,
    /// Users are not enabled at the server, so it gives no tokens.
    pub no_users: bool,
}

/// Body of `/v3/kv/put`.
#[derive(Debug, Serialize)]
pub struct PutRequest {
    /// The whole key.
    pub key: Base64Bytes,
    /// Its value.
    pub value: Base64Bytes,
    /// The key ends with this lease.
    pub lease: i64,
}

/// Answer of `/v3/kv/put`.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub struct PutAnswer {
    /// The revision of the change.
    pub header: EtcdHeader,
}

/// Body of `/v3/lease/grant`.
#[derive(Debug, Serialize)]
pub struct LeaseGrant {
    /// In seconds. The server can grant more.
    #[serde(rename = "TTL")]
    pub ttl: i64,
}

/// Body of `/v3/lease/keepalive` and `/v3/lease/revoke`.
#[derive(Debug, Serialize)]
pub struct LeaseId {
    /// As granted.
    #[serde(rename = "ID")]
    pub id: i64,
}

/// Answer about a lease.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub struct LeaseAnswer {
    /// Above 0.
    #[serde(rename = "ID", deserialize_with = "number")]
    pub id: i64,
    /// In seconds; 0 means that the lease ended.
    #[serde(rename = "TTL", deserialize_with = "number")]
    pub ttl: i64,
}

/// Answer of `/v3/lease/keepalive`: the first message of a stream.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub struct LeaseRenewed {
    /// The message.
    pub result: LeaseAnswer,
}

/// Body of `/v3/auth/authenticate`.
#[derive(Serialize)]
pub struct AuthenticateRequest<'a> {
    /// Name of the user.
    pub name: &'a str,
    /// Its password.
    pub password: &'a str,
}

/// Answer of `/v3/auth/authenticate`.
#[derive(Default, Deserialize)]
#[serde(default)]
pub struct AuthenticateAnswer {
    /// Value of the header `Authorization`.
    pub token: String,
}

/// The body of an error, in an answer or in a line of a stream.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct ErrorDocument {
    #[serde(alias = "grpc_code")]
    code: u32,
    message: String,
}

/// A line of a stream as the gateway writes it.
#[derive(Deserialize)]
#[serde(rename_all = "lowercase")]
enum LineDocument {
    Result(WatchMessage),
    Error(ErrorDocument),
}

// === impl RangeRequest ===

impl RangeRequest {
    /// All entries whose key begins with `prefix`.
    pub fn below(prefix: &str) -> RangeRequest {
        RangeRequest {
            key: Base64Bytes(prefix.as_bytes().to_vec()),
            range_end: Base64Bytes(end_of_prefix(prefix.as_bytes())),
            ..RangeRequest::default()
        }
    }
}

/// Returns the first key after all keys with this prefix. A zero byte means "up to the last
/// key" (etcd API, `RangeRequest.range_end`).
fn end_of_prefix(prefix: &[u8]) -> Vec<u8> {
    let mut end = prefix.to_vec();
    while let Some(last) = end.pop() {
        if last < 0xff {
            end.push(last + 1);
            return end;
        }
    }
    vec![0]
}

// === impl WatchMessage ===

impl WatchMessage {
    /// Position of the watch among those that were requested with the numbers 1, 2 and so on.
    /// `created` of them exist: a refused watch has no number, and the server answers in the
    /// order of the requests.
    pub fn position(&self, created: usize) -> Option<usize> {
        match self.created {
            true => Some(created),
            false => usize::try_from(self.watch_id).ok()?.checked_sub(1),
        }
    }
}

// === impl StreamLine ===

impl StreamLine {
    /// Reads a line.
    ///
    /// # Errors
    /// The line is not of this protocol; the text says where.
    pub fn parse(line: &[u8]) -> Result<StreamLine, serde_json::Error> {
        Ok(match serde_json::from_slice(line)? {
            LineDocument::Result(message) => StreamLine::Watch(message),
            LineDocument::Error(error) => StreamLine::Ended(GatewayRefusal::of(error)),
        })
    }
}

// === impl GatewayRefusal ===

impl GatewayRefusal {
    /// Reads the answer to a refused request. A status of HTTP counts only if the body is
    /// not of the gateway.
    pub fn of_answer(status: u16, body: &[u8]) -> GatewayRefusal {
        match serde_json::from_slice::<ErrorDocument>(body) {
            Ok(error) if error.code > 0 => GatewayRefusal::of(error),
            _ => GatewayRefusal::of_status(status),
        }
    }

    /// Reads the reason of a canceled watch. It has the code of gRPC in words.
    pub fn of_cancel(message: &WatchMessage) -> GatewayRefusal {
        let reason = &message.cancel_reason;
        if message.compact_revision > 0 {
            let text = format!("the history begins at revision {}", message.compact_revision);
            return GatewayRefusal::new(SourceFailure::Compacted, text);
        }
        let names = [
            ("code = Unauthenticated", grpc::UNAUTHENTICATED),
            ("code = PermissionDenied", grpc::PERMISSION_DENIED),
            ("code = InvalidArgument", grpc::INVALID_ARGUMENT),
            ("code = Unavailable", grpc::UNAVAILABLE),
        ];
        let code = names.iter().find(|(name, _)| reason.contains(name)).map_or(0, |named| named.1);
        GatewayRefusal::of(ErrorDocument { code, message: format!("watch canceled: {reason}") })
    }

    fn of(ErrorDocument { code, message }: ErrorDocument) -> GatewayRefusal {
        let says = |text: &str| message.contains(text);
        let expired =
            says("invalid auth token") || says("auth store is old") || says("user name is empty");
        let why = match code {
            _ if expired => SourceFailure::Auth,
            grpc::UNAUTHENTICATED | grpc::PERMISSION_DENIED => SourceFailure::Auth,
            grpc::INVALID_ARGUMENT if says("authentication failed") => SourceFailure::Auth,
            grpc::OUT_OF_RANGE if says("compacted") => SourceFailure::Compacted,
            grpc::UNAVAILABLE if says("no leader") => SourceFailure::Stale,
            grpc::UNAVAILABLE if says("timed out") => SourceFailure::Timeout,
            grpc::UNAVAILABLE | grpc::RESOURCE_EXHAUSTED => SourceFailure::Connect,
            grpc::DEADLINE_EXCEEDED => SourceFailure::Timeout,
            grpc::NOT_FOUND | grpc::UNIMPLEMENTED => SourceFailure::NotFound,
            _ => SourceFailure::Protocol,
        };
        GatewayRefusal {
            token: expired || code == grpc::UNAUTHENTICATED,
            no_users: code == grpc::FAILED_PRECONDITION && says("authentication is not enabled"),
            ..GatewayRefusal::new(why, message)
        }
    }

    fn of_status(status: u16) -> GatewayRefusal {
        let why = match status {
            401 | 403 => SourceFailure::Auth,
            404 => SourceFailure::NotFound,
            408 | 504 => SourceFailure::Timeout,
            429 | 502 | 503 => SourceFailure::Connect,
            _ => SourceFailure::Protocol,
        };
        let refusal = GatewayRefusal::new(why, format!("HTTP status {status}"));
        GatewayRefusal { token: status == 401, ..refusal }
    }

    fn new(why: SourceFailure, message: String) -> GatewayRefusal {
        GatewayRefusal { why, message, token: false, no_users: false }
    }
}

// === impl Base64Bytes ===

impl Serialize for Base64Bytes {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&STANDARD.encode(&self.0))
    }
}

impl<'de> Deserialize<'de> for Base64Bytes {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Base64Bytes, D::Error> {
        struct Base64Text;
        impl Visitor<'_> for Base64Text {
            type Value = Base64Bytes;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a text in base64")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Base64Bytes, E> {
                STANDARD.decode(text).map(Base64Bytes).map_err(E::custom)
            }
        }
        deserializer.deserialize_str(Base64Text)
    }
}

/// Reads a number that may be a text.
fn number<'de, D: Deserializer<'de>, N: NumberInText>(deserializer: D) -> Result<N, D::Error> {
    deserializer.deserialize_any(NumberOrText(PhantomData))
}

/// A number that [`number`] can read.
trait NumberInText: TryFrom<i64> + TryFrom<u64> + FromStr {}

impl NumberInText for i64 {}
impl NumberInText for u64 {}

struct NumberOrText<N>(PhantomData<N>);

impl<N: NumberInText> Visitor<'_> for NumberOrText<N> {
    type Value = N;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a number, or its text")
    }

    fn visit_i64<E: de::Error>(self, number: i64) -> Result<N, E> {
        N::try_from(number).map_err(|_| E::custom("the number is out of range"))
    }

    fn visit_u64<E: de::Error>(self, number: u64) -> Result<N, E> {
        N::try_from(number).map_err(|_| E::custom("the number is out of range"))
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<N, E> {
        text.parse().map_err(|_| E::custom("the text is no number"))
    }
}

fn is_zero(number: &i64) -> bool {
    *number == 0
}

fn is_false(flag: &bool) -> bool {
    !flag
}

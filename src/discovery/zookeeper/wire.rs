//! The frames of ZooKeeper's client protocol: requests to bytes, bytes to replies.
//!
//! `session` calls it. The format is jute of ZooKeeper 3.4 and newer
//! (zookeeper.jute, ZooDefs.java): big-endian integers, texts and lists with a length
//! before them, and a length before each frame. Nothing here reads a socket. No input
//! panics, and no length in a frame is believed before the bytes are there.

use bytes::{Buf, BufMut};
use std::fmt;

/// Largest frame of a server that is read.
pub(crate) const FRAME_BYTES_MAX: usize = 64 * 1024 * 1024;

/// Most names in a list of children. A name of one byte is a value of 40 bytes or more.
pub(crate) const CHILDREN_MAX: usize = 100_000;

/// Request numbers that ZooKeeper reserves for frames that answer no numbered request.
pub(crate) const XID_EVENT: i32 = -1;
pub(crate) const XID_PING: i32 = -2;
pub(crate) const XID_AUTH: i32 = -4;

/// Bytes of a session's password.
pub(crate) const PASSWORD_BYTES: usize = 16;

/// A request. `watch` asks for one event about the path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum ZkRequest {
    /// The server waits until it has caught up with its leader.
    Sync { path: String },
    /// Names of the children.
    Children { path: String, watch: bool },
    /// Content of a node.
    Data { path: String, watch: bool },
    /// State of a node.
    Exists { path: String, watch: bool },
    /// A new node. Every client may read it, and change it unless `owned` is set: then only
    /// the user of this session.
    Create { path: String, data: Vec<u8>, ephemeral: bool, owned: bool },
    /// Other content for a node, whatever its version.
    SetData { path: String, data: Vec<u8> },
    /// Removal of a node, whatever its version.
    Delete { path: String },
}

/// The answer to a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum ZkReply {
    /// Nothing but success.
    Done,
    /// Names of the children, in any order.
    Children(Vec<String>, ZkStat),
    /// Content of a node.
    Data(Vec<u8>),
    /// State of a node.
    Exists(ZkStat),
}

/// The part of a node's state that Tidegate uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct ZkStat {
    /// Transaction that created the node.
    pub(crate) created: i64,
    /// Session that owns the node; 0 for a node that stays.
    pub(crate) owner: i64,
    /// Transaction that last added or removed a child.
    pub(crate) children_changed: i64,
}

/// The server's answer to a connect.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ZkWelcome {
    /// Session timeout that the server grants, in milliseconds; 0 if it no longer knows
    /// the session.
    pub(crate) timeout_millis: i32,
    /// Number and password of the session.
    pub(crate) identity: ZkIdentity,
}

/// A session, to continue it on another connection.
#[derive(Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct ZkIdentity {
    pub(crate) session: i64,
    password: [u8; PASSWORD_BYTES],
}

/// The beginning of each frame of the server after the first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ZkHeader {
    /// Number of the request.
    pub(crate) xid: i32,
    /// Last transaction that the server has applied.
    pub(crate) zxid: i64,
    /// 0, or an error code.
    pub(crate) error: i32,
}

/// An event of a watch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ZkEvent {
    /// What happened; 4: children came or went.
    pub(crate) kind: i32,
    /// Where.
    pub(crate) path: String,
}

/// Value of [`ZkEvent::kind`] for a changed list of children.
pub(crate) const EVENT_CHILDREN: i32 = 4;

/// A frame that does not have the format.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("cannot read a frame of ZooKeeper: {0}")]
pub(crate) struct BadFrame(pub(crate) &'static str);

// === requests ===

/// Appends a frame that asks for a session: a new one, or `identity`.
pub(crate) fn put_connect(out: &mut Vec<u8>, timeout_millis: i32, identity: ZkIdentity) {
    put_frame(out, |out| {
        out.put_i32(0);
        // The last transaction that was seen. A restored server would refuse a higher one
        // forever, so the source compares transactions itself.
        out.put_i64(0);
        out.put_i32(timeout_millis);
        out.put_i64(identity.session);
        put_bytes(out, &identity.password);
        // A server without a quorum must refuse.
        out.put_u8(0);
    });
}

/// Appends a frame with the user and password of the digest scheme.
pub(crate) fn put_auth(out: &mut Vec<u8>, user_and_password: &[u8]) {
    put_frame(out, |out| {
        out.put_i32(XID_AUTH);
        out.put_i32(100);
        out.put_i32(0);
        put_bytes(out, b"digest");
        put_bytes(out, user_and_password);
    });
}

/// Appends a frame that the server answers at once.
pub(crate) fn put_ping(out: &mut Vec<u8>) {
    put_frame(out, |out| {
        out.put_i32(XID_PING);
        out.put_i32(11);
    });
}

/// Appends a frame that ends the session and deletes its ephemeral nodes.
pub(crate) fn put_close(out: &mut Vec<u8>, xid: i32) {
    put_frame(out, |out| {
        out.put_i32(xid);
        out.put_i32(-11);
    });
}

/// Appends a request's frame.
pub(crate) fn put_request(out: &mut Vec<u8>, xid: i32, request: &ZkRequest) {
    put_frame(out, |out| {
        out.put_i32(xid);
        out.put_i32(request.code());
        put_bytes(out, request.path().as_bytes());
        match request {
            ZkRequest::Sync { .. } => {}
            ZkRequest::Children { watch, .. }
            | ZkRequest::Data { watch, .. }
            | ZkRequest::Exists { watch, .. } => out.put_u8(u8::from(*watch)),
            ZkRequest::Create { data, ephemeral, owned, .. } => {
                put_bytes(out, data);
                put_access(out, *owned);
                out.put_i32(i32::from(*ephemeral));
            }
            ZkRequest::SetData { data, .. } => {
                put_bytes(out, data);
                out.put_i32(-1);
            }
            ZkRequest::Delete { .. } => out.put_i32(-1),
        }
    });
}

/// Appends the entries of access control: permissions (1 reads, 31 is all), scheme and id.
fn put_access(out: &mut Vec<u8>, owned: bool) {
    let everyone = |permissions| (permissions, &b"world"[..], &b"anyone"[..]);
    let entries = match owned {
        true => vec![(31, &b"auth"[..], &b""[..]), everyone(1)],
        false => vec![everyone(31)],
    };
    out.put_i32(entries.len() as i32);
    for (permissions, scheme, id) in entries {
        out.put_i32(permissions);
        put_bytes(out, scheme);
        put_bytes(out, id);
    }
}

fn put_frame(out: &mut Vec<u8>, content: impl FnOnce(&mut Vec<u8>)) {
    let start = out.len();
    out.put_i32(0);
    content(out);
    let length = (out.len() - start - 4) as i32;
    out[start..start + 4].copy_from_slice(&length.to_be_bytes());
}

fn put_bytes(out: &mut Vec<u8>, bytes: &[u8]) {
    out.put_i32(bytes.len() as i32);
    out.put_slice(bytes);
}

// === answers ===

/// Returns the length of the next frame, without the four bytes of the length itself;
/// `None` if these bytes are not complete.
///
/// # Errors
/// The length is negative or above [`FRAME_BYTES_MAX`].
pub(crate) fn frame_length(received: &[u8]) -> Result<Option<usize>, BadFrame> {
    let Some(length) = received.first_chunk() else { return Ok(None) };
    match usize::try_from(i32::from_be_bytes(*length)) {
        Ok(length) if length <= FRAME_BYTES_MAX => Ok(Some(length)),
        _ => Err(BadFrame("its length is not between 0 and 64 MiB")),
    }
}

/// Reads the first frame of a server.
pub(crate) fn read_welcome(frame: &[u8]) -> Result<ZkWelcome, BadFrame> {
    let mut rest = FrameReader(frame);
    rest.i32()?;
    let timeout_millis = rest.i32()?;
    let session = rest.i64()?;
    let password = rest.bytes()?.try_into();
    let password = password.map_err(|_| BadFrame("a session's password has 16 bytes"))?;
    Ok(ZkWelcome { timeout_millis, identity: ZkIdentity { session, password } })
}

/// Splits a later frame into its header and the rest.
pub(crate) fn read_header(frame: &[u8]) -> Result<(ZkHeader, &[u8]), BadFrame> {
    let mut rest = FrameReader(frame);
    let header = ZkHeader { xid: rest.i32()?, zxid: rest.i64()?, error: rest.i32()? };
    Ok((header, rest.0))
}

/// Reads the event of a watch, after the header.
pub(crate) fn read_event(rest: &[u8]) -> Result<ZkEvent, BadFrame> {
    let mut rest = FrameReader(rest);
    let kind = rest.i32()?;
    rest.i32()?;
    Ok(ZkEvent { kind, path: rest.text()? })
}

/// Reads the answer to `request`, after the header.
pub(crate) fn read_reply(request: &ZkRequest, rest: &[u8]) -> Result<ZkReply, BadFrame> {
    let mut rest = FrameReader(rest);
    Ok(match request {
        ZkRequest::Children { .. } => {
            let count = rest.length()?;
            if count > CHILDREN_MAX {
                return Err(BadFrame("a node has more than 100,000 children"));
            }
            // Each name has four bytes of length.
            let mut names = Vec::with_capacity(count.min(rest.0.len() / 4));
            for _ in 0..count {
                names.push(rest.text()?);
            }
            ZkReply::Children(names, rest.stat()?)
        }
        ZkRequest::Data { .. } => ZkReply::Data(rest.bytes()?.to_vec()),
        ZkRequest::Exists { .. } => ZkReply::Exists(rest.stat()?),
        ZkRequest::Sync { .. }
        | ZkRequest::Create { .. }
        | ZkRequest::SetData { .. }
        | ZkRequest::Delete { .. } => ZkReply::Done,
    })
}

/// What is left of a frame.
struct FrameReader<'a>(&'a [u8]);

// === impl FrameReader ===

impl<'a> FrameReader<'a> {
    fn i32(&mut self) -> Result<i32, BadFrame> {
        self.0.try_get_i32().map_err(|_| BadFrame("it ends early"))
    }

    fn i64(&mut self) -> Result<i64, BadFrame> {
        self.0.try_get_i64().map_err(|_| BadFrame("it ends early"))
    }

    /// A length of bytes or of a list; -1 is an absent value, which is an empty one.
    fn length(&mut self) -> Result<usize, BadFrame> {
        match self.i32()? {
            -1 => Ok(0),
            length => usize::try_from(length).map_err(|_| BadFrame("a length is negative")),
        }
    }

    fn bytes(&mut self) -> Result<&'a [u8], BadFrame> {
        let length = self.length()?;
        let (bytes, rest) = self.0.split_at_checked(length).ok_or(BadFrame("it ends early"))?;
        self.0 = rest;
        Ok(bytes)
    }

    fn text(&mut self) -> Result<String, BadFrame> {
        let text = std::str::from_utf8(self.bytes()?);
        Ok(text.map_err(|_| BadFrame("a text is not UTF-8"))?.to_owned())
    }

    fn stat(&mut self) -> Result<ZkStat, BadFrame> {
        let created = self.i64()?;
        // Last change, both times, three versions.
        for _ in 0..3 {
            self.i64()?;
        }
        for _ in 0..3 {
            self.i32()?;
        }
        let owner = self.i64()?;
        // Bytes of the content, number of children.
        self.i32()?;
        self.i32()?;
        Ok(ZkStat { created, owner, children_changed: self.i64()? })
    }
}

// === impl ZkRequest ===

impl ZkRequest {
    /// The node that the request is about.
    pub(crate) fn path(&self) -> &str {
        match self {
            ZkRequest::Sync { path }
            | ZkRequest::Children { path, .. }
            | ZkRequest::Data { path, .. }
            | ZkRequest::Exists { path, .. }
            | ZkRequest::Create { path, .. }
            | ZkRequest::SetData { path, .. }
            | ZkRequest::Delete { path } => path,
        }
    }

    fn code(&self) -> i32 {
        match self {
            ZkRequest::Create { .. } => 1,
            ZkRequest::Delete { .. } => 2,
            ZkRequest::Exists { .. } => 3,
            ZkRequest::Data { .. } => 4,
            ZkRequest::SetData { .. } => 5,
            ZkRequest::Sync { .. } => 9,
            ZkRequest::Children { .. } => 12,
        }
    }
}

// === impl ZkIdentity ===

impl fmt::Debug for ZkIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "session 0x{:x}", self.session)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn children() -> ZkRequest {
        ZkRequest::Children { path: "/s".into(), watch: true }
    }

    #[test]
    fn a_request_has_the_bytes_of_the_protocol() {
        let mut out = Vec::new();
        put_request(&mut out, 7, &children());
        assert_eq!(out, b"\0\0\0\x0f\0\0\0\x07\0\0\0\x0c\0\0\0\x02/s\x01");
        out.clear();
        put_ping(&mut out);
        assert_eq!(out, b"\0\0\0\x08\xff\xff\xff\xfe\0\0\0\x0b");
        out.clear();
        put_connect(&mut out, 10_000, ZkIdentity::default());
        assert_eq!((out.len(), frame_length(&out)), (49, Ok(Some(45))));
    }

    #[test]
    fn lengths_beyond_the_bound_are_refused_before_the_bytes_arrive() {
        assert_eq!(frame_length(b"\0\0\0"), Ok(None));
        assert!(frame_length(b"\x7f\xff\xff\xff").is_err());
        assert!(frame_length(b"\xff\xff\xff\xff").is_err());
        // A list of names that are not there reserves no memory for them.
        let frame = b"\0\x01\x86\xa0\0\0\0\x01a";
        assert_eq!(read_reply(&children(), frame), Err(BadFrame("it ends early")));
        let frame = b"\0\x01\x86\xa1\0\0\0\x01a";
        let many = BadFrame("a node has more than 100,000 children");
        assert_eq!(read_reply(&children(), frame), Err(many));
    }

    #[test]
    fn a_password_is_not_shown() {
        let identity = ZkIdentity { session: 255, password: *b"secretsecretsecr" };
        assert_eq!(format!("{identity:?}"), "session 0xff");
    }

    proptest! {
        #[test]
        fn no_frame_panics(frame in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = frame_length(&frame);
            let _ = read_welcome(&frame);
            let _ = read_event(&frame);
            if let Ok((_, rest)) = read_header(&frame) {
                let _ = read_reply(&children(), rest);
                let _ = read_reply(&ZkRequest::Data { path: "/".into(), watch: false }, rest);
                let _ = read_reply(&ZkRequest::Exists { path: "/".into(), watch: false }, rest);
            }
        }
    }
}

//! A session of the ring engine: its sockets, queues and operations in flight.
//!
//! Driven by `RingEngine` with the events of the ring. It reads no clock and knows no timers.
//!
//! - Each direction has at most one receive and one send in flight.
//! - Bytes are queued while a send is in flight. At the high-water mark the receive is
//!   cancelled; at half of it, the receive is started again.
//! - A stream whose buffers are full several times in a row becomes bulk, see `bulk`.

use super::queue::SendQueue;
use crate::relay::close_state::{CloseState, TurnBytes};
use crate::relay::engine::{ConnectResult, EngineSession};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::rc::Rc;
use tidegate_core::outcome::SessionSide;
use tidegate_net::pipe::{Pipe, Pipes};
use tidegate_net::ring::{BUFFER_LEN, Chunk, Completion, CompletionKind, Op, PollInterest, Ring};
use tidegate_net::stream;

/// Queued bytes at which a direction stops receiving, while at least half of the pool is free.
/// A direction can exceed it: one receive takes as many buffers as are offered, up to 1 MiB
/// unless buffers are missing. The pool bounds all sessions together.
const HIGH_WATER: u32 = 128 * 1024;

/// High-water mark while less than half of the pool is free.
const HIGH_WATER_SCARCE: u32 = 2 * BUFFER_LEN as u32;

/// Bytes received after a cancel before it is repeated, because it missed the receive.
const CANCEL_AGAIN: u32 = 512 * 1024;

/// Full buffers in a row after which a stream is bulk.
const STREAK: u8 = 6;

/// How often the required streak is doubled. It doubles each time a pipe was inefficient.
pub(super) const PIPE_FAILURES_MAX: u8 = 5;

/// The purpose of an operation; the low bits of its tag.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum OpUse {
    Receive,
    /// Tagged with the side that the bytes came from.
    Send,
    Connect,
    /// Poll of the client before the relay.
    Watch,
    /// Poll of a socket that has no multishot receive, for bytes.
    Readable,
    /// Poll of a socket for room to send. Tagged with the side that the bytes came from.
    Writable,
    /// Poll of a socket whose receive is stopped, for failure.
    Stalled,
}

// Constants for matching the bits of a tag.
const CONNECT: u64 = OpUse::Connect as u64;
const WATCH: u64 = OpUse::Watch as u64;
const READABLE: u64 = OpUse::Readable as u64;
const WRITABLE: u64 = OpUse::Writable as u64;
const STALLED: u64 = OpUse::Stalled as u64;

/// Sockets, streams and operations of a session.
#[derive(Debug, Default)]
pub(in crate::relay) struct RingSession {
    /// Indexed by side. Operations hold references.
    pub(super) sockets: [Option<Rc<OwnedFd>>; 2],
    /// Indexed by the side that the bytes come from.
    pub(super) streams: [RingDirection; 2],
    pub(super) close: CloseState,
    /// Operations that are not complete.
    pub(super) operations: u32,
    connect: Option<Op>,
    watch: Option<Op>,
    /// The session has ended. No operation is started, and results are discarded.
    pub(super) halted: bool,
    /// Streams that have been bulk, by the side that the bytes come from. Kept here, because a
    /// flag in `RingDirection` would enlarge it.
    were_bulk: [bool; 2],
}

/// Bytes from one side to the other. Small, because every idle session has two.
#[derive(Debug, Default)]
pub(super) struct RingDirection {
    pub(super) receive: Option<Op>,
    pub(super) send: Option<Op>,
    /// Poll without a receive or send in flight: for room to send if the pipe holds bytes or
    /// the direction is unbuffered, else for bytes.
    pub(super) poll: Option<Op>,
    /// Poll of a socket whose receive is stopped, for failure.
    pub(super) stalled_poll: Option<Op>,
    /// Chunks behind the send in flight.
    queue: SendQueue,
    /// `None` while the pipe would be empty and the stream waits.
    pub(super) pipe: Option<Box<Pipe>>,
    /// Bytes queued or in flight to be sent.
    pub(super) queued: u32,
    /// Value of `queued` at which to cancel the receive.
    cancel_at: u32,
    pub(super) mode: RingMode,
    /// Waits for a buffer.
    pub(super) needs_buffer: bool,
    /// No buffer is available, and the other side has no room for the bytes.
    pub(super) unbuffered: bool,
    /// The kernel had no memory. No operation is in flight; a tick retries.
    pub(super) short: bool,
    /// The stall has been reported to the engine.
    pub(super) stall_reported: bool,
    /// Full buffers in a row; in bulk, small fills in a row.
    pub(super) streak: u8,
    /// The last fill was crammed, or no pipe was available.
    pub(super) pipe_failed: bool,
    /// How often a pipe was inefficient or not available.
    pub(super) pipe_failures: u8,
}

/// How the bytes of a stream are moved.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(super) enum RingMode {
    /// By receives and sends. The stream can become bulk.
    #[default]
    Ring,
    /// Becomes bulk once the queued bytes are sent.
    ToBulk,
    /// Through a pipe. No receive is in flight and no chunk is queued.
    Bulk,
}

/// What the engine must do after an event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum OpResult {
    Nothing,
    /// The pending connect ended.
    Connected(ConnectResult),
    /// The client failed before the relay.
    ClientFailed,
    /// The client sent bytes or a FIN before the relay.
    ClientReadable,
    /// No buffer for bytes of this side. `alone`: the side holds buffers in its own queue.
    NoBuffer {
        side: SessionSide,
        alone: bool,
    },
    /// The receive of this side is stopped, because its bytes wait to be sent.
    Stalled(SessionSide),
    /// The kernel has no memory to move bytes of this side.
    Short(SessionSide),
    /// This side has failed.
    Failed(SessionSide),
}

// === tags ===

pub(super) fn tag(key: u32, side: SessionSide, what: OpUse) -> u64 {
    u64::from(key) << 8 | (side as u64) << 4 | what as u64
}

/// The key of the session that an event belongs to.
#[inline]
pub(super) fn key_of(tag: u64) -> u32 {
    (tag >> 8) as u32
}

fn side_of(tag: u64) -> SessionSide {
    if tag & 0x10 == 0 { SessionSide::Client } else { SessionSide::Backend }
}

// === impl RingSession: sockets ===

impl RingSession {
    pub(super) fn new(client: OwnedFd) -> RingSession {
        RingSession { sockets: [Some(Rc::new(client)), None], ..RingSession::default() }
    }

    pub(super) fn attach(&mut self, key: u32, upstream: OwnedFd, pending: bool, ring: &mut Ring) {
        let upstream = Rc::new(upstream);
        if pending {
            let tag = tag(key, SessionSide::Backend, OpUse::Connect);
            self.connect = Some(ring.poll(&upstream, tag, PollInterest::Writable));
            self.operations += 1;
        }
        self.sockets[SessionSide::Backend as usize] = Some(upstream);
    }

    pub(super) fn detach(&mut self, ring: &mut Ring) {
        if let Some(op) = self.connect.take() {
            ring.cancel(op);
        }
        self.sockets[SessionSide::Backend as usize] = None;
    }

    pub(super) fn watch_client(&mut self, key: u32, readable: bool, ring: &mut Ring) {
        if self.watch.is_none()
            && let Some(client) = &self.sockets[SessionSide::Client as usize]
        {
            let tag = tag(key, SessionSide::Client, OpUse::Watch);
            let interest = if readable { PollInterest::Readable } else { PollInterest::Failure };
            self.watch = Some(ring.poll(client, tag, interest));
            self.operations += 1;
        }
    }

    /// Cancels all operations and discards queued bytes. The operations complete soon after.
    pub(super) fn halt(&mut self, ring: &mut Ring) {
        self.halted = true;
        for stream in &mut self.streams {
            stream.queue = SendQueue::default();
            stream.pipe = None;
            stream.needs_buffer = false;
            stream.short = false;
        }
        self.cancel_all(ring);
    }

    /// Operations in flight with their names.
    fn in_flight(&self) -> impl Iterator<Item = (&'static str, Op)> {
        let of = |stream: &RingDirection| {
            let RingDirection { receive, send, poll, stalled_poll, .. } = stream;
            [
                ("receive", *receive),
                ("send", *send),
                ("poll", *poll),
                ("stalled poll", *stalled_poll),
            ]
        };
        let shared = [("connect", self.connect), ("watch", self.watch)];
        let all = self.streams.iter().flat_map(of).chain(shared);
        all.filter_map(|(name, op)| Some((name, op?)))
    }

    /// Describes the operations in flight, for the log.
    pub(super) fn describe_operations(&self) -> String {
        let names: Vec<&str> = self.in_flight().map(|(name, _)| name).collect();
        format!("{} in all: {}", self.operations, names.join(", "))
    }

    fn cancel_all(&self, ring: &mut Ring) {
        if self.operations > 0 {
            self.in_flight().for_each(|(_, op)| ring.cancel(op));
        }
    }

    /// Resets the connections, because the operations did not complete after a cancel.
    pub(super) fn reset(&self, ring: &mut Ring) {
        for socket in self.sockets.iter().flatten() {
            stream::abort(socket);
        }
        self.cancel_all(ring);
    }

    /// Requests the progress of sends that wait for room. Returns false if there are none.
    pub(super) fn request_progress(&self, ring: &mut Ring) -> bool {
        let mut requested = false;
        for stream in &self.streams {
            if let Some(op) = stream.send {
                ring.request_progress(op);
                requested = true;
            } else if (stream.pipe.is_some() || stream.unbuffered)
                && let Some(op) = stream.poll
            {
                // The end of the poll retries the send. There can be room, but too little for
                // the kernel to report.
                ring.cancel(op);
                requested = true;
            }
        }
        requested
    }
}

impl EngineSession for RingSession {
    fn socket(&self, side: SessionSide) -> Option<BorrowedFd<'_>> {
        self.sockets[side as usize].as_ref().map(AsFd::as_fd)
    }

    #[inline]
    fn close_state(&self) -> &CloseState {
        &self.close
    }

    #[inline]
    fn is_settled(&self) -> bool {
        self.operations == 0
    }

    fn take_sockets(&mut self) -> Option<[OwnedFd; 2]> {
        let [client, backend] = std::mem::take(&mut self.sockets);
        Some([Rc::into_inner(client?)?, Rc::into_inner(backend?)?])
    }
}

// === impl RingSession: moving bytes ===

impl RingSession {
    /// Starts a receive from this side, unless one is in flight or the side must not receive
    /// now.
    pub(super) fn arm(&mut self, key: u32, from: SessionSide, ring: &mut Ring) {
        let stream = &mut self.streams[from as usize];
        if self.halted
            || stream.receive.is_some()
            || stream.needs_buffer
            || stream.short
            || stream.poll.is_some()
            || self.close.ended(from)
            || self.close.failed(from.other())
            || stream.queued > high_water(ring) / 2
        {
            return;
        }
        if matches!(stream.mode, RingMode::ToBulk | RingMode::Bulk) {
            if stream.queued == 0 {
                stream.mode = RingMode::Bulk;
                if !std::mem::replace(&mut self.were_bulk[from as usize], true)
                    && let (Some(socket), Some(to)) =
                        (&self.sockets[from as usize], &self.sockets[from.other() as usize])
                {
                    stream::shorten_near_queues(socket, to);
                }
                self.wait(key, from, OpUse::Readable, ring);
            }
            return;
        }
        let Some(socket) = &self.sockets[from as usize] else { return };
        stream.receive = Some(ring.receive(socket, tag(key, from, OpUse::Receive)));
        stream.cancel_at = high_water(ring);
        self.operations += 1;
    }

    /// Polls this side for bytes, or the other side for room to send them.
    pub(super) fn wait(&mut self, key: u32, from: SessionSide, what: OpUse, ring: &mut Ring) {
        let (of, interest) = match what {
            OpUse::Writable => (from.other(), PollInterest::Writable),
            _ => (from, PollInterest::Readable),
        };
        if let Some(socket) = &self.sockets[of as usize] {
            let poll = ring.poll(socket, tag(key, from, what), interest);
            self.streams[from as usize].poll = Some(poll);
            self.operations += 1;
        }
    }

    /// Handles an event of an operation of this session.
    #[inline]
    pub(super) fn handle(
        &mut self,
        event: Completion,
        ring: &mut Ring,
        pipes: &mut Pipes,
        moved: &mut TurnBytes,
    ) -> OpResult {
        let Completion { op, tag, last, what } = event;
        let (key, side) = (key_of(tag), side_of(tag));
        if last {
            self.operations -= 1;
            self.forget(op, side);
        }
        if self.halted {
            self.note_late(side, &what, moved);
            return OpResult::Nothing;
        }
        let result = match what {
            CompletionKind::Data(chunk) => {
                self.classify_stream(side, chunk.len(), ring);
                self.received(key, side, chunk, ring, moved);
                OpResult::Nothing
            }
            CompletionKind::End => self.end_of(side, self.failure_behind_end(side), moved),
            CompletionKind::Failed(errno) => self.end_of(side, errno, moved),
            CompletionKind::Starved => return self.note_no_buffer(side),
            CompletionKind::Stopped => OpResult::Nothing,
            CompletionKind::Sent(bytes) => {
                self.close.sent_on(side, bytes, moved);
                self.sent(key, side, bytes, last, ring);
                OpResult::Nothing
            }
            CompletionKind::SendCut(bytes) => {
                self.close.sent_on(side, bytes, moved);
                self.send_failed(side, libc::ECANCELED, ring)
            }
            CompletionKind::SendFailed(errno) => self.send_failed(side, errno, ring),
            CompletionKind::Polled(result) => match tag & 0xF {
                READABLE | WRITABLE if result == Err(libc::ENOMEM) => self.wait_short(side),
                what @ (READABLE | WRITABLE) => {
                    self.woken(key, side, what == READABLE, ring, pipes, moved)
                }
                _ => return self.polled(tag, op, result),
            },
        };
        if last {
            self.arm(key, side, ring);
        }
        self.finish(side);
        if result == OpResult::Nothing
            && self.is_stalled(side)
            && !std::mem::replace(&mut self.streams[side as usize].stall_reported, true)
        {
            return OpResult::Stalled(side);
        }
        result
    }

    fn forget(&mut self, op: Op, side: SessionSide) {
        let stream = &mut self.streams[side as usize];
        let RingDirection { receive, send, poll, stalled_poll, .. } = stream;
        for held in [receive, send, poll, stalled_poll] {
            if *held == Some(op) {
                *held = None;
                return;
            }
        }
    }

    /// Counts full buffers, and makes the stream bulk after enough of them.
    fn classify_stream(&mut self, from: SessionSide, len: usize, ring: &mut Ring) {
        let stream = &mut self.streams[from as usize];
        if len < BUFFER_LEN {
            stream.streak = 0;
            return;
        }
        stream.streak = stream.streak.saturating_add(1);
        if stream.streak >= STREAK << stream.pipe_failures && stream.mode == RingMode::Ring {
            stream.mode = RingMode::ToBulk;
            stream.streak = 0;
            if let Some(op) = stream.receive {
                ring.cancel(op);
            }
        }
    }

    pub(super) fn received(
        &mut self,
        key: u32,
        from: SessionSide,
        chunk: Chunk,
        ring: &mut Ring,
        moved: &mut TurnBytes,
    ) {
        let to = self.sockets[from.other() as usize].as_ref();
        let Some(to) = to.filter(|_| !self.close.failed(from.other())) else {
            return self.close.received(from, chunk.len(), &mut TurnBytes::default());
        };
        self.close.received(from, chunk.len(), moved);
        let stream = &mut self.streams[from as usize];
        stream.queued += chunk.len() as u32;
        if stream.send.is_none() {
            stream.send = Some(ring.send(to, tag(key, from, OpUse::Send), chunk));
            self.operations += 1;
        } else {
            stream.queue.push(chunk);
        }
        if stream.queued >= stream.cancel_at
            && let Some(op) = stream.receive
        {
            ring.cancel(op);
            stream.cancel_at = stream.queued + CANCEL_AGAIN;
        }
    }

    fn sent(&mut self, key: u32, from: SessionSide, bytes: usize, last: bool, ring: &mut Ring) {
        let stream = &mut self.streams[from as usize];
        stream.queued = stream.queued.saturating_sub(bytes as u32);
        if !last {
            return;
        }
        let Some(to) = &self.sockets[from.other() as usize] else { return };
        stream.send = stream.queue.send(to, tag(key, from, OpUse::Send), ring);
        self.operations += u32::from(stream.send.is_some());
    }

    /// Records that bytes from `from` cannot be sent, because the other side has failed.
    /// Discards the queued bytes. Bytes that the failed side had sent are still received.
    pub(super) fn send_failed(
        &mut self,
        from: SessionSide,
        errno: i32,
        ring: &mut Ring,
    ) -> OpResult {
        let stream = &mut self.streams[from as usize];
        stream.queue = SendQueue::default();
        stream.pipe = None;
        stream.queued = 0;
        if let Some(op) = stream.receive {
            ring.cancel(op);
        }
        self.close.send_failed(from.other(), errno);
        OpResult::Failed(from.other())
    }

    pub(super) fn end_of(
        &mut self,
        from: SessionSide,
        errno: i32,
        moved: &mut TurnBytes,
    ) -> OpResult {
        self.close.end_of(from, errno, moved);
        OpResult::Nothing
    }

    /// Passes on the end of a side once all bytes before it are sent.
    pub(super) fn finish(&mut self, from: SessionSide) {
        let stream = &self.streams[from as usize];
        let waits = stream.send.is_some() || stream.pipe.is_some() || !stream.queue.is_empty();
        if waits || !self.close.ended(from) {
            return;
        }
        let to = self.sockets[from.other() as usize].as_deref();
        self.close.finish(from, || to.map_or(Ok(()), stream::shutdown_write));
    }

    /// Counts what an operation moved before it was cancelled.
    #[cold]
    fn note_late(&mut self, side: SessionSide, what: &CompletionKind, moved: &mut TurnBytes) {
        match what {
            CompletionKind::Data(chunk) => {
                self.close.received(side, chunk.len(), &mut TurnBytes::default());
            }
            CompletionKind::Sent(bytes) | CompletionKind::SendCut(bytes) => {
                self.close.sent_on(side, *bytes, moved)
            }
            _ => {}
        }
    }

    /// Returns the errno if the end of `side` is a failure, or 0 if it is a FIN.
    ///
    /// A socket reports its error once. A ring send that has sent a part consumes the error and
    /// completes as a short send (`io_send` in Linux). The receive then ends as if by a FIN.
    /// Therefore the end is checked if a send to this side is in flight. No other operation can
    /// consume the error.
    fn failure_behind_end(&self, side: SessionSide) -> i32 {
        let back = &self.streams[side.other() as usize];
        if back.send.is_none() && back.pipe.is_none() {
            return 0;
        }
        let socket = self.sockets[side as usize].as_deref();
        socket.and_then(stream::close_error).unwrap_or(0)
    }

    /// Handles the end of a poll: bytes arrived, there is room to send, or the poll was
    /// cancelled.
    fn woken(
        &mut self,
        key: u32,
        side: SessionSide,
        readable: bool,
        ring: &mut Ring,
        pipes: &mut Pipes,
        moved: &mut TurnBytes,
    ) -> OpResult {
        self.streams[side as usize].unbuffered = false;
        match self.streams[side as usize].mode {
            RingMode::Bulk => self.splice(key, side, readable, ring, pipes, moved),
            RingMode::ToBulk => OpResult::Nothing,
            RingMode::Ring => self.note_no_buffer(side),
        }
    }

    fn polled(&mut self, tag: u64, op: Op, result: Result<bool, i32>) -> OpResult {
        let side = side_of(tag);
        match tag & 0xF {
            CONNECT if self.connect == Some(op) => {
                self.connect = None;
                OpResult::Connected(match result {
                    Ok(false) => ConnectResult::Connected,
                    Ok(true) => ConnectResult::Failed,
                    Err(errno) => ConnectResult::Unwatched(errno),
                })
            }
            WATCH if self.watch == Some(op) => {
                self.watch = None;
                match result {
                    Ok(true) => OpResult::ClientFailed,
                    Ok(false) => OpResult::ClientReadable,
                    Err(_) => OpResult::Nothing,
                }
            }
            STALLED if result == Ok(true) && self.close.note_failure(side) => {
                OpResult::Failed(side)
            }
            // Cancelled, or a poll of an earlier connect attempt.
            _ => OpResult::Nothing,
        }
    }
}

#[inline]
fn high_water(ring: &Ring) -> u32 {
    let left = ring.buffers_free() + ring.buffers_shown();
    if left * 2 >= ring.buffers_total() { HIGH_WATER } else { HIGH_WATER_SCARCE }
}

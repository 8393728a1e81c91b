//! One session on the ring: what is received, queued and sent in each
//! direction, and which operations are in flight.
//!
//! Driven by `RingEngine` with the ring's events. It owns the sockets together with
//! the operations that use them, reads no clock and knows no timers.
//!
//! In each direction there is at most one receive and one send. Bytes wait in a
//! queue while a send is in flight; at the high-water mark the receive is
//! cancelled, at the low one it is started again. A stream that is never short
//! of bytes goes over to bulk: through a pipe, see `bulk`.

use super::queue::SendQueue;
use crate::relay::close_state::{CloseState, TurnBytes};
use crate::relay::engine::{ConnectResult, EngineFlow};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::rc::Rc;
use tidegate_core::outcome::SessionSide;
use tidegate_net::pipe::{Pipe, Pipes};
use tidegate_net::ring::{BUFFER_LEN, Chunk, Completion, CompletionKind, Op, PollInterest, Ring};
use tidegate_net::stream;

/// Bytes queued at which a direction stops receiving, while buffers are plenty.
/// It stops late: one receive takes as many buffers as are shown, which are 1
/// MiB unless streams starve. The pool bounds all of them together.
const HIGH_WATER: u32 = 128 * 1024;

/// The same once less than half of the pool's buffers are left, for the others.
const HIGH_WATER_SCARCE: u32 = 2 * BUFFER_LEN as u32;

/// Where a cancelled receive goes on for so much longer, the cancellation has
/// missed it: try again.
const CANCEL_AGAIN: u32 = 512 * 1024;

/// Full buffers in a row that make a stream bulk.
const STREAK: u8 = 6;

/// Each time a pipe was no use, the next has to wait for twice as many; so many
/// times at most.
pub(super) const SHUNNED_MAX: u8 = 5;

/// What an operation is for; the low bits of its tag.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum OpUse {
    Receive,
    /// Tagged with the side the bytes came from.
    Send,
    Connect,
    /// The client, while the backend's connect is pending.
    Watch,
    /// A socket that was drained by other means than a multishot receive.
    Readable,
    /// A socket that has no room for what is in the pipe. Tagged with the side
    /// the bytes came from.
    Writable,
    /// A socket not received from, as its bytes wait.
    Stalled,
}

// What matches on a tag's bits.
const CONNECT: u64 = OpUse::Connect as u64;
const WATCH: u64 = OpUse::Watch as u64;
const READABLE: u64 = OpUse::Readable as u64;
const WRITABLE: u64 = OpUse::Writable as u64;
const STALLED: u64 = OpUse::Stalled as u64;

/// One session's sockets, streams and operations.
#[derive(Debug, Default)]
pub(in crate::relay) struct RingSession {
    /// By side. Operations hold shares.
    pub(super) sockets: [Option<Rc<OwnedFd>>; 2],
    /// By the side the bytes come from.
    pub(super) streams: [RingDirection; 2],
    pub(super) close: CloseState,
    /// Operations whose last event is still to come.
    pub(super) operations: u32,
    connect: Option<Op>,
    watch: Option<Op>,
    /// Over: nothing new is started, and what still comes is dropped.
    pub(super) halted: bool,
    /// Which streams were bulk before, by the side the bytes come from. Here is
    /// room for it; in a stream it would make two of them longer.
    were_bulk: [bool; 2],
}

/// Bytes from one side on their way to the other. Small: idle sessions have two.
#[derive(Debug, Default)]
pub(super) struct RingDirection {
    pub(super) receive: Option<Op>,
    pub(super) send: Option<Op>,
    /// While neither of them can go on: for bytes to receive, or, where the pipe
    /// holds some, for room to send.
    pub(super) poll: Option<Op>,
    /// The poll of a socket that is not received from, as its bytes wait.
    pub(super) stalled_poll: Option<Op>,
    /// Behind what is being sent.
    queue: SendQueue,
    /// Never kept empty while the stream waits.
    pub(super) pipe: Option<Box<Pipe>>,
    /// Bytes queued or being sent.
    pub(super) queued: u32,
    /// `queued` at which to cancel the receive, next time.
    cancel_at: u32,
    pub(super) mode: RingMode,
    /// Waits for a buffer.
    pub(super) starved: bool,
    /// Has no buffer to keep bytes in, and waits for room to send them at once.
    pub(super) dry: bool,
    /// The kernel had no memory to go on; nothing is in flight, and it is tried
    /// again at a tick.
    pub(super) short: bool,
    /// Already reported as stalled.
    pub(super) listed: bool,
    /// Full buffers in a row; in bulk, small fills in a row.
    pub(super) streak: u8,
    /// The last fill was crammed.
    pub(super) crammed: bool,
    /// How often a pipe was no use, or not to be had.
    pub(super) shunned: u8,
}

/// How a stream's bytes are moved.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(super) enum RingMode {
    /// By receives and sends; bulk is noticed.
    #[default]
    Ring,
    /// Bulk, as soon as what was received before is sent.
    ToBulk,
    /// Through a pipe; nothing is received or queued.
    Bulk,
}

/// What an event means to the engine, beside what it moved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum OpResult {
    Nothing,
    /// The pending connect was decided.
    Connected(ConnectResult),
    /// The client has failed before it was relayed.
    ClientFailed,
    /// The client has sent or ended something before it was relayed.
    ClientReadable,
    /// No buffer for bytes of that side; `alone` where it took them all itself.
    Starved {
        side: SessionSide,
        alone: bool,
    },
    /// That side is not received from, as its bytes wait.
    Stalled(SessionSide),
    /// The kernel has no memory to move bytes of that side.
    Short(SessionSide),
    /// That side has failed, and it is news.
    Failed(SessionSide),
}

// === tags ===

pub(super) fn tag(key: u32, side: SessionSide, what: OpUse) -> u64 {
    u64::from(key) << 8 | (side as u64) << 4 | what as u64
}

/// The flow an event belongs to.
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

    /// Stops everything; what is in flight comes back soon.
    pub(super) fn halt(&mut self, ring: &mut Ring) {
        self.halted = true;
        for stream in &mut self.streams {
            stream.queue = SendQueue::default();
            stream.pipe = None;
            stream.starved = false;
            stream.short = false;
        }
        self.cancel_all(ring);
    }

    /// What is in flight, and what it is for.
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

    /// What has not come back, in words.
    pub(super) fn describe_operations(&self) -> String {
        let names: Vec<&str> = self.in_flight().map(|(name, _)| name).collect();
        format!("{} in all: {}", self.operations, names.join(", "))
    }

    fn cancel_all(&self, ring: &mut Ring) {
        if self.operations > 0 {
            self.in_flight().for_each(|(_, op)| ring.cancel(op));
        }
    }

    /// Cancelling was not enough: takes the connections away from under the
    /// operations.
    pub(super) fn tear_down(&self, ring: &mut Ring) {
        for socket in self.sockets.iter().flatten() {
            stream::abort(socket);
        }
        self.cancel_all(ring);
    }

    /// Asks whatever waits for room how far it is; false where nothing does.
    pub(super) fn ask_progress(&self, ring: &mut Ring) -> bool {
        let mut asked = false;
        for stream in &self.streams {
            if let Some(op) = stream.send {
                ring.request_progress(op);
                asked = true;
            } else if (stream.pipe.is_some() || stream.dry)
                && let Some(op) = stream.poll
            {
                // Its end has the pipe tried again: there may be room, though
                // too little for the kernel to tell.
                ring.cancel(op);
                asked = true;
            }
        }
        asked
    }
}

impl EngineFlow for RingSession {
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
    /// Receives from that side, unless it does, or must not now.
    pub(super) fn arm(&mut self, key: u32, from: SessionSide, ring: &mut Ring) {
        let stream = &mut self.streams[from as usize];
        if self.halted
            || stream.receive.is_some()
            || stream.starved
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

    /// Waits for bytes from that side, or for room for them at the other.
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

    /// Deals with what happened to an operation of this flow's.
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
        let meaning = match what {
            CompletionKind::Data(chunk) => {
                self.classify_result(side, chunk.len(), ring);
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
        if meaning == OpResult::Nothing
            && self.is_stalled(side)
            && !std::mem::replace(&mut self.streams[side as usize].listed, true)
        {
            return OpResult::Stalled(side);
        }
        meaning
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

    /// Whether the stream is one for a pipe.
    fn classify_result(&mut self, from: SessionSide, len: usize, ring: &mut Ring) {
        let stream = &mut self.streams[from as usize];
        if len < BUFFER_LEN {
            stream.streak = 0;
            return;
        }
        stream.streak = stream.streak.saturating_add(1);
        if stream.streak >= STREAK << stream.shunned && stream.mode == RingMode::Ring {
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

    /// That side's peer cannot be sent to any more. What waits for it is thrown
    /// away; what it had sent is still read.
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

    /// Passes an end on, once nothing is before it.
    pub(super) fn finish(&mut self, from: SessionSide) {
        let stream = &self.streams[from as usize];
        let waits = stream.send.is_some() || stream.pipe.is_some() || !stream.queue.is_empty();
        if waits || !self.close.ended(from) {
            return;
        }
        let to = self.sockets[from.other() as usize].as_deref();
        self.close.finish(from, || to.map_or(Ok(()), stream::shutdown_write));
    }

    /// What an operation did before it was stopped is counted, though nothing more is
    /// made of it.
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

    /// The errno behind the end of what `side` sent; 0 for a FIN.
    ///
    /// A socket tells its error once. A send of the ring that has sent a part
    /// takes it and comes back short (`io_send` in Linux), and what is received
    /// then ends as by a FIN. So while something is being sent to that side, its
    /// end is looked into; nothing else of ours could have taken the error.
    fn failure_behind_end(&self, side: SessionSide) -> i32 {
        let back = &self.streams[side.other() as usize];
        if back.send.is_none() && back.pipe.is_none() {
            return 0;
        }
        let socket = self.sockets[side as usize].as_deref();
        socket.and_then(stream::close_error).unwrap_or(0)
    }

    /// There are bytes on a socket that was drained, or room for those in the
    /// pipe; or the wait for that was cut short.
    fn woken(
        &mut self,
        key: u32,
        side: SessionSide,
        readable: bool,
        ring: &mut Ring,
        pipes: &mut Pipes,
        moved: &mut TurnBytes,
    ) -> OpResult {
        self.streams[side as usize].dry = false;
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
            // Cancelled, or of an attempt that was given up.
            _ => OpResult::Nothing,
        }
    }
}

#[inline]
fn high_water(ring: &Ring) -> u32 {
    let left = ring.buffers_free() + ring.buffers_shown();
    if left * 2 >= ring.buffers_total() { HIGH_WATER } else { HIGH_WATER_SCARCE }
}

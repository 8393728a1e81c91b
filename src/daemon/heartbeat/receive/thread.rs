//! The receiving thread: receives datagrams in batches and verifies them.
//!
//! Started and stopped by [`super::Receiver`]. It waits only for datagrams and commands.

use super::queue::HeartbeatQueue;
use super::{
    ReceivedHeartbeat, ReceiverCommand, ReceiverCounts, ReceiverInbox, RejectedSenders, lock,
};
use crate::heartbeat::verify::Verifier;
use rustix::event::{PollFd, PollFlags, poll};
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime};
use tidegate_net::clock;
use tidegate_net::datagram::{BATCH, DatagramBatch, ReceivedDatagram};

/// Batches received from one socket before other sockets and commands are served.
const BATCHES_IN_A_ROW_MAX: usize = 16;

/// Longest plausible wait of a datagram in the kernel. A longer wait means that the wall
/// clock has jumped, so the time of arrival is unknown.
const WAITED_MAX: Duration = Duration::from_secs(5);

pub(super) struct ReceiverThread {
    verifier: Verifier,
    inbox: Arc<ReceiverInbox>,
    queue: Arc<HeartbeatQueue>,
    counts: Arc<ReceiverCounts>,
    rejected: Arc<Mutex<RejectedSenders>>,
    /// Whether a heartbeat was ever rejected. If so, an accepted heartbeat can end a series
    /// of rejections.
    rejected_any: bool,
    sockets: Vec<ReceiverSocket>,
    batch: DatagramBatch,
    /// Accepted heartbeats of this batch.
    accepted: Vec<ReceivedHeartbeat>,
    /// Latest time of arrival. Later datagrams get at least this time.
    last: Option<Instant>,
}

struct ReceiverSocket {
    fd: Arc<OwnedFd>,
    /// The kernel's drop counter at the last datagram.
    dropped: u32,
}

/// When a batch was received.
#[derive(Clone, Copy)]
struct BatchTimes {
    now: Instant,
    wall: SystemTime,
}

// === impl ReceiverThread ===

impl ReceiverThread {
    pub(super) fn new(
        verifier: Verifier,
        inbox: Arc<ReceiverInbox>,
        queue: Arc<HeartbeatQueue>,
        (counts, rejected): (Arc<ReceiverCounts>, Arc<Mutex<RejectedSenders>>),
    ) -> ReceiverThread {
        ReceiverThread {
            verifier,
            inbox,
            queue,
            counts,
            rejected,
            rejected_any: false,
            sockets: Vec::new(),
            batch: DatagramBatch::new(),
            accepted: Vec::with_capacity(BATCH),
            last: None,
        }
    }

    pub(super) fn run(mut self) {
        loop {
            let readable = match self.wait() {
                Ok(readable) => readable,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                // Out of memory, the only other error of poll(2) here. Continue.
                Err(_) => Vec::new(),
            };
            for command in self.inbox.take() {
                match command {
                    ReceiverCommand::Listen(sockets) => self.listen(sockets),
                    ReceiverCommand::Keys(keys) => self.verifier.set_keys(keys),
                    ReceiverCommand::Stop => return,
                }
            }
            for fd in readable {
                if let Some(index) = self.sockets.iter().position(|one| Arc::ptr_eq(&one.fd, &fd)) {
                    self.receive(index);
                }
            }
        }
    }

    /// Returns the readable sockets.
    fn wait(&self) -> io::Result<Vec<Arc<OwnedFd>>> {
        let mut waiting = vec![PollFd::new(&self.inbox.wake, PollFlags::IN)];
        waiting.extend(self.sockets.iter().map(|one| PollFd::new(&*one.fd, PollFlags::IN)));
        poll(&mut waiting, None)?;
        let ready = self.sockets.iter().zip(&waiting[1..]);
        let ready = ready.filter(|(_, state)| !state.revents().is_empty());
        Ok(ready.map(|(socket, _)| Arc::clone(&socket.fd)).collect())
    }

    /// Replaces the sockets. Sockets that stay keep their drop counter.
    fn listen(&mut self, sockets: Vec<Arc<OwnedFd>>) {
        let before = std::mem::take(&mut self.sockets);
        self.sockets = sockets
            .into_iter()
            .map(|fd| {
                let known = before.iter().find(|one| Arc::ptr_eq(&one.fd, &fd));
                ReceiverSocket { dropped: known.map_or(0, |one| one.dropped), fd }
            })
            .collect();
    }

    fn receive(&mut self, index: usize) {
        for _ in 0..BATCHES_IN_A_ROW_MAX {
            let received = match self.batch.receive(&*self.sockets[index].fd) {
                Ok(received) => received,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                // No datagram, or temporarily out of memory.
                Err(_) => return,
            };
            let taken = BatchTimes { now: clock::now(), wall: clock::wall() };
            self.verify_batch(index, taken);
            if !self.accepted.is_empty() {
                self.counts.coalesced.add(self.queue.push(self.accepted.drain(..)));
            }
            if received < BATCH {
                return;
            }
        }
    }

    fn verify_batch(&mut self, index: usize, taken: BatchTimes) {
        let socket = &mut self.sockets[index];
        let (mut accepted, mut warned) = (0, false);
        for message in self.batch.messages() {
            if let Some(dropped) = message.dropped {
                let since = dropped.wrapping_sub(socket.dropped);
                self.counts.kernel_drops.add(since.into());
                socket.dropped = dropped;
            }
            let (at, wall) = taken.arrival(&message);
            let at = self.last.map_or(at, |last| at.max(last));
            self.last = Some(at);
            match self.verifier.verify(message.bytes, message.from, at, wall) {
                Ok(heartbeat) => {
                    accepted += 1;
                    if self.rejected_any {
                        lock(&self.rejected).rejections.believed(&heartbeat.pool, &heartbeat.name);
                    }
                    self.accepted.push(ReceivedHeartbeat { heartbeat, at, stands_for: 1 });
                }
                Err(datagram) => {
                    self.counts.rejected[datagram.reason as usize].add(1);
                    if datagram.reason.is_listed() {
                        self.rejected_any = true;
                        warned |= lock(&self.rejected).add(&datagram, message.from, at);
                    }
                }
            }
        }
        if warned {
            self.queue.wake();
        }
        self.counts.accepted.add(accepted);
    }
}

// === impl BatchTimes ===

impl BatchTimes {
    /// Returns when the kernel received a datagram, on both clocks.
    fn arrival(self, message: &ReceivedDatagram<'_>) -> (Instant, SystemTime) {
        let Some(received) = message.received else { return (self.now, self.wall) };
        match self.wall.duration_since(received) {
            Ok(waited) if waited <= WAITED_MAX => {
                (self.now.checked_sub(waited).unwrap_or(self.now), received)
            }
            _ => (self.now, self.wall),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arrival_is_the_kernel_time_unless_the_wall_clock_has_jumped() {
        let taken = BatchTimes { now: clock::now(), wall: clock::wall() };
        let waited = |received: Option<SystemTime>| {
            let from = "127.0.0.1:1".parse().unwrap();
            let (at, _) =
                taken.arrival(&ReceivedDatagram { bytes: b"", from, received, dropped: None });
            taken.now - at
        };
        let ms = Duration::from_millis;
        assert_eq!(waited(Some(taken.wall - ms(30))), ms(30));
        assert_eq!(waited(Some(taken.wall - ms(86_400_000))), ms(0));
        assert_eq!(waited(Some(taken.wall + ms(30))), ms(0));
        assert_eq!(waited(None), ms(0));
    }
}

//! The receiving thread: waits, takes datagrams in batches, asks the gate.
//!
//! Started and stopped by [`super::Receiver`]. It waits for nothing but
//! datagrams and orders.

use super::queue::HeartbeatQueue;
use super::{ReceivedHeartbeat, ReceiverCommand, ReceiverCounts, ReceiverInbox, Told, lock};
use crate::heartbeat::verify::Verifier;
use rustix::event::{PollFd, PollFlags, poll};
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime};
use tidegate_net::clock;
use tidegate_net::datagram::{BATCH, DatagramBatch, ReceivedDatagram};

/// Batches taken from one socket before the others and the orders have their
/// turn again.
const BATCHES_IN_A_ROW_MAX: usize = 16;

/// A datagram cannot have waited longer in the kernel: the wall clock has
/// jumped, and its time of arrival is unknown.
const WAITED_MAX: Duration = Duration::from_secs(5);

pub(super) struct ReceiverThread {
    gate: Verifier,
    inbox: Arc<ReceiverInbox>,
    queue: Arc<HeartbeatQueue>,
    counts: Arc<ReceiverCounts>,
    told: Arc<Mutex<Told>>,
    /// Some heartbeat was rejected, so what is believed may end a row.
    rejected_any: bool,
    sockets: Vec<ReceiverSocket>,
    batch: DatagramBatch,
    /// Believed ones of this batch.
    believed: Vec<ReceivedHeartbeat>,
    /// No arrival is before this one.
    last: Option<Instant>,
}

struct ReceiverSocket {
    fd: Arc<OwnedFd>,
    /// What the kernel had dropped when it last said so.
    dropped: u32,
}

/// When a batch was taken.
#[derive(Clone, Copy)]
struct BatchTimes {
    now: Instant,
    wall: SystemTime,
}

// === impl ReceiverThread ===

impl ReceiverThread {
    pub(super) fn new(
        gate: Verifier,
        inbox: Arc<ReceiverInbox>,
        queue: Arc<HeartbeatQueue>,
        (counts, told): (Arc<ReceiverCounts>, Arc<Mutex<Told>>),
    ) -> ReceiverThread {
        ReceiverThread {
            gate,
            inbox,
            queue,
            counts,
            told,
            rejected_any: false,
            sockets: Vec::new(),
            batch: DatagramBatch::new(),
            believed: Vec::with_capacity(BATCH),
            last: None,
        }
    }

    pub(super) fn run(mut self) {
        loop {
            let readable = match self.wait() {
                Ok(readable) => readable,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                // Want of memory alone (poll(2)); it passes or the process ends.
                Err(_) => Vec::new(),
            };
            for order in self.inbox.take() {
                match order {
                    ReceiverCommand::Listen(sockets) => self.listen(sockets),
                    ReceiverCommand::Keys(keys) => self.gate.set_keys(keys),
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

    /// The sockets that have something.
    fn wait(&self) -> io::Result<Vec<Arc<OwnedFd>>> {
        let mut waiting = vec![PollFd::new(&self.inbox.wake, PollFlags::IN)];
        waiting.extend(self.sockets.iter().map(|one| PollFd::new(&*one.fd, PollFlags::IN)));
        poll(&mut waiting, None)?;
        let ready = self.sockets.iter().zip(&waiting[1..]);
        let ready = ready.filter(|(_, state)| !state.revents().is_empty());
        Ok(ready.map(|(socket, _)| Arc::clone(&socket.fd)).collect())
    }

    /// Goes on with the counts of the sockets that stay.
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
                // Nothing there, or a moment's want of memory.
                Err(_) => return,
            };
            let taken = BatchTimes { now: clock::now(), wall: clock::wall() };
            self.judge(index, taken);
            if !self.believed.is_empty() {
                self.counts.coalesced.add(self.queue.push(self.believed.drain(..)));
            }
            if received < BATCH {
                return;
            }
        }
    }

    fn judge(&mut self, index: usize, taken: BatchTimes) {
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
            match self.gate.judge(message.bytes, message.from, at, wall) {
                Ok(heartbeat) => {
                    accepted += 1;
                    if self.rejected_any {
                        lock(&self.told).rejections.believed(&heartbeat.pool, &heartbeat.name);
                    }
                    self.believed.push(ReceivedHeartbeat { heartbeat, at, stands_for: 1 });
                }
                Err(refused) => {
                    self.counts.rejected[refused.reason as usize].add(1);
                    if refused.reason.is_listed() {
                        self.rejected_any = true;
                        warned |= lock(&self.told).rejected(&refused, message.from, at);
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
    /// When the kernel received it, by both clocks.
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
    fn a_datagram_arrived_when_the_kernel_says_unless_the_clock_has_jumped() {
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

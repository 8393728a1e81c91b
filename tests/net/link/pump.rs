//! The thread that carries packets between the two ends of a link.
//!
//! Started and stopped by [`super::Link`]. It reads both TUN devices, gets the fate of each
//! packet from the direction's channel, and writes packets at their arrival times. It decides
//! nothing itself. It ends when it is stopped or when a device disappears.

use super::channel::{Channel, Fate};
use super::{Counts, Direction};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use tun_rs::SyncDevice;

/// Packets in transit in one direction. Further packets are dropped as overflow. At 1,500
/// bytes this is 48 MB: 1 s of delay at 400 Mbit/s.
const IN_TRANSIT_MAX: usize = 32_768;

/// Packets read from one device before the other device is read.
const BATCH: usize = 64;

/// Larger than any packet on a device with this MTU.
const PACKET_BYTES_MAX: usize = 16 * 1024;

/// One direction.
pub struct Lane {
    pub from: Arc<SyncDevice>,
    pub to: Arc<SyncDevice>,
    pub direction: Arc<Direction>,
    pub channel: Channel,
    in_transit: BinaryHeap<Reverse<InTransit>>,
    number: u64,
}

/// Ordered by arrival time, then by the order of sending.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct InTransit {
    at: Instant,
    number: u64,
    packet: Vec<u8>,
}

/// Carries packets until `stop` is readable.
pub fn run(mut lanes: [Lane; 2], stop: &OwnedFd) {
    let mut buffer = vec![0; PACKET_BYTES_MAX];
    loop {
        let now = Instant::now();
        for lane in &mut lanes {
            lane.deliver(now);
        }
        let due = lanes.iter().filter_map(Lane::next_due).min();
        let wait = due.map(|due| timespec(due.saturating_duration_since(Instant::now())));
        let mut fds = [
            PollFd::new(&*lanes[0].from, PollFlags::IN),
            PollFd::new(&*lanes[1].from, PollFlags::IN),
            PollFd::new(stop, PollFlags::IN),
        ];
        match poll(&mut fds, wait.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => panic!("poll: {error}"),
        }
        let [a, b, stopped] = fds.map(|fd| fd.revents());
        if !stopped.is_empty() {
            return;
        }
        for (lane, events) in lanes.iter_mut().zip([a, b]) {
            // POLLERR: the interface is down and can come up again.
            if events.contains(PollFlags::IN) {
                lane.take_in(&mut buffer);
            } else if !events.is_empty() {
                std::thread::sleep(Duration::from_millis(1));
            }
        }
    }
}

fn timespec(wait: Duration) -> Timespec {
    Timespec { tv_sec: wait.as_secs() as i64, tv_nsec: i64::from(wait.subsec_nanos()) }
}

// === impl Lane ===

impl Lane {
    pub fn new(
        from: &Arc<SyncDevice>,
        to: &Arc<SyncDevice>,
        direction: &Arc<Direction>,
        seed: u64,
    ) -> Lane {
        Lane {
            from: from.clone(),
            to: to.clone(),
            direction: direction.clone(),
            channel: Channel::new(seed),
            in_transit: BinaryHeap::new(),
            number: 0,
        }
    }

    fn next_due(&self) -> Option<Instant> {
        self.in_transit.peek().map(|Reverse(next)| next.at)
    }

    /// Reads waiting packets from the device, at most one batch.
    fn take_in(&mut self, buffer: &mut [u8]) {
        for _ in 0..BATCH {
            // The device is empty (EAGAIN) or down.
            let Ok(bytes) = self.from.recv(buffer) else { return };
            self.apply_fate(&mut buffer[..bytes]);
        }
    }

    fn apply_fate(&mut self, packet: &mut [u8]) {
        let now = Instant::now();
        let how = self.direction.settings();
        let direction = self.direction.clone();
        let counts = &direction.counts;
        add(&counts.offered, 1);
        match self.channel.offer(packet.len(), now, &how) {
            Fate::Partitioned => add(&counts.partitioned, 1),
            Fate::Lost => add(&counts.lost, 1),
            Fate::Overflowed => add(&counts.overflowed, 1),
            Fate::Arrives { at, copies, held_back, flip } => {
                if let Some(bit) = flip {
                    packet[bit / 8] ^= 1 << (bit % 8);
                    add(&counts.corrupted, 1);
                }
                add(&counts.reordered, u64::from(held_back));
                add(&counts.duplicated, u64::from(copies) - 1);
                for _ in 0..copies {
                    self.send_or_hold(packet, at, now, counts);
                }
            }
        }
    }

    fn send_or_hold(&mut self, packet: &[u8], at: Instant, now: Instant, counts: &Counts) {
        if at <= now && self.in_transit.is_empty() {
            self.send(packet);
        } else if self.in_transit.len() < IN_TRANSIT_MAX {
            self.number += 1;
            let packet = packet.to_vec();
            self.in_transit.push(Reverse(InTransit { at, number: self.number, packet }));
        } else {
            add(&counts.overflowed, 1);
        }
    }

    /// Sends the packets whose arrival time has passed.
    fn deliver(&mut self, now: Instant) {
        while self.next_due().is_some_and(|at| at <= now) {
            let Some(Reverse(next)) = self.in_transit.pop() else { return };
            self.send(&next.packet);
        }
    }

    fn send(&self, packet: &[u8]) {
        // The kernel rejects a packet that is no valid IP packet, as a network card rejects a
        // broken frame.
        match self.to.send(packet) {
            Ok(_) => add(&self.direction.counts.delivered, 1),
            Err(_) => add(&self.direction.counts.refused, 1),
        }
    }
}

fn add(count: &std::sync::atomic::AtomicU64, number: u64) {
    count.fetch_add(number, Ordering::Relaxed);
}

//! A link between two hosts whose quality can change while it is in use.
//!
//! It consists of two TUN devices in two namespaces and one thread that carries packets, like
//! netem(8) but for kernels without it. Tests set each direction separately and read the
//! packet counts. Dropping a link ends its thread and removes its devices.

pub mod channel;
mod pump;

use crate::netns::Namespace;
use channel::Impairment;
use pump::Lane;
use rustix::event::{EventfdFlags, eventfd};
use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use tun_rs::{DeviceBuilder, SyncDevice};

/// The MTU of Ethernet.
const MTU: u16 = 1500;

/// A link. It is up until this is dropped.
pub struct Link {
    number: u8,
    a_to_b: Arc<Direction>,
    b_to_a: Arc<Direction>,
    stop: Arc<OwnedFd>,
    pump: Option<JoinHandle<()>>,
}

/// The settings and the packet counts of one direction.
#[derive(Debug, Default)]
pub struct Direction {
    settings: Mutex<Impairment>,
    counts: Counts,
}

/// Packets by their fate. `offered + duplicated` is the sum of `delivered, refused, lost,
/// partitioned, overflowed` and the packets in transit.
#[derive(Debug, Default)]
pub struct Counts {
    /// Sent by the host.
    pub offered: AtomicU64,
    /// Handed to the other host, duplicates included.
    pub delivered: AtomicU64,
    /// Delivered but rejected by the kernel, because it is no valid IP packet.
    pub refused: AtomicU64,
    pub lost: AtomicU64,
    pub partitioned: AtomicU64,
    /// Dropped because a queue was full.
    pub overflowed: AtomicU64,
    pub duplicated: AtomicU64,
    /// Held back, so that later packets overtook it.
    pub reordered: AtomicU64,
    /// With a flipped bit.
    pub corrupted: AtomicU64,
}

/// A snapshot of [`Counts`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Counted {
    pub offered: u64,
    pub delivered: u64,
    pub refused: u64,
    pub lost: u64,
    pub partitioned: u64,
    pub overflowed: u64,
    pub duplicated: u64,
    pub reordered: u64,
    pub corrupted: u64,
}

// === impl Link ===

impl Link {
    /// Joins two hosts with a perfect link. `number` (1 to 254) distinguishes the devices and
    /// addresses of several links on a host.
    #[track_caller]
    pub fn join(a: &Namespace, b: &Namespace, number: u8, seed: u64) -> Link {
        let stop = Arc::new(eventfd(0, EventfdFlags::CLOEXEC).expect("an eventfd"));
        let mut link =
            Link { number, a_to_b: Arc::default(), b_to_a: Arc::default(), stop, pump: None };
        let ends = [(a, link.a(), link.b()), (b, link.b(), link.a())];
        let [at_a, at_b] = ends.map(|(host, own, peer)| device(host, number, own, peer));
        let mut seeds = fastrand::Rng::with_seed(seed);
        let lanes = [
            Lane::new(&at_a, &at_b, &link.a_to_b, seeds.u64(..)),
            Lane::new(&at_b, &at_a, &link.b_to_a, seeds.u64(..)),
        ];
        let stop = link.stop.clone();
        let pump = std::thread::Builder::new().name(device_name(number));
        link.pump = Some(pump.spawn(move || pump::run(lanes, &stop)).expect("one more thread"));
        link
    }

    /// The first host's address on this link.
    pub fn a(&self) -> Ipv4Addr {
        Ipv4Addr::new(10, 77, self.number, 1)
    }

    /// The second host's address on this link.
    pub fn b(&self) -> Ipv4Addr {
        Ipv4Addr::new(10, 77, self.number, 2)
    }

    pub fn a_to_b(&self) -> &Direction {
        &self.a_to_b
    }

    pub fn b_to_a(&self) -> &Direction {
        &self.b_to_a
    }

    /// Sets both directions.
    pub fn set(&self, how: Impairment) {
        self.a_to_b.set(how);
        self.b_to_a.set(how);
    }

    /// Starts or ends a partition of both directions.
    pub fn partition(&self, cut: bool) {
        self.a_to_b.partition(cut);
        self.b_to_a.partition(cut);
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        // The counter of an eventfd is far from full, so this cannot block.
        let _ = rustix::io::write(&*self.stop, &1u64.to_ne_bytes());
        let ended = self.pump.take().map(JoinHandle::join);
        if let Some(Err(panic)) = ended
            && !std::thread::panicking()
        {
            std::panic::resume_unwind(panic);
        }
    }
}

fn device_name(number: u8) -> String {
    format!("link{number}")
}

/// Creates one end. The device belongs to the host in which it is opened, and exists until its
/// descriptor is closed.
fn device(host: &Namespace, number: u8, own: Ipv4Addr, peer: Ipv4Addr) -> Arc<SyncDevice> {
    let name = device_name(number);
    let device = host.run(|| {
        let device = DeviceBuilder::new().name(&name).mtu(MTU).enable(false).build_sync();
        let device = device.unwrap_or_else(|error| panic!("TUN device {name}: {error}"));
        device.set_nonblocking(true).expect("a TUN device can be non-blocking");
        // Packets of the kernel itself (router solicitations) would use draws of the seeded
        // random streams. The file does not exist without IPv6.
        let _ = std::fs::write(format!("/proc/sys/net/ipv6/conf/{name}/disable_ipv6"), "1");
        device
    });
    host.ip(&format!("address add {own} peer {peer} dev {name}\nlink set {name} up"));
    Arc::new(device)
}

// === impl Direction ===

impl Direction {
    /// Returns the current settings.
    pub fn settings(&self) -> Impairment {
        *self.settings.lock().expect("no panic in here")
    }

    /// Applies to packets sent from now on. Packets in transit keep their arrival times.
    pub fn set(&self, how: Impairment) {
        self.change(|settings| *settings = how);
    }

    /// Changes some of the settings.
    pub fn change(&self, change: impl FnOnce(&mut Impairment)) {
        change(&mut self.settings.lock().expect("no panic in here"));
    }

    /// Starts or ends a partition of this direction.
    pub fn partition(&self, cut: bool) {
        self.change(|settings| settings.partition = cut);
    }

    pub fn counts(&self) -> Counted {
        let of = |count: &AtomicU64| count.load(Ordering::Relaxed);
        Counted {
            offered: of(&self.counts.offered),
            delivered: of(&self.counts.delivered),
            refused: of(&self.counts.refused),
            lost: of(&self.counts.lost),
            partitioned: of(&self.counts.partitioned),
            overflowed: of(&self.counts.overflowed),
            duplicated: of(&self.counts.duplicated),
            reordered: of(&self.counts.reordered),
            corrupted: of(&self.counts.corrupted),
        }
    }
}

// === impl Counted ===

impl Counted {
    /// Packets in transit.
    pub fn in_transit(&self) -> u64 {
        let gone = self.delivered + self.refused + self.lost + self.partitioned + self.overflowed;
        // The counters are read one by one, so an arrival can be visible before its send.
        (self.offered + self.duplicated).saturating_sub(gone)
    }
}

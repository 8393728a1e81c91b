//! How much one source may ask for: connections at once and new ones a second,
//! by address prefix.
//!
//! One table a frontend that has such limits; the listeners of all workers ask
//! it for each accepted connection, before any backend is thought of. Pure but
//! for the shared counts: time comes in as an argument.
//!
//! # What is kept, and its bound
//!
//! The table has room for [`SOURCES_MAX`] prefixes and never grows (4 MiB).
//! A prefix is kept as long as it says something: while it has connections, or
//! while its rate is not yet what a stranger's would be. One that says nothing
//! is overwritten by whoever needs the room. Where all [`WAYS`] places a
//! prefix may take hold others that do, it is let in untracked, and that is
//! counted: then limits are not kept for it, but nobody is refused for the
//! sake of strangers.
//!
//! # The rate
//!
//! The generic cell rate algorithm (ITU-T I.371, virtual scheduling): one
//! number for each source, the time its next connection is *due*. A
//! connection may come up to `burst - 1` intervals early. A refused connection
//! costs nothing: who keeps trying gets its rate.
//!
//! Each set of eight places has a lock of its own, held for some ten
//! nanoseconds; two workers meet at one only when the same set is asked at the
//! same moment.

use crossbeam::utils::CachePadded;
use serde::Serialize;
use serde::ser::{SerializeStruct, Serializer};
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use xxhash_rust::xxh3::xxh3_64_with_seed;

/// Prefixes one table keeps at most.
pub const SOURCES_MAX: usize = SETS * WAYS;

const SETS: usize = 8192;

/// Places a prefix may take; one lock and one look at them all a question.
pub const WAYS: usize = 8;

/// What one source may ask for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct SourceLimits {
    /// Leading bits that make two IPv4 addresses one source, 0..=32.
    pub prefix_v4: u8,
    /// The same for IPv6, 0..=128.
    pub prefix_v6: u8,
    /// Connections at once; 0 means no cap.
    pub connections_max: u32,
    /// New connections; `None` means any number.
    #[serde(flatten)]
    pub rate: Option<Rate>,
}

/// Unit of time that a rate is given in, and its seconds.
pub type RateUnit = (&'static str, u32);

/// So many connections in so much time, and how many may come at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rate {
    count: u32,
    unit: RateUnit,
    /// Time between two connections in the long run.
    pub interval: Duration,
    /// Connections that may come at once after a quiet time; at least 1.
    pub burst: u32,
}

/// Why a source is turned away.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SourceRefused {
    /// It has as many connections as it may.
    TooMany,
    /// Its connections come too fast.
    TooFast,
}

/// See the module's documentation.
#[derive(Debug)]
pub struct SourceTable {
    sets: Box<[CachePadded<Mutex<[SourceEntry; WAYS]>>]>,
    seed: u64,
    epoch: Instant,
}

/// One prefix's counts.
#[derive(Debug, Clone, Copy, Default)]
struct SourceEntry {
    /// Address bits and prefix length; 0 for an empty place: no key is zero.
    key: (u128, u8),
    connections: u32,
    /// When the next connection is due, in nanoseconds since the epoch.
    due: u64,
}

/// A connection's share of its source's count; dropping it gives it back.
#[derive(Debug)]
pub struct SourcePermit {
    table: Arc<SourceTable>,
    set: u32,
    way: u8,
}

/// What [`SourceTable::admit`] gives.
#[derive(Debug)]
pub enum SourceAdmission {
    /// Counted as long as the slot lives.
    Counted(SourcePermit),
    /// Let in without being counted: its places are taken. Not an error, but
    /// worth a counter.
    Untracked,
}

// === impl SourceLimits ===

impl SourceLimits {
    /// Whether there is anything to keep count of.
    pub fn are_any(&self) -> bool {
        self.connections_max != 0 || self.rate.is_some()
    }
}

// === impl Rate ===

impl Rate {
    /// The units there are.
    pub const UNITS: [RateUnit; 3] = [("s", 1), ("m", 60), ("h", 3600)];

    /// `count` connections, at least 1, in a unit of [`Rate::UNITS`]. A `burst` that is not
    /// given is a second's worth, since clients open several connections at once.
    pub fn per(count: u32, unit: RateUnit, burst: Option<u32>) -> Rate {
        let burst = burst.unwrap_or(count.div_ceil(unit.1));
        Rate { count, unit, interval: Duration::from_secs(unit.1.into()) / count, burst }
    }
}

/// As the keys `rate` and `burst` of a configuration file.
impl Serialize for Rate {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut keys = serializer.serialize_struct("Rate", 2)?;
        keys.serialize_field("rate", &format!("{}/{}", self.count, self.unit.0))?;
        if *self != Rate::per(self.count, self.unit, None) {
            keys.serialize_field("burst", &self.burst)?;
        }
        keys.end()
    }
}

// === impl SourceTable ===

impl SourceTable {
    /// Nobody known yet. `seed` keeps strangers from choosing which sources
    /// share their places.
    pub fn new(seed: u64, now: Instant) -> SourceTable {
        SourceTable {
            sets: (0..SETS).map(|_| CachePadded::new(Mutex::new(Default::default()))).collect(),
            seed,
            epoch: now,
        }
    }

    /// Counts one more connection of the source that `address` belongs to, or
    /// says why not. `now` is not before the table's making.
    pub fn admit(
        self: &Arc<SourceTable>,
        address: IpAddr,
        limits: &SourceLimits,
        now: Instant,
    ) -> Result<SourceAdmission, SourceRefused> {
        let key = key(address, limits);
        let now = self.nanoseconds(now);
        let set = self.set_of(key);
        let mut places = lock(&self.sets[set]);
        let Some(way) = find(&places, key, now) else { return Ok(SourceAdmission::Untracked) };
        let place = &mut places[way];
        if place.key != key {
            *place = SourceEntry { key, connections: 0, due: now };
        }
        if limits.connections_max != 0 && place.connections >= limits.connections_max {
            return Err(SourceRefused::TooMany);
        }
        if let Some(rate) = limits.rate {
            place.due = next_due(place.due, now, rate).ok_or(SourceRefused::TooFast)?;
        }
        place.connections += 1;
        // Both are far below their types' limits.
        let (set, way) = (set as u32, way as u8);
        Ok(SourceAdmission::Counted(SourcePermit { table: Arc::clone(self), set, way }))
    }

    /// Prefixes kept at this moment. Looks at every place: for tests and rare
    /// reports.
    pub fn kept(&self, now: Instant) -> usize {
        let now = self.nanoseconds(now);
        let says_something = |set: &CachePadded<Mutex<[SourceEntry; WAYS]>>| {
            lock(set).iter().filter(|place| !place.is_free(now)).count()
        };
        self.sets.iter().map(says_something).sum()
    }

    fn nanoseconds(&self, now: Instant) -> u64 {
        u64::try_from(now.saturating_duration_since(self.epoch).as_nanos()).unwrap_or(u64::MAX)
    }

    fn set_of(&self, (bits, length): (u128, u8)) -> usize {
        let mut bytes = [0; 17];
        bytes[..16].copy_from_slice(&bits.to_be_bytes());
        bytes[16] = length;
        (xxh3_64_with_seed(&bytes, self.seed) % SETS as u64) as usize
    }
}

/// The source an address belongs to. The length keeps 10.0.0.0/8 and
/// 10.0.0.0/16 apart across a reload, and one is added to keep it from zero.
fn key(address: IpAddr, limits: &SourceLimits) -> (u128, u8) {
    let (bits, width, length) = match address.to_canonical() {
        IpAddr::V4(v4) => (u128::from(v4.to_bits()) << 96, 32, limits.prefix_v4.min(32)),
        IpAddr::V6(v6) => (v6.to_bits(), 128, limits.prefix_v6.min(128)),
    };
    let mask = if length == 0 { 0 } else { u128::MAX << (128 - u32::from(length)) };
    // IPv4 lengths are 1..=33, IPv6 lengths 34..=162.
    let offset = if width == 32 { 1 } else { 34 };
    (bits & mask, length + offset)
}

/// The prefix's own place, or one that is free.
fn find(places: &[SourceEntry; WAYS], key: (u128, u8), now: u64) -> Option<usize> {
    let own = places.iter().position(|place| place.key == key);
    own.or_else(|| places.iter().position(|place| place.is_free(now)))
}

/// When the connection after this one is due; `None` if this one is too early.
fn next_due(due: u64, now: u64, rate: Rate) -> Option<u64> {
    let interval = u64::try_from(rate.interval.as_nanos()).unwrap_or(u64::MAX);
    let early = interval.saturating_mul(u64::from(rate.burst.saturating_sub(1)));
    let due = due.max(now);
    (due - now <= early).then(|| due.saturating_add(interval))
}

fn lock(set: &Mutex<[SourceEntry; WAYS]>) -> std::sync::MutexGuard<'_, [SourceEntry; WAYS]> {
    // Nothing under the lock can panic half-way.
    set.lock().unwrap_or_else(PoisonError::into_inner)
}

// === impl SourceEntry ===

impl SourceEntry {
    /// Whether it says nothing a stranger's would not.
    fn is_free(&self, now: u64) -> bool {
        self.connections == 0 && self.due <= now
    }
}

// === impl SourcePermit ===

impl Drop for SourcePermit {
    fn drop(&mut self) {
        // A place with connections is never given to another prefix.
        let mut places = lock(&self.table.sets[self.set as usize]);
        let place = &mut places[usize::from(self.way)];
        debug_assert!(place.connections > 0, "a slot was counted");
        place.connections = place.connections.saturating_sub(1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MANY: SourceLimits =
        SourceLimits { prefix_v4: 32, prefix_v6: 64, connections_max: 3, rate: None };
    const FAST: SourceLimits = SourceLimits {
        prefix_v4: 32,
        prefix_v6: 64,
        connections_max: 0,
        rate: Some(Rate {
            count: 10,
            unit: ("s", 1),
            interval: Duration::from_millis(100),
            burst: 5,
        }),
    };

    fn table() -> (Arc<SourceTable>, Instant) {
        let now = tidegate_net::clock::now();
        (Arc::new(SourceTable::new(7, now)), now)
    }

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn slot(admitted: Result<SourceAdmission, SourceRefused>) -> SourcePermit {
        match admitted {
            Ok(SourceAdmission::Counted(slot)) => slot,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_source_has_so_many_connections_and_no_more_until_one_ends() {
        let (table, now) = table();
        let mut held: Vec<_> =
            (0..3).map(|_| slot(table.admit(ip("192.0.2.1"), &MANY, now))).collect();
        let refused = table.admit(ip("192.0.2.1"), &MANY, now);
        assert_eq!(refused.unwrap_err(), SourceRefused::TooMany);
        assert!(table.admit(ip("192.0.2.2"), &MANY, now).is_ok(), "another source");
        held.pop();
        assert!(table.admit(ip("192.0.2.1"), &MANY, now).is_ok());
    }

    #[test]
    fn a_prefix_is_one_source() {
        let (table, now) = table();
        let limits = SourceLimits { prefix_v4: 24, connections_max: 1, ..MANY };
        let _held = slot(table.admit(ip("192.0.2.1"), &limits, now));
        assert!(table.admit(ip("192.0.2.200"), &limits, now).is_err());
        assert!(table.admit(ip("192.0.3.1"), &limits, now).is_ok());
        let _held = slot(table.admit(ip("2001:db8::1"), &limits, now));
        assert!(table.admit(ip("2001:db8::ffff"), &limits, now).is_err());
        assert!(table.admit(ip("2001:db8:0:1::1"), &limits, now).is_ok());
    }

    #[test]
    fn families_and_lengths_are_never_mixed_up() {
        let (table, now) = table();
        let all = SourceLimits { prefix_v4: 0, prefix_v6: 0, connections_max: 1, rate: None };
        let _v4 = slot(table.admit(ip("192.0.2.1"), &all, now));
        let _v6 = slot(table.admit(ip("2001:db8::1"), &all, now));
        assert!(table.admit(ip("198.51.100.1"), &all, now).is_err());
        assert!(table.admit(ip("::ffff:198.51.100.1"), &all, now).is_err(), "mapped is IPv4");
        let narrower = SourceLimits { prefix_v4: 1, ..all };
        assert!(table.admit(ip("127.0.0.1"), &narrower, now).is_ok());
    }

    #[test]
    fn the_burst_may_come_at_once_and_then_the_rate_holds() {
        let (table, start) = table();
        let admitted = |at: u64| {
            table.admit(ip("192.0.2.1"), &FAST, start + Duration::from_millis(at)).is_ok()
        };
        assert_eq!((0..20).filter(|_| admitted(0)).count(), 5);
        let over_ten_seconds = (1..=1000).filter(|step| admitted(step * 10)).count();
        assert_eq!(over_ten_seconds, 100, "ten a second, however often it tries");
    }

    #[test]
    fn a_quiet_time_earns_the_burst_again_and_nothing_more() {
        let (table, start) = table();
        let admitted =
            |at: u64| table.admit(ip("192.0.2.1"), &FAST, start + Duration::from_secs(at)).is_ok();
        assert_eq!((0..20).filter(|_| admitted(0)).count(), 5);
        assert_eq!((0..20).filter(|_| admitted(3600)).count(), 5);
    }

    #[test]
    fn a_refusal_for_number_costs_no_rate() {
        let (table, now) = table();
        let limits = SourceLimits { connections_max: 1, ..FAST };
        let held = slot(table.admit(ip("192.0.2.1"), &limits, now));
        for _ in 0..100 {
            assert_eq!(
                table.admit(ip("192.0.2.1"), &limits, now).unwrap_err(),
                SourceRefused::TooMany
            );
        }
        drop(held);
        assert!(table.admit(ip("192.0.2.1"), &limits, now).is_ok());
    }

    #[test]
    fn strangers_without_end_leave_the_table_as_large_as_it_was() {
        let (table, now) = table();
        let held = slot(table.admit(ip("192.0.2.1"), &MANY, now));
        for n in 0..(SOURCES_MAX as u32 * 4) {
            let address = IpAddr::from(std::net::Ipv4Addr::from_bits(0x0a00_0000 + n));
            assert!(matches!(table.admit(address, &MANY, now), Ok(SourceAdmission::Counted(_))));
        }
        assert_eq!(table.kept(now), 1, "only who still holds a connection");
        drop(held);
        assert_eq!(table.kept(now), 0);
    }

    #[test]
    fn full_source_table_rejects_no_client_and_is_counted() {
        let (table, now) = table();
        let mut held = Vec::new();
        let mut untracked = 0;
        for n in 0..(SOURCES_MAX as u32 * 2) {
            let address = IpAddr::from(std::net::Ipv4Addr::from_bits(0x0a00_0000 + n));
            match table.admit(address, &MANY, now).unwrap() {
                SourceAdmission::Counted(slot) => held.push(slot),
                SourceAdmission::Untracked => untracked += 1,
            }
        }
        assert_eq!(held.len() + untracked, SOURCES_MAX * 2);
        assert!(untracked >= SOURCES_MAX, "{untracked}");
        assert!(held.len() > SOURCES_MAX * 9 / 10, "{}", held.len());
    }

    #[test]
    fn two_threads_never_overshoot_one_source() {
        let (table, now) = table();
        let most = std::sync::atomic::AtomicU32::new(0);
        let inside = std::sync::atomic::AtomicU32::new(0);
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    for _ in 0..20_000 {
                        let held = table.admit(ip("192.0.2.1"), &MANY, now);
                        if held.is_ok() {
                            let now = inside.fetch_add(1, std::sync::atomic::Ordering::SeqCst) + 1;
                            most.fetch_max(now, std::sync::atomic::Ordering::SeqCst);
                            inside.fetch_sub(1, std::sync::atomic::Ordering::SeqCst);
                        }
                        drop(held);
                    }
                });
            }
        });
        assert!(most.into_inner() <= 3);
        assert_eq!(table.kept(now), 0);
    }
}

//! Limits per client source (an address prefix): concurrent connections and new
//! connections per second.
//!
//! A frontend with such limits has one table. The listeners of all workers check it for
//! each accepted connection, before a backend is picked. Pure except for the shared
//! counts: time is an argument.
//!
//! # Entries and their bound
//!
//! The table holds [`SOURCES_MAX`] prefixes and never grows (4 MiB). An entry is in use
//! while its prefix has connections, or while its rate allows less than the rate of a
//! new prefix. An entry that is not in use is overwritten when another prefix needs it.
//! If all [`WAYS`] entries that a prefix can use are taken by other prefixes, its
//! connection is admitted untracked, and that is counted. Limits do not apply to an
//! untracked connection. The alternative is to reject clients because other sources
//! filled the table.
//!
//! # The rate
//!
//! The generic cell rate algorithm (ITU-T I.371, virtual scheduling). Each source has
//! one number: the time at which its next connection is *due*. A connection can be up
//! to `burst - 1` intervals early. A rejected connection does not change the number, so
//! a client that keeps retrying gets its full rate.
//!
//! # Locking
//!
//! Each set of [`WAYS`] entries has its own lock, which is held for about 10 ns. Two
//! workers contend for it only if they check the same set at the same moment.

use crossbeam::utils::CachePadded;
use ipnet::IpNet;
use serde::Serialize;
use serde::ser::{SerializeStruct, Serializer};
use std::fmt;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use xxhash_rust::xxh3::xxh3_64_with_seed;

/// Maximum number of prefixes in a table.
pub const SOURCES_MAX: usize = SETS * WAYS;

const SETS: usize = 8192;

/// Entries per set: the entries that a prefix can use. A check takes one lock and looks
/// at all of them.
pub const WAYS: usize = 8;

/// Limits of a client source.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct SourceLimits {
    /// Prefix length that defines an IPv4 source, 0..=32.
    pub prefix_v4: u8,
    /// Prefix length that defines an IPv6 source, 0..=128.
    pub prefix_v6: u8,
    /// Cap on concurrent connections; 0 means no cap.
    pub connections_max: u32,
    /// Rate limit of new connections; `None` means no limit.
    #[serde(flatten)]
    pub rate: Option<Rate>,
}

/// Unit of time of a rate, and its length in seconds.
pub type RateUnit = (&'static str, u32);

/// A rate limit: connections per unit of time, and a burst.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rate {
    count: u32,
    unit: RateUnit,
    /// Average time between two connections.
    pub interval: Duration,
    /// Connections that are admitted at the same time after a quiet period; at least 1.
    pub burst: u32,
}

/// Why a client source is rejected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SourceRefused {
    /// It has the maximum number of connections.
    TooMany,
    /// It exceeds its rate.
    TooFast,
}

/// Counts of client sources; see the module's documentation.
#[derive(Debug)]
pub struct SourceTable {
    sets: Box<[CachePadded<Mutex<[SourceEntry; WAYS]>>]>,
    seed: u64,
    epoch: Instant,
}

/// Counts of one prefix.
#[derive(Debug, Clone, Copy, Default)]
struct SourceEntry {
    /// Address bits and prefix length; 0 marks an empty entry, because no key is zero.
    key: (u128, u8),
    connections: u32,
    /// Time at which the next connection is due, in nanoseconds since the epoch.
    due: u64,
}

/// A counted connection of a client source. Dropping it lowers the count.
#[derive(Debug)]
pub struct SourcePermit {
    table: Arc<SourceTable>,
    set: u32,
    way: u8,
}

/// A client, as far as it decides its source.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Client {
    /// Its source is the prefix of this address.
    Ip(IpAddr),
    /// A client of a Unix socket. Its source is the user with this number.
    User(u32),
}

/// Stands for the prefix length in the key of a user. Those of addresses are shorter.
const KEY_OF_USERS: u8 = 163;

/// Result of [`SourceTable::admit`].
#[derive(Debug)]
pub enum SourceAdmission {
    /// Counted while the permit lives.
    Counted(SourcePermit),
    /// Admitted without being counted, because the entries of its set are in use. Not
    /// an error; the caller counts it.
    Untracked,
}

// === impl Client ===

impl From<IpAddr> for Client {
    fn from(address: IpAddr) -> Client {
        Client::Ip(address)
    }
}

// === impl SourceLimits ===

impl SourceLimits {
    /// Returns whether there is a limit, so that a table is needed.
    pub fn are_any(&self) -> bool {
        self.connections_max != 0 || self.rate.is_some()
    }

    /// Returns the client source of an address.
    pub fn source_of(&self, address: IpAddr) -> IpNet {
        let address = address.to_canonical();
        let length = match address {
            IpAddr::V4(_) => self.prefix_v4.min(32),
            IpAddr::V6(_) => self.prefix_v6.min(128),
        };
        IpNet::new(address, length).map_or_else(|_| address.into(), |net| net.trunc())
    }
}

// === impl Rate ===

impl Rate {
    /// All units.
    pub const UNITS: [RateUnit; 3] = [("s", 1), ("m", 60), ("h", 3600)];

    /// Creates a rate of `count` connections (at least 1) per `unit`, one of
    /// [`Rate::UNITS`]. The default `burst` is the number of connections in a second,
    /// because clients open several connections at the same time.
    pub fn per(count: u32, unit: RateUnit, burst: Option<u32>) -> Rate {
        let burst = burst.unwrap_or(count.div_ceil(unit.1));
        Rate { count, unit, interval: Duration::from_secs(unit.1.into()) / count, burst }
    }
}

/// As in the configuration, such as `10/s`.
impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.count, self.unit.0)
    }
}

/// Serialises as the configuration keys `rate` and `burst`.
impl Serialize for Rate {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut keys = serializer.serialize_struct("Rate", 2)?;
        keys.serialize_field("rate", &self.to_string())?;
        if *self != Rate::per(self.count, self.unit, None) {
            keys.serialize_field("burst", &self.burst)?;
        }
        keys.end()
    }
}

// === impl SourceTable ===

impl SourceTable {
    /// Creates an empty table. With a secret `seed`, clients cannot choose which
    /// sources share a set.
    pub fn new(seed: u64, now: Instant) -> SourceTable {
        SourceTable {
            sets: (0..SETS).map(|_| CachePadded::new(Mutex::new(Default::default()))).collect(),
            seed,
            epoch: now,
        }
    }

    /// Counts a connection of the source of `client`, or returns why it is rejected.
    /// `now` must not be earlier than the creation of the table.
    pub fn admit(
        self: &Arc<SourceTable>,
        client: impl Into<Client>,
        limits: &SourceLimits,
        now: Instant,
    ) -> Result<SourceAdmission, SourceRefused> {
        let key = key(client.into(), limits);
        let now = self.nanoseconds(now);
        let set = self.set_of(key);
        let mut entries = lock(&self.sets[set]);
        let Some(way) = find(&entries, key, now) else { return Ok(SourceAdmission::Untracked) };
        let entry = &mut entries[way];
        if entry.key != key {
            *entry = SourceEntry { key, connections: 0, due: now };
        }
        entry.due = entry.admit(limits, now)?;
        entry.connections += 1;
        // Both are far below the limits of their types.
        let (set, way) = (set as u32, way as u8);
        Ok(SourceAdmission::Counted(SourcePermit { table: Arc::clone(self), set, way }))
    }

    /// Returns what [`SourceTable::admit`] would return now, and the connections that the
    /// source of `client` has. Counts nothing.
    pub fn preview(
        &self,
        client: impl Into<Client>,
        limits: &SourceLimits,
        now: Instant,
    ) -> (Result<(), SourceRefused>, u32) {
        let key = key(client.into(), limits);
        let now = self.nanoseconds(now);
        let entries = lock(&self.sets[self.set_of(key)]);
        let own = entries.iter().find(|entry| entry.key == key);
        let entry = own.copied().unwrap_or(SourceEntry { key, connections: 0, due: now });
        (entry.admit(limits, now).map(drop), entry.connections)
    }

    /// Returns the number of entries in use. Scans the whole table: for tests and rare
    /// reports.
    pub fn kept(&self, now: Instant) -> usize {
        let now = self.nanoseconds(now);
        let in_use = |set: &CachePadded<Mutex<[SourceEntry; WAYS]>>| {
            lock(set).iter().filter(|entry| !entry.is_free(now)).count()
        };
        self.sets.iter().map(in_use).sum()
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

/// Returns the source of an address. The key contains the prefix length, so 10.0.0.0/8
/// and 10.0.0.0/16 differ across a reload. An offset keeps it from 0.
fn key(client: Client, limits: &SourceLimits) -> (u128, u8) {
    let address = match client {
        Client::Ip(address) => address,
        Client::User(user) => return (user.into(), KEY_OF_USERS),
    };
    let (bits, width, length) = match address.to_canonical() {
        IpAddr::V4(v4) => (u128::from(v4.to_bits()) << 96, 32, limits.prefix_v4.min(32)),
        IpAddr::V6(v6) => (v6.to_bits(), 128, limits.prefix_v6.min(128)),
    };
    let mask = if length == 0 { 0 } else { u128::MAX << (128 - u32::from(length)) };
    // IPv4 lengths are 1..=33, IPv6 lengths 34..=162.
    let offset = if width == 32 { 1 } else { 34 };
    (bits & mask, length + offset)
}

/// Returns the entry of the prefix, or an entry that is not in use.
fn find(entries: &[SourceEntry; WAYS], key: (u128, u8), now: u64) -> Option<usize> {
    let own = entries.iter().position(|entry| entry.key == key);
    own.or_else(|| entries.iter().position(|entry| entry.is_free(now)))
}

/// Returns when the connection after this one is due; `None` if this connection is too
/// early.
fn next_due(due: u64, now: u64, rate: Rate) -> Option<u64> {
    let interval = u64::try_from(rate.interval.as_nanos()).unwrap_or(u64::MAX);
    let early = interval.saturating_mul(u64::from(rate.burst.saturating_sub(1)));
    let due = due.max(now);
    (due - now <= early).then(|| due.saturating_add(interval))
}

fn lock(set: &Mutex<[SourceEntry; WAYS]>) -> std::sync::MutexGuard<'_, [SourceEntry; WAYS]> {
    // Code under the lock cannot panic between two changes.
    set.lock().unwrap_or_else(PoisonError::into_inner)
}

// === impl SourceEntry ===

impl SourceEntry {
    /// Returns when the connection after this one is due, or why this connection is
    /// rejected.
    fn admit(&self, limits: &SourceLimits, now: u64) -> Result<u64, SourceRefused> {
        if limits.connections_max != 0 && self.connections >= limits.connections_max {
            return Err(SourceRefused::TooMany);
        }
        match limits.rate {
            Some(rate) => next_due(self.due, now, rate).ok_or(SourceRefused::TooFast),
            None => Ok(self.due),
        }
    }

    /// Returns whether the entry is equivalent to a new one.
    fn is_free(&self, now: u64) -> bool {
        self.connections == 0 && self.due <= now
    }
}

// === impl SourcePermit ===

impl Drop for SourcePermit {
    fn drop(&mut self) {
        // An entry with connections is never given to another prefix.
        let mut entries = lock(&self.table.sets[self.set as usize]);
        let entry = &mut entries[usize::from(self.way)];
        debug_assert!(entry.connections > 0, "a slot was counted");
        entry.connections = entry.connections.saturating_sub(1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn source_of_an_address_is_its_prefix() {
        let limits = SourceLimits { prefix_v4: 24, ..MANY };
        let source = |text| limits.source_of(ip(text)).to_string();
        assert_eq!(source("10.1.2.3"), "10.1.2.0/24");
        assert_eq!(source("::ffff:10.1.2.3"), "10.1.2.0/24");
        assert_eq!(source("2001:db8::1:2:3:4"), "2001:db8::/64");
    }

    #[test]
    fn preview_agrees_with_admission_and_counts_nothing() {
        let (table, now) = table();
        let address = ip("10.0.0.1");
        for limits in [MANY, FAST] {
            let mut permits = Vec::new();
            for _ in 0..7 {
                let (previewed, connections) = table.preview(address, &limits, now);
                assert_eq!(table.preview(address, &limits, now), (previewed, connections));
                assert_eq!(connections as usize, permits.len());
                let admitted = table.admit(address, &limits, now);
                assert_eq!(previewed.err(), admitted.as_ref().err().copied());
                permits.extend(admitted);
            }
            assert!(permits.len() < 7, "a limit applies");
        }
    }

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
    fn source_at_its_cap_is_rejected_until_a_connection_ends() {
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
    fn addresses_of_a_prefix_share_one_source() {
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
    fn families_and_prefix_lengths_are_separate_sources() {
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
    fn burst_is_admitted_immediately_and_then_the_rate_applies() {
        let (table, start) = table();
        let admitted = |at: u64| {
            table.admit(ip("192.0.2.1"), &FAST, start + Duration::from_millis(at)).is_ok()
        };
        assert_eq!((0..20).filter(|_| admitted(0)).count(), 5);
        let over_ten_seconds = (1..=1000).filter(|step| admitted(step * 10)).count();
        assert_eq!(over_ten_seconds, 100, "10 per second for any number of attempts");
    }

    #[test]
    fn quiet_period_restores_exactly_the_burst() {
        let (table, start) = table();
        let admitted =
            |at: u64| table.admit(ip("192.0.2.1"), &FAST, start + Duration::from_secs(at)).is_ok();
        assert_eq!((0..20).filter(|_| admitted(0)).count(), 5);
        assert_eq!((0..20).filter(|_| admitted(3600)).count(), 5);
    }

    #[test]
    fn rejection_by_the_cap_does_not_use_up_the_rate() {
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
    fn table_does_not_grow_with_new_sources() {
        let (table, now) = table();
        let held = slot(table.admit(ip("192.0.2.1"), &MANY, now));
        for n in 0..(SOURCES_MAX as u32 * 4) {
            let address = IpAddr::from(std::net::Ipv4Addr::from_bits(0x0a00_0000 + n));
            assert!(matches!(table.admit(address, &MANY, now), Ok(SourceAdmission::Counted(_))));
        }
        assert_eq!(table.kept(now), 1, "only the source that holds a connection");
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
    fn two_threads_never_exceed_the_cap_of_a_source() {
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

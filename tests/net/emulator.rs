//! Tests of the link emulator with real packets: its settings and counters must match what two
//! hosts measure.
//!
//! Each test creates two hosts and a link, sends numbered datagrams or one TCP stream, and
//! compares the arrivals with the settings and the counters. Tidegate does not run here.

use crate::channel::assert_share;
use crate::common::{eventually, exclusive, measured, ms, patience, secs, servers};
use crate::link::channel::{Impairment, Loss};
use crate::link::{Direction, Link};
use crate::netns::{self, Namespace, networks_run};
use sha2::{Digest, Sha256};
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream, UdpSocket};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

const PORT: u16 = 9000;

struct Pair {
    // Dropped in this order: the link before its hosts.
    link: Link,
    a: Namespace,
    b: Namespace,
}

impl Pair {
    fn new(seed: u64) -> Pair {
        let (a, b) = (Namespace::new("a"), Namespace::new("b"));
        Pair { link: Link::join(&a, &b, 1, seed), a, b }
    }

    /// Sends `count` datagrams from a to b at intervals of `gap`.
    fn send_to_b(&self, count: u32, gap: Duration) -> Vec<Datagram> {
        send(&self.a, &self.b, self.link.b(), self.link.a_to_b(), count, gap)
    }

    fn send_to_a(&self, count: u32, gap: Duration) -> Vec<Datagram> {
        send(&self.b, &self.a, self.link.a(), self.link.b_to_a(), count, gap)
    }
}

/// One datagram that arrived.
struct Datagram {
    number: u32,
    took: Duration,
}

/// Sends numbered datagrams. Returns the datagrams that arrived, in order of arrival, after no
/// packet is in transit.
fn send(
    from: &Namespace,
    to: &Namespace,
    address: Ipv4Addr,
    direction: &Direction,
    count: u32,
    gap: Duration,
) -> Vec<Datagram> {
    let receiver = to.run(|| UdpSocket::bind((address, PORT))).unwrap();
    receiver.set_read_timeout(Some(ms(20))).unwrap();
    let sender = from.run(|| UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))).unwrap();
    sender.connect((address, PORT)).unwrap();
    let before = direction.counts();
    let (over, received) = (AtomicBool::new(false), AtomicU64::new(0));
    let mut sent = Vec::new();
    let came = std::thread::scope(|scope| {
        let receiving = scope.spawn(|| receive(&receiver, &over, &received));
        for number in 0..count {
            sent.push(Instant::now());
            sender.send(&number.to_le_bytes()).unwrap();
            // A device holds 500 packets and the socket about 250, so neither the pump nor the
            // receiver must lag.
            if number % 100 == 99 {
                eventually(secs(5), "pump and receiver keep up", || {
                    let counts = direction.counts();
                    counts.offered - before.offered > u64::from(number)
                        && received.load(Ordering::Relaxed) >= counts.delivered - before.delivered
                });
            }
            if !gap.is_zero() {
                std::thread::sleep(gap);
            }
        }
        eventually(secs(5), "every packet has arrived or is lost", || {
            let counts = direction.counts();
            counts.offered - before.offered == u64::from(count) && counts.in_transit() == 0
        });
        over.store(true, Ordering::Release);
        receiving.join().unwrap()
    });
    let took = |(number, at): (u32, Instant)| (number, at - sent[number as usize]);
    came.into_iter().map(took).map(|(number, took)| Datagram { number, took }).collect()
}

/// Receives until `over` is set and the socket is empty.
fn receive(socket: &UdpSocket, over: &AtomicBool, count: &AtomicU64) -> Vec<(u32, Instant)> {
    let mut came = Vec::new();
    loop {
        let last = over.load(Ordering::Acquire);
        let mut number = [0; 4];
        while let Ok(4) = socket.recv(&mut number) {
            came.push((u32::from_le_bytes(number), Instant::now()));
            count.fetch_add(1, Ordering::Relaxed);
        }
        if last {
            return came;
        }
    }
}

fn numbers(came: &[Datagram]) -> Vec<u32> {
    came.iter().map(|datagram| datagram.number).collect()
}

/// Sends `bytes` of noise from a to b over TCP and compares the checksums. Returns the duration.
#[track_caller]
fn transfer(pair: &Pair, bytes: usize) -> Duration {
    let mut noise = vec![0; bytes];
    fastrand::Rng::with_seed(bytes as u64).fill(&mut noise);
    let listener = pair.b.run(|| TcpListener::bind((pair.link.b(), PORT))).unwrap();
    let (sum, took) = std::thread::scope(|scope| {
        let reading = scope.spawn(|| {
            let (mut stream, _) = listener.accept().unwrap();
            stream.set_read_timeout(Some(patience(secs(20)))).unwrap();
            let (mut sum, mut buffer) = (Vec::with_capacity(bytes), vec![0; 256 * 1024]);
            while let n @ 1.. = stream.read(&mut buffer).unwrap() {
                sum.extend_from_slice(&buffer[..n]);
            }
            (sum, Instant::now())
        });
        let mut stream = pair.a.run(|| TcpStream::connect((pair.link.b(), PORT))).unwrap();
        let start = Instant::now();
        stream.write_all(&noise).unwrap();
        drop(stream);
        let (came, end) = reading.join().unwrap();
        (Sha256::digest(&came), end - start)
    });
    assert_eq!(sum, Sha256::digest(&noise), "the stream arrived altered");
    took
}

#[test]
fn delay_matches_the_setting() {
    let _share = exclusive::shared();
    if !networks_run() {
        return;
    }
    let pair = Pair::new(1);
    pair.link.a_to_b().change(|how| how.delay = ms(30));
    let mut there = pair.send_to_b(50, ms(2));
    let mut back = pair.send_to_a(50, ms(2));
    assert_eq!((there.len(), back.len()), (50, 50));
    for came in [&mut there, &mut back] {
        came.sort_by_key(|datagram| datagram.took);
    }
    let (least, median) = (there[0].took, there[25].took);
    measured(&format!("set to 30 ms: least {least:?}, median {median:?}; 0: {:?}", back[25].took));
    // Only the minimum is tight, because other packets also wait for a busy machine.
    assert!(least >= ms(30) && least < patience(ms(35)), "{least:?}");
    assert!(back[0].took < patience(ms(5)), "no delay in the other direction: {:?}", back[0].took);
}

#[test]
fn same_seed_loses_the_same_packets() {
    let _share = exclusive::shared();
    if !networks_run() {
        return;
    }
    let run = |seed| {
        let pair = Pair::new(seed);
        pair.link.set(Impairment { loss: Loss::Independent(0.1), ..Impairment::default() });
        let came = numbers(&pair.send_to_b(2000, Duration::ZERO));
        let counts = pair.link.a_to_b().counts();
        assert_eq!((counts.lost, counts.delivered), (2000 - came.len() as u64, came.len() as u64));
        assert_share("lost", counts.lost, 2000, 0.1);
        came
    };
    let first = run(2);
    assert_eq!(first, run(2));
    assert_ne!(first, run(3));
}

#[test]
fn duplicates_arrive_twice() {
    let _share = exclusive::shared();
    if !networks_run() {
        return;
    }
    let pair = Pair::new(4);
    pair.link.a_to_b().change(|how| how.duplicate = 0.2);
    let came = numbers(&pair.send_to_b(1000, Duration::ZERO));
    let duplicated = pair.link.a_to_b().counts().duplicated;
    assert_eq!(came.len() as u64, 1000 + duplicated);
    assert_share("duplicated", duplicated, 1000, 0.2);
    assert!((0..1000).all(|number| came.contains(&number)));
}

#[test]
fn reordered_packets_arrive_late_and_once() {
    let _share = exclusive::shared();
    if !networks_run() {
        return;
    }
    let pair = Pair::new(5);
    pair.link.a_to_b().change(|how| (how.reorder, how.reorder_by) = (0.2, ms(5)));
    let came = numbers(&pair.send_to_b(500, Duration::from_micros(500)));
    let descents = came.windows(2).filter(|pair| pair[0] > pair[1]).count();
    assert!(descents > 20, "{descents} times out of order");
    let mut sorted = came;
    sorted.sort_unstable();
    assert_eq!(sorted, Vec::from_iter(0..500));
}

#[test]
fn flipped_bits_are_detected_and_the_stream_stays_intact() {
    let _share = exclusive::shared();
    if !networks_run() {
        return;
    }
    let pair = Pair::new(6);
    pair.link.set(Impairment { corrupt: 0.01, ..Impairment::default() });
    transfer(&pair, 4 << 20);
    let corrupted = pair.link.a_to_b().counts().corrupted;
    assert!(corrupted > 5, "{corrupted} packets with a flipped bit");
    let snmp = pair.b.run(|| std::fs::read_to_string("/proc/thread-self/net/snmp")).unwrap();
    let caught = snmp_value(&snmp, "Tcp:", "InCsumErrors");
    measured(&format!("{corrupted} corrupted, {caught} caught by TCP's checksum"));
    assert!(caught > 0);
}

/// Returns one value of `/proc/net/snmp`, which has a line of names and a line of values.
fn snmp_value(snmp: &str, group: &str, name: &str) -> u64 {
    let lines: Vec<&str> = snmp.lines().filter(|line| line.starts_with(group)).collect();
    let place = lines[0].split(' ').position(|word| word == name).unwrap();
    lines[1].split(' ').nth(place).unwrap().parse().unwrap()
}

#[test]
fn stream_survives_all_impairments_together() {
    let _share = exclusive::shared();
    if !networks_run() {
        return;
    }
    let pair = Pair::new(7);
    pair.link.set(Impairment {
        delay: ms(2),
        jitter: ms(1),
        loss: Loss::Bursts { enter: 0.005, leave: 0.3, lost: 0.8 },
        duplicate: 0.02,
        reorder: 0.02,
        corrupt: 0.002,
        ..Impairment::default()
    });
    transfer(&pair, 2 << 20);
    let counts = pair.link.a_to_b().counts();
    let seen = [counts.lost, counts.duplicated, counts.reordered, counts.delivered];
    assert!(seen.iter().all(|count| *count > 0), "{counts:?}");
}

#[test]
fn directions_are_partitioned_independently() {
    let _share = exclusive::shared();
    if !networks_run() {
        return;
    }
    let pair = Pair::new(8);
    pair.link.a_to_b().partition(true);
    assert_eq!(pair.send_to_b(20, Duration::ZERO).len(), 0);
    assert_eq!(pair.send_to_a(20, Duration::ZERO).len(), 20);
    assert_eq!(pair.link.a_to_b().counts().partitioned, 20);
    pair.link.a_to_b().partition(false);
    pair.link.b_to_a().partition(true);
    assert_eq!(pair.send_to_b(20, Duration::ZERO).len(), 20);
    assert_eq!(pair.send_to_a(20, Duration::ZERO).len(), 0);
    pair.link.partition(false);
    assert_eq!(pair.send_to_a(20, Duration::ZERO).len(), 20);
}

#[test]
fn rate_limit_holds_and_its_queue_is_bounded() {
    let _share = exclusive::shared();
    if !networks_run() {
        return;
    }
    let pair = Pair::new(9);
    pair.link.a_to_b().change(|how| (how.rate, how.queue) = (Some(20_000_000), 64 * 1024));
    let took = transfer(&pair, 1 << 20);
    let mbit = (8 << 20) as f64 / took.as_secs_f64() / 1e6;
    measured(&format!("set to 20 Mbit/s: {mbit:.1} Mbit/s of payload"));
    // Headers take 3.4 %. The receiver reads the last bytes as soon as they arrive.
    assert!(mbit <= 20.0, "{mbit}");
    assert!(mbit >= 10.0 / patience(secs(1)).as_secs_f64(), "{mbit}");
    pair.link.a_to_b().change(|how| (how.rate, how.queue) = (Some(100_000), 1000));
    let before = pair.link.a_to_b().counts().overflowed;
    let came = pair.send_to_b(100, Duration::ZERO);
    // 32 bytes with headers. The queue can still hold an acknowledgement of the transfer.
    assert!((20..50).contains(&came.len()), "{} of 100 came", came.len());
    let dropped = pair.link.a_to_b().counts().overflowed - before;
    assert_eq!(dropped, 100 - came.len() as u64);
}

#[test]
fn links_are_independent() {
    let _share = exclusive::shared();
    if !networks_run() {
        return;
    }
    let pair = Pair::new(10);
    let other = Link::join(&pair.a, &pair.b, 2, 11);
    pair.link.partition(true);
    let send_other =
        || send(&pair.a, &pair.b, other.b(), other.a_to_b(), 100, Duration::ZERO).len();
    assert_eq!((pair.send_to_b(100, Duration::ZERO).len(), send_other()), (0, 100));
    pair.link.partition(false);
    other.partition(true);
    assert_eq!((pair.send_to_b(100, Duration::ZERO).len(), send_other()), (100, 0));
}

mod alone {
    use super::*;

    #[test]
    fn namespaces_of_a_killed_run_are_removed() {
        // Exclusive, because any other starting test would remove the namespace first.
        let _share = exclusive::alone();
        if !networks_run() {
            return;
        }
        let ip = servers::find("ip").unwrap();
        let mut gone = Command::new("true").spawn().unwrap();
        gone.wait().unwrap();
        let name = format!("tg-{}-0-left", gone.id());
        assert!(Command::new(&ip).args(["netns", "add", &name]).status().unwrap().success());
        let mut left =
            Command::new(&ip).args(["netns", "exec", &name, "sleep", "600"]).spawn().unwrap();
        eventually(secs(5), "the program runs inside", || {
            let inside = Command::new(&ip).args(["netns", "pids", &name]).output().unwrap();
            String::from_utf8_lossy(&inside.stdout).trim() == left.id().to_string()
        });
        netns::sweep();
        assert_eq!(netns::owned_by(gone.id()), Vec::<String>::new());
        let status = left.wait().unwrap();
        assert!(!status.success(), "the program was killed: {status}");
    }

    #[test]
    fn dropped_hosts_leave_no_resources() {
        let _share = exclusive::alone();
        if !networks_run() {
            return;
        }
        let own = std::process::id();
        let held = || {
            let count =
                |what: &str| std::fs::read_dir(format!("/proc/self/{what}")).unwrap().count();
            (netns::owned_by(own), count("task"), count("fd"))
        };
        let before = held();
        drop(Pair::new(12));
        let panicked = std::panic::catch_unwind(|| {
            let _pair = Pair::new(13);
            std::panic::resume_unwind(Box::new("on purpose"));
        });
        assert!(panicked.is_err());
        // A joined thread can be listed for a moment.
        eventually(secs(5), "namespaces, threads and descriptors are gone", || held() == before);
    }

    #[test]
    fn perfect_link_carries_half_a_gigabit_per_second() {
        let _share = exclusive::alone();
        if !networks_run() {
            return;
        }
        let pair = Pair::new(14);
        // The best of five attempts, because other programs can use the CPU.
        let wanted = 500.0 / patience(secs(1)).as_secs_f64();
        let mut mbit = 0f64;
        for _ in 0..5 {
            let took = transfer(&pair, 64 << 20);
            mbit = mbit.max((64 << 20) as f64 * 8.0 / took.as_secs_f64() / 1e6);
            if mbit >= wanted {
                break;
            }
        }
        measured(&format!("{mbit:.0} Mbit/s over one TCP stream"));
        assert!(mbit >= wanted, "{mbit:.0} Mbit/s");
    }
}

//! SYN floods from addresses that do not exist, together with real clients.
//!
//! The test forges packets and sends them to Tidegate's host through a separate TUN device.
//! It discards the answers. No packet leaves the machine.

use crate::common::backend;
use crate::common::{Engine, client, eventually, measured, on_every_engine_alone, secs};
use crate::hosts::{FRONTEND, Hosts};
use crate::netns::{Namespace, networks_run};
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use tun_rs::{DeviceBuilder, SyncDevice};

on_every_engine_alone!(syn_flood_affects_no_other_clients_and_no_backend);

fn syn_flood_affects_no_other_clients_and_no_backend(engine: Engine) {
    if !networks_run() {
        return;
    }
    let hosts = Hosts::new(1, 90);
    let service = hosts.backends[0].serve(backend::echo());
    let proxy = hosts.start(hosts.conf(engine, hosts.pool()));
    let flood = device(&hosts.balancer);
    let (before, fds) = (counters(&hosts.balancer), proxy.fd_count());
    let over = AtomicBool::new(false);
    let (mut slowest, mut forged) = (Duration::ZERO, 0);
    const CLIENTS: u64 = 100;
    let begun = Instant::now();
    std::thread::scope(|scope| {
        let flooding = scope.spawn(|| send_flood(&flood, proxy.addr("web"), &over));
        eventually(secs(10), "the flood has started", || {
            counters(&hosts.balancer).cookies > before.cookies
        });
        for number in 0..CLIENTS {
            let start = Instant::now();
            let stream = hosts.client.run(|| client::connect(proxy.addr("web")));
            let said = number.to_be_bytes();
            assert_eq!(client::exchange(&stream, &said).unwrap(), said);
            slowest = slowest.max(start.elapsed());
        }
        let most = proxy.fd_count();
        assert!(
            most <= fds + 50,
            "{most} descriptors, {fds} before: half-open connections use none"
        );
        over.store(true, Ordering::Relaxed);
        forged = flooding.join().expect("no panic in there");
    });
    let after = counters(&hosts.balancer);
    measured(&format!(
        "{forged} forged SYNs in {:.1?}: {} cookies sent, {} queue overflows; slowest of {CLIENTS} \
         clients {slowest:.1?}",
        begun.elapsed(),
        after.cookies - before.cookies,
        after.overflows - before.overflows,
    ));
    assert!(forged > 1000, "only {forged} forged SYNs");
    assert_eq!(proxy.metric("tidegate_sessions_total", &[]), CLIENTS as f64);
    assert_eq!(service.accepted(), CLIENTS);
}

/// Counters of the host's kernel.
#[derive(Clone, Copy)]
struct Counters {
    cookies: u64,
    overflows: u64,
}

fn counters(host: &Namespace) -> Counters {
    let text = host.run(|| std::fs::read_to_string("/proc/thread-self/net/netstat").unwrap());
    let mut lines = text.lines().filter_map(|line| line.strip_prefix("TcpExt: "));
    let [names, values] = [(); 2].map(|()| lines.next().expect("names, then values"));
    let of = |wanted: &str| {
        let mut pairs = names.split(' ').zip(values.split(' '));
        pairs.find(|(name, _)| *name == wanted).expect(wanted).1.parse().unwrap()
    };
    Counters { cookies: of("SyncookiesSent"), overflows: of("ListenOverflows") }
}

/// A TUN device from a network that does not exist (RFC 2544, section C.2.2: 198.18.0.0/15)
/// into the host.
fn device(host: &Namespace) -> SyncDevice {
    let device = host.run(|| {
        let device = DeviceBuilder::new().name("flood0").mtu(1500).enable(false).build_sync();
        device.expect("a TUN device")
    });
    device.set_nonblocking(true).expect("a TUN device can be non-blocking");
    host.ip("address add 10.99.0.1/32 dev flood0\nlink set flood0 up\nroute add 198.18.0.0/15 dev flood0");
    device
}

/// Sends SYNs from random addresses as fast as possible until `over` is set. Returns their
/// number.
fn send_flood(device: &SyncDevice, to: SocketAddr, over: &AtomicBool) -> u64 {
    let (mut random, mut forged) = (fastrand::Rng::with_seed(7), 0);
    let mut answer = [0; 2048];
    while !over.load(Ordering::Relaxed) {
        for _ in 0..64 {
            let source = Ipv4Addr::from_bits(0xC612_0000 | random.u32(..) & 0x1_FFFF);
            let packet = syn(source, random.u16(1024..), to.port(), random.u32(..));
            forged += u64::from(device.send(&packet).is_ok());
        }
        while device.recv(&mut answer).is_ok() {}
    }
    forged
}

/// An IPv4 packet (RFC 791) with a SYN (RFC 9293) to the frontend.
fn syn(source: Ipv4Addr, from_port: u16, to_port: u16, sequence: u32) -> [u8; 40] {
    let mut packet = [0; 40];
    packet[..4].copy_from_slice(&[0x45, 0, 0, 40]);
    (packet[8], packet[9]) = (64, 6);
    packet[12..16].copy_from_slice(&source.octets());
    packet[16..20].copy_from_slice(&FRONTEND.octets());
    let header = checksum(&packet[..20], 0);
    packet[10..12].copy_from_slice(&header.to_be_bytes());
    packet[20..22].copy_from_slice(&from_port.to_be_bytes());
    packet[22..24].copy_from_slice(&to_port.to_be_bytes());
    packet[24..28].copy_from_slice(&sequence.to_be_bytes());
    // Five words of header, SYN, a window.
    packet[32..36].copy_from_slice(&[5 << 4, 0x02, 0x40, 0]);
    // The pseudo-header: both addresses are summed with the segment.
    let segment = checksum(&packet[12..], 6 + 20);
    packet[36..38].copy_from_slice(&segment.to_be_bytes());
    packet
}

/// RFC 1071.
fn checksum(bytes: &[u8], more: u32) -> u16 {
    let words = bytes.chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]])));
    let sum = words.sum::<u32>() + more;
    let folded = (sum & 0xFFFF) + (sum >> 16);
    !(((folded & 0xFFFF) + (folded >> 16)) as u16)
}

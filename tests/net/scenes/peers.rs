//! Faults of clients and backends: cases 22 to 39.
//!
//! Clients and backends that refuse, reset, stall, read slowly, send first or never, close in
//! unusual orders, or use rare features of TCP. Each scene is a test, run by `play`.

use super::Act::{Fin, Reads, Receives, Reset, SeesTheEnd, Send, SendByteByByte, SendUrgent};
use super::Step::{Accept, Backend, Client, Connect, Each, Hosts, Link, Mark, Pause};
use super::both_ends;
use super::candidate::Candidate;
use super::leaks;
use super::site::Site;
use super::{
    Bytes, GONE, IN_ORDER, LIMITS, Leg, Limits, MIDSTREAM, Reading, SCENE, STREAM, Scene, Way, fin,
    open, reset, scenes,
};
use crate::common::{client, eventually, eventually_some, ms, patience, secs};
use crate::link::channel::Impairment;
use rustix::process::Signal;
use socket2::{Domain, Socket, Type};
use std::io::Write;
use std::net::TcpStream;
use std::time::Instant;

const IDLE: Limits = Limits { idle: ms(1200), connect: secs(1), ..LIMITS };

scenes! {
    /// Case 23.
    backend_accepts_and_resets: Scene {
        steps: &[&[Connect, Mark, Backend(Reset)]],
        client: reset(Bytes::None),
        backend: GONE,
        when: (ms(0), secs(4)),
        cause: "backend-reset",
        ..SCENE
    };
    /// Case 24: unread bytes stay in the buffers, and the idle timeout ends the session with a
    /// reset, because bytes are lost.
    backend_accepts_and_never_reads: Scene {
        limits: IDLE,
        steps: &[&[Connect, Backend(Reads(Reading::Never)), Mark, Client(Send(64 << 20))]],
        client: reset(Bytes::None),
        backend: open(Bytes::None),
        when: (ms(500), secs(6)),
        cause: "idle-timeout",
        ..SCENE
    };
    /// Case 25.
    backend_never_writes: Scene {
        limits: IDLE,
        steps: &[&[Connect, Client(Send(1000)), Backend(Receives(1000)), Mark]],
        client: fin(Bytes::None),
        backend: fin(Bytes::All),
        when: (ms(500), secs(6)),
        cause: "idle-timeout",
        ..SCENE
    };
    /// Case 26.
    backend_reads_slowly: Scene {
        receive_buffer: Some(8192),
        steps: &[
            &[Connect, Backend(Reads(Reading::Slow(2000, ms(100)))), Client(Send(50_000))],
            IN_ORDER,
        ],
        ..SCENE
    };
    /// Case 27.
    backend_closes_its_sending_half_first: Scene {
        steps: &[
            &[Connect, Backend(Send(STREAM)), Backend(Fin), Client(SeesTheEnd)],
            &[Client(Send(STREAM)), Client(Fin), Backend(SeesTheEnd)],
        ],
        ..SCENE
    };
    /// Case 30: every client gets an answer or a reset without delay. A later session succeeds.
    backend_restarts_repeatedly: Scene {
        steps: &[
            &[Each(sessions_during_restarts), Connect],
            &[Client(Send(1000)), Backend(Send(1000))], IN_ORDER,
        ],
        // The access log has many sessions.
        cause: "",
        ..SCENE
    };
    /// Case 31.
    backend_sends_first: Scene {
        steps: &[
            &[Connect, Backend(Send(78)), Client(Receives(78)), Client(Send(300))],
            &[Backend(Receives(300)), Backend(Send(11))], IN_ORDER,
        ],
        ..SCENE
    };
    /// Case 32.
    client_sends_all_and_waits_for_the_answer: Scene {
        steps: &[
            &[Connect, Client(Send(STREAM)), Client(Fin), Backend(SeesTheEnd)],
            &[Pause(ms(200)), Backend(Send(STREAM)), Backend(Fin), Client(SeesTheEnd)],
        ],
        ..SCENE
    };
    /// Case 33.
    client_sends_nothing: Scene {
        limits: IDLE,
        steps: &[&[Mark, Connect]],
        client: fin(Bytes::None),
        backend: fin(Bytes::None),
        when: (ms(500), secs(6)),
        cause: "idle-timeout",
        ..SCENE
    };
    /// Case 33 after the client's FIN.
    half_closed_client_waits_until_timeout: Scene {
        limits: Limits { half_closed: ms(700), ..LIMITS },
        steps: &[MIDSTREAM, &[Client(Fin), Backend(SeesTheEnd), Mark, Client(SeesTheEnd)]],
        when: (ms(500), secs(6)),
        cause: "half-closed-timeout",
        ..SCENE
    };
    /// Case 34: Tidegate accepts connections that are already reset.
    clients_reset_in_the_accept_queue: Scene {
        steps: &[
            &[Each(|candidate, _| candidate.signal(Signal::STOP)), Each(forty_connect_and_reset)],
            &[Each(|candidate, _| candidate.signal(Signal::CONT)), Each(wait_until_forty_have_ended), Connect],
            &[Client(Send(1000)), Backend(Send(1000))], IN_ORDER,
        ],
        cause: "",
        ..SCENE
    };
    /// Case 37.
    bytes_arrive_one_by_one: Scene {
        steps: &[
            &[Connect, Client(SendByteByByte(5000)), Backend(SendByteByByte(5000))],
            &[Backend(Receives(5000)), Client(Receives(5000))], IN_ORDER,
        ],
        ..SCENE
    };
    /// Case 38: the urgent byte stays in its place as an ordinary byte (RFC 6093 section 5).
    urgent_byte_stays_in_the_stream: Scene {
        steps: &[
            &[Connect, Client(Send(1000)), Client(SendUrgent), Pause(ms(20)), Client(Send(1000))],
            &[Backend(SendUrgent), Pause(ms(20)), Backend(Send(500)), Backend(Receives(2001))],
            IN_ORDER,
        ],
        ..SCENE
    };
    /// Case 39: Tidegate falls back to an ordinary handshake, and no byte is lost.
    client_uses_tcp_fast_open: Scene {
        steps: &[
            &[Hosts(|site| {
                for host in [&site.client, &site.balancer] {
                    host.sysctl("ipv4/tcp_fastopen", "3");
                }
            })],
            &[Each(connect_fast), Client(Send(STREAM)), Accept, Backend(Send(1000))], IN_ORDER,
        ],
        ..SCENE
    };
    /// Case 30: the backend's host has lost the session and answers the next packet with a reset.
    backend_restarts_while_the_link_is_down: Scene {
        steps: &[
            MIDSTREAM, &[Link(Leg::Backend, Way::Both, |how| how.partition = true)],
            &[Backend(Reset), Mark],
            &[Link(Leg::Backend, Way::Both, |how| *how = Impairment::default())],
            &[Client(Send(1000)), Client(SeesTheEnd)],
        ],
        client: reset(Bytes::All),
        backend: GONE,
        when: (ms(0), secs(6)),
        cause: "backend-reset",
        ..SCENE
    };
}

/// Six restarts, each with three sessions: one on the listening backend, one in the backend's
/// listen queue at the restart, and one while the backend does not listen.
fn sessions_during_restarts(candidate: &mut Candidate, site: &Site) {
    for _ in 0..6 {
        let asked = ask(candidate, site);
        drop(accept_session(candidate));
        assert_ends_soon(candidate, asked);
        let asked = ask(candidate, site);
        eventually(secs(10), "a session waits in the backend's queue", || {
            site.backend.run(|| leaks::is_established(candidate.backend.port()))
        });
        candidate.ends.listener = None;
        assert_ends_soon(candidate, asked);
        let asked = ask(candidate, site);
        assert_ends_soon(candidate, asked);
        candidate.ends.listener = Some(both_ends::listen(&site.backend, candidate.backend, None));
    }
}

/// Connects and sends a request. Returns `None` if the client is already reset.
fn ask(candidate: &Candidate, site: &Site) -> Option<TcpStream> {
    let mut client = site.client.run(|| client::try_connect(candidate.frontend)).ok()?;
    client.write_all(b"some request").ok()?;
    Some(client)
}

/// Accepts the next session at the backend.
fn accept_session(candidate: &Candidate) -> TcpStream {
    let listener = candidate.ends.listener.as_ref().expect("the backend listens");
    eventually_some(secs(10), "the backend has the session", || Some(listener.accept().ok()?.0))
}

/// Checks that the session ends within 3 s, with FIN or RST.
fn assert_ends_soon(candidate: &Candidate, asked: Option<TcpStream>) {
    let Some(client) = asked else { return };
    let start = Instant::now();
    let end = client::read_to_end(&client);
    let took = start.elapsed();
    if candidate.tidegate().is_some() {
        assert!(!matches!(end, client::End::Silence(_)), "{}: {end:?}", candidate.name);
        assert!(took < patience(secs(3)), "{}: {end:?} after {took:?}", candidate.name);
    }
}

const FORTY: u32 = 40;

fn forty_connect_and_reset(candidate: &mut Candidate, site: &Site) {
    for number in 0..FORTY {
        let mut stream = site.client.run(|| client::connect(candidate.frontend));
        if number % 2 == 0 {
            stream.write_all(b"reset before it is read").expect("space for a line");
        }
        client::reset(stream);
    }
}

/// Waits until all 40 sessions have ended, and accepts and drops their backend connections.
fn wait_until_forty_have_ended(candidate: &mut Candidate, _: &Site) {
    if let Some(proxy) = candidate.tidegate() {
        eventually(secs(10), "the 40 sessions have ended", || {
            proxy.metric("tidegate_session_end_total", &[]) == f64::from(FORTY)
                && proxy.metric("tidegate_sessions_active", &[]) == 0.0
        });
    }
    let listener = candidate.ends.listener.as_ref().expect("the backend listens");
    let mut last = Instant::now();
    while last.elapsed() < ms(300) {
        match listener.accept() {
            Ok(_) => last = Instant::now(),
            Err(_) => std::thread::sleep(ms(5)),
        }
    }
}

/// Connects twice with data in the SYN (RFC 7413). The first connection gets the cookie, and the
/// second uses it and is the scene's session.
fn connect_fast(candidate: &mut Candidate, site: &Site) {
    /// From `linux/socket.h`.
    const MSG_FASTOPEN: i32 = 0x2000_0000;
    let connect = |first: &[u8]| {
        site.client.run(|| {
            let socket = Socket::new(Domain::IPV4, Type::STREAM, None).expect("a socket");
            let sent = socket.send_to_with_flags(first, &candidate.frontend.into(), MSG_FASTOPEN);
            assert_eq!(sent.expect("connects and sends"), first.len());
            TcpStream::from(socket)
        })
    };
    let cookie = connect(b"");
    drop(accept_session(candidate));
    drop(cookie);
    let first = candidate.ends.client.next_bytes(500);
    let stream = connect(&first);
    candidate.ends.client.take_midway(stream, first.len());
}

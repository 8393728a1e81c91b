//! What the peers do: cases 22 to 39.
//!
//! Clients and backends that refuse, reset, stall, dribble, speak first or never,
//! close in odd orders, or use what TCP has and nobody expects. Each scene is a
//! test; what plays them is elsewhere.

use super::Act::{Fin, Reads, Receives, Reset, SeesTheEnd, Send, SendByteByByte, SendUrgent};
use super::Step::{Accept, Backend, Client, Connect, Each, Hosts, Link, Mark, Pause};
use super::candidate::Candidate;
use super::duet;
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
    /// Case 24: what nobody reads stays where it is, and time ends it; with a reset,
    /// for bytes are lost.
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
    backend_reads_a_little_at_a_time: Scene {
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
    /// Case 30: every client gets an answer or a reset, at once; afterwards all
    /// is well.
    backend_restarts_all_the_time: Scene {
        steps: &[
            &[Each(sessions_while_it_restarts), Connect],
            &[Client(Send(1000)), Backend(Send(1000))], IN_ORDER,
        ],
        // The account of many sessions.
        cause: "",
        ..SCENE
    };
    /// Case 31.
    backend_speaks_first: Scene {
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
    client_says_nothing: Scene {
        limits: IDLE,
        steps: &[&[Mark, Connect]],
        client: fin(Bytes::None),
        backend: fin(Bytes::None),
        when: (ms(500), secs(6)),
        cause: "idle-timeout",
        ..SCENE
    };
    /// Case 33, behind its FIN.
    client_that_is_done_waits_for_ever: Scene {
        limits: Limits { half_closed: ms(700), ..LIMITS },
        steps: &[MIDSTREAM, &[Client(Fin), Backend(SeesTheEnd), Mark, Client(SeesTheEnd)]],
        when: (ms(500), secs(6)),
        cause: "half-closed-timeout",
        ..SCENE
    };
    /// Case 34: the balancer finds dead connections in its queue.
    clients_reset_in_the_accept_queue: Scene {
        steps: &[
            &[Each(|one, _| one.signal(Signal::STOP)), Each(forty_connect_and_reset)],
            &[Each(|one, _| one.signal(Signal::CONT)), Each(forty_are_over), Connect],
            &[Client(Send(1000)), Backend(Send(1000))], IN_ORDER,
        ],
        cause: "",
        ..SCENE
    };
    /// Case 37.
    bytes_come_one_by_one: Scene {
        steps: &[
            &[Connect, Client(SendByteByByte(5000)), Backend(SendByteByByte(5000))],
            &[Backend(Receives(5000)), Client(Receives(5000))], IN_ORDER,
        ],
        ..SCENE
    };
    /// Case 38: it stays in its place as an ordinary byte (RFC 6093 section 5).
    urgent_byte_stays_in_the_stream: Scene {
        steps: &[
            &[Connect, Client(Send(1000)), Client(SendUrgent), Pause(ms(20)), Client(Send(1000))],
            &[Backend(SendUrgent), Pause(ms(20)), Backend(Send(500)), Backend(Receives(2001))],
            IN_ORDER,
        ],
        ..SCENE
    };
    /// Case 39: it falls back to an ordinary handshake, and loses nothing.
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
    /// Case 30: the backend's host has forgotten the session, and says so when
    /// it is spoken to.
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

/// Half a dozen restarts, with a session while it is there, one that it takes
/// and never looks at, and one while it is not.
fn sessions_while_it_restarts(one: &mut Candidate, site: &Site) {
    for _ in 0..6 {
        let asked = ask(one, site);
        drop(taken(one));
        assert_over_at_once(one, asked);
        let asked = ask(one, site);
        eventually(secs(10), "a session waits in the backend's queue", || {
            site.backend.run(|| leaks::stands(one.backend.port()))
        });
        one.duet.listener = None;
        assert_over_at_once(one, asked);
        let asked = ask(one, site);
        assert_over_at_once(one, asked);
        one.duet.listener = Some(duet::listen(&site.backend, one.backend, None));
    }
}

/// A client that has asked for something, unless it is turned away already.
fn ask(one: &Candidate, site: &Site) -> Option<TcpStream> {
    let mut client = site.client.run(|| client::try_connect(one.frontend)).ok()?;
    client.write_all(b"anybody there?").ok()?;
    Some(client)
}

/// The backend's end of the next session.
fn taken(one: &Candidate) -> TcpStream {
    let listener = one.duet.listener.as_ref().expect("it listens");
    eventually_some(secs(10), "the backend has the session", || Some(listener.accept().ok()?.0))
}

/// A word about the end comes soon, whichever.
fn assert_over_at_once(one: &Candidate, asked: Option<TcpStream>) {
    let Some(client) = asked else { return };
    let start = Instant::now();
    let end = client::read_to_end(&client);
    let took = start.elapsed();
    if one.ours().is_some() {
        assert!(!matches!(end, client::End::Silence(_)), "{}: {end:?}", one.name);
        assert!(took < patience(secs(3)), "{}: {end:?} after {took:?}", one.name);
    }
}

const FORTY: u32 = 40;

fn forty_connect_and_reset(one: &mut Candidate, site: &Site) {
    for number in 0..FORTY {
        let mut stream = site.client.run(|| client::connect(one.frontend));
        if number % 2 == 0 {
            stream.write_all(b"gone before it is read").expect("room for a line");
        }
        client::reset(stream);
    }
}

/// Waits until they are, and forgets what the backend saw of them.
fn forty_are_over(one: &mut Candidate, _: &Site) {
    if let Some(proxy) = one.ours() {
        eventually(secs(10), "the forty are over", || {
            proxy.metric("tidegate_session_end_total", &[]) == f64::from(FORTY)
                && proxy.metric("tidegate_sessions_active", &[]) == 0.0
        });
    }
    let listener = one.duet.listener.as_ref().expect("it listens");
    let mut last = Instant::now();
    while last.elapsed() < ms(300) {
        match listener.accept() {
            Ok(_) => last = Instant::now(),
            Err(_) => std::thread::sleep(ms(5)),
        }
    }
}

/// Connects twice with data in the SYN (RFC 7413): the first time brings the
/// cookie, the second uses it and is the scene's session.
fn connect_fast(one: &mut Candidate, site: &Site) {
    /// `linux/socket.h`
    const MSG_FASTOPEN: i32 = 0x2000_0000;
    let connect = |first: &[u8]| {
        site.client.run(|| {
            let socket = Socket::new(Domain::IPV4, Type::STREAM, None).expect("a socket");
            let sent = socket.send_to_with_flags(first, &one.frontend.into(), MSG_FASTOPEN);
            assert_eq!(sent.expect("connects and sends"), first.len());
            TcpStream::from(socket)
        })
    };
    let cookie = connect(b"");
    drop(taken(one));
    drop(cookie);
    let first = one.duet.client.next_bytes(500);
    let stream = connect(&first);
    one.duet.client.take_midway(stream, first.len());
}

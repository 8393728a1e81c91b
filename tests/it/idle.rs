//! Memory and CPU time of 3,000 idle sessions, or of 9,000 in the long version.

use crate::common::client::{connect_from, exchange};
use crate::common::conf::{Conf, Pool};
use crate::common::proxy::TestProxy;
use crate::common::servers::IdleBackend;
use crate::common::{
    Engine, eventually, have, long, measured, ms, on_every_engine_alone, proc, secs, skip,
};
use std::net::{IpAddr, Ipv4Addr, TcpStream};

on_every_engine_alone!(idle_sessions_use_less_than_2_kib_each);

/// The session counts at which memory is measured.
fn steps() -> [usize; 4] {
    if long() { [1_000, 3_000, 6_000, 9_000] } else { [500, 1_000, 2_000, 3_000] }
}

/// Memory that a second series of sessions can use beyond the first.
const LEFT_KIB_MAX: u64 = 1024;

/// Upper bound on resident bytes per idle session. io_uring needs more, because each session
/// has operations in flight.
fn bytes_max(engine: Engine) -> f64 {
    match engine {
        Engine::Epoll => 1_024.0,
        Engine::IoUring => 1_792.0,
    }
}

fn idle_sessions_use_less_than_2_kib_each(engine: Engine) {
    if !have(&["python3"]) {
        return;
    }
    let steps = steps();
    let all = steps[3];
    // Tidegate holds two descriptors per session.
    if proc::raise_own_fd_limit() < 2 * all as u64 + 500 {
        return skip("the hard limit of descriptors is too low");
    }
    let backend = IdleBackend::start();
    let proxy =
        TestProxy::start(Conf::simple(engine, Pool::new("web").backend("a", backend.address)));
    // Costs of the first use (buffers, tables, code pages) are not costs of a session.
    drop(open_sessions(&proxy, 200));
    eventually(secs(10), "the warm-up has ended", || {
        proxy.backend("web", "a")["sessions_active"] == 0
    });
    let before = proxy.rss_kib();
    let (mut sessions, mut points) = (Vec::new(), Vec::new());
    for step in steps {
        sessions.extend(open_sessions(&proxy, step - sessions.len()));
        points.push((step as f64, proxy.rss_kib() as f64 * 1024.0));
    }
    assert_eq!(proxy.backend("web", "a")["sessions_active"], all);
    let idle_cpu = proxy.cpu_time();
    std::thread::sleep(secs(2));
    let spent = proxy.cpu_time() - idle_cpu;
    let grown = proxy.rss_kib().saturating_sub(before);
    let each = grown as f64 * 1024.0 / all as f64;
    measured(&format!(
        "{all} idle sessions: {each:.0} B per session, slope {:.0} B over {steps:?}, {spent:?} of CPU \
         in 2 s",
        slope(&points)
    ));
    assert!(each <= bytes_max(engine), "{each:.0} B of resident memory for an idle session");
    assert!(spent < ms(400), "{spent:?} of CPU in 2 s without traffic");
    // Idle sessions still relay.
    for session in sessions.iter().step_by(100) {
        assert_eq!(exchange(session, b"y").unwrap(), b"y");
    }
    drop(sessions);
    let ended = || proxy.backend("web", "a")["sessions_active"] == 0;
    eventually(secs(30), "every session has ended", ended);
    // The allocator can keep its memory, but the next sessions must not need more.
    let (peak, after) = (before + grown, proxy.rss_kib());
    let again = open_sessions(&proxy, all / 3);
    let second = proxy.rss_kib();
    measured(&format!(
        "{before} KiB before, {peak} at the peak, {after} after, {second} with a third of the sessions"
    ));
    assert!(
        second <= peak + LEFT_KIB_MAX,
        "{second} KiB with a third of the sessions, {peak} with all"
    );
    drop(again);
    eventually(secs(30), "the second series has ended", ended);
}

/// Returns the slope of the least-squares line through `points`.
fn slope(points: &[(f64, f64)]) -> f64 {
    let count = points.len() as f64;
    let mean = |of: fn(&(f64, f64)) -> f64| points.iter().map(of).sum::<f64>() / count;
    let (x, y) = (mean(|p| p.0), mean(|p| p.1));
    let (above, below) = points.iter().fold((0.0, 0.0), |(above, below), p| {
        (above + (p.0 - x) * (p.1 - y), below + (p.0 - x) * (p.0 - x))
    });
    above / below
}

/// Opens sessions and relays one byte each way. Uses several source addresses, because the
/// ports of one address are not enough.
fn open_sessions(proxy: &TestProxy, count: usize) -> Vec<TcpStream> {
    let address = proxy.addr("web");
    (0..count)
        .map(|number| {
            let source = Ipv4Addr::new(127, 0, 2, (number / 2000 + 1) as u8);
            let stream = connect_from(IpAddr::V4(source), address).expect("connect");
            assert_eq!(exchange(&stream, b"x").expect("an echo"), b"x");
            stream
        })
        .collect()
}

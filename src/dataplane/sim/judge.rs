//! What every run must have kept, once it is over.
//!
//! Called by `world`. It knows what was done to each socket, and compares that
//! with what the sessions say of themselves and with what is left behind.

use super::world::SimWorld;
use crate::access_log::AccessLogRecord;
use crate::worker::context::WorkerReport;
use std::collections::HashSet;
use std::net::SocketAddr;
use tidegate_core::health::ConnectFailure;
use tidegate_net::fake::{self, PeerSignal, SimKernel, SimSocket, SocketRole, is_local_error};

pub(super) fn judge(world: &SimWorld) {
    fake::with(|kernel| {
        assert!(!kernel.is_garbled(), "garbled bytes\n{:#?}", kernel.sockets);
        assert_eq!(kernel.misused, 0, "a closed descriptor was used");
        assert_eq!(kernel.open_pipes(), 0, "pipes are left");
        let mut seen = HashSet::new();
        for record in &world.records {
            let client = client_of(record);
            assert!(seen.insert(client), "counted twice: {record:?}");
            let told = judge_session(world, kernel, client, record);
            assert!(told.is_ok(), "{}: {record:?}\n{:#?}", told.unwrap_err(), kernel.sockets);
        }
        world.reports.iter().for_each(|report| judge_report(kernel, report));
    });
    judge_leftovers(world);
}

fn client_of(record: &AccessLogRecord) -> usize {
    let client: SocketAddr = record.client.to_string().parse().unwrap();
    usize::from(client.port()) - 10_000
}

/// The backend's socket of that client's session, where bytes tell.
fn backend_of<'k>(kernel: &'k SimKernel, client: &SimSocket) -> Option<&'k SimSocket> {
    let talked = |socket: &&SimSocket| {
        socket.role != SocketRole::Client
            && (socket.got_from == Some(client.stream) || client.got_from == Some(socket.stream))
    };
    kernel.sockets.iter().rfind(talked)
}

fn judge_session(
    world: &SimWorld,
    kernel: &SimKernel,
    id: usize,
    record: &AccessLogRecord,
) -> Result<(), &'static str> {
    let client = &kernel.sockets[id];
    let backend = backend_of(kernel, client);
    let any_backend = |so: fn(&SimSocket) -> bool| {
        kernel.sockets.iter().any(|s| s.role != SocketRole::Client && so(s))
    };
    let backend_failed = backend.map_or(any_backend(|s| s.peer_failed), |s| s.peer_failed);
    check(record.bytes_in <= client.taken, "more is counted than came")?;
    if let Some(backend) = backend {
        let crossed = |a: &SimSocket, b: &SimSocket| b.got_from.is_none_or(|from| from == a.stream);
        check(crossed(client, backend) && crossed(backend, client), "sessions are mixed up")?;
        check(backend.put == record.bytes_in, "counted otherwise than sent to the backend")?;
        check(client.put == record.bytes_out, "counted otherwise than sent to the client")?;
        judge_undelivered(client, backend, record)?;
    }
    match record.cause {
        "finished" => judge_finished(client, backend, record),
        "client-reset" | "client-lost" => {
            check(client.peer_failed, "the client is blamed")?;
            judge_last_words(world, client, backend, record)
        }
        "backend-reset" | "backend-lost" => {
            check(backend_failed, "the backend is blamed")?;
            backend.map_or(Ok(()), |backend| judge_last_words(world, backend, Some(client), record))
        }
        "connect-refused" | "connect-failed" => {
            check(any_backend(|s| s.peer_failed), "a backend is blamed")
        }
        "local-resource" => judge_shortage(kernel, record.errno),
        "idle-timeout" | "half-closed-timeout" => check(world.jumped, "it was not idle for long"),
        "drain-deadline" | "backend-removed" => check(world.cut, "nobody cut it"),
        "connect-timeout" | "queue-timeout" | "no-backend" => Ok(()),
        _ => Err("an unknown end"),
    }
}

/// What came from one peer and did not arrive at the other is counted, and there is no
/// end in order then.
fn judge_undelivered(
    client: &SimSocket,
    backend: &SimSocket,
    record: &AccessLogRecord,
) -> Result<(), &'static str> {
    let lost = client.sent - backend.got + backend.sent - client.got;
    check(record.bytes_undelivered == lost, "lost bytes are counted otherwise")?;
    let in_order =
        |socket: &SimSocket| socket.last_signal == PeerSignal::Fin && !socket.shut && !socket.dead;
    check(lost == 0 || !in_order(client) && !in_order(backend), "a part looks like the whole")
}

/// Something ran out, or connect(2) itself found no route. A way without ports is
/// left alone for a while, by whichever error it was found out.
fn judge_shortage(kernel: &SimKernel, errno: Option<i32>) -> Result<(), &'static str> {
    let no_port = |errno| matches!(errno, libc::EADDRNOTAVAIL | libc::EADDRINUSE);
    let is_that = |injected: &i32| {
        errno.is_none_or(|errno| errno == *injected || no_port(errno) && no_port(*injected))
    };
    let ours = errno.is_none_or(|errno| is_local_error(errno) || errno == libc::ENETUNREACH);
    check(ours && kernel.injected.iter().any(is_that), "nothing ran out")
}

/// An end in order: everything is delivered, and both are told.
fn judge_finished(
    client: &SimSocket,
    backend: Option<&SimSocket>,
    record: &AccessLogRecord,
) -> Result<(), &'static str> {
    check(client.fin && client.taken == client.sent, "the client had not finished")?;
    check(record.bytes_in == client.sent, "counted otherwise than sent")?;
    check(client.last_signal == PeerSignal::Fin, "the client was not told")?;
    let Some(backend) = backend else { return Ok(()) };
    check(backend.fin && backend.taken == backend.sent, "the backend had not finished")?;
    check(backend.got == client.sent && client.got == backend.sent, "bytes are missing")?;
    check(record.bytes_out == backend.sent, "counted otherwise than sent")?;
    check(backend.last_signal == PeerSignal::Fin, "the backend was not told")
}

/// What `failed` had sent before it failed has reached the other, as long as
/// nothing else went wrong: where it had to stand still for long, or was cut, the record
/// says so.
fn judge_last_words(
    world: &SimWorld,
    failed: &SimSocket,
    other: Option<&SimSocket>,
    record: &AccessLogRecord,
) -> Result<(), &'static str> {
    let Some(other) = other else { return Ok(()) };
    if (world.jumped || world.cut) && record.bytes_undelivered > 0 {
        return Ok(());
    }
    let untouched = failed.injected.is_empty() && other.injected.is_empty();
    if !untouched || other.peer_failed {
        return Ok(());
    }
    check(other.got == failed.sent, "last words are lost")
}

fn check(so: bool, otherwise: &'static str) -> Result<(), &'static str> {
    so.then_some(()).ok_or(otherwise)
}

/// What is reported of a backend is its fault.
fn judge_report(kernel: &SimKernel, report: &WorkerReport) {
    let WorkerReport::ConnectFailed { failure, .. } = report;
    match failure {
        ConnectFailure::Timeout => {}
        ConnectFailure::Other(errno) => assert!(!is_local_error(*errno), "{report:?}"),
        _ => {
            let blamed = |s: &SimSocket| s.role != SocketRole::Client && s.peer_failed;
            assert!(kernel.sockets.iter().any(blamed), "{report:?}");
        }
    }
}

fn judge_leftovers(world: &SimWorld) {
    let ctx = &world.ctx;
    assert_eq!(ctx.engine.open_flows(), 0);
    assert!(ctx.engine.is_clean(), "buffers or operations are left");
    assert_eq!(ctx.shared.in_flight.get(), 0);
    assert_eq!(world.budget.used(), 0, "bytes are held for nobody");
    for frontend in world.tables.iter().flat_map(|table| &table.frontends) {
        assert_eq!(frontend.state.in_flight.get(), 0, "frontend");
    }
    let pools = world.tables.iter().flat_map(|table| &table.pools);
    for backend in pools.flat_map(|pool| &pool.serving) {
        assert_eq!(backend.in_flight.get(), 0, "{}", backend.name);
    }
    let (accepted, ended) = (ctx.counters.accepted.get(), ctx.counters.ended.get());
    assert_eq!((accepted, ended), (world.records.len() as u64, world.records.len() as u64));
}

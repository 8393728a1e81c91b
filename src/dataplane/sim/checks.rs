//! Checks after each run of the simulation.
//!
//! Called by `world`. It compares the history of each fake socket with the sessions' access-log
//! records, and checks that all resources are released.

use super::world::SimWorld;
use crate::access_log::AccessLogRecord;
use crate::worker::context::WorkerReport;
use std::collections::HashSet;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tidegate_core::decision::{Decision, Why};
use tidegate_core::health::ConnectFailure;
use tidegate_core::model::BackendId;
use tidegate_net::fake::{self, PeerSignal, SimKernel, SimSocket, SocketRole, is_local_error};

pub(super) fn check_run(world: &SimWorld) {
    fake::with(|kernel| {
        assert!(!kernel.is_garbled(), "garbled bytes\n{:#?}", kernel.sockets);
        assert_eq!(kernel.misused, 0, "a closed descriptor was used");
        assert_eq!(kernel.open_pipes(), 0, "pipes are still open");
        let mut seen = HashSet::new();
        for record in &world.records {
            let client = client_of(record);
            assert!(seen.insert(client), "session counted twice: {record:?}");
            let result = check_session(world, kernel, client, record);
            assert!(result.is_ok(), "{}: {record:?}\n{:#?}", result.unwrap_err(), kernel.sockets);
            check_decisions(world, record);
        }
        world.reports.iter().for_each(|report| check_report(kernel, report));
    });
    check_released(world);
}

fn client_of(record: &AccessLogRecord) -> usize {
    let client: SocketAddr = record.client.to_string().parse().unwrap();
    usize::from(client.port()) - 10_000
}

/// Returns the backend socket of a client's session, if the session has moved bytes.
fn backend_of<'k>(kernel: &'k SimKernel, client: &SimSocket) -> Option<&'k SimSocket> {
    let is_peer = |socket: &&SimSocket| {
        socket.role != SocketRole::Client
            && (socket.got_from == Some(client.stream) || client.got_from == Some(socket.stream))
    };
    kernel.sockets.iter().rfind(is_peer)
}

fn check_session(
    world: &SimWorld,
    kernel: &SimKernel,
    id: usize,
    record: &AccessLogRecord,
) -> Result<(), &'static str> {
    let client = &kernel.sockets[id];
    let backend = backend_of(kernel, client);
    let any_backend = |condition: fn(&SimSocket) -> bool| {
        kernel.sockets.iter().any(|s| s.role != SocketRole::Client && condition(s))
    };
    let backend_failed = backend.map_or(any_backend(|s| s.peer_failed), |s| s.peer_failed);
    ensure(record.bytes_in <= client.taken, "bytes_in is more than the client sent")?;
    if let Some(backend) = backend {
        let crossed = |a: &SimSocket, b: &SimSocket| b.got_from.is_none_or(|from| from == a.stream);
        ensure(crossed(client, backend) && crossed(backend, client), "sessions are mixed up")?;
        ensure(backend.put == record.bytes_in, "bytes_in differs from bytes sent to the backend")?;
        ensure(client.put == record.bytes_out, "bytes_out differs from bytes sent to the client")?;
        check_undelivered(client, backend, record)?;
    }
    match record.cause {
        "finished" => check_finished(client, backend, record),
        "client-reset" | "client-lost" => {
            ensure(client.peer_failed, "the client did not fail")?;
            check_last_bytes(world, client, backend, record)
        }
        "backend-reset" | "backend-lost" => {
            ensure(backend_failed, "the backend did not fail")?;
            backend.map_or(Ok(()), |backend| check_last_bytes(world, backend, Some(client), record))
        }
        "connect-refused" | "connect-failed" => {
            ensure(any_backend(|s| s.peer_failed), "no backend failed")
        }
        "local-resource" => check_shortage(kernel, record.errno),
        "idle-timeout" | "half-closed-timeout" => ensure(world.jumped, "it was not idle for long"),
        "drain-deadline" | "backend-removed" | "backup-released" | "closed-by-operator" => {
            ensure(world.aborted, "no session was aborted")
        }
        "connect-timeout" | "queue-timeout" | "no-backend" => Ok(()),
        _ => Err("unexpected cause"),
    }
}

/// Checks that the record counts the bytes that did not arrive, and that neither peer gets a
/// FIN after lost bytes.
fn check_undelivered(
    client: &SimSocket,
    backend: &SimSocket,
    record: &AccessLogRecord,
) -> Result<(), &'static str> {
    let lost = client.sent - backend.got + backend.sent - client.got;
    ensure(record.bytes_undelivered == lost, "bytes_undelivered differs from lost bytes")?;
    let got_fin =
        |socket: &SimSocket| socket.last_signal == PeerSignal::Fin && !socket.shut && !socket.dead;
    ensure(lost == 0 || !got_fin(client) && !got_fin(backend), "a truncated stream has a FIN")
}

/// Checks that a local resource ran out or that connect(2) found no route. A source address
/// without ports is skipped for a while, so a later session can report a different errno.
fn check_shortage(kernel: &SimKernel, errno: Option<i32>) -> Result<(), &'static str> {
    let no_port = |errno| matches!(errno, libc::EADDRNOTAVAIL | libc::EADDRINUSE);
    let is_that = |injected: &i32| {
        errno.is_none_or(|errno| errno == *injected || no_port(errno) && no_port(*injected))
    };
    let local = errno.is_none_or(|errno| is_local_error(errno) || errno == libc::ENETUNREACH);
    ensure(local && kernel.injected.iter().any(is_that), "no local resource ran out")
}

/// Checks a finished session: all bytes are delivered, and both peers got a FIN.
fn check_finished(
    client: &SimSocket,
    backend: Option<&SimSocket>,
    record: &AccessLogRecord,
) -> Result<(), &'static str> {
    ensure(client.fin && client.taken == client.sent, "the client had not finished")?;
    ensure(record.bytes_in == client.sent, "bytes_in differs from bytes sent by the client")?;
    ensure(client.last_signal == PeerSignal::Fin, "the client got no FIN")?;
    let Some(backend) = backend else { return Ok(()) };
    ensure(backend.fin && backend.taken == backend.sent, "the backend had not finished")?;
    ensure(backend.got == client.sent && client.got == backend.sent, "bytes are missing")?;
    ensure(record.bytes_out == backend.sent, "bytes_out differs from bytes sent by the backend")?;
    ensure(backend.last_signal == PeerSignal::Fin, "the backend got no FIN")
}

/// Checks that the bytes sent by the failed peer reached the other peer.
///
/// Exceptions: another fault occurred, or the record counts undelivered bytes because of a time
/// jump or an abort.
fn check_last_bytes(
    world: &SimWorld,
    failed: &SimSocket,
    other: Option<&SimSocket>,
    record: &AccessLogRecord,
) -> Result<(), &'static str> {
    let Some(other) = other else { return Ok(()) };
    if (world.jumped || world.aborted) && record.bytes_undelivered > 0 {
        return Ok(());
    }
    let no_fault = failed.injected.is_empty() && other.injected.is_empty();
    if !no_fault || other.peer_failed {
        return Ok(());
    }
    ensure(other.got == failed.sent, "the last bytes are lost")
}

fn ensure(condition: bool, otherwise: &'static str) -> Result<(), &'static str> {
    condition.then_some(()).ok_or(otherwise)
}

/// Checks that the rings hold for a session what its access-log record says.
fn check_decisions(world: &SimWorld, record: &AccessLogRecord) {
    let decisions = world.ctx.shared.decisions.of_session(record.session);
    let at = format!("{record:#?}\n{decisions:#?}");
    let Some(last) = decisions.last() else { panic!("no decision: {at}") };
    assert!(decisions.iter().zip(1..).all(|(one, attempt)| one.attempt == attempt), "{at}");
    let (cause, phase) = last.outcome.end.expect(&at);
    assert_eq!((cause.name(), phase.name()), (record.cause, record.phase), "{at}");
    let others = &decisions[..decisions.len() - 1];
    assert!(others.iter().all(|one| one.outcome.end.is_none()), "{at}");

    let picked: Vec<&Decision> = decisions.iter().filter(|one| one.chosen.is_some()).collect();
    assert_eq!(picked.len(), record.attempts as usize, "{at}");
    let of_backend = *picked.last().unwrap_or(&last);
    assert_eq!(of_backend.chosen.and_then(|id| name_of(world, id)), record.backend, "{at}");
    let why = (of_backend.why != Why::None).then(|| of_backend.why.name());
    assert_eq!((why, why.is_some()), (record.why, record.backend.is_some()), "{at}");
    assert_eq!(of_backend.skipped.total(), record.skipped, "{at}");
    let is_retry = matches!(of_backend.why, Why::Retry | Why::Trial);
    assert!(record.attempts < 2 || is_retry, "{at}");

    let failures = decisions.iter().filter_map(|one| one.outcome.failure);
    let failures: Vec<_> = failures.map(|(kind, errno)| (kind.name(), errno)).collect();
    let tries: Vec<_> = record.tries.iter().map(|one| (one.failure, one.errno)).collect();
    assert_eq!(failures, tries, "{at}");
    let connect =
        of_backend.outcome.connect_micros.map(|micros| Duration::from_micros(micros.into()));
    assert!(connect == record.connect || !tries.is_empty(), "{at}");
}

fn name_of(world: &SimWorld, id: BackendId) -> Option<Arc<str>> {
    let pools = world.tables.iter().flat_map(|table| &table.pools);
    let mut backends = pools.flat_map(|pool| &pool.serving);
    backends.find(|backend| backend.id == id).map(|backend| Arc::clone(&backend.name))
}

/// Checks that a reported failure is not a local error.
fn check_report(kernel: &SimKernel, report: &WorkerReport) {
    let WorkerReport::ConnectFailed { failure, .. } = report;
    match failure {
        ConnectFailure::Timeout => {}
        ConnectFailure::Other(errno) => assert!(!is_local_error(*errno), "{report:?}"),
        _ => {
            let failed = |s: &SimSocket| s.role != SocketRole::Client && s.peer_failed;
            assert!(kernel.sockets.iter().any(failed), "{report:?}");
        }
    }
}

/// Checks that all resources of the sessions are released.
fn check_released(world: &SimWorld) {
    let ctx = &world.ctx;
    assert_eq!(ctx.engine.open_sessions(), 0);
    assert!(ctx.engine.is_clean(), "buffers or operations are not released");
    assert_eq!(ctx.shared.in_flight.get(), 0);
    assert_eq!(world.budget.used(), 0, "buffered bytes are not released");
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

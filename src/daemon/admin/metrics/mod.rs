//! `/metrics`: Prometheus text exposition format 0.0.4.
//!
//! Called by `rendering` on its own thread with an [`AdminSnapshot`]. Pure. Labels come
//! from the configuration and from fixed sets, never from clients.
//!
//! - The series of a frontend, pool or backend end when a reload removes it. A backend
//!   with a new address starts from 0. Totals of the whole process
//!   (`session_end_total`, `worker_*`) never decrease.
//! - `session_end_total` has one series per cause from the start, with the usual phase of
//!   the cause and the value 0. The first reset or timeout is therefore visible to
//!   `rate()`. Other phases appear with their first session.
//! - The histograms of a backend appear with its first measurement.
//! - `backend_up` shows the observation: it is 0 only if the backend is down. Whether the
//!   backend gets new sessions is `backend_eligible`.

use super::process::ProcessFacts;
use super::snapshot::AdminSnapshot;
use encoder::{Encoder, Family, counter, gauge, histogram, prepared};
use tidegate_api::names::ServiceState;
use tidegate_core::control::source_ports;
use tidegate_core::control::{BackendStatus, FrontendStatus, PoolStatus};
use tidegate_core::health::{Intent, Observation};
use tidegate_core::metrics::counters::{
    LocalErrorKind, LocalErrorPlace, PanicScope, RingEvent, WorkerCounters,
};
use tidegate_core::metrics::histograms::{BOUNDS_SECONDS, MergedHistograms, Series, SeriesData};
use tidegate_core::outcome::{Cause, Phase, RefusedReason};

mod encoder;
mod heartbeats;
mod sources;

/// All metrics: name, type and help.
#[rustfmt::skip]
mod families {
    use super::{Family, counter, gauge, histogram};

    pub(super) const BUILD_INFO: Family = gauge("tidegate_build_info", "Version and engine in use, as labels; always 1.");
    pub(super) const UPTIME: Family = gauge("tidegate_uptime_seconds", "Time since the process started.");
    pub(super) const WORKERS: Family = gauge("tidegate_workers", "Worker threads.");
    pub(super) const DRAINING: Family = gauge("tidegate_draining", "1 if the process is draining before exit, else 0.");
    pub(super) const TABLE_GENERATION: Family = gauge("tidegate_table_generation", "Generation of the configuration in effect.");
    pub(super) const TABLE_SERIAL: Family = gauge("tidegate_table_serial", "Serial number of the routing table in effect.");
    pub(super) const RELOADS: Family = counter("tidegate_reloads_total", "Configuration reloads, by result.");
    pub(super) const UPGRADES: Family = counter("tidegate_upgrades_total", "Upgrades in place, by result.");
    pub(super) const RESTART_NEEDED: Family = gauge("tidegate_restart_needed", "Changed settings that take effect only after a restart or an upgrade.");
    pub(super) const STATE_UNWRITTEN: Family = counter("tidegate_state_write_failures_total", "Failed writes of operators' drains to the directory of [process] state.");
    pub(super) const ADMIN_DROPPED: Family = counter("tidegate_admin_connections_dropped_total", "Idle admin connections closed because a new connection needed a slot.");
    pub(super) const STREAMS: Family = gauge("tidegate_streams", "Open streams of the admin API.");
    pub(super) const STREAMS_DROPPED: Family = counter("tidegate_stream_dropped_total", "Streams closed because their viewer read too slowly.");
    pub(super) const STREAMS_REFUSED: Family = counter("tidegate_stream_refused_total", "Streams refused because the maximum was open.");
    pub(super) const EVENTS: Family = counter("tidegate_events_total", "Events, with those of old processes.");
    pub(super) const EVENTS_DROPPED: Family = counter("tidegate_events_dropped_total", "Events that are no longer kept, because newer ones needed their place.");
    pub(super) const CONFINEMENT: Family = gauge("tidegate_confinement", "1 if the sandbox layer is in effect, else 0.");
    pub(super) const CONNECTIONS_ACTIVE: Family = gauge("tidegate_connections_active", "Open sessions in the process.");
    pub(super) const CONNECTIONS_MAX: Family = gauge("tidegate_connections_max", "Cap on open sessions in the process.");

    pub(super) const BUFFERED: Family = gauge("tidegate_buffered_bytes", "Memory used by received but unsent bytes and by splice pipes.");
    pub(super) const BUFFERS_MAX: Family = gauge("tidegate_buffers_max_bytes", "Cap on buffered bytes (buffers_max), without the fixed buffers of io_uring.");
    pub(super) const BUFFERS_REFUSED: Family = counter("tidegate_buffers_refused_total", "Reads postponed because the cap on buffered bytes was reached.");

    pub(super) const SESSIONS: Family = counter("tidegate_sessions_total", "Accepted connections, by frontend.");
    pub(super) const SESSIONS_ACTIVE: Family = gauge("tidegate_sessions_active", "Open sessions, by frontend.");
    pub(super) const BYTES: Family = counter("tidegate_bytes_total", "Bytes relayed, by frontend; in is from clients, out is to clients.");
    pub(super) const SOURCES_UNTRACKED: Family = counter("tidegate_sources_untracked_total", "Clients accepted without source limits because the source table was full.");
    pub(super) const REFUSED: Family = counter("tidegate_refused_total", "Clients rejected before a backend connection was established, by frontend and reason.");
    pub(super) const SESSION_END: Family = counter("tidegate_session_end_total", "Ended sessions, by cause and phase.");

    pub(super) const POOL_BACKENDS: Family = gauge("tidegate_pool_backends", "Backends of the pool.");
    pub(super) const POOL_ELIGIBLE: Family = gauge("tidegate_pool_backends_eligible", "Eligible backends of the pool.");
    pub(super) const OMITTED: Family = gauge("tidegate_backend_metrics_omitted", "Backends without series because there are more than backend_metrics_max.");
    pub(super) const BACKEND_UP: Family = gauge("tidegate_backend_up", "0 if probes or heartbeats found the backend down, else 1.");
    pub(super) const BACKEND_ELIGIBLE: Family = gauge("tidegate_backend_eligible", "1 if the backend can get new sessions, else 0.");
    pub(super) const BACKEND_TIER: Family = gauge("tidegate_backend_tier", "Tier of the backend, 0 to 9; above 0 it is a backup.");
    pub(super) const BACKEND_WEIGHT: Family = gauge("tidegate_backend_weight", "Effective weight of the backend; 0 while it is not eligible.");
    pub(super) const BACKEND_DRAINING: Family = gauge("tidegate_backend_draining", "1 if an operator drained the backend or set it to maintenance, else 0.");
    pub(super) const BACKEND_EJECTED: Family = gauge("tidegate_backend_ejected", "1 if the backend is ejected after failures, else 0.");
    pub(super) const EJECTIONS: Family = counter("tidegate_ejections_total", "Ejections of the backend.");
    pub(super) const EJECTIONS_HELD: Family = counter("tidegate_ejections_held_total", "Ejections of the backend prevented by max_ejected or because no other backend was eligible.");
    pub(super) const BACKEND_IN_FLIGHT: Family = gauge("tidegate_backend_in_flight", "Sessions assigned to the backend, from pick to close.");
    pub(super) const BACKEND_SESSIONS: Family = counter("tidegate_backend_sessions_total", "Sessions that connected to the backend.");
    pub(super) const BACKEND_BYTES: Family = counter("tidegate_backend_bytes_total", "Bytes relayed, by backend; in is from clients, out is to clients.");
    pub(super) const CONNECT_FAILURES: Family = counter("tidegate_connect_failures_total", "Connect attempts that failed because of the backend or the path to it.");
    pub(super) const CONNECT_SECONDS: Family = histogram("tidegate_connect_seconds", "Time to connect to the backend.");
    pub(super) const FIRST_BYTE_SECONDS: Family = histogram("tidegate_first_byte_seconds", "Time from the connection to the backend to its first byte.");
    pub(super) const SESSION_SECONDS: Family = histogram("tidegate_session_seconds", "Time from accept to close.");
    pub(super) const PORTS_USED: Family = gauge("tidegate_source_ports_used", "Local ports in use from one source address to the backend (estimate).");
    pub(super) const PORTS_MAX: Family = gauge("tidegate_source_ports_max", "Local ports available to each pair of source address and backend.");
    pub(super) const LEAVING_BACKENDS: Family = gauge("tidegate_leaving_backends", "Backends removed from the configuration that still have sessions.");
    pub(super) const LEAVING_SESSIONS: Family = gauge("tidegate_leaving_sessions", "Open sessions on backends removed from the configuration.");

    pub(super) const WORKER_ACCEPTED: Family = counter("tidegate_worker_accepted_total", "Accepted connections, by worker.");
    pub(super) const WORKER_ACTIVE: Family = gauge("tidegate_worker_active", "Open sessions, by worker.");
    pub(super) const HELD_AT_CAP: Family = counter("tidegate_accept_held_at_cap_total", "Times a listener stopped accepting because a cap was reached.");
    pub(super) const WORKER_PANICS: Family = counter("tidegate_worker_panics_total", "Panics, by worker and by what ended: one session, or the worker with its sessions.");
    pub(super) const WORKER_RESTARTS: Family = counter("tidegate_worker_restarts_total", "Restarts of the worker after a panic.");
    pub(super) const WORKER_STALLED: Family = gauge("tidegate_worker_stalled", "1 if the event loop of the worker is stalled, else 0.");
    pub(super) const WORKER_STALLS: Family = counter("tidegate_worker_stalls_total", "Times the event loop of the worker made no progress for 1 s or more.");
    pub(super) const QUEUED: Family = gauge("tidegate_pool_queued", "Clients in the queue of the pool, waiting for a backend below its cap.");
    pub(super) const QUEUED_TOTAL: Family = counter("tidegate_queued_total", "Sessions that waited in the queue of a pool.");
    pub(super) const UNDECIDED: Family = gauge("tidegate_pool_undecided", "1 if no backend of the pool is eligible and clients wait for the first health results, else 0.");
    pub(super) const UNDECIDED_WAITS: Family = counter("tidegate_undecided_waits_total", "Sessions that waited for the first health results of their pool.");
    pub(super) const PROBES_WAITED: Family = counter("tidegate_probes_waited_total", "Probes delayed because too many probes ran at once.");
    pub(super) const COMMANDS_WAITED: Family = counter("tidegate_probe_commands_waited_total", "Commands of probes delayed because too many commands ran at once.");
    pub(super) const HELPER_FAILED: Family = gauge("tidegate_probe_helper_failed", "1 if the probe helper has ended and commands of probes do not run, else 0.");
    pub(super) const HELPER_FAILURES: Family = counter("tidegate_probe_helper_failures_total", "Times the probe helper ended unexpectedly.");
    pub(super) const RING_EVENTS: Family = counter("tidegate_ring_events_total", "Exceptional events inside the io_uring engine, by worker and reason; 0 with epoll.");
    pub(super) const LOCAL_ERRORS: Family = counter("tidegate_local_errors_total", "Errors on this host, by reason and place; they never count against a backend.");
    pub(super) const CONNECT_RETRIES: Family = counter("tidegate_connect_retries_total", "Connect attempts after the first attempt of a session.");
    pub(super) const UNLOGGED: Family = counter("tidegate_transitions_unlogged_total", "Backend state changes not logged because of the rate limit per pool.");
    pub(super) const REPORTS_DROPPED: Family = counter("tidegate_reports_dropped_total", "Worker reports dropped because the queue of the control thread was full.");
    pub(super) const ACCESS_LOG_DROPPED: Family = counter("tidegate_access_log_dropped_total", "Access-log lines dropped because the queue was full.");

    pub(super) const LOG_DROPPED: Family = counter("tidegate_log_dropped_total", "Log lines dropped because the log reader was too slow or its disk was full.");

    pub(super) const OPEN_FDS: Family = gauge("process_open_fds", "Open file descriptors.");
    pub(super) const MAX_FDS: Family = gauge("process_max_fds", "Limit on open file descriptors.");
    pub(super) const RESIDENT: Family = gauge("process_resident_memory_bytes", "Resident memory.");
    pub(super) const CPU: Family = counter("process_cpu_seconds_total", "User and system CPU time.");
    pub(super) const START_TIME: Family = gauge("process_start_time_seconds", "Start time of the process, in seconds since 1970-01-01 UTC.");
}

/// A backend with series of its own.
struct BackendRow<'a> {
    status: &'a BackendStatus,
    /// Whether its pool accepts heartbeats.
    heartbeats: bool,
    /// Its labels as exposition text.
    labels: String,
}

/// Returns the text of `/metrics`.
pub fn render(
    snapshot: &AdminSnapshot,
    latency: &MergedHistograms,
    facts: &ProcessFacts,
) -> String {
    let mut out = Encoder::new();
    let count: usize = snapshot.control.pools.iter().map(|pool| pool.backends.len()).sum();
    let each = if count <= snapshot.backend_metrics_max { each(snapshot) } else { Vec::new() };
    whole(&mut out, snapshot);
    frontends(&mut out, &snapshot.control.frontends);
    session_ends(&mut out, snapshot);
    pools(&mut out, snapshot, count - each.len());
    backends(&mut out, &each);
    heartbeats::render(&mut out, snapshot, &each);
    sources::render(&mut out, snapshot);
    histograms(&mut out, latency, &each);
    source_ports(&mut out, snapshot, &each);
    leaving(&mut out, snapshot);
    workers(&mut out, snapshot);
    process(&mut out, facts);
    out.finish()
}

fn each(snapshot: &AdminSnapshot) -> Vec<BackendRow<'_>> {
    let pools = snapshot.control.pools.iter();
    let all = pools.flat_map(|pool| pool.backends.iter().map(move |backend| (pool, backend)));
    let one = |(pool, status): (&PoolStatus, _)| BackendRow {
        status,
        heartbeats: pool.heartbeats,
        labels: prepared(&[("pool", &status.state.pool), ("backend", &status.state.name)]),
    };
    all.map(one).collect()
}

fn pools(out: &mut Encoder, snapshot: &AdminSnapshot, omitted: usize) {
    let pools = &snapshot.control.pools;
    let mut samples = out.family(&families::POOL_BACKENDS);
    for pool in pools {
        samples.count(&[("pool", &pool.name)], pool.backends.len() as u64);
    }
    let mut samples = out.family(&families::POOL_ELIGIBLE);
    for pool in pools {
        let eligible = pool.backends.iter().filter(|backend| backend.eligible).count();
        samples.count(&[("pool", &pool.name)], eligible as u64);
    }
    out.family(&families::OMITTED).count(&[], omitted as u64);
}

fn whole(out: &mut Encoder, snapshot: &AdminSnapshot) {
    let version = [("version", snapshot.version), ("engine", snapshot.engine)];
    out.family(&families::BUILD_INFO).count(&version, 1);
    out.family(&families::UPTIME).value(&[], snapshot.uptime.as_secs_f64());
    out.family(&families::WORKERS).count(&[], snapshot.workers.len() as u64);
    let draining = snapshot.state == ServiceState::Draining;
    out.family(&families::DRAINING).count(&[], draining.into());
    out.family(&families::TABLE_GENERATION).count(&[], snapshot.control.generation);
    out.family(&families::TABLE_SERIAL).count(&[], snapshot.table_serial);
    let mut reloads = out.family(&families::RELOADS);
    reloads.count(&[("result", "changed")], snapshot.reloads.changed);
    reloads.count(&[("result", "unchanged")], snapshot.reloads.unchanged);
    reloads.count(&[("result", "refused")], snapshot.reloads.refused);
    let mut upgrades = out.family(&families::UPGRADES);
    upgrades.count(&[("result", "done")], snapshot.upgrades.done);
    upgrades.count(&[("result", "failed")], snapshot.upgrades.failed);
    upgrades.count(&[("result", "refused")], snapshot.upgrades.refused);
    out.family(&families::RESTART_NEEDED).count(&[], snapshot.warnings.len() as u64);
    out.family(&families::STATE_UNWRITTEN).count(&[], snapshot.state_unwritten);
    out.family(&families::ADMIN_DROPPED).count(&[], snapshot.admin_dropped);
    out.family(&families::STREAMS).count(&[], snapshot.streams.open() as u64);
    out.family(&families::STREAMS_DROPPED).count(&[], snapshot.streams.dropped());
    out.family(&families::STREAMS_REFUSED).count(&[], snapshot.streams.refused());
    out.family(&families::EVENTS).count(&[], snapshot.events.recorded);
    out.family(&families::EVENTS_DROPPED).count(&[], snapshot.events.dropped);
    let mut confinement = out.family(&families::CONFINEMENT);
    for layer in snapshot.confinement.layers() {
        confinement.count(&[("layer", layer.layer)], layer.in_force.into());
    }
    out.family(&families::CONNECTIONS_ACTIVE).count(&[], snapshot.connections_active.into());
    out.family(&families::CONNECTIONS_MAX).count(&[], snapshot.connections_max.into());
    let pools = sum(snapshot, |w| w.ring_held.get());
    out.family(&families::BUFFERED).count(&[], snapshot.buffers.used() as u64 + pools);
    out.family(&families::BUFFERS_MAX).count(&[], snapshot.buffers.max() as u64);
    out.family(&families::BUFFERS_REFUSED).count(&[], snapshot.buffers_refused);
}

fn frontends(out: &mut Encoder, frontends: &[FrontendStatus]) {
    let mut samples = out.family(&families::SESSIONS);
    for frontend in frontends {
        let total = frontend.state.counters.sum(|c| c.sessions.get());
        samples.count(&[("frontend", &frontend.state.name)], total);
    }
    let mut samples = out.family(&families::SESSIONS_ACTIVE);
    for frontend in frontends {
        let active = frontend.state.in_flight.get();
        samples.count(&[("frontend", &frontend.state.name)], active.into());
    }
    let mut samples = out.family(&families::BYTES);
    for frontend in frontends {
        let (name, counters) = (&*frontend.state.name, &frontend.state.counters);
        let (bytes_in, bytes_out) =
            (counters.sum(|c| c.bytes_in.get()), counters.sum(|c| c.bytes_out.get()));
        samples.count(&[("frontend", name), ("direction", "in")], bytes_in);
        samples.count(&[("frontend", name), ("direction", "out")], bytes_out);
    }
    let mut samples = out.family(&families::REFUSED);
    for frontend in frontends {
        for reason in RefusedReason::ALL {
            let total = frontend.state.counters.sum(|c| c.refused.cell(reason as usize, 0).get());
            let labels = [("frontend", &*frontend.state.name), ("reason", reason.name())];
            samples.count(&labels, total);
        }
    }
    let mut samples = out.family(&families::SOURCES_UNTRACKED);
    for frontend in frontends {
        let total = frontend.state.counters.sum(|c| c.untracked.get());
        samples.count(&[("frontend", &frontend.state.name)], total);
    }
}

fn session_ends(out: &mut Encoder, snapshot: &AdminSnapshot) {
    let mut samples = out.family(&families::SESSION_END);
    for cause in Cause::ALL {
        for phase in Phase::ALL {
            let cell = |worker: &WorkerCounters| {
                worker.session_end.cell(cause as usize, phase as usize).get()
            };
            let total = sum(snapshot, cell);
            if total > 0 || phase == usual_phase(cause) {
                samples.count(&[("cause", cause.name()), ("phase", phase.name())], total);
            }
        }
    }
}

/// Returns the phase in which sessions with this cause usually end.
fn usual_phase(cause: Cause) -> Phase {
    match cause {
        Cause::Finished => Phase::Closed,
        Cause::ClientReset | Cause::BackendReset | Cause::ClientLost | Cause::BackendLost => {
            Phase::Data
        }
        Cause::ConnectRefused
        | Cause::ConnectTimeout
        | Cause::ConnectFailed
        | Cause::LocalResource => Phase::Connect,
        Cause::NoBackend
        | Cause::Denied
        | Cause::SourceConnections
        | Cause::SourceRate
        | Cause::Route => Phase::Admit,
        Cause::ProxyHeaderMissing
        | Cause::ProxyHeaderMalformed
        | Cause::ProxyHeaderTimeout
        | Cause::ProxyHeaderCrc => Phase::Preread,
        Cause::QueueTimeout | Cause::ClientLeft => Phase::Queue,
        Cause::FirstByteTimeout
        | Cause::IdleTimeout
        | Cause::SessionMax
        | Cause::DrainDeadline
        | Cause::BackendRemoved
        | Cause::BackendDown
        | Cause::BackupReleased
        | Cause::ClosedByOperator
        | Cause::Rebalanced
        | Cause::ResetByOperator
        | Cause::InternalError => Phase::Data,
        Cause::HalfClosedTimeout => Phase::HalfClosed,
    }
}

type BackendValue = fn(&BackendStatus) -> u64;

/// Metrics with one integer per backend.
const BACKEND_VALUES: [(&Family, BackendValue); 10] = [
    (&families::BACKEND_UP, |b| (b.observation != Observation::Down).into()),
    (&families::BACKEND_ELIGIBLE, |b| b.eligible.into()),
    (&families::BACKEND_TIER, |b| b.tier.into()),
    (&families::BACKEND_DRAINING, |b| (b.intent != Intent::Ready).into()),
    (&families::BACKEND_EJECTED, |b| b.ejected.into()),
    (&families::EJECTIONS, |b| b.ejections_total),
    (&families::EJECTIONS_HELD, |b| b.ejections_held_total),
    (&families::BACKEND_IN_FLIGHT, |b| b.state.in_flight.get().into()),
    (&families::BACKEND_SESSIONS, |b| b.state.counters.sum(|c| c.sessions.get())),
    (&families::CONNECT_FAILURES, |b| b.state.counters.sum(|c| c.connect_failures.get())),
];

fn backends(out: &mut Encoder, each: &[BackendRow<'_>]) {
    for (family, value) in BACKEND_VALUES {
        let mut samples = out.family(family);
        for one in each {
            samples.count_of(&one.labels, &[], value(one.status));
        }
    }
    let mut samples = out.family(&families::BACKEND_WEIGHT);
    for one in each {
        samples.value_of(&one.labels, one.status.effective_weight);
    }
    let mut samples = out.family(&families::BACKEND_BYTES);
    for one in each {
        let counters = &one.status.state.counters;
        let bytes_in = counters.sum(|c| c.bytes_in.get());
        samples.count_of(&one.labels, &[("direction", "in")], bytes_in);
        let bytes_out = counters.sum(|c| c.bytes_out.get());
        samples.count_of(&one.labels, &[("direction", "out")], bytes_out);
    }
}

fn source_ports(out: &mut Encoder, snapshot: &AdminSnapshot, each: &[BackendRow<'_>]) {
    let mut samples = out.family(&families::PORTS_USED);
    for one in each.iter().filter(|one| source_ports::has_ports(&one.status.state)) {
        let state = &one.status.state;
        for source in state.source_addrs.load().iter() {
            let address = source.source().map_or_else(|| "any".to_owned(), |ip| ip.to_string());
            let used = snapshot.ports.used(state, source, snapshot.port_limits);
            samples.count_of(&one.labels, &[("source", &address)], used);
        }
    }
    out.family(&families::PORTS_MAX).count(&[], snapshot.port_limits.ports.into());
}

fn histograms(out: &mut Encoder, latency: &MergedHistograms, each: &[BackendRow<'_>]) {
    let all = [
        (&families::CONNECT_SECONDS, Series::Connect),
        (&families::FIRST_BYTE_SECONDS, Series::FirstByte),
        (&families::SESSION_SECONDS, Series::Session),
    ];
    for (family, series) in all {
        let mut samples = out.family(family);
        for one in each {
            if let Some(data) = latency.get(one.status.state.id.0, series) {
                one_histogram(&mut samples, &one.labels, data);
            }
        }
    }
}

fn one_histogram(samples: &mut encoder::Samples<'_>, labels: &str, data: &SeriesData) {
    for (bound, count) in BOUNDS_SECONDS.iter().zip(data.cumulative()) {
        samples.bucket(labels, Some(*bound), count);
    }
    samples.bucket(labels, None, data.count());
    samples.sum_and_count(labels, data.sum_seconds(), data.count());
}

fn leaving(out: &mut Encoder, snapshot: &AdminSnapshot) {
    let leaving = &snapshot.control.leaving;
    out.family(&families::LEAVING_BACKENDS).count(&[], leaving.len() as u64);
    let sessions = leaving.iter().map(|backend| u64::from(backend.in_flight.get())).sum();
    out.family(&families::LEAVING_SESSIONS).count(&[], sessions);
}

type WorkerValue = fn(&WorkerCounters) -> u64;

fn workers(out: &mut Encoder, snapshot: &AdminSnapshot) {
    let names: Vec<String> = (0..snapshot.workers.len()).map(|n| n.to_string()).collect();
    let mut each = |family, value: WorkerValue| {
        let mut samples = out.family(family);
        for (name, worker) in names.iter().zip(&snapshot.workers) {
            samples.count(&[("worker", name)], value(worker));
        }
    };
    each(&families::WORKER_ACCEPTED, |w| w.accepted.get());
    // `ended` is read first, so that `accepted` is never smaller than it.
    each(&families::WORKER_ACTIVE, |w| {
        let ended = w.ended.get();
        w.accepted.get().saturating_sub(ended)
    });
    each(&families::HELD_AT_CAP, |w| w.accept_held_at_cap.get());
    each(&families::WORKER_RESTARTS, |w| w.restarts.get());
    each(&families::WORKER_STALLED, |w| w.pulse.stalled_for().is_some().into());
    each(&families::WORKER_STALLS, |w| w.stalls.get());

    let mut samples = out.family(&families::WORKER_PANICS);
    for (name, worker) in names.iter().zip(&snapshot.workers) {
        for reason in PanicScope::ALL {
            let count = worker.panics.cell(reason as usize, 0).get();
            samples.count(&[("worker", name), ("reason", reason.name())], count);
        }
    }

    let mut samples = out.family(&families::RING_EVENTS);
    for (name, worker) in names.iter().zip(&snapshot.workers) {
        for reason in RingEvent::ALL {
            let count = worker.ring_events.cell(reason as usize, 0).get();
            samples.count(&[("worker", name), ("reason", reason.name())], count);
        }
    }
    let mut samples = out.family(&families::LOCAL_ERRORS);
    for reason in LocalErrorKind::ALL {
        for at in LocalErrorPlace::ALL {
            let cell = |w: &WorkerCounters| w.local_errors.cell(reason as usize, at as usize).get();
            let total = sum(snapshot, cell) + cell(&snapshot.control_counts);
            samples.count(&[("reason", reason.name()), ("at", at.name())], total);
        }
    }
    out.family(&families::UNLOGGED).count(&[], snapshot.transitions_unlogged);
    let mut samples = out.family(&families::QUEUED);
    for pool in &snapshot.control.pools {
        let queued = snapshot.queued.get(&pool.name).copied().unwrap_or_default();
        samples.count(&[("pool", &pool.name)], queued as u64);
    }
    let mut samples = out.family(&families::UNDECIDED);
    for pool in &snapshot.control.pools {
        samples.count(&[("pool", &pool.name)], pool.undecided.into());
    }
    let totals: [(&Family, WorkerValue); 5] = [
        (&families::QUEUED_TOTAL, |w| w.queued.get()),
        (&families::UNDECIDED_WAITS, |w| w.undecided_waits.get()),
        (&families::CONNECT_RETRIES, |w| w.connect_retries.get()),
        (&families::REPORTS_DROPPED, |w| w.reports_dropped.get()),
        (&families::ACCESS_LOG_DROPPED, |w| w.access_log_dropped.get()),
    ];
    for (family, value) in totals {
        out.family(family).count(&[], sum(snapshot, value));
    }
    out.family(&families::PROBES_WAITED).count(&[], snapshot.control_counts.probes_waited.get());
    out.family(&families::COMMANDS_WAITED)
        .count(&[], snapshot.control_counts.commands_waited.get());
    let failures = snapshot.control_counts.helper_failures.get();
    out.family(&families::HELPER_FAILURES).count(&[], failures);
    out.family(&families::HELPER_FAILED).count(&[], snapshot.helper_failed.into());
    out.family(&families::LOG_DROPPED).count(&[], snapshot.log_dropped);
}

fn sum(snapshot: &AdminSnapshot, value: impl Fn(&WorkerCounters) -> u64) -> u64 {
    snapshot.workers.iter().map(|worker| value(worker)).fold(0, u64::wrapping_add)
}

fn process(out: &mut Encoder, facts: &ProcessFacts) {
    let counts = [
        (&families::OPEN_FDS, facts.open_fds),
        (&families::MAX_FDS, facts.max_fds),
        (&families::RESIDENT, facts.resident_bytes),
    ];
    for (family, value) in counts {
        if let Some(value) = value {
            out.family(family).count(&[], value);
        }
    }
    for (family, value) in [(&families::CPU, facts.cpu), (&families::START_TIME, facts.started)] {
        if let Some(value) = value {
            out.family(family).value(&[], value.as_secs_f64());
        }
    }
}

#[cfg(test)]
mod tests;

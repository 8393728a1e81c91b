//! Log, counters, latencies, traffic and port statistics of this process, and the rendering of
//! status and metrics.
//!
//! Owned by the control loop. It has no effect on traffic.

use super::due;
use super::event_log::{EventLog, NewEvent};
use super::logging::LogHandle;
use super::ports::PortSampler;
use super::rendering::{Latencies, Rendering};
use super::traffic::TrafficSampler;
use super::transition_log::TransitionLog;
use super::upgrade::RareCounters;
use crate::admin::{Observables, StreamCounters};
use std::sync::Arc;
use std::time::{Instant, SystemTime};
use tidegate_core::control::{Notice, NoticeFields, NoticeLevel};
use tidegate_core::health::Transition;
use tidegate_core::metrics::counters::WorkerCounters;
use tidegate_core::model::LogLevel;
use tidegate_net::clock;

/// See the module's documentation.
#[derive(Debug)]
pub(super) struct Telemetry {
    pub(super) started: Instant,
    pub(super) started_wall: SystemTime,
    pub(super) latency: Latencies,
    pub(super) rendering: Rendering,
    pub(super) ports: PortSampler,
    pub(super) traffic: TrafficSampler,
    pub(super) events: EventLog,
    pub(super) streams: StreamCounters,
    /// Counters of the control thread.
    local: Arc<WorkerCounters>,
    log: LogHandle,
    transitions: TransitionLog,
    /// Counters of old processes.
    before: RareCounters,
}

/// What the control loop must do.
#[derive(Debug)]
pub(super) enum TelemetryEvent {
    /// A step of rendering status or metrics is due.
    Render,
    /// The next check of local ports is due.
    SamplePorts,
    /// The next sample of the traffic is due.
    SampleTraffic,
    /// The number of suppressed log lines must be logged.
    Suppressed,
}

// === impl Telemetry ===

impl Telemetry {
    pub(super) fn new(
        log: LogHandle,
        observables: Observables,
        local: Arc<WorkerCounters>,
    ) -> Telemetry {
        let Observables { events, streams } = observables;
        Telemetry {
            started: clock::now(),
            started_wall: clock::wall(),
            latency: Latencies::default(),
            rendering: Rendering::default(),
            ports: PortSampler::new(clock::now()),
            traffic: TrafficSampler::new(streams.clone(), clock::now()),
            events,
            streams,
            local,
            log,
            transitions: TransitionLog::default(),
            before: RareCounters::default(),
        }
    }

    /// Waits for the next event.
    pub(super) async fn wake(&mut self) -> TelemetryEvent {
        let (ports_due, transitions_due) = (self.ports.due(), self.transitions.due());
        let traffic_due = self.traffic.due();
        tokio::select! {
            () = self.rendering.due() => TelemetryEvent::Render,
            () = due::reached(Some(ports_due)) => TelemetryEvent::SamplePorts,
            () = due::reached(Some(traffic_due)) => TelemetryEvent::SampleTraffic,
            () = due::reached(transitions_due) => TelemetryEvent::Suppressed,
        }
    }

    /// Returns what the admin API reads without asking the control loop.
    pub(super) fn observables(&self) -> Observables {
        Observables { events: self.events.clone(), streams: self.streams.clone() }
    }

    /// Returns the counters of the control thread.
    pub(super) fn local(&self) -> &Arc<WorkerCounters> {
        &self.local
    }

    /// Changes the log level.
    pub(super) fn set_log_level(&self, level: LogLevel) {
        self.log.set_level(level);
    }

    /// Records a state change of a backend, and logs it within the rate limit of its pool.
    pub(super) fn log_transition(&mut self, transition: &Transition) {
        self.events.record(NewEvent::of_transition(transition));
        self.transitions.log(transition, clock::now());
    }

    /// Logs the number of suppressed state changes.
    pub(super) fn log_suppressed(&mut self) {
        self.transitions.log_suppressed(clock::now());
    }

    /// Records a notice and logs it. Fields without a value are not in the line.
    pub(super) fn log_notice(&self, notice: &Notice) {
        self.events.record(NewEvent::of_notice(notice));
        warn_of(notice);
    }

    /// Sets the counters of old processes. A later call replaces them.
    pub(super) fn restore_counts(&mut self, before: RareCounters) {
        self.before = before;
    }

    /// Returns the counters of rare events, including those of old processes. The
    /// arguments are counters of this process.
    pub(super) fn rare_counters(
        &self,
        admin_dropped: u64,
        buffers_refused: u64,
        unwritten: u64,
    ) -> RareCounters {
        let before = self.before;
        RareCounters {
            log_dropped: before.log_dropped.saturating_add(self.log.dropped()),
            unlogged: before.unlogged.saturating_add(self.transitions.unlogged()),
            admin_dropped: before.admin_dropped.saturating_add(admin_dropped),
            buffers_refused: before.buffers_refused.saturating_add(buffers_refused),
            state_unwritten: before.state_unwritten.saturating_add(unwritten),
        }
    }
}

fn warn_of(notice: &Notice) {
    let Notice { level, pool, backend, message, fields } = notice;
    let NoticeFields {
        reason,
        evidence,
        address,
        source,
        used,
        limit,
        startup_grace,
        registered,
        members,
        joined,
        removed,
        version,
        age,
        late,
        dropped,
        rejected,
        suppressed,
        help,
    } = fields;
    macro_rules! line {
        ($level:ident) => {
            tracing::$level!(
                pool = Some(&**pool).filter(|pool| !pool.is_empty()).map(display),
                backend = backend.as_deref().map(display),
                reason = reason.as_deref(),
                evidence = evidence.as_deref(),
                address = address.as_deref().map(display),
                source = source.as_deref().map(display),
                used,
                limit,
                startup_grace = startup_grace.as_deref().map(display),
                registered,
                members,
                joined,
                removed,
                version = version.as_deref().filter(|text| !text.is_empty()),
                age = age.as_deref().map(display),
                late = late.as_deref().map(display),
                dropped,
                rejected,
                suppressed,
                help = Some(*help).filter(|help| !help.is_empty()),
                "{message}"
            )
        };
    }
    match level {
        NoticeLevel::Info => line!(info),
        NoticeLevel::Warn => line!(warn),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io;
    use std::sync::Mutex;
    use tidegate_logging::logfmt::Logfmt;
    use tracing_subscriber::layer::SubscriberExt;

    #[derive(Clone, Default)]
    struct Lines(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Lines {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn notice_is_a_constant_message_with_fields() {
        let lines = Lines::default();
        let to = lines.clone();
        let layer = tracing_subscriber::fmt::layer()
            .with_writer(move || to.clone())
            .with_ansi(false)
            .without_time()
            .with_target(false)
            .fmt_fields(Logfmt);
        let fields = NoticeFields {
            reason: Some("last eligible backend of the pool".to_owned()),
            limit: Some(3),
            help: "add backends",
            ..NoticeFields::default()
        };
        let message = "ejection prevented; backend stays in rotation";
        let (level, backend) = (NoticeLevel::Warn, Some("a".into()));
        let notice = Notice { level, pool: "web".into(), backend, message, fields };
        tracing::subscriber::with_default(tracing_subscriber::registry().with(layer), || {
            warn_of(&notice);
            warn_of(&Notice { pool: "".into(), backend: None, ..notice.clone() });
        });
        let log = String::from_utf8(lines.0.lock().unwrap().clone()).unwrap();
        let fields = "reason=\"last eligible backend of the pool\" limit=3 help=\"add backends\"";
        let [one, all]: [&str; 2] = log.lines().collect::<Vec<_>>().try_into().unwrap();
        assert_eq!(one.trim_start(), format!("WARN {message} pool=web backend=a {fields}"));
        assert_eq!(all.trim_start(), format!("WARN {message} {fields}"));
    }
}

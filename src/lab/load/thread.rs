//! One generator thread: its clock, its epoll set, its results and the phases of a run.
//!
//! The loops of the modes use [`LoadThread`]. The phases of a run: connect, wait for
//! all threads, the measured time, up to a second for outstanding answers.

use super::ReportWindow;
use super::dial::Dialer;
use super::exchange::RequestLoop;
use super::open_loop::OpenLoop;
use super::plan::{LoadMode, LoadPlan};
use super::stream::StreamLoop;
use crate::load::report::{LoadErrorKind, LoadReport};
use crate::load::threads::ThreadHandle;
use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::io;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::mpsc;
use std::time::{Duration, Instant};
use tidegate_net::clock;
use tidegate_net::epoll::{Epoll, EpollBatch, EpollEvent};

/// Nanoseconds since the start of the thread.
pub(super) type Nanos = u64;

/// Maximum time for connecting. After it the measured time begins without the missing
/// connections.
const SETUP_MAX: Duration = Duration::from_secs(10);

/// Time for outstanding answers after the measured time.
const GRACE: Duration = Duration::from_secs(1);

/// Delay before a lost connection is opened again. It limits the attempts on a refusing
/// target to 100 per second and connection.
const RETRY_AFTER: Nanos = 10_000_000;

/// Maximum number of concurrent connects of a thread during setup. Listen queues hold a
/// few thousand.
pub(super) const CONNECTING_MAX: usize = 256;

/// Size of the receive buffer: usually enough for a socket's whole queue, and small
/// enough for the CPU cache.
pub(super) const BUFFER: usize = 256 * 1024;

/// Maximum sleep of a thread, so that it checks the stop flag.
const SLEEP_MAX: Duration = Duration::from_millis(50);

/// State that all modes share. The fields are visible to the loops, which use all of
/// them.
#[derive(Debug)]
pub(super) struct LoadThread<'a> {
    pub(super) plan: &'a LoadPlan,
    pub(super) handle: &'a ThreadHandle,
    pub(super) dialer: Dialer,
    pub(super) epoll: Epoll,
    /// Results of the whole run, or of the current window.
    pub(super) report: LoadReport,
    pub(super) phase: LoadPhase,
    windows: &'a mpsc::Sender<ReportWindow>,
    /// Sum of the earlier windows.
    past: Option<LoadReport>,
    /// Index of the current window.
    window: u64,
    /// Slots to wake, by time.
    due: BinaryHeap<Reverse<(Nanos, u32)>>,
    /// Open connections.
    pub(super) open: u64,
    began: Instant,
    started: Nanos,
    /// The time that was last read.
    at: Nanos,
}

/// Phase of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum LoadPhase {
    /// Connections are opened. Only these are counted.
    Setup,
    /// The measured time.
    Timed,
    /// Outstanding answers are received; nothing new is sent.
    Grace,
}

/// The loop of one mode.
pub(super) trait ModeLoop {
    /// Starts opening the first connections.
    fn prepare(&mut self, thread: &mut LoadThread<'_>) -> io::Result<()>;
    /// Returns whether every connection is established or has failed.
    fn prepared(&self) -> bool;
    /// Starts the measured time.
    fn begin(&mut self, thread: &mut LoadThread<'_>);
    /// Handles a ready socket.
    fn ready(&mut self, thread: &mut LoadThread<'_>, readiness: EpollEvent);
    /// Handles a slot whose wake time has come.
    fn due(&mut self, thread: &mut LoadThread<'_>, slot: u32);
    /// Called once per turn, for messages that are due by rate. Returns the latest time
    /// of the next call. Most modes do not need it.
    fn turn(&mut self, _lane: &mut LoadThread<'_>) -> Option<Nanos> {
        None
    }
    /// Returns the number of unanswered requests.
    fn unanswered(&self) -> u64;
    /// Ends the measured time.
    fn end(&mut self, _lane: &mut LoadThread<'_>) {}
    /// Counts what is still outstanding, after the last event.
    fn finish(&mut self, thread: &mut LoadThread<'_>) {
        thread.report.fail(LoadErrorKind::Unanswered, self.unanswered());
    }
}

/// Runs one thread of `plan`.
pub(super) fn run(
    plan: &LoadPlan,
    handle: &ThreadHandle,
    windows: &mpsc::Sender<ReportWindow>,
) -> io::Result<LoadReport> {
    let count = handle.share(plan.connections);
    match plan.mode {
        LoadMode::PingPong | LoadMode::Short(_) | LoadMode::Idle | LoadMode::Churn { .. } => {
            drive(plan, handle, windows, |_| Ok(RequestLoop::new(plan, count)))
        }
        LoadMode::Upload | LoadMode::Download => {
            drive(plan, handle, windows, |_| Ok(StreamLoop::new(plan, count)))
        }
        LoadMode::OpenLoop { rate } => {
            let rate = rate / handle.count as f64;
            drive(plan, handle, windows, |thread| OpenLoop::new(thread, count, rate))
        }
    }
}

fn drive<L: ModeLoop>(
    plan: &LoadPlan,
    handle: &ThreadHandle,
    windows: &mpsc::Sender<ReportWindow>,
    build: impl FnOnce(&LoadThread<'_>) -> io::Result<L>,
) -> io::Result<LoadReport> {
    let prepared = LoadThread::new(plan, handle, windows).and_then(|mut thread| {
        let mut mode = build(&thread)?;
        thread.setup(&mut mode)?;
        thread.check_target()?;
        Ok((thread, mode))
    });
    if prepared.is_err() {
        handle.stop();
    }
    // Also after a failure, because the other threads wait for all.
    handle.wait_for_all();
    let (mut thread, mut mode) = prepared?;
    thread.timed(&mut mode)?;
    thread.grace(&mut mode)?;
    Ok(thread.whole())
}

// === impl LoadThread ===

impl<'a> LoadThread<'a> {
    fn new(
        plan: &'a LoadPlan,
        handle: &'a ThreadHandle,
        windows: &'a mpsc::Sender<ReportWindow>,
    ) -> io::Result<LoadThread<'a>> {
        Ok(LoadThread {
            plan,
            handle,
            dialer: Dialer::new(plan, handle.index),
            epoll: Epoll::new()?,
            report: LoadReport::new(),
            phase: LoadPhase::Setup,
            windows,
            past: None,
            window: 0,
            due: BinaryHeap::with_capacity(handle.share(plan.connections)),
            open: 0,
            began: clock::now(),
            started: 0,
            at: 0,
        })
    }

    /// Reads the clock.
    #[inline]
    pub(super) fn tick(&mut self) -> Nanos {
        self.at = nanos(clock::now().duration_since(self.began));
        self.at
    }

    /// Returns the time that was last read: at the earliest, the time of the current
    /// batch of events.
    #[inline]
    pub(super) fn at(&self) -> Nanos {
        self.at
    }

    /// Returns the start of the measured time.
    pub(super) fn started(&self) -> Nanos {
        self.started
    }

    /// Wakes `slot` at `when`.
    pub(super) fn wake(&mut self, slot: u32, when: Nanos) {
        self.due.push(Reverse((when, slot)));
    }

    /// Counts a connection that failed or was lost, and schedules the next attempt.
    pub(super) fn lost(&mut self, slot: u32, kind: LoadErrorKind) {
        // Connections that peers close at the end of a run are not errors.
        if self.phase != LoadPhase::Grace {
            self.report.fail(kind, 1);
            self.handle.gauge().errors.fetch_add(1, Relaxed);
        }
        let when = self.at + RETRY_AFTER;
        self.wake(slot, when);
    }

    /// Counts an established connection.
    pub(super) fn opened(&mut self) {
        self.open += 1;
        self.report.opened += 1;
        self.report.opened_timed += u64::from(self.phase == LoadPhase::Timed);
    }

    fn setup(&mut self, mode: &mut impl ModeLoop) -> io::Result<()> {
        let until = nanos(SETUP_MAX);
        mode.prepare(self)?;
        let mut batch = EpollBatch::new();
        while !mode.prepared() && !self.handle.stopped() && self.at < until {
            self.step(mode, &mut batch, until)?;
        }
        Ok(())
    }

    /// Fails if no connection was established during setup, so that the error is
    /// reported before the run. In the mode short, connections start only with the
    /// measured time.
    fn check_target(&self) -> io::Result<()> {
        if self.report.opened > 0 || matches!(self.plan.mode, LoadMode::Short(_)) {
            return Ok(());
        }
        let kinds: Vec<_> = self.report.errors_by_name().map(|(name, _)| name).collect();
        let why = if kinds.is_empty() {
            "no answer".to_owned()
        } else {
            kinds.join(", ").replace('_', " ")
        };
        Err(io::Error::other(format!("cannot connect to {}: {why}", self.plan.target)))
    }

    fn timed(&mut self, mode: &mut impl ModeLoop) -> io::Result<()> {
        self.phase = LoadPhase::Timed;
        self.started = self.tick();
        let until = self.started + nanos(self.plan.duration);
        self.handle.gauge().started.store(true, Relaxed);
        mode.begin(self);
        let mut batch = EpollBatch::new();
        while self.at < until && !self.handle.stopped() {
            self.step(mode, &mut batch, until)?;
            self.turn_window();
        }
        let elapsed = self.tick() - self.started;
        self.report.elapsed = Duration::from_nanos(elapsed);
        Ok(())
    }

    /// If the current window has ended, sends it and starts the next one.
    fn turn_window(&mut self) {
        let Some(span) = self.plan.window.map(nanos) else { return };
        let begun = self.started + span.saturating_mul(self.window);
        if self.at < begun.saturating_add(span) {
            return;
        }
        self.report.elapsed = Duration::from_nanos(self.at - begun);
        let over = std::mem::replace(&mut self.report, LoadReport::new());
        self.past = Some(match self.past.take() {
            Some(past) => past.merge(&over),
            None => over.clone(),
        });
        // If the receiver is gone, the sum is still needed.
        let _ = self.windows.send((self.window, over));
        // A thread that was delayed by more than a window skips the missed windows.
        self.window = (self.at - self.started) / span.max(1);
    }

    /// Returns the results of all windows.
    fn whole(self) -> LoadReport {
        match self.past {
            // `elapsed` of the last part covers the whole measured time.
            Some(past) => self.report.merge(&past),
            None => self.report,
        }
    }

    fn grace(&mut self, mode: &mut impl ModeLoop) -> io::Result<()> {
        mode.end(self);
        self.phase = LoadPhase::Grace;
        let until = self.at + nanos(GRACE);
        let mut batch = EpollBatch::new();
        while mode.unanswered() > 0 && self.at < until {
            self.step(mode, &mut batch, until)?;
        }
        mode.finish(self);
        Ok(())
    }

    /// Runs one turn: waits for events, then lets the loop handle them.
    fn step(
        &mut self,
        mode: &mut impl ModeLoop,
        batch: &mut EpollBatch,
        until: Nanos,
    ) -> io::Result<()> {
        let turn = mode.turn(self);
        let next = self.due.peek().map_or(until, |Reverse((when, _))| (*when).min(until));
        // A mode wakes up with its own timer in the epoll set. Only a time that has
        // already passed matters here.
        let timeout = match turn {
            Some(when) if when <= self.at => Duration::ZERO,
            _ => Duration::from_nanos(next.saturating_sub(self.at)).min(SLEEP_MAX),
        };
        self.epoll.wait(batch, timeout)?;
        self.tick();
        for index in 0..batch.len() {
            mode.ready(self, batch.get(index));
        }
        self.wake_due(mode);
        self.show();
        Ok(())
    }

    fn wake_due(&mut self, mode: &mut impl ModeLoop) {
        if self.due.is_empty() {
            return;
        }
        let now = self.at;
        while let Some(Reverse((when, slot))) = self.due.peek().copied() {
            if when > now {
                return;
            }
            self.due.pop();
            mode.due(self, slot);
        }
    }

    fn show(&self) {
        let gauge = self.handle.gauge();
        let holds = matches!(self.plan.mode, LoadMode::Idle | LoadMode::Churn { .. });
        let units = |report: &LoadReport| if holds { report.opened } else { report.requests };
        let bytes = |report: &LoadReport| report.bytes_in + report.bytes_out;
        let before = self.past.as_ref().map_or((0, 0), |past| (units(past), bytes(past)));
        gauge.units.store(before.0 + units(&self.report), Relaxed);
        gauge.bytes.store(before.1 + bytes(&self.report), Relaxed);
        gauge.open.store(self.open, Relaxed);
    }
}

/// Converts to nanoseconds; `u64` holds five centuries.
pub(super) fn nanos(duration: Duration) -> Nanos {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

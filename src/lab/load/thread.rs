//! One generator thread: its clock, its epoll set, its count, and the order of
//! a run.
//!
//! The loops of each mode are built on [`LoadThread`]. A run is: connections are
//! made, all threads meet, the measured time, a short wait for answers still
//! out, the end.

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

/// Nanoseconds since the thread began.
pub(super) type Nanos = u64;

/// How long connections may take to stand before the measured time begins
/// without those that do not.
const SETUP_MAX: Duration = Duration::from_secs(10);

/// How long answers may come in after the measured time.
const GRACE: Duration = Duration::from_secs(1);

/// A lost connection is tried again after this: a target that refuses is asked
/// a hundred times a second by each connection, not as fast as a core can.
const RETRY_AFTER: Nanos = 10_000_000;

/// Connections of one thread that may be under way at once during set-up; the
/// kernel's accept queues hold a few thousand.
pub(super) const CONNECTING_MAX: usize = 256;

/// Received bytes go here: big enough for a socket's whole queue more often
/// than not, small enough to stay in the cache.
pub(super) const BUFFER: usize = 256 * 1024;

/// A thread never sleeps longer: it looks at the stop flag.
const SLEEP_MAX: Duration = Duration::from_millis(50);

/// What all modes share. Public within the module: the loops use every part.
#[derive(Debug)]
pub(super) struct LoadThread<'a> {
    pub(super) plan: &'a LoadPlan,
    pub(super) place: &'a ThreadHandle,
    pub(super) dialer: Dialer,
    pub(super) epoll: Epoll,
    /// Of the whole run or, where it has windows, since the last of them.
    pub(super) report: LoadReport,
    pub(super) phase: LoadPhase,
    windows: &'a mpsc::Sender<ReportWindow>,
    /// The windows so far, and how many they are.
    past: Option<LoadReport>,
    window: u64,
    /// Slots to wake, with when.
    due: BinaryHeap<Reverse<(Nanos, u32)>>,
    /// Connections that stand now.
    pub(super) open: u64,
    began: Instant,
    started: Nanos,
    /// The time last read.
    at: Nanos,
}

/// Where in its run the thread is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum LoadPhase {
    /// Connections are made; nothing is counted but they.
    Setup,
    /// The measured time.
    Timed,
    /// Answers still out may come in; nothing new is begun.
    Grace,
}

/// The loop of one mode.
pub(super) trait ModeLoop {
    /// Begins to make the first connections.
    fn prepare(&mut self, lane: &mut LoadThread<'_>) -> io::Result<()>;
    /// Whether every connection stands or has failed.
    fn prepared(&self) -> bool;
    /// The measured time begins.
    fn begin(&mut self, lane: &mut LoadThread<'_>);
    /// A socket is ready.
    fn ready(&mut self, lane: &mut LoadThread<'_>, readiness: EpollEvent);
    /// A slot's time has come.
    fn due(&mut self, lane: &mut LoadThread<'_>, slot: u32);
    /// Once for each turn, for what is due by rate; gives when to be called
    /// again at the latest. Most modes have nothing of the sort.
    fn turn(&mut self, _lane: &mut LoadThread<'_>) -> Option<Nanos> {
        None
    }
    /// Requests still without an answer.
    fn unanswered(&self) -> u64;
    /// The measured time is over.
    fn end(&mut self, _lane: &mut LoadThread<'_>) {}
    /// Nothing more will come; what is still out is counted here.
    fn finish(&mut self, lane: &mut LoadThread<'_>) {
        lane.report.fail(LoadErrorKind::Unanswered, self.unanswered());
    }
}

/// Runs one thread of `plan`.
pub(super) fn run(
    plan: &LoadPlan,
    place: &ThreadHandle,
    windows: &mpsc::Sender<ReportWindow>,
) -> io::Result<LoadReport> {
    let count = place.share(plan.connections);
    match plan.mode {
        LoadMode::PingPong | LoadMode::Short(_) | LoadMode::Idle | LoadMode::Churn { .. } => {
            drive(plan, place, windows, |_| Ok(RequestLoop::new(plan, count)))
        }
        LoadMode::Upload | LoadMode::Download => {
            drive(plan, place, windows, |_| Ok(StreamLoop::new(plan, count)))
        }
        LoadMode::OpenLoop { rate } => {
            let rate = rate / place.count as f64;
            drive(plan, place, windows, |lane| OpenLoop::new(lane, count, rate))
        }
    }
}

fn drive<L: ModeLoop>(
    plan: &LoadPlan,
    place: &ThreadHandle,
    windows: &mpsc::Sender<ReportWindow>,
    build: impl FnOnce(&LoadThread<'_>) -> io::Result<L>,
) -> io::Result<LoadReport> {
    let prepared = LoadThread::new(plan, place, windows).and_then(|mut lane| {
        let mut mode = build(&lane)?;
        lane.setup(&mut mode)?;
        lane.someone_there()?;
        Ok((lane, mode))
    });
    if prepared.is_err() {
        place.stop();
    }
    // Whoever failed comes too: the others wait for everybody.
    place.wait_for_all();
    let (mut lane, mut mode) = prepared?;
    lane.timed(&mut mode)?;
    lane.grace(&mut mode)?;
    Ok(lane.whole())
}

// === impl LoadThread ===

impl<'a> LoadThread<'a> {
    fn new(
        plan: &'a LoadPlan,
        place: &'a ThreadHandle,
        windows: &'a mpsc::Sender<ReportWindow>,
    ) -> io::Result<LoadThread<'a>> {
        Ok(LoadThread {
            plan,
            place,
            dialer: Dialer::new(plan, place.index),
            epoll: Epoll::new()?,
            report: LoadReport::new(),
            phase: LoadPhase::Setup,
            windows,
            past: None,
            window: 0,
            due: BinaryHeap::with_capacity(place.share(plan.connections)),
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

    /// The time when it was last read: no older than the current batch of
    /// events.
    #[inline]
    pub(super) fn at(&self) -> Nanos {
        self.at
    }

    /// When the measured time began.
    pub(super) fn started(&self) -> Nanos {
        self.started
    }

    /// Has `slot` woken at `when`.
    pub(super) fn wake(&mut self, slot: u32, when: Nanos) {
        self.due.push(Reverse((when, slot)));
    }

    /// A connection could not be had or broke: it is counted and tried again a
    /// little later.
    pub(super) fn lost(&mut self, slot: u32, kind: LoadErrorKind) {
        // What peers cut while the run ends is no finding.
        if self.phase != LoadPhase::Grace {
            self.report.fail(kind, 1);
            self.place.gauge().errors.fetch_add(1, Relaxed);
        }
        let when = self.at + RETRY_AFTER;
        self.wake(slot, when);
    }

    /// A connection stands.
    pub(super) fn opened(&mut self) {
        self.open += 1;
        self.report.opened += 1;
        self.report.opened_timed += u64::from(self.phase == LoadPhase::Timed);
    }

    fn setup(&mut self, mode: &mut impl ModeLoop) -> io::Result<()> {
        let until = nanos(SETUP_MAX);
        mode.prepare(self)?;
        let mut batch = EpollBatch::new();
        while !mode.prepared() && !self.place.stopped() && self.at < until {
            self.step(mode, &mut batch, until)?;
        }
        Ok(())
    }

    /// A target nobody answers at is found out now, not after the whole run.
    /// Short connections begin with the measured time; only it can tell.
    fn someone_there(&self) -> io::Result<()> {
        if self.report.opened > 0 || matches!(self.plan.mode, LoadMode::Short(_)) {
            return Ok(());
        }
        let kinds: Vec<_> = self.report.errors_by_name().map(|(name, _)| name).collect();
        let why = if kinds.is_empty() { "no answer".to_owned() } else { kinds.join(", ") };
        Err(io::Error::other(format!("cannot connect to {}: {why}", self.plan.target)))
    }

    fn timed(&mut self, mode: &mut impl ModeLoop) -> io::Result<()> {
        self.phase = LoadPhase::Timed;
        self.started = self.tick();
        let until = self.started + nanos(self.plan.duration);
        self.place.gauge().started.store(true, Relaxed);
        mode.begin(self);
        let mut batch = EpollBatch::new();
        while self.at < until && !self.place.stopped() {
            self.step(mode, &mut batch, until)?;
            self.turn_window();
        }
        let elapsed = self.tick() - self.started;
        self.report.elapsed = Duration::from_nanos(elapsed);
        Ok(())
    }

    /// Where a window is over, hands it out and begins the next one.
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
        // Whoever wanted them has gone; the sum is still wanted.
        let _ = self.windows.send((self.window, over));
        // A thread that was held up for longer than a window skips what it missed.
        self.window = (self.at - self.started) / span.max(1);
    }

    /// Everything measured, all windows together.
    fn whole(self) -> LoadReport {
        match self.past {
            // The last part's elapsed counts from the beginning.
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

    /// One turn: waits, and has the loop handle what came.
    fn step(
        &mut self,
        mode: &mut impl ModeLoop,
        batch: &mut EpollBatch,
        until: Nanos,
    ) -> io::Result<()> {
        let turn = mode.turn(self);
        let next = self.due.peek().map_or(until, |Reverse((when, _))| (*when).min(until));
        // What a mode is due itself it wakes for with a timer in the set; here
        // only the moment that is already past matters.
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
        let gauge = self.place.gauge();
        let holds = matches!(self.plan.mode, LoadMode::Idle | LoadMode::Churn { .. });
        let units = |report: &LoadReport| if holds { report.opened } else { report.requests };
        let bytes = |report: &LoadReport| report.bytes_in + report.bytes_out;
        let before = self.past.as_ref().map_or((0, 0), |past| (units(past), bytes(past)));
        gauge.units.store(before.0 + units(&self.report), Relaxed);
        gauge.bytes.store(before.1 + bytes(&self.report), Relaxed);
        gauge.open.store(self.open, Relaxed);
    }
}

/// In nanoseconds; five centuries fit.
pub(super) fn nanos(duration: Duration) -> Nanos {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

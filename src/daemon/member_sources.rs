//! The member sources (files, HTTP, DNS, registries) as a part of the control loop.
//!
//! Owned by the control loop. The sources run on a thread of their own, and this part takes
//! their finished answers. It asks nothing itself and decides nothing: the controller's
//! views do. It also decides when the views are written to the state directory.

use super::control_loop::Control;
use super::due;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tidegate_core::control::ControlEvent;
use tidegate_core::model::{Config, SourceKey};
use tidegate_discovery::resolver::Resolver;
use tidegate_discovery::tell::{Answers, SourceAnswer, SourceCounters};
use tidegate_discovery::thread::DiscoveryThread;
use tidegate_net::clock;

/// Shortest time between two turns of handling answers.
const TURN_MIN: Duration = Duration::from_millis(20);

/// The next turn waits for this many times the duration of the last one, so that large and
/// frequent answers use at most about a tenth of the control thread.
const TURN_SHARE: u32 = 10;

/// Longest wait for the next turn. Thousands of members that join together can take longer
/// than a tenth of it, and the next change must not wait for several seconds.
const TURN_MAX: Duration = Duration::from_millis(500);

/// Shortest time between two writes of the views.
const SAVE_MIN: Duration = Duration::from_secs(1);

/// Time from the end of the thread to its restart. It doubles up to [`RESTART_MAX`] while the
/// thread ends again within that time.
const RESTART_MIN: Duration = Duration::from_secs(1);

/// Longest time from the end of the thread to its restart.
const RESTART_MAX: Duration = Duration::from_secs(60);

/// See the module's documentation.
#[derive(Debug, Default)]
pub(super) struct MemberSources {
    answers: Answers,
    /// `None` without member sources, or while another process asks them.
    thread: Option<DiscoveryThread>,
    /// No answer is taken before this time.
    not_before: Option<Instant>,
    /// When the changed views are written.
    save_at: Option<Instant>,
    restart: ThreadRestart,
}

/// Restarts of the thread after its end.
#[derive(Debug, Default)]
struct ThreadRestart {
    /// `None`: the thread runs, or no thread is needed.
    at: Option<Instant>,
    /// The start of the thread that runs.
    started: Option<Instant>,
    in_row: u32,
    count: u64,
}

/// What the control loop must do.
#[derive(Debug)]
pub(super) enum SourceEvent {
    /// Answers wait.
    Answers,
    /// The changed views must be written.
    Save,
    /// The thread of the sources panicked.
    Ended,
    /// It must start again.
    Restart,
}

// === impl MemberSources ===

impl MemberSources {
    /// Asks the sources of `config`, and no others.
    pub(super) fn configure(&mut self, config: &Config) {
        let sources: Vec<_> =
            config.member_sources().map(|(key, question, _)| (key, question)).collect();
        if sources.is_empty() {
            self.stop();
            return;
        }
        if self.thread.is_none() {
            match DiscoveryThread::start(self.answers.clone()) {
                Ok(thread) => {
                    self.restart.started = Some(clock::now());
                    self.thread = Some(thread);
                }
                Err(error) => tracing::error!(
                    %error,
                    "cannot start the thread of the member sources; pools keep their present members until a reload"
                ),
            }
        }
        if let Some(thread) = &self.thread {
            thread.configure(sources, config.dns.clone());
        }
    }

    /// Stops to ask, because another process asks or this process ends.
    pub(super) fn stop(&mut self) {
        self.restart.at = None;
        if let Some(thread) = self.thread.take() {
            // Waits for the end of the thread, which the control thread must not.
            tokio::task::spawn_blocking(move || drop(thread));
        }
    }

    /// Waits for the next event.
    pub(super) async fn wake(&self) -> SourceEvent {
        let answers = async {
            due::reached(self.not_before.or(Some(clock::now()))).await;
            self.answers.arrived().await;
        };
        tokio::select! {
            () = answers => SourceEvent::Answers,
            () = due::reached(self.save_at) => SourceEvent::Save,
            () = self.ended() => SourceEvent::Ended,
            () = due::reached(self.restart.at) => SourceEvent::Restart,
        }
    }

    async fn ended(&self) {
        match &self.thread {
            Some(thread) => thread.ended().await,
            None => std::future::pending().await,
        }
    }

    /// Reports the end of the thread and schedules its restart.
    fn thread_ended(&mut self) {
        let Some(thread) = &self.thread else { return };
        thread.tell_ended();
        let now = clock::now();
        let delay = self.restart.schedule(now);
        tracing::error!(
            restarts = self.restart.count,
            restart_in_s = delay.as_secs(),
            "thread of the member sources panicked; pools keep their members until it restarts"
        );
    }

    fn restart_thread(&mut self) {
        self.restart.at = None;
        let Some(thread) = &mut self.thread else { return };
        match thread.restart() {
            Ok(()) => {
                self.restart.count += 1;
                self.restart.started = Some(clock::now());
                tracing::info!("thread of the member sources restarted");
            }
            Err(error) => {
                let delay = self.restart.schedule(clock::now());
                tracing::error!(
                    %error,
                    retry_in_s = delay.as_secs(),
                    "cannot restart the thread of the member sources; pools keep their members"
                );
            }
        }
    }

    /// The sentence for status while no thread asks the sources.
    pub(super) fn warning(&self) -> Option<String> {
        self.restart.at.map(|_| {
            "the thread of the member sources panicked and restarts; pools keep their members"
                .to_owned()
        })
    }

    /// Returns how often the thread was restarted after a panic.
    pub(super) fn thread_restarts(&self) -> u64 {
        self.restart.count
    }

    /// Returns the resolver of the sources.
    pub(super) fn resolver(&self) -> Option<Resolver> {
        self.thread.as_ref().map(|thread| thread.resolver().clone())
    }

    /// Returns the counters of all sources that are asked.
    pub(super) fn counters(&self) -> HashMap<SourceKey, Arc<SourceCounters>> {
        self.thread.iter().flat_map(DiscoveryThread::counters).collect()
    }
}

// === impl ThreadRestart ===

impl ThreadRestart {
    /// Schedules the next start. The delay doubles while the thread ends soon after its start.
    fn schedule(&mut self, now: Instant) -> Duration {
        let ran = self.started.take().map(|at| now.saturating_duration_since(at));
        if ran.is_some_and(|ran| ran > RESTART_MAX) {
            self.in_row = 0;
        }
        let delay = RESTART_MIN.saturating_mul(1 << self.in_row.min(16)).min(RESTART_MAX);
        self.in_row = self.in_row.saturating_add(1);
        self.at = Some(now + delay);
        delay
    }
}

impl Control {
    /// Handles an event of the member sources.
    pub(super) fn source_event(&mut self, event: SourceEvent) {
        match event {
            SourceEvent::Answers => self.take_answers(),
            SourceEvent::Ended => self.sources.thread_ended(),
            SourceEvent::Restart => self.sources.restart_thread(),
            SourceEvent::Save => {
                self.sources.save_at = None;
                self.state.write_views(|| self.controller.save_views(clock::now()));
            }
        }
    }

    /// Schedules a write of the views if they have changed.
    pub(super) fn note_views(&mut self) {
        let changed = self.state.is_open() && self.controller.views_changed();
        if changed && self.sources.save_at.is_none() {
            self.sources.save_at = Some(clock::now() + SAVE_MIN);
        }
    }

    fn take_answers(&mut self) {
        let began = clock::now();
        let told = self.sources.answers.take().into_iter();
        self.feed(told.map(|SourceAnswer { key, told, at }| ControlEvent::Told { key, told, at }));
        let now = clock::now();
        let took = now.saturating_duration_since(began);
        self.sources.not_before = Some(now + (took * TURN_SHARE).clamp(TURN_MIN, TURN_MAX));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tidegate_core::discovery::Told;

    #[test]
    fn delay_of_restarts_doubles_while_the_thread_ends_at_once() {
        let (mut restart, now) = (ThreadRestart::default(), clock::now());
        let delays = [1, 2, 4, 8, 16, 32, 60, 60].map(Duration::from_secs);
        for delay in delays {
            restart.started = Some(now);
            assert_eq!(restart.schedule(now), delay);
        }
        restart.started = Some(now);
        assert_eq!(restart.schedule(now + Duration::from_secs(61)), RESTART_MIN);
    }

    /// Handles events up to the next whole set, and returns whether the thread ended.
    async fn until_whole(sources: &mut MemberSources) -> bool {
        let mut ended = false;
        loop {
            match sources.wake().await {
                SourceEvent::Answers => {
                    let answers = sources.answers.take();
                    if answers.iter().any(|answer| matches!(answer.told, Told::Whole(_))) {
                        return ended;
                    }
                }
                SourceEvent::Ended => {
                    sources.thread_ended();
                    assert!(sources.warning().is_some());
                    ended = true;
                }
                SourceEvent::Restart => sources.restart_thread(),
                SourceEvent::Save => panic!(),
            }
        }
    }

    #[tokio::test]
    async fn thread_that_panicked_is_shown_and_asks_again() {
        let dir = tempfile::tempdir().unwrap();
        let list = dir.path().join("list");
        std::fs::write(&list, "[\"10.0.0.1:80\"]").unwrap();
        let text = format!(
            "frontend.web = {{ bind = \"127.0.0.1:8080\", pool = \"web\" }}\n\
             pool.web.discover = {{ kind = \"file\", path = \"{}\" }}\n",
            list.display()
        );
        let mut sources = MemberSources::default();
        sources.configure(&tidegate_config::parse(&text, "test.toml").unwrap());
        assert!(!until_whole(&mut sources).await);
        let panicking = async {
            sources.thread.as_ref().unwrap().panic_on_purpose();
            until_whole(&mut sources).await
        };
        let ended = tokio::time::timeout(Duration::from_secs(20), panicking).await;
        assert_eq!(ended, Ok(true));
        assert_eq!((sources.thread_restarts(), sources.warning()), (1, None));
    }
}

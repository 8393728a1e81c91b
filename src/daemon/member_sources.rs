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
}

/// What the control loop must do.
#[derive(Debug)]
pub(super) enum SourceEvent {
    /// Answers wait.
    Answers,
    /// The changed views must be written.
    Save,
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
                Ok(thread) => self.thread = Some(thread),
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
        }
    }

    /// Returns the counters of all sources that are asked.
    pub(super) fn counters(&self) -> HashMap<SourceKey, Arc<SourceCounters>> {
        self.thread.iter().flat_map(DiscoveryThread::counters).collect()
    }
}

impl Control {
    /// Handles an event of the member sources.
    pub(super) fn source_event(&mut self, event: SourceEvent) {
        match event {
            SourceEvent::Answers => self.take_answers(),
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

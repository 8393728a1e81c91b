//! Reloads the configuration file, completely or not at all.
//!
//! Part of the control loop. The watcher, SIGHUP and the admin API start a reload.
//!
//! 1. Prepare: read and validate the file, load the tokens, bind addresses, open the
//!    access log. These steps can fail and change nothing.
//! 2. Commit ([`Control::put_in_force`]): cannot fail.

use super::binds::NewBinds;
use super::config_reloads::{HELD_MAX, ReloadEvent, ReloadRequest, local_error};
use super::control_loop::Control;
use super::event_log::NewEvent;
use super::heartbeats::ReceiverChange;
use super::preflight;
use super::refused::BindError;
use super::reload_diff;
use super::worker_set::access_log_destination;
use crate::admin::{ProblemDoc, ReloadDoc, ReloadError, Token, Tokens};
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tidegate_api::names::{EventKindName, EventLevelName};
use tidegate_config::{self as config, Loaded, Origin, Severity, Spot};
use tidegate_core::control::ControlEvent;
use tidegate_core::metrics::counters::LocalErrorPlace;
use tidegate_core::model::Config;
use tidegate_dataplane::local_errors;

/// How long a reload waits for a retired address to close before it binds it again.
const ADDRESS_WAIT_MAX: Duration = Duration::from_secs(1);
const ADDRESS_WAIT_STEP: Duration = Duration::from_millis(10);

/// The originators of a reload that are not a client, as events name them.
const FILE_CHANGE: &str = "file change";
const RETRY: &str = "retry";
const START: &str = "start";

/// Why a draining process rejects reloads.
const DRAINS: &str = "this process is draining; the next process reads the file";

/// Resources of a new configuration, ready to be put in force.
struct PreparedReload {
    tokens: Tokens,
    fresh: NewBinds,
    heartbeats: ReceiverChange,
}

impl Control {
    /// Handles an event of the watcher or a timer.
    pub(super) async fn reload_event(&mut self, event: ReloadEvent) {
        match event {
            ReloadEvent::FileComplete => self.file_is_complete().await,
            ReloadEvent::IncludesChanged if self.lifecycle.is_draining() => {}
            ReloadEvent::IncludesChanged => {
                self.request_reload(ReloadRequest::by(FILE_CHANGE)).await;
            }
            ReloadEvent::WaitTimeout => self.reject_waiting(),
            // The process that serves after an upgrade reads the file, and a draining
            // process binds nothing.
            ReloadEvent::Retry
                if self.lifecycle.is_draining() || self.upgrades.postpones_reload() =>
            {
                self.reloads.cancel_retry();
            }
            ReloadEvent::Retry => {
                if self.reloads.take_retry() {
                    self.reload_and_retry(RETRY).await;
                }
            }
        }
    }

    /// Reloads if the file was changed before this process watched it. This covers a
    /// reload that the old process postponed because of the upgrade, and a file that was
    /// not used at the start after a crash.
    pub(super) async fn catch_up(&mut self) {
        let digest = self.reloads.digest();
        let same = config::load(self.reloads.path()).is_ok_and(|loaded| loaded.digest == digest);
        if !same || self.supervised.in_force.needs_reload() {
            self.request_reload(ReloadRequest::by(START)).await;
        }
    }

    /// Handles SIGHUP: a reload request without an answer.
    pub(super) async fn reload_by_signal(&mut self) {
        if !self.rejects_reloads("SIGHUP") && !self.upgrades.postpones_reload() {
            self.request_reload(ReloadRequest::by("SIGHUP")).await;
        }
    }

    /// Reloads as soon as the file is complete.
    pub(super) async fn request_reload(&mut self, request: ReloadRequest) {
        let immediate = match self.lifecycle.is_draining() {
            true => Some(request),
            false => self.reloads.hold(request),
        };
        if let Some(request) = immediate {
            self.reload_for(vec![request]).await;
        }
    }

    /// Reads the complete file, for the waiting requests or because it has changed.
    async fn file_is_complete(&mut self) {
        match self.reloads.take_waiting() {
            None => {}
            Some(waiting) if waiting.iter().any(|request| request.reply.is_some()) => {
                self.reload_for(waiting).await;
            }
            Some(_) if self.rejects_reloads(FILE_CHANGE) => {}
            Some(_) if self.upgrades.postpones_reload() => {}
            Some(waiting) if waiting.is_empty() => self.reload_and_retry(FILE_CHANGE).await,
            Some(waiting) => self.reload_and_retry(&originators(&waiting)).await,
        }
    }

    async fn reload_for(&mut self, waiting: Vec<ReloadRequest>) {
        let result = self.reload_on_request(&originators(&waiting)).await;
        for reply in waiting.into_iter().filter_map(|request| request.reply) {
            // Fails if the client has closed its connection.
            let _ = reply.send(result.clone());
        }
    }

    /// Rejects the requests that have waited too long for a writer of the file.
    fn reject_waiting(&mut self) {
        let writing = self.reloads.file_being_written();
        let file = writing.unwrap_or_else(|| self.reloads.path().to_owned());
        let why = format!(
            "{} is still being written; nothing was changed; Tidegate reads it when its writer closes it",
            file.display()
        );
        tracing::error!(held_for = ?HELD_MAX, reason = %why, "reload rejected");
        let refused = self.refuse(why);
        self.reloads.count_refused();
        self.lifecycle.notifier().reloading();
        self.lifecycle.notifier().ready();
        let waiting = self.reloads.drain_waiting();
        self.record_reload(&Err(refused.clone()), &originators(&waiting), Vec::new());
        for reply in waiting.into_iter().filter_map(|request| request.reply) {
            let _ = reply.send(Err(refused.clone()));
        }
    }

    /// Returns whether this process is draining, and counts and logs the rejected
    /// reload. A draining process does not reload because that would open its listeners
    /// again.
    fn rejects_reloads(&mut self, asked_by: &str) -> bool {
        let draining = self.lifecycle.is_draining();
        if draining {
            self.reloads.count_refused();
            tracing::warn!(asked_by, reason = DRAINS, "reload rejected");
        }
        draining
    }

    /// Calls [`Control::reload`]. Rejects the reload while this process drains or an
    /// upgrade is in progress.
    async fn reload_on_request(&mut self, who: &str) -> Result<ReloadDoc, ReloadError> {
        if self.rejects_reloads("admin request") {
            return Err(ReloadError::NotNow(DRAINS));
        }
        if !self.upgrades.postpones_reload() {
            return self.reload(who).await;
        }
        self.reloads.count_refused();
        let why = "an upgrade is in progress; the process that serves after it rereads the file";
        Err(self.refuse(why.to_owned()))
    }

    /// Reloads after a file change or a signal. No client waits for the answer, so the
    /// reload is retried after a local error.
    pub(super) async fn reload_and_retry(&mut self, who: &str) {
        let Err(ReloadError::Problems(problems)) = self.reload(who).await else { return };
        let Some(error) = problems.iter().find_map(|problem| local_error(&problem.message)) else {
            return;
        };
        let kind = local_errors::local_kind(&error);
        self.telemetry.local().count_local_error(kind, LocalErrorPlace::Reload);
        tracing::warn!(%error, "reload postponed because of a local error; retrying");
        self.reloads.retry_later();
    }

    /// Reads the file and puts it in force if it differs from the configuration in force.
    async fn reload(&mut self, who: &str) -> Result<ReloadDoc, ReloadError> {
        self.lifecycle.notifier().reloading();
        let (result, changes) = match self.try_reload().await {
            Ok((reloaded, changes)) => (Ok(reloaded), changes),
            Err(error) => (Err(error), Vec::new()),
        };
        self.record_reload(&result, who, changes);
        self.lifecycle.notifier().ready();
        self.reloads.count(&result);
        match &result {
            Ok(ReloadDoc { changed: true, generation, .. }) => {
                tracing::info!(generation, "configuration applied");
            }
            Err(ReloadError::Problems(problems)) => problems.iter().for_each(log_problem),
            _ => {}
        }
        result
    }

    /// Records the result of a reload. An unchanged file is an event only if the reload was
    /// requested.
    fn record_reload(
        &self,
        result: &Result<ReloadDoc, ReloadError>,
        who: &str,
        changes: Vec<String>,
    ) {
        let generation = self.controller.generation();
        let (level, text) = match result {
            Ok(ReloadDoc { changed: true, warnings, .. }) => match warnings.len() {
                0 => (EventLevelName::Info, "applied".to_owned()),
                more => {
                    (EventLevelName::Warn, format!("applied; warnings: {more}: {}", warnings[0]))
                }
            },
            Ok(_) if matches!(who, FILE_CHANGE | START) => return,
            Ok(_) => (EventLevelName::Info, "reloaded without a change".to_owned()),
            Err(ReloadError::NotNow(why)) => {
                (EventLevelName::Warn, format!("reload rejected: {why}"))
            }
            Err(ReloadError::Problems(problems)) => (EventLevelName::Bad, rejection(problems)),
        };
        let subject = format!("generation {generation}");
        let event = NewEvent::new(EventKindName::Config, level, subject, text);
        self.telemetry.events.record(event.by(who).with_changes(changes));
    }

    /// Returns what it has put in force, and what that changes.
    async fn try_reload(&mut self) -> Result<(ReloadDoc, Vec<String>), ReloadError> {
        let loaded = config::load(self.reloads.path()).map_err(|problems| {
            ReloadError::Problems(problems.list.iter().map(|it| self.problem(it)).collect())
        })?;
        // A token can change without a change of the configuration file.
        let tokens = preflight::load_tokens(&loaded.config, Token::load)
            .map_err(|refusal| self.refused(&preflight::token_problem(&loaded.origin, refusal)))?;
        // Compares the meaning: comments and layout are ignored, and the content of
        // named files is included.
        if loaded.config == **self.reloads.config() {
            return Ok((self.keep_configuration(loaded, tokens), Vec::new()));
        }
        let prepared = self.prepare(&loaded.config, &loaded.origin, tokens).await?;
        Ok(self.put_in_force(loaded, prepared))
    }

    /// Handles a file with the same meaning as before: updates digest and tokens.
    fn keep_configuration(&mut self, loaded: Loaded, tokens: Tokens) -> ReloadDoc {
        self.reloads.set_digest(loaded.digest);
        self.admin.tokens().set(tokens);
        self.supervised.in_force.reloaded(self.reloads.path(), loaded.text, &loaded.config);
        let mut warnings = self.reloads.warnings();
        if let Some(why) = replaced_outside(self.reloads.path()) {
            tracing::warn!(
                reason = %why,
                "configuration file deleted or replaced behind its mount; the old content stays in effect"
            );
            warnings.push(why);
        }
        ReloadDoc { generation: self.controller.generation(), changed: false, warnings }
    }

    /// Runs all steps that can fail. The access log is last because opening it already
    /// changes the target.
    async fn prepare(
        &mut self,
        config: &Config,
        origin: &Origin,
        tokens: Tokens,
    ) -> Result<PreparedReload, ReloadError> {
        let refuse = |control: &Control, spot: Spot, why: String| {
            control.refused(&origin.error(&spot, why, None))
        };
        self.wait_for_addresses(config).await;
        let fresh = self
            .bind_new(config)
            .await
            .map_err(|refused| self.refused(&refused.problem(config, origin)))?;
        preflight::try_sources(config).map_err(|(at, why)| refuse(self, Spot::Source(at), why))?;
        let heartbeats = self.evidence.heartbeats.prepare(config).map_err(|why| {
            let listen = config.heartbeat.as_ref().and_then(|heartbeat| heartbeat.listen.first());
            match listen {
                Some(at) => refuse(self, Spot::HeartbeatListen(*at), why),
                None => self.refuse(why),
            }
        })?;
        let logs = access_log_destination(&config.log);
        if logs != access_log_destination(&self.reloads.config().log) {
            let set = self.workers.set_access_log(logs);
            set.map_err(|error| {
                refuse(self, Spot::AccessLog, preflight::access_log_refusal(&error))
            })?;
        }
        Ok(PreparedReload { tokens, fresh, heartbeats })
    }

    /// Commits the new configuration. Cannot fail.
    fn put_in_force(
        &mut self,
        loaded: Loaded,
        prepared: PreparedReload,
    ) -> (ReloadDoc, Vec<String>) {
        let Loaded { config, text, digest, warnings, .. } = loaded;
        let PreparedReload { tokens, fresh, heartbeats } = prepared;
        let changes = reload_diff::diff(self.reloads.config(), &config);
        for change in &changes {
            tracing::debug!(change, "reload");
        }
        let config = Arc::new(config);
        self.admin.tokens().set(tokens);
        self.telemetry.set_log_level(config.log.level);
        let restart_needed = needs_restart(self.reloads.started_with(), &config);
        for warning in &restart_needed {
            tracing::warn!(reason = %warning, "setting needs a restart");
        }
        warnings.iter().for_each(log_warning);
        self.reloads.adopt(Arc::clone(&config), digest, restart_needed);
        self.workers.context().buffers.set_max(config.process.buffers_max);
        let in_force = self.reloads.within_limits(self.binds.sockets());
        // Before the first probe with a new command.
        self.evidence.helper.reread();
        self.feed([ControlEvent::Configure(in_force)]);
        self.evidence.heartbeats.adopt(heartbeats);
        self.sources.configure(&config);
        self.binds.adopt(fresh, &config, self.workers.list(), &self.supervised);
        self.hold_heartbeats();
        self.keep_intents();
        self.supervised.in_force.reloaded(self.reloads.path(), text, &config);
        let (generation, warnings) = (self.controller.generation(), self.reloads.warnings());
        (ReloadDoc { generation, changed: true, warnings }, changes)
    }

    /// Waits until retired addresses that `config` uses again are closed. Until then
    /// the kernel drops connections of new clients there.
    async fn wait_for_addresses(&mut self, config: &Config) {
        let mut left = ADDRESS_WAIT_MAX;
        while self.binds.is_retiring(config) && !left.is_zero() {
            tokio::time::sleep(ADDRESS_WAIT_STEP).await;
            left = left.saturating_sub(ADDRESS_WAIT_STEP);
        }
    }

    /// Binds the new addresses. Retries while the old process still closes an address.
    async fn bind_new(&mut self, config: &Config) -> Result<NewBinds, BindError> {
        let mut left = ADDRESS_WAIT_MAX;
        loop {
            match self.binds.bind_new(config) {
                Err(refused)
                    if refused.error.kind() == ErrorKind::AddrInUse
                        && self.upgrades.awaits_old_process()
                        && !left.is_zero() =>
                {
                    tokio::time::sleep(ADDRESS_WAIT_STEP).await;
                    left = left.saturating_sub(ADDRESS_WAIT_STEP);
                }
                result => return result,
            }
        }
    }

    /// Returns an error for the whole file, without a line.
    pub(super) fn refuse(&self, message: String) -> ReloadError {
        let file: Arc<str> = self.reloads.path().display().to_string().into();
        self.refused(&config::Problem::of_file(&file, Severity::Error, message, None))
    }

    fn refused(&self, problem: &config::Problem) -> ReloadError {
        ReloadError::Problems(vec![self.problem(problem)])
    }

    fn problem(&self, from: &config::Problem) -> ProblemDoc {
        let mut from = from.clone();
        from.message = self.lifecycle.confined().explain(from.message);
        ProblemDoc {
            rendered: from.render(false),
            file: from.file,
            line: from.line,
            column: from.column,
            message: from.message,
            help: from.help,
        }
    }
}

/// Returns the originators of a reload, each once.
fn originators(waiting: &[ReloadRequest]) -> String {
    let mut all: Vec<&str> = waiting.iter().map(|request| &*request.who).collect();
    all.sort_unstable();
    all.dedup();
    all.join("; ")
}

/// Returns why a file was rejected, for an event.
fn rejection(problems: &[ProblemDoc]) -> String {
    let kept = "the new configuration was rejected; this one stays in effect";
    let Some(ProblemDoc { file, line, column, message, .. }) = problems.first() else {
        return kept.to_owned();
    };
    let more = match problems.len() - 1 {
        0 => String::new(),
        more => format!(" (and {more} more)"),
    };
    format!("{kept}: {file}:{line}:{column}: {message}{more}")
}

fn log_problem(problem: &ProblemDoc) {
    let ProblemDoc { file, line, column, message, help, .. } = problem;
    let (at, help) = (format!("{file}:{line}:{column}"), help.as_deref());
    tracing::error!(at, problem = %message, help, "configuration rejected; the previous one stays in effect");
}

/// Logs a problem that does not prevent the file from being put in force.
pub(super) fn log_warning(warning: &config::Problem) {
    let config::Problem { file, line, column, message, .. } = warning;
    let at = format!("{file}:{line}:{column}");
    tracing::warn!(at, problem = %message, "configuration warning");
}

/// Returns a warning if the path leads to a deleted file. That happens if a single file
/// is mounted into a container and replaced outside: the mount keeps the old file.
fn replaced_outside(path: &Path) -> Option<String> {
    std::fs::metadata(path).ok().filter(|data| data.nlink() == 0)?;
    Some(format!(
        "the file behind {} was deleted or replaced, and the mount keeps the old file; \
         mount its directory instead of the file, or restart to read the new one",
        path.display()
    ))
}

/// Returns one text per setting that differs from the start and needs a restart.
fn needs_restart(started: &Config, now: &Config) -> Vec<String> {
    let (old, new) = (&started.process, &now.process);
    let settings = [
        ("[process] workers", old.workers != new.workers),
        ("[process] pin", old.pin != new.pin),
        ("[process] engine", old.engine != new.engine),
        ("[process] spin", old.spin != new.spin),
        ("[process] user", old.user != new.user),
        ("[process] group", old.group != new.group),
        ("[process] sandbox", old.sandbox != new.sandbox),
        ("[process] state", old.state != new.state),
        ("[process] probe_helper", old.probe_helper != new.probe_helper),
        ("[admin] listen", started.admin.listen != now.admin.listen),
        ("[log] format", started.log.format != now.log.format),
        ("[log] target", started.log.target != now.log.target),
        ("[log] facility", started.log.facility != now.log.facility),
    ];
    settings
        .into_iter()
        .filter(|(_, differs)| *differs)
        .map(|(name, _)| format!("{name} changed in the file; it takes effect at the next start"))
        .collect()
}

//! Taking a changed file over: everything, or nothing.
//!
//! Called by the control loop for the watcher, SIGHUP and the admin API. What
//! can fail (reading, validating, binding, opening the log, the token) comes
//! first and changes nothing; what follows cannot.

use super::binds::NewBinds;
use super::control_loop::Control;
use super::preflight;
use super::refused::BindError;
use super::reload_diff;
use super::start;
use crate::admin::{ProblemDoc, ReloadDoc, ReloadError};
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tidegate_config::{self as config, Loaded, Severity, Spot};
use tidegate_core::control::ControlEvent;
use tidegate_core::model::Config;

/// How long a reload waits for an address it wants back to be closed first.
const WANTED_BACK_MAX: Duration = Duration::from_secs(1);
const WANTED_BACK_STEP: Duration = Duration::from_millis(10);

/// Why a process that drains reads no file.
const DRAINS: &str = "this process is draining; the next one reads the file";

impl Control {
    /// Takes up what was written while the file was not watched yet: a process
    /// that takes over must not miss what the one before put off. So is a file that was
    /// not used at the start after a crash.
    pub(super) async fn catch_up(&mut self) {
        let same = config::load(&self.path).is_ok_and(|loaded| loaded.digest == self.digest);
        if !same || self.supervised.in_force.awaits_the_file() {
            self.ask_for_reload(None).await;
        }
    }

    /// Whether this process drains, and so reads no file any more: its listeners
    /// would open again. Says so in the log.
    pub(super) fn drains_instead(&mut self, asked_by: &str) -> bool {
        let drains = self.draining.is_some();
        if drains {
            self.reloads.refused += 1;
            tracing::warn!(asked_by, "reload refused: {DRAINS}");
        }
        drains
    }

    /// The same unless it drains; an upgrade under way holds it back.
    pub(super) async fn reload_asked_by(&mut self, asked_by: &str) {
        if !self.drains_instead(asked_by) && !self.upgrades.postpones_reload() {
            self.reload_and_retry().await;
        }
    }

    /// As [`Control::reload`]; while this process drains or an upgrade is under
    /// way, a refusal.
    pub(super) async fn reload_on_request(&mut self) -> Result<ReloadDoc, ReloadError> {
        if self.drains_instead("admin request") {
            return Err(ReloadError::NotNow(DRAINS));
        }
        if !self.upgrades.postpones_reload() {
            return self.reload().await;
        }
        self.reloads.refused += 1;
        let why = "an upgrade is under way, and whoever serves after it reads the file again";
        Err(self.refuse(why.to_owned()))
    }

    /// Reads the file again and puts it in force, where it says something new.
    pub(super) async fn reload(&mut self) -> Result<ReloadDoc, ReloadError> {
        self.notifier.reloading();
        let result = self.try_reload().await;
        self.notifier.ready();
        match &result {
            Ok(ReloadDoc { changed: true, generation, .. }) => {
                self.reloads.changed += 1;
                tracing::info!(generation, "configuration in force");
            }
            Ok(_) => self.reloads.unchanged += 1,
            Err(refused) => {
                self.reloads.refused += 1;
                if let ReloadError::Problems(problems) = refused {
                    for ProblemDoc { file, line, column, message, help, .. } in problems {
                        let help = help.iter().map(|help| format!("; {help}")).collect::<String>();
                        tracing::error!(
                            "configuration refused: {file}:{line}:{column}: {message}{help}"
                        );
                    }
                }
            }
        }
        result
    }

    async fn try_reload(&mut self) -> Result<ReloadDoc, ReloadError> {
        let loaded = config::load(&self.path).map_err(|problems| {
            ReloadError::Problems(problems.list.iter().map(|it| self.problem(it)).collect())
        })?;
        let Loaded { config, text, digest, warnings, origin } = loaded;
        let refuse = |control: &Control, spot: Spot, why: String| {
            control.refused(&origin.error(&spot, why, None))
        };
        // A new secret may come without a change of the file that names it.
        let token = preflight::load_token(&config)
            .map_err(|why| self.refused(&preflight::token_problem(&origin, why)))?;
        // Other comments or another layout say nothing new; but files that the
        // file names may have changed while it did not.
        if config == *self.config {
            self.digest = digest;
            self.tokens.set(token);
            self.supervised.in_force.reloaded(&self.path, text, &config);
            let generation = self.controller.generation();
            let mut warnings = self.warnings();
            warnings.extend(replaced_outside(&self.path).inspect(|why| tracing::warn!("{why}")));
            return Ok(ReloadDoc { generation, changed: false, warnings });
        }
        self.wait_for_addresses(&config).await;
        let fresh = self
            .bind_new(&config)
            .await
            .map_err(|refused| self.refused(&refused.problem(&config, &origin)))?;
        preflight::try_sources(&config).map_err(|(at, why)| refuse(self, Spot::Source(at), why))?;
        let heartbeats = self.reception.prepare(&config).map_err(|why| {
            let listen = config.heartbeat.as_ref().and_then(|heartbeat| heartbeat.listen.first());
            match listen {
                Some(at) => refuse(self, Spot::HeartbeatListen(*at), why),
                None => self.refuse(why),
            }
        })?;
        if config.log.access != self.config.log.access
            && let Some(access_log) = &mut self.access_log
        {
            let target = start::access_target(&config.log.access);
            if let Err(error) = access_log.set_target(target) {
                let why = preflight::access_log_refusal(&error);
                return Err(refuse(self, Spot::AccessLog, why));
            }
        }

        if tracing::enabled!(tracing::Level::DEBUG) {
            for change in reload_diff::diff(&self.config, &config) {
                tracing::debug!(change, "reload");
            }
        }
        let config = Arc::new(config);
        self.digest = digest;
        self.tokens.set(token);
        self.log.set_level(config.log.level);
        self.restart_needed = needs_restart(&self.started_with, &config);
        for warning in &self.restart_needed {
            tracing::warn!("{warning}");
        }
        for warning in &warnings {
            tracing::warn!(
                "{}:{}:{}: {}",
                warning.file,
                warning.line,
                warning.column,
                warning.message
            );
        }
        self.config = Arc::clone(&config);
        self.watch_named_files();
        self.shared.buffers.set_max(config.process.buffers_max);
        let in_force = self.session_cap.apply(&config, self.binds.sockets());
        self.feed([ControlEvent::Configure(in_force)]);
        self.reception.adopt(heartbeats);
        self.binds.adopt(fresh, &config, &self.workers, &self.supervised);
        self.hold_heartbeats();
        self.supervised.write_intents(&self.controller);
        self.supervised.in_force.reloaded(&self.path, text, &config);
        let generation = self.controller.generation();
        Ok(ReloadDoc { generation, changed: true, warnings: self.warnings() })
    }

    /// An address that was given up a moment ago is closed before it is bound
    /// anew: until then its old sockets keep new clients out.
    async fn wait_for_addresses(&mut self, config: &Config) {
        let mut left = WANTED_BACK_MAX;
        while self.binds.cancel_retirement(config) && !left.is_zero() {
            tokio::time::sleep(WANTED_BACK_STEP).await;
            left = left.saturating_sub(WANTED_BACK_STEP);
        }
    }

    /// Binds what is new. The process before this one may be closing an address.
    async fn bind_new(&mut self, config: &Config) -> Result<NewBinds, BindError> {
        let mut left = WANTED_BACK_MAX;
        loop {
            match self.binds.bind_new(config) {
                Err(refused)
                    if refused.error.kind() == ErrorKind::AddrInUse
                        && self.upgrades.awaits_old_process()
                        && !left.is_zero() =>
                {
                    tokio::time::sleep(WANTED_BACK_STEP).await;
                    left = left.saturating_sub(WANTED_BACK_STEP);
                }
                result => return result,
            }
        }
    }

    /// A refusal for a reason that has no place in the file.
    pub(super) fn refuse(&self, message: String) -> ReloadError {
        let file: Arc<str> = self.path.display().to_string().into();
        self.refused(&config::Problem::of_file(&file, Severity::Error, message, None))
    }

    fn refused(&self, problem: &config::Problem) -> ReloadError {
        ReloadError::Problems(vec![self.problem(problem)])
    }

    fn problem(&self, from: &config::Problem) -> ProblemDoc {
        let mut from = from.clone();
        from.message = self.confined.explain(from.message);
        ProblemDoc {
            rendered: from.render(false),
            file: from.file,
            line: from.line,
            column: from.column,
            message: from.message,
            help: from.help,
        }
    }

    /// What status and reload answers warn of.
    pub(super) fn warnings(&self) -> Vec<String> {
        self.restart_needed.clone()
    }
}

/// A warning where the path leads to a file that was replaced elsewhere: a mount
/// of one file into a container keeps the old file.
fn replaced_outside(path: &Path) -> Option<String> {
    std::fs::metadata(path).ok().filter(|data| data.nlink() == 0)?;
    Some(format!(
        "the file behind {} has been deleted or replaced, and a mount keeps it; \
         mount its directory instead of the file, or restart to read the new one",
        path.display()
    ))
}

/// Settings of `now` that differ from what the process was started with and
/// cannot change while it runs, in words.
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
        ("[admin] listen", started.admin.listen != now.admin.listen),
        ("[log] format", started.log.format != now.log.format),
    ];
    settings
        .into_iter()
        .filter(|(_, differs)| *differs)
        .map(|(name, _)| format!("{name} changed in the file; it takes effect at the next start"))
        .collect()
}

//! Stores the configuration in force with the supervisor, for a start after a crash.
//!
//! Part of `supervised`. Each accepted configuration and the files that it names are
//! stored. It never changes the files on disk.
//!
//! - A process that starts after a crash reads the file on disk.
//! - It uses the stored configuration instead if the file is rejected or if a process
//!   that started with the file exited early. The control loop then reloads the file as
//!   soon as the process serves.

use super::Failure;
use super::preflight::{TokenRefusal, load_tokens};
use crate::admin::{Token, Tokens};
use std::path::Path;
use tidegate_config::{self as config, Loaded, Texts};
use tidegate_core::model::Config;
use tidegate_supervisor::{Store, SupervisorState};

/// The reason not to use a valid file after a failed start.
const EXITED_EARLY: &str = "a process that started with it exited before it was ready";

/// See the module's documentation.
#[derive(Debug, Default)]
pub(super) struct InForce {
    /// `None` without a supervisor, or with a supervisor that is too old for this.
    store: Option<Store>,
    /// The stored configuration that is used instead of the file, and the reason.
    instead: Option<(Texts, String)>,
    /// Texts of the configuration in force.
    texts: Option<Texts>,
    /// Why the file was not used at the start.
    note: Option<String>,
}

impl InForce {
    /// Decides between the file at `path` and the stored configuration.
    pub(super) fn of(given: &mut SupervisorState, path: &Path) -> InForce {
        let store = given.texts.take();
        let stored = store.as_ref().filter(|_| given.before.is_some()).and_then(Store::read);
        let stored = stored.and_then(|bytes| Texts::decode(&bytes));
        // A process of an upgrade may have used another file.
        let stored = stored.filter(|texts| texts.path() == path);
        let instead = stored.and_then(|texts| Some((texts, unfit(path, given.attempt)?)));
        InForce { store, instead, ..InForce::default() }
    }

    /// Returns the stored texts, if they are used instead of the files.
    pub(super) fn instead(&self) -> Option<&Texts> {
        self.instead.as_ref().map(|(texts, _)| texts)
    }

    /// Loads the configuration to start with.
    pub(super) fn load(&self, path: &Path) -> Result<Loaded, Failure> {
        let loaded = match self.instead() {
            Some(texts) => config::load_kept(texts),
            None => config::load(path),
        };
        loaded.map_err(Failure::Config)
    }

    /// Loads the tokens of that configuration.
    pub(super) fn load_tokens(&self, config: &Config) -> Result<Tokens, TokenRefusal> {
        load_tokens(config, |path| {
            let kept = self.instead().and_then(|texts| texts.named(path)).and_then(Token::new);
            kept.map_or_else(|| Token::load(path), Ok)
        })
    }

    /// Logs the start with the stored configuration.
    pub(super) fn announce(&mut self) {
        let Some((texts, why)) = &self.instead else { return };
        let path = texts.path().display();
        tracing::error!(
            %path,
            reason = %why,
            "cannot use the configuration file after a crash; starting with the last accepted \
             configuration until the file is corrected"
        );
        self.note = Some(format!(
            "{path} was not used after a crash: {why}; the last accepted configuration is in effect"
        ));
    }

    /// Returns whether the file must be reloaded as soon as this process serves.
    pub(super) fn needs_reload(&self) -> bool {
        self.instead.is_some()
    }

    /// Returns the warning for status, until the file is reloaded.
    pub(super) fn note(&self) -> Option<String> {
        self.note.clone()
    }

    /// Sets the texts this process started with. [`InForce::write`] stores them.
    pub(super) fn started_with(&mut self, path: &Path, text: String, config: &Config) {
        match &self.instead {
            Some((texts, _)) => self.texts = Some(texts.clone()),
            None if self.store.is_some() => self.texts = Some(Texts::of(path, text, config)),
            None => {}
        }
    }

    /// Stores the texts of a reloaded file.
    pub(super) fn reloaded(&mut self, path: &Path, text: String, config: &Config) {
        (self.instead, self.note) = (None, None);
        self.started_with(path, text, config);
        self.write();
    }

    /// Stores the texts in force with the supervisor.
    pub(super) fn write(&self) {
        let (Some(store), Some(texts)) = (&self.store, &self.texts) else { return };
        if let Err(error) = store.write(&texts.encode()) {
            tracing::warn!(%error, "cannot store the configuration with the supervisor; a process started after a crash reads it from disk");
        }
    }
}

/// Returns why the file at `path` must not be used for this start.
fn unfit(path: &Path, attempt: u8) -> Option<String> {
    match config::load(path) {
        Err(problems) => {
            let first = problems.list.first()?;
            Some(format!("line {}, column {}: {}", first.line, first.column, first.message))
        }
        // Every second attempt uses the file, which may have been corrected.
        Ok(_) => attempt.is_multiple_of(2).then(|| EXITED_EARLY.to_owned()),
    }
}

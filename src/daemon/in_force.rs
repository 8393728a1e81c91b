//! The configuration in force, for the process that takes the place of one that has
//! crashed: the files on disk may be bad by then.
//!
//! Part of `supervised`. Each configuration that comes into force is left with the
//! supervisor, with the files it names. A process that starts after a crash reads the
//! file; where that is refused, or a start with it has come to nothing, it uses what was
//! left, and the control loop asks for a reload once it serves.

use super::Failure;
use super::preflight::load_token;
use crate::admin::Token;
use std::path::Path;
use tidegate_config::{self as config, Loaded, Texts};
use tidegate_core::model::Config;
use tidegate_supervisor::{Store, SupervisorState};

/// What is said of a file that is whole, once a start has failed.
const ENDED: &str = "a process that started with it exited before it was ready";

/// See the module's documentation.
#[derive(Debug, Default)]
pub(super) struct InForce {
    /// `None` without a supervisor, and under one that is too old to have it.
    store: Option<Store>,
    /// Used in the place of the file, and why.
    instead: Option<(Texts, String)>,
    /// Of the configuration in force.
    texts: Option<Texts>,
    /// What is wrong with the file since the start.
    note: Option<String>,
}

impl InForce {
    /// Decides what a start with the file at `path` uses.
    pub(super) fn of(given: &mut SupervisorState, path: &Path) -> InForce {
        let store = given.texts.take();
        let left = store.as_ref().filter(|_| given.before.is_some()).and_then(Store::read);
        let left = left.and_then(|bytes| Texts::decode(&bytes));
        // The next process of an upgrade may have had another file.
        let left = left.filter(|texts| texts.path() == path);
        let instead = left.and_then(|texts| Some((texts, unfit(path, given.attempt)?)));
        InForce { store, instead, ..InForce::default() }
    }

    /// The texts that are used in the place of the files.
    pub(super) fn instead(&self) -> Option<&Texts> {
        self.instead.as_ref().map(|(texts, _)| texts)
    }

    /// The configuration to start with.
    pub(super) fn load(&self, path: &Path) -> Result<Loaded, Failure> {
        let loaded = match self.instead() {
            Some(texts) => config::load_kept(texts),
            None => config::load(path),
        };
        loaded.map_err(Failure::Config)
    }

    /// Its token.
    pub(super) fn load_token(&self, config: &Config) -> Result<Option<Token>, String> {
        let path = config.admin.token_file.as_deref();
        match path.and_then(|path| self.instead()?.named(path)) {
            Some(kept) => Ok(Token::new(kept)),
            None => load_token(config),
        }
    }

    /// Says what this process starts with, where that is not the file.
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

    /// Whether the file is to be read again as soon as this process serves.
    pub(super) fn awaits_the_file(&self) -> bool {
        self.instead.is_some()
    }

    /// For status, until the file is read.
    pub(super) fn note(&self) -> Option<String> {
        self.note.clone()
    }

    /// What this process has started with; to be written once it serves.
    pub(super) fn started_with(&mut self, path: &Path, text: String, config: &Config) {
        match &self.instead {
            Some((texts, _)) => self.texts = Some(texts.clone()),
            None if self.store.is_some() => self.texts = Some(Texts::of(path, text, config)),
            None => {}
        }
    }

    /// The file has been read and is in force.
    pub(super) fn reloaded(&mut self, path: &Path, text: String, config: &Config) {
        (self.instead, self.note) = (None, None);
        self.started_with(path, text, config);
        self.write();
    }

    /// Leaves the texts in force with the supervisor.
    pub(super) fn write(&self) {
        let (Some(store), Some(texts)) = (&self.store, &self.texts) else { return };
        if let Err(error) = store.write(&texts.encode()) {
            tracing::warn!(%error, "cannot store the configuration with the supervisor; a process started after a crash reads it from disk");
        }
    }
}

/// Why the file at `path` is not to be used for this start.
fn unfit(path: &Path, attempt: u8) -> Option<String> {
    match config::load(path) {
        Err(problems) => {
            let first = problems.list.first()?;
            Some(format!("line {}, column {}: {}", first.line, first.column, first.message))
        }
        // In turn with the file, which may have been mended meanwhile.
        Ok(_) => attempt.is_multiple_of(2).then(|| ENDED.to_owned()),
    }
}

//! The tasks on the discovery thread: one per question, and what registries share.
//!
//! [`DiscoveryThread`](super::DiscoveryThread) sends commands. Dropping a [`Runner`] ends all
//! tasks.

use super::supervise;
use crate::dispatch::{self, RegistryShare};
use crate::resolver::Resolver;
use crate::tell::Teller;
use std::collections::BTreeMap;
use std::sync::Arc;
use tidegate_core::model::{RegistryConfig, SourceKey, SourceQuestion};
use tokio::task::AbortHandle;

/// A command of the owner.
#[derive(Debug)]
pub(super) enum ThreadCommand {
    /// New questions.
    Apply {
        /// These end.
        gone: Vec<SourceKey>,
        /// These start, or restart with another question.
        start: Vec<SourceStart>,
    },
    /// Restart all, with new connections.
    Refresh,
    #[cfg(any(test, feature = "testing"))]
    Panic,
}

/// A question that starts.
#[derive(Debug)]
pub(super) struct SourceStart {
    pub(super) key: SourceKey,
    pub(super) question: SourceQuestion,
    pub(super) teller: Teller,
}

/// All sources that run.
#[derive(Debug)]
pub(super) struct Runner {
    sources: BTreeMap<SourceKey, RunningSource>,
    /// Registries of the running questions.
    registries: Vec<(Arc<RegistryConfig>, RegistryShare)>,
    resolver: Resolver,
}

#[derive(Debug)]
struct RunningSource {
    question: SourceQuestion,
    teller: Teller,
    task: AbortHandle,
}

// === impl Runner ===

impl Runner {
    pub(super) fn new(resolver: Resolver) -> Runner {
        Runner { sources: BTreeMap::new(), registries: Vec::new(), resolver }
    }

    pub(super) fn apply(&mut self, command: ThreadCommand) {
        match command {
            ThreadCommand::Apply { gone, start } => {
                gone.iter().for_each(|key| drop(self.sources.remove(key)));
                start.into_iter().for_each(|start| self.start(start));
                self.forget_registries();
            }
            ThreadCommand::Refresh => self.restart(),
            #[cfg(any(test, feature = "testing"))]
            ThreadCommand::Panic => panic!("on purpose"),
        }
    }

    /// Starts a question. A running one with the same key ends.
    fn start(&mut self, start: SourceStart) {
        let SourceStart { key, question, teller } = start;
        let resolver = self.resolver.clone();
        let share = match &question {
            SourceQuestion::Registry { registry, .. } => Some(self.share(registry, &resolver)),
            _ => None,
        };
        let (asked, to) = (question.clone(), teller.clone());
        let source =
            move || dispatch::run(asked.clone(), share.clone(), resolver.clone(), to.clone());
        let task = tokio::spawn(supervise(source, teller.clone())).abort_handle();
        self.sources.insert(key, RunningSource { question, teller, task });
    }

    fn restart(&mut self) {
        self.resolver.expire();
        self.registries.clear();
        // All end before one starts, so that what they share ends, too.
        let restarted: Vec<SourceStart> = std::mem::take(&mut self.sources)
            .into_iter()
            .map(|(key, source)| SourceStart {
                key,
                question: source.question.clone(),
                teller: source.teller.clone(),
            })
            .collect();
        restarted.into_iter().for_each(|start| self.start(start));
    }

    fn share(&mut self, registry: &Arc<RegistryConfig>, resolver: &Resolver) -> RegistryShare {
        if let Some((_, share)) = self.registries.iter().find(|(known, _)| known == registry) {
            return share.clone();
        }
        let share = RegistryShare::new(registry, resolver);
        self.registries.push((Arc::clone(registry), share.clone()));
        share
    }

    /// Closes the connections to registries that no question needs.
    fn forget_registries(&mut self) {
        let Runner { sources, registries, .. } = self;
        registries.retain(|(known, _)| {
            sources.values().any(|source| match &source.question {
                SourceQuestion::Registry { registry, .. } => registry == known,
                _ => false,
            })
        });
    }
}

impl Drop for RunningSource {
    fn drop(&mut self) {
        self.task.abort();
    }
}

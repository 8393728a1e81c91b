//! Tests of the etcd source against real nodes. The submodules have the tests.
//!
//! [`AskedEtcd`] runs the source on its own thread, as the discovery thread does, and checks
//! each set that it tells.

mod bytes;
mod measured;
mod restored;
mod scripted;
mod servers;
mod store;
mod users;

use super::{EtcdShare, run};
use crate::resolver::Resolver;
use crate::tell::{Answers, SourceCounters, Teller};
use crate::testing::etcd::{EtcdCluster, eventually};
use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tidegate_core::discovery::{SourceFailure, Told, WholeSet};
use tidegate_core::model::{DnsConfig, RegistryConfig, RegistryKind, ServerAddr, SourceKey};
use tokio::sync::oneshot;

/// The prefix of most tests.
const WEB: &str = "/tidegate/services/web/";

/// A running question.
struct AskedEtcd {
    answers: Answers,
    counters: Arc<SourceCounters>,
    /// Names that each set must have.
    must_have: BTreeSet<String>,
    /// The last set.
    set: Option<WholeSet>,
    failures: Vec<(SourceFailure, String)>,
    alive: u32,
    _stop: oneshot::Sender<()>,
}

/// Answers each question until its test drops it.
async fn answer(
    registry: &RegistryConfig,
    questions: Vec<(Arc<str>, Teller, oneshot::Receiver<()>)>,
) {
    let share = EtcdShare::start(registry, Resolver::new(DnsConfig::default()));
    let tasks = questions.into_iter().map(|(prefix, teller, stopped)| {
        let share = share.clone();
        tokio::spawn(async move {
            tokio::select! {
                _ = run(prefix, share, teller) => {}
                _ = stopped => {}
            }
        })
    });
    for task in tasks.collect::<Vec<_>>() {
        task.await.unwrap();
    }
}

// === impl AskedEtcd ===

impl AskedEtcd {
    /// Asks for [`WEB`].
    fn start(cluster: &EtcdCluster) -> AskedEtcd {
        AskedEtcd::start_as(&registry(cluster), WEB)
    }

    fn start_as(registry: &RegistryConfig, prefix: &str) -> AskedEtcd {
        AskedEtcd::start_many(registry, &[prefix]).remove(0)
    }

    /// Asks several questions of one registry on one thread.
    fn start_many(registry: &RegistryConfig, prefixes: &[&str]) -> Vec<AskedEtcd> {
        let (mut asked, mut questions) = (Vec::new(), Vec::new());
        for (number, prefix) in prefixes.iter().enumerate() {
            let (answers, counters) = (Answers::default(), Arc::<SourceCounters>::default());
            let key = SourceKey { pool: format!("pool-{number}").into(), backend: None };
            let teller = answers.teller(key, Arc::clone(&counters));
            let (stop, stopped) = oneshot::channel();
            questions.push((Arc::from(*prefix), teller, stopped));
            asked.push(AskedEtcd {
                answers,
                counters,
                must_have: BTreeSet::new(),
                set: None,
                failures: Vec::new(),
                alive: 0,
                _stop: stop,
            });
        }
        let registry = registry.clone();
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            runtime.unwrap().block_on(answer(&registry, questions));
        });
        asked
    }

    /// Takes what the source told. Each set must have the members that nothing removed.
    fn take(&mut self) {
        for answer in self.answers.take() {
            match answer.told {
                Told::Whole(set) => {
                    let names: BTreeSet<String> = names(&set).into_iter().collect();
                    let lost: Vec<_> = self.must_have.difference(&names).collect();
                    assert!(lost.is_empty() || !set.trusted, "lost {lost:?} at {}", set.version);
                    self.set = Some(set);
                }
                Told::Failed { why, detail } => self.failures.push((why, detail)),
                Told::Alive => self.alive += 1,
            }
        }
    }

    /// Waits until the members have exactly these names. They must stay from then on.
    fn wait_for(&mut self, wanted: &[&str], limit: Duration) {
        self.must_have.retain(|name| wanted.contains(&name.as_str()));
        let what = format!("members {wanted:?}");
        eventually(&what, limit, || {
            self.take();
            let found = names(self.set.as_ref()?);
            (found == wanted).then_some(())
        });
        self.must_have = wanted.iter().map(|name| (*name).to_owned()).collect();
    }

    /// Waits until `done` holds.
    fn wait_until(
        &mut self,
        what: &str,
        limit: Duration,
        mut done: impl FnMut(&AskedEtcd) -> bool,
    ) {
        eventually(what, limit, || {
            self.take();
            done(self).then_some(())
        });
    }

    /// Waits for a failure after those that are known. Returns the time it took.
    fn wait_for_failure(&mut self, limit: Duration) -> (SourceFailure, Duration) {
        let (start, known) = (now(), self.failures.len());
        self.wait_until("a failure", limit, |asked| asked.failures.len() > known);
        (self.failures[known].0, now().duration_since(start))
    }
}

fn names(set: &WholeSet) -> Vec<String> {
    set.members.iter().map(|member| member.name.to_string()).collect()
}

fn now() -> Instant {
    tidegate_net::clock::now()
}

fn registry(cluster: &EtcdCluster) -> RegistryConfig {
    RegistryConfig { timeout: secs(5), ..registry_of(&cluster.servers()) }
}

fn registry_of(servers: &[SocketAddr]) -> RegistryConfig {
    RegistryConfig {
        name: "main".into(),
        kind: RegistryKind::Etcd,
        servers: servers.iter().copied().map(ServerAddr::Ip).collect(),
        timeout: secs(1),
        tls: None,
        token_file: None,
        user: None,
        password_file: None,
        kubeconfig: None,
    }
}

fn key(name: &str) -> String {
    format!("{WEB}{name}")
}

fn value(port: u16) -> String {
    format!(r#"{{"address":"10.0.0.1:{port}"}}"#)
}

const fn secs(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

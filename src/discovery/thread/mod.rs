//! The thread of all member sources.
//!
//! The daemon starts it once and gives it the questions of each configuration. A question
//! that did not change keeps running. All questions to one registry share its connections.
//! A source that panics restarts. [`DiscoveryThread::ended`] reports the end of the thread
//! itself, and the daemon restarts it. The thread decides nothing about members: it tells
//! [`Answers`].

mod runner;

use crate::backoff::Pause;
use crate::resolver::Resolver;
use crate::tasks::{self, TaskKind, TaskPanicked};
use crate::tell::{Answers, SourceCounters, Teller};
use runner::{Runner, SourceStart, ThreadCommand};
use std::collections::{BTreeMap, BTreeSet};
use std::convert::Infallible;
use std::io;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;
use tidegate_core::discovery::{SourceFailure, Told};
use tidegate_core::model::{DnsConfig, SourceKey, SourceQuestion};
use tokio::runtime::{Builder, Runtime};
use tokio::sync::Notify;
use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};

/// Most questions of a process. Further ones are told as failed.
pub const QUESTIONS_MAX: usize = 4096;

/// Threads for file reads, lookups and large parses.
const BLOCKING_THREADS_MAX: usize = 4;

/// Longest wait for blocking threads at the end. The process leaves the others behind.
const END_WAIT: Duration = Duration::from_millis(300);

/// Runs all sources until dropped. Drop waits for at most about 0.5 s.
#[derive(Debug)]
pub struct DiscoveryThread {
    answers: Answers,
    resolver: Resolver,
    asked: Mutex<AskedQuestions>,
    /// `None`: the thread ends.
    running: Option<RunningThread>,
    ended: Arc<Notify>,
}

#[derive(Debug)]
struct RunningThread {
    commands: UnboundedSender<ThreadCommand>,
    handle: JoinHandle<()>,
}

/// Says that the thread ends, also by a panic.
struct EndNotice(Arc<Notify>);

/// The questions of the last configuration.
#[derive(Debug, Default)]
struct AskedQuestions {
    sources: BTreeMap<SourceKey, AskedSource>,
    /// Questions beyond [`QUESTIONS_MAX`].
    refused: Vec<SourceKey>,
}

#[derive(Debug)]
struct AskedSource {
    question: SourceQuestion,
    counters: Arc<SourceCounters>,
}

// === impl DiscoveryThread ===

impl DiscoveryThread {
    /// Starts the thread, named `discovery`, without questions.
    ///
    /// # Errors
    /// This host has no thread or no descriptor left.
    pub fn start(answers: Answers) -> io::Result<DiscoveryThread> {
        let (resolver, ended) = (Resolver::new(DnsConfig::default()), Arc::<Notify>::default());
        let running = Some(RunningThread::start(resolver.clone(), Arc::clone(&ended))?);
        Ok(DiscoveryThread { answers, resolver, asked: Mutex::default(), running, ended })
    }

    /// Waits until the thread ends because of a panic outside of all sources. Dropping the
    /// future loses nothing.
    pub async fn ended(&self) {
        self.ended.notified().await;
    }

    /// Tells a failure of every source, because the thread has ended.
    pub fn tell_ended(&self) {
        let asked = self.asked.lock().unwrap_or_else(PoisonError::into_inner);
        for (key, source) in &asked.sources {
            let detail = "the thread of the member sources panicked and restarts".to_owned();
            let told = Told::Failed { why: SourceFailure::Local, detail };
            self.answers.teller(key.clone(), Arc::clone(&source.counters)).tell(told);
        }
    }

    /// Starts another thread with the questions of the last configuration. It does not wait for
    /// the thread before, which has ended.
    ///
    /// # Errors
    /// This host has no thread or no descriptor left.
    pub fn restart(&mut self) -> io::Result<()> {
        let running = RunningThread::start(self.resolver.clone(), Arc::clone(&self.ended))?;
        self.running = Some(running);
        let asked = self.asked.lock().unwrap_or_else(PoisonError::into_inner);
        let start = |(key, source): (&SourceKey, &AskedSource)| SourceStart {
            key: key.clone(),
            question: source.question.clone(),
            teller: self.answers.teller(key.clone(), Arc::clone(&source.counters)),
        };
        let start = asked.sources.iter().map(start).collect();
        self.send(ThreadCommand::Apply { gone: Vec::new(), start });
        Ok(())
    }

    /// Makes the thread panic outside of all sources.
    #[cfg(any(test, feature = "testing"))]
    pub fn panic_on_purpose(&self) {
        self.send(ThreadCommand::Panic);
    }

    /// Sets the questions. It does not wait: sources start and end on the thread. When it
    /// returns, answers to questions that are gone or changed are dropped.
    pub fn configure(&self, mut sources: Vec<(SourceKey, SourceQuestion)>, dns: DnsConfig) {
        let refused = sources.split_off(sources.len().min(QUESTIONS_MAX));
        let mut asked = self.asked.lock().unwrap_or_else(PoisonError::into_inner);
        let wanted: BTreeSet<&SourceKey> = sources.iter().map(|(key, _)| key).collect();
        let gone: Vec<SourceKey> =
            asked.sources.keys().filter(|key| !wanted.contains(key)).cloned().collect();
        asked.sources.retain(|key, _| wanted.contains(key));
        gone.iter().chain(&asked.refused).for_each(|key| self.answers.forget(key));
        asked.refused = refused.into_iter().map(|(key, _)| key).collect();
        asked.refuse(&self.answers);
        let mut start = Vec::new();
        for (key, question) in sources {
            if let Some(teller) = asked.ask(&self.answers, &key, &question) {
                start.push(SourceStart { key, question, teller });
            }
        }
        self.resolver.configure(dns);
        self.send(ThreadCommand::Apply { gone, start });
    }

    /// Makes every source ask for everything again.
    pub fn refresh(&self) {
        self.send(ThreadCommand::Refresh);
    }

    /// The counters of each source. They count on while its key is configured.
    pub fn counters(&self) -> Vec<(SourceKey, Arc<SourceCounters>)> {
        let asked = self.asked.lock().unwrap_or_else(PoisonError::into_inner);
        let of =
            |(key, source): (&SourceKey, &AskedSource)| (key.clone(), Arc::clone(&source.counters));
        asked.sources.iter().map(of).collect()
    }

    /// The resolver of all sources, for its counters.
    pub fn resolver(&self) -> &Resolver {
        &self.resolver
    }

    /// Whether the thread runs. A panic outside of all sources ends it.
    pub fn is_running(&self) -> bool {
        self.running.as_ref().is_some_and(|running| !running.handle.is_finished())
    }

    fn send(&self, command: ThreadCommand) {
        if let Some(running) = &self.running {
            // Fails only if the thread has ended. Its successor gets all questions.
            let _ = running.commands.send(command);
        }
    }
}

impl Drop for DiscoveryThread {
    fn drop(&mut self) {
        if let Some(RunningThread { commands, handle }) = self.running.take() {
            drop(commands);
            let _ = handle.join();
        }
    }
}

// === impl RunningThread, EndNotice ===

impl RunningThread {
    fn start(resolver: Resolver, ended: Arc<Notify>) -> io::Result<RunningThread> {
        let runtime = runtime()?;
        let (commands, mut received) = unbounded_channel();
        let run = move || {
            let _notice = EndNotice(ended);
            runtime.block_on(async {
                let mut runner = Runner::new(resolver);
                while let Some(command) = received.recv().await {
                    runner.apply(command);
                }
            });
            // Ends the tasks. A read from a dead network file system must not delay the end.
            runtime.shutdown_timeout(END_WAIT);
        };
        let handle = std::thread::Builder::new().name("discovery".to_owned()).spawn(run)?;
        Ok(RunningThread { commands, handle })
    }
}

impl Drop for EndNotice {
    fn drop(&mut self) {
        self.0.notify_one();
    }
}

// === impl AskedQuestions ===

impl AskedQuestions {
    /// Returns a teller if the question is new.
    fn ask(
        &mut self,
        answers: &Answers,
        key: &SourceKey,
        question: &SourceQuestion,
    ) -> Option<Teller> {
        let counters = match self.sources.get(key) {
            Some(source) if source.question == *question => return None,
            Some(source) => Arc::clone(&source.counters),
            None => Arc::default(),
        };
        let teller = answers.teller(key.clone(), Arc::clone(&counters));
        let source = AskedSource { question: question.clone(), counters };
        self.sources.insert(key.clone(), source);
        Some(teller)
    }

    fn refuse(&self, answers: &Answers) {
        for key in &self.refused {
            let detail = format!("more than {QUESTIONS_MAX} member sources are configured");
            let told = Told::Failed { why: SourceFailure::Local, detail };
            answers.teller(key.clone(), Arc::default()).tell(told);
        }
    }
}

// === one question ===

/// Asks one question on this thread: for `check --resolve`.
///
/// Returns the first complete set. Returns a failure at once if a further request will not
/// help, else the last failure when the time is over.
///
/// # Errors
/// This host has no descriptor left.
pub fn ask_once(question: &SourceQuestion, dns: &DnsConfig, timeout: Duration) -> io::Result<Told> {
    let runtime = runtime()?;
    let told = runtime.block_on(async {
        let mut last = None;
        let asking = ask_until_whole(question, dns, &mut last);
        match tokio::time::timeout(timeout, asking).await {
            Ok(told) => told,
            Err(_) => last.unwrap_or_else(|| Told::Failed {
                why: SourceFailure::Timeout,
                detail: format!("no answer after {timeout:.1?}"),
            }),
        }
    });
    runtime.shutdown_timeout(END_WAIT);
    Ok(told)
}

async fn ask_until_whole(
    question: &SourceQuestion,
    dns: &DnsConfig,
    last: &mut Option<Told>,
) -> Told {
    let answers = Answers::default();
    let key = SourceKey { pool: "".into(), backend: None };
    let teller = answers.teller(key.clone(), Arc::default());
    let mut runner = Runner::new(Resolver::new(dns.clone()));
    let start = vec![SourceStart { key, question: question.clone(), teller }];
    runner.apply(ThreadCommand::Apply { gone: Vec::new(), start });
    loop {
        answers.arrived().await;
        for answer in answers.take() {
            match answer.told {
                Told::Failed { why: SourceFailure::Connect | SourceFailure::Timeout, .. } => {
                    *last = Some(answer.told);
                }
                Told::Alive => {}
                told => return told,
            }
        }
    }
}

fn runtime() -> io::Result<Runtime> {
    Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(BLOCKING_THREADS_MAX)
        .thread_name("discovery-read")
        .build()
}

/// Runs a source and restarts it after a panic.
async fn supervise<S: Future<Output = Infallible> + Send + 'static>(
    source: impl Fn() -> S,
    teller: Teller,
) -> Infallible {
    let mut pause = Pause::new();
    loop {
        pause.begin();
        let Err(TaskPanicked) = tasks::caught(TaskKind::Source, async { source().await }).await;
        teller.counters().panics.fetch_add(1, Ordering::Relaxed);
        let SourceKey { pool, backend } = teller.key();
        let backend = backend.as_deref();
        tracing::error!(%pool, backend, "member source panicked; restarting it");
        let why = SourceFailure::Local;
        teller.tell(Told::Failed { why, detail: tasks::PANICKED.to_owned() });
        pause.failed().await;
    }
}

#[cfg(test)]
mod tests;

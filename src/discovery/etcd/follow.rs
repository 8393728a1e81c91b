//! Keeps the prefixes of one registry current: list, watch, check, and again.
//!
//! [`EtcdShare`](super::EtcdShare) starts a [`Follower`] per registry. It never returns. The
//! questions get every failure and keep their last sets.

use super::AskedPrefixes;
use super::codec::{EtcdHeader, GatewayRefusal, RangeAnswer, WatchMessage};
use super::followed::{CheckResult, Expected, Followed};
use super::gateway::{EtcdGateway, GatewayFailure};
use super::watch::WatchStream;
use crate::client::HttpFailure;
use crate::resolver::Resolver;
use crate::tasks::{TaskKind, panic_point};
use std::future::pending;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tidegate_core::discovery::SourceFailure;
use tidegate_core::model::RegistryConfig;
use tidegate_net::clock;
use tokio::time::{sleep, sleep_until};

/// Time between two pings after a change. A member that stopped shows itself by silence alone,
/// so this time and the ping's deadline bound how long a question is not answered without a
/// failure.
const PING_EVERY: Duration = Duration::from_secs(3);

/// The same while nothing changes. Each ping wakes a thread whose code and data have left the
/// caches of the CPU, which costs more than the ping.
const IDLE_PING_EVERY: Duration = Duration::from_secs(6);

/// A registry is idle after this time without a change.
const IDLE_AFTER: Duration = Duration::from_secs(30);

/// A check of all prefixes replaces a ping this long after the last one.
const CHECK_AFTER: Duration = Duration::from_secs(8);

/// Age of the contents after which all prefixes are listed again, whatever the watch said.
const LIST_AGE: Duration = Duration::from_secs(600);

/// Sets are not trusted for this time after a backup was restored. Services whose entries
/// are newer than the backup register again in it.
const RESTORED_FOR: Duration = Duration::from_secs(30);

/// Longest pause after failures. It leaves recovery within 5 s together with a ping.
const PAUSE_MAX: Duration = Duration::from_secs(2);

/// Shortest time before a prefix is listed again that is refused or has too many entries.
const LIST_AGAIN: Duration = Duration::from_secs(1);

/// Lists, watches and checks the prefixes of one registry.
pub(super) struct Follower {
    asked: Arc<AskedPrefixes>,
    gateway: EtcdGateway,
    prefixes: Vec<Followed>,
    /// The newest header of a linearizable read.
    newest: Option<EtcdHeader>,
    untrusted_until: Option<Instant>,
    list_all_at: Instant,
    failures_in_row: u32,
}

/// A failure ends the stream.
struct Broken {
    failure: HttpFailure,
    /// Position of the only prefix that it is about; `None`: all.
    only: Option<usize>,
}

/// A request next to the stream, on its way.
type Asking = Pin<Box<dyn Future<Output = Result<SideAnswer, GatewayFailure>> + Send>>;

/// The answer of a request next to the stream.
enum SideAnswer {
    Pong,
    Check(CheckAnswers),
    /// Of a prefix that is not in the stream, by position.
    Listed(usize, Result<RangeAnswer, HttpFailure>),
}

/// What a check read, in the order of the watches.
struct CheckAnswers {
    header: EtcdHeader,
    expected: Vec<Expected>,
    answers: Vec<RangeAnswer>,
}

/// A stream and what belongs to it.
struct Following {
    stream: WatchStream,
    /// Positions of the prefixes; a watch has its position here, plus 1, as number.
    watches: Vec<usize>,
    /// Watches that the server created.
    created: usize,
    asking: Option<Asking>,
    ask_at: Instant,
    checked_at: Instant,
}

// === impl Follower ===

impl Follower {
    pub(super) fn new(
        registry: &RegistryConfig,
        resolver: Resolver,
        asked: Arc<AskedPrefixes>,
    ) -> Follower {
        Follower {
            asked,
            gateway: EtcdGateway::new(registry, resolver),
            prefixes: Vec::new(),
            newest: None,
            untrusted_until: None,
            list_all_at: clock::now() + jittered(LIST_AGE),
            failures_in_row: 0,
        }
    }

    /// Follows until it is dropped.
    pub(super) async fn run(mut self) {
        loop {
            self.take_questions();
            panic_point(TaskKind::Follower);
            if let Err(broken) = self.follow().await {
                self.tell_broken(broken);
                self.failures_in_row += 1;
                sleep(pause(self.failures_in_row)).await;
            }
        }
    }

    /// Adds new questions and drops those that ended.
    fn take_questions(&mut self) {
        let trusted = self.is_trusted(clock::now());
        let asked = self.asked.lock();
        self.prefixes.retain_mut(|one| one.keep_questions(|number| asked.contains_key(&number)));
        for (number, (prefix, teller)) in asked.iter() {
            let found = self.prefixes.iter().position(|one| one.prefix() == prefix);
            let at = found.unwrap_or_else(|| {
                self.prefixes.push(Followed::new(Arc::clone(prefix)));
                self.prefixes.len() - 1
            });
            if !self.prefixes[at].has_question(*number) {
                self.prefixes[at].add_question(*number, teller, trusted);
            }
        }
    }

    fn tell_broken(&mut self, Broken { failure, only }: Broken) {
        for (at, prefix) in self.prefixes.iter_mut().enumerate() {
            if only.is_none_or(|only| only == at) {
                prefix.tell_failure(&failure);
                prefix.must_list();
            }
        }
    }

    /// Lists what must be listed and follows all current prefixes until the questions change
    /// or a list is due.
    async fn follow(&mut self) -> Result<(), Broken> {
        self.list_due().await?;
        let watches: Vec<usize> =
            (0..self.prefixes.len()).filter(|at| self.prefixes[*at].is_current()).collect();
        if watches.is_empty() {
            self.wait_for_questions().await;
            return Ok(());
        }
        let number = (1..).zip(&watches);
        let requests = number.map(|(id, at)| self.prefixes[*at].watch(id)).collect();
        let stream = self.gateway.watch(requests).await?;
        let now = clock::now();
        let ask_at = now + jittered(PING_EVERY);
        let mut following =
            Following { stream, watches, created: 0, asking: None, ask_at, checked_at: now };
        let ended = self.read(&mut following).await;
        following.watches.iter().for_each(|at| self.prefixes[*at].count_restart());
        ended
    }

    /// Waits until a question is added or a refused prefix can be listed again.
    async fn wait_for_questions(&self) {
        let retry_at = self.prefixes.iter().filter_map(|prefix| prefix.retry_at).min();
        tokio::select! {
            () = self.asked.changed.notified() => {}
            () = until(retry_at) => {}
        }
    }

    // === listing ===

    /// Lists every prefix that is not current.
    async fn list_due(&mut self) -> Result<(), Broken> {
        let now = clock::now();
        if self.list_all_at <= now {
            self.prefixes.iter_mut().for_each(Followed::must_list);
            self.list_all_at = now + jittered(LIST_AGE);
        }
        let mut asked_leader = false;
        while let Some(at) = self.prefixes.iter().position(|prefix| prefix.is_due(clock::now())) {
            let prefix = Arc::clone(self.prefixes[at].prefix());
            if !std::mem::replace(&mut asked_leader, true) {
                self.gateway.ping(&prefix).await?;
            }
            match self.gateway.list(&prefix).await {
                Ok(answer) => self.take_list(at, answer),
                Err(failure) if failure.refused => self.take_refusal(at, &failure.http),
                Err(failure) => return Err(failure.into()),
            }
        }
        Ok(())
    }

    fn take_refusal(&mut self, at: usize, failure: &HttpFailure) {
        self.prefixes[at].tell_failure(failure);
        self.prefixes[at].retry_at = Some(clock::now() + jittered(2 * LIST_AGAIN));
    }

    fn take_list(&mut self, at: usize, answer: RangeAnswer) {
        self.note_header(answer.header);
        let revision = answer.header.revision;
        self.prefixes[at].take_list(answer.kvs, answer.count, revision);
        let now = clock::now();
        let trusted = self.is_trusted(now);
        self.prefixes[at].tell_due(now, trusted);
    }

    /// Compares the header of a linearizable read with the newest one. Returns whether a
    /// backup was restored.
    fn note_header(&mut self, header: EtcdHeader) -> bool {
        let restored = self.newest.is_some_and(|newest| {
            header.cluster_id != newest.cluster_id
                || header.revision < newest.revision
                || header.raft_term < newest.raft_term
        });
        self.newest = Some(header);
        if restored {
            self.untrusted_until = Some(clock::now() + RESTORED_FOR);
            self.prefixes.iter_mut().for_each(Followed::must_list);
        }
        restored
    }

    fn is_trusted(&self, now: Instant) -> bool {
        self.untrusted_until.is_none_or(|until| until <= now)
    }

    // === following ===

    /// Reads the stream until the questions change or a list is due.
    async fn read(&mut self, following: &mut Following) -> Result<(), Broken> {
        loop {
            let Some(wake_at) = self.act(following) else { return Ok(()) };
            let Following { stream, asking, .. } = following;
            tokio::select! {
                message = stream.next_message() => {
                    let message = message.inspect_err(|_| self.gateway.fail_over())?;
                    self.take_message(following, message)?;
                }
                answer = answer_of(asking) => {
                    following.asking = None;
                    if self.take_answer(following, answer)? {
                        return Ok(());
                    }
                }
                () = self.asked.changed.notified() => return Ok(()),
                () = until(Some(wake_at)) => {}
            }
        }
    }

    /// Does what is due. Returns when something else is, or `None` if a list is due.
    fn act(&mut self, following: &mut Following) -> Option<Instant> {
        let now = clock::now();
        if self.untrusted_until.is_some_and(|until| until <= now) {
            self.untrusted_until = None;
            self.prefixes.iter_mut().for_each(Followed::must_tell);
        }
        if self.list_all_at <= now {
            return None;
        }
        if following.asking.is_none() {
            following.asking = self.ask(following, now);
        }
        let trusted = self.is_trusted(now);
        let tell_at = self.prefixes.iter_mut().filter_map(|prefix| prefix.tell_due(now, trusted));
        let mut wake_at = tell_at.min().unwrap_or(self.list_all_at).min(self.list_all_at);
        if following.asking.is_none() {
            let retry_at = self.prefixes.iter().filter_map(|prefix| prefix.retry_at);
            wake_at = retry_at.fold(wake_at.min(following.ask_at), Instant::min);
        }
        Some(self.untrusted_until.map_or(wake_at, |until| until.min(wake_at)))
    }

    fn take_message(
        &mut self,
        following: &mut Following,
        message: WatchMessage,
    ) -> Result<(), Broken> {
        let position = message.position(following.created);
        following.created += usize::from(message.created);
        let Some(&at) = position.and_then(|position| following.watches.get(position)) else {
            let text = format_args!("a message of watch {}, which is unknown", message.watch_id);
            return Err(HttpFailure::protocol(text).into());
        };
        if message.canceled {
            return Err(self.canceled(at, &message));
        }
        if message.created {
            return self.check_created(at, message.header);
        }
        if !message.events.is_empty() {
            self.prefixes[at].take_events(message);
            if !self.prefixes[at].is_current() {
                self.prefixes[at].retry_at = Some(clock::now() + LIST_AGAIN);
            }
        }
        Ok(())
    }

    /// A server accepts a watch from a revision that it does not have yet, and is silent. So
    /// the answer must be at least as new as the contents.
    fn check_created(&mut self, at: usize, header: EtcdHeader) -> Result<(), Broken> {
        let of_cluster = self.newest.is_none_or(|newest| newest.cluster_id == header.cluster_id);
        let known = self.prefixes[at].revision();
        if of_cluster && header.revision >= known {
            self.failures_in_row = 0;
            return Ok(());
        }
        let text = format_args!(
            "the member is at revision {} of cluster {:x}; revision {known} was seen",
            header.revision, header.cluster_id
        );
        Err(HttpFailure::new(SourceFailure::Stale, text).into())
    }

    fn canceled(&mut self, at: usize, message: &WatchMessage) -> Broken {
        let refusal = GatewayRefusal::of_cancel(message);
        if refusal.token {
            self.gateway.forget_token();
        }
        // Other watches of the stream are compacted, too.
        let only = (refusal.why == SourceFailure::Auth && !refusal.token).then_some(at);
        Broken { failure: HttpFailure::new(refusal.why, refusal.message), only }
    }

    // === checking ===

    /// Sends what is due: a list of a refused prefix, a ping, or a check of all watches.
    fn ask(&self, following: &mut Following, now: Instant) -> Option<Asking> {
        let gateway = self.gateway.clone();
        if let Some(at) = self.prefixes.iter().position(|prefix| prefix.is_due(now)) {
            let prefix = Arc::clone(self.prefixes[at].prefix());
            return Some(Box::pin(async move {
                match gateway.list(&prefix).await {
                    Err(failure) if !failure.refused => Err(failure),
                    answer => Ok(SideAnswer::Listed(at, answer.map_err(|failure| failure.http))),
                }
            }));
        }
        if now < following.ask_at {
            return None;
        }
        let prefixes = following.watches.iter().map(|at| &self.prefixes[*at]);
        let is_idle = prefixes.clone().all(|prefix| prefix.is_quiet(now, IDLE_AFTER));
        following.ask_at = now + jittered(if is_idle { IDLE_PING_EVERY } else { PING_EVERY });
        if now.saturating_duration_since(following.checked_at) < CHECK_AFTER {
            let first = prefixes.map(Followed::prefix).next().cloned().unwrap_or_default();
            return Some(Box::pin(
                async move { gateway.ping(&first).await.map(|()| SideAnswer::Pong) },
            ));
        }
        following.checked_at = now;
        let (ranges, expected): (Vec<_>, Vec<_>) = prefixes.map(Followed::check).unzip();
        Some(Box::pin(async move {
            let (header, answers) = gateway.read_all(ranges).await?;
            Ok(SideAnswer::Check(CheckAnswers { header, expected, answers }))
        }))
    }

    /// Takes an answer. Returns whether the stream must begin again.
    fn take_answer(
        &mut self,
        following: &Following,
        answer: Result<SideAnswer, GatewayFailure>,
    ) -> Result<bool, Broken> {
        match answer {
            Ok(SideAnswer::Pong) => Ok(false),
            Ok(SideAnswer::Check(check)) => self.take_check(following, check),
            Ok(SideAnswer::Listed(at, Ok(answer))) => {
                self.take_list(at, answer);
                Ok(true)
            }
            Ok(SideAnswer::Listed(at, Err(failure))) => {
                self.take_refusal(at, &failure);
                Ok(false)
            }
            Err(failure) if failure.refused => {
                // One of the prefixes is forbidden. The lists show which.
                self.prefixes.iter_mut().for_each(Followed::must_list);
                Ok(true)
            }
            Err(failure) => Err(failure.into()),
        }
    }

    /// Compares a check with the watches. Returns whether everything must be listed.
    fn take_check(&mut self, following: &Following, check: CheckAnswers) -> Result<bool, Broken> {
        let CheckAnswers { header, expected, answers } = check;
        if self.note_header(header) {
            return Ok(true);
        }
        let mut missed = false;
        for ((at, sent), answer) in following.watches.iter().zip(&expected).zip(&answers) {
            let result = self.prefixes[*at].take_check(sent, answer, header.revision);
            missed |= result == CheckResult::Missed;
        }
        if missed {
            self.gateway.fail_over();
            let text = "the watch missed changes that a read shows";
            return Err(HttpFailure::new(SourceFailure::Stale, text).into());
        }
        Ok(false)
    }
}

async fn answer_of(asking: &mut Option<Asking>) -> Result<SideAnswer, GatewayFailure> {
    match asking {
        Some(asking) => asking.await,
        None => pending().await,
    }
}

async fn until(at: Option<Instant>) {
    match at {
        Some(at) => sleep_until(at.into()).await,
        None => pending().await,
    }
}

/// Returns 80% to 120% of a time, so that many balancers do not ask together.
fn jittered(time: Duration) -> Duration {
    time.mul_f64(0.8 + 0.4 * fastrand::f64())
}

/// Full jitter up to a limit that doubles with each failure in a row.
fn pause(failures: u32) -> Duration {
    let limit = Duration::from_millis(100 << failures.min(5)).min(PAUSE_MAX);
    limit.mul_f64(fastrand::f64())
}

// === impl Broken ===

impl From<HttpFailure> for Broken {
    fn from(failure: HttpFailure) -> Broken {
        Broken { failure, only: None }
    }
}

impl From<GatewayFailure> for Broken {
    fn from(failure: GatewayFailure) -> Broken {
        failure.http.into()
    }
}

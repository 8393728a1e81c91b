//! The script of the demo: the order of events, and the checks that must pass.
//!
//! The demo runs it on its own runtime. Dropping the future of [`DemoScript::run`]
//! interrupts it and closes every client. It prints measurements only.

use super::backends::Backends;
use super::balancer::{DemoBalancer, DemoStatus};
use super::explain::LoggedSession;
use super::place::{DemoDirectory, NAME, for_shell};
use super::screen::{OutputClosed, Screen};
use super::split::Split;
use super::traffic::{
    LONG_LIVED, LongLived, LongLivedConnection, RATE, RATE_SLOW, RequestCounts, Traffic,
};
use crate::cli::demo::split;
use std::cell::{Cell, RefCell};
use std::path::Path;
use std::time::{Duration, Instant};
use tidegate_net::clock;
use tokio::time::sleep;

/// Bounds of the length of a phase, which is a tenth of `--for`: long enough to show
/// something, and short enough to leave the rest of a long demo to the user.
const PHASE_MIN: Duration = Duration::from_millis(500);
const PHASE_MAX: Duration = Duration::from_secs(3);

/// Maximum time until the balancer detects a change of a backend. Three probes take 0.6
/// s; the rest is for busy machines.
const NOTICE_MAX: Duration = Duration::from_secs(5);

/// Interval at which the status is read while a change is expected.
const POLL_INTERVAL: Duration = Duration::from_millis(5);

/// Interval at which the status is read otherwise.
const POLL_INTERVAL_SLOW: Duration = Duration::from_millis(200);

/// Maximum number of measurements of a split, if measurements are disturbed.
pub(crate) const MEASURES_MAX: usize = 3;

/// How the demo ended.
#[derive(Debug, Default)]
pub(crate) struct DemoResult {
    pub(crate) summary: Vec<String>,
    /// Failed checks; empty is success.
    pub(crate) broken: Vec<String>,
    pub(crate) cut_short: bool,
}

/// Times of the demo.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Time {
    pub(crate) started: Instant,
    pub(crate) length: Duration,
    /// Time for the user at the end; `None`: the rest of `length`.
    pub(crate) play: Option<Duration>,
}

/// The running demo; see the module's documentation.
#[derive(Debug)]
pub(crate) struct DemoScript<'a> {
    pub(crate) screen: &'a Screen,
    pub(crate) backends: &'a Backends,
    pub(crate) place: &'a DemoDirectory,
    pub(crate) balancer: &'a DemoBalancer,
    names: Vec<String>,
    pub(crate) phase: Duration,
    ends: Instant,
    play: Option<Duration>,
    verdict: RefCell<DemoResult>,
    /// Whether all checks were made.
    complete: Cell<bool>,
}

impl<'a> DemoScript<'a> {
    pub(crate) fn new(
        screen: &'a Screen,
        backends: &'a Backends,
        place: &'a DemoDirectory,
        balancer: &'a DemoBalancer,
        Time { started, length, play }: Time,
    ) -> DemoScript<'a> {
        let names = backends.all().iter().map(|backend| backend.name.clone()).collect();
        let phase = (length / 10).clamp(PHASE_MIN, PHASE_MAX);
        let (ends, verdict, complete) = (started + length, RefCell::default(), Cell::new(false));
        DemoScript {
            screen,
            backends,
            place,
            balancer,
            names,
            phase,
            ends,
            play,
            verdict,
            complete,
        }
    }

    /// Runs the whole script. At its end the balancer is draining.
    pub(crate) async fn run(&self) -> Result<DemoResult, OutputClosed> {
        let Some(seen) = self.until(DemoStatus::all_serve).await else {
            self.broken("not all backends were in rotation after 5 s".to_owned());
            return Ok(self.verdict.take());
        };
        self.introduce(&seen)?;
        let long = match LongLived::open(self.balancer.frontend).await {
            Ok(long) => long,
            Err(error) => {
                self.broken(format!("a connection through the balancer failed: {error}"));
                return Ok(self.verdict.take());
            }
        };
        self.split("All backends are up", self.phase).await?;
        if self.names.len() > 1 {
            self.failover(&long).await?;
        } else {
            self.line("")?;
            self.say("Only one backend: no failover to show.")?;
            self.sum_up("one backend: no failover to show");
        }
        self.reload().await?;
        self.upgrade(&long).await?;
        self.complete.set(true);
        self.rest().await?;
        self.account().await?;
        self.drain(long).await?;
        Ok(self.verdict.take())
    }

    /// Returns the result of an interrupted demo.
    pub(crate) fn cut_short(&self, why: &str) -> DemoResult {
        if !self.complete.get() {
            self.broken(format!("{why} before the demonstration was complete"));
        }
        DemoResult { cut_short: true, ..self.verdict.take() }
    }

    fn introduce(&self, seen: &DemoStatus) -> Result<(), OutputClosed> {
        let count = self.names.len();
        let (version, balancer) = (env!("CARGO_PKG_VERSION"), self.balancer);
        let config = for_shell(&self.place.config());
        let DemoStatus { engine, engine_reason, workers, .. } = seen;
        let plural = if count == 1 { "" } else { "s" };
        self.line(&format!(
            "Tidegate {version}: a balancer and {count} backend{plural} on this machine"
        ))?;
        self.say(&format!("frontend       {}", balancer.frontend))?;
        self.say(&format!("admin API      http://{}", balancer.admin))?;
        self.say(&format!("configuration  {config} (changes are applied at once)"))?;
        self.say(&format!("engine         {engine} ({engine_reason}); workers: {workers}"))?;
        self.say(&format!("clients        {RATE} connections per second, {LONG_LIVED} long-lived"))
    }

    /// Measures the distribution and prints its table. If the table of the balancer
    /// changes, or another client connects, the measurement is discarded and repeated.
    pub(crate) async fn split(&self, title: &str, length: Duration) -> Result<(), OutputClosed> {
        self.line("")?;
        self.line(title)?;
        self.screen.now(title);
        for _ in 0..MEASURES_MAX {
            let before = self.seen().await;
            let traffic = self.traffic(RATE);
            sleep(length).await;
            let tally = traffic.finish(split::round(&before)).await;
            let after = self.seen().await;
            if let Some(why) = disturbance(&before, &after, &tally) {
                self.say(&format!("measuring again: {why}"))?;
                continue;
            }
            return self.judge(title, &Split::new(&before, &self.names, &tally), &tally);
        }
        self.broken(format!("{title}: the split could not be measured without interference"));
        Ok(())
    }

    fn judge(&self, title: &str, split: &Split, tally: &RequestCounts) -> Result<(), OutputClosed> {
        for line in split.lines() {
            self.say(&line)?;
        }
        let total = tally.total();
        if split.exact() {
            self.say(&format!("{total} requests, 0 failed; split exactly by weight"))?;
            self.sum_up(&format!("{}: {total} requests, split exactly by weight", lower(title)));
        } else {
            self.say(&format!("{total} requests: {}", split.complaint()))?;
            self.broken(format!("{title}: {}", split.complaint()));
        }
        Ok(())
    }

    /// Kills a backend and restarts it, and prints the effects of both.
    async fn failover(&self, long: &LongLived) -> Result<(), OutputClosed> {
        let target = self.busiest(&long.connections());
        let name = &self.names[target];
        let title =
            format!("{name} is killed: its port refuses connections and its connections are reset");
        self.line("")?;
        self.line(&title)?;
        self.screen.now(&title);
        let retries = self.retries().await;
        let traffic = self.traffic(RATE);
        sleep(self.phase / 4).await;
        let killed = clock::now();
        if let Err(error) = self.backends.kill(target).await {
            self.broken(format!("cannot kill {name}: {error}"));
            return Ok(());
        }
        let out =
            |seen: &DemoStatus| seen.backend(name).is_none_or(|backend| backend.effective == 0);
        let Some(seen) = self.until(out).await else {
            self.broken(format!("the balancer did not detect within 5 s that {name} was killed"));
            return Ok(());
        };
        let noticed = self.print_change(name, &seen, killed, "removed from rotation")?;
        // Long enough to affect the long-lived connections.
        sleep((self.phase / 4).max(Duration::from_millis(300))).await;
        let tally = traffic.finish(1).await;
        let retried = self.retries().await - retries;
        self.print_failures(&tally, noticed, retried)?;
        self.print_long_lived(name, &long.connections()).await?;
        self.explain(name, &tally, retried).await?;
        self.split(&format!("{name} is down"), self.phase / 2).await?;
        self.restart(target).await
    }

    async fn restart(&self, target: usize) -> Result<(), OutputClosed> {
        let name = &self.names[target];
        let title = format!("{name} is back");
        self.line("")?;
        self.line(&title)?;
        self.screen.now(&title);
        let traffic = self.traffic(RATE);
        let revived = clock::now();
        if let Err(error) = self.backends.restart(target).await {
            self.broken(format!("cannot restart {name}: {error}"));
            return Ok(());
        }
        let back = |seen: &DemoStatus| seen.backend(name).is_some_and(|backend| backend.serves());
        let Some(seen) = self.until(back).await else {
            self.broken(format!("{name} was back for 5 s but did not return to rotation"));
            return Ok(());
        };
        self.print_change(name, &seen, revived, "returned to rotation")?;
        let tally = traffic.finish(1).await;
        let (total, failed) = (tally.total(), tally.failed);
        self.say(&format!("{total} requests during this time, {failed} failed"))?;
        if failed > 0 {
            self.broken(format!("{failed} requests failed while {name} returned"));
        }
        self.split("All backends are up again", self.phase / 2).await
    }

    /// Prints when and why the state of the backend changed. Returns the time of the
    /// change.
    fn print_change(
        &self,
        name: &str,
        seen: &DemoStatus,
        since: Instant,
        what: &str,
    ) -> Result<Instant, OutputClosed> {
        let changed = seen.backend(name).and_then(|backend| backend.changed.clone());
        let Some((to, reason, seconds_ago)) = changed else {
            self.say(&format!("{name} {what}"))?;
            return Ok(clock::now());
        };
        let at = clock::now() - Duration::from_secs_f64(seconds_ago);
        let took = at.saturating_duration_since(since).as_millis();
        self.say(&format!("{what} after {took} ms: {to}, {reason}"))?;
        self.sum_up(&format!("{name} {what} after {took} ms"));
        Ok(at)
    }

    fn print_failures(
        &self,
        tally: &RequestCounts,
        noticed: Instant,
        retried: u64,
    ) -> Result<(), OutputClosed> {
        let (total, failed) = (tally.total(), tally.failed);
        let late = tally.failed_since(noticed);
        self.say(&format!(
            "{total} requests before and after: {failed} failed, {} of them started after the removal",
            late.len()
        ))?;
        self.say(&format!("{retried} failed connects were retried on another backend"))?;
        self.sum_up(&format!("{failed} of {total} requests around the failure failed"));
        if let Some(first) = late.first() {
            let why = &first.why;
            self.broken(format!("{} requests failed after the removal: {why}", late.len()));
        }
        Ok(())
    }

    /// Prints the state of the long-lived connections, and the access-log line of one
    /// that ended.
    async fn print_long_lived(
        &self,
        target: &str,
        connections: &[LongLivedConnection],
    ) -> Result<(), OutputClosed> {
        let on = |one: &&LongLivedConnection| one.backend == target;
        let ended = connections.iter().filter(on).filter(|one| one.broken.is_some()).count();
        let held = connections.iter().filter(on).count();
        let affected =
            connections.iter().filter(|one| !on(one)).filter(|one| one.broken.is_some()).count();
        let others = connections.len() - held;
        self.say(&format!(
            "of {} long-lived connections, {held} were on {target} ({ended} ended with it) \
             and {others} on others ({affected} ended)",
            connections.len()
        ))?;
        self.sum_up(&format!("{affected} of {others} connections on other backends were affected"));
        if ended != held {
            self.broken(format!("{} connections survived their killed backend", held - ended));
        }
        if affected > 0 {
            self.broken(format!("{affected} connections ended although their backend was alive"));
        }
        let Some(one) = connections.iter().filter(on).find(|one| one.broken.is_some()) else {
            return Ok(());
        };
        let client = one.client.to_string();
        let Some(line) = self.logged_session(|one| one.is_of(&client)).await else {
            return Ok(());
        };
        let LoggedSession { backend, cause, phase, code, .. } = line;
        let backend = backend.as_deref().unwrap_or("-");
        self.say(&format!(
            "access log of one of them: backend {backend}, cause {cause}, phase {phase}, \
             code {code}"
        ))
    }

    /// Leaves the remaining time to the user.
    async fn rest(&self) -> Result<(), OutputClosed> {
        let ends = self.play.map_or(self.ends, |play| clock::now() + play);
        let left = ends.saturating_duration_since(clock::now());
        if left.is_zero() {
            return Ok(());
        }
        self.line("")?;
        self.line(&format!("The demonstration stays up for {:.1} s. Try:", left.as_secs_f64()))?;
        for line in self.invitations() {
            self.say(&line)?;
        }
        self.screen.now("interactive");
        let traffic = self.traffic(RATE_SLOW);
        let begun_with = self.seen().await;
        let mut before = begun_with.clone();
        let mut refused = 0;
        while clock::now() < ends {
            let left = ends.saturating_duration_since(clock::now());
            sleep(POLL_INTERVAL_SLOW.min(left)).await;
            let now = self.seen().await;
            self.print_news(&before, &now, &mut refused).await?;
            before = now;
            self.place.bound_access_log();
        }
        let tally = traffic.finish(1).await;
        let (total, failed) = (tally.total(), tally.failed);
        self.say(&format!("{total} requests during this time, {failed} failed"))?;
        if failed > 0 && before.serial == begun_with.serial {
            self.broken(format!("{failed} requests failed although nothing changed"));
        }
        Ok(())
    }

    fn invitations(&self) -> Vec<String> {
        let program = std::env::args_os().next().unwrap_or_else(|| "tidegate".into());
        let (program, admin) = (for_shell(Path::new(&program)), self.balancer.admin);
        let (token, log) = (for_shell(&self.place.token()), for_shell(&self.place.access_log()));
        let last = self.names.last().map_or("b1", String::as_str);
        vec![
            format!("curl http://{admin}/v1/status"),
            format!("curl http://{admin}/metrics"),
            format!(
                "curl -X POST -H \"Authorization: Bearer $(cat {token})\" \
                 http://{admin}/v1/pools/{NAME}/backends/{last}/drain"
            ),
            format!("{program} status --admin {admin}"),
            format!("{program} explain {NAME}/{last} --admin {admin}"),
            format!("{program} undrain {NAME}/{last} --admin {admin} --token-file {token}"),
            format!("{program} upgrade --admin {admin} --token-file {token}"),
            format!("tail -f {log}"),
        ]
    }

    /// Prints what changed between two readings of the status.
    async fn print_news(
        &self,
        before: &DemoStatus,
        now: &DemoStatus,
        refused: &mut u64,
    ) -> Result<(), OutputClosed> {
        if now.generation != before.generation {
            self.say(&format!("configuration change applied: generation {}", now.generation))?;
        }
        for backend in &now.backends {
            let old = before.backend(&backend.name);
            if old
                .is_some_and(|old| old.intent != backend.intent || old.serves() != backend.serves())
                && let Some((to, reason, _)) = &backend.changed
            {
                self.say(&format!("{} is now {to}: {reason}", backend.name))?;
            }
        }
        let Some(metrics) = self.balancer.metrics().await else { return Ok(()) };
        let total = metrics.count("tidegate_reloads_total{result=\"refused\"}");
        if total > *refused {
            let config = for_shell(&self.place.config());
            self.say(&format!(
                "configuration change rejected; run: tidegate check --config {config}"
            ))?;
        }
        *refused = total;
        Ok(())
    }

    /// Adds the balancer's own counts of session ends to the summary.
    async fn account(&self) -> Result<(), OutputClosed> {
        let Some(metrics) = self.balancer.metrics().await else { return Ok(()) };
        let ends: Vec<String> =
            metrics.session_ends().iter().map(|(how, count)| format!("{count} {how}")).collect();
        let open = self.seen().await.open;
        self.sum_up(&format!("session ends: {}; {open} open", ends.join(", ")));
        Ok(())
    }

    /// Finishes the open sessions while the balancer drains.
    async fn drain(&self, long: LongLived) -> Result<(), OutputClosed> {
        self.line("")?;
        self.line("Draining")?;
        self.screen.now("draining");
        self.balancer.shut_down().await;
        let connections = long.close().await;
        let closed = connections.iter().filter(|one| one.closed).count();
        let exchanges: u64 = connections.iter().map(|one| one.exchanges).sum();
        self.say(&format!("{closed} open connections made one more exchange each and closed"))?;
        let count = connections.len();
        self.sum_up(&format!("{exchanges} exchanges on {count} long-lived connections"));
        let cut = connections.iter().filter(|one| one.broken.is_none() && !one.closed).count();
        if cut > 0 {
            self.broken(format!("{cut} connections did not close cleanly during the drain"));
        }
        Ok(())
    }

    pub(crate) fn traffic(&self, rate: u32) -> Traffic {
        Traffic::start(self.balancer.frontend, self.names.clone(), rate)
    }

    /// Returns the backend with the most long-lived connections; the first of equals.
    fn busiest(&self, connections: &[LongLivedConnection]) -> usize {
        let held = |name: &String| connections.iter().filter(|one| one.backend == *name).count();
        let mut best = 0;
        for index in 1..self.names.len() {
            if held(&self.names[index]) > held(&self.names[best]) {
                best = index;
            }
        }
        best
    }

    /// Reads the status until `condition` is true, for at most [`NOTICE_MAX`].
    pub(crate) async fn until(
        &self,
        condition: impl Fn(&DemoStatus) -> bool,
    ) -> Option<DemoStatus> {
        let deadline = clock::now() + NOTICE_MAX;
        while clock::now() < deadline {
            let seen = self.seen().await;
            if condition(&seen) {
                return Some(seen);
            }
            sleep(POLL_INTERVAL).await;
        }
        None
    }

    pub(crate) async fn seen(&self) -> DemoStatus {
        self.balancer.seen().await.unwrap_or_default()
    }

    async fn retries(&self) -> u64 {
        let metrics = self.balancer.metrics().await;
        metrics.map_or(0, |metrics| metrics.count("tidegate_connect_retries_total"))
    }

    pub(crate) fn line(&self, text: &str) -> Result<(), OutputClosed> {
        self.screen.line(text)
    }

    /// Prints a line below a title.
    pub(crate) fn say(&self, text: &str) -> Result<(), OutputClosed> {
        self.line(&format!("   {text}"))
    }

    pub(crate) fn sum_up(&self, text: &str) {
        self.verdict.borrow_mut().summary.push(text.to_owned());
    }

    pub(crate) fn broken(&self, what: String) {
        self.verdict.borrow_mut().broken.push(what);
    }
}

/// Returns why a measurement is not valid.
fn disturbance(before: &DemoStatus, after: &DemoStatus, tally: &RequestCounts) -> Option<String> {
    if before.serial != after.serial {
        let changed =
            after.backends.iter().zip(&before.backends).find(|(a, b)| a.effective != b.effective);
        let what = changed.map_or("the configuration", |(backend, _)| backend.name.as_str());
        return Some(format!("{what} changed during the measurement"));
    }
    let (accepted, own) = (after.sessions.saturating_sub(before.sessions), tally.total());
    (accepted > own).then(|| format!("{} connections came from other clients", accepted - own))
}

fn lower(title: &str) -> String {
    let mut letters = title.chars();
    let first = letters.next().map(|first| first.to_ascii_lowercase());
    // Names of backends are already lower case.
    first.into_iter().chain(letters).collect()
}

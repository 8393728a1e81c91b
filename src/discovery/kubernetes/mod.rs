//! Members from Kubernetes: the EndpointSlices of a service.
//!
//! The discovery thread runs [`run`] for each question. The source lists the slices and
//! follows a watch from the version of the list. Only versions that the server sent count.
//! After a lost history (410) it lists again, and the members stay. A watch that is silent
//! for too long is replaced, and everything is listed again at a jittered age. A service
//! without slices does not exist, which is a failure and not an empty set.

mod access;
mod codec;
mod config;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
#[cfg(test)]
mod kubectl_tests;
mod picture;
#[cfg(test)]
mod tests;

pub use access::{KubernetesAccess, files_of_kubeconfig};

use crate::backoff::{CHANGED_MIN, Pause, UNCHANGED_MIN};
use crate::client::{HttpFailure, HttpStream};
use crate::lines::LineBuffer;
use crate::parse::off_runtime;
use crate::tell::Teller;
use access::KubernetesServer;
use codec::{SliceEvent, SliceFacts};
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use picture::{PARTS_MAX, SlicePicture, parts};
use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use tidegate_core::discovery::{Announced, SourceFailure, Told, Unreadable, WholeSet};
use tidegate_net::clock;
use tokio::time::sleep_until;

/// Endpoint slices of a page of a list. A slice has up to 1,000 endpoints, usually 100.
const PAGE_SLICES: usize = 100;

/// Most pages of a list.
const PAGES_MAX: usize = 1000;

/// What is asked.
#[derive(Debug, Clone)]
pub struct ServiceQuestion {
    /// Name of the service.
    pub service: Arc<str>,
    /// `None`: that of the access.
    pub namespace: Option<Arc<str>>,
    /// Name or number; `None`: the first TCP port of each slice.
    pub port: Option<Arc<str>>,
}

/// Time limits of a watch.
#[derive(Debug, Clone, Copy)]
pub struct WatchTimes {
    /// A watch without a byte for this time is replaced. The API server sends a bookmark
    /// about once per minute.
    pub silence: Duration,
    /// Everything is listed again after this time, plus up to half of it.
    pub relist: Duration,
}

/// Asks for the endpoints of a service and tells every change.
pub async fn run(
    question: ServiceQuestion,
    access: KubernetesAccess,
    times: WatchTimes,
    teller: Teller,
) -> Infallible {
    let picture = SlicePicture::default();
    let port = question.port.clone();
    let mut source = KubernetesSource { teller, picture, port, last: None, version: 0 };
    let mut pause = Pause::new();
    loop {
        pause.begin();
        match source.list_and_watch(&question, &access, times).await {
            // The time for another list has come.
            Ok(()) => {
                source.teller.counters().relists.fetch_add(1, Ordering::Relaxed);
                pause.unchanged().await;
            }
            Err(failure) => {
                if matches!(failure.why, SourceFailure::Auth | SourceFailure::Connect) {
                    access.forget();
                }
                let listed = failure.why == SourceFailure::Compacted;
                source.teller.tell(failure.told());
                source.teller.counters().watch_restarts.fetch_add(1, Ordering::Relaxed);
                // A lost history says nothing about the server's health.
                if listed {
                    pause.unchanged().await;
                } else {
                    pause.failed().await;
                }
            }
        }
    }
}

/// One question.
struct KubernetesSource {
    teller: Teller,
    picture: SlicePicture,
    port: Option<Arc<str>>,
    /// The members of the last answer, and which endpoints were unreadable.
    last: Option<(Arc<[Announced]>, Unreadable)>,
    /// The newest version of a list as a number; 0 if it is none.
    version: u64,
}

/// A watch in progress.
struct SliceWatch {
    stream: HttpStream,
    lines: LineBuffer,
}

/// Why a watch ended without a failure.
enum WatchEnd {
    /// The server closed it. The watch can continue after the last version.
    Closed,
    /// The time for another list has come.
    Old,
}

// === impl KubernetesSource ===

impl KubernetesSource {
    async fn list_and_watch(
        &mut self,
        question: &ServiceQuestion,
        access: &KubernetesAccess,
        times: WatchTimes,
    ) -> Result<(), HttpFailure> {
        let server = access.server()?;
        let path = slices_path(question, &server);
        let mut version = self.list(&server, &path).await?;
        let old = clock::now() + times.relist.mul_f64(1.0 + fastrand::f64() / 2.0);
        loop {
            let opened = clock::now();
            let mut watch = SliceWatch::open(&server, &path, &version, times).await?;
            match self.follow(&mut watch, &mut version, old, times).await? {
                WatchEnd::Old => return Ok(()),
                WatchEnd::Closed => {
                    self.teller.counters().watch_restarts.fetch_add(1, Ordering::Relaxed);
                    // A server that closes each watch at once gets one request per second.
                    sleep_until((opened + UNCHANGED_MIN).into()).await;
                    // A watch from a version that the server has not reached is silent.
                    let (page, _) = self.page(&server, &path, 1, "").await?;
                    self.version = self.version.max(version.parse().unwrap_or(0));
                    self.check_version(&page.resource_version)?;
                }
            }
        }
    }

    /// Lists all slices, tells the set and returns the version to watch from.
    async fn list(&mut self, server: &KubernetesServer, path: &str) -> Result<String, HttpFailure> {
        let mut slices = Vec::new();
        let mut next = String::new();
        let mut read = 0;
        for _ in 0..PAGES_MAX {
            let (page, more) = self.page(server, path, PAGE_SLICES, &next).await?;
            read += parts(&more);
            check_size(read)?;
            slices.extend(more);
            next = page.next;
            if next.is_empty() {
                self.check_version(&page.resource_version)?;
                self.picture.replace(slices);
                self.tell(&page.resource_version)?;
                return Ok(page.resource_version);
            }
        }
        Err(HttpFailure::protocol(format_args!("the list has more than {PAGES_MAX} pages")))
    }

    async fn page(
        &self,
        server: &KubernetesServer,
        path: &str,
        limit: usize,
        next: &str,
    ) -> Result<(codec::ListMetadata, Vec<SliceFacts>), HttpFailure> {
        let mut target = format!("{path}&limit={limit}");
        if !next.is_empty() {
            target += &format!("&continue={}", encoded(next));
        }
        let answer = server.client.send(&server.request(target)).await?;
        if let Some(failure) = answer.failure() {
            let status = codec::status(&answer.body);
            return Err(refusal(answer.status, &status.message).unwrap_or(failure));
        }
        let (body, port) = (answer.body, self.port.clone());
        off_runtime(body.len(), move || codec::page(&body, port.as_deref())).await?.map_err(
            |error| HttpFailure::protocol(format_args!("cannot read the list of slices: {error}")),
        )
    }

    /// Refuses a list that is older than one that was seen: etcd was restored from a
    /// backup. The next list counts.
    fn check_version(&mut self, version: &str) -> Result<(), HttpFailure> {
        let number = version.parse().unwrap_or(0);
        let before = std::mem::replace(&mut self.version, number);
        if number < before {
            let text = format_args!("the version went back from {before} to {version}");
            return Err(HttpFailure::new(SourceFailure::Stale, text));
        }
        Ok(())
    }

    /// Applies events until the watch ends.
    async fn follow(
        &mut self,
        watch: &mut SliceWatch,
        version: &mut String,
        old: Instant,
        times: WatchTimes,
    ) -> Result<WatchEnd, HttpFailure> {
        let mut told = clock::now();
        // When the source tells the set: an event arrived, or a missing endpoint leaves.
        let mut due = self.picture.show(told).until;
        loop {
            let wake = due.map_or(old, |due| due.min(old));
            tokio::select! {
                () = sleep_until(wake.into()) => {
                    if wake == old {
                        return Ok(WatchEnd::Old);
                    }
                    due = self.tell(version)?;
                    told = clock::now();
                }
                received = watch.receive(times.silence) => {
                    let Some(line) = received? else { return Ok(WatchEnd::Closed) };
                    self.apply(&line, version)?;
                    // Events that arrived together are one answer.
                    while let Some(line) = watch.lines.next_line() {
                        self.apply(line, version)?;
                    }
                    let next = told + CHANGED_MIN;
                    due = Some(due.map_or(next, |due| due.min(next)));
                }
            }
        }
    }

    fn apply(&mut self, line: &[u8], version: &mut String) -> Result<(), HttpFailure> {
        let event = codec::event(line, self.port.as_deref()).map_err(|error| {
            HttpFailure::protocol(format_args!("cannot read an event of the watch: {error}"))
        })?;
        let seen = match event {
            None => return Ok(()),
            Some(SliceEvent::Put(slice)) => {
                let seen = slice.version.clone();
                self.picture.put(slice);
                check_size(self.picture.size())?;
                seen
            }
            Some(SliceEvent::Deleted { name, version }) => {
                self.picture.delete(&name);
                version
            }
            Some(SliceEvent::Bookmark { version }) => version,
            Some(SliceEvent::Error { code, message }) => {
                let other = || HttpFailure::protocol(format_args!("status {code}: {message}"));
                return Err(refusal(code, &message).unwrap_or_else(other));
            }
        };
        if !seen.is_empty() {
            *version = seen;
        }
        Ok(())
    }

    /// Tells the set, and returns when a missing endpoint leaves.
    fn tell(&mut self, version: &str) -> Result<Option<Instant>, HttpFailure> {
        if self.picture.is_absent() {
            let text = "the service has no EndpointSlice: it does not exist in this namespace";
            return Err(HttpFailure::new(SourceFailure::NotFound, text));
        }
        let shown = self.picture.show(clock::now());
        let unchanged = self.last.as_ref().is_some_and(|(members, unreadable)| {
            **members == *shown.members && *unreadable == shown.unreadable
        });
        if unchanged {
            self.teller.tell(Told::Alive);
            return Ok(shown.until);
        }
        let members: Arc<[Announced]> = shown.members.into();
        let unreadable = shown.unreadable;
        self.last = Some((Arc::clone(&members), unreadable.clone()));
        let (version, keys) = (format!("resourceVersion {version}"), [].into());
        let set = WholeSet { members, version, trusted: true, unreadable, keys };
        self.teller.tell(Told::Whole(set));
        Ok(shown.until)
    }
}

// === impl SliceWatch ===

impl SliceWatch {
    async fn open(
        server: &KubernetesServer,
        path: &str,
        version: &str,
        times: WatchTimes,
    ) -> Result<SliceWatch, HttpFailure> {
        // The server ends the watch shortly after the next list.
        let seconds = times.relist.as_secs().max(1) * 2;
        let target = format!(
            "{path}&watch=true&allowWatchBookmarks=true&resourceVersion={}&timeoutSeconds={seconds}",
            encoded(version)
        );
        let mut stream = server.client.open(&server.request(target)).await?;
        if let Some(failure) = stream.failure(times.silence.min(Duration::from_secs(5))).await {
            return Err(refusal(stream.status(), &failure.detail).unwrap_or(failure));
        }
        Ok(SliceWatch { stream, lines: LineBuffer::new(codec::EVENT_BYTES_MAX) })
    }

    /// Waits for a line. Returns `None` when the server closes the watch; the begin of a line
    /// is no event. Dropping the future loses nothing.
    async fn receive(&mut self, silence: Duration) -> Result<Option<Vec<u8>>, HttpFailure> {
        loop {
            if let Some(line) = self.lines.next_line() {
                return Ok(Some(line.to_vec()));
            }
            match self.stream.chunk(silence).await? {
                Some(chunk) => self.lines.push(&chunk)?,
                None => return Ok(None),
            }
        }
    }
}

/// Refuses a service with too many endpoints. Its former members stay.
fn check_size(size: usize) -> Result<(), HttpFailure> {
    match size > PARTS_MAX {
        true => Err(HttpFailure::protocol(format_args!(
            "the service has more than {PARTS_MAX} endpoints and slices"
        ))),
        false => Ok(()),
    }
}

/// Returns the failure of the codes that have a meaning of their own.
fn refusal(code: u16, message: &str) -> Option<HttpFailure> {
    let why = match code {
        401 | 403 => SourceFailure::Auth,
        404 => SourceFailure::NotFound,
        410 => SourceFailure::Compacted,
        504 => SourceFailure::Timeout,
        _ => return None,
    };
    Some(HttpFailure::new(why, format_args!("status {code}: {message}")))
}

/// Returns the path with the label selector of the service.
fn slices_path(question: &ServiceQuestion, server: &KubernetesServer) -> String {
    let namespace = question.namespace.as_ref().unwrap_or(&server.namespace);
    format!(
        "{}/apis/discovery.k8s.io/v1/namespaces/{}/endpointslices?labelSelector={}",
        server.prefix,
        encoded(namespace),
        encoded(&format!("kubernetes.io/service-name={}", question.service)),
    )
}

fn encoded(text: &str) -> String {
    utf8_percent_encode(text, NON_ALPHANUMERIC).to_string()
}

// === impl Default for WatchTimes ===

impl Default for WatchTimes {
    fn default() -> WatchTimes {
        WatchTimes { silence: Duration::from_secs(75), relist: Duration::from_secs(150) }
    }
}

//! `GET /v1/stream`: the status, and its changes once a second, as server-sent events.
//!
//! Mounted by `routes`. Nothing is computed while no stream is open. The first viewer starts a
//! task (`driver`), which asks the control loop for a snapshot once a second, as a request for
//! the status does. A blocking thread compares it with the one before (`picture`, `changes`)
//! and writes each text once for all viewers with the same selection (`groups`).

mod changes;
mod driver;
mod groups;
mod picture;
mod selection;
#[cfg(test)]
mod tests;
mod viewer;

use super::questions::bad;
use super::routes::{ApiState, ErrorResponse};
use super::serve::StreamingConnection;
use axum::body::Body;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use driver::drive;
use hyper::header::{CACHE_CONTROL, CONTENT_TYPE};
use hyper::http::Extensions;
use hyper::{StatusCode, Uri};
use selection::StreamSelection;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::Notify;
use viewer::{StreamBody, StreamViewer};

/// Open streams. Further ones are refused with 503.
pub(super) const VIEWERS_MAX: usize = 8;

/// Counts of streams. Clones share them.
#[derive(Debug, Clone, Default)]
pub struct StreamCounters(Arc<StreamCounts>);

#[derive(Debug, Default)]
struct StreamCounts {
    open: AtomicUsize,
    dropped: AtomicU64,
    refused: AtomicU64,
}

/// The open streams, as the requests see them.
#[derive(Debug)]
pub(super) struct StreamHub {
    counters: StreamCounters,
    entrance: Mutex<HubEntrance>,
    /// Wakes the driver.
    joined: Notify,
}

#[derive(Debug, Default)]
struct HubEntrance {
    /// Viewers that the driver has not seen yet.
    joining: Vec<(StreamSelection, Arc<StreamViewer>)>,
    /// Whether the driver runs.
    driven: bool,
}

pub(super) async fn stream(
    State(api): State<Arc<ApiState>>,
    uri: Uri,
    extensions: Extensions,
) -> Result<Response, ErrorResponse> {
    let selection = StreamSelection::parse(uri.query().unwrap_or_default()).map_err(bad)?;
    let connection = extensions.get::<StreamingConnection>().cloned();
    let body = StreamHub::join(&api, selection, connection)?;
    let head = [(CONTENT_TYPE, "text/event-stream"), (CACHE_CONTROL, "no-cache")];
    Ok((head, Body::new(body)).into_response())
}

// === impl StreamCounters ===

impl StreamCounters {
    /// Returns the number of open streams.
    pub fn open(&self) -> usize {
        self.0.open.load(Ordering::Relaxed)
    }

    /// Returns how many streams were closed because their viewer read too slowly.
    pub fn dropped(&self) -> u64 {
        self.0.dropped.load(Ordering::Relaxed)
    }

    /// Returns how many streams were refused.
    pub fn refused(&self) -> u64 {
        self.0.refused.load(Ordering::Relaxed)
    }

    /// Returns counts that let no stream in.
    #[cfg(any(test, fuzzing))]
    pub(super) fn full() -> StreamCounters {
        let counters = StreamCounters::default();
        while counters.enter() {}
        counters
    }

    /// Counts a new stream, unless [`VIEWERS_MAX`] are open.
    fn enter(&self) -> bool {
        let more = |open| (open < VIEWERS_MAX).then_some(open + 1);
        let entered = self.0.open.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more).is_ok();
        if !entered {
            self.0.refused.fetch_add(1, Ordering::Relaxed);
        }
        entered
    }

    fn leave(&self) {
        self.0.open.fetch_sub(1, Ordering::Relaxed);
    }

    fn count_dropped(&self) {
        self.0.dropped.fetch_add(1, Ordering::Relaxed);
    }
}

// === impl StreamHub ===

impl StreamHub {
    pub(super) fn new(counters: StreamCounters) -> StreamHub {
        StreamHub { counters, entrance: Mutex::default(), joined: Notify::new() }
    }

    /// Opens a stream. Starts the driver if it does not run.
    fn join(
        api: &Arc<ApiState>,
        selection: StreamSelection,
        connection: Option<StreamingConnection>,
    ) -> Result<StreamBody, ErrorResponse> {
        let full = |detail: String| {
            Err(ErrorResponse::new(StatusCode::SERVICE_UNAVAILABLE, "no stream is free", detail))
        };
        if *api.closing.borrow() {
            return full("this process ends, or another one takes over; connect again".to_owned());
        }
        let hub = &api.hub;
        if !hub.counters.enter() {
            return full(format!(
                "{VIEWERS_MAX} streams are open, which is the maximum; close one, or read \
                 /v1/status"
            ));
        }
        let viewer = Arc::new(StreamViewer::new(hub.counters.clone(), connection));
        let body = StreamBody::new(Arc::clone(&viewer));
        let mut entrance = hub.entrance();
        entrance.joining.push((selection, viewer));
        if !std::mem::replace(&mut entrance.driven, true) {
            tokio::spawn(drive(Arc::clone(api)));
        }
        drop(entrance);
        hub.joined.notify_one();
        Ok(body)
    }

    /// Removes and returns the viewers that have joined.
    fn take_joining(&self) -> Vec<(StreamSelection, Arc<StreamViewer>)> {
        std::mem::take(&mut self.entrance().joining)
    }

    /// Ends the driver, unless a viewer has joined. Returns whether it ends.
    fn leave_if_idle(&self) -> bool {
        let mut entrance = self.entrance();
        entrance.driven = !entrance.joining.is_empty();
        !entrance.driven
    }

    /// Ends the driver and the streams that it has not seen yet.
    fn close(&self) {
        let mut entrance = self.entrance();
        entrance.driven = false;
        for (_, viewer) in entrance.joining.drain(..) {
            viewer.end();
        }
    }

    fn entrance(&self) -> MutexGuard<'_, HubEntrance> {
        self.entrance.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

//! Fault injection for tests: `POST /debug/fault/{place}/{worker}/{millis}`.
//!
//! Mounted by `routes` in builds with debug assertions, if the environment has
//! `TIDEGATE_FAULTS=1`. A release build does not contain it. A place is a name of
//! `dataplane::fault_points`, `control` or `stall`.

use super::AdminRequest;
use super::routes::{ApiState, ErrorResponse, answer};
use axum::Router;
use axum::extract::{Path, State};
use axum::response::Response;
use axum::routing::post;
use hyper::StatusCode;
use std::sync::Arc;

/// Adds the endpoint if the environment enables it.
pub(super) fn mount(router: Router<Arc<ApiState>>) -> Router<Arc<ApiState>> {
    match std::env::var_os("TIDEGATE_FAULTS").is_some_and(|value| value == "1") {
        true => router.route("/debug/fault/{place}/{worker}/{millis}", post(fault)),
        false => router,
    }
}

async fn fault(
    State(api): State<Arc<ApiState>>,
    Path((place, worker, millis)): Path<(String, usize, u64)>,
) -> Result<Response, ErrorResponse> {
    match api.ask(|reply| AdminRequest::Fault { place, worker, millis, reply }).await? {
        true => Ok(answer("text/plain", String::new())),
        false => {
            let (error, detail) = ("unknown fault", "unknown location or worker");
            Err(ErrorResponse::new(StatusCode::BAD_REQUEST, error, detail))
        }
    }
}

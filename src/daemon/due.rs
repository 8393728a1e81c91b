//! Waiting for a time that may never come.
//!
//! Used by the parts of the control loop in their `wake`.

use std::time::Instant;

/// Resolves at `due`; never without one.
pub(super) async fn reached(due: Option<Instant>) {
    match due {
        Some(due) => tokio::time::sleep_until(due.into()).await,
        None => std::future::pending().await,
    }
}

//! Futures for optional events.
//!
//! Used by the parts of the control loop in their `wake`.

use std::time::Instant;

/// Resolves at `due`. Never resolves for `None`.
pub(super) async fn reached(due: Option<Instant>) {
    if_any(due.map(|due| tokio::time::sleep_until(due.into()))).await;
}

/// Resolves with `future`. Never resolves for `None`.
pub(super) async fn if_any<T>(future: Option<impl Future<Output = T>>) -> T {
    match future {
        Some(future) => future.await,
        None => std::future::pending().await,
    }
}

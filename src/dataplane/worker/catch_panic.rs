//! Keeping a panic inside the future it happened in.
//!
//! Used by the threads that must go on, or end in order, after one: a runtime
//! that is unwound through drops its tasks in the middle of that, and a second
//! panic there would abort the process.

use std::future::{Future, poll_fn};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::task::Poll;

/// Says that the future panicked; the panic hook has told the rest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Panicked;

/// Runs `main` to its end or to its panic. What `main` shared with others is for
/// the caller to judge, or to give up.
pub async fn catch_panic<F: Future>(main: F) -> Result<F::Output, Panicked> {
    let mut main = Box::pin(main);
    poll_fn(|cx| {
        // Never polled again after a panic.
        match catch_unwind(AssertUnwindSafe(|| main.as_mut().poll(cx))) {
            Ok(poll) => poll.map(Ok),
            Err(_) => Poll::Ready(Err(Panicked)),
        }
    })
    .await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_an_answer_and_anything_else_passes() {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(async {
            assert_eq!(catch_panic(async { 3 }).await, Ok(3));
            let panics = async {
                tokio::task::yield_now().await;
                panic!("on purpose");
            };
            assert_eq!(catch_panic::<_>(panics).await.map(|(): ()| ()), Err(Panicked));
        });
    }
}

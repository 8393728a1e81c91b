//! A long answer that is written in pieces.
//!
//! Used for status and metrics, which can be tens of megabytes. The control thread
//! writes them, and one piece at a time delays no event.

use hyper::body::{Body, Bytes, Frame, SizeHint};
use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll};

/// Bytes written before other tasks of the thread run.
const PIECE: usize = 64 * 1024;

/// See the module's documentation.
#[derive(Debug)]
pub(super) struct Pieces {
    left: Bytes,
    /// The next piece comes with the next turn.
    rests: bool,
}

// === impl Pieces ===

impl Pieces {
    pub(super) fn new(text: String) -> Pieces {
        Pieces { left: text.into(), rests: false }
    }
}

impl Body for Pieces {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        if self.left.is_empty() {
            return Poll::Ready(None);
        }
        if std::mem::take(&mut self.rests) {
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        self.rests = true;
        let length = self.left.len().min(PIECE);
        Poll::Ready(Some(Ok(Frame::data(self.left.split_to(length)))))
    }

    fn is_end_stream(&self) -> bool {
        self.left.is_empty()
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.left.len() as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::task::Waker;

    #[test]
    fn a_long_answer_comes_whole_and_leaves_turns_in_between() {
        let text: String = ('a'..='z').cycle().take(PIECE * 2 + 7).collect();
        let mut body = Pieces::new(text.clone());
        assert_eq!(body.size_hint().exact(), Some(text.len() as u64));
        let (mut got, mut turns) = (Vec::new(), 0);
        loop {
            match Pin::new(&mut body).poll_frame(&mut Context::from_waker(Waker::noop())) {
                Poll::Ready(None) => break,
                Poll::Ready(Some(Ok(frame))) => got.extend_from_slice(&frame.into_data().unwrap()),
                Poll::Ready(Some(Err(never))) => match never {},
                Poll::Pending => turns += 1,
            }
        }
        assert_eq!((got, turns), (text.into_bytes(), 2));
    }
}

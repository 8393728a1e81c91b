//! A long response body that is written in chunks.
//!
//! Used by `routes` for status and metrics, which can be tens of megabytes. The control
//! thread writes them. Other tasks of the thread run between two chunks.

use hyper::body::{Body, Bytes, Frame, SizeHint};
use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll};

/// Bytes written before other tasks of the thread run.
const CHUNK_BYTES: usize = 64 * 1024;

/// A body of known length, returned in chunks of [`CHUNK_BYTES`].
#[derive(Debug)]
pub(super) struct ChunkedBody {
    left: Bytes,
    /// The next poll yields to other tasks instead of returning a chunk.
    yields: bool,
}

// === impl ChunkedBody ===

impl ChunkedBody {
    pub(super) fn new(text: String) -> ChunkedBody {
        ChunkedBody { left: text.into(), yields: false }
    }
}

impl Body for ChunkedBody {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        if self.left.is_empty() {
            return Poll::Ready(None);
        }
        if std::mem::take(&mut self.yields) {
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        self.yields = true;
        let length = self.left.len().min(CHUNK_BYTES);
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
    fn long_body_is_complete_and_yields_between_chunks() {
        let text: String = ('a'..='z').cycle().take(CHUNK_BYTES * 2 + 7).collect();
        let mut body = ChunkedBody::new(text.clone());
        assert_eq!(body.size_hint().exact(), Some(text.len() as u64));
        let (mut got, mut yields) = (Vec::new(), 0);
        loop {
            match Pin::new(&mut body).poll_frame(&mut Context::from_waker(Waker::noop())) {
                Poll::Ready(None) => break,
                Poll::Ready(Some(Ok(frame))) => got.extend_from_slice(&frame.into_data().unwrap()),
                Poll::Ready(Some(Err(never))) => match never {},
                Poll::Pending => yields += 1,
            }
        }
        assert_eq!((got, yields), (text.into_bytes(), 2));
    }
}

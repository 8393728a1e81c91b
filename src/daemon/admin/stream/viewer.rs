//! One open stream: the texts that its client has not read yet.
//!
//! `groups` adds texts on a blocking thread. The connection takes them on the control thread,
//! in small chunks. A viewer that reads too slowly is dropped.

use super::super::serve::StreamingConnection;
use super::StreamCounters;
use hyper::body::{Body, Bytes, Frame};
use std::collections::VecDeque;
use std::convert::Infallible;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

/// Limit on the texts that wait for a viewer, without snapshots.
pub(super) const WAITING_BYTES_MAX: usize = 1024 * 1024;

/// Limit on the age of a text that waits.
const WAITING_MAX: Duration = Duration::from_secs(30);

/// Bytes that are written before other tasks of the thread run.
const CHUNK_BYTES: usize = 64 * 1024;

/// See the module's documentation.
#[derive(Debug)]
pub(super) struct StreamViewer {
    queue: Mutex<ViewerQueue>,
    counters: StreamCounters,
    connection: Option<StreamingConnection>,
}

#[derive(Debug, Default)]
struct ViewerQueue {
    texts: VecDeque<WaitingText>,
    /// Bytes of `texts` without snapshots.
    bytes: usize,
    /// No text is accepted any more.
    ended: bool,
    waker: Option<Waker>,
}

#[derive(Debug)]
struct WaitingText {
    text: Bytes,
    snapshot: bool,
    since: Instant,
}

/// The response body of a stream. Dropping it ends the stream.
#[derive(Debug)]
pub(super) struct StreamBody {
    viewer: Arc<StreamViewer>,
    left: Bytes,
    /// The next poll yields to other tasks instead of returning a chunk.
    yields: bool,
}

// === impl StreamViewer ===

impl StreamViewer {
    pub(super) fn new(
        counters: StreamCounters,
        connection: Option<StreamingConnection>,
    ) -> StreamViewer {
        if let Some(connection) = &connection {
            connection.begin();
        }
        StreamViewer { queue: Mutex::default(), counters, connection }
    }

    /// Adds a text. A viewer beyond the limits is dropped instead.
    pub(super) fn send(&self, text: &Bytes, snapshot: bool, now: Instant) {
        let mut queue = self.queue();
        if queue.ended {
            return;
        }
        let oldest = queue.texts.front().map(|waiting| waiting.since);
        let stuck = oldest.is_some_and(|since| now.saturating_duration_since(since) > WAITING_MAX);
        let too_much = match snapshot {
            true => queue.texts.iter().any(|waiting| waiting.snapshot),
            // One text can be longer.
            false => queue.bytes > 0 && queue.bytes + text.len() > WAITING_BYTES_MAX,
        };
        if stuck || too_much {
            queue.end();
            queue.texts.clear();
            drop(queue);
            self.counters.count_dropped();
            if let Some(connection) = &self.connection {
                connection.close();
            }
            return;
        }
        if !snapshot {
            queue.bytes += text.len();
        }
        queue.texts.push_back(WaitingText { text: text.clone(), snapshot, since: now });
        queue.wake();
    }

    /// Ends the stream after the texts that wait.
    pub(super) fn end(&self) {
        self.queue().end();
    }

    /// Returns whether the stream has ended.
    pub(super) fn has_ended(&self) -> bool {
        self.queue().ended
    }

    fn queue(&self) -> MutexGuard<'_, ViewerQueue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

// === impl ViewerQueue ===

impl ViewerQueue {
    fn end(&mut self) {
        self.ended = true;
        self.wake();
    }

    fn wake(&mut self) {
        if let Some(waker) = self.waker.take() {
            waker.wake();
        }
    }

    fn take(&mut self) -> Option<Bytes> {
        let WaitingText { text, snapshot, .. } = self.texts.pop_front()?;
        if !snapshot {
            self.bytes -= text.len();
        }
        Some(text)
    }
}

// === impl StreamBody ===

impl StreamBody {
    pub(super) fn new(viewer: Arc<StreamViewer>) -> StreamBody {
        StreamBody { viewer, left: Bytes::new(), yields: false }
    }
}

impl Body for StreamBody {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        if self.left.is_empty() {
            let viewer = Arc::clone(&self.viewer);
            let mut queue = viewer.queue();
            match queue.take() {
                Some(text) => self.left = text,
                None if queue.ended => return Poll::Ready(None),
                None => {
                    queue.waker = Some(cx.waker().clone());
                    return Poll::Pending;
                }
            }
        } else if std::mem::take(&mut self.yields) {
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        self.yields = true;
        let length = self.left.len().min(CHUNK_BYTES);
        Poll::Ready(Some(Ok(Frame::data(self.left.split_to(length)))))
    }
}

impl Drop for StreamBody {
    fn drop(&mut self) {
        let mut queue = self.viewer.queue();
        queue.ended = true;
        queue.texts.clear();
        drop(queue);
        self.viewer.counters.leave();
        if let Some(connection) = &self.viewer.connection {
            connection.end();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::task::Waker;

    fn open() -> (Arc<StreamViewer>, StreamBody, StreamCounters) {
        let counters = StreamCounters::default();
        assert!(counters.enter());
        let viewer = Arc::new(StreamViewer::new(counters.clone(), None));
        (Arc::clone(&viewer), StreamBody::new(viewer), counters)
    }

    /// Returns what the client reads now, and whether the stream has ended.
    fn read(body: &mut StreamBody) -> (Vec<u8>, bool) {
        let (mut got, mut yielded) = (Vec::new(), false);
        loop {
            match Pin::new(&mut *body).poll_frame(&mut Context::from_waker(Waker::noop())) {
                Poll::Ready(None) => return (got, true),
                Poll::Ready(Some(Ok(frame))) => {
                    yielded = false;
                    got.extend_from_slice(&frame.into_data().unwrap());
                }
                Poll::Ready(Some(Err(never))) => match never {},
                Poll::Pending if yielded || body.left.is_empty() => return (got, false),
                Poll::Pending => yielded = true,
            }
        }
    }

    #[test]
    fn client_reads_all_texts_in_order_and_then_the_end() {
        let ((viewer, mut body, counters), now) = (open(), tidegate_net::clock::now());
        let long = Bytes::from(vec![b'x'; CHUNK_BYTES * 3 + 5]);
        viewer.send(&long, true, now);
        viewer.send(&Bytes::from("a"), false, now);
        assert_eq!(read(&mut body), ([&long[..], b"a"].concat(), false));
        viewer.send(&Bytes::from("b"), false, now);
        viewer.end();
        viewer.send(&Bytes::from("c"), false, now);
        assert_eq!(read(&mut body), (b"b".to_vec(), true));
        assert_eq!((counters.open(), counters.dropped()), (1, 0));
        drop(body);
        assert_eq!(counters.open(), 0);
    }

    #[test]
    fn viewer_that_cannot_take_a_mebibyte_is_dropped() {
        let ((viewer, mut body, counters), now) = (open(), tidegate_net::clock::now());
        let text = Bytes::from(vec![b'x'; 100_000]);
        viewer.send(&Bytes::from(vec![b's'; 5_000_000]), true, now);
        (0..10).for_each(|_| viewer.send(&text, false, now));
        assert!(!viewer.has_ended(), "a snapshot does not count");
        viewer.send(&text, false, now);
        assert!(viewer.has_ended());
        assert_eq!((read(&mut body), counters.dropped()), ((Vec::new(), true), 1));
    }

    #[test]
    fn single_long_text_is_sent() {
        let ((viewer, mut body, _), now) = (open(), tidegate_net::clock::now());
        for _ in 0..3 {
            viewer.send(&Bytes::from(vec![b'x'; 2 * WAITING_BYTES_MAX]), false, now);
            assert_eq!(read(&mut body).0.len(), 2 * WAITING_BYTES_MAX);
        }
        assert!(!viewer.has_ended());
    }

    #[test]
    fn viewer_that_takes_nothing_is_dropped() {
        let (viewer, body, counters) = open();
        let now = tidegate_net::clock::now();
        viewer.send(&Bytes::from("s"), true, now);
        viewer.send(&Bytes::from("s"), true, now);
        assert!(viewer.has_ended(), "a second snapshot");
        drop(body);
        let (viewer, _body, _) = open();
        viewer.send(&Bytes::from("a"), false, now);
        viewer.send(&Bytes::from("b"), false, now + WAITING_MAX);
        assert!(!viewer.has_ended());
        viewer.send(&Bytes::from("c"), false, now + WAITING_MAX + Duration::from_secs(1));
        assert!(viewer.has_ended());
        assert_eq!(counters.dropped(), 1);
    }

    #[test]
    fn streams_are_bounded() {
        let counters = StreamCounters::default();
        assert!((0..super::super::VIEWERS_MAX).all(|_| counters.enter()));
        assert!(!counters.enter());
        assert_eq!(counters.refused(), 1);
        counters.leave();
        assert!(counters.enter());
    }
}

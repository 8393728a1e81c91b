//! A bounded queue between the threads that log and standard error or a syslog receiver.
//!
//! The log layer puts each line into the queue, and a separate thread writes it. Logging
//! never blocks: if the queue is full because the reader is stalled, or if a write fails,
//! lines are dropped and counted. After the next successful write, the queue reports the
//! count to its owner.

use crossbeam::channel::{Receiver, Sender, TrySendError, bounded};
use std::io::{self, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::Builder;
use std::time::Duration;

/// Most queued lines, about 1 MB.
pub const QUEUE_MAX: usize = 4_096;

/// Pause before a write is retried after `WouldBlock`.
const RETRY: Duration = Duration::from_millis(20);

/// The sending end of the queue. Cheap to clone.
#[derive(Debug, Clone)]
pub struct LogQueue {
    items: Sender<LogItem>,
    dropped: Arc<AtomicU64>,
}

#[derive(Debug)]
enum LogItem {
    Line(Vec<u8>),
    /// Answered after all earlier lines are written.
    Flush(Sender<()>),
}

/// Collects one line and queues it on drop.
#[derive(Debug)]
pub struct LineWriter {
    queue: LogQueue,
    line: Vec<u8>,
}

// === impl LogQueue ===

impl LogQueue {
    /// Starts the thread, which writes to `target`.
    ///
    /// After a successful write it calls `report_dropped` with the number of lines that were
    /// dropped before and not yet reported.
    ///
    /// # Errors
    /// The thread cannot be started.
    pub fn start(
        target: impl Write + Send + 'static,
        report_dropped: impl Fn(u64) + Send + 'static,
    ) -> io::Result<LogQueue> {
        let (items, incoming) = bounded(QUEUE_MAX);
        let dropped = Arc::new(AtomicU64::new(0));
        let counted = Arc::clone(&dropped);
        Builder::new()
            .name("log".to_owned())
            .spawn(move || run(target, &incoming, &counted, report_dropped))?;
        Ok(LogQueue { items, dropped })
    }

    /// Returns the number of dropped lines.
    pub fn dropped(&self) -> u64 {
        self.dropped.load(Ordering::Relaxed)
    }

    /// Waits until all earlier lines are written, at most twice `limit`, so that a stalled
    /// reader does not block an exit.
    pub fn flush(&self, limit: Duration) {
        let (done, written) = bounded(1);
        if self.items.send_timeout(LogItem::Flush(done), limit).is_ok() {
            // After the limit the lines are given up.
            let _ = written.recv_timeout(limit);
        }
    }

    /// Returns a writer for one line.
    pub fn line(&self) -> LineWriter {
        self.line_after(Vec::new())
    }

    /// Returns a writer for one line that begins with `start`.
    pub fn line_after(&self, start: Vec<u8>) -> LineWriter {
        LineWriter { queue: self.clone(), line: start }
    }

    fn push(&self, line: Vec<u8>) {
        if let Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) =
            self.items.try_send(LogItem::Line(line))
        {
            self.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }
}

fn run(
    mut target: impl Write,
    incoming: &Receiver<LogItem>,
    dropped: &AtomicU64,
    report_dropped: impl Fn(u64),
) {
    let mut reported = 0;
    while let Ok(item) = incoming.recv() {
        match item {
            LogItem::Flush(done) => {
                // The owner waits for a limited time, and what is left is given up.
                let _ = target.flush();
                let _ = done.send(());
            }
            LogItem::Line(line) => match write_line(&mut target, &line) {
                Ok(()) => {
                    let lost = dropped.load(Ordering::Relaxed);
                    if lost > reported {
                        report_dropped(lost - reported);
                        reported = lost;
                    }
                }
                // The disk is full, or the reader has closed its end.
                Err(_) => drop(dropped.fetch_add(1, Ordering::Relaxed)),
            },
        }
    }
}

fn write_line(target: &mut impl Write, mut line: &[u8]) -> io::Result<()> {
    while !line.is_empty() {
        match target.write(line) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(written) => line = &line[written..],
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            // Another process has made the terminal or pipe non-blocking.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                std::thread::park_timeout(RETRY);
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

// === impl LineWriter ===

impl Write for LineWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.line.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for LineWriter {
    fn drop(&mut self) {
        if !self.line.is_empty() {
            self.queue.push(std::mem::take(&mut self.line));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::sync::Mutex;

    const SOON: Duration = Duration::from_secs(10);

    fn log(queue: &LogQueue, line: &str) {
        queue.line().write_all(line.as_bytes()).unwrap();
    }

    #[test]
    fn stalled_reader_blocks_no_writer_and_dropped_lines_are_reported() {
        let (mut reader, writer) = io::pipe().unwrap();
        let reported = Arc::new(Mutex::new(0));
        let sum = Arc::clone(&reported);
        let queue = LogQueue::start(writer, move |lost| *sum.lock().unwrap() += lost).unwrap();
        let line = "x".repeat(1023) + "\n";
        // The pipe holds 64 lines of 1 KiB, the queue holds QUEUE_MAX.
        (0..QUEUE_MAX + 1000).for_each(|_| log(&queue, &line));
        let lost = queue.dropped();
        assert!((100..=1000).contains(&lost), "{lost} lost");
        let kept = QUEUE_MAX as u64 + 1000 - lost;
        let reading = std::thread::spawn(move || {
            reader.read_exact(&mut vec![0; kept as usize * 1024]).unwrap();
            reader
        });
        queue.flush(SOON);
        reading.join().unwrap();
        assert_eq!((*reported.lock().unwrap(), queue.dropped()), (lost, lost));
    }

    #[test]
    fn lines_are_dropped_and_counted_if_the_disk_is_full() {
        let full = std::fs::File::options().write(true).open("/dev/full").unwrap();
        let queue = LogQueue::start(full, |_| {}).unwrap();
        (0..3).for_each(|_| log(&queue, "a line\n"));
        queue.flush(SOON);
        assert_eq!(queue.dropped(), 3);
    }
}

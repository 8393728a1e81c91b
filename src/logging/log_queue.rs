//! The program's log between those who write to it and standard error.
//!
//! Whoever logs puts a line into a bounded queue and goes on; a thread of its
//! own writes. It never makes anybody wait: where the reader is stuck or the disk
//! full, lines are dropped and counted, and a line says how many once it flows
//! again.

use crossbeam::channel::{Receiver, Sender, TrySendError, bounded};
use std::io::{self, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::Builder;
use std::time::Duration;

/// Lines that may wait: what a bad minute brings, about 1 MB.
pub const QUEUE_MAX: usize = 4_096;

/// Pause before a target that would have blocked is tried again.
const RETRY: Duration = Duration::from_millis(20);

/// Everybody's end; cheap to clone.
#[derive(Debug, Clone)]
pub struct LogQueue {
    items: Sender<LogItem>,
    dropped: Arc<AtomicU64>,
}

#[derive(Debug)]
enum LogItem {
    Line(Vec<u8>),
    /// Everything before it is written.
    Flush(Sender<()>),
}

/// The writing end of one event.
#[derive(Debug)]
pub struct LineWriter {
    queue: LogQueue,
    line: Vec<u8>,
}

// === impl LogQueue ===

impl LogQueue {
    /// Starts the thread, which writes to `target` and calls `told` with the
    /// number of lines lost once lines flow again.
    ///
    /// # Errors
    /// No thread can be started.
    pub fn start(
        target: impl Write + Send + 'static,
        told: impl Fn(u64) + Send + 'static,
    ) -> io::Result<LogQueue> {
        let (items, incoming) = bounded(QUEUE_MAX);
        let dropped = Arc::new(AtomicU64::new(0));
        let counted = Arc::clone(&dropped);
        Builder::new()
            .name("log".to_owned())
            .spawn(move || run(target, &incoming, &counted, told))?;
        Ok(LogQueue { items, dropped })
    }

    /// Lines lost so far.
    pub fn dropped(&self) -> u64 {
        self.dropped.load(Ordering::Relaxed)
    }

    /// Waits until what was logged so far is written; at most `limit`, so that a
    /// stuck reader holds no exit up.
    pub fn flush(&self, limit: Duration) {
        let (done, written) = bounded(1);
        if self.items.send_timeout(LogItem::Flush(done), limit).is_ok() {
            // Written or not, it is time to go.
            let _ = written.recv_timeout(limit);
        }
    }

    /// What one event is written to.
    pub fn line(&self) -> LineWriter {
        LineWriter { queue: self.clone(), line: Vec::new() }
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
    told: impl Fn(u64),
) {
    let mut told_of = 0;
    while let Ok(item) = incoming.recv() {
        match item {
            LogItem::Flush(done) => drop(done.send(())),
            LogItem::Line(line) => match write_line(&mut target, &line) {
                Ok(()) => {
                    let lost = dropped.load(Ordering::Relaxed);
                    if lost > told_of {
                        told(lost - told_of);
                        told_of = lost;
                    }
                }
                // A full disk, a reader that is gone.
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
            // Somebody has made the terminal or pipe non-blocking.
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
    fn stuck_reader_blocks_nothing_and_learns_what_it_missed() {
        let (mut reader, writer) = io::pipe().unwrap();
        let told = Arc::new(Mutex::new(0));
        let heard = Arc::clone(&told);
        let queue = LogQueue::start(writer, move |lost| *heard.lock().unwrap() += lost).unwrap();
        let line = "x".repeat(1023) + "\n";
        // A pipe holds 64 lines of a KiB, the queue the rest.
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
        assert_eq!((*told.lock().unwrap(), queue.dropped()), (lost, lost));
    }

    #[test]
    fn a_full_disk_loses_lines_and_counts_them() {
        let full = std::fs::File::options().write(true).open("/dev/full").unwrap();
        let queue = LogQueue::start(full, |_| {}).unwrap();
        (0..3).for_each(|_| log(&queue, "a line\n"));
        queue.flush(SOON);
        assert_eq!(queue.dropped(), 3);
    }
}

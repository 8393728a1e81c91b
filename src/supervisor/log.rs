//! The log of the supervisor: text on standard error.
//!
//! `parent` installs it first. `parent`, `reexec` and `manager` write to it with
//! `tracing`. It always has the format of `format = "text"` and the level `info`, because
//! the supervisor reads no configuration. It never waits for a reader: if the pipe is
//! full, the line is dropped, and the next line has the count in `lines_lost`.

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use tidegate_logging::logfmt::Logfmt;
use tracing::level_filters::LevelFilter;

/// Longest line. A writable pipe accepts a write of this length without blocking (pipe(7),
/// PIPE_BUF).
const LINE_MAX: usize = 4096;

/// Lines dropped after the last line that was written.
static LOST: AtomicU64 = AtomicU64::new(0);

/// Writes whole lines to a descriptor.
struct LogLines<'a>(BorrowedFd<'a>);

/// Installs the log for this process.
pub(super) fn install() {
    let to = || LogLines(rustix::stdio::stderr());
    let layer = tracing_subscriber::fmt().fmt_fields(Logfmt).with_writer(to).with_ansi(false);
    let log = layer.with_max_level(LevelFilter::INFO).finish();
    // In tests, another log may be installed already. It stays.
    let _ = tracing::subscriber::set_global_default(log);
}

impl Write for LogLines<'_> {
    /// Writes or drops one line. Always reports success, because the caller cannot handle
    /// an error.
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let lost = LOST.load(Ordering::Relaxed);
        let mut text = line.strip_suffix(b"\n").unwrap_or(line).to_vec();
        let note = if lost > 0 { format!(" lines_lost={lost}\n") } else { "\n".to_owned() };
        text.truncate(LINE_MAX - note.len());
        text.extend(note.into_bytes());
        let mut fd = [PollFd::from_borrowed_fd(self.0.as_fd(), PollFlags::OUT)];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        let room = poll(&mut fd, Some(&now)).is_ok_and(|ready| ready > 0);
        let written = room && rustix::io::write(self.0, &text).is_ok();
        LOST.store(if written { 0 } else { lost + 1 }, Ordering::Relaxed);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    #[test]
    fn unread_log_line_is_counted_and_blocks_nothing() {
        let (mut reader, writer) = io::pipe().unwrap();
        let mut lines = LogLines(writer.as_fd());
        let long = [b'x'; 2 * LINE_MAX];
        // A pipe holds 64 KiB by default, and each line has 4 KiB.
        for _ in 0..40 {
            assert_eq!(lines.write(&long).unwrap(), long.len());
        }
        let lost = LOST.load(Ordering::Relaxed);
        assert!(lost >= 8, "{lost}");
        let mut bytes = vec![0; (40 - usize::try_from(lost).unwrap()) * LINE_MAX];
        reader.read_exact(&mut bytes).unwrap();
        assert!(bytes.chunks(LINE_MAX).all(|line| line.ends_with(b"x\n")));
        lines.write_all(b"and now\n").unwrap();
        lines.write_all(b"as usual\n").unwrap();
        drop(writer);
        let mut rest = String::new();
        reader.read_to_string(&mut rest).unwrap();
        assert_eq!(rest, format!("and now lines_lost={lost}\nas usual\n"));
    }
}

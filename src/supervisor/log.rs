//! The supervisor's log: every line of it, as text on standard error.
//!
//! Installed by `parent` as the first thing; `parent`, `reexec` and `manager` write to it
//! with `tracing`. The lines look as those of the process that serves do with
//! `format = "text"`: the supervisor reads no configuration and so knows no other format
//! and no level. It never waits for a reader: a full pipe costs the line, and the next
//! line that is written says in `lines_lost` how many there were.

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use tidegate_logging::logfmt::Logfmt;
use tracing::level_filters::LevelFilter;

/// Longest line. A pipe that can be written to at all takes so much at once (pipe(7),
/// PIPE_BUF).
const LINE_MAX: usize = 4096;

/// Lines that nobody had room for since the last one that was written.
static LOST: AtomicU64 = AtomicU64::new(0);

/// Writes whole lines to a descriptor.
struct LogLines<'a>(BorrowedFd<'a>);

/// Has everything that this process logs written to standard error.
pub(super) fn install() {
    let to = || LogLines(rustix::stdio::stderr());
    let layer = tracing_subscriber::fmt().fmt_fields(Logfmt).with_writer(to).with_ansi(false);
    let log = layer.with_max_level(LevelFilter::INFO).finish();
    // A log that is there already stays.
    let _ = tracing::subscriber::set_global_default(log);
}

impl Write for LogLines<'_> {
    /// Takes one line; says that all of it is written, as there is nobody to tell else.
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
        // A pipe holds 64 KiB unless told otherwise; 4 KiB a line.
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

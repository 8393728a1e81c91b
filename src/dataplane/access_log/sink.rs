//! An open access-log target: regular file, FIFO, standard output, or a syslog receiver.
//!
//! Opened by `AccessLog` on its caller's thread, written by the writer thread. It never waits
//! for the reader of a pipe or a terminal: it writes only what fits.

use super::AccessLogDestination;
use super::syslog::SyslogSink;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{FileType, Mode, OFlags, Stat};
use rustix::io::Errno;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

/// An open target.
#[derive(Debug)]
pub(super) enum Sink {
    File(FileSink),
    Syslog(SyslogSink),
}

/// Standard output or an open file.
#[derive(Debug)]
pub(super) struct FileSink {
    fd: OwnedFd,
    /// `None` for standard output.
    path: Option<PathBuf>,
    identity: (u64, u64),
    /// Writes can block (pipe or terminal on standard output): poll first, then write at most
    /// [`PIPE_CHUNK`].
    poll_first: bool,
    /// The file ends with a partial line from an earlier writer.
    unfinished: bool,
}

/// Bytes that a pipe accepts without blocking once it polls as writable (pipe(7), `PIPE_BUF`).
const PIPE_CHUNK: usize = 4096;

// === impl Sink ===

impl Sink {
    /// Opens a target; `None` for [`AccessLogDestination::Off`].
    pub(super) fn open(target: &AccessLogDestination) -> io::Result<Option<Sink>> {
        match target {
            AccessLogDestination::Off => Ok(None),
            AccessLogDestination::Stdout => Ok(Some(Sink::File(FileSink::stdout()?))),
            AccessLogDestination::File(path) => Ok(Some(Sink::File(FileSink::file(path)?))),
            AccessLogDestination::Syslog(address, header) => {
                Ok(Some(Sink::Syslog(SyslogSink::new(address, header))))
            }
        }
    }

    /// Writes a prefix of `bytes`, which start with a line or its rest and must not be empty.
    /// Returns its length.
    ///
    /// # Errors
    /// `WouldBlock` if nothing fits now; otherwise the write failed.
    pub(super) fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Sink::File(file) => file.write(bytes),
            Sink::Syslog(syslog) => syslog.write(bytes),
        }
    }

    /// Returns the target to use instead, if a log rotation has moved this one.
    pub(super) fn replacement(&self) -> io::Result<Option<Sink>> {
        match self {
            Sink::File(file) => Ok(file.replacement()?.map(Sink::File)),
            Sink::Syslog(_) => Ok(None),
        }
    }

    /// Returns whether written bytes have not left this process. Sends them if possible.
    pub(super) fn keeps_bytes(&mut self) -> bool {
        match self {
            Sink::File(_) => false,
            Sink::Syslog(syslog) => syslog.keeps_bytes(),
        }
    }

    /// The target's name for log messages.
    pub(super) fn name(&self) -> String {
        match self {
            Sink::File(file) => file.name(),
            Sink::Syslog(syslog) => syslog.name(),
        }
    }
}

// === impl FileSink ===

impl FileSink {
    /// Duplicates standard output. The non-blocking flag stays as it is, because other
    /// processes share the open file description.
    fn stdout() -> io::Result<FileSink> {
        let fd = io::stdout().as_fd().try_clone_to_owned()?;
        let stat = rustix::fs::fstat(&fd)?;
        let poll_first = FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile;
        Ok(FileSink { fd, path: None, identity: identity(&stat), poll_first, unfinished: false })
    }

    fn file(path: &Path) -> io::Result<FileSink> {
        let fd = open_for_append(path)?;
        let stat = rustix::fs::fstat(&fd)?;
        let regular = FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile;
        let unfinished = regular && ends_inside_a_line(&fd, stat.st_size as u64);
        let path = Some(path.to_owned());
        Ok(FileSink { fd, path, identity: identity(&stat), poll_first: false, unfinished })
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.unfinished {
            rustix::io::write(&self.fd, b"\n")?;
            self.unfinished = false;
        }
        let bytes = if self.poll_first { self.what_fits(bytes)? } else { bytes };
        Ok(rustix::io::write(&self.fd, bytes)?)
    }

    fn what_fits<'b>(&self, bytes: &'b [u8]) -> io::Result<&'b [u8]> {
        let mut fds = [PollFd::new(&self.fd, PollFlags::OUT)];
        let ready = poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 }))?;
        if ready == 0 {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        Ok(&bytes[..bytes.len().min(PIPE_CHUNK)])
    }

    /// Opens the file at this sink's path if it is no longer the open file: that was renamed,
    /// removed or replaced.
    fn replacement(&self) -> io::Result<Option<FileSink>> {
        let Some(path) = &self.path else { return Ok(None) };
        match rustix::fs::stat(path) {
            Ok(stat) if identity(&stat) == self.identity => Ok(None),
            Ok(_) | Err(Errno::NOENT) => FileSink::file(path).map(Some),
            Err(error) => Err(error.into()),
        }
    }

    fn name(&self) -> String {
        match &self.path {
            Some(path) => path.display().to_string(),
            None => "standard output".to_owned(),
        }
    }
}

/// Opens a file for append.
///
/// - Non-blocking, which affects FIFOs only.
/// - Read-write if permitted. A FIFO then opens without a reader and stays open when its reader
///   leaves (fifo(7)), and the last byte of a file can be read.
fn open_for_append(path: &Path) -> io::Result<OwnedFd> {
    let flags =
        OFlags::APPEND | OFlags::CREATE | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    let mode = Mode::from_raw_mode(0o640);
    match rustix::fs::open(path, flags | OFlags::RDWR, mode) {
        Err(Errno::ACCESS) => Ok(rustix::fs::open(path, flags | OFlags::WRONLY, mode)?),
        other => Ok(other?),
    }
}

fn ends_inside_a_line(fd: &OwnedFd, size: u64) -> bool {
    let mut last = [0u8; 1];
    size > 0 && matches!(rustix::io::pread(fd, &mut last, size - 1), Ok(1) if last != *b"\n")
}

fn identity(stat: &Stat) -> (u64, u64) {
    (stat.st_dev, stat.st_ino)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    #[test]
    fn write_to_a_full_blocking_pipe_returns_would_block() {
        let (mut reader, writer) = io::pipe().unwrap();
        let identity = (0, 0);
        let fd = OwnedFd::from(writer);
        let mut sink = FileSink { fd, path: None, identity, poll_first: true, unfinished: false };
        let mut written = 0;
        let full = loop {
            match sink.write(&[b'x'; 10_000]) {
                Ok(count) => written += count,
                Err(error) => break error,
            }
        };
        assert_eq!(full.kind(), io::ErrorKind::WouldBlock);
        assert!(written >= 2 * PIPE_CHUNK, "only {written} bytes fitted");
        reader.read_exact(&mut vec![0; written]).unwrap();
        assert_eq!(sink.write(&[b'x'; 10_000]).unwrap(), PIPE_CHUNK);
    }
}

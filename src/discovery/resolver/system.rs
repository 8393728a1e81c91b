//! The files of the host that say how to resolve names: `/etc/resolv.conf` and `/etc/hosts`.
//!
//! The resolver asks for them with each question. A file is read again after its inode,
//! length or time of modification has changed. While a file cannot be read, its last
//! content stays in use.

use super::hosts::HostsTable;
use super::resolv_conf::ResolvConf;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Bytes of a file that are read; further ones are ignored with a log line.
const FILE_MAX: u64 = 1024 * 1024;
/// Time between two looks at the files.
const LOOK_AGAIN: Duration = Duration::from_secs(1);

/// Where the files are.
#[derive(Debug, Clone)]
pub struct ResolverFiles {
    /// Servers, search domains and options: resolv.conf(5).
    pub resolv_conf: PathBuf,
    /// Names that take precedence over DNS: hosts(5).
    pub hosts: PathBuf,
}

/// The content of the files.
#[derive(Debug, Clone)]
pub(super) struct HostSettings {
    pub(super) resolv_conf: Arc<ResolvConf>,
    pub(super) hosts: Arc<HostsTable>,
}

/// The files and their last content.
#[derive(Debug)]
pub(super) struct WatchedFiles {
    looked: Option<Instant>,
    resolv_conf: WatchedFile<ResolvConf>,
    hosts: WatchedFile<HostsTable>,
}

#[derive(Debug)]
struct WatchedFile<T> {
    path: PathBuf,
    version: Option<FileVersion>,
    content: Arc<T>,
    /// Whether the last look failed; it is logged once.
    unreadable: bool,
}

/// Device, inode, length, and time of modification.
type FileVersion = (u64, u64, u64, i64, i64);

// === impl ResolverFiles ===

impl Default for ResolverFiles {
    fn default() -> ResolverFiles {
        ResolverFiles { resolv_conf: "/etc/resolv.conf".into(), hosts: "/etc/hosts".into() }
    }
}

// === impl WatchedFiles ===

impl WatchedFiles {
    pub(super) fn new(files: ResolverFiles) -> WatchedFiles {
        WatchedFiles {
            looked: None,
            resolv_conf: WatchedFile::new(files.resolv_conf),
            hosts: WatchedFile::new(files.hosts),
        }
    }

    /// Returns the content of the files. It looks for changes at most once per second.
    pub(super) fn settings(&mut self, now: Instant) -> HostSettings {
        if self.looked.is_none_or(|at| now.saturating_duration_since(at) >= LOOK_AGAIN) {
            self.looked = Some(now);
            self.resolv_conf.refresh(ResolvConf::parse);
            self.hosts.refresh(HostsTable::parse);
        }
        HostSettings {
            resolv_conf: Arc::clone(&self.resolv_conf.content),
            hosts: Arc::clone(&self.hosts.content),
        }
    }
}

// === impl WatchedFile ===

impl<T: Default> WatchedFile<T> {
    fn new(path: PathBuf) -> WatchedFile<T> {
        WatchedFile { path, version: None, content: Arc::default(), unreadable: false }
    }

    /// Reads the file if it has changed. A file that does not exist counts as empty.
    fn refresh(&mut self, parse: impl Fn(&str) -> T) {
        match read_changed(&self.path, self.version) {
            Ok(Some((version, text))) => {
                (self.version, self.unreadable) = (Some(version), false);
                self.content = Arc::new(parse(&text));
            }
            Ok(None) => self.unreadable = false,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                (self.version, self.unreadable) = (None, false);
                self.content = Arc::default();
            }
            Err(error) if !self.unreadable => {
                self.unreadable = true;
                let path = self.path.display();
                tracing::warn!(%path, %error, "file for name resolution is unreadable; its last content stays in use");
            }
            Err(_) => {}
        }
    }
}

/// Returns version and text of a file that is not the `known` one.
fn read_changed(
    path: &Path,
    known: Option<FileVersion>,
) -> io::Result<Option<(FileVersion, String)>> {
    let meta = std::fs::metadata(path)?;
    if known == Some(version(&meta)) {
        return Ok(None);
    }
    let file = File::open(path)?;
    let version = version(&file.metadata()?);
    let mut bytes = Vec::new();
    file.take(FILE_MAX + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > FILE_MAX {
        let path = path.display();
        tracing::warn!(%path, bytes_max = FILE_MAX, "file for name resolution is too long; its end is ignored");
        let line_end = bytes.iter().rposition(|byte| *byte == b'\n').unwrap_or_default();
        bytes.truncate(line_end);
    }
    Ok(Some((version, String::from_utf8_lossy(&bytes).into_owned())))
}

fn version(meta: &std::fs::Metadata) -> FileVersion {
    (meta.dev(), meta.ino(), meta.size(), meta.mtime(), meta.mtime_nsec())
}

#[cfg(test)]
mod tests {
    use super::*;
    use tidegate_net::clock;

    #[test]
    fn changed_file_is_read_again_within_a_second() {
        let dir = tempfile::tempdir().unwrap();
        let hosts = dir.path().join("hosts");
        let files = ResolverFiles { resolv_conf: dir.path().join("none"), hosts: hosts.clone() };
        let mut watched = WatchedFiles::new(files);
        let start = clock::now();
        let count = |watched: &mut WatchedFiles, seconds| {
            let settings = watched.settings(start + Duration::from_secs(seconds));
            assert_eq!(*settings.resolv_conf, ResolvConf::default());
            settings.hosts.addresses("web").len()
        };
        assert_eq!(count(&mut watched, 0), 0);
        std::fs::write(&hosts, "192.0.2.1 web\n").unwrap();
        assert_eq!(count(&mut watched, 0), 0, "no look within a second");
        assert_eq!(count(&mut watched, 1), 1);
        std::fs::write(dir.path().join("new"), "192.0.2.1 web\n192.0.2.2 web\n").unwrap();
        std::fs::rename(dir.path().join("new"), &hosts).unwrap();
        assert_eq!(count(&mut watched, 2), 2);
        std::fs::remove_file(&hosts).unwrap();
        assert_eq!(count(&mut watched, 3), 0);
    }

    #[test]
    fn end_of_a_file_that_is_too_long_is_ignored() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("hosts");
        let line = "192.0.2.1 name\n";
        std::fs::write(&path, line.repeat(100_000)).unwrap();
        let (_, text) = read_changed(&path, None).unwrap().unwrap();
        assert!(text.len() as u64 <= FILE_MAX && text.ends_with("name"));
    }
}

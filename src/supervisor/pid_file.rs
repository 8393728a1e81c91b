//! The PID file: holds the process ID that signals must go to.
//!
//! Written by the supervisor or by a process without one, when it serves. It is replaced
//! by rename, so that a reader never sees a partial number. It is removed at the exit,
//! unless another process has written it.

use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

/// The PID file of this process. Dropping it removes the file if it still holds the ID of
/// this process.
#[derive(Debug)]
pub struct PidFile {
    path: PathBuf,
    written: bool,
    /// A failed write was logged.
    failure_logged: bool,
}

// === impl PidFile ===

impl PidFile {
    /// Makes the state of a PID file that this process has written, or not yet.
    pub fn at(path: PathBuf, written: bool) -> PidFile {
        PidFile { path, written, failure_logged: false }
    }

    /// Returns its path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns whether this process has written it.
    pub fn is_written(&self) -> bool {
        self.written
    }

    /// Writes the file if it is not written. After a failure the caller must call it again.
    pub fn write(&mut self) {
        let Err(error) = self.try_write() else { return };
        if !std::mem::replace(&mut self.failure_logged, true) {
            let path = self.path.display();
            tracing::error!(%path, %error, "cannot write the PID file; retrying");
        }
    }

    fn try_write(&mut self) -> io::Result<()> {
        if self.written {
            return Ok(());
        }
        let mut whole = self.path.as_os_str().to_owned();
        whole.push(format!(".{}", std::process::id()));
        // An earlier process with the same ID may have left the file.
        let _ = std::fs::remove_file(&whole);
        let written = File::create_new(&whole)
            .and_then(|mut file| writeln!(file, "{}", std::process::id()))
            .and_then(|()| std::fs::rename(&whole, &self.path));
        written.inspect_err(|_| {
            let _ = std::fs::remove_file(&whole);
        })?;
        self.written = true;
        Ok(())
    }
}

impl Drop for PidFile {
    fn drop(&mut self) {
        let own = std::process::id().to_string();
        if std::fs::read_to_string(&self.path).is_ok_and(|text| text.trim() == own) {
            // A file that is left behind names a process that has exited.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn process_removes_only_its_own_pid_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pid");
        let mut own = PidFile::at(path.clone(), false);
        own.write();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), format!("{}\n", std::process::id()));
        assert!(own.is_written());
        drop(own);
        assert!(!path.exists());
        let mut own = PidFile::at(path.clone(), false);
        own.write();
        std::fs::write(&path, "1\n").unwrap();
        drop(own);
        assert!(path.exists());
    }

    #[test]
    fn failed_write_can_be_retried() {
        let dir = tempfile::tempdir().unwrap();
        let mut file = PidFile::at(dir.path().join("no/pid"), false);
        file.write();
        assert!(!file.is_written());
        std::fs::create_dir(dir.path().join("no")).unwrap();
        file.write();
        assert!(file.is_written() && file.path().exists());
    }
}

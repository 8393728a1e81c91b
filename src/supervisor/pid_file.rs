//! A file that holds the number of the process to be signalled.
//!
//! Written when the process serves, by rename, so that a reader finds a whole
//! number; removed at the end unless another process has written it since.

use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

/// This process's entry; dropping it removes the file if it is still ours.
#[derive(Debug)]
pub struct PidFile {
    path: PathBuf,
    written: bool,
    /// That it cannot be written is logged once.
    told: bool,
}

// === impl PidFile ===

impl PidFile {
    /// One that is not written yet, or that this process has written.
    pub fn at(path: PathBuf, written: bool) -> PidFile {
        PidFile { path, written, told: false }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether it is there.
    pub fn is_written(&self) -> bool {
        self.written
    }

    /// Writes it, unless that is done; a failure is for the caller to try again.
    pub fn write(&mut self) {
        let Err(error) = self.try_write() else { return };
        if !std::mem::replace(&mut self.told, true) {
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
        // Of a process that had this number before; whose directory it is, is not sure.
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
        let ours = std::process::id().to_string();
        if std::fs::read_to_string(&self.path).is_ok_and(|text| text.trim() == ours) {
            // Left behind, it names a process that is gone.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_goes_with_its_process_but_not_with_the_one_before() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pid");
        let mut ours = PidFile::at(path.clone(), false);
        ours.write();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), format!("{}\n", std::process::id()));
        assert!(ours.is_written());
        drop(ours);
        assert!(!path.exists());
        let mut ours = PidFile::at(path.clone(), false);
        ours.write();
        std::fs::write(&path, "1\n").unwrap();
        drop(ours);
        assert!(path.exists());
    }

    #[test]
    fn one_that_cannot_be_written_can_be_tried_again() {
        let dir = tempfile::tempdir().unwrap();
        let mut file = PidFile::at(dir.path().join("no/pid"), false);
        file.write();
        assert!(!file.is_written());
        std::fs::create_dir(dir.path().join("no")).unwrap();
        file.write();
        assert!(file.is_written() && file.path().exists());
    }
}

//! A file that holds the number of the process to be signalled.
//!
//! Written when the process serves, by rename, so that a reader finds a whole
//! number; removed at the end unless another process has written it since.

use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

/// This process's entry; dropping it removes the file if it is still ours.
#[derive(Debug)]
pub struct PidFile(PathBuf);

impl PidFile {
    /// Writes it.
    ///
    /// # Errors
    /// It cannot be written or renamed.
    pub fn write(path: &Path) -> io::Result<PidFile> {
        let mut whole = path.as_os_str().to_owned();
        whole.push(format!(".{}", std::process::id()));
        // Of a process that had this number before; whose directory it is, is not sure.
        let _ = std::fs::remove_file(&whole);
        let written = File::create_new(&whole)
            .and_then(|mut file| writeln!(file, "{}", std::process::id()))
            .and_then(|()| std::fs::rename(&whole, path));
        written.inspect_err(|_| {
            let _ = std::fs::remove_file(&whole);
        })?;
        Ok(PidFile(path.to_owned()))
    }

    /// One that this process has written before.
    pub(super) fn written(path: PathBuf) -> PidFile {
        PidFile(path)
    }

    pub(super) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for PidFile {
    fn drop(&mut self) {
        let ours = std::process::id().to_string();
        if std::fs::read_to_string(&self.0).is_ok_and(|text| text.trim() == ours) {
            // Left behind, it names a process that is gone.
            let _ = std::fs::remove_file(&self.0);
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
        let ours = PidFile::write(&path).unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), format!("{}\n", std::process::id()));
        drop(ours);
        assert!(!path.exists());
        let ours = PidFile::write(&path).unwrap();
        std::fs::write(&path, "1\n").unwrap();
        drop(ours);
        assert!(path.exists());
        assert!(PidFile::write(&dir.path().join("no/pid")).is_err());
    }
}

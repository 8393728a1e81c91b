//! Texts that a serving process leaves for the process that replaces it after a crash.
//! They are in memory files (memfd_create(2)).
//!
//! `parent` makes the files and never reads them. `daemon` writes and reads them. Each
//! store has two files, which are written alternately: if a process is killed during a
//! write, the other file is still valid.

use rustix::fs::{MemfdFlags, memfd_create};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use tidegate_net::packets::FDS_MAX;
use xxhash_rust::xxh3::xxh3_64;

/// The operators' intents, the remaining state, and the texts of the configuration in
/// force.
pub(super) const STORES: usize = 3;
const _: () = assert!(2 * STORES <= FDS_MAX);

/// Longest text.
const TEXT_MAX: usize = 256 * 1024 * 1024;

/// Number, length and checksum.
const HEADER: usize = 24;

/// A text in two files. The newer valid text is current.
#[derive(Debug)]
pub struct Store([File; 2]);

/// Adds empty files until all stores have their files.
pub(super) fn complete(files: &mut Vec<OwnedFd>) -> io::Result<()> {
    while files.len() < 2 * STORES {
        files.push(memfd_create("tidegate", MemfdFlags::CLOEXEC)?);
    }
    Ok(())
}

// === impl Store ===

impl Store {
    pub(super) fn of(files: [OwnedFd; 2]) -> Store {
        Store(files.map(File::from))
    }

    /// Stores `text` as the current text.
    ///
    /// # Errors
    /// Out of memory, or the text is too long. The previous text stays current.
    pub fn write(&self, text: &[u8]) -> io::Result<()> {
        if text.len() > TEXT_MAX {
            return Err(io::Error::other(format!(
                "the text has {} bytes; at most {TEXT_MAX} are allowed",
                text.len()
            )));
        }
        // Read again, because another process may have written the files.
        let [one, other] = self.0.each_ref().map(|file| valid(file).map_or(0, |(n, _)| n));
        let (number, file) = (one.max(other) + 1, &self.0[usize::from(one > other)]);
        // The older text becomes invalid first.
        file.write_all_at(&[0; HEADER], 0)?;
        file.set_len((HEADER + text.len()) as u64)?;
        file.write_all_at(text, HEADER as u64)?;
        let length = text.len() as u64;
        let parts = [number, length, xxh3_64(text) ^ number].map(u64::to_le_bytes);
        file.write_all_at(&parts.concat(), 0)
    }

    /// Returns the newest valid text.
    pub fn read(&self) -> Option<Vec<u8>> {
        self.0.iter().filter_map(valid).max_by_key(|(number, _)| *number).map(|(_, text)| text)
    }
}

/// Returns the number and the text of a file, if they are valid.
fn valid(file: &File) -> Option<(u64, Vec<u8>)> {
    let mut header = [0; HEADER];
    file.read_exact_at(&mut header, 0).ok()?;
    let mut parts = header.chunks_exact(8).map(|part| part.try_into().map(u64::from_le_bytes));
    let mut next = || parts.next()?.ok();
    let (number, length, sum) = (next()?, next()?, next()?);
    let length = usize::try_from(length).ok().filter(|length| *length <= TEXT_MAX)?;
    if number == 0 || file.metadata().ok()?.len() < (HEADER + length) as u64 {
        return None;
    }
    let mut text = vec![0; length];
    file.read_exact_at(&mut text, HEADER as u64).ok()?;
    (xxh3_64(&text) ^ number == sum).then_some((number, text))
}

/// Borrows the files for a message.
pub(super) fn borrowed(files: &[OwnedFd]) -> Vec<BorrowedFd<'_>> {
    files.iter().map(AsFd::as_fd).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn two() -> [OwnedFd; 2] {
        let mut files = Vec::new();
        complete(&mut files).unwrap();
        let mut files = files.into_iter();
        [files.next().unwrap(), files.next().unwrap()]
    }

    #[test]
    fn next_process_reads_the_newest_valid_text() {
        let files = two();
        let again = || files.each_ref().map(|file| file.try_clone().unwrap());
        let store = Store::of(again());
        assert_eq!(store.read(), None);
        for text in ["first and long", "second", "third"] {
            store.write(text.as_bytes()).unwrap();
            assert_eq!(Store::of(again()).read().unwrap(), text.as_bytes());
        }
        let next = Store::of(again());
        next.write(b"fourth").unwrap();
        assert_eq!(Store::of(again()).read().unwrap(), b"fourth");
    }

    #[test]
    fn interrupted_write_keeps_the_previous_text() {
        let files = two();
        let again = || files.each_ref().map(|file| file.try_clone().unwrap());
        let store = Store::of(again());
        store.write(b"whole").unwrap();
        store.write(b"cut short").unwrap();
        let second = File::from(files[1].try_clone().unwrap());
        for cut in [0, 8, HEADER, HEADER + 4] {
            second.set_len(cut as u64).unwrap();
            assert_eq!(Store::of(again()).read().unwrap(), b"whole", "cut at {cut}");
        }
        store.write(b"continued").unwrap();
        assert_eq!(Store::of(again()).read().unwrap(), b"continued");
    }
}

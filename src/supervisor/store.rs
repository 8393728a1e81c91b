//! What a serving process leaves with the supervisor for the one that is started after a
//! crash: texts in memory files (memfd_create(2)) that the supervisor holds and never
//! reads.
//!
//! Made by `parent`, written and read by `daemon`. Each store is two files, written in
//! turn: a process killed in the middle of a write leaves the other one whole.

use rustix::fs::{MemfdFlags, memfd_create};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use tidegate_net::packets::FDS_MAX;
use xxhash_rust::xxh3::xxh3_64;

/// Operators' intents, all else that is known, and the texts of the configuration in
/// force.
pub(super) const STORES: usize = 3;
const _: () = assert!(2 * STORES <= FDS_MAX);

/// Longest text kept.
const TEXT_MAX: usize = 256 * 1024 * 1024;

/// Number, length and checksum.
const HEADER: usize = 24;

/// One text, in two files: the newer one counts.
#[derive(Debug)]
pub struct Store([File; 2]);

/// Adds the files that are missing, empty.
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

    /// Keeps `text` in the place of the one before.
    ///
    /// # Errors
    /// No memory, or the text is too long; the one before is kept then.
    pub fn write(&self, text: &[u8]) -> io::Result<()> {
        if text.len() > TEXT_MAX {
            return Err(io::Error::other(format!("{} bytes are too large to keep", text.len())));
        }
        // Another process may have written since.
        let [one, other] = self.0.each_ref().map(|file| whole(file).map_or(0, |(n, _)| n));
        let (number, file) = (one.max(other) + 1, &self.0[usize::from(one > other)]);
        // First what was there stops being whole.
        file.write_all_at(&[0; HEADER], 0)?;
        file.set_len((HEADER + text.len()) as u64)?;
        file.write_all_at(text, HEADER as u64)?;
        let length = text.len() as u64;
        let parts = [number, length, xxh3_64(text) ^ number].map(u64::to_le_bytes);
        file.write_all_at(&parts.concat(), 0)
    }

    /// The newest whole text.
    pub fn read(&self) -> Option<Vec<u8>> {
        self.0.iter().filter_map(whole).max_by_key(|(number, _)| *number).map(|(_, text)| text)
    }
}

fn whole(file: &File) -> Option<(u64, Vec<u8>)> {
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

/// For the message that hands them on.
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
    fn the_newest_whole_text_is_read_by_the_next_process() {
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
    fn a_write_that_was_cut_short_anywhere_leaves_the_text_before() {
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
        store.write(b"goes on").unwrap();
        assert_eq!(Store::of(again()).read().unwrap(), b"goes on");
    }
}

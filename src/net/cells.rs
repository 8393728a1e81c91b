//! Counts in a memory file (memfd_create(2)) that the processes of an upgrade share, so
//! that a cap over all of them is never exceeded.
//!
//! `daemon` makes the file at the start or takes it over from the old process.
//! `core::balance::in_flight` counts every session in it. It never interprets keys or
//! counts. Counting takes no lock and makes no system call. Finding the cell of a key
//! does both; only the control thread does that.
//!
//! # Columns
//!
//! Each process counts in one of [`COLUMNS`] columns, so that its part can be subtracted
//! after it was killed. The caller decides which bits of a word are a column. A fourth
//! process at the same time shares a column; a shared column is cleared when all its
//! processes have ended.
//!
//! # Detection of ended processes
//!
//! Each process holds a record lock (fcntl(2), F_SETLK) on a byte of the file. The
//! kernel releases the lock when the process ends. It also releases the lock when the
//! process closes *any* descriptor of the file. Therefore a process has exactly one
//! descriptor, in [`Memory`], and never duplicates it. Another lock of this kind protects
//! changes of the directory.

#![allow(unsafe_code)]

use crate::clock;
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, fcntl_get_seals, memfd_create};
use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;
use xxhash_rust::xxh3::xxh3_128;

/// Columns of a count.
pub const COLUMNS: u32 = 3;
/// Most keys with a separate count. They take 17 MB of address space; only used cells
/// take memory.
pub const CELLS_MAX: usize = 131_072;
/// Most processes that share a file, including ended processes that are not cleaned up.
pub const PROCESSES_MAX: usize = 64;

/// Used cells that are checked before a new cell is used.
const CHECKS: usize = 64;

/// Identifies the layout below. A program with another layout makes its own file.
const MAGIC: u64 = u64::from_le_bytes(*b"TGCELLS1");

const SEALS: SealFlags = SealFlags::SHRINK.union(SealFlags::GROW).union(SealFlags::SEAL);

/// The byte that is locked for changes of the directory. The bytes of the processes
/// follow.
const DIRECTORY: i64 = 0;

/// Attempts to lock the directory, and the pause between them.
const DIRECTORY_TRIES: u32 = 100;
const DIRECTORY_PAUSE: Duration = Duration::from_millis(1);

/// The content of the file. Other processes can write all of it at any time.
#[repr(C, align(4096))]
struct Layout {
    magic: AtomicU64,
    /// Index of the first cell that was never used.
    used: AtomicU64,
    /// Number of keys that were inserted.
    changes: AtomicU64,
    /// The column of each process plus 1. 0: no process.
    columns: [AtomicU64; PROCESSES_MAX],
    /// One bit per process that holds the cell. 0: the cell is free.
    holders: [AtomicU64; CELLS_MAX],
    cells: [Line; CELLS_MAX],
}

/// A cell that shares its cache lines with no other cell.
#[repr(C, align(128))]
struct Line {
    count: AtomicU64,
    key: [AtomicU64; 2],
}

/// The file as this process uses it.
#[derive(Debug)]
pub struct Memory {
    file: OwnedFd,
    layout: &'static Layout,
    process: usize,
    column: u32,
    directory: Mutex<CellDirectory>,
}

#[derive(Debug, Default)]
struct CellDirectory {
    /// The cell of each key, up to date with `changes`.
    places: HashMap<u128, usize>,
    changes: u64,
    /// The cells that this process holds.
    holds: HashMap<usize, Weak<CellHold>>,
    /// Where the search for a free cell continues.
    cursor: usize,
    /// One bit per process that had ended at the last check.
    ended: u64,
}

/// Keeps a cell in use by this process.
#[derive(Debug)]
pub struct CellHold {
    memory: Arc<Memory>,
    place: usize,
}

// === impl Memory ===

impl Memory {
    /// Makes a file that only this process uses.
    ///
    /// # Errors
    /// Out of memory or descriptors.
    pub fn create() -> io::Result<Memory> {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = memfd_create("tidegate-counts", flags)?;
        rustix::fs::ftruncate(&file, size_of::<Layout>() as u64)?;
        fcntl_add_seals(&file, SEALS)?;
        let layout = map(&file)?;
        layout.magic.store(MAGIC, Ordering::Release);
        Memory::enter(file, layout)
    }

    /// Joins the file of another process.
    ///
    /// # Errors
    /// The file has another layout, or [`PROCESSES_MAX`] processes already share it.
    pub fn join(file: OwnedFd) -> io::Result<Memory> {
        // If the file could shrink, access to the mapping could raise SIGBUS.
        let sealed = fcntl_get_seals(&file)?.contains(SEALS);
        let size = rustix::fs::fstat(&file)?.st_size;
        if !sealed || u64::try_from(size).ok() != Some(size_of::<Layout>() as u64) {
            return Err(io::Error::other("not a counter file of this version"));
        }
        let layout = map(&file)?;
        if layout.magic.load(Ordering::Acquire) != MAGIC {
            return Err(io::Error::other("a counter file with another layout"));
        }
        Memory::enter(file, layout)
    }

    fn enter(file: OwnedFd, layout: &'static Layout) -> io::Result<Memory> {
        let memory = Memory { file, layout, process: 0, column: 0, directory: Mutex::default() };
        let locked = memory.lock_directory()?;
        let columns = memory.layout.columns.each_ref().map(|c| c.load(Ordering::Acquire));
        let free = columns.iter().position(|column| *column == 0);
        let process = free.ok_or_else(|| {
            io::Error::other(format!("{PROCESSES_MAX} processes already share these counters"))
        })?;
        let sharers =
            |column: &u32| columns.iter().filter(|c| **c == u64::from(column + 1)).count();
        let column = (0..COLUMNS).min_by_key(sharers).unwrap_or(0);
        memory.lock(byte_of(process), libc::F_WRLCK)?;
        memory.layout.columns[process].store(u64::from(column + 1), Ordering::Release);
        drop(locked);
        Ok(Memory { process, column, ..memory })
    }

    /// Returns the column that this process counts in.
    pub fn column(&self) -> u32 {
        self.column
    }

    /// Returns the count of the key, and the hold that keeps its cell for this process.
    ///
    /// `None`: all [`CELLS_MAX`] cells are in use, or another process keeps the directory
    /// locked.
    pub fn count(self: &Arc<Memory>, key: &[u8]) -> Option<(&'static AtomicU64, Arc<CellHold>)> {
        let key = xxh3_128(key);
        let mut directory = self.directory();
        let _locked = self.lock_directory().ok()?;
        let place = self.find(&mut directory, key).or_else(|| self.put(&mut directory, key))?;
        self.layout.holders[place].fetch_or(self.bit(), Ordering::AcqRel);
        let held = directory.holds.get(&place).and_then(Weak::upgrade);
        let hold = held.unwrap_or_else(|| {
            let hold = Arc::new(CellHold { memory: Arc::clone(self), place });
            directory.holds.insert(place, Arc::downgrade(&hold));
            hold
        });
        Some((&self.layout.cells[place].count, hold))
    }

    /// Returns whether another process shares the file, including ended processes that
    /// are not cleaned up.
    pub fn is_shared(&self) -> bool {
        self.others().next().is_some()
    }

    /// Releases the counts and cells of ended processes. Returns whether there were any.
    ///
    /// A process that has ended since the last call is released by the next call, because
    /// the kernel may still be closing its connections. `clear` subtracts a column from a
    /// word.
    pub fn clean(&self, clear: fn(&AtomicU64, u32)) -> bool {
        let mut directory = self.directory();
        let ended = self.others().filter(|p| !self.is_alive(*p)).fold(0, |mask, p| mask | 1 << p);
        let seen = std::mem::replace(&mut directory.ended, ended) & ended;
        if seen == 0 {
            return false;
        }
        let Ok(_locked) = self.lock_directory() else { return false };
        let mut cleaned = false;
        for column in 0..COLUMNS {
            let sharers = self.sharers(column);
            // Before the lock, another process may have cleaned up and a new process may
            // have joined.
            let all_ended = sharers & !seen == 0 && bits(sharers).all(|p| !self.is_alive(p));
            if sharers != 0 && all_ended {
                self.clear(column, sharers, clear);
                cleaned = true;
            }
        }
        cleaned
    }

    fn clear(&self, column: u32, processes: u64, clear: fn(&AtomicU64, u32)) {
        for place in 0..self.used() {
            if self.layout.holders[place].load(Ordering::Acquire) & processes != 0 {
                clear(&self.layout.cells[place].count, column);
                self.layout.holders[place].fetch_and(!processes, Ordering::AcqRel);
            }
        }
        for process in bits(processes) {
            self.layout.columns[process].store(0, Ordering::Release);
        }
    }

    fn find(&self, directory: &mut CellDirectory, key: u128) -> Option<usize> {
        let changes = self.layout.changes.load(Ordering::Acquire);
        if directory.changes != changes {
            directory.changes = changes;
            directory.places = (0..self.used()).map(|place| (self.key_of(place), place)).collect();
        }
        let place = directory.places.get(&key).copied()?;
        // A cell without a holder is free and may still have a count.
        (self.layout.holders[place].load(Ordering::Acquire) != 0).then_some(place)
    }

    fn put(&self, directory: &mut CellDirectory, key: u128) -> Option<usize> {
        let used = self.used();
        let (from, free) = (directory.cursor.min(used), |place: &usize| {
            self.layout.holders[*place].load(Ordering::Acquire) == 0
        });
        let around = || (from..used).chain(0..from);
        // The number of checks is bounded, so that a start with many keys does not check
        // all cells for each key.
        let few = around().take(CHECKS).find(free);
        let fresh = || (used < CELLS_MAX).then_some(used);
        let place = few.or_else(fresh).or_else(|| around().find(free))?;
        directory.cursor = if from + CHECKS < used { from + CHECKS } else { 0 };
        let cell = &self.layout.cells[place];
        directory.places.remove(&self.key_of(place));
        cell.count.store(0, Ordering::Release);
        cell.key[0].store(key as u64, Ordering::Release);
        cell.key[1].store((key >> 64) as u64, Ordering::Release);
        self.layout.used.fetch_max(place as u64 + 1, Ordering::AcqRel);
        directory.changes = self.layout.changes.fetch_add(1, Ordering::AcqRel) + 1;
        directory.places.insert(key, place);
        Some(place)
    }

    fn key_of(&self, place: usize) -> u128 {
        let [low, high] =
            self.layout.cells[place].key.each_ref().map(|k| k.load(Ordering::Acquire));
        u128::from(high) << 64 | u128::from(low)
    }

    fn used(&self) -> usize {
        (self.layout.used.load(Ordering::Acquire) as usize).min(CELLS_MAX)
    }

    fn bit(&self) -> u64 {
        1 << self.process
    }

    /// Returns the other processes of the file, including ended processes.
    fn others(&self) -> impl Iterator<Item = usize> {
        (0..PROCESSES_MAX).filter(|process| {
            let column = self.layout.columns[*process].load(Ordering::Acquire);
            *process != self.process && column != 0
        })
    }

    fn sharers(&self, column: u32) -> u64 {
        let of = |process: &usize| {
            self.layout.columns[*process].load(Ordering::Acquire) == u64::from(column + 1)
        };
        (0..PROCESSES_MAX).filter(of).fold(0, |mask, process| mask | 1 << process)
    }

    fn directory(&self) -> MutexGuard<'_, CellDirectory> {
        // The directory is a cache of the file, so a panic cannot leave it inconsistent.
        self.directory.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn byte_of(process: usize) -> i64 {
    DIRECTORY + 1 + process as i64
}

fn bits(mask: u64) -> impl Iterator<Item = usize> {
    (0..PROCESSES_MAX).filter(move |bit| mask >> bit & 1 == 1)
}

// === impl Memory: locks ===

/// Unlocks the directory on drop.
struct Locked<'a>(&'a Memory);

impl Memory {
    fn lock_directory(&self) -> io::Result<Locked<'_>> {
        let mut tries = 0;
        loop {
            match self.lock(DIRECTORY, libc::F_WRLCK) {
                Ok(()) => return Ok(Locked(self)),
                // A stopped process may keep the lock, so the wait is bounded.
                Err(error) if tries == DIRECTORY_TRIES => return Err(error),
                Err(_) => clock::pause(DIRECTORY_PAUSE),
            }
            tries += 1;
        }
    }

    /// Returns whether the process runs. True for this process.
    fn is_alive(&self, process: usize) -> bool {
        let mut lock = one_byte(byte_of(process), libc::F_WRLCK);
        // SAFETY: the kernel fills in `lock`, which outlives the call.
        let result = unsafe { libc::fcntl(self.file.as_raw_fd(), libc::F_GETLK, &raw mut lock) };
        // If the check fails, the process counts as running and keeps its cells.
        process == self.process || result != 0 || i32::from(lock.l_type) != libc::F_UNLCK
    }

    fn lock(&self, byte: i64, kind: libc::c_int) -> io::Result<()> {
        let lock = one_byte(byte, kind);
        // SAFETY: the kernel reads `lock`, which outlives the call.
        match unsafe { libc::fcntl(self.file.as_raw_fd(), libc::F_SETLK, &raw const lock) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

fn one_byte(at: i64, kind: libc::c_int) -> libc::flock {
    libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: at,
        l_len: 1,
        l_pid: 0,
    }
}

impl Drop for Locked<'_> {
    fn drop(&mut self) {
        // Unlocking fails only if the kernel must split a lock. This lock is one byte.
        let _ = self.0.lock(DIRECTORY, libc::F_UNLCK);
    }
}

impl AsFd for Memory {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// Maps the file for the lifetime of the process.
///
/// It is never unmapped, because counts can outlive the [`Memory`], and a process joins
/// few files. The file must be as long as [`Layout`] and sealed.
fn map(file: &OwnedFd) -> io::Result<&'static Layout> {
    let (length, access) = (size_of::<Layout>(), libc::PROT_READ | libc::PROT_WRITE);
    let (fd, null) = (file.as_raw_fd(), std::ptr::null_mut());
    // SAFETY: the kernel chooses the address, so the new mapping overlaps no other
    // memory.
    let at = unsafe { libc::mmap(null, length, access, libc::MAP_SHARED, fd, 0) };
    match NonNull::new(at.cast::<Layout>()) {
        // SAFETY: the mapping is page-aligned and as long as `Layout`. The seals keep the
        // file from shrinking, and the mapping is never removed. Every bit pattern is
        // valid, because `Layout` consists of atomics, which other processes may change.
        Some(mapped) if at != libc::MAP_FAILED => Ok(unsafe { mapped.as_ref() }),
        _ => Err(io::Error::last_os_error()),
    }
}

impl std::fmt::Debug for Layout {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Layout").field("used", &self.used).finish_non_exhaustive()
    }
}

// === impl CellHold ===

impl Drop for CellHold {
    fn drop(&mut self) {
        let mut directory = self.memory.directory();
        // A new hold of the same cell may exist already.
        if directory.holds.get(&self.place).is_some_and(|hold| hold.strong_count() == 0) {
            directory.holds.remove(&self.place);
            self.memory.layout.holders[self.place].fetch_and(!self.memory.bit(), Ordering::AcqRel);
        }
    }
}

#[cfg(test)]
mod tests;

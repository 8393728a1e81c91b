//! Counts in a memory file (memfd_create(2)) that the processes of an upgrade share,
//! so that a cap over them holds at every moment.
//!
//! Made by `app` at the start, or taken from the process before; used by
//! `balance::in_flight` for every session. It knows keys and counts, not what is
//! counted. Counting takes no lock and makes no system call. Finding the cell of a key
//! does both, and is for the control thread.
//!
//! # Columns
//!
//! A count is one 64-bit word: the sum of [`COLUMNS`] columns in the upper 22 bits, and
//! below it the first two columns of [`COLUMN_BITS`] bits each; the third is the rest of
//! the sum. A process adds to the sum and its own column by one addition of its
//! [`unit`], and a cap is compared with the sum: taking a slot is one compare-and-swap
//! and giving it back one subtraction, so there is no moment at which a process that is
//! killed could have done half of it. What a killed process held is its column, which
//! another process takes off the word. The fourth process at a time
//! shares a column with another one; such a column is taken off when all its
//! processes have ended.
//!
//! # Who lives
//!
//! Each process holds a record lock (fcntl(2), F_SETLK) on a byte of the file for as
//! long as it lives; the kernel drops it with the last thread. These locks belong to
//! the process and end when it closes *any* descriptor of the file: there is exactly
//! one, in [`Memory`], and nobody duplicates it. Changes of the directory are made
//! under one more such lock.

#![allow(unsafe_code)]

use crate::clock;
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, fcntl_get_seals, memfd_create};
use std::collections::HashMap;
use std::io;
use std::ops::Deref;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;
use xxhash_rust::xxh3::xxh3_128;

/// Columns of a count.
pub const COLUMNS: u32 = 3;
/// Bits of a column.
pub const COLUMN_BITS: u32 = 21;
/// Most that all columns together may hold, or one could run into the next.
pub const COUNT_MAX: u32 = (1 << COLUMN_BITS) - 1;
/// The lowest bit of the sum.
const SUM_AT: u32 = COLUMN_BITS * (COLUMNS - 1);
/// Keys with a count of their own; 17 MB of address space, of which only what is used
/// takes memory.
pub const CELLS_MAX: usize = 131_072;
/// Processes with a part in one file at a time, those that ended and are not cleaned up
/// after included.
pub const PROCESSES_MAX: usize = 64;

/// Cells that are looked at for a free one before a new one is taken into use.
const LOOKS: usize = 64;

/// The layout below. A program with another one counts by itself.
const MAGIC: u64 = u64::from_le_bytes(*b"TGCELLS1");

const SEALS: SealFlags = SealFlags::SHRINK.union(SealFlags::GROW).union(SealFlags::SEAL);

/// The byte that is locked for changes of the directory; those of the processes follow.
const DIRECTORY: i64 = 0;

/// How long a change of the directory waits for another process's.
const DIRECTORY_TRIES: u32 = 100;
const DIRECTORY_PAUSE: Duration = Duration::from_millis(1);

/// What the file holds. All of it may be written by other processes at any time.
#[repr(C, align(4096))]
struct Layout {
    magic: AtomicU64,
    /// Cells from this one on have never been used.
    used: AtomicU64,
    /// Goes up with every key that is put in.
    changes: AtomicU64,
    /// The column of each process plus one; 0: none.
    columns: [AtomicU64; PROCESSES_MAX],
    /// One bit for each process that holds the cell. Without any it is free.
    holders: [AtomicU64; CELLS_MAX],
    cells: [Line; CELLS_MAX],
}

/// Alone on its cache lines.
#[repr(C, align(128))]
struct Line {
    count: AtomicU64,
    key: [AtomicU64; 2],
}

/// This process's part in the file.
#[derive(Debug)]
pub struct Memory {
    file: OwnedFd,
    layout: Mapping,
    process: usize,
    column: u32,
    directory: Mutex<Directory>,
}

#[derive(Debug, Default)]
struct Directory {
    /// As of `changes`.
    places: HashMap<u128, usize>,
    changes: u64,
    /// What this process holds.
    holds: HashMap<usize, Weak<Hold>>,
    /// Where a free cell may be.
    cursor: usize,
    /// Processes found dead at the last look.
    dead: u64,
}

#[derive(Debug)]
struct Mapping(NonNull<Layout>);

/// One count, shared or not.
#[derive(Debug, Clone)]
pub struct Count {
    word: NonNull<AtomicU64>,
    /// Keeps the word where it is.
    keep: Keep,
}

#[derive(Debug, Clone)]
enum Keep {
    Own { _word: Arc<Own> },
    Shared { _hold: Arc<Hold> },
}

/// A count of this process alone.
#[derive(Debug)]
#[repr(C, align(128))]
struct Own(AtomicU64);

/// That this process uses a cell.
#[derive(Debug)]
struct Hold {
    memory: Arc<Memory>,
    place: usize,
}

// SAFETY: the pointer is to a mapping that only `drop` ends, and what it points to is
// made of atomics alone.
unsafe impl Send for Mapping {}
// SAFETY: as above; atomics may be used from several threads.
unsafe impl Sync for Mapping {}
// SAFETY: the pointer is to an atomic that `keep` keeps alive and in its place; both may
// be used and dropped by any thread.
unsafe impl Send for Count {}
// SAFETY: as above.
unsafe impl Sync for Count {}

// === impl Memory ===

impl Memory {
    /// A file with this process alone in it.
    ///
    /// # Errors
    /// No memory, or no descriptor.
    pub fn create() -> io::Result<Memory> {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = memfd_create("tidegate-counts", flags)?;
        rustix::fs::ftruncate(&file, size_of::<Layout>() as u64)?;
        fcntl_add_seals(&file, SEALS)?;
        let layout = Mapping::of(&file)?;
        layout.magic.store(MAGIC, Ordering::Release);
        Memory::enter(file, layout)
    }

    /// Takes part in the file of another process.
    ///
    /// # Errors
    /// It is not such a file, or [`PROCESSES_MAX`] have a part in it.
    pub fn join(file: OwnedFd) -> io::Result<Memory> {
        // Whoever could shrink it could have this process end by SIGBUS.
        let sealed = fcntl_get_seals(&file)?.contains(SEALS);
        let size = rustix::fs::fstat(&file)?.st_size;
        if !sealed || u64::try_from(size).ok() != Some(size_of::<Layout>() as u64) {
            return Err(io::Error::other("not a file of counts as this program knows them"));
        }
        let layout = Mapping::of(&file)?;
        if layout.magic.load(Ordering::Acquire) != MAGIC {
            return Err(io::Error::other("a file of counts in another layout"));
        }
        Memory::enter(file, layout)
    }

    fn enter(file: OwnedFd, layout: Mapping) -> io::Result<Memory> {
        let memory = Memory { file, layout, process: 0, column: 0, directory: Mutex::default() };
        let locked = memory.lock_directory()?;
        let columns = memory.layout.columns.each_ref().map(|c| c.load(Ordering::Acquire));
        let free = columns.iter().position(|column| *column == 0);
        let process = free.ok_or_else(|| {
            io::Error::other(format!("{PROCESSES_MAX} processes share these counts already"))
        })?;
        let sharers =
            |column: &u32| columns.iter().filter(|c| **c == u64::from(column + 1)).count();
        let column = (0..COLUMNS).min_by_key(sharers).unwrap_or(0);
        memory.lock(byte_of(process), libc::F_WRLCK)?;
        memory.layout.columns[process].store(u64::from(column + 1), Ordering::Release);
        drop(locked);
        Ok(Memory { process, column, ..memory })
    }

    /// What this process adds to a count for each slot.
    pub fn unit(&self) -> u64 {
        unit(self.column)
    }

    /// The count of that key; `None` where [`CELLS_MAX`] others are in use, or another
    /// process does not let go of the directory.
    pub fn count(self: &Arc<Memory>, key: &[u8]) -> Option<Count> {
        let key = xxh3_128(key);
        let mut directory = self.directory();
        let _locked = self.lock_directory().ok()?;
        let place = self.find(&mut directory, key).or_else(|| self.put(&mut directory, key))?;
        self.layout.holders[place].fetch_or(self.bit(), Ordering::AcqRel);
        let held = directory.holds.get(&place).and_then(Weak::upgrade);
        let hold = held.unwrap_or_else(|| {
            let hold = Arc::new(Hold { memory: Arc::clone(self), place });
            directory.holds.insert(place, Arc::downgrade(&hold));
            hold
        });
        let word = NonNull::from(&self.layout.cells[place].count);
        Some(Count { word, keep: Keep::Shared { _hold: hold } })
    }

    /// Whether another process has a part in these counts.
    pub fn is_shared(&self) -> bool {
        self.others().next().is_some()
    }

    /// Gives back what processes hold that have ended; gives whether there were any. One
    /// that is found dead for the first time is left to the next call: the kernel may
    /// still be closing its connections.
    pub fn clean(&self) -> bool {
        let mut directory = self.directory();
        let dead = self.others().filter(|p| !self.lives(*p)).fold(0, |mask, p| mask | 1 << p);
        let seen = std::mem::replace(&mut directory.dead, dead) & dead;
        if seen == 0 {
            return false;
        }
        let Ok(_locked) = self.lock_directory() else { return false };
        let mut cleaned = false;
        for column in 0..COLUMNS {
            let sharers = self.sharers(column);
            // Another process may have cleaned up, and a new one have come, since.
            let all_dead = sharers & !seen == 0 && bits(sharers).all(|p| !self.lives(p));
            if sharers != 0 && all_dead {
                self.clear(column, sharers);
                cleaned = true;
            }
        }
        cleaned
    }

    fn clear(&self, column: u32, processes: u64) {
        for place in 0..self.used() {
            if self.layout.holders[place].load(Ordering::Acquire) & processes != 0 {
                clear_column(&self.layout.cells[place].count, column);
                self.layout.holders[place].fetch_and(!processes, Ordering::AcqRel);
            }
        }
        for process in bits(processes) {
            self.layout.columns[process].store(0, Ordering::Release);
        }
    }

    fn find(&self, directory: &mut Directory, key: u128) -> Option<usize> {
        let changes = self.layout.changes.load(Ordering::Acquire);
        if directory.changes != changes {
            directory.changes = changes;
            directory.places = (0..self.used()).map(|place| (self.key_of(place), place)).collect();
        }
        let place = directory.places.get(&key).copied()?;
        // A cell that nobody holds is as good as a new one.
        (self.layout.holders[place].load(Ordering::Acquire) != 0).then_some(place)
    }

    fn put(&self, directory: &mut Directory, key: u128) -> Option<usize> {
        let used = self.used();
        let (from, free) = (directory.cursor.min(used), |place: &usize| {
            self.layout.holders[*place].load(Ordering::Acquire) == 0
        });
        let around = || (from..used).chain(0..from);
        // A few looks for one to use again: a start with many keys is not to look at all
        // of them for each.
        let few = around().take(LOOKS).find(free);
        let fresh = || (used < CELLS_MAX).then_some(used);
        let place = few.or_else(fresh).or_else(|| around().find(free))?;
        directory.cursor = if from + LOOKS < used { from + LOOKS } else { 0 };
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

    /// The other processes of the file, dead ones included.
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

    fn directory(&self) -> MutexGuard<'_, Directory> {
        // Whatever a panic leaves behind is looked up again.
        self.directory.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a process of that column adds to a word for each slot.
pub const fn unit(column: u32) -> u64 {
    let own = if column + 1 < COLUMNS { 1 << (COLUMN_BITS * column) } else { 0 };
    (1 << SUM_AT) + own
}

/// All columns of that word together.
#[inline]
pub const fn sum(word: u64) -> u32 {
    (word >> SUM_AT) as u32
}

/// One column of that word.
pub const fn column(word: u64, column: u32) -> u32 {
    let first = word as u32 & COUNT_MAX;
    let second = (word >> COLUMN_BITS) as u32 & COUNT_MAX;
    match column {
        0 => first,
        1 => second,
        _ => sum(word).saturating_sub(first).saturating_sub(second),
    }
}

/// Takes what that column holds off the word; nobody may add to it any more.
fn clear_column(word: &AtomicU64, of: u32) {
    let cleared = |word| Some(word - u64::from(column(word, of)) * unit(of));
    let _ = word.fetch_update(Ordering::AcqRel, Ordering::Acquire, cleared);
}

fn byte_of(process: usize) -> i64 {
    DIRECTORY + 1 + process as i64
}

fn bits(mask: u64) -> impl Iterator<Item = usize> {
    (0..PROCESSES_MAX).filter(move |bit| mask >> bit & 1 == 1)
}

// === impl Memory: locks ===

/// Lets go of the directory.
struct Locked<'a>(&'a Memory);

impl Memory {
    fn lock_directory(&self) -> io::Result<Locked<'_>> {
        let mut tries = 0;
        loop {
            match self.lock(DIRECTORY, libc::F_WRLCK) {
                Ok(()) => return Ok(Locked(self)),
                // A process that was stopped in the middle would hold up this one.
                Err(error) if tries == DIRECTORY_TRIES => return Err(error),
                Err(_) => clock::pause(DIRECTORY_PAUSE),
            }
            tries += 1;
        }
    }

    /// Whether that process lives; true for this one.
    fn lives(&self, process: usize) -> bool {
        let mut lock = one_byte(byte_of(process), libc::F_WRLCK);
        // SAFETY: the kernel fills in `lock`, which outlives the call.
        let result = unsafe { libc::fcntl(self.file.as_raw_fd(), libc::F_GETLK, &raw mut lock) };
        // In doubt nothing is taken from anybody.
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
        // It fails for a lock that is not held alone.
        let _ = self.0.lock(DIRECTORY, libc::F_UNLCK);
    }
}

impl AsFd for Memory {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

// === impl Mapping ===

impl Mapping {
    /// The file must be as long as [`Layout`] and sealed.
    fn of(file: &OwnedFd) -> io::Result<Mapping> {
        let (length, access) = (size_of::<Layout>(), libc::PROT_READ | libc::PROT_WRITE);
        let (fd, null) = (file.as_raw_fd(), std::ptr::null_mut());
        // SAFETY: a new mapping at an address of the kernel's choice touches nothing
        // that is there.
        let at = unsafe { libc::mmap(null, length, access, libc::MAP_SHARED, fd, 0) };
        match NonNull::new(at.cast::<Layout>()) {
            Some(mapped) if at != libc::MAP_FAILED => Ok(Mapping(mapped)),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

impl Deref for Mapping {
    type Target = Layout;

    fn deref(&self) -> &Layout {
        // SAFETY: the mapping is page-aligned and of this length, the file's seals keep
        // it so, and it lasts as long as `self`. Every content is valid: it is atomics
        // alone, which other processes may change at any time.
        unsafe { self.0.as_ref() }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by `of` with this length, and every reference to
        // it borrows `self` or keeps it alive (`Hold`).
        unsafe { libc::munmap(self.0.as_ptr().cast(), size_of::<Layout>()) };
    }
}

// === impl Count ===

impl Count {
    /// One that this process shares with no other.
    pub fn own() -> Count {
        let own = Arc::new(Own(AtomicU64::new(0)));
        Count { word: NonNull::from(&own.0), keep: Keep::Own { _word: own } }
    }

    /// Whether it is in memory that other processes may have.
    pub fn is_shareable(&self) -> bool {
        matches!(self.keep, Keep::Shared { .. })
    }
}

impl Deref for Count {
    type Target = AtomicU64;

    #[inline]
    fn deref(&self) -> &AtomicU64 {
        // SAFETY: `keep` keeps the atomic alive, and neither a mapping nor what an `Arc`
        // holds moves.
        unsafe { self.word.as_ref() }
    }
}

// === impl Hold ===

impl Drop for Hold {
    fn drop(&mut self) {
        let mut directory = self.memory.directory();
        // The key may have been asked for again meanwhile.
        if directory.holds.get(&self.place).is_some_and(|hold| hold.strong_count() == 0) {
            directory.holds.remove(&self.place);
            self.memory.layout.holders[self.place].fetch_and(!self.memory.bit(), Ordering::AcqRel);
        }
    }
}

#[cfg(test)]
mod tests;

//! Counts in shared memory: keys, bounds, and what the dead leave behind.

use super::*;

const ONE: [u64; 3] = [1, 1 << 16, 1 << 32];

/// Columns of 16 bits.
fn clear(word: &AtomicU64, column: u32) {
    word.fetch_and(!(0xffff << (16 * column)), Ordering::AcqRel);
}

fn one(memory: &Memory) -> u64 {
    ONE[memory.column() as usize]
}

fn alone() -> Arc<Memory> {
    Arc::new(Memory::create().unwrap())
}

/// Another part in the same file. To the kernel it is this process, so the first
/// part finds no lock of another process on it: a process that is dead.
fn dead_one(of: &Memory) -> Arc<Memory> {
    Arc::new(Memory::join(of.file.try_clone().unwrap()).unwrap())
}

#[test]
fn a_key_has_one_count_in_every_process_and_a_free_cell_is_used_again() {
    let memory = alone();
    let [a, again, b] = [b"a", b"a", b"b"].map(|key| memory.count(key).unwrap());
    a.0.fetch_add(one(&memory), Ordering::AcqRel);
    let read = |count: &(&AtomicU64, Arc<CellHold>)| count.0.load(Ordering::Acquire);
    assert_eq!((read(&again), read(&b)), (1, 0));
    let other = dead_one(&memory);
    assert_eq!(read(&other.count(b"a").unwrap()), 1);
    assert_eq!(other.column(), 1);
    // What one process still holds is not used for another key.
    drop((a, again));
    assert_eq!(memory.used(), 2);
    let (c, d) = (memory.count(b"c").unwrap(), memory.count(b"d").unwrap());
    assert_eq!((read(&c), read(&d), memory.used()), (0, 0, 3));
}

#[test]
fn what_a_dead_process_held_is_given_back_at_the_second_look() {
    let memory = alone();
    let (count, _hold) = memory.count(b"a").unwrap();
    count.fetch_add(3 * one(&memory), Ordering::AcqRel);
    let dead = dead_one(&memory);
    let (held, _held) = dead.count(b"a").unwrap();
    held.fetch_add(2 * one(&dead), Ordering::AcqRel);
    assert!(memory.is_shared() && !memory.clean(clear));
    assert_eq!(count.load(Ordering::Acquire), 3 * ONE[0] + 2 * ONE[1]);
    assert!(memory.clean(clear) && !memory.is_shared());
    assert_eq!(count.load(Ordering::Acquire), 3 * ONE[0]);
    assert!(!memory.clean(clear));
}

#[test]
fn a_column_is_cleared_when_all_that_share_it_are_dead() {
    let memory = alone();
    let others: Vec<_> = (0..3).map(|_| dead_one(&memory)).collect();
    let columns: Vec<u32> = others.iter().map(|other| other.column).collect();
    assert_eq!(columns, [1, 2, 0]);
    let (count, _hold) = memory.count(b"a").unwrap();
    let held: Vec<_> = others.iter().map(|other| other.count(b"a").unwrap()).collect();
    for one in others.iter().chain([&memory]) {
        count.fetch_add(ONE[one.column() as usize], Ordering::AcqRel);
    }
    assert!(!memory.clean(clear) && memory.clean(clear));
    // The last one's is in this process's column, which lives.
    assert_eq!(count.load(Ordering::Acquire), 2 * ONE[0]);
    assert!(memory.is_shared());
    drop(held);
}

#[test]
fn beyond_the_bounds_there_is_no_count_and_no_part() {
    let memory = alone();
    let mut held: Vec<_> =
        (0..CELLS_MAX).map(|n| memory.count(&n.to_le_bytes()).unwrap()).collect();
    assert!(memory.count(b"one more").is_none());
    assert!(memory.count(&7_usize.to_le_bytes()).is_some(), "known");
    held.swap_remove(100_000);
    assert!(memory.count(b"one more").is_some());
    let parts: Vec<_> = (1..PROCESSES_MAX).map(|_| dead_one(&memory)).collect();
    let error = Memory::join(memory.file.try_clone().unwrap()).unwrap_err();
    assert_eq!(error.to_string(), "64 processes already share these counters");
    drop(parts);
}

#[test]
fn a_file_that_could_shrink_or_is_no_such_file_is_refused() {
    let file = memfd_create("any", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
    rustix::fs::ftruncate(&file, size_of::<Layout>() as u64).unwrap();
    assert!(Memory::join(file.try_clone().unwrap()).is_err());
    fcntl_add_seals(&file, SEALS).unwrap();
    let error = Memory::join(file).unwrap_err();
    assert_eq!(error.to_string(), "a counter file with another layout");
}

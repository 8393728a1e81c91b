//! Tests of counts in shared memory: keys, bounds, and cleaning up after ended processes.

use super::*;

const ONE: [u64; 3] = [1, 1 << 16, 1 << 32];

/// Clears a column of 16 bits.
fn clear(word: &AtomicU64, column: u32) {
    word.fetch_and(!(0xffff << (16 * column)), Ordering::AcqRel);
}

fn one(memory: &Memory) -> u64 {
    ONE[memory.column() as usize]
}

fn alone() -> Arc<Memory> {
    Arc::new(Memory::create().unwrap())
}

/// Joins the same file again. The kernel sees the same process, so `of` finds no lock of
/// another process and treats the new member as an ended process.
fn ended_process(of: &Memory) -> Arc<Memory> {
    Arc::new(Memory::join(of.file.try_clone().unwrap()).unwrap())
}

#[test]
fn all_processes_share_the_count_of_a_key_and_free_cells_are_reused() {
    let memory = alone();
    let [a, again, b] = [b"a", b"a", b"b"].map(|key| memory.count(key).unwrap());
    a.0.fetch_add(one(&memory), Ordering::AcqRel);
    let read = |count: &(&AtomicU64, Arc<CellHold>)| count.0.load(Ordering::Acquire);
    assert_eq!((read(&again), read(&b)), (1, 0));
    let other = ended_process(&memory);
    assert_eq!(read(&other.count(b"a").unwrap()), 1);
    assert_eq!(other.column(), 1);
    // A cell that another process holds is not reused.
    drop((a, again));
    assert_eq!(memory.used(), 2);
    let (c, d) = (memory.count(b"c").unwrap(), memory.count(b"d").unwrap());
    assert_eq!((read(&c), read(&d), memory.used()), (0, 0, 3));
}

#[test]
fn counts_of_an_ended_process_are_released_at_the_second_check() {
    let memory = alone();
    let (count, _hold) = memory.count(b"a").unwrap();
    count.fetch_add(3 * one(&memory), Ordering::AcqRel);
    let ended = ended_process(&memory);
    let (held, _held) = ended.count(b"a").unwrap();
    held.fetch_add(2 * one(&ended), Ordering::AcqRel);
    assert!(memory.is_shared() && !memory.clean(clear));
    assert_eq!(count.load(Ordering::Acquire), 3 * ONE[0] + 2 * ONE[1]);
    assert!(memory.clean(clear) && !memory.is_shared());
    assert_eq!(count.load(Ordering::Acquire), 3 * ONE[0]);
    assert!(!memory.clean(clear));
}

#[test]
fn column_is_cleared_when_all_its_processes_have_ended() {
    let memory = alone();
    let others: Vec<_> = (0..3).map(|_| ended_process(&memory)).collect();
    let columns: Vec<u32> = others.iter().map(|other| other.column).collect();
    assert_eq!(columns, [1, 2, 0]);
    let (count, _hold) = memory.count(b"a").unwrap();
    let held: Vec<_> = others.iter().map(|other| other.count(b"a").unwrap()).collect();
    for one in others.iter().chain([&memory]) {
        count.fetch_add(ONE[one.column() as usize], Ordering::AcqRel);
    }
    assert!(!memory.clean(clear) && memory.clean(clear));
    // The last process shares the column of this process, which still runs.
    assert_eq!(count.load(Ordering::Acquire), 2 * ONE[0]);
    assert!(memory.is_shared());
    drop(held);
}

#[test]
fn counts_and_processes_above_their_bounds_are_rejected() {
    let memory = alone();
    let mut held: Vec<_> =
        (0..CELLS_MAX).map(|n| memory.count(&n.to_le_bytes()).unwrap()).collect();
    assert!(memory.count(b"one more").is_none());
    assert!(memory.count(&7_usize.to_le_bytes()).is_some(), "known");
    held.swap_remove(100_000);
    assert!(memory.count(b"one more").is_some());
    let parts: Vec<_> = (1..PROCESSES_MAX).map(|_| ended_process(&memory)).collect();
    let error = Memory::join(memory.file.try_clone().unwrap()).unwrap_err();
    assert_eq!(error.to_string(), "64 processes already share these counters");
    drop(parts);
}

#[test]
fn unsealed_and_foreign_files_are_rejected() {
    let file = memfd_create("any", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
    rustix::fs::ftruncate(&file, size_of::<Layout>() as u64).unwrap();
    assert!(Memory::join(file.try_clone().unwrap()).is_err());
    fcntl_add_seals(&file, SEALS).unwrap();
    let error = Memory::join(file).unwrap_err();
    assert_eq!(error.to_string(), "a counter file with another layout");
}

//! Runs a fuzz target without a fuzzer: every seed, and thousands of mutations that are the
//! same on every run.
//!
//! Tests call it. Inputs that a fuzzer has found are added to `tests/fuzz/seeds`.

#![allow(clippy::unwrap_used)]

use fastrand::Rng;
use std::path::Path;

/// Passes the files of the directories and `count` mutations of them to `check`. The
/// directories are relative to the root of the repository.
///
/// # Panics
/// `check` panics, or there is no file.
pub fn try_mutations(directories: &[&str], count: usize, check: fn(&[u8])) {
    let seeds = seeds(directories);
    seeds.iter().for_each(|seed| check(seed));
    let mut rng = Rng::with_seed(7);
    for _ in 0..count {
        let mut bytes = seeds[rng.usize(..seeds.len())].clone();
        for _ in 0..rng.u8(1..6) {
            mutate(&mut bytes, &seeds, &mut rng);
        }
        let caught = std::panic::catch_unwind(|| check(&bytes));
        assert!(caught.is_ok(), "on these bytes: {}", bytes.escape_ascii());
    }
}

/// Returns the files of the directories, ordered by path.
fn seeds(directories: &[&str]) -> Vec<Vec<u8>> {
    let root = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../.."));
    let mut paths: Vec<_> = directories
        .iter()
        .flat_map(|directory| std::fs::read_dir(root.join(directory)).unwrap())
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.is_file())
        .collect();
    paths.sort();
    assert!(!paths.is_empty(), "no seeds in {directories:?}");
    paths.iter().map(|path| std::fs::read(path).unwrap()).collect()
}

/// Applies one small random change.
fn mutate(bytes: &mut Vec<u8>, seeds: &[Vec<u8>], rng: &mut Rng) {
    let at = rng.usize(..=bytes.len());
    let to = rng.usize(at..=bytes.len().min(at + 24));
    match rng.u8(..8) {
        0 => bytes.truncate(at),
        1 => drop(bytes.drain(at..to)),
        2 => bytes.insert(at, rng.u8(..)),
        3 => {
            let again = bytes[at..to].to_vec();
            bytes.splice(to..to, again);
        }
        4 => {
            let other = &seeds[rng.usize(..seeds.len())];
            let from = rng.usize(..=other.len());
            let piece = other[from..other.len().min(from + 40)].to_vec();
            bytes.splice(at..to, piece);
        }
        5 => {
            let odd = ["18446744073709551615", "-1", "\"", "[", "\u{1F600}", "\r\n", "0", "%00"];
            let odd = odd[rng.usize(..odd.len())].bytes();
            bytes.splice(at..to, odd);
        }
        _ if at < bytes.len() => bytes[at] ^= 1 << rng.u8(..8),
        _ => {}
    }
}

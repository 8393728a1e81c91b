//! Which tests may run at the same time: light ones share the machine, heavy ones have it alone.
//!
//! A file lock, so that it holds between the processes of cargo-nextest and
//! between the threads of `cargo test` alike. Taken by the engine macros; holds
//! nothing but the lock.

use std::fs::File;

/// Held for the length of a test.
pub struct MachineShare(#[allow(dead_code)] File);

/// Runs next to other light tests, never next to a heavy one.
pub fn shared() -> MachineShare {
    let file = lock_file();
    file.lock_shared().expect("lock a local file");
    MachineShare(file)
}

/// Runs next to no other test.
pub fn alone() -> MachineShare {
    let file = lock_file();
    file.lock().expect("lock a local file");
    MachineShare(file)
}

fn lock_file() -> File {
    let path = std::env::temp_dir().join("tidegate-test-exclusive.lock");
    // Opened again each time: two opens of one file lock against each other
    // even within one process (flock(2)).
    File::options().create(true).truncate(false).write(true).open(path).expect("open the lock file")
}

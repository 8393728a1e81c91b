//! The lock that decides which tests can run at the same time: light tests share the
//! machine, heavy tests run alone.
//!
//! Called by the engine macros. A file lock works between the processes of
//! cargo-nextest and also between the threads of `cargo test`.

use std::fs::File;

/// The lock of one test, held while the test runs.
pub struct MachineShare(#[allow(dead_code)] File);

/// Waits until no heavy test runs. Other light tests can run at the same time.
pub fn shared() -> MachineShare {
    let file = lock_file();
    file.lock_shared().expect("lock a local file");
    MachineShare(file)
}

/// Waits until no other test runs.
pub fn alone() -> MachineShare {
    let file = lock_file();
    file.lock().expect("lock a local file");
    MachineShare(file)
}

fn lock_file() -> File {
    let path = std::env::temp_dir().join("tidegate-test-exclusive.lock");
    // Opened on every call: two opens of one file exclude each other even within one
    // process (flock(2)).
    File::options().create(true).truncate(false).write(true).open(path).expect("open the lock file")
}

//! Who may run when: light tests share the machine, heavy ones have it alone.
//!
//! A file lock, so that it holds between the processes of cargo-nextest and
//! between the threads of `cargo test` alike. Taken by the engine macros; holds
//! nothing but the lock.

use std::fs::File;

/// Held for the length of a test.
pub struct Turn(#[allow(dead_code)] File);

/// Beside other light tests, never beside a heavy one.
pub fn shared() -> Turn {
    let file = lock_file();
    file.lock_shared().expect("a lock on a local file can be had");
    Turn(file)
}

/// Beside no other test.
pub fn alone() -> Turn {
    let file = lock_file();
    file.lock().expect("a lock on a local file can be had");
    Turn(file)
}

fn lock_file() -> File {
    let path = std::env::temp_dir().join("tidegate-test-turn.lock");
    // Opened anew each time: two opens of one file lock against each other
    // even within one process (flock(2)).
    File::options().create(true).truncate(false).write(true).open(path).expect("open the lock file")
}

//! The integration harness: a real balancer process, scripted and real
//! backends, a stream ledger, and the waiting and locking around them.
//!
//! Used by the modules of `tests/it`; one test owns what it starts and every
//! guard here ends its own children by pid. Nothing here sleeps for luck: waits
//! go through [`eventually`], scaled by `TIDEGATE_TEST_PATIENCE`.

pub mod backend;
pub mod client;
pub mod conf;
pub mod exclusive;
pub mod http;
pub mod ledger;
pub mod ports;
pub mod proc;
pub mod proxy;
pub mod servers;
pub mod stable;
pub mod upgrade;
pub mod wait;

pub use wait::{eventually, eventually_some, ms, patience, secs, within};

use std::io::Write;

/// Which engine the balancer under test is told to run on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Engine {
    IoUring,
    Epoll,
}

impl Engine {
    /// The configuration's and the status's word.
    pub fn name(self) -> &'static str {
        match self {
            Engine::IoUring => "io_uring",
            Engine::Epoll => "epoll",
        }
    }
}

/// Makes two tests of each function: `name::io_uring` and `name::epoll`.
///
/// A function that is written but not listed is dead code, which the lints
/// refuse.
macro_rules! on_every_engine {
    ($($name:ident),+ $(,)?) => {$(
        mod $name {
            use crate::common::{Engine, exclusive};

            #[test]
            fn io_uring() {
                let _share = exclusive::shared();
                if $crate::common::io_uring_runs() {
                    super::$name(Engine::IoUring);
                }
            }

            #[test]
            fn epoll() {
                let _share = exclusive::shared();
                super::$name(Engine::Epoll);
            }
        }
    )+};
}

/// The same for tests that load or time the machine: they run with no other
/// test beside them, as `name::alone::io_uring` and `name::alone::epoll`.
macro_rules! on_every_engine_alone {
    ($($name:ident),+ $(,)?) => {$(
        mod $name {
            mod alone {
                use crate::common::{Engine, exclusive};

                #[test]
                fn io_uring() {
                    let _share = exclusive::alone();
                    if $crate::common::io_uring_runs() {
                        super::super::$name(Engine::IoUring);
                    }
                }

                #[test]
                fn epoll() {
                    let _share = exclusive::alone();
                    super::super::$name(Engine::Epoll);
                }
            }
        }
    )+};
}

pub(crate) use {on_every_engine, on_every_engine_alone};

/// Whether the long versions of the tests were asked for (`TIDEGATE_LONG=1`).
pub fn long() -> bool {
    std::env::var("TIDEGATE_LONG").is_ok_and(|value| value == "1")
}

/// Whether every one of `programs` is on the PATH.
///
/// Where one is missing the test is skipped loudly, and in CI (`CI` is set) it
/// fails: a suite that quietly tests less is worse than a red one.
pub fn have(programs: &[&str]) -> bool {
    programs.iter().all(|program| {
        let found = servers::find(program).is_some();
        if !found {
            skip(&format!("{program} not found"));
        }
        found
    })
}

/// Whether this machine lets us make a ring; where it does not, the test is
/// skipped loudly, and fails in CI unless `TIDEGATE_NO_IO_URING` is set.
pub fn io_uring_runs() -> bool {
    match tokio_uring::Runtime::new(&tokio_uring::builder()) {
        Ok(_) => true,
        Err(_) if std::env::var_os("TIDEGATE_NO_IO_URING").is_some() => {
            report("SKIPPED", "TIDEGATE_NO_IO_URING is set");
            false
        }
        Err(error) => {
            skip(&format!("no io_uring here: {error}"));
            false
        }
    }
}

/// Says that the current test did not run, and fails it in CI.
pub fn skip(why: &str) {
    assert!(std::env::var_os("CI").is_none(), "cannot run in CI: {why}");
    report("SKIPPED", why);
}

/// Says a measured number.
pub fn measured(what: &str) {
    report("MEASURED", what);
}

/// One line past the runner's capture: on the real standard error, where
/// `eprintln` would be swallowed, and in the file named by
/// `TIDEGATE_TEST_NOTES`, which `scripts/test` prints at its end.
pub fn report(kind: &str, what: &str) {
    let name = std::thread::current().name().unwrap_or("?").to_string();
    let line = format!("{kind} {name}: {what}\n");
    let _ = std::io::stderr().write_all(line.as_bytes());
    if let Some(path) = std::env::var_os("TIDEGATE_TEST_NOTES")
        && let Ok(mut file) = std::fs::File::options().append(true).create(true).open(path)
    {
        let _ = file.write_all(line.as_bytes());
    }
}

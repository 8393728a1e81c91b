//! The integration harness: a real Tidegate process, scripted and real backends, a
//! stream ledger, and the waits and locks that tests need.
//!
//! Used by all test binaries that start a process. A test owns what it starts, and every
//! guard ends its own children by pid. No test waits by a plain sleep: all waits go
//! through [`eventually`], scaled by `TIDEGATE_TEST_PATIENCE`.

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
pub mod vectors;
pub mod wait;

pub use wait::{eventually, eventually_some, ms, patience, secs, within};

use std::io::Write;

/// The engine on which Tidegate must run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Engine {
    IoUring,
    Epoll,
}

impl Engine {
    /// The engine's name in the configuration and in `status`.
    pub fn name(self) -> &'static str {
        match self {
            Engine::IoUring => "io_uring",
            Engine::Epoll => "epoll",
        }
    }
}

/// Makes two tests of each function: `name::io_uring` and `name::epoll`.
///
/// A function that no macro lists is dead code, and the lints reject it.
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

/// Makes two tests of each function that loads the machine: `name::alone::io_uring` and
/// `name::alone::epoll`. No other test runs at the same time.
macro_rules! on_every_engine_alone {
    ($($name:ident),+ $(,)?) => {
        $crate::common::on_every_engine_apart!(alone, alone; $($name),+);
    };
}

/// Makes two tests of each function that measures time and uses little CPU:
/// `name::quiet::io_uring` and `name::quiet::epoll`. Under nextest two such tests run at the
/// same time, and no others.
macro_rules! on_every_engine_quiet {
    ($($name:ident),+ $(,)?) => {
        $crate::common::on_every_engine_apart!(quiet, shared; $($name),+);
    };
}

/// Makes two tests of each function in a module named `$module`, with the lock `$lock`.
macro_rules! on_every_engine_apart {
    ($module:ident, $lock:ident; $($name:ident),+) => {$(
        mod $name {
            mod $module {
                use crate::common::{Engine, exclusive};

                #[test]
                fn io_uring() {
                    let _share = exclusive::$lock();
                    if $crate::common::io_uring_runs() {
                        super::super::$name(Engine::IoUring);
                    }
                }

                #[test]
                fn epoll() {
                    let _share = exclusive::$lock();
                    super::super::$name(Engine::Epoll);
                }
            }
        }
    )+};
}

pub(crate) use {
    on_every_engine, on_every_engine_alone, on_every_engine_apart, on_every_engine_quiet,
};

/// Returns true if the long versions of the tests are requested (`TIDEGATE_LONG=1`).
pub fn long() -> bool {
    std::env::var("TIDEGATE_LONG").is_ok_and(|value| value == "1")
}

/// Returns true if all `programs` are found.
///
/// If a program is missing, the test reports that it is skipped. In CI (`CI` is set) it
/// fails, because a suite that silently tests less hides defects.
pub fn have(programs: &[&str]) -> bool {
    programs.iter().all(|program| {
        let found = servers::find(program).is_some();
        if !found {
            skip(&format!("{program} not found"));
        }
        found
    })
}

/// Returns true if this machine allows io_uring. If it does not, the test reports that it
/// is skipped. In CI it then fails unless `TIDEGATE_NO_IO_URING` is set.
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

/// Reports that the current test is skipped, and fails it in CI.
pub fn skip(why: &str) {
    assert!(std::env::var_os("CI").is_none(), "cannot run in CI: {why}");
    report("SKIPPED", why);
}

/// Reports a measured number.
pub fn measured(what: &str) {
    report("MEASURED", what);
}

/// Writes one line past the runner's capture. The line goes to the real standard error,
/// because the runner captures `eprintln`, and to the file that `TIDEGATE_TEST_NOTES`
/// names. `scripts/test` prints that file at its end.
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

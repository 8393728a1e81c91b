//! Which engine the workers run on: what is asked for, and what this machine allows.
//!
//! Called by `start`.

use tidegate_core::model::EngineChoice;
use tidegate_dataplane::worker::EngineKind;

/// The engine and, in words, why that one.
///
/// # Why `auto` is epoll
///
/// Measured beside each other by `scripts/bench-peers`, the ring is up to a tenth
/// ahead on small messages, level or behind on streams, and larger in memory for
/// each idle session. It is also the younger of the two: until it has been soaked
/// it is asked for by name.
pub(super) fn choose_runtime(choice: EngineChoice) -> (EngineKind, String) {
    let asked = "set in the configuration";
    match choice {
        EngineChoice::Epoll => (EngineKind::Epoll, asked.to_owned()),
        EngineChoice::IoUring => match EngineKind::io_uring_allowed() {
            Ok(()) => (EngineKind::IoUring, asked.to_owned()),
            Err(error) => (EngineKind::Epoll, refusal(&error)),
        },
        EngineChoice::Auto => {
            let other = match EngineKind::io_uring_allowed() {
                Ok(()) => "io_uring is available (set engine = \"io_uring\")".to_owned(),
                Err(error) => refusal(&error),
            };
            (EngineKind::Epoll, format!("default; {other}"))
        }
    }
}

fn refusal(error: &std::io::Error) -> String {
    let hint = match error.raw_os_error() {
        Some(libc::EPERM | libc::EACCES) => {
            let disabled = std::fs::read_to_string("/proc/sys/kernel/io_uring_disabled");
            match disabled.as_deref().map(str::trim) {
                Ok("1" | "2") => ": disabled by the sysctl kernel.io_uring_disabled",
                _ => ": blocked by a seccomp profile or security module",
            }
        }
        Some(libc::ENOSYS) => ": not supported by this kernel or sandbox",
        Some(libc::ENOMEM) => ": memory or locked-memory limit reached",
        Some(libc::EINVAL) => ": this kernel is too old",
        _ => "",
    };
    format!("io_uring is not available ({error}){hint}")
}

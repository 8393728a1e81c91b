//! Chooses the engine of the workers from the configuration and the kernel's support.
//!
//! Called by `start`.

use tidegate_core::model::EngineChoice;
use tidegate_dataplane::worker::EngineKind;

/// Returns the engine and the reason for the log.
///
/// # Why `auto` is epoll
///
/// According to `scripts/bench-peers`, io_uring is up to 10% faster on small messages,
/// equal or slower on streams, and needs more memory per idle session. It is also the
/// newer engine. It must be configured until it has run longer under load.
pub(super) fn choose_runtime(choice: EngineChoice) -> (EngineKind, String) {
    let configured = "set in the configuration";
    match choice {
        EngineChoice::Epoll => (EngineKind::Epoll, configured.to_owned()),
        EngineChoice::IoUring => match EngineKind::io_uring_allowed() {
            Ok(()) => (EngineKind::IoUring, configured.to_owned()),
            Err(error) => (EngineKind::Epoll, not_available(&error)),
        },
        EngineChoice::Auto => {
            let other = match EngineKind::io_uring_allowed() {
                Ok(()) => "io_uring is available".to_owned(),
                Err(error) => not_available(&error),
            };
            (EngineKind::Epoll, format!("default; {other}"))
        }
    }
}

fn not_available(error: &std::io::Error) -> String {
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

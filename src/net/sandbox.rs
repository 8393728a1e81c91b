//! Restrictions of this process: landlock for files, seccomp for system calls.
//!
//! Called by `daemon::sandbox` while the process has one thread. Later threads and
//! programs that the process starts inherit the restrictions, which cannot be removed.
//! The caller decides which paths are needed; [`calls`] lists the system calls.

#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
mod calls;

/// For architectures without a list of system calls.
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
mod calls {
    pub(super) fn rules() -> Option<std::collections::BTreeMap<i64, Vec<seccompiler::SeccompRule>>>
    {
        None
    }
}

use landlock::{
    ABI, Access, AccessFs, BitFlags, CompatLevel, Compatible, LandlockStatus, Ruleset, RulesetAttr,
    RulesetCreatedAttr, RulesetStatus, Scope, make_bitflags, path_beneath_rules,
};
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter};
use std::io;
use std::path::PathBuf;

/// The paths that stay accessible. A directory includes everything below it. Paths that
/// do not exist are skipped.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Paths {
    /// Readable and executable.
    pub run: Vec<PathBuf>,
    /// Readable.
    pub read: Vec<PathBuf>,
    /// Directories in which files and sockets can be made, written, renamed and removed.
    pub write: Vec<PathBuf>,
}

/// Newest supported landlock version. Older kernels apply the subset that they have.
const INTERFACE: ABI = ABI::V6;

/// Read access without execution.
const READ: BitFlags<AccessFs> = make_bitflags!(AccessFs::{ReadFile | ReadDir});

/// Write access without making directories, devices or links, and without moving files
/// between directories.
const WRITE: BitFlags<AccessFs> = make_bitflags!(AccessFs::{
    ReadFile | ReadDir | WriteFile | Truncate | MakeReg | MakeSock | RemoveFile
});

/// Restricts the file system of this thread to `paths`, and forbids signals to processes
/// outside the sandbox (landlock(7)). Network access is not restricted.
///
/// Returns the landlock version as text.
///
/// # Errors
/// A message: the kernel does not support landlock, or rejects the rules.
pub fn restrict_files(paths: &Paths) -> Result<String, String> {
    let refused = |error: &dyn std::fmt::Display| format!("rejected by the kernel: {error}");
    let restricted = || -> Result<_, landlock::RulesetError> {
        Ruleset::default()
            .set_compatibility(CompatLevel::BestEffort)
            .handle_access(AccessFs::from_all(INTERFACE))?
            .scope(Scope::Signal)?
            .create()?
            .add_rules(path_beneath_rules(&paths.run, READ | AccessFs::Execute))?
            .add_rules(path_beneath_rules(&paths.read, READ))?
            .add_rules(path_beneath_rules(&paths.write, WRITE))?
            .restrict_self()
    };
    let status = restricted().map_err(|error| refused(&error))?;
    let version = match status.landlock {
        LandlockStatus::Available { effective_abi, .. } => {
            format!("version {}", effective_abi as i32)
        }
        LandlockStatus::NotEnabled => return Err("disabled in this kernel (lsm=)".to_owned()),
        LandlockStatus::NotImplemented => return Err("not supported by this kernel".to_owned()),
    };
    match status.ruleset {
        RulesetStatus::FullyEnforced => Ok(version),
        RulesetStatus::PartiallyEnforced => Ok(format!("{version}, partially supported")),
        RulesetStatus::NotEnforced => Err("not supported by this kernel".to_owned()),
    }
}

/// Restricts this thread to the system calls in [`calls`]. Returns their number as text.
///
/// Any other call fails with `ENOSYS`, as on a kernel without it, so that libraries use
/// an alternative. The kernel logs such calls (seccomp(2), `SECCOMP_FILTER_FLAG_LOG`).
///
/// # Errors
/// A message: the kernel does not support seccomp or rejects the filter, or this
/// architecture has no list.
pub fn restrict_calls() -> Result<String, String> {
    let rules = calls::rules().ok_or("not supported on this CPU architecture")?;
    let count = rules.len();
    let arch =
        std::env::consts::ARCH.try_into().map_err(|_| "not supported on this CPU architecture")?;
    let otherwise = SeccompAction::Errno(libc::ENOSYS as u32);
    let filter = SeccompFilter::new(rules, otherwise, SeccompAction::Allow, arch)
        .and_then(TryInto::<BpfProgram>::try_into)
        .map_err(|error| format!("cannot build the filter: {error}"))?;
    install(&filter).map_err(|error| match error.raw_os_error() {
        Some(libc::ENOSYS | libc::EINVAL) => "not supported by this kernel".to_owned(),
        _ => format!("rejected by the kernel: {error}"),
    })?;
    Ok(format!("{count} system calls allowed"))
}

/// Returns whether a seccomp filter is in force for this thread. Another program may have
/// set it.
pub fn calls_are_restricted() -> bool {
    use rustix::thread::SecureComputingMode;
    rustix::thread::secure_computing_mode().is_ok_and(|mode| mode == SecureComputingMode::Filter)
}

#[expect(unsafe_code, reason = "seccomp(2) takes a pointer to a program")]
fn install(filter: &BpfProgram) -> io::Result<()> {
    let mut program: Vec<libc::sock_filter> = filter
        .iter()
        .map(|one| libc::sock_filter { code: one.code, jt: one.jt, jf: one.jf, k: one.k })
        .collect();
    let len = u16::try_from(program.len()).map_err(|_| io::Error::other("filter too long"))?;
    let whole = libc::sock_fprog { len, filter: program.as_mut_ptr() };
    // Without the second flag, kernels before 5.16 disable speculative store bypass for
    // the process, which slows it down.
    let flags = libc::SECCOMP_FILTER_FLAG_LOG | libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW;
    // SAFETY: the kernel copies `len` instructions from `filter`. It points to the buffer
    // of `program`, which has that length and lives until the end of this function. The
    // kernel writes no memory of this process.
    let done = unsafe {
        libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, flags, &raw const whole)
    };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs `act` on a separate thread, because its restrictions cannot be removed.
    fn on_thread<T: Send>(act: impl FnOnce() -> T + Send) -> T {
        std::thread::scope(|scope| scope.spawn(act).join().unwrap())
    }

    #[test]
    fn only_files_in_the_allowed_paths_are_accessible() {
        let [read, write, other] = [(); 3].map(|()| tempfile::tempdir().unwrap());
        for dir in [&read, &write, &other] {
            std::fs::write(dir.path().join("f"), "x").unwrap();
        }
        let paths = Paths {
            read: vec![read.path().to_owned(), "/no/such".into()],
            write: vec![write.path().to_owned()],
            run: Vec::new(),
        };
        let closed = on_thread(|| {
            crate::privileges::set_no_new_privs().unwrap();
            restrict_files(&paths).map(|_| {
                assert!(std::fs::read(read.path().join("f")).is_ok());
                assert!(std::fs::write(read.path().join("f"), "y").is_err());
                assert!(std::fs::write(write.path().join("g"), "y").is_ok());
                assert!(std::fs::rename(write.path().join("g"), write.path().join("h")).is_ok());
                assert!(std::fs::remove_file(write.path().join("h")).is_ok());
                assert!(std::os::unix::net::UnixListener::bind(write.path().join("s")).is_ok());
                let error = std::fs::read(other.path().join("f")).unwrap_err();
                assert_eq!(error.kind(), io::ErrorKind::PermissionDenied);
            })
        });
        if let Err(why) = closed {
            assert!(std::env::var_os("CI").is_none(), "landlock: {why}");
            eprintln!("skipped: landlock: {why}");
        }
        assert!(std::fs::read(other.path().join("f")).is_ok(), "other threads are not restricted");
    }

    #[test]
    fn unlisted_calls_fail_with_enosys() {
        let (changed_root, packet, usual) = on_thread(|| {
            crate::privileges::set_no_new_privs().unwrap();
            restrict_calls().expect("seccomp");
            assert!(calls_are_restricted());
            let changed_root = rustix::process::chroot("/");
            let packet = socket2::Socket::new(socket2::Domain::PACKET, socket2::Type::DGRAM, None);
            let usual = std::thread::spawn(|| std::fs::read("/proc/self/stat").is_ok()).join();
            (changed_root, packet.unwrap_err(), usual.unwrap())
        });
        assert_eq!(changed_root, Err(rustix::io::Errno::NOSYS));
        assert_eq!(packet.raw_os_error(), Some(libc::ENOSYS));
        assert!(usual, "threads and files still work");
    }
}

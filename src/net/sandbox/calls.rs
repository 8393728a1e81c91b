//! The system calls that the seccomp filter allows.
//!
//! Read by `sandbox`. The list has the calls of both engines, the runtimes, the
//! allocator, the C library and the loader, and their alternatives on older kernels. It
//! includes the calls that start the new process of an upgrade.
//!
//! It never includes calls that make namespaces or mounts, trace or read other
//! processes, load code into the kernel, or access hardware.

use libc::*;
use seccompiler::{
    SeccompCmpArgLen as Length, SeccompCmpOp as Op, SeccompCondition as Condition,
    SeccompRule as Rule,
};
use std::collections::BTreeMap;

type Rules = BTreeMap<i64, Vec<Rule>>;

/// Calls that are allowed with any arguments.
#[rustfmt::skip]
const PLAIN: &[c_long] = &[
    // Sockets.
    SYS_accept, SYS_accept4, SYS_bind, SYS_connect, SYS_getpeername, SYS_getsockname,
    SYS_getsockopt, SYS_listen, SYS_recvfrom, SYS_recvmmsg, SYS_recvmsg, SYS_sendmmsg, SYS_sendmsg,
    SYS_sendto, SYS_setsockopt, SYS_shutdown,
    // Moving bytes.
    SYS_copy_file_range, SYS_pread64, SYS_preadv, SYS_preadv2, SYS_pwrite64, SYS_pwritev,
    SYS_pwritev2, SYS_read, SYS_readv, SYS_sendfile, SYS_splice, SYS_tee, SYS_vmsplice, SYS_write,
    SYS_writev,
    // Waiting. Operations in an io_uring bypass the filter.
    SYS_epoll_create1, SYS_epoll_ctl, SYS_epoll_pwait, SYS_epoll_pwait2, SYS_eventfd2,
    SYS_inotify_add_watch, SYS_inotify_init1, SYS_inotify_rm_watch, SYS_io_uring_enter,
    SYS_io_uring_register, SYS_io_uring_setup, SYS_ppoll, SYS_pselect6, SYS_signalfd4,
    SYS_timerfd_create, SYS_timerfd_gettime, SYS_timerfd_settime,
    // Descriptors and files. landlock restricts which files can be opened.
    SYS_close, SYS_close_range, SYS_dup, SYS_dup3, SYS_faccessat, SYS_faccessat2, SYS_fadvise64,
    SYS_fallocate, SYS_fchdir, SYS_fchmod, SYS_fchmodat, SYS_fchown, SYS_fchownat, SYS_fcntl,
    SYS_fdatasync, SYS_flock, SYS_fstat, SYS_fstatfs, SYS_fsync, SYS_ftruncate, SYS_getcwd,
    SYS_getdents64, SYS_linkat, SYS_lseek, SYS_memfd_create, SYS_mkdirat, SYS_newfstatat,
    SYS_openat, SYS_openat2, SYS_pipe2, SYS_readahead, SYS_readlinkat, SYS_renameat, SYS_renameat2,
    SYS_statfs, SYS_statx, SYS_symlinkat, SYS_sync_file_range, SYS_umask, SYS_unlinkat,
    SYS_utimensat, SYS_chdir,
    // Memory.
    SYS_brk, SYS_get_mempolicy, SYS_madvise, SYS_mbind, SYS_membarrier, SYS_mincore, SYS_mlock,
    SYS_mlock2, SYS_mmap, SYS_mprotect, SYS_mremap, SYS_msync, SYS_munlock, SYS_munmap,
    SYS_set_mempolicy,
    // Threads, and the start of the new process of an upgrade.
    SYS_execve, SYS_execveat, SYS_exit, SYS_exit_group, SYS_futex, SYS_futex_waitv,
    SYS_get_robust_list, SYS_getcpu, SYS_gettid, SYS_kill, SYS_pidfd_getfd, SYS_pidfd_open,
    SYS_pidfd_send_signal, SYS_restart_syscall, SYS_rseq, SYS_sched_get_priority_max,
    SYS_sched_get_priority_min, SYS_sched_getaffinity, SYS_sched_getattr, SYS_sched_getparam,
    SYS_sched_getscheduler, SYS_sched_rr_get_interval, SYS_sched_setaffinity,
    SYS_sched_setscheduler, SYS_sched_yield, SYS_set_robust_list, SYS_set_tid_address, SYS_tgkill,
    SYS_tkill, SYS_wait4, SYS_waitid,
    // Signals.
    SYS_rt_sigaction, SYS_rt_sigpending, SYS_rt_sigprocmask, SYS_rt_sigqueueinfo, SYS_rt_sigreturn,
    SYS_rt_sigsuspend, SYS_rt_sigtimedwait, SYS_rt_tgsigqueueinfo, SYS_sigaltstack,
    // Time.
    SYS_clock_getres, SYS_clock_gettime, SYS_clock_nanosleep, SYS_getitimer, SYS_gettimeofday,
    SYS_nanosleep, SYS_setitimer, SYS_timer_create, SYS_timer_delete, SYS_timer_getoverrun,
    SYS_timer_gettime, SYS_timer_settime, SYS_times,
    // Identity and limits. A process cannot gain privileges with these calls.
    SYS_capget, SYS_capset, SYS_getegid, SYS_geteuid, SYS_getgid, SYS_getgroups, SYS_getpgid,
    SYS_getpid, SYS_getppid, SYS_getpriority, SYS_getrandom, SYS_getresgid, SYS_getresuid,
    SYS_getrlimit, SYS_getrusage, SYS_getsid, SYS_getuid, SYS_landlock_add_rule,
    SYS_landlock_create_ruleset, SYS_landlock_restrict_self, SYS_prctl, SYS_prlimit64, SYS_seccomp,
    SYS_setgid, SYS_setgroups, SYS_setpgid, SYS_setpriority, SYS_setresgid, SYS_setresuid,
    SYS_setrlimit, SYS_setsid, SYS_setuid, SYS_sysinfo, SYS_uname,
];

/// Calls that only x86-64 has. Newer architectures have other calls for the same purpose.
#[cfg(target_arch = "x86_64")]
#[rustfmt::skip]
const OLDER: &[c_long] = &[
    SYS_access, SYS_alarm, SYS_arch_prctl, SYS_chmod, SYS_chown, SYS_dup2, SYS_epoll_create,
    SYS_epoll_wait, SYS_eventfd, SYS_fork, SYS_getdents, SYS_getpgrp, SYS_inotify_init, SYS_lchown,
    SYS_link, SYS_lstat, SYS_mkdir, SYS_open, SYS_pause, SYS_pipe, SYS_poll, SYS_readlink,
    SYS_rename, SYS_rmdir, SYS_select, SYS_stat, SYS_symlink, SYS_time, SYS_unlink, SYS_utimes,
    SYS_vfork,
];
#[cfg(not(target_arch = "x86_64"))]
const OLDER: &[c_long] = &[];

/// Flags of clone(2) that make a namespace. Other calls that make namespaces, such as
/// clone3(2), are not in the list.
const NAMESPACES: c_int = CLONE_NEWNS
    | CLONE_NEWCGROUP
    | CLONE_NEWUTS
    | CLONE_NEWIPC
    | CLONE_NEWUSER
    | CLONE_NEWPID
    | CLONE_NEWNET;

/// Address families of sockets. AF_NETLINK is needed to look up interfaces and addresses.
const FAMILIES: [c_int; 4] = [AF_UNIX, AF_INET, AF_INET6, AF_NETLINK];

/// TIOCSTI and TIOCLINUX (ioctl_tty(2)), which insert input into a terminal.
const TYPING: [u64; 2] = [0x5412, 0x541C];

/// Returns every allowed call with the conditions on its arguments. `None`: the conditions
/// contradict each other.
pub(super) fn rules() -> Option<Rules> {
    let plain = PLAIN.iter().chain(OLDER).map(|call| (*call, Vec::new()));
    plain.chain(conditional()?).map(Some).collect()
}

fn conditional() -> Option<[(i64, Vec<Rule>); 4]> {
    let rule = |conditions: Vec<Condition>| Rule::new(conditions).ok();
    let family = |family: &c_int| rule(vec![word(0, Op::Eq, *family as u64)?]);
    let typing = TYPING.map(|request| word(1, Op::Ne, request));
    let no_typing = rule(typing.into_iter().collect::<Option<_>>()?)?;
    let no_namespace = rule(vec![word(0, Op::MaskedEq(NAMESPACES as u32 as u64), 0)?])?;
    Some([
        (SYS_socket, FAMILIES.iter().map(family).collect::<Option<_>>()?),
        (SYS_socketpair, vec![family(&AF_UNIX)?]),
        (SYS_ioctl, vec![no_typing]),
        (SYS_clone, vec![no_namespace]),
    ])
}

/// Makes a condition on the lower 32 bits of an argument. These arguments are `int`s, and
/// the kernel ignores their upper half.
fn word(argument: u8, op: Op, value: u64) -> Option<Condition> {
    Condition::new(argument, Length::Dword, op, value).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dangerous_calls_are_not_in_the_list() {
        let rules = rules().expect("this processor is known");
        for call in [
            SYS_ptrace,
            SYS_process_vm_readv,
            SYS_unshare,
            SYS_setns,
            SYS_mount,
            SYS_umount2,
            SYS_pivot_root,
            SYS_chroot,
            SYS_clone3,
            SYS_bpf,
            SYS_perf_event_open,
            SYS_init_module,
            SYS_finit_module,
            SYS_kexec_load,
            SYS_keyctl,
            SYS_add_key,
            SYS_userfaultfd,
            SYS_open_by_handle_at,
            SYS_mknodat,
            SYS_swapon,
            SYS_reboot,
            SYS_settimeofday,
            SYS_clock_settime,
            SYS_personality,
            SYS_quotactl,
        ] {
            assert!(!rules.contains_key(&call), "{call}");
        }
    }

    #[test]
    fn every_call_is_listed_once() {
        let rules = rules().unwrap();
        assert_eq!(rules.len(), PLAIN.len() + OLDER.len() + 4);
    }
}

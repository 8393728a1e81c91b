//! User, groups, capabilities and `no_new_privs` of this process.
//!
//! Called by `daemon::sandbox` while the process has one thread. Later threads inherit its
//! state. It only drops rights and never decides which.

pub use rustix::thread::CapabilitySet;

use nix::unistd::{Gid, Group, Uid, User};
use rustix::process::DumpableBehavior;
use rustix::thread::{
    CapabilitySets, capabilities, configure_capability_in_ambient_set,
    remove_capability_from_bounding_set, set_capabilities, set_keep_capabilities,
};
use std::ffi::CString;
use std::io;

/// A user of this host and the groups that the process gets with it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UserIdentity {
    /// Name in the user database, or the number if the user has no entry.
    pub name: String,
    uid: Uid,
    gid: Gid,
    groups: Vec<Gid>,
}

// === impl UserIdentity ===

impl UserIdentity {
    /// Returns the user with this name or number, with `group` or its own groups.
    ///
    /// It reads the user database (getpwnam(3)). A number needs no entry if `group` is
    /// given.
    ///
    /// # Errors
    /// A message: the user or group does not exist, or the database is not readable.
    pub fn find(user: &str, group: Option<&str>) -> Result<UserIdentity, String> {
        let unreadable = |error: nix::Error| format!("cannot read the user database: {error}");
        let gid = match group {
            Some(group) => Some(find_group(group)?),
            None => None,
        };
        let entry = match user.parse() {
            Ok(number) => User::from_uid(Uid::from_raw(number)),
            Err(_) => User::from_name(user),
        };
        match (entry.map_err(unreadable)?, gid, user.parse()) {
            (Some(entry), gid, _) => {
                let gid = gid.unwrap_or(entry.gid);
                // A configured group replaces all groups of the user.
                let groups = match group {
                    Some(_) => vec![gid],
                    None => groups_of(&entry.name, gid).map_err(unreadable)?,
                };
                Ok(UserIdentity { name: entry.name, uid: entry.uid, gid, groups })
            }
            (None, Some(gid), Ok(number)) => {
                let uid = Uid::from_raw(number);
                Ok(UserIdentity { name: user.to_owned(), uid, gid, groups: vec![gid] })
            }
            (None, None, Ok(number)) => {
                Err(format!("user {number} is not in the user database; set group as well"))
            }
            (None, _, Err(_)) => Err(format!("user {user:?} does not exist")),
        }
    }

    /// Returns user ID and group ID for chown(2).
    pub fn owner(&self) -> (u32, u32) {
        (self.uid.as_raw(), self.gid.as_raw())
    }

    /// Returns whether the user ID is 0.
    pub fn is_root(&self) -> bool {
        self.uid.is_root()
    }

    /// Returns whether this process already has this user and group.
    pub fn is_current(&self) -> bool {
        nix::unistd::getresuid()
            .is_ok_and(|ids| [ids.real, ids.effective, ids.saved] == [self.uid; 3])
            && nix::unistd::getegid() == self.gid
    }

    /// Changes the process to this user for good, and keeps only the capabilities in
    /// `keep`.
    ///
    /// The user changes on all threads (setresuid(2) of libc). Groups are set first,
    /// because the user may not be allowed to set them.
    ///
    /// # Errors
    /// The failed step and its error. The process may have changed in part and must exit.
    pub fn assume(&self, keep: CapabilitySet) -> Result<(), (&'static str, io::Error)> {
        let at = |what| move |error: nix::Error| (what, io::Error::from(error));
        let at_prctl = |what| move |error: rustix::io::Errno| (what, io::Error::from(error));
        // It needs CAP_SETPCAP, which the change of the user drops.
        bound(keep);
        set_keep_capabilities(true).map_err(at_prctl("keep capabilities"))?;
        nix::unistd::setgroups(&self.groups).map_err(at("set the supplementary groups"))?;
        nix::unistd::setresgid(self.gid, self.gid, self.gid).map_err(at("set the group"))?;
        nix::unistd::setresuid(self.uid, self.uid, self.uid).map_err(at("set the user"))?;
        reduce(keep).map_err(|error| ("reduce the capabilities", error))?;
        set_keep_capabilities(false).map_err(at_prctl("drop the capabilities"))?;
        Ok(())
    }
}

fn find_group(group: &str) -> Result<Gid, String> {
    let unreadable = |error: nix::Error| format!("cannot read the group database: {error}");
    match group.parse() {
        Ok(number) => Ok(Gid::from_raw(number)),
        Err(_) => match Group::from_name(group).map_err(unreadable)? {
            Some(entry) => Ok(entry.gid),
            None => Err(format!("group {group:?} does not exist")),
        },
    }
}

/// Returns the groups of a user in the group database.
fn groups_of(name: &str, gid: Gid) -> nix::Result<Vec<Gid>> {
    let name = CString::new(name).map_err(|_| nix::Error::EINVAL)?;
    nix::unistd::getgrouplist(&name, gid)
}

/// Returns user and group of this process as `user:group`, by name if they have one.
pub fn whoami() -> String {
    let (uid, gid) = (nix::unistd::geteuid(), nix::unistd::getegid());
    // In a sandbox, the process may not read the databases.
    let user = User::from_uid(uid).ok().flatten().map_or_else(|| uid.to_string(), |it| it.name);
    let group = Group::from_gid(gid).ok().flatten().map_or_else(|| gid.to_string(), |it| it.name);
    format!("{user}:{group}")
}

/// Returns whether this process has user ID 0.
pub fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}

/// Drops every capability except `keep` from all sets of the calling thread.
///
/// Kept capabilities survive execve(2). If the process is not root, they are added to the
/// ambient set for that (capabilities(7)).
///
/// # Errors
/// The error of the kernel.
pub fn reduce(keep: CapabilitySet) -> io::Result<()> {
    bound(keep);
    let kept = capabilities(None)?.permitted & keep;
    let sets = CapabilitySets { effective: kept, permitted: kept, inheritable: kept };
    set_capabilities(None, sets)?;
    for one in each().filter(|one| !is_root() && kept.contains(*one)) {
        configure_capability_in_ambient_set(one, true)?;
    }
    Ok(())
}

/// Removes all capabilities except `keep` from the bounding set, so that no program that
/// this process starts gets more.
///
/// Without CAP_SETPCAP the call fails. `no_new_privs` has the same effect then.
fn bound(keep: CapabilitySet) {
    for one in each().filter(|one| !keep.contains(*one)) {
        let _ = remove_capability_from_bounding_set(one);
    }
}

/// Returns the permitted capabilities of the calling thread.
///
/// # Errors
/// The error of the kernel.
pub fn held() -> io::Result<CapabilitySet> {
    Ok(capabilities(None)?.permitted)
}

/// Returns the names of capabilities(7) in lower case and without `cap_`, or `none`.
pub fn names(set: CapabilitySet) -> String {
    let names: Vec<String> = each()
        .filter(|one| set.contains(*one))
        .map(|one| match one.iter_names().next() {
            Some((name, _)) => name.to_lowercase(),
            None => format!("{:#x}", one.bits()),
        })
        .collect();
    if names.is_empty() { "none".to_owned() } else { names.join(", ") }
}

/// Returns every capability that a set can hold, including those that the kernel does
/// not define.
fn each() -> impl Iterator<Item = CapabilitySet> {
    (0..u64::BITS).map(|bit| CapabilitySet::from_bits_retain(1 << bit))
}

/// Prevents programs that this process starts from gaining privileges (prctl(2),
/// `PR_SET_NO_NEW_PRIVS`). landlock and seccomp require it.
///
/// # Errors
/// The error of the kernel.
pub fn set_no_new_privs() -> io::Result<()> {
    Ok(rustix::thread::set_no_new_privs(true)?)
}

/// Returns whether `no_new_privs` is set.
pub fn has_no_new_privs() -> bool {
    rustix::thread::no_new_privs().unwrap_or(false)
}

/// Prevents core dumps and ptrace(2) by processes of the same user, because the memory
/// holds secrets.
///
/// The kernel does this when a process changes its user. It does not if the process was
/// started as that user.
///
/// # Errors
/// The error of the kernel.
pub fn hide_memory() -> io::Result<()> {
    Ok(rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable)?)
}

/// Returns the number of threads of this process. `None`: `/proc` is not readable.
pub fn threads() -> Option<usize> {
    std::fs::read_dir("/proc/self/task").ok().map(Iterator::count)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_are_found_by_name_and_by_number() {
        let root = UserIdentity::find("root", None).unwrap();
        assert!(root.is_root());
        assert_eq!(UserIdentity::find("0", None).unwrap().owner(), (0, 0));
        let stranger = UserIdentity::find("54321", Some("54322")).unwrap();
        assert_eq!((stranger.owner(), stranger.is_current()), ((54321, 54322), false));
        let said = UserIdentity::find("54321", None).unwrap_err();
        assert_eq!(said, "user 54321 is not in the user database; set group as well");
        assert_eq!(
            UserIdentity::find("no-such", None).unwrap_err(),
            "user \"no-such\" does not exist"
        );
        let said = UserIdentity::find("root", Some("no-such")).unwrap_err();
        assert_eq!(said, "group \"no-such\" does not exist");
    }

    #[test]
    fn capabilities_have_the_names_of_the_man_page() {
        let set = CapabilitySet::NET_BIND_SERVICE | CapabilitySet::SYS_RESOURCE;
        assert_eq!(names(set), "net_bind_service, sys_resource");
        assert_eq!(names(CapabilitySet::empty()), "none");
    }
}

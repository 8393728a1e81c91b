//! Who this process is and what it may do beyond that: user, groups,
//! capabilities, `no_new_privs`.
//!
//! Called by `daemon::sandbox` while there is one thread, whose state every later
//! one inherits. It only ever gives rights up, and never decides which.

pub use rustix::thread::CapabilitySet;

use nix::unistd::{Gid, Group, Uid, User};
use rustix::process::DumpableBehavior;
use rustix::thread::{
    CapabilitySets, capabilities, configure_capability_in_ambient_set,
    remove_capability_from_bounding_set, set_capabilities, set_keep_capabilities,
};
use std::ffi::CString;
use std::io;

/// A user of this machine, with the groups it is to have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UserIdentity {
    /// As in the user database, or its number where it has no name.
    pub name: String,
    uid: Uid,
    gid: Gid,
    groups: Vec<Gid>,
}

// === impl UserIdentity ===

impl UserIdentity {
    /// The user of that name or number, with that group or its own. Asks the
    /// user database (getpwnam(3)); a number needs no entry in it if `group` is
    /// given as well.
    ///
    /// # Errors
    /// In words: nobody is called so, or the database cannot be read.
    pub fn find(user: &str, group: Option<&str>) -> Result<UserIdentity, String> {
        let trouble = |error: nix::Error| format!("cannot read the user database: {error}");
        let gid = match group {
            Some(group) => Some(find_group(group)?),
            None => None,
        };
        let entry = match user.parse() {
            Ok(number) => User::from_uid(Uid::from_raw(number)),
            Err(_) => User::from_name(user),
        };
        match (entry.map_err(trouble)?, gid, user.parse()) {
            (Some(entry), gid, _) => {
                let gid = gid.unwrap_or(entry.gid);
                // With a group of the configuration's own, that one alone.
                let groups = match group {
                    Some(_) => vec![gid],
                    None => groups_of(&entry.name, gid).map_err(trouble)?,
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

    /// For chown(2): user and group.
    pub fn owner(&self) -> (u32, u32) {
        (self.uid.as_raw(), self.gid.as_raw())
    }

    /// Whether this is uid 0.
    pub fn is_root(&self) -> bool {
        self.uid.is_root()
    }

    /// Whether this process is that user already, with that group.
    pub fn is_ours(&self) -> bool {
        nix::unistd::getresuid()
            .is_ok_and(|ids| [ids.real, ids.effective, ids.saved] == [self.uid; 3])
            && nix::unistd::getegid() == self.gid
    }

    /// Becomes that user for good, on every thread there is (setresuid(2) as libc
    /// has it), and keeps of the capabilities none but `keep`. The order is
    /// that of the man pages: groups first, while that is still allowed.
    ///
    /// # Errors
    /// What failed, and why; the process may then be half of each and must end.
    pub fn assume(&self, keep: CapabilitySet) -> Result<(), (&'static str, io::Error)> {
        let at = |what| move |error: nix::Error| (what, io::Error::from(error));
        let told = |what| move |error: rustix::io::Errno| (what, io::Error::from(error));
        // Needs CAP_SETPCAP, which is about to go.
        bound(keep);
        set_keep_capabilities(true).map_err(told("keep capabilities"))?;
        nix::unistd::setgroups(&self.groups).map_err(at("set the supplementary groups"))?;
        nix::unistd::setresgid(self.gid, self.gid, self.gid).map_err(at("set the group"))?;
        nix::unistd::setresuid(self.uid, self.uid, self.uid).map_err(at("set the user"))?;
        reduce(keep).map_err(|error| ("reduce the capabilities", error))?;
        set_keep_capabilities(false).map_err(told("drop the capabilities"))?;
        Ok(())
    }
}

fn find_group(group: &str) -> Result<Gid, String> {
    let trouble = |error: nix::Error| format!("cannot read the group database: {error}");
    match group.parse() {
        Ok(number) => Ok(Gid::from_raw(number)),
        Err(_) => match Group::from_name(group).map_err(trouble)? {
            Some(entry) => Ok(entry.gid),
            None => Err(format!("group {group:?} does not exist")),
        },
    }
}

/// The groups the database gives a user.
fn groups_of(name: &str, gid: Gid) -> nix::Result<Vec<Gid>> {
    let name = CString::new(name).map_err(|_| nix::Error::EINVAL)?;
    nix::unistd::getgrouplist(&name, gid)
}

/// Who this process is, as `user:group`, names where there are any.
pub fn whoami() -> String {
    let (uid, gid) = (nix::unistd::geteuid(), nix::unistd::getegid());
    // A process that is confined already may not read the databases.
    let user = User::from_uid(uid).ok().flatten().map_or_else(|| uid.to_string(), |it| it.name);
    let group = Group::from_gid(gid).ok().flatten().map_or_else(|| gid.to_string(), |it| it.name);
    format!("{user}:{group}")
}

/// Whether this process is uid 0.
pub fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}

/// Gives up every capability but `keep`, in all sets of the calling thread. What
/// is kept survives execve(2): a process that is not root needs it among the
/// ambient ones for that (capabilities(7)).
///
/// # Errors
/// The kernel's.
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

/// Takes all but `keep` out of the bounding set, so that no program this process
/// may start gets more. Where that is not allowed there is nothing to bound:
/// without CAP_SETPCAP, `no_new_privs` does the same.
fn bound(keep: CapabilitySet) {
    for one in each().filter(|one| !keep.contains(*one)) {
        let _ = remove_capability_from_bounding_set(one);
    }
}

/// What this thread may do now.
///
/// # Errors
/// The kernel's.
pub fn held() -> io::Result<CapabilitySet> {
    Ok(capabilities(None)?.permitted)
}

/// Names as in capabilities(7) in lower case and without `cap_`, or `none`.
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

/// Every capability that can be in a set; the kernel knows fewer.
fn each() -> impl Iterator<Item = CapabilitySet> {
    (0..u64::BITS).map(|bit| CapabilitySet::from_bits_retain(1 << bit))
}

/// From now on no program this process starts gains any privilege (prctl(2),
/// `PR_SET_NO_NEW_PRIVS`). Needed for landlock and seccomp.
///
/// # Errors
/// The kernel's.
pub fn set_no_new_privs() -> io::Result<()> {
    Ok(rustix::thread::set_no_new_privs(true)?)
}

/// Whether that is in force.
pub fn has_no_new_privs() -> bool {
    rustix::thread::no_new_privs().unwrap_or(false)
}

/// No core dumps and no ptrace(2) by others of the same user: what is in memory
/// stays there. The kernel sees to it where a user is changed, but not where the
/// process was started as that user.
///
/// # Errors
/// The kernel's.
pub fn hide_memory() -> io::Result<()> {
    Ok(rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable)?)
}

/// Threads of this process; `None` where `/proc` does not tell.
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
        assert_eq!((stranger.owner(), stranger.is_ours()), ((54321, 54322), false));
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

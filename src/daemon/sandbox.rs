//! Giving up what a balancer does not need: its user, capabilities, files, system
//! calls.
//!
//! Called once by `cli::run`, as the first thing after the command line is read
//! and what was handed to this process is taken, while there is one thread: every
//! later one inherits its state. It opens nothing but the configuration.
//!
//! # The order, and why
//!
//! Everything is given up *before* anything is opened, not after: what a process
//! opens at its start it must be able to open again at a reload, and the process
//! an upgrade starts must be able to as well, for it inherits all of this. A key
//! file that only root may read is then an error at the start, and not at the
//! first reload at night. Low ports are bound by the one capability that is kept.
//!
//! 1. the directory of the admin socket and that of `state` are made, and given to `user`;
//! 2. capabilities leave the bounding set, then groups, group and user change
//!    ([`UserIdentity::assume`](tidegate_net::privileges::UserIdentity::assume)), then what is kept becomes effective and ambient;
//! 3. `no_new_privs`, which the next two need;
//! 4. landlock, then the seccomp filter.
//!
//! # What an upgrade inherits
//!
//! Under the supervisor nothing: it gives up no rights, starts the next process, and
//! that one builds all of this for itself.
//!
//! Without a supervisor (`run --single`) all of it: landlock and seccomp cannot be
//! loosened, and must not be stacked with each upgrade, for the kernel allows 16 layers.
//! So the old process says in its offer what is in force, and the new one adds nothing
//! to that.

use super::admin_place::Place;
use super::preflight::directory_of;
use super::refused::holders_in_the_way;
use super::{Failure, preflight, state_directory};
use crate::admin_place;
use std::fs::DirBuilder;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use tidegate_config::{self as config, Origin, Problems, Spot, Texts};
use tidegate_core::model;
use tidegate_core::model::{AccessLogTarget, AdminListen, Config, Sandbox};
use tidegate_net::confinement::SandboxReport;
use tidegate_net::holders::Holder;
use tidegate_net::privileges::{self, CapabilitySet, UserIdentity};
use tidegate_net::sandbox::{self, Paths};

/// What this process has given up, and by which settings.
#[derive(Debug)]
pub struct AppliedSandbox {
    /// As status tells it.
    pub(super) report: SandboxReport,
    /// The settings it was confined by; `None` inside another program.
    asked: Option<SandboxSettings>,
    /// Where the admin API listens.
    pub(super) admin: Option<Place>,
    /// Processes that listen where this one is to.
    pub(super) in_the_way: Vec<(u64, Holder)>,
}

/// The keys of `[process]` that are obeyed here.
#[derive(Debug, Clone, PartialEq, Eq)]
struct SandboxSettings {
    user: Option<String>,
    group: Option<String>,
    sandbox: Sandbox,
    state: Option<PathBuf>,
}

/// Directories every program may need: to load libraries, to ask the user
/// database, to start the next program.
const SYSTEM_RUN: [&str; 9] =
    ["/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/opt", "/nix/store", "/gnu/store"];

/// Settings of the system and what the kernel says.
const SYSTEM_READ: [&str; 5] = ["/etc", "/proc", "/sys", "/dev/null", "/dev/urandom"];

/// With `sandbox = "auto"`: a later configuration may name a key or a list that lies
/// anywhere, and no running process can be let in there afterwards. Who may read
/// what is left to the owners and modes of files.
const ANYWHERE: &str = "/";

/// With `sandbox = "auto"`: where a later configuration is most likely to write.
const LOGS: &str = "/var/log";

/// What the one user beside root needs: to bind low ports, now and at a reload.
const FOR_A_USER: CapabilitySet = CapabilitySet::NET_BIND_SERVICE;

/// What a root that stays root keeps beside that: files of whatever owner, pipes
/// and locked memory beyond what one user gets. All else is given up: no other
/// identity, no devices, no modules, no other process's memory.
const FOR_ROOT: CapabilitySet =
    CapabilitySet::DAC_OVERRIDE.union(CapabilitySet::SYS_RESOURCE).union(CapabilitySet::IPC_LOCK);

/// For a receive buffer that a flood of heartbeats fits in (socket(7),
/// SO_RCVBUFFORCE).
const FOR_HEARTBEATS: CapabilitySet = CapabilitySet::NET_ADMIN;

impl Default for AppliedSandbox {
    /// Inside another program, which is to confine itself.
    fn default() -> AppliedSandbox {
        AppliedSandbox {
            report: SandboxReport::none("not applied: the balancer is embedded in another program"),
            asked: None,
            admin: None,
            in_the_way: Vec::new(),
        }
    }
}

/// What the process before says of confinement.
#[derive(Debug, Clone, Copy, Default)]
pub struct Before<'a> {
    /// The layers that stand already.
    pub inherited: &'a [String],
    /// Where its admin API listens.
    pub admin: Option<&'a str>,
    /// There is one, and this one takes its addresses over.
    pub upgrade: bool,
    /// What this process starts with in the place of its files.
    pub instead: Option<&'a Texts>,
}

/// Confines this process by the settings in the file at `path`.
///
/// `before` is what this process has from the one before it.
///
/// # Errors
/// The configuration is bad; the user cannot be assumed; or `sandbox = "on"` and
/// something of it cannot be had. The process is to end then.
pub fn confine(
    path: &Path,
    pid_file: Option<&Path>,
    before: Before<'_>,
) -> Result<AppliedSandbox, Failure> {
    let Before { inherited, admin: place_before, upgrade, instead } = before;
    let (mut config, origin) = outline(path, instead)?;
    let process = &config.process;
    let asked = SandboxSettings {
        user: process.user.clone(),
        group: process.group.clone(),
        sandbox: process.sandbox,
        state: process.state.clone(),
    };
    if privileges::threads().is_some_and(|count| count > 1) {
        return Err(Failure::Runtime(
            "cannot drop privileges: other threads are already running".to_owned(),
        ));
    }
    let mut report = SandboxReport::none("sandbox = \"off\"");
    // An upgrade takes the addresses from the process before.
    let in_the_way = if !upgrade { holders_in_the_way(&config) } else { Vec::new() };
    let identity = preflight::identity(&config, &origin)
        .map_err(|problem| Failure::Config(Problems::from(*problem)))?;
    let admin = admin_place(&config, identity.as_ref(), place_before)?;
    prepare_state(&config, &origin, identity.as_ref())?;
    config.admin.listen = admin.listen.clone();
    let process = &config.process;
    if let Some(identity) = &identity {
        become_user(identity, for_a_user(&config))?;
    }
    if process.sandbox != Sandbox::Off {
        // Without success nothing is held that was not held before: told below.
        let _ = privileges::reduce(kept(&config));
    }
    report_privileges(&mut report, kept(&config));
    if process.sandbox != Sandbox::Off || !inherited.is_empty() {
        apply_sandbox(&mut report, &paths(path, pid_file, &config), inherited);
    }
    if process.sandbox == Sandbox::On {
        require_all(&report)?;
    }
    Ok(AppliedSandbox { report, asked: Some(asked), admin: Some(admin), in_the_way })
}

/// Only what is needed to become the user that is to read the rest.
fn outline(path: &Path, instead: Option<&Texts>) -> Result<(Config, Origin), Failure> {
    let outline = instead.map_or_else(|| config::outline(path), config::outline_kept);
    outline.map_err(|_| {
        let problems = config::load(path).err();
        let changed = || Failure::Runtime(changed_during_start());
        problems.map_or_else(changed, Failure::Config)
    })
}

/// Makes the state directory if it is missing.
fn prepare_state(
    config: &Config,
    origin: &Origin,
    identity: Option<&UserIdentity>,
) -> Result<(), Failure> {
    let Some(directory) = &config.process.state else { return Ok(()) };
    state_directory::prepare(directory, identity).map_err(|error| {
        let why = state_directory::refusal(directory, &error);
        Failure::Config(Problems::from(origin.error(&Spot::State, why, None)))
    })
}

fn changed_during_start() -> String {
    "the configuration changed during startup; start again".to_owned()
}

fn become_user(identity: &UserIdentity, keep: CapabilitySet) -> Result<(), Failure> {
    let refused = |what: &str, error: &dyn std::fmt::Display| {
        let (user, us) = (&identity.name, privileges::whoami());
        Failure::Runtime(format!(
            "[process] user: {us} cannot switch to {user}: cannot {what}: {error}"
        ))
    };
    if !identity.is_ours() {
        identity.assume(keep).map_err(|(what, error)| refused(what, &error))?;
    }
    privileges::hide_memory().map_err(|error| refused("protect its memory", &error))
}

/// Where the admin API listens. A process that becomes another user has its
/// directory made here, because it could not make it afterwards.
fn admin_place(
    config: &Config,
    identity: Option<&UserIdentity>,
    before: Option<&str>,
) -> Result<Place, Failure> {
    if identity.is_none() && config.admin.is_default() {
        return admin_place::settle(&config.admin, before);
    }
    prepare_directory(config, identity)?;
    Ok(Place { listen: config.admin.listen.clone(), reason: None })
}

/// Makes the directory of the admin socket if it is missing, for the user that binds
/// the socket in it.
fn prepare_directory(config: &Config, identity: Option<&UserIdentity>) -> Result<(), Failure> {
    let AdminListen::Unix(socket) = &config.admin.listen else { return Ok(()) };
    let directory = directory_of(socket);
    if directory.exists() {
        return Ok(());
    }
    let mut builder = DirBuilder::new();
    make_directory(&directory, builder.recursive(true).mode(0o755), identity).map_err(|error| {
        let directory = directory.display();
        Failure::Runtime(format!(
            "cannot create {directory} for the admin socket: {error}; create it or set [admin] listen"
        ))
    })
}

/// Makes a directory for the user that this process becomes.
pub(super) fn make_directory(
    directory: &Path,
    builder: &DirBuilder,
    identity: Option<&UserIdentity>,
) -> std::io::Result<()> {
    builder.create(directory)?;
    let Some(identity) = identity.filter(|identity| !identity.is_ours()) else { return Ok(()) };
    let (user, group) = identity.owner();
    std::os::unix::fs::chown(directory, Some(user), Some(group))
}

/// What this process may keep, being who it is by now.
fn kept(config: &Config) -> CapabilitySet {
    let more = if privileges::is_root() { FOR_ROOT } else { CapabilitySet::empty() };
    for_a_user(config) | more
}

fn for_a_user(config: &Config) -> CapabilitySet {
    match config.heartbeat {
        Some(_) => FOR_A_USER | FOR_HEARTBEATS,
        None => FOR_A_USER,
    }
}

fn report_privileges(report: &mut SandboxReport, most: CapabilitySet) {
    let who = privileges::whoami();
    let root = privileges::is_root();
    report.set(
        "user",
        if root { Err(format!("running as {who}; set [process] user")) } else { Ok(who) },
    );
    let state = match privileges::held() {
        Ok(held) if most.contains(held) => Ok(privileges::names(held)),
        Ok(held) if held.bits().count_ones() > MANY => {
            Err("more capabilities than needed".to_owned())
        }
        Ok(held) => Err(format!("more capabilities than needed: {}", privileges::names(held))),
        Err(error) => Err(error.to_string()),
    };
    report.set("capabilities", state);
    if privileges::has_no_new_privs() {
        report.set("no_new_privs", Ok("set by the parent process".to_owned()));
    }
}

/// Where files are to be written elsewhere than those at the start were.
const HINT: &str = "(the sandbox allows writing only to /var/log and the directories named in the \
                    configuration at start; restart to add others)";

/// With `sandbox = "on"`.
const HINT_STRICT: &str = "(the sandbox allows access only to the directories named in the \
                           configuration at start and to the directory of the program; \
                           restart to add others)";

/// More names than that tell nobody anything.
const MANY: u32 = 8;

/// `no_new_privs`, landlock and seccomp; what was `inherited` stands already.
fn apply_sandbox(report: &mut SandboxReport, paths: &Paths, inherited: &[String]) {
    let before = "inherited from the old process";
    let have = |layer: &str| inherited.iter().any(|one| one == layer);
    if let Err(error) = privileges::set_no_new_privs() {
        let why = format!("rejected by the kernel: {error}");
        for layer in ["no_new_privs", "landlock", "seccomp"] {
            report.set(layer, Err(why.clone()));
        }
        return;
    }
    report.set("no_new_privs", Ok("set".to_owned()));
    let landlock = match have("landlock") {
        true => Ok(before.to_owned()),
        false => sandbox::close_files(paths),
    };
    report.set("landlock", landlock);
    let seccomp = match have("seccomp") && sandbox::calls_are_closed() {
        true => Ok(before.to_owned()),
        false => sandbox::close_calls(),
    };
    report.set("seccomp", seccomp);
}

/// `sandbox = "on"`: all of it, or nothing.
fn require_all(report: &SandboxReport) -> Result<(), Failure> {
    let missing: Vec<String> = report
        .layers()
        .iter()
        .filter(|one| one.layer != "user" && !one.in_force)
        .map(|one| format!("{} ({})", one.layer, one.detail))
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    let why =
        format!("sandbox = \"on\", but these layers are not available: {}", missing.join(", "));
    Err(Failure::Runtime(why))
}

/// What stays open: what this configuration names, and what every program needs.
/// Always whole directories: files are replaced by renaming.
fn paths(config_path: &Path, pid_file: Option<&Path>, config: &Config) -> Paths {
    let mut paths = Paths {
        run: SYSTEM_RUN.map(PathBuf::from).to_vec(),
        read: SYSTEM_READ.map(PathBuf::from).to_vec(),
        write: Vec::new(),
    };
    if config.process.sandbox == Sandbox::Auto {
        paths.read.push(PathBuf::from(ANYWHERE));
        paths.write.push(PathBuf::from(LOGS));
    }
    // Where the next program is looked for; releases lie beside each other.
    for program in [std::env::current_exe().ok(), std::env::args_os().next().map(PathBuf::from)] {
        let Some(program) = program.filter(|program| program.components().count() > 1) else {
            continue;
        };
        let directory = directory_of(&program);
        let beside = directory.parent().map(Path::to_owned);
        paths.run.extend(beside.filter(|beside| beside.parent().is_some()));
        paths.run.push(directory);
    }
    let named = config.heartbeat.iter().flat_map(|it| &it.keys).map(|key| &key.file);
    let lists = config.frontends.iter().filter_map(|frontend| frontend.sources.as_deref());
    let lists = lists.flat_map(|rules| rules.allow_file.iter().chain(&rules.deny_file));
    let read = named.chain(lists).chain(&config.admin.token_file).map(PathBuf::as_path);
    for file in read.chain([config_path]) {
        paths.read.extend(directories_of(file));
    }
    let admin = match &config.admin.listen {
        AdminListen::Unix(socket) => Some(socket.as_path()),
        AdminListen::Tcp(_) => None,
    };
    let access = match &config.log.access {
        AccessLogTarget::File(path) => Some(path.as_path()),
        AccessLogTarget::Off | AccessLogTarget::Stdout => None,
    };
    for file in [admin, access, pid_file].into_iter().flatten() {
        paths.write.extend(directories_of(file));
    }
    paths.write.extend(config.process.state.clone());
    paths
}

/// Where a file lies, by its name and, where it is a link, by what that names.
fn directories_of(file: &Path) -> Vec<PathBuf> {
    let real = std::fs::canonicalize(file).ok();
    [Some(file.to_owned()), real].into_iter().flatten().map(|path| directory_of(&path)).collect()
}

// === impl AppliedSandbox ===

impl AppliedSandbox {
    /// Refuses a configuration with other settings than those obeyed: it was
    /// written while the process started.
    pub(super) fn check(&self, config: &Config) -> Result<(), Failure> {
        let model::ProcessConfig { user, group, sandbox, state, .. } = config.process.clone();
        let now = SandboxSettings { user, group, sandbox, state };
        match &self.asked {
            Some(asked) if *asked != now => Err(Failure::Runtime(changed_during_start())),
            _ => Ok(()),
        }
    }

    /// `why`, with a word on what may be behind it where it is a refusal of the
    /// kernel's that this process has brought upon itself.
    pub(super) fn explain(&self, why: String) -> String {
        let hint = match &self.asked {
            Some(SandboxSettings { sandbox: Sandbox::On, .. }) => HINT_STRICT,
            _ => HINT,
        };
        let refused = why.contains("ermission denied");
        if !refused || !self.report.holds("landlock") || why.contains(hint) {
            return why;
        }
        format!("{why} {hint}")
    }

    /// What every process this one starts is within.
    pub(super) fn inherited(&self) -> Vec<String> {
        let walls = ["landlock", "seccomp"].into_iter();
        walls.filter(|layer| self.report.holds(layer)).map(str::to_owned).collect()
    }

    /// Says in one line what is in force; a warning where that is less than was
    /// asked for.
    pub(super) fn log_summary(&self) {
        let layers = self.report.line();
        let short = self.report.layers().iter().any(|one| !one.in_force && one.layer != "user");
        match &self.asked {
            None => {}
            Some(SandboxSettings { sandbox: Sandbox::Off, .. }) => {
                tracing::info!(layers, "sandbox is off");
            }
            Some(_) if short => tracing::warn!(layers, "sandbox only partially applied"),
            Some(_) => tracing::info!(layers, "sandbox applied"),
        }
    }
}

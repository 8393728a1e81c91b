//! Drops the rights that a balancer does not need: user, capabilities, access to files,
//! system calls.
//!
//! Called once by `cli::run`, after the command line is parsed and passed sockets are
//! taken. The process must have a single thread then, because later threads inherit the
//! rights of the first. It opens only the configuration.
//!
//! # Order
//!
//! Rights are dropped *before* any other file or socket is opened. A reload opens the
//! same files again, and so does the new process of an upgrade, which inherits the
//! sandbox. A key file that only root can read is therefore an error at the start, not at
//! the first reload. The capability to bind low ports is kept.
//!
//! 1. Create the directories of the admin socket and of `state`, owned by `user`.
//! 2. Remove capabilities from the bounding set, change groups, group and user
//!    ([`UserIdentity::assume`](tidegate_net::privileges::UserIdentity::assume)), and
//!    make the remaining capabilities effective and ambient.
//! 3. Start the probe helper, which stays outside of the sandbox.
//! 4. Set `no_new_privs`, which steps 5 and 6 need.
//! 5. Apply landlock.
//! 6. Apply the seccomp filter.
//!
//! # Upgrades
//!
//! - With a supervisor, the new process inherits nothing: the supervisor drops no rights
//!   and starts the new process, which builds its own sandbox.
//! - Without a supervisor (`run --single`), the new process inherits everything. Landlock
//!   and seccomp cannot be relaxed, and the kernel allows only 16 landlock layers. The
//!   old process lists its layers in the handover, and the new process does not apply
//!   them again.

use super::admin_place::Place;
use super::preflight::directory_of;
use super::refused::holders_in_the_way;
use super::{Failure, preflight, state_directory};
use crate::admin_place;
use crate::probe_helper::HelperSocket;
use std::fs::DirBuilder;
use std::os::fd::OwnedFd;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tidegate_config::{self as config, Origin, Problems, Spot, Texts};
use tidegate_core::model;
use tidegate_core::model::{
    AccessLogTarget, AdminListen, Config, RegistryConfig, RegistryKind, Sandbox, SourceQuestion,
};
use tidegate_discovery::kubernetes::files_of_kubeconfig;
use tidegate_net::confinement::SandboxReport;
use tidegate_net::holders::Holder;
use tidegate_net::privileges::{self, CapabilitySet, UserIdentity};
use tidegate_net::sandbox::{self, Paths};

/// The sandbox of this process and the settings it was built from.
#[derive(Debug)]
pub struct AppliedSandbox {
    /// The layers, for status.
    pub(super) report: SandboxReport,
    /// The settings it was built from; `None` inside another program.
    settings: Option<SandboxSettings>,
    /// Where the admin API listens.
    pub(super) admin: Option<Place>,
    /// The process that runs commands outside of the sandbox.
    helper: Option<HelperSocket>,
    /// Processes that listen on ports of the configuration.
    pub(super) in_the_way: Vec<(u64, Holder)>,
}

/// The keys of `[process]` that this module uses.
#[derive(Debug, Clone, PartialEq, Eq)]
struct SandboxSettings {
    user: Option<String>,
    group: Option<String>,
    sandbox: Sandbox,
    state: Option<PathBuf>,
    probe_helper: bool,
}

/// Directories with programs and libraries, and for starting the new process of an
/// upgrade.
const SYSTEM_RUN: [&str; 9] =
    ["/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/opt", "/nix/store", "/gnu/store"];

/// System configuration and kernel files.
const SYSTEM_READ: [&str; 5] = ["/etc", "/proc", "/sys", "/dev/null", "/dev/urandom"];

/// Readable with `sandbox = "auto"`. A later configuration can name a key or a list in
/// any directory, and landlock cannot be relaxed for it. Owners and modes of files
/// still apply.
const ANYWHERE: &str = "/";

/// Servers and search domains of the host. Often a link out of `/etc`.
const RESOLV_CONF: &str = "/etc/resolv.conf";

/// Token of the service account of a pod. It is a link to a directory that changes.
const ACCOUNT_TOKEN: &str = "/var/run/secrets/kubernetes.io/serviceaccount/token";

/// Writable with `sandbox = "auto"`: a later configuration most likely writes here.
const LOGS: &str = "/var/log";

/// Capabilities of a process with `[process] user`: bind low ports, also at a reload.
const FOR_A_USER: CapabilitySet = CapabilitySet::NET_BIND_SERVICE;

/// Additional capabilities of a process that runs as root: access to files of any owner,
/// and pipes and locked memory above the limits of a user. All other capabilities are
/// dropped, such as those to change the user, use devices, load modules or read the
/// memory of other processes.
const FOR_ROOT: CapabilitySet =
    CapabilitySet::DAC_OVERRIDE.union(CapabilitySet::SYS_RESOURCE).union(CapabilitySet::IPC_LOCK);

/// Capability for a large receive buffer for heartbeats (socket(7), SO_RCVBUFFORCE) and for
/// marks of binds (SO_MARK).
const FOR_SOCKET_OPTIONS: CapabilitySet = CapabilitySet::NET_ADMIN;

impl Default for AppliedSandbox {
    /// Returns the state inside another program, which is responsible for its own sandbox.
    fn default() -> AppliedSandbox {
        AppliedSandbox {
            report: SandboxReport::none("not applied: the balancer is embedded in another program"),
            settings: None,
            admin: None,
            helper: None,
            in_the_way: Vec::new(),
        }
    }
}

/// What this process inherits from the old process.
#[derive(Debug, Default)]
pub struct Before<'a> {
    /// Sandbox layers that are already applied.
    pub inherited: &'a [String],
    /// Where the admin API of the old process listens.
    pub admin: Option<&'a str>,
    /// The socket of the probe helper that the old process uses.
    pub helper: Option<OwnedFd>,
    /// This process takes over the addresses of another process.
    pub upgrade: bool,
    /// Texts to use instead of the files.
    pub instead: Option<&'a Texts>,
}

/// Applies the sandbox settings of the file at `path` to this process.
///
/// # Errors
/// The configuration is invalid; the process cannot switch to the user; or
/// `sandbox = "on"` and a layer is not available. The caller must exit.
pub fn confine(
    path: &Path,
    pid_file: Option<&Path>,
    before: Before<'_>,
) -> Result<AppliedSandbox, Failure> {
    let Before { inherited, admin: place_before, helper, upgrade, instead } = before;
    let (mut config, origin) = outline(path, instead)?;
    let process = &config.process;
    let settings = SandboxSettings {
        user: process.user.clone(),
        group: process.group.clone(),
        sandbox: process.sandbox,
        state: process.state.clone(),
        probe_helper: process.probe_helper,
    };
    if privileges::threads().is_some_and(|count| count > 1) {
        return Err(Failure::Runtime(
            "cannot drop privileges: other threads are already running".to_owned(),
        ));
    }
    let mut report = SandboxReport::none("sandbox = \"off\"");
    // In an upgrade, the old process holds the addresses.
    let in_the_way = if !upgrade { holders_in_the_way(&config) } else { Vec::new() };
    let identity = preflight::identity(&config, &origin)
        .map_err(|problem| Failure::Config(Problems::from(*problem)))?;
    if let Some(problem) = preflight::cannot_switch(&origin, identity.as_ref()) {
        return Err(Failure::At(Box::new(problem)));
    }
    let admin = admin_place(&config, identity.as_ref(), place_before)?;
    prepare_state(&config, &origin, identity.as_ref())?;
    config.admin.listen = admin.listen.clone();
    let process = &config.process;
    if let Some(identity) = &identity {
        become_user(identity, for_a_user(&config))?;
    }
    if process.sandbox != Sandbox::Off {
        // A failure changes nothing. `report_privileges` reports the capabilities.
        let _ = privileges::reduce(kept(&config));
    }
    report_privileges(&mut report, kept(&config));
    let helper = probe_helper(path, &config, helper, inherited)?;
    if process.sandbox != Sandbox::Off || !inherited.is_empty() {
        apply_sandbox(&mut report, &paths(path, pid_file, &config), inherited);
    }
    if process.sandbox == Sandbox::On {
        require_all(&report)?;
    }
    Ok(AppliedSandbox { report, settings: Some(settings), admin: Some(admin), helper, in_the_way })
}

/// Starts the probe helper, if the configuration has one. A process that is in a sandbox already
/// uses the helper of the old process, because a new one would be in the sandbox too.
fn probe_helper(
    path: &Path,
    config: &Config,
    before: Option<OwnedFd>,
    inherited: &[String],
) -> Result<Option<HelperSocket>, Failure> {
    match before {
        _ if !config.process.probe_helper => Ok(None),
        Some(socket) if !inherited.is_empty() => Ok(Some(HelperSocket::inherited(socket))),
        None if !inherited.is_empty() => Err(Failure::Runtime(
            "[process] probe_helper: an upgrade without a supervisor cannot start the probe \
             helper outside of the sandbox; restart instead"
                .to_owned(),
        )),
        _ => HelperSocket::start(path).map(Some).map_err(|error| {
            Failure::Runtime(format!("[process] probe_helper: cannot start the helper: {error}"))
        }),
    }
}

/// Reads the configuration without the files that it names: the user to switch to reads
/// those later.
fn outline(path: &Path, instead: Option<&Texts>) -> Result<(Config, Origin), Failure> {
    let outline = instead.map_or_else(|| config::outline(path), config::outline_kept);
    outline.map_err(|_| {
        let problems = config::load(path).err();
        let changed = || Failure::Runtime(changed_during_start());
        problems.map_or_else(changed, Failure::Config)
    })
}

/// Creates the state directory if it is missing.
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
        let (user, current) = (&identity.name, privileges::whoami());
        Failure::Runtime(format!(
            "[process] user: {current} cannot switch to {user}: cannot {what}: {error}"
        ))
    };
    if !identity.is_current() {
        identity.assume(keep).map_err(|(what, error)| refused(what, &error))?;
    }
    privileges::hide_memory().map_err(|error| refused("protect its memory", &error))
}

/// Returns where the admin API listens. Creates its directory before the switch to
/// another user, because that user has no right to create it.
fn admin_place(
    config: &Config,
    identity: Option<&UserIdentity>,
    before: Option<&str>,
) -> Result<Place, Failure> {
    if identity.is_none_or(UserIdentity::is_current) && config.admin.is_default() {
        return admin_place::settle(&config.admin, before);
    }
    prepare_directory(config, identity)?;
    Ok(Place { listen: config.admin.listen.clone(), reason: None })
}

/// Creates the directory of the admin socket if it is missing, owned by the user that
/// binds the socket.
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

/// Creates a directory, owned by the user that this process switches to.
pub(super) fn make_directory(
    directory: &Path,
    builder: &DirBuilder,
    identity: Option<&UserIdentity>,
) -> std::io::Result<()> {
    builder.create(directory)?;
    let Some(identity) = identity.filter(|identity| !identity.is_current()) else { return Ok(()) };
    let (user, group) = identity.owner();
    std::os::unix::fs::chown(directory, Some(user), Some(group))
}

/// Returns the capabilities to keep for the current user.
fn kept(config: &Config) -> CapabilitySet {
    let more = if privileges::is_root() { FOR_ROOT } else { CapabilitySet::empty() };
    for_a_user(config) | more
}

fn for_a_user(config: &Config) -> CapabilitySet {
    let mut binds = config.frontends.iter().flat_map(|frontend| &frontend.binds);
    match config.heartbeat.is_some() || binds.any(|bind| bind.options.mark != 0) {
        true => FOR_A_USER | FOR_SOCKET_OPTIONS,
        false => FOR_A_USER,
    }
}

fn report_privileges(report: &mut SandboxReport, most: CapabilitySet) {
    let user = privileges::whoami();
    let root = privileges::is_root();
    report.set(
        "user",
        if root { Err(format!("running as {user}; set [process] user")) } else { Ok(user) },
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

/// Hint for a path that the sandbox rejects.
const HINT: &str = "(the sandbox allows writing only to /var/log and the directories named in the \
                    configuration at start; restart to add others)";

/// The same hint for `sandbox = "on"`.
const HINT_STRICT: &str = "(the sandbox allows access only to the directories named in the \
                           configuration at start and to the directory of the program; \
                           restart to add others)";

/// Largest number of excess capabilities that are listed by name.
const MANY: u32 = 8;

/// Sets `no_new_privs` and applies landlock and seccomp, except for `inherited` layers.
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
        false => sandbox::restrict_files(paths),
    };
    report.set("landlock", landlock);
    let seccomp = match have("seccomp") && sandbox::calls_are_restricted() {
        true => Ok(before.to_owned()),
        false => sandbox::restrict_calls(),
    };
    report.set("seccomp", seccomp);
}

/// Checks that all layers are in force, for `sandbox = "on"`.
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

/// Returns the paths that stay accessible: those that this configuration names, and those
/// that every program needs. Always whole directories, because files are replaced by
/// renaming.
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
    // An upgrade starts the new binary from here. Each release is often in its own
    // directory, so the parent directory is included.
    for program in [std::env::current_exe().ok(), std::env::args_os().next().map(PathBuf::from)] {
        let Some(program) = program.filter(|program| program.components().count() > 1) else {
            continue;
        };
        let directory = directory_of(&program);
        let parent = directory.parent().map(Path::to_owned);
        paths.run.extend(parent.filter(|parent| parent.parent().is_some()));
        paths.run.push(directory);
    }
    let named = config.named_files();
    let within = config.registries.iter().filter_map(|registry| registry.kubeconfig.as_deref());
    let within: Vec<PathBuf> = within.flat_map(files_of_kubeconfig).collect();
    let named = named.iter().chain(&config.includes.patterns).chain(&within);
    let read = named.map(PathBuf::as_path).chain(files_of_sources(config));
    for file in read.chain([config_path]) {
        paths.read.extend(directories_of(file));
    }
    let admin = match &config.admin.listen {
        AdminListen::Unix(socket) => Some(socket.as_path()),
        AdminListen::Tcp(_) => None,
    };
    let access = match &config.log.access {
        AccessLogTarget::File(path) => Some(path.as_path()),
        AccessLogTarget::Off | AccessLogTarget::Stdout | AccessLogTarget::Syslog(_) => None,
    };
    let binds = config.frontends.iter().flat_map(|frontend| &frontend.binds);
    let sockets = binds.filter_map(|bind| bind.key.socket_file());
    for file in [admin, access, pid_file].into_iter().flatten().chain(sockets) {
        paths.write.extend(directories_of(file));
    }
    paths.write.extend(config.process.state.clone());
    paths
}

/// Returns the files that member sources read themselves: their lists, the settings of name
/// resolution, and the token of a Kubernetes service account.
fn files_of_sources(config: &Config) -> impl Iterator<Item = &Path> {
    let specs = config.pools.iter().filter_map(|pool| pool.discover.as_ref());
    let lists = specs.filter_map(|spec| match &spec.question {
        SourceQuestion::File { path } => Some(path.as_path()),
        _ => None,
    });
    let in_pod = |registry: &Arc<RegistryConfig>| {
        registry.kind == RegistryKind::Kubernetes && registry.servers.is_empty()
    };
    let in_pod = config.registries.iter().any(in_pod).then_some(Path::new(ACCOUNT_TOKEN));
    lists.chain([Path::new(RESOLV_CONF)]).chain(in_pod)
}

/// Returns the directory of a file and, if a part of its path is a link, the directory of its
/// target. A rotation often makes a new directory next to that one and replaces the link, so the
/// parent of the target's directory is included, unless it is `/` or a directory of `/`.
fn directories_of(file: &Path) -> Vec<PathBuf> {
    let mut directories = vec![directory_of(file)];
    let real = std::fs::canonicalize(file).ok().map(|real| directory_of(&real));
    if let Some(real) = real.filter(|real| *real != directories[0]) {
        let parent = real.parent().filter(|parent| parent.components().count() > 2);
        directories.extend(parent.map(Path::to_owned));
        directories.push(real);
    }
    directories
}

// === impl AppliedSandbox ===

impl AppliedSandbox {
    /// Rejects a configuration with other sandbox settings: the file was changed during
    /// the start.
    pub(super) fn check(&self, config: &Config) -> Result<(), Failure> {
        let model::ProcessConfig { user, group, sandbox, state, probe_helper, .. } =
            config.process.clone();
        let now = SandboxSettings { user, group, sandbox, state, probe_helper };
        match &self.settings {
            Some(settings) if *settings != now => Err(Failure::Runtime(changed_during_start())),
            _ => Ok(()),
        }
    }

    /// Takes the process that runs commands.
    pub(super) fn take_helper(&mut self) -> Option<HelperSocket> {
        self.helper.take()
    }

    /// Adds a hint to `why` if the error may be caused by the sandbox.
    pub(super) fn explain(&self, why: String) -> String {
        let hint = match &self.settings {
            Some(SandboxSettings { sandbox: Sandbox::On, .. }) => HINT_STRICT,
            _ => HINT,
        };
        // Landlock restricts files, so it never prevents listening on an IP address.
        let network = why.contains("cannot listen on") && !why.contains("cannot listen on unix:");
        let denied = why.contains("ermission denied") && !network;
        if !denied || !self.report.holds("landlock") || why.contains(hint) {
            return why;
        }
        format!("{why} {hint}")
    }

    /// Returns the layers that every child process inherits.
    pub(super) fn inherited(&self) -> Vec<String> {
        let layers = ["landlock", "seccomp"].into_iter();
        layers.filter(|layer| self.report.holds(layer)).map(str::to_owned).collect()
    }

    /// Logs the layers in force. Logs a warning if a configured layer is missing.
    pub(super) fn log_summary(&self) {
        let layers = self.report.line();
        let partial = self.report.layers().iter().any(|one| !one.in_force && one.layer != "user");
        match &self.settings {
            None => {}
            Some(SandboxSettings { sandbox: Sandbox::Off, .. }) => {
                tracing::info!(layers, "sandbox is off");
            }
            Some(_) if partial => tracing::warn!(layers, "sandbox only partially applied"),
            Some(_) => tracing::info!(layers, "sandbox applied"),
        }
    }
}

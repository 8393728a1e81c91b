//! What a start would look at besides the text of the file: the token, the user,
//! the access log, addresses of this host.
//!
//! Called by `cli::check`, and part by part by the start itself, so that both say
//! the same. It changes nothing: what it binds it closes at once, and it creates
//! no file.

use super::refused::BindError;
use super::state_directory;
use crate::admin::Token;
use rustix::fs::{Access, access};
use std::collections::BTreeSet;
use std::fs;
use std::io::ErrorKind;
use std::net::UdpSocket;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use tidegate_config::{Loaded, Origin, Problem, Spot};
use tidegate_core::model::{AccessLogTarget, AdminListen, Bind, Config, SourceAddr};
use tidegate_net::privileges::UserIdentity;
use tidegate_net::{listen, stream};

/// Everything that a start on this host would refuse, or that an operator should
/// know of; ordered as the start goes.
pub fn preflight(loaded: &Loaded) -> Vec<Problem> {
    let (config, origin) = (&loaded.config, &loaded.origin);
    let mut found = Vec::new();
    let identity = match identity(config, origin) {
        Ok(identity) => identity,
        Err(problem) => {
            found.push(*problem);
            None
        }
    };
    // Then files are opened by another user than this one.
    let other = identity.as_ref().filter(|identity| !identity.is_ours());
    found.extend(access_log(config, origin, other.is_some()));
    found.extend(state(config, origin, other.is_some()));
    found.extend(token(config, origin).err().map(|problem| *problem));
    found.extend(other.and_then(|other| unreadable_token(config, origin, other)));
    found.extend(admin_socket(config, origin));
    binds(config, origin, &mut found);
    if let Err((source, why)) = try_sources(config) {
        found.push(origin.error(&Spot::Source(source), why, None));
    }
    found.extend(heartbeats(config, origin));
    found
}

/// The user to become; `None` where the process stays who it is.
pub(super) fn identity(
    config: &Config,
    origin: &Origin,
) -> Result<Option<UserIdentity>, Box<Problem>> {
    let process = &config.process;
    let Some(user) = &process.user else { return Ok(None) };
    let refused = |why: String| {
        let group = process.group.as_ref().filter(|_| why.contains("group"));
        let (spot, key) = group.map_or((Spot::User, "user"), |_| (Spot::Group, "group"));
        Box::new(origin.error(&spot, format!("[process] {key}: {why}"), None))
    };
    let identity = UserIdentity::find(user, process.group.as_deref()).map_err(&refused)?;
    if identity.is_root() {
        return Err(refused(format!("{user:?} is root, which the process must not become")));
    }
    Ok(Some(identity))
}

/// The admin token can be read and is fit, as far as this user can see.
fn token(config: &Config, origin: &Origin) -> Result<(), Box<Problem>> {
    load_token(config).map(drop).map_err(|why| token_problem(origin, why))
}

/// A secret that belongs to another user is closed to the one that reads it.
fn unreadable_token(config: &Config, origin: &Origin, identity: &UserIdentity) -> Option<Problem> {
    let path = config.admin.token_file.as_ref()?;
    let owner = fs::metadata(path).ok()?.uid();
    let message = format!(
        "the token file {} belongs to user {owner}; [process] user {} cannot read it",
        path.display(),
        identity.name
    );
    let help = format!("chown {} {}", identity.name, path.display());
    (owner != identity.owner().0).then(|| origin.error(&Spot::TokenFile, message, Some(help)))
}

fn access_log(config: &Config, origin: &Origin, by_another: bool) -> Option<Problem> {
    let AccessLogTarget::File(path) = &config.log.access else { return None };
    let why = unwritable(path, by_another)?;
    Some(origin.error(&Spot::AccessLog, access_log_refusal(&why), None))
}

/// The state directory can be made, or written.
fn state(config: &Config, origin: &Origin, by_another: bool) -> Option<Problem> {
    let directory = config.process.state.as_deref()?;
    let why = match fs::metadata(directory) {
        Err(error) if error.kind() == ErrorKind::NotFound => {
            unwritable_directory(&directory_of(directory), by_another)
        }
        _ => unwritable_directory(directory, by_another),
    }?;
    Some(origin.error(&Spot::State, state_directory::refusal(directory, &why), None))
}

/// Why the file cannot be opened for appending, as open(2) would say it.
fn unwritable(path: &Path, by_another: bool) -> Option<std::io::Error> {
    match fs::metadata(path) {
        Ok(data) if data.is_dir() => Some(std::io::Error::from_raw_os_error(libc::EISDIR)),
        Ok(_) => denied(path, Access::WRITE_OK, by_another),
        Err(error) if error.kind() == ErrorKind::NotFound => {
            unwritable_directory(&directory_of(path), by_another)
        }
        Err(error) => Some(error).filter(|_| !by_another),
    }
}

/// Why no file can be made in the directory.
fn unwritable_directory(directory: &Path, by_another: bool) -> Option<std::io::Error> {
    match fs::metadata(directory) {
        Err(error) => Some(error),
        Ok(data) if !data.is_dir() => Some(std::io::Error::from_raw_os_error(libc::ENOTDIR)),
        Ok(_) => denied(directory, Access::WRITE_OK | Access::EXEC_OK, by_another),
    }
}

fn denied(path: &Path, how: Access, by_another: bool) -> Option<std::io::Error> {
    access(path, how).err().filter(|_| !by_another).map(Into::into)
}

/// Where a file lies.
pub(super) fn directory_of(file: &Path) -> PathBuf {
    match file.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
        _ => PathBuf::from("."),
    }
}

/// Something else stands where the admin socket is to be.
fn admin_socket(config: &Config, origin: &Origin) -> Option<Problem> {
    let AdminListen::Unix(path) = &config.admin.listen else { return None };
    let data = fs::symlink_metadata(path).ok()?;
    if data.file_type().is_socket() {
        return None;
    }
    let message =
        format!("{} is not a socket; remove it or choose another [admin] listen", path.display());
    Some(origin.error(&Spot::AdminListen, message, None))
}

/// Addresses of this host can be bound. One that is taken is only a warning, and
/// none where this program has it: a file is checked while the balancer runs.
fn binds(config: &Config, origin: &Origin, found: &mut Vec<Problem>) {
    for frontend in &config.frontends {
        for Bind { key, options } in &frontend.binds {
            let address = key.socket_addr();
            let Err(error) = listen::taken(address, options.freebind) else { continue };
            let gone =
                matches!(error.raw_os_error(), Some(libc::EADDRNOTAVAIL | libc::EAFNOSUPPORT));
            if gone && options.if_ipv6 {
                continue;
            }
            let privileged = error.kind() == ErrorKind::PermissionDenied;
            let refused = BindError::new(address, error);
            if refused.is_held_by_this_program() {
                continue;
            }
            let mut problem = refused.problem(config, origin);
            // Another user, or a later moment, may be able to.
            if !gone && (privileged || refused.other.is_some()) {
                problem.severity = tidegate_config::Severity::Warning;
            }
            found.push(problem);
        }
    }
}

/// Heartbeats can be received at addresses of this host.
fn heartbeats(config: &Config, origin: &Origin) -> Option<Problem> {
    let listen = config.heartbeat.iter().flat_map(|heartbeat| &heartbeat.listen);
    listen.into_iter().find_map(|address| {
        let error = UdpSocket::bind(address).err()?;
        let missing = error.kind() == ErrorKind::AddrNotAvailable;
        let message = format!("cannot listen for heartbeats on {address}: {error}");
        missing.then(|| origin.error(&Spot::HeartbeatListen(*address), message, None))
    })
}

/// Whether connections can start where the pools say; else where not, and why.
pub(super) fn try_sources(config: &Config) -> Result<(), (SourceAddr, String)> {
    let all: BTreeSet<SourceAddr> =
        config.pools.iter().flat_map(|pool| pool.source.iter().copied()).collect();
    for source in all {
        stream::try_source(source.ip()).map_err(|error| {
            let hint = match error.raw_os_error() {
                Some(libc::EADDRNOTAVAIL) => ": no interface of this host has that address",
                _ => "",
            };
            (source, format!("no connection can start at source {source}: {error}{hint}"))
        })?;
    }
    Ok(())
}

/// The token file is unfit.
pub(super) fn token_problem(origin: &Origin, why: String) -> Box<Problem> {
    let help = "make one with: (umask 077; head -c 24 /dev/urandom | base64 > FILE)";
    Box::new(origin.error(&Spot::TokenFile, why, Some(help.to_owned())))
}

/// What is said of an access log that cannot be opened.
pub(super) fn access_log_refusal(error: &std::io::Error) -> String {
    format!("cannot open the access log: {error}")
}

/// The admin token, where one is configured.
pub(super) fn load_token(config: &Config) -> Result<Option<Token>, String> {
    let load = |path: &Path| Token::load(path).map_err(|error| error.to_string());
    config.admin.token_file.as_deref().map(load).transpose()
}

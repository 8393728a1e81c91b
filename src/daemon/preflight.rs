//! Checks of a configuration against this host: user, token, access log, state directory
//! and addresses.
//!
//! Called by `cli::check`. The start uses the same functions, so both report the same
//! texts. It changes nothing: it closes each socket that it binds, and it creates no
//! file.

use super::binds::place_of;

use super::refused::BindError;
use super::state_directory;
use super::unix_sockets;
use crate::admin::{Token, TokenError, Tokens};
use rustix::fs::{Access, access};
use std::collections::BTreeSet;
use std::fs;
use std::io::ErrorKind;
use std::net::UdpSocket;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use tidegate_config::{Loaded, Origin, Problem, Severity, Spot};
use tidegate_core::model::{AccessLogTarget, AdminListen, Bind, BindKey, Config, SourceAddr};
use tidegate_net::privileges::{self, CapabilitySet, UserIdentity};
use tidegate_net::{holders, listen, stream};

/// Returns all errors and warnings of a start on this host, in the order of the start.
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
    // A file for root is often checked by an ordinary user.
    found.extend(cannot_switch(origin, identity.as_ref()).map(|mut problem| {
        problem.severity = Severity::Warning;
        problem
    }));
    // Set if the process opens its files as another user than this process.
    let other = identity.as_ref().filter(|identity| !identity.is_current());
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

/// Returns the user to switch to; `None` without `[process] user`.
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
        return Err(refused(format!("{user:?} is root; choose an unprivileged user")));
    }
    Ok(Some(identity))
}

/// Reports a user to switch to if this process has no right to switch.
pub(super) fn cannot_switch(origin: &Origin, identity: Option<&UserIdentity>) -> Option<Problem> {
    let identity = identity.filter(|identity| !identity.is_current())?;
    let able = privileges::held().is_ok_and(|held| held.contains(CapabilitySet::SETUID));
    if able {
        return None;
    }
    let (name, current) = (&identity.name, privileges::whoami());
    let message = format!("[process] user: {current} cannot switch to {name}");
    let help = "start as root, or start as that user, or remove the key";
    Some(origin.error(&Spot::User, message, Some(help.to_owned())))
}

/// Checks the admin tokens with the rights of the current user.
fn token(config: &Config, origin: &Origin) -> Result<(), Box<Problem>> {
    load_tokens(config, Token::load).map(drop).map_err(|refusal| token_problem(origin, refusal))
}

/// Reports a token file that belongs to another user than `identity`. Token files are
/// readable only for their owner.
fn unreadable_token(config: &Config, origin: &Origin, identity: &UserIdentity) -> Option<Problem> {
    let admin = &config.admin;
    let files =
        [(Spot::TokenFile, &admin.token_file), (Spot::ReadTokenFile, &admin.read_token_file)];
    files.into_iter().find_map(|(spot, path)| {
        let path = path.as_ref()?;
        let owner = fs::metadata(path).ok()?.uid();
        let message = format!(
            "the token file {} belongs to user {owner}; [process] user {} cannot read it",
            path.display(),
            identity.name
        );
        let help = format!("chown {} {}", identity.name, path.display());
        (owner != identity.owner().0).then(|| origin.error(&spot, message, Some(help)))
    })
}

fn access_log(config: &Config, origin: &Origin, by_another: bool) -> Option<Problem> {
    let AccessLogTarget::File(path) = &config.log.access else { return None };
    let why = unwritable(path, by_another)?;
    Some(origin.error(&Spot::AccessLog, access_log_refusal(&why), None))
}

/// Checks that the state directory can be created or written.
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

/// Returns the error that open(2) would return for appending to the file.
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

/// Returns the error that prevents creating a file in the directory.
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

/// Returns the directory of a file.
pub(super) fn directory_of(file: &Path) -> PathBuf {
    match file.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
        _ => PathBuf::from("."),
    }
}

/// Reports a file at the path of the admin socket that is not a socket.
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

/// Checks the bind addresses. An address in use is only a warning. An address that
/// `tidegate` uses is not reported, because a file is often checked while the balancer
/// runs.
fn binds(config: &Config, origin: &Origin, found: &mut Vec<Problem>) {
    for frontend in &config.frontends {
        for bind @ Bind { key, options } in &frontend.binds {
            let Err(error) = try_bind(bind) else { continue };
            let missing =
                matches!(error.raw_os_error(), Some(libc::EADDRNOTAVAIL | libc::EAFNOSUPPORT));
            if missing && options.if_ipv6 {
                continue;
            }
            let privileged = error.kind() == ErrorKind::PermissionDenied;
            let refused = BindError::new(key, error);
            if refused.is_held_by_this_program() {
                continue;
            }
            let mut problem = refused.problem(config, origin);
            // The start may succeed as another user or later.
            let taken = refused.other.is_some() || refused.error.kind() == ErrorKind::AddrInUse;
            if !missing && (privileged || taken) {
                problem.severity = Severity::Warning;
            }
            found.push(problem);
        }
    }
}

fn try_bind(bind: &Bind) -> std::io::Result<()> {
    let Some(place) = place_of(bind) else { return try_unix(&bind.key) };
    let socket = listen::check_unused(place)?;
    listen::try_mark(&socket, bind.options.mark)
}

/// Checks that the addresses for heartbeats exist on this host.
/// Checks a Unix socket without a connection to it.
fn try_unix(key: &BindKey) -> std::io::Result<()> {
    if key.unix_path().and_then(holders::listening_at).is_some() {
        return Err(std::io::Error::from_raw_os_error(libc::EADDRINUSE));
    }
    let Some(path) = key.socket_file() else { return Ok(()) };
    if fs::symlink_metadata(path).is_ok_and(|found| !found.file_type().is_socket()) {
        return Err(unix_sockets::not_a_socket());
    }
    unwritable_directory(&directory_of(path), false).map_or(Ok(()), Err)
}

fn heartbeats(config: &Config, origin: &Origin) -> Option<Problem> {
    let listen = config.heartbeat.iter().flat_map(|heartbeat| &heartbeat.listen);
    listen.into_iter().find_map(|address| {
        let error = UdpSocket::bind(address).err()?;
        let missing = error.kind() == ErrorKind::AddrNotAvailable;
        let message = format!("cannot listen for heartbeats on {address}: {error}");
        missing.then(|| origin.error(&Spot::HeartbeatListen(*address), message, None))
    })
}

/// Checks that connections can use the source addresses of all pools. The error is the
/// first source address that does not work, and the reason.
pub(super) fn try_sources(config: &Config) -> Result<(), (SourceAddr, String)> {
    let all: BTreeSet<SourceAddr> =
        config.pools.iter().flat_map(|pool| pool.source.iter().copied()).collect();
    for source in all {
        stream::try_source(source.ip()).map_err(|error| {
            let hint = match error.raw_os_error() {
                Some(libc::EADDRNOTAVAIL) => ": no interface of this host has that address",
                _ => "",
            };
            (source, format!("cannot connect from source {source}: {error}{hint}"))
        })?;
    }
    Ok(())
}

/// Returns the problem of a token file that cannot be used.
pub(super) fn token_problem(origin: &Origin, (spot, why): TokenRefusal) -> Box<Problem> {
    let help = "create it with: (umask 077; head -c 24 /dev/urandom | base64 > FILE)";
    Box::new(origin.error(&spot, why, Some(help.to_owned())))
}

/// Returns the error message for an access log that cannot be opened.
pub(super) fn access_log_refusal(error: &std::io::Error) -> String {
    format!("cannot open the access log: {error}")
}

/// Where a token file is named, and why it cannot be used.
pub(super) type TokenRefusal = (Spot, String);

/// Loads the admin tokens that are configured. `read` reads one file.
pub(super) fn load_tokens(
    config: &Config,
    read: impl Fn(&Path) -> Result<Token, TokenError>,
) -> Result<Tokens, TokenRefusal> {
    let load = |spot: Spot, path: &Option<PathBuf>| {
        let token = path.as_deref().map(&read).transpose();
        token.map_err(|error| (spot, error.to_string()))
    };
    let full = load(Spot::TokenFile, &config.admin.token_file)?;
    let read = load(Spot::ReadTokenFile, &config.admin.read_token_file)?;
    Ok(Tokens { full, read })
}

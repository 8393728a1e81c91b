//! The sections `[process]` and `[admin]`.
//!
//! Called once by `validate`. It never reads frontends or pools.

use std::net::SocketAddr;
use std::ops::Range;
use std::path::PathBuf;
use std::time::Duration;

use toml::Spanned;
use toml::de::DeValue;

use super::CONNECTIONS_MAX;
use crate::Spot;
use crate::address;
use crate::file::{Field, Section};
use crate::value::{self, BUFFERS, SPIN, TIME, UPGRADE, ValueError, shown};
use tidegate_core::model::{
    ADMIN_SOCKET, Admin, AdminListen, EngineChoice, ProcessConfig, Sandbox,
};

/// Most workers. Shared state has a shard per worker.
const WORKERS_MAX: usize = 256;

/// The limit of the C library on the length of a name (useradd(8)).
const ACCOUNT_CHARS_MAX: usize = 32;

const UPGRADE_TIMEOUT: Duration = Duration::from_secs(30);
const DRAIN_TIMEOUT: Duration = Duration::from_secs(30);
const PROCESS_CONNECTIONS: u32 = 100_000;

/// The highest number of backends that a file may have.
const BACKEND_METRICS: u32 = 100_000;
const BACKEND_METRICS_MAX: u32 = 1_000_000;
/// Enough for 256 stalled bulk streams with a pipe each.
const BUFFERS_DEFAULT: usize = 256 << 20;

/// `[admin]` with the place of its address.
pub(super) struct AdminRead {
    pub(super) model: Admin,
    /// Place of `listen`, if the key is given.
    pub(super) listen: Option<Range<usize>>,
}

pub(super) fn process(top: &Section<'_, '_>) -> ProcessConfig {
    let section = top.table_or_empty("process", "[process]".to_owned());
    let process = ProcessConfig {
        workers: workers(&section).or(None),
        pin: section.boolean("pin").or(true),
        engine: section.choice("engine").or(EngineChoice::Auto),
        spin: section
            .text("spin", "\"off\" or a duration such as \"50us\"", |text| {
                value::duration_or_off(text, SPIN)
            })
            .or(None),
        leave_delay: section
            .text("leave_delay", "a duration such as \"5s\"", |text| match text {
                "0s" => Ok(Duration::ZERO),
                text => value::duration(text, TIME),
            })
            .or(Duration::ZERO),
        drain_timeout: section.duration("drain_timeout", "5s", TIME).or(DRAIN_TIMEOUT),
        upgrade_timeout: section.duration("upgrade_timeout", "30s", UPGRADE).or(UPGRADE_TIMEOUT),
        connections_max: section
            .integer("connections_max", 1..=CONNECTIONS_MAX)
            .or(PROCESS_CONNECTIONS),
        user: account(&section, "user").value(),
        group: account(&section, "group").value(),
        sandbox: section.choice("sandbox").or(Sandbox::Auto),
        state: section.text("state", "\"off\" or a directory", state).or(None),
        probe_helper: section.boolean("probe_helper").or(false),
        buffers_max: section
            .text("buffers_max", "a size such as \"256MiB\"", |text| {
                // A size above the address space is the same as no limit.
                value::size(text, BUFFERS).map(|size| usize::try_from(size).unwrap_or(usize::MAX))
            })
            .or(BUFFERS_DEFAULT),
    };
    section.report.keep(Spot::User, section.value_place("user"));
    section.report.keep(Spot::Group, section.value_place("group"));
    section.report.keep(Spot::State, section.value_place("state"));
    if let (Some(place), None) = (section.key_place("group"), section.key_place("user")) {
        let complaint = ValueError::new("group without user").help("set user as well");
        section.report.error(place, complaint);
    }
    section.finish();
    process
}

/// Parses `off` or a directory.
///
/// The path must be absolute, because the next process may start in another working
/// directory.
fn state(text: &str) -> Result<Option<PathBuf>, ValueError> {
    match text {
        "off" => Ok(None),
        path if path.starts_with('/') && path.len() > 1 && !path.contains('\0') => {
            Ok(Some(PathBuf::from(path)))
        }
        path => {
            let complaint = format!("{} is not \"off\" or an absolute path", shown(path));
            Err(ValueError::new(complaint).help("write a directory such as \"/var/lib/tidegate\""))
        }
    }
}

/// Reads the name (useradd(8)) or number of a user or group.
///
/// The start of the process checks whether it exists on this host.
fn account(section: &Section<'_, '_>, key: &'static str) -> Field<String> {
    section.text(key, "a name such as \"tidegate\"", |text| {
        let fit = |byte: u8| byte.is_ascii_alphanumeric() || b"._-$".contains(&byte);
        if text.is_empty() || text.len() > ACCOUNT_CHARS_MAX || !text.bytes().all(fit) {
            return Err(ValueError::new(format!("{} is not a valid {key} name", shown(text))));
        }
        if key == "user" && (text == "root" || text.bytes().all(|byte| byte == b'0')) {
            let complaint = ValueError::new("it must not be root");
            return Err(
                complaint.help("without this key the process keeps the user that starts it")
            );
        }
        Ok(text.to_owned())
    })
}

fn workers(section: &Section<'_, '_>) -> Field<Option<usize>> {
    let Some(node) = section.node("workers") else {
        return Field::Absent;
    };
    match node.get_ref() {
        DeValue::String(word) if word == "auto" => Field::Good(Spanned::new(node.span(), None)),
        DeValue::Integer(_) => section.integer("workers", 1..=WORKERS_MAX).map(Some),
        DeValue::String(word) => {
            let complaint = ValueError::new(format!("{} is not a number of workers", shown(word)));
            let help = format!("write \"auto\" or a number from 1 to {WORKERS_MAX} without quotes");
            section.report.error(node.span(), complaint.named("workers").help(help));
            Field::Bad
        }
        _ => section.wrong_type("workers", node, "\"auto\" or an integer"),
    }
}

pub(super) fn admin(top: &Section<'_, '_>) -> AdminRead {
    let section = top.table_or_empty("admin", "[admin]".to_owned());
    let listen = section.text("listen", "an address", address::admin_listen);
    let token_file = section.text("token_file", "a file path", file_path);
    let read_token_file = section.text("read_token_file", "a file path", file_path);
    if let Field::Good(address) = &listen
        && let AdminListen::Tcp(tcp) = address.get_ref()
        && !is_loopback(tcp)
        && token_file.is_absent()
        && read_token_file.is_absent()
    {
        let complaint = ValueError::new(format!(
            "{tcp} is reachable from other machines and there is no token_file"
        ));
        section.report.error(
            address.span(),
            complaint.help(
                "add token_file = \"/path/to/token\", or listen on 127.0.0.1 or a Unix socket",
            ),
        );
    }
    for (key, file) in [("token_file", &token_file), ("read_token_file", &read_token_file)] {
        if let (Some(place), true) = (file.place(), is_unix(&listen)) {
            let complaint = ValueError::new(format!("{key} has no effect on a Unix socket"));
            let help =
                "the socket's mode (0600) limits access; a token is for listen = \"IP:PORT\"";
            section.report.warning(place, complaint.help(help));
        }
    }
    let place = listen.place();
    section.report.keep(Spot::AdminListen, place.clone());
    section.report.keep(Spot::TokenFile, token_file.place());
    section.report.keep(Spot::ReadTokenFile, read_token_file.place());
    let model = Admin {
        listen: listen.or(AdminListen::Unix(PathBuf::from(ADMIN_SOCKET))),
        token_file: token_file.value(),
        read_token_file: read_token_file.value(),
        backend_metrics_max: section
            .integer("backend_metrics_max", 0..=BACKEND_METRICS_MAX)
            .or(BACKEND_METRICS),
    };
    section.finish();
    AdminRead { model, listen: place }
}

/// Returns whether the API listens on a Unix socket, given or by default.
fn is_unix(listen: &Field<AdminListen>) -> bool {
    match listen {
        Field::Good(listen) => matches!(listen.get_ref(), AdminListen::Unix(_)),
        Field::Absent => true,
        Field::Bad => false,
    }
}

fn is_loopback(address: &SocketAddr) -> bool {
    address.ip().to_canonical().is_loopback()
}

pub(super) fn file_path(text: &str) -> Result<PathBuf, ValueError> {
    if text.is_empty() || text.contains('\0') || text.ends_with('/') {
        return Err(ValueError::new(format!("{} is not a file path", shown(text))));
    }
    Ok(PathBuf::from(text))
}

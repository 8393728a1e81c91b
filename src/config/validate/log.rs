//! `[log]`: the log and the access log.
//!
//! Called by the reader of the top level. It opens no file and no connection.

use super::globals::file_path;
use crate::Spot;
use crate::address;
use crate::file::{Field, Section};
use crate::value::{self, ValueError, shown};
use tidegate_core::model::{
    AccessLogTarget, Log, LogFormat, LogLevel, LogTarget, SyslogFacility, SyslogReceiver,
};

const FACILITY: SyslogFacility = SyslogFacility::Daemon;
const ACCESS_FACILITY: SyslogFacility = SyslogFacility::Local0;

const RECEIVERS: &str = "receivers are \"syslog:/dev/log\", \"syslog:unix:/PATH\", \
                         \"syslog:udp:IP:PORT\" and \"syslog:tcp:IP:PORT\"";

pub(super) fn log(top: &Section<'_, '_>) -> Log {
    let section = top.table_or_empty("log", "[log]".to_owned());
    section.report.keep(Spot::AccessLog, section.value_place("access"));
    let level = section.choice("level").or(LogLevel::Info);
    let format = section.choice("format").or(LogFormat::Text);
    let target = section.text("target", "\"stderr\" or \"syslog:...\"", log_target);
    let facility = section.choice("facility");
    let wants = "\"off\", \"stdout\", a file path or \"syslog:...\"";
    let access = section.text("access", wants, access_target);
    let access_facility = section.choice("access_facility");
    let (bad_target, bad_access) = (target.is_bad(), access.is_bad());
    let target = target.or(LogTarget::Stderr);
    let access = access.or(AccessLogTarget::Off);
    if !bad_target && !matches!(target, LogTarget::Syslog(_)) {
        warn_without_syslog(&section, &facility, FACILITY, ["facility", "target"]);
    }
    if !bad_access && !matches!(access, AccessLogTarget::Syslog(_)) {
        let keys = ["access_facility", "access"];
        warn_without_syslog(&section, &access_facility, ACCESS_FACILITY, keys);
    }
    section.finish();
    let (facility, access_facility) = (facility.or(FACILITY), access_facility.or(ACCESS_FACILITY));
    Log { level, format, target, facility, access, access_facility }
}

/// Warns about a facility other than the default without a syslog receiver.
fn warn_without_syslog(
    section: &Section<'_, '_>,
    facility: &Field<SyslogFacility>,
    default: SyslogFacility,
    [key, target]: [&str; 2],
) {
    if let Field::Good(given) = facility
        && *given.get_ref() != default
    {
        let message = format!("{key} has no effect: {target} is not syslog");
        section.report.warning(given.span(), ValueError::new(message).help(RECEIVERS));
    }
}

fn log_target(text: &str) -> Result<LogTarget, ValueError> {
    match text.strip_prefix("syslog:") {
        Some(receiver) => syslog_receiver(text, receiver).map(LogTarget::Syslog),
        None if text == "stderr" => Ok(LogTarget::Stderr),
        None => {
            Err(ValueError::new(format!("{} is not \"stderr\" or a syslog receiver", shown(text)))
                .help(RECEIVERS))
        }
    }
}

/// Parses `off`, `stdout`, a receiver or a path.
///
/// A bare word is rejected, because it is more likely a mistake than a file in the
/// working directory.
fn access_target(text: &str) -> Result<AccessLogTarget, ValueError> {
    if let Some(receiver) = text.strip_prefix("syslog:") {
        return syslog_receiver(text, receiver).map(AccessLogTarget::Syslog);
    }
    match text {
        "off" => Ok(AccessLogTarget::Off),
        "stdout" => Ok(AccessLogTarget::Stdout),
        path if path.contains('/') => file_path(path).map(AccessLogTarget::File),
        word => Err(ValueError::new(format!(
            "{} is not \"off\", \"stdout\", a file path or a syslog receiver",
            shown(word)
        ))
        .help(format!("for a file of that name write \"./{}\"", value::cut(word)))),
    }
}

/// Parses what follows `syslog:`. A host name is rejected, because the log must not wait for
/// name resolution.
fn syslog_receiver(text: &str, receiver: &str) -> Result<SyslogReceiver, ValueError> {
    if receiver.starts_with('/') {
        return address::unix_path(receiver).map(SyslogReceiver::Local);
    }
    match receiver.split_once(':') {
        Some(("unix", path)) if path.starts_with('/') => {
            address::unix_path(path).map(SyslogReceiver::Unix)
        }
        Some(("udp", at)) => address::ip_server(at).map(SyslogReceiver::Udp),
        Some(("tcp", at)) => address::ip_server(at).map(SyslogReceiver::Tcp),
        _ => {
            Err(ValueError::new(format!("{} is not a syslog receiver", shown(text)))
                .help(RECEIVERS))
        }
    }
}

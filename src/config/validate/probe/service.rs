//! The keys of probes that speak the protocol of one service: the login.
//!
//! Called by `probe`. It opens a file only to check it early; the daemon reads the password
//! for each probe.

use std::path::PathBuf;

use super::super::named_file::{self, FileContent};
use super::ProbeKindKey;
use crate::NamedFiles;
use crate::file::{Field, Section};
use crate::value::{ValueError, shown};
use tidegate_core::model::{
    DnsProbe, DnsProbeCode, DnsProbeRecord, DnsProbeTransport, PostgresProbe, ProbeLogin,
};

/// Longest name of a user.
const USER_BYTES_MAX: usize = 64;

/// Longest name of a database.
const DATABASE_BYTES_MAX: usize = 64;

/// The keys that only probes of services take.
pub(super) struct ServiceKeys {
    user: Field<String>,
    password_file: Field<PathBuf>,
    database: Field<String>,
    name: Field<String>,
    record: Field<DnsProbeRecord>,
    transport: Field<DnsProbeTransport>,
    rcode: Field<DnsProbeCode>,
}

pub(super) fn keys(section: &Section<'_, '_>, files: NamedFiles<'_>) -> ServiceKeys {
    ServiceKeys {
        user: section.text("user", "a string", |text| visible(text, USER_BYTES_MAX)),
        password_file: named_file::read(section, "password_file", FileContent::Secret, files),
        database: section.text("database", "a string", |text| visible(text, DATABASE_BYTES_MAX)),
        name: section.text("name", "a string", dns_name),
        record: section.choice("record"),
        transport: section.choice("transport"),
        rcode: section.choice("rcode"),
    }
}

/// Reports keys without the keys that they need.
pub(super) fn check(section: &Section<'_, '_>, kind: ProbeKindKey, keys: &ServiceKeys) {
    let without = |key: &str, needed: &str, help: &str| {
        let place = section.key_place(key).unwrap_or_else(|| section.header.clone());
        let complaint = ValueError::new(format!("{key} without {needed}"));
        section.report.error(place, complaint.help(help));
    };
    let (user, password) = (!keys.user.is_absent(), !keys.password_file.is_absent());
    match kind {
        ProbeKindKey::Redis if user && !password => {
            without("user", "password_file", "set both, or neither");
        }
        ProbeKindKey::Postgres | ProbeKindKey::Mysql if !user => {
            let needs = [("password_file", password), ("database", !keys.database.is_absent())];
            for (key, _) in needs.into_iter().filter(|(_, given)| *given) {
                without(key, "user", "add user = \"...\"; without it, the probe does not log in");
            }
        }
        ProbeKindKey::Dns => check_dns(section, keys),
        _ => {}
    }
}

/// Reports a question without a name, and keys that need a connection in a probe without one.
fn check_dns(section: &Section<'_, '_>, keys: &ServiceKeys) {
    if keys.name.is_absent() {
        section.missing("name", "\"www.example.com\", the name that the question is about");
    }
    if matches!(&keys.transport, Field::Good(word) if *word.get_ref() == DnsProbeTransport::Udp) {
        for key in ["tls", "proxy_protocol"] {
            if let Some(place) = section.key_place(key) {
                let complaint = ValueError::new(format!("{key} with transport = \"udp\""));
                let help = format!("{key} needs transport = \"tcp\"");
                section.report.error(place, complaint.help(help));
            }
        }
    }
}

/// Accepts a name of DNS. Removes its last dot; `.` is the root.
fn dns_name(text: &str) -> Result<String, ValueError> {
    if text == "." {
        return Ok(text.to_owned());
    }
    let labels = text.strip_suffix('.').unwrap_or(text);
    if labels.len() > 253 || labels.split('.').any(|label| !(1..=63).contains(&label.len())) {
        let message = "a name has at most 253 bytes, and 1 to 63 between two dots";
        return Err(ValueError::new(message));
    }
    visible(labels, 253)
}

/// Accepts a text that ends no line and no string of a protocol.
fn visible(text: &str, max: usize) -> Result<String, ValueError> {
    if text.is_empty() {
        return Err(ValueError::new("it is empty"));
    }
    if let Some(wrong) = text.chars().find(|c| c.is_control() || *c == ' ') {
        return Err(ValueError::new(format!("{} is not allowed here", shown(&wrong.to_string()))));
    }
    match text.len() > max {
        true => Err(ValueError::new(format!("{} bytes, at most {max} are allowed", text.len()))),
        false => Ok(text.to_owned()),
    }
}

// === impl ServiceKeys ===

impl ServiceKeys {
    pub(super) fn login(self) -> ProbeLogin {
        ProbeLogin { user: self.user.value(), password_file: self.password_file.value() }
    }

    pub(super) fn postgres(self) -> PostgresProbe {
        let database = self.database.value();
        let login =
            ProbeLogin { user: self.user.value(), password_file: self.password_file.value() };
        PostgresProbe { login, database }
    }

    pub(super) fn dns(self) -> DnsProbe {
        DnsProbe {
            name: self.name.value().unwrap_or_default(),
            record: self.record.or(DnsProbeRecord::A),
            transport: self.transport.or(DnsProbeTransport::Tcp),
            rcode: self.rcode.or(DnsProbeCode::Noerror),
        }
    }
}

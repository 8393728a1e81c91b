//! Where a probe connects, and how: `port`, `address`, `source`, `tls` and `proxy_protocol`.
//!
//! Called by `probe`. It never opens a connection.

use std::net::IpAddr;

use toml::Spanned;
use toml::de::DeValue;

use super::super::frontend::any_number;
use super::super::named_file::{self, FileContent};
use super::super::pool;
use super::ProbedBackends;
use crate::file::{Field, Section};
use crate::host_name;
use crate::value::{ValueError, shown};
use crate::{NamedFiles, Spot};
use tidegate_core::model::{ProbeHeader, ProbeTarget, ProbeTls, TlsVerify};

/// Most names of `alpn`, and the longest one (RFC 7301, section 3.1).
const ALPN_MAX: usize = 8;
const ALPN_BYTES_MAX: usize = 255;

/// `of_pool`: the target of a probe without these keys.
pub(super) fn read(
    section: &Section<'_, '_>,
    backends: ProbedBackends,
    files: NamedFiles<'_>,
) -> ProbeTarget {
    let (of_pool, own) = (backends.target, pool::sources(section));
    let source = if section.node("source").is_some() { own } else { of_pool.source };
    let port = section.integer("port", 1..=u16::MAX).value();
    let address = section.text("address", "an IP address such as \"10.0.0.5\"", address);
    if let Some(place) = section.key_place("port").filter(|_| backends.all_unix)
        && address.is_absent()
    {
        let message = "port has no effect: all backends of the pool are Unix sockets";
        let help = "remove it, or add the address that listens at this port";
        section.report.error(place, ValueError::new(message).help(help));
    }
    let header = header(section, of_pool.header_version.is_some());
    let header_version = match header {
        Some(ProbeHeader::Local) => of_pool.header_version,
        Some(ProbeHeader::Off) => None,
        // Another port is that of another service.
        None => of_pool.header_version.filter(|_| port.is_none()),
    };
    ProbeTarget {
        port,
        address: address.value(),
        tls: tls(section, files).value(),
        source,
        header,
        header_version,
    }
}

/// Reads `proxy_protocol`. `pool_sends`: the pool has a header.
fn header(section: &Section<'_, '_>, pool_sends: bool) -> Option<ProbeHeader> {
    let field = section.choice("proxy_protocol");
    if let Field::Good(header) = &field
        && *header.get_ref() == ProbeHeader::Local
        && !pool_sends
    {
        let complaint = ValueError::new("the pool sends no PROXY header");
        let help = "set proxy_protocol of the pool, or remove it from the probe";
        section.report.error(header.span(), complaint.help(help));
    }
    field.value()
}

fn address(text: &str) -> Result<IpAddr, ValueError> {
    text.parse().map_err(|_| {
        let complaint = ValueError::new(format!("{} is not an IP address", shown(text)));
        match text.parse::<std::net::SocketAddr>() {
            Ok(_) => complaint.help("write the port as the key port"),
            Err(_) => complaint,
        }
    })
}

/// Reads `true`, `false` or a table.
fn tls(section: &Section<'_, '_>, files: NamedFiles<'_>) -> Field<ProbeTls> {
    let Some(node) = section.node("tls") else { return Field::Absent };
    let system = ProbeTls { verify: TlsVerify::System, name: None, alpn: Vec::new() };
    match node.get_ref() {
        DeValue::Boolean(true) => Field::Good(Spanned::new(node.span(), system)),
        DeValue::Boolean(false) => Field::Absent,
        DeValue::Table(table) => {
            let label = "the table of tls".to_owned();
            let table = Section::new(section.report, table, label, node.span());
            let tls = ProbeTls {
                verify: verify(&table, files).or(TlsVerify::System),
                name: table.text("name", "a host name", certificate_name).value(),
                alpn: alpn(&table),
            };
            table.finish();
            Field::Good(Spanned::new(node.span(), tls))
        }
        _ => section.wrong_type("tls", node, "true, false or a table { verify = \"system\" }"),
    }
}

fn verify(table: &Section<'_, '_>, files: NamedFiles<'_>) -> Field<TlsVerify> {
    let wants = "\"system\", \"off\" or a file of certificates";
    let field = table.text("verify", wants, |text| match text {
        "system" => Ok(TlsVerify::System),
        "off" => Ok(TlsVerify::Off),
        word if !word.contains(['/', '.']) => {
            Err(ValueError::new(format!("{} is not a known value", shown(word)))
                .help("write \"system\", \"off\", or a path with a slash such as \"./ca.pem\""))
        }
        path => named_file::checked(path, FileContent::Certificates, files).map(TlsVerify::File),
    });
    if let Field::Good(read) = &field
        && let TlsVerify::File(path) = read.get_ref()
    {
        table.report.keep(Spot::NamedFile(path.clone()), Some(read.span()));
    }
    field
}

fn certificate_name(text: &str) -> Result<String, ValueError> {
    host_name::certificate_name(text).map(|()| text.to_owned())
}

fn alpn(table: &Section<'_, '_>) -> Vec<String> {
    let wants = ("a protocol such as \"h2\", or a list", "protocols such as \"h2\"");
    let read = any_number(table, "alpn", wants, |text| match text.len() {
        1..=ALPN_BYTES_MAX => Ok(text.to_owned()),
        length => Err(ValueError::new(format!(
            "{length} bytes, 1 to {ALPN_BYTES_MAX} are allowed for a protocol"
        ))),
    });
    if let Some(extra) = read.get(ALPN_MAX) {
        let message = format!("at most {ALPN_MAX} protocols are allowed");
        table.report.error(extra.span(), ValueError::new(message).named("alpn"));
    }
    read.into_iter().map(Spanned::into_inner).collect()
}

//! `[dns]`: how names are resolved.
//!
//! Called once by `validate`. It never resolves a name.

use std::net::{IpAddr, SocketAddr};
use std::ops::RangeInclusive;
use std::time::Duration;

use toml::Spanned;
use toml::de::DeValue;

use super::frontend::any_number;
use super::registry::distinct_servers;
use crate::address;
use crate::file::Section;
use crate::value::{ValueError, nearest, shown};
use tidegate_core::model::{DnsConfig, show_duration};

/// Most servers. A question goes to one after the other.
const SERVERS_MAX: usize = 8;

/// `hold_nxdomain`.
const HOLD: RangeInclusive<Duration> = Duration::from_secs(1)..=Duration::from_secs(24 * 3600);

/// `ttl_min` and `ttl_max`. A shorter time would be a load for the servers.
const TTL: RangeInclusive<Duration> = Duration::from_secs(1)..=Duration::from_secs(24 * 3600);

pub(super) fn read(top: &Section<'_, '_>) -> DnsConfig {
    let section = top.table_or_empty("dns", "[dns]".to_owned());
    let default = DnsConfig::default();
    let (min, max) =
        (section.duration("ttl_min", "1s", TTL), section.duration("ttl_max", "5m", TTL));
    let known = !min.is_bad() && !max.is_bad();
    let place = min.place().or(max.place());
    let (ttl_min, ttl_max) = (min.or(default.ttl_min), max.or(default.ttl_max));
    if let Some(place) = place
        && known
        && ttl_min > ttl_max
    {
        let (min, max) = (show_duration(ttl_min), show_duration(ttl_max));
        let message = format!("ttl_min ({min}) must not exceed ttl_max ({max})");
        section.report.error(place, ValueError::new(message));
    }
    let config = DnsConfig {
        servers: servers(&section),
        hold_nxdomain: section.duration("hold_nxdomain", "30s", HOLD).or(default.hold_nxdomain),
        ttl_min,
        ttl_max,
    };
    section.finish();
    config
}

/// Reads `"system"`, or the addresses of servers.
fn servers(section: &Section<'_, '_>) -> Option<Vec<SocketAddr>> {
    let node = section.node("servers")?;
    let is_empty = match node.get_ref() {
        DeValue::String(word) if word == "system" => return None,
        DeValue::Array(list) => list.is_empty(),
        _ => false,
    };
    if is_empty {
        let complaint = ValueError::new("servers lists no server");
        let help = "write servers = \"system\" to use the servers of /etc/resolv.conf";
        section.report.error(node.span(), complaint.help(help));
    }
    let wants = (
        "\"system\", an address such as \"10.0.0.53:53\", or a list of addresses",
        "addresses such as \"10.0.0.53:53\"",
    );
    let read = any_number(section, "servers", wants, server);
    let too_many = format!("more than {SERVERS_MAX} servers");
    let servers = distinct_servers(section, read, (SERVERS_MAX, &too_many));
    Some(servers.into_iter().map(Spanned::into_inner).collect())
}

fn server(text: &str) -> Result<SocketAddr, ValueError> {
    if let Ok(ip) = text.parse::<IpAddr>() {
        let complaint = ValueError::new(format!("the port is missing in {}", shown(text)));
        return Err(complaint.help(format!("write \"{}\"", SocketAddr::new(ip, 53))));
    }
    address::ip_server(text).map_err(|complaint| {
        match nearest(text, ["system"].into_iter()).is_some() || text == "system" {
            true => ValueError::new(format!("{} is not an address", shown(text)))
                .help("write servers = \"system\", without a list"),
            false => complaint,
        }
    })
}

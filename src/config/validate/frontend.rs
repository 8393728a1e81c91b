//! `[frontend.NAME]`: bind addresses, routes and limits.
//!
//! Called by `validate` for each frontend. It never reads other sections; `cross` checks
//! what spans several sections.

use std::net::SocketAddr;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use toml::Spanned;
use toml::de::DeValue;

use super::binds::{self, BindCount};
use super::{CONNECTIONS_MAX, proxy_protocol, routes, sources};
use crate::NamedFiles;
use crate::address;
use crate::defaults::Defaults;
use crate::file::{Field, NamedSection, Section};
use crate::value::{self, STALLED, TIME, USER_TIMEOUT, ValueError};
use tidegate_core::model::{Bind, FrontendConfig, SourceRules, show_duration};

const IDLE_TIMEOUT: Duration = Duration::from_secs(600);
const HALF_CLOSED_TIMEOUT: Duration = Duration::from_secs(30);
const STALLED_TIMEOUT: Duration = Duration::from_secs(45);
const KEEPALIVE: Duration = Duration::from_secs(60);
const USER_TIMEOUT_DEFAULT: Duration = Duration::from_secs(120);

/// A frontend with the places that checks across sections point at.
pub(super) struct FrontendRead {
    pub(super) model: FrontendConfig,
    /// Whether the frontend is a part of the configuration.
    pub(super) enabled: bool,
    /// As many as `model.binds`.
    pub(super) bind_places: Vec<Range<usize>>,
    /// Place of `pool`, if the key is given.
    pub(super) pool: Option<Range<usize>>,
    /// Each pool that a route names, with its place.
    pub(super) route_pools: Vec<(Arc<str>, Range<usize>)>,
}

pub(super) fn read<'r, 'a>(
    named: NamedSection<'r, 'a>,
    defaults: &'r Defaults<'r, 'a>,
    files: NamedFiles<'_>,
    count: &mut BindCount,
) -> FrontendRead {
    let NamedSection { name, section, .. } = named;
    let section = section.with_defaults(&defaults.frontend);
    let enabled = section.boolean("enabled").or(true);
    let before = section.report.errors();
    let (binds, bind_places): (Vec<Bind>, _) = binds::read(&section, count).into_iter().unzip();
    let all_binds = if section.report.errors() == before { &binds[..] } else { &[] };
    let (routes, route_pools) = routes::read(&section, name, all_binds);
    let pool = section.text("pool", "the name of a pool", |text| Ok(Arc::<str>::from(text)));
    if pool.is_absent() {
        section.missing("pool", "\"NAME\", the name of a [pool.NAME]");
    }
    let idle_timeout = section.timer("idle_timeout", "30s", TIME);
    let client_first = section.timer("client_first", "5s", TIME);
    let first_byte_timeout = section.timer("first_byte_timeout", "30s", TIME);
    let keepalive =
        section.text("keepalive", "a duration such as \"30s\", or \"off\"", value::keepalive);
    let user_timeout = section.timer("user_timeout", "30s", USER_TIMEOUT);
    let pool_place = pool.place();
    let places = binds.iter().zip(&bind_places);
    let header_source = proxy_protocol::of_frontend(&section, name, places);
    let connections_max = section.integer("connections_max", 0..=CONNECTIONS_MAX);
    section.report.limit("connections_max of this frontend", &connections_max);
    let model = FrontendConfig {
        name: name.into(),
        binds,
        routes,
        pool: pool.or("".into()),
        client_first: client_first.or(None),
        // Off by default, because many clients open connections before they need them.
        first_byte_timeout: first_byte_timeout.or(None),
        idle_timeout: idle_timeout.or(Some(IDLE_TIMEOUT)),
        half_closed_timeout: section
            .timer("half_closed_timeout", "30s", TIME)
            .or(Some(HALF_CLOSED_TIMEOUT)),
        session_max: section.timer("session_max", "1h", TIME).or(None),
        stalled_timeout: section.timer("stalled_timeout", "30s", STALLED).or(Some(STALLED_TIMEOUT)),
        keepalive: keepalive.or(Some(KEEPALIVE)),
        user_timeout: user_timeout.or(Some(USER_TIMEOUT_DEFAULT)),
        download_rate: byte_rate(&section, "download_rate"),
        upload_rate: byte_rate(&section, "upload_rate"),
        connections_max: connections_max.or(0),
        sources: sources::read(&section, name, files),
        proxy_protocol: header_source,
    };
    refuse_useless_timer(&section, &model);
    refuse_rules_for_ip_clients(&section, &model);
    warn_of_timers(&section, &model);
    section.finish();
    let mut read = FrontendRead { model, enabled, bind_places, pool: pool_place, route_pools };
    if !enabled {
        // It binds nothing, so its addresses clash with no others.
        (read.model.binds, read.bind_places) = (Vec::new(), Vec::new());
    }
    read
}

fn byte_rate(section: &Section<'_, '_>, key: &'static str) -> Option<u64> {
    section.text(key, "a rate such as \"1MiB/s\", or \"off\"", value::byte_rate).or(None)
}

/// Reads an address to listen on, or a list of addresses.
pub(super) fn addresses(
    section: &Section<'_, '_>,
    key: &'static str,
    example: &str,
) -> Vec<Spanned<SocketAddr>> {
    let wants = "addresses such as \"0.0.0.0:8080\"";
    let read = |text: &str| address::bind_address(text);
    one_or_more(
        section,
        key,
        ("an address such as \"0.0.0.0:8080\", or a list of addresses", wants),
        example,
        read,
    )
}

/// Reads a required key: a string that `read` converts, or a list of strings.
///
/// `wants` names what the key takes and what its elements are.
pub(super) fn one_or_more<T>(
    section: &Section<'_, '_>,
    key: &'static str,
    wants: (&str, &str),
    example: &str,
    read: impl Fn(&str) -> Result<T, ValueError>,
) -> Vec<Spanned<T>> {
    let Some(node) = section.node(key) else {
        section.missing(key, example);
        return Vec::new();
    };
    if let DeValue::Array(array) = node.get_ref()
        && array.is_empty()
    {
        let complaint = ValueError::new(format!("{key} lists {}", nothing(key)));
        section.report.error(node.span(), complaint.help(format!("write {key} = {example}")));
    }
    any_number(section, key, wants, read)
}

/// Reads an optional key: a string that `read` converts, or a list of strings.
pub(super) fn any_number<T>(
    section: &Section<'_, '_>,
    key: &'static str,
    wants: (&str, &str),
    read: impl Fn(&str) -> Result<T, ValueError>,
) -> Vec<Spanned<T>> {
    let Some(node) = section.node(key) else { return Vec::new() };
    let nodes = match node.get_ref() {
        DeValue::String(_) => std::slice::from_ref(node),
        DeValue::Array(array) => array,
        _ => {
            let _: Field<()> = section.wrong_type(key, node, wants.0);
            return Vec::new();
        }
    };
    let mut values = Vec::with_capacity(nodes.len());
    for node in nodes {
        let DeValue::String(text) = node.get_ref() else {
            let _: Field<()> = section.wrong_type(key, node, wants.1);
            continue;
        };
        match read(text) {
            Ok(value) => values.push(Spanned::new(node.span(), value)),
            Err(complaint) => section.report.error(node.span(), complaint.named(key)),
        }
    }
    values
}

fn nothing(key: &str) -> &'static str {
    match key {
        "pools" => "no pool",
        "addresses" | "sources" | "from" => "no range",
        _ => "no address",
    }
}

/// A session that waited for the client's first byte cannot run into `first_byte_timeout`.
fn refuse_useless_timer(section: &Section<'_, '_>, model: &FrontendConfig) {
    if let (Some(_), Some(_)) = (model.client_first, model.first_byte_timeout)
        && let Some(place) = section.value_place("first_byte_timeout")
    {
        let message = "first_byte_timeout has no effect with client_first";
        let help = "client_first already limits the wait for the client's first byte";
        section.report.error(place, ValueError::new(message).help(help));
    }
}

/// Reports rules that no client of this frontend can meet, because its binds are Unix sockets.
fn refuse_rules_for_ip_clients(section: &Section<'_, '_>, model: &FrontendConfig) {
    let mut binds = model.binds.iter();
    if model.binds.is_empty() || binds.any(|bind| bind.key.unix_path().is_none()) {
        return;
    }
    let refuse = |key: &'static str, what: &str| {
        if let Some(place) = section.key_place(key) {
            let message = format!("{what} no effect: every bind of this frontend is a Unix socket");
            section.report.error(place, ValueError::new(message));
        }
    };
    let announced = model.binds.iter().any(|bind| bind.options.proxy_protocol);
    let files = |rules: &SourceRules| rules.allow_file.is_some() || rules.deny_file.is_some();
    if !announced && model.sources.as_ref().is_some_and(|r| files(r) || r.access.rules() > 0) {
        refuse("sources", "the ranges of sources have");
    }
    if model.download_rate.is_some() {
        refuse("download_rate", "download_rate has");
    }
}

/// Warns of timers that another timer precedes.
///
/// They are no errors, because the session still ends. If `user_timeout` is below
/// `keepalive`, the kernel ends an idle session after one lost keepalive probe instead of
/// several (tcp(7), `TCP_USER_TIMEOUT`).
fn warn_of_timers(section: &Section<'_, '_>, model: &FrontendConfig) {
    let warn = |key: &'static str, message: String| {
        if let Some(place) = section.value_place(key) {
            section.report.warning(place, ValueError::new(message));
        }
    };
    if let (Some(first_byte), Some(idle)) = (model.first_byte_timeout, model.idle_timeout)
        && first_byte >= idle
    {
        let idle = show_duration(idle);
        let message = format!(
            "first_byte_timeout is not below idle_timeout ({idle}), which will end such a session first"
        );
        warn("first_byte_timeout", message);
    }
    if let (Some(idle), Some(age)) = (model.idle_timeout, model.session_max)
        && idle >= age
    {
        let age = show_duration(age);
        let message = format!(
            "idle_timeout is not below session_max ({age}), which will end such a session first"
        );
        warn("idle_timeout", message);
    }
    if let (Some(user), Some(idle)) = (model.user_timeout, model.keepalive)
        && user < idle
    {
        let idle = show_duration(idle);
        let message = format!(
            "user_timeout is below keepalive ({idle}): one lost keepalive probe will end an idle session"
        );
        warn("user_timeout", message);
    }
}

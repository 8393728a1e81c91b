//! `[pool.NAME.discover]`: the question to a member source.
//!
//! Called by `pool`. `guards` reads what an answer may change. It asks no source.

use std::ops::RangeInclusive;
use std::sync::Arc;
use std::time::Duration;

use toml::Spanned;
use toml::de::DeValue;

use super::frontend::any_number;
use super::globals::file_path;
use super::guards::{self, AskedKind};
use super::named_file::{self, FileContent};
use super::registry::RegistryRead;
use crate::file::{Field, Section};
use crate::host_name::{asked, kubernetes_name, question_name, url};
use crate::value::{self, TIME, ValueError, did_you_mean_or, shown};
use crate::{NamedFiles, Spot};
use tidegate_core::model::{
    DiscoverSpec, NameFamily, NameQuestion, NameRecord, RegistryConfig, RegistryKind,
    RegistryQuery, SourceKey, SourceQuestion, Words, ZookeeperFormat,
};

pub(crate) const INTERVAL: Duration = Duration::from_secs(10);
/// `interval`. Shorter ones would be a load for the server.
const INTERVALS: RangeInclusive<Duration> = Duration::from_secs(1)..=Duration::from_secs(24 * 3600);
pub(crate) const MAX_STALE: Duration = Duration::from_secs(10);
pub(crate) const FIRST_WAIT: Duration = Duration::from_secs(10);

/// Most tags that an instance must have.
const TAGS_MAX: usize = 16;

/// The value of `kind`.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum SourceKindKey {
    Dns,
    File,
    Http,
}

impl Words for SourceKindKey {
    const WORDS: &'static [(&'static str, SourceKindKey)] = &[
        ("dns", SourceKindKey::Dns),
        ("file", SourceKindKey::File),
        ("http", SourceKindKey::Http),
    ];
}

/// The value of `record`. `Auto` is SRV for names that start with `_`.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum RecordKey {
    Auto,
    Address,
    Srv,
}

impl Words for RecordKey {
    const WORDS: &'static [(&'static str, RecordKey)] =
        &[("auto", RecordKey::Auto), ("address", RecordKey::Address), ("srv", RecordKey::Srv)];
}

const CONSUL: AskedKind = AskedKind::Registry(RegistryKind::Consul);
const ETCD: AskedKind = AskedKind::Registry(RegistryKind::Etcd);
const KUBERNETES: AskedKind = AskedKind::Registry(RegistryKind::Kubernetes);
const ZOOKEEPER: AskedKind = AskedKind::Registry(RegistryKind::Zookeeper);

/// The keys that only some questions take.
const OWNED: [(&str, &[AskedKind]); 17] = [
    ("path", &[AskedKind::File, ZOOKEEPER]),
    ("url", &[AskedKind::Http]),
    ("interval", &[AskedKind::Http]),
    ("ca_file", &[AskedKind::Http]),
    ("token_file", &[AskedKind::Http]),
    ("name", &[AskedKind::Dns]),
    ("record", &[AskedKind::Dns]),
    ("family", &[AskedKind::Dns]),
    ("port", &[AskedKind::Dns, KUBERNETES]),
    ("service", &[CONSUL, KUBERNETES]),
    ("namespace", &[CONSUL, KUBERNETES]),
    ("tags", &[CONSUL]),
    ("datacenter", &[CONSUL]),
    ("filter", &[CONSUL]),
    ("max_stale", &[CONSUL]),
    ("prefix", &[ETCD]),
    ("format", &[ZOOKEEPER]),
];

/// The registries of a file, which the questions of pools name.
#[derive(Clone, Copy)]
pub(super) struct KnownRegistries<'k> {
    pub(super) list: &'k [RegistryRead],
    /// Whether no registry is missing because of an error that is reported elsewhere.
    pub(super) all: bool,
}

/// A `discover` table.
pub(super) struct DiscoverRead {
    /// `None`: the question has errors.
    pub(super) spec: Option<DiscoverSpec>,
    /// The registry that `from` names.
    pub(super) registry: Option<Arc<str>>,
}

pub(super) fn of_pool(
    pool: &Section<'_, '_>,
    name: &str,
    registries: KnownRegistries<'_>,
    files: NamedFiles<'_>,
) -> Option<DiscoverRead> {
    let label = format!("[pool.{}.discover]", value::cut(name));
    let section = pool.table("discover", label)?;
    let (target, registry) = target(&section, registries);
    for (key, _) in OWNED {
        // A key is known in every table, so that an error names the kind that it belongs to.
        section.node(key);
    }
    let known = target.as_ref().map(Target::asked);
    if let Some(kind) = known {
        refuse_foreign_keys(&section, kind);
    }
    let question = target.and_then(|target| question(&section, name, target, files));
    let guards = guards::read(&section, known.unwrap_or(AskedKind::File));
    let first_wait = guards::wait(&section, "first_wait").or(FIRST_WAIT);
    keep_place(&section, name);
    section.finish();
    let spec = question.map(|question| DiscoverSpec { question, guards, first_wait });
    Some(DiscoverRead { spec, registry })
}

fn keep_place(section: &Section<'_, '_>, pool: &str) {
    let place = section.value_place("from").or_else(|| section.value_place("kind"));
    let key = SourceKey { pool: pool.into(), backend: None };
    section.report.keep(Spot::MemberSource(key), place);
}

/// What a table asks.
enum Target {
    Kind(SourceKindKey),
    Registry(Arc<RegistryConfig>, RegistryKind),
}

impl Target {
    fn asked(&self) -> AskedKind {
        match self {
            Target::Kind(SourceKindKey::Dns) => AskedKind::Dns,
            Target::Kind(SourceKindKey::File) => AskedKind::File,
            Target::Kind(SourceKindKey::Http) => AskedKind::Http,
            Target::Registry(_, kind) => AskedKind::Registry(*kind),
        }
    }
}

/// Reads `from` and `kind`. Returns what the table asks, and the registry that it names.
fn target(
    section: &Section<'_, '_>,
    registries: KnownRegistries<'_>,
) -> (Option<Target>, Option<Arc<str>>) {
    let from = section.text("from", "the name of a registry", |text| Ok(Arc::<str>::from(text)));
    let kind = section.text("kind", "a string", source_kind);
    match (&from, &kind) {
        (Field::Absent, Field::Absent)
            if !section.misspells("from") && !section.misspells("kind") =>
        {
            let complaint = ValueError::new(format!("{} has neither from nor kind", section.label));
            let help =
                "add from = \"NAME\" of a [registry.NAME], or kind = \"dns\", \"file\" or \"http\"";
            section.report.error(section.header.clone(), complaint.help(help));
        }
        (Field::Absent, _) | (_, Field::Absent) => {}
        _ => {
            let place = section.key_place("kind").unwrap_or_else(|| section.header.clone());
            let complaint = ValueError::new("from and kind exclude each other");
            let help = "remove kind: the registry has its own";
            section.report.error(place, complaint.help(help));
            return (None, from.value());
        }
    }
    if let Some(kind) = kind.value() {
        return (Some(Target::Kind(kind)), None);
    }
    let Some(from) = from.good() else { return (None, None) };
    let registry = registries.list.iter().find(|one| one.model.name == *from.get_ref());
    if registry.is_none() && registries.all {
        section
            .report
            .error_with(from.span(), || unknown_registry(from.get_ref(), registries.list));
    }
    let target = registry.and_then(|one| Some(Target::Registry(Arc::clone(&one.model), one.kind?)));
    (target, Some(from.into_inner()))
}

fn source_kind(text: &str) -> Result<SourceKindKey, ValueError> {
    if RegistryKind::WORDS.iter().any(|(word, _)| *word == text) {
        let help = format!(
            "write from = \"NAME\" and add [registry.NAME] with kind = {} and servers",
            shown(text)
        );
        return Err(ValueError::new(format!("{} is a kind of registry", shown(text))).help(help));
    }
    value::choice(text)
}

fn unknown_registry(name: &str, registries: &[RegistryRead]) -> ValueError {
    let names = registries.iter().map(|one| &*one.model.name);
    let complaint = ValueError::new(format!("there is no registry {}", shown(name)));
    complaint.help(did_you_mean_or(name, names, || match registries {
        [] => format!("add [registry.{}] with kind and servers", value::cut(name)),
        [only] => format!("the only registry is {}", shown(&only.model.name)),
        _ => "name one of the [registry.NAME] tables".to_owned(),
    }))
}

fn refuse_foreign_keys(section: &Section<'_, '_>, asked: AskedKind) {
    for (key, owners) in OWNED {
        if let (Some(place), false) = (section.key_place(key), owners.contains(&asked)) {
            let message = format!("{} takes no {key}", with_article(asked));
            let owners: Vec<_> = owners.iter().map(|owner| shown_kind(*owner)).collect();
            let help = format!("{key} belongs to {}", owners.join(" or "));
            section.report.error(place, ValueError::new(message).help(help));
        }
    }
}

fn shown_kind(asked: AskedKind) -> String {
    match asked {
        AskedKind::File => "kind = \"file\"".to_owned(),
        AskedKind::Http => "kind = \"http\"".to_owned(),
        AskedKind::Dns => "kind = \"dns\"".to_owned(),
        AskedKind::Registry(kind) => format!("a registry of kind \"{}\"", kind.word()),
    }
}

fn with_article(asked: AskedKind) -> String {
    match asked {
        AskedKind::Registry(_) => shown_kind(asked),
        _ => format!("a source with {}", shown_kind(asked)),
    }
}

/// Reads the keys of the question. Returns `None` if a required key is missing or wrong.
fn question(
    section: &Section<'_, '_>,
    pool: &str,
    target: Target,
    files: NamedFiles<'_>,
) -> Option<SourceQuestion> {
    match target {
        Target::Kind(SourceKindKey::File) => {
            let path = required(section, "path", "\"/etc/tidegate/web.json\"", |text| {
                file_path(text).map_err(|_| not_a_file(text))
            });
            Some(SourceQuestion::File { path: path? })
        }
        Target::Kind(SourceKindKey::Http) => http(section, files),
        Target::Kind(SourceKindKey::Dns) => name(section).map(SourceQuestion::Dns),
        Target::Registry(registry, kind) => {
            let query = query(section, pool, kind)?;
            Some(SourceQuestion::Registry { registry, query })
        }
    }
}

fn not_a_file(text: &str) -> ValueError {
    ValueError::new(format!("{} is not a file path", shown(text)))
        .help("write the path of a JSON file, such as \"/etc/tidegate/web.json\"")
}

/// Reads a required text.
fn required<T>(
    section: &Section<'_, '_>,
    key: &'static str,
    example: &str,
    read: impl FnOnce(&str) -> Result<T, ValueError>,
) -> Option<T> {
    let field = section.text(key, "a string", read);
    if field.is_absent() && !section.misspells(key) {
        section.missing(key, example);
    }
    field.value()
}

fn http(section: &Section<'_, '_>, files: NamedFiles<'_>) -> Option<SourceQuestion> {
    let interval = section.duration("interval", "10s", INTERVALS).or(INTERVAL);
    let file = |key, content| named_file::read(section, key, content, files);
    let (ca_file, token_file) =
        (file("ca_file", FileContent::Certificates), file("token_file", FileContent::Secret));
    let url = required(section, "url", "\"https://HOST:PORT/PATH\"", url)?;
    if let (Some(place), false) = (section.key_place("ca_file"), url.tls) {
        let complaint = ValueError::new("ca_file has no effect: the URL is not https");
        section.report.error(place, complaint.help("write an https URL, or remove ca_file"));
    }
    let token_place = section.value_place("token_file");
    if let (Some(place), false) = (token_place, url.tls || url.loopback) {
        let complaint = ValueError::new("the token would go to another host without encryption");
        let help = "write an https URL";
        section.report.error(place, complaint.named("token_file").help(help));
    }
    let (ca_file, token_file) = (ca_file.value(), token_file.value());
    Some(SourceQuestion::Http { url: url.text, interval, ca_file, token_file })
}

fn name(section: &Section<'_, '_>) -> Option<NameQuestion> {
    let record = section.choice::<RecordKey>("record");
    let record_is_bad = record.is_bad();
    let family = section.choice("family").or(NameFamily::Both);
    let port = section.integer("port", 1..=u16::MAX);
    let name = required(section, "name", "\"db.internal.\"", |text| {
        question_name(text).map(|()| Arc::<str>::from(text))
    })?;
    let record = record_of(record.or(RecordKey::Auto), &name);
    if record == NameRecord::Address && port.is_absent() && !record_is_bad {
        section.missing("port", "8080, because A and AAAA records have no port");
    }
    Some(NameQuestion { name, record, port: port.value(), family })
}

/// Returns the records that are asked. The writer leaves out a `record` with the same result.
pub(crate) fn record_of(key: RecordKey, name: &str) -> NameRecord {
    match key {
        RecordKey::Auto if name.starts_with('_') => NameRecord::Srv,
        RecordKey::Auto | RecordKey::Address => NameRecord::Address,
        RecordKey::Srv => NameRecord::Srv,
    }
}

fn query(section: &Section<'_, '_>, pool: &str, kind: RegistryKind) -> Option<RegistryQuery> {
    match kind {
        RegistryKind::Consul => consul(section),
        RegistryKind::Etcd => {
            let prefix = section.text("prefix", "a string", prefix);
            let default = || default_prefix(pool).into();
            let prefix = if prefix.is_absent() { default() } else { prefix.value()? };
            Some(RegistryQuery::Etcd { prefix })
        }
        RegistryKind::Kubernetes => {
            let read = |text: &str| kubernetes_name(text).map(|()| Arc::<str>::from(text));
            let namespace = section.text("namespace", "a string", read).value();
            let port = kubernetes_port(section).value();
            let service = required(section, "service", "\"web\"", read)?;
            Some(RegistryQuery::Kubernetes { service, namespace, port })
        }
        RegistryKind::Zookeeper => {
            let format = section.choice("format").or(ZookeeperFormat::Json);
            let path = required(section, "path", "\"/services/web\"", znode)?;
            Some(RegistryQuery::Zookeeper { path, format })
        }
    }
}

fn consul(section: &Section<'_, '_>) -> Option<RegistryQuery> {
    let read = |text: &str| asked(text).map(|()| text.to_owned());
    let wants = ("a tag or a list of tags", "tags such as \"primary\"");
    let tags = any_number(section, "tags", wants, read);
    if let Some(beyond) = tags.get(TAGS_MAX) {
        let complaint = ValueError::new(format!("more than {TAGS_MAX} tags"));
        section.report.error(beyond.span(), complaint);
    }
    let optional = |key| section.text(key, "a string", read).value();
    let (datacenter, namespace, filter) =
        (optional("datacenter"), optional("namespace"), optional("filter"));
    let max_stale = section.duration("max_stale", "10s", TIME).or(MAX_STALE);
    let service = required(section, "service", "\"web\"", |text| {
        asked(text).map(|()| Arc::<str>::from(text))
    })?;
    let tags = tags.into_iter().map(Spanned::into_inner).collect();
    Some(RegistryQuery::Consul { service, tags, datacenter, namespace, filter, max_stale })
}

/// Returns the default of `prefix`.
pub(crate) fn default_prefix(pool: &str) -> String {
    format!("/tidegate/services/{pool}/")
}

fn prefix(text: &str) -> Result<Arc<str>, ValueError> {
    asked(text)?;
    if !text.ends_with('/') {
        let complaint = ValueError::new(format!("{} does not end with /", shown(text)));
        let help = format!(
            "write \"{}/\"; without it, \"{}2/a\" would count too",
            value::cut(text),
            value::cut(text)
        );
        return Err(complaint.help(help));
    }
    Ok(text.into())
}

/// Checks the path of a ZooKeeper node.
fn znode(text: &str) -> Result<Arc<str>, ValueError> {
    asked(text)?;
    let wrong = |why: &str| {
        ValueError::new(format!("{} {why}", shown(text)))
            .help("write the path of a node, such as \"/services/web\"")
    };
    let Some(parts) = text.strip_prefix('/') else {
        return Err(wrong("is not an absolute path"));
    };
    if parts.split('/').any(|part| part.is_empty() || part == "." || part == "..") {
        return Err(wrong("is not the path of a node"));
    }
    Ok(text.into())
}

/// Reads the name or the number of a port of a Kubernetes service.
fn kubernetes_port(section: &Section<'_, '_>) -> Field<Arc<str>> {
    match section.node("port").map(|node| node.get_ref()) {
        Some(DeValue::Integer(_)) => {
            section.integer("port", 1..=u16::MAX).map(|port| port.to_string().into())
        }
        _ => section.text("port", "the name or the number of a port", |text| {
            if text.bytes().all(|b| b.is_ascii_digit()) {
                return crate::address::port_number(text, text).map(|port| port.to_string().into());
            }
            kubernetes_name(text).map(|()| text.into())
        }),
    }
}

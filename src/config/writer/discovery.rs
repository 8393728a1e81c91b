//! The defaults of `[pool.NAME.discover]`, which depend on what it asks.
//!
//! Called by the writer of a pool. It never changes a model.

use toml::{Table, Value};

use crate::validate::{
    AskedKind, INTERVAL, MAX_STALE, RecordKey, default_prefix, guard_defaults, record_of,
};
use tidegate_core::model::{
    DiscoverSpec, NameFamily, RegistryQuery, SourceQuestion, ZookeeperFormat, show_duration,
};

/// Removes the keys that equal their default.
pub(super) fn leave_out_defaults(spec: &DiscoverSpec, pool: &str, discover: &mut Table) {
    let question = &spec.question;
    let guards = guard_defaults(AskedKind::of(question));
    let mut defaults =
        Table::try_from(guards).expect("every value of the guards has a form in TOML");
    defaults.insert("first_wait".to_owned(), show_duration(crate::validate::FIRST_WAIT).into());
    if let Some((key, default)) = question_default(question, pool) {
        defaults.insert(key.to_owned(), default);
    }
    if let SourceQuestion::Dns(name) = question {
        defaults.insert("family".to_owned(), word(NameFamily::Both));
        if record_of(RecordKey::Auto, &name.name) == name.record {
            defaults.insert("record".to_owned(), word(name.record));
        }
    }
    discover.retain(|key, value| defaults.get(key) != Some(value));
}

/// Returns the key of a question that has a default, and the default.
fn question_default(question: &SourceQuestion, pool: &str) -> Option<(&'static str, Value)> {
    match question {
        SourceQuestion::Http { .. } => Some(("interval", show_duration(INTERVAL).into())),
        SourceQuestion::Registry { query, .. } => match query {
            RegistryQuery::Consul { .. } => Some(("max_stale", show_duration(MAX_STALE).into())),
            RegistryQuery::Etcd { .. } => Some(("prefix", default_prefix(pool).into())),
            RegistryQuery::Zookeeper { .. } => Some(("format", word(ZookeeperFormat::Json))),
            RegistryQuery::Kubernetes { .. } => None,
        },
        SourceQuestion::File { .. } | SourceQuestion::Dns(_) => None,
    }
}

fn word<T: tidegate_core::model::Words>(value: T) -> Value {
    value.word().into()
}

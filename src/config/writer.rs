//! Writes a model as the text of a configuration file, without keys that equal their
//! default.
//!
//! Called by code that has a model and needs a file. It never opens a file and never
//! writes a secret: keys and lists of ranges stay in the files that the text names.

use std::fmt::Write;

use toml::{Table, Value};

use crate::validate::probe_times;
use tidegate_core::model::{Config, PoolConfig, ProbeSpec};

mod discovery;

/// A file with the fewest keys, in which the reader fills in every default.
const SPARSE: &str = r#"
[frontend.x]
bind = { address = "127.0.0.1:1", proxy_protocol = true }
proxy_protocol.from = "127.0.0.1"
pool = "x"
sources.deny = "127.0.0.1"
[pool.x]
probe.kind = "http"
heartbeat = {}
backend = [{ address = "127.0.0.1:2" }]
[pool.y]
probe = { kind = "send-expect", expect = "x" }
backend = [{ address = "127.0.0.1:2" }]
[pool.z]
probe.kind = "tcp"
backend = [{ address = "127.0.0.1:2" }]
[heartbeat]
listen = "127.0.0.1:1"
key = [{ id = 1, file = "x", pools = "x", addresses = "127.0.0.1" }]
[registry.x]
kind = "consul"
servers = "127.0.0.1:1"
"#;

/// Keys without a default, and keys with a default that depends on other keys.
const ALWAYS: [&str; 10] = [
    "from",
    "bind",
    "pool",
    "deny",
    "expect",
    "name",
    "address",
    "queue_timeout",
    "fast_interval",
    "timeout",
];

/// Tables that have an effect even if they are empty.
const EMPTY_MEANS: [&str; 3] = ["sources", "probe", "heartbeat"];

/// Keys with tables that are written inline.
const INLINE: [&str; 7] = ["bind", "expect", "headers", "proxy_protocol", "send", "steps", "tls"];

/// A placeholder for every name of a frontend or pool. No name has this character.
const ANY_NAME: &str = "*";

/// Returns the text of a configuration file with this model. Equal models give equal texts.
///
/// The model must be a result of [`crate::parse`] or [`crate::load`]. They read the text
/// as the same model if the files that it names have not changed.
pub fn write(config: &Config) -> String {
    let mut table = table_of(config);
    leave_out(&mut table, &defaults());
    for sources in tables_in(&mut table, "frontend").filter_map(|table| inner(table, "sources")) {
        let has = |key: &&str| sources.contains_key(*key);
        // The reader rejects a prefix length without a limit.
        if ["prefix_v4", "prefix_v6"].iter().any(has)
            && !["rate", "connections_max"].iter().any(has)
        {
            sources.insert("connections_max".to_owned(), Value::Integer(0));
        }
    }
    let mut text = String::new();
    write_tables(&mut text, "", &table);
    text
}

/// Returns every key with its value, except keys that equal a default that depends on
/// other keys.
fn table_of(config: &Config) -> Table {
    let mut table = Table::try_from(config).expect("every value of the model has a form in TOML");
    for (model, pool) in config.pools.iter().zip(tables_in(&mut table, "pool")) {
        if model.queue_timeout == model.default_queue_timeout() {
            pool.remove("queue_timeout");
        }
        if let (Some(spec), Some(probe)) = (&model.probe, inner(pool, "probe")) {
            leave_out_times(spec, probe);
            if spec.target.source == model.source {
                probe.remove("source");
            }
        }
        if let (Some(spec), Some(discover)) = (&model.discover, inner(pool, "discover")) {
            discovery::leave_out_defaults(spec, &model.name, discover);
        }
        backends(model, pool);
        if model.of.is_some() {
            // Copies of what the other pool has.
            pool.remove("backend");
            pool.remove("probe");
        }
    }
    table
}

/// Adds the backends whose address is a name. Removes names that equal the address.
fn backends(model: &PoolConfig, pool: &mut Table) {
    let Some(backends) = pool.get_mut("backend").and_then(Value::as_array_mut) else { return };
    let named = model.named.iter().map(Value::try_from);
    backends.extend(named.map(|named| named.expect("every named backend has a form in TOML")));
    for backend in backends {
        if let Value::Table(backend) = backend
            && backend.get("name") == backend.get("address")
        {
            backend.remove("name");
        }
    }
}

fn inner<'t>(table: &'t mut Table, key: &str) -> Option<&'t mut Table> {
    table.get_mut(key).and_then(Value::as_table_mut)
}

/// Returns the tables in the table under `key`, in order.
fn tables_in<'t>(table: &'t mut Table, key: &str) -> impl Iterator<Item = &'t mut Table> {
    let named = inner(table, key).into_iter().flat_map(|tables| tables.iter_mut());
    named.filter_map(|(_, value)| value.as_table_mut())
}

/// Removes the times that the reader derives from the others.
fn leave_out_times(spec: &ProbeSpec, probe: &mut Table) {
    let (fast, timeout) = (Some(spec.fast_interval), Some(spec.timeout));
    let candidates = [(None, None), (None, timeout), (fast, None)];
    let found = candidates.into_iter().find(|(fast, timeout)| {
        let times = probe_times(spec.interval, *fast, *timeout);
        times == (spec.fast_interval, spec.timeout)
    });
    if spec.down_interval == spec.interval {
        probe.remove("down_interval");
    }
    let (fast, timeout) = found.unwrap_or((fast, timeout));
    for (key, time) in [("fast_interval", fast), ("timeout", timeout)] {
        if time.is_none() {
            probe.remove(key);
        }
    }
}

/// Returns the defaults that the reader fills in, in the shape that [`leave_out`] needs.
fn defaults() -> Table {
    let sparse = crate::parse(SPARSE, "").expect("the sparse file is a good one");
    let mut defaults = table_of(&sparse);
    let (mut pool, mut probe) = (Table::new(), Table::new());
    for table in tables_in(&mut defaults, "pool") {
        probe.extend(inner(table, "probe").map(std::mem::take).unwrap_or_default());
        pool.extend(std::mem::take(table));
    }
    pool.insert("probe".to_owned(), probe.into());
    let frontend = tables_in(&mut defaults, "frontend").next().map(std::mem::take);
    let registry = tables_in(&mut defaults, "registry").next().map(std::mem::take);
    let mut registry = registry.unwrap_or_default();
    registry.retain(|key, _| !["kind", "servers"].contains(&key));
    let frontend = frontend.unwrap_or_default();
    for (key, table) in [("frontend", frontend), ("pool", pool), ("registry", registry)] {
        defaults
            .insert(key.to_owned(), Table::from_iter([(ANY_NAME.to_owned(), table.into())]).into());
    }
    // All keys of [heartbeat] are written.
    defaults.remove("heartbeat");
    defaults
}

/// Removes keys that equal their default, and empty tables and arrays.
fn leave_out(table: &mut Table, defaults: &Table) {
    table.retain(|key, value| {
        let default = defaults.get(key).or(defaults.get(ANY_NAME));
        match (value, default) {
            (Value::Table(table), Some(Value::Table(defaults))) => {
                leave_out(table, defaults);
                !table.is_empty() || EMPTY_MEANS.contains(&key)
            }
            (Value::Array(list), _) if list.is_empty() => false,
            (Value::Array(tables), Some(Value::Array(defaults))) if key == "backend" => {
                let defaults = defaults.first().and_then(Value::as_table);
                for (table, defaults) in tables.iter_mut().zip(std::iter::repeat(defaults)) {
                    if let (Value::Table(table), Some(defaults)) = (table, defaults) {
                        leave_out(table, defaults);
                    }
                }
                true
            }
            (value, default) => ALWAYS.contains(&key) || default != Some(value),
        }
    });
}

/// Writes the values of the `table` at `path`, then the tables in it.
fn write_tables(text: &mut String, path: &str, table: &Table) {
    for (key, value) in table.iter().filter(|(key, value)| !is_section(key, value)) {
        // Writing to a string cannot fail.
        let _ = writeln!(text, "{key} = {value}");
    }
    for (key, value) in table.iter().filter(|(key, value)| is_section(key, value)) {
        let key = if key.contains('.') { format!("\"{key}\"") } else { key.clone() };
        let path = if path.is_empty() { key } else { format!("{path}.{key}") };
        match value {
            Value::Table(table) => {
                if table.is_empty() || table.iter().any(|(key, value)| !is_section(key, value)) {
                    let _ = writeln!(text, "{}[{path}]", gap(text));
                }
                write_tables(text, &path, table);
            }
            value => {
                for table in value.as_array().into_iter().flatten().filter_map(Value::as_table) {
                    let _ = writeln!(text, "{}[[{path}]]", gap(text));
                    write_tables(text, &path, table);
                }
            }
        }
    }
}

/// Returns the empty line between two tables.
fn gap(before: &str) -> &'static str {
    if before.is_empty() { "" } else { "\n" }
}

/// Returns whether a value is written as a table with a header.
fn is_section(key: &str, value: &Value) -> bool {
    let has_header = match value {
        Value::Table(_) => true,
        Value::Array(list) => list.iter().all(Value::is_table),
        _ => false,
    };
    has_header && !INLINE.contains(&key)
}

#[cfg(test)]
mod tests;

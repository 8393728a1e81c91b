//! The model as the text of a configuration file.
//!
//! Called by any code that has a model and needs a file. Keys that are equal to their
//! default are left out. It opens no file and writes no secret: keys and lists of ranges
//! stay in the files that the text names.

use std::fmt::Write;

use toml::{Table, Value};

use crate::validate::probe_times;
use tidegate_core::model::{Config, ProbeSpec};

/// Files with as few keys as can be, in which the reader fills in every default.
const SPARSE: &str = r#"
[frontend.x]
bind = "127.0.0.1:1"
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
"#;

/// Keys without a default, and those whose default follows other keys.
const ALWAYS: [&str; 9] = [
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

/// Tables that mean something even when they are empty.
const EMPTY_MEANS: [&str; 3] = ["sources", "probe", "heartbeat"];

/// Keys of which tables are written as values.
const INLINE: [&str; 2] = ["bind", "expect"];

/// Stands for every name of a frontend or pool; no name has this character.
const ANY_NAME: &str = "*";

/// The text of a configuration file with this model. One model has one text.
///
/// [`crate::parse`] and [`crate::load`] read the text as the same model, provided the files
/// that the text names still hold the same. The model is one that they returned.
pub fn write(config: &Config) -> String {
    let mut table = table_of(config);
    leave_out(&mut table, &defaults());
    for sources in tables_in(&mut table, "frontend").filter_map(|table| inner(table, "sources")) {
        let has = |key: &&str| sources.contains_key(*key);
        // The reader wants a limit beside a length of prefix.
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

/// Every key with its value, without those whose default follows other keys where they are
/// equal to it.
fn table_of(config: &Config) -> Table {
    let mut table = Table::try_from(config).expect("every value of the model has a form in TOML");
    for (spec, pool) in config.pools.iter().zip(tables_in(&mut table, "pool")) {
        if spec.queue_timeout == spec.connect_timeout {
            pool.remove("queue_timeout");
        }
        if let (Some(spec), Some(probe)) = (&spec.probe, inner(pool, "probe")) {
            leave_out_times(spec, probe);
        }
        for backend in pool.get_mut("backend").and_then(Value::as_array_mut).into_iter().flatten() {
            if let Value::Table(backend) = backend
                && backend.get("name") == backend.get("address")
            {
                backend.remove("name");
            }
        }
    }
    table
}

fn inner<'t>(table: &'t mut Table, key: &str) -> Option<&'t mut Table> {
    table.get_mut(key).and_then(Value::as_table_mut)
}

/// The tables in the table under `key`, in order.
fn tables_in<'t>(table: &'t mut Table, key: &str) -> impl Iterator<Item = &'t mut Table> {
    let named = inner(table, key).into_iter().flat_map(|tables| tables.iter_mut());
    named.filter_map(|(_, value)| value.as_table_mut())
}

/// Leaves out those times that the reader finds by the others.
fn leave_out_times(spec: &ProbeSpec, probe: &mut Table) {
    let (fast, timeout) = (Some(spec.fast_interval), Some(spec.timeout));
    let ways = [(None, None), (None, timeout), (fast, None)];
    let found = ways.into_iter().find(|(fast, timeout)| {
        let times = probe_times(spec.interval, *fast, *timeout);
        times == (spec.fast_interval, spec.timeout)
    });
    let (fast, timeout) = found.unwrap_or((fast, timeout));
    for (key, time) in [("fast_interval", fast), ("timeout", timeout)] {
        if time.is_none() {
            probe.remove(key);
        }
    }
}

/// What the reader fills in, as [`write`] looks it up.
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
    for (key, table) in [("frontend", frontend.unwrap_or_default()), ("pool", pool)] {
        defaults
            .insert(key.to_owned(), Table::from_iter([(ANY_NAME.to_owned(), table.into())]).into());
    }
    // Each of its keys is written.
    defaults.remove("heartbeat");
    defaults
}

/// Removes what is equal to its default, and what is empty.
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

/// `table` at `path`: its values first, then the tables in it.
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

/// An empty line between two tables.
fn gap(before: &str) -> &'static str {
    if before.is_empty() { "" } else { "\n" }
}

/// Whether a value has a header of its own.
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

//! The JSON Schema (2020-12) of a configuration file, for editors.
//!
//! Made from the table of keys, which tests compare with the reader. Called by `tidegate schema`.
//! It describes single values: types, words, bounds of numbers. It describes no rules between
//! keys, and bounds of durations and sizes only in words: `tidegate check` enforces those.

mod forms;

use crate::defaults;
use crate::keys::{Applies, ConfigKey, DefaultValue, KeyTable, TABLES, Values, plain};
use crate::value::NAME_CHARS_MAX;
use serde_json::{Map, Value, json};

const DIALECT: &str = "https://json-schema.org/draft/2020-12/schema";

/// A number with a unit, once or several times.
const TIME: &str = "(\\s*[0-9]+\\s*[a-zA-Zµ]+)+\\s*";

const SIZE: &str = "[0-9]+(B|KiB|MiB|GiB|TiB)";

/// Required keys that a file can leave out after all: Kubernetes needs no `servers`.
const SOMETIMES_REQUIRED: [(&str, &str); 1] = [("[registry.NAME]", "servers")];

/// Returns the schema.
pub fn schema() -> Value {
    let mut properties = children("");
    properties.insert(
        "include".to_owned(),
        json!({
            "description": "Files that belong to this configuration: a pattern, or a list of patterns.",
            "anyOf": [{ "type": "string" }, { "type": "array", "items": { "type": "string" } }],
        }),
    );
    properties.insert("defaults".to_owned(), of_defaults());
    json!({
        "$schema": DIALECT,
        "title": "Configuration of Tidegate",
        "type": "object",
        "properties": properties,
        "additionalProperties": false,
    })
}

/// `[defaults.frontend]`, `[defaults.pool]`, `[defaults.probe]`: the keys of those sections that
/// are not of one section only. None is required.
fn of_defaults() -> Value {
    let mut tables = Map::new();
    for (name, header, own) in [
        ("frontend", "[frontend.NAME]", defaults::FRONTEND_OWN),
        ("pool", "[pool.NAME]", defaults::POOL_OWN),
        ("probe", "[pool.NAME.probe]", &[]),
    ] {
        let mut table = section(header.trim_matches(['[', ']']));
        if let Some(properties) = table.get_mut("properties").and_then(Value::as_object_mut) {
            properties.retain(|key, _| !own.contains(&&**key));
        }
        if let Some(table) = table.as_object_mut() {
            table.remove("required");
            let about = format!("Values for every `{header}` that does not set them.");
            table.insert("description".to_owned(), about.into());
        }
        tables.insert(name.to_owned(), table);
    }
    json!({ "type": "object", "properties": tables, "additionalProperties": false })
}

/// The path of a table without brackets: `pool.NAME.backend`.
fn path(table: &KeyTable) -> &'static str {
    table.header.trim_matches(['[', ']'])
}

/// The tables directly below a path, by their names.
fn children(above: &str) -> Map<String, Value> {
    let mut found = Map::new();
    for table in TABLES.iter().filter(|table| table.header.starts_with('[')) {
        let start = if above.is_empty() { String::new() } else { format!("{above}.") };
        let Some(rest) = path(table).strip_prefix(&start) else { continue };
        let name = rest.split('.').next().unwrap_or(rest);
        if found.contains_key(name) {
            continue;
        }
        let one = section(&format!("{start}{name}"));
        let list = table.header.starts_with("[[") && name == rest;
        let value = if list { json!({ "type": "array", "items": one }) } else { one };
        found.insert(name.to_owned(), value);
    }
    found
}

/// The table with this path, with the tables below it.
fn section(at: &str) -> Value {
    let mut below = children(at);
    if let Some(named) = below.remove("NAME") {
        return json!({
            "type": "object",
            "patternProperties": { name_pattern(): named },
            "additionalProperties": false,
        });
    }
    let table = TABLES.iter().find(|table| table.header.starts_with('[') && path(table) == at);
    object(table, below)
}

/// An inline table, such as an element of `bind`.
fn inline(header: &str) -> Value {
    object(TABLES.iter().find(|table| table.header == header), Map::new())
}

fn object(table: Option<&KeyTable>, mut properties: Map<String, Value>) -> Value {
    let mut required = Vec::new();
    let keys = table.map_or(&[][..], |table| table.keys);
    let header = table.map_or("", |table| table.header);
    for key in keys {
        let value = of_key(header, key);
        let value = match properties.remove(key.name) {
            Some(table) => {
                json!({ "description": value["description"], "anyOf": [value, table] })
            }
            None => value,
        };
        properties.insert(key.name.to_owned(), value);
        let needed = matches!(key.default, DefaultValue::Required);
        if needed && !SOMETIMES_REQUIRED.contains(&(header, key.name)) {
            required.push(key.name);
        }
    }
    let mut schema = json!({
        "type": "object",
        "properties": properties,
        "additionalProperties": false,
    });
    if let (Some(table), Some(schema)) = (table, schema.as_object_mut()) {
        schema.insert("description".to_owned(), plain(table.about).into());
        if !required.is_empty() {
            schema.insert("required".to_owned(), required.into());
        }
    }
    schema
}

/// The value of one key with its description and default.
fn of_key(header: &str, key: &ConfigKey) -> Value {
    let mut schema = match values(key.values) {
        Some(schema) => schema,
        None => forms::form(header, key),
    };
    let Some(schema_of) = schema.as_object_mut() else { return schema };
    let mut text = format!(
        "{}\n\nValues: {}. Default: {}.",
        key.about,
        key.values.describe(),
        key.default.describe()
    );
    if key.applies == Applies::Restart {
        text.push_str(" A new value needs a restart or an upgrade.");
    }
    schema_of.insert("description".to_owned(), plain(&text).into());
    if let DefaultValue::Value(value) = key.default
        && let Some(value) = json_of(value)
    {
        schema_of.insert("default".to_owned(), value);
    }
    schema
}

/// Values that the table of keys has as data; `None` for forms in words.
fn values(values: Values) -> Option<Value> {
    let time = |start: &str| json!({ "type": "string", "pattern": format!("^{start}{TIME}$") });
    let integer = |min: u64, max: u64| json!({ "type": "integer", "minimum": min, "maximum": max });
    Some(match values {
        Values::Flag => json!({ "type": "boolean" }),
        Values::Words(words) => json!({ "enum": words() }),
        Values::Integer(min, max) => integer(min, max),
        Values::WordOrInteger(word, min, max) => {
            json!({ "anyOf": [{ "enum": [word] }, integer(min, max)] })
        }
        Values::Time(..) => time(""),
        Values::WordOrTime(word, start, ..) => {
            json!({ "anyOf": [{ "enum": [word] }, time(start)] })
        }
        Values::Size(..) => json!({ "type": "string", "pattern": format!("^{SIZE}$") }),
        Values::Share => json!({ "type": "string", "pattern": "^0*([0-9]{1,2}|100)%$" }),
        Values::Form(_) => return None,
    })
}

/// Names of frontends, pools and registries.
fn name_pattern() -> String {
    format!("^[A-Za-z0-9._-]{{1,{NAME_CHARS_MAX}}}$")
}

/// A value of the table of keys, which is TOML.
fn json_of(value: &str) -> Option<Value> {
    let table: toml::Table = toml::from_str(&format!("v = {value}")).ok()?;
    serde_json::to_value(table.get("v")?).ok()
}

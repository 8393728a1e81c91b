//! The common model that every reader fills: frontends, pools, backends, timeouts and checks,
//! each with its source lines.
//!
//! Filled by the readers, converted to TOML by `write`. Values are TOML already.

use crate::report::SourceLine;
use std::collections::HashSet;

/// Longest name of a frontend, a pool or a backend.
const NAME_MAX: usize = 64;

/// A configuration in the making.
#[derive(Debug, Default)]
pub(crate) struct Draft {
    pub(crate) process: DraftKeys,
    pub(crate) log: DraftKeys,
    pub(crate) dns: DraftKeys,
    pub(crate) frontends: Vec<DraftFrontend>,
    pub(crate) pools: Vec<DraftPool>,
}

/// Keys of one table, with TOML values.
#[derive(Debug, Default, Clone)]
pub(crate) struct DraftKeys(pub(crate) Vec<DraftKey>);

/// One key.
#[derive(Debug, Clone)]
pub(crate) struct DraftKey {
    pub(crate) name: &'static str,
    pub(crate) value: String,
    pub(crate) at: Vec<SourceLine>,
}

/// `[frontend.NAME]`
#[derive(Debug, Default)]
pub(crate) struct DraftFrontend {
    pub(crate) name: String,
    pub(crate) at: Vec<SourceLine>,
    /// Elements of `bind`: TOML strings or tables.
    pub(crate) binds: Vec<(String, SourceLine)>,
    pub(crate) pool: String,
    pub(crate) keys: DraftKeys,
    pub(crate) sources: DraftKeys,
    /// Binds that read a PROXY header.
    pub(crate) accept_proxy: Vec<SourceLine>,
    /// TOML list of the clients that send a PROXY header; empty: none.
    pub(crate) proxy: String,
    pub(crate) routes: Vec<DraftRoute>,
}

/// `[[frontend.NAME.route]]`
#[derive(Debug, Default)]
pub(crate) struct DraftRoute {
    pub(crate) at: Vec<SourceLine>,
    /// Conditions.
    pub(crate) keys: DraftKeys,
    /// The pool; `None` refuses.
    pub(crate) pool: Option<String>,
}

/// `[pool.NAME]`
#[derive(Debug, Default)]
pub(crate) struct DraftPool {
    pub(crate) name: String,
    pub(crate) at: Vec<SourceLine>,
    pub(crate) keys: DraftKeys,
    /// Empty: no probes.
    pub(crate) probe: DraftKeys,
    pub(crate) ejection: DraftKeys,
    pub(crate) backends: Vec<DraftBackend>,
}

/// `[[pool.NAME.backend]]`
#[derive(Debug, Default)]
pub(crate) struct DraftBackend {
    pub(crate) name: String,
    pub(crate) address: String,
    pub(crate) at: Vec<SourceLine>,
    pub(crate) keys: DraftKeys,
}

/// Names that are in use.
#[derive(Debug, Default)]
pub(crate) struct UsedNames(HashSet<String>);

// === impl DraftKeys ===

impl DraftKeys {
    /// Sets a key. A later value replaces an earlier one.
    pub(crate) fn set(&mut self, name: &'static str, value: impl Into<String>, at: &[SourceLine]) {
        self.0.retain(|key| key.name != name);
        self.0.push(DraftKey { name, value: value.into(), at: at.to_vec() });
    }

    pub(crate) fn get(&self, name: &str) -> Option<&str> {
        self.0.iter().find(|key| key.name == name).map(|key| &*key.value)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

// === impl UsedNames ===

impl UsedNames {
    /// Returns a valid name that is like `wish` and not in use.
    pub(crate) fn take(&mut self, wish: &str) -> String {
        let base = valid_name(wish);
        let mut name = base.clone();
        let mut number = 2;
        while !self.0.insert(name.clone()) {
            let suffix = format!("-{number}");
            name = base.chars().take(NAME_MAX - suffix.len()).collect::<String>() + &suffix;
            number += 1;
        }
        name
    }
}

/// Replaces what a name cannot have.
pub(crate) fn valid_name(wish: &str) -> String {
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    let name: String =
        wish.chars().map(|c| if allowed(c) { c } else { '-' }).take(NAME_MAX).collect();
    let trimmed = name.trim_matches('-');
    match trimmed.chars().all(|c| c == '.') {
        true => "unnamed".to_owned(),
        false => trimmed.to_owned(),
    }
}

/// Returns a TOML basic string.
pub(crate) fn quoted(text: &str) -> String {
    let mut out = String::with_capacity(text.len() + 2);
    out.push('"');
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            c if c.is_control() => out.push_str(&format!("\\u{:04X}", c as u32)),
            c => out.push(c),
        }
    }
    out.push('"');
    out
}

/// Returns a TOML list of strings.
pub(crate) fn quoted_list<'a>(texts: impl IntoIterator<Item = &'a str>) -> String {
    let items: Vec<String> = texts.into_iter().map(quoted).collect();
    format!("[{}]", items.join(", "))
}

//! Keys of Tidegate that a reader uses only if the configuration has them.
//!
//! The readers ask here before they write such a key. Without it, the line of the source is
//! NOT POSSIBLE, or approximated if another key does nearly the same.

use tidegate_config::keys::{self, ConfigKey, Values};

/// What the configuration can express.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Available {
    /// `when_none_eligible = "wait"`
    pub(crate) wait: bool,
    /// `on_down`
    pub(crate) on_down: bool,
    /// `backups = "one"`
    pub(crate) backups: bool,
    /// `[pool.NAME] proxy_protocol`
    pub(crate) proxy_out: bool,
    /// `[frontend.NAME.proxy_protocol]`, and `proxy_protocol` of a bind.
    pub(crate) proxy_in: bool,
    /// `kind = "mysql"`
    pub(crate) mysql: bool,
    /// `kind = "postgres"`
    pub(crate) postgres: bool,
    /// `kind = "smtp"`
    pub(crate) smtp: bool,
}

impl Available {
    /// Looks into the table of keys.
    pub(crate) fn now() -> Self {
        let kind = |word| takes("[pool.NAME.probe]", "kind", word);
        Available {
            wait: takes("[pool.NAME]", "when_none_eligible", "wait"),
            on_down: key("[pool.NAME]", "on_down").is_some(),
            backups: takes("[pool.NAME]", "backups", "one"),
            proxy_out: key("[pool.NAME]", "proxy_protocol").is_some(),
            proxy_in: key("[frontend.NAME.proxy_protocol]", "from").is_some(),
            mysql: kind("mysql"),
            postgres: kind("postgres"),
            smtp: kind("smtp"),
        }
    }
}

fn key(table: &str, key: &str) -> Option<&'static ConfigKey> {
    let table = keys::TABLES.iter().find(|one| one.header == table)?;
    table.keys.iter().find(|one| one.name == key)
}

/// Returns true if the key has this word.
fn takes(table: &str, name: &str, word: &str) -> bool {
    match key(table, name).map(|key| key.values) {
        Some(Values::Words(words)) => words().contains(&word),
        Some(Values::Form(form)) => form.contains(&format!("\"{word}\"")),
        _ => false,
    }
}

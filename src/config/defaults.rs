//! `[defaults.frontend]`, `[defaults.pool]` and `[defaults.probe]`: values for sections that
//! do not set them.
//!
//! Created by `validate`, read by `file` for each key that a section does not have. It reports
//! keys that cannot be defaults, and keys that no section takes.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::ops::Range;

use toml::de::DeTable;

use super::diagnose::ProblemCollector;
use super::file::{Section, ValueNode};
use super::value::{ValueError, did_you_mean_or, shown};

/// The defaults of a file.
pub(super) struct Defaults<'r, 'a> {
    pub(super) frontend: SectionDefaults<'r, 'a>,
    pub(super) pool: SectionDefaults<'r, 'a>,
    pub(super) probe: SectionDefaults<'r, 'a>,
}

/// The defaults of all sections of one kind.
pub(super) struct SectionDefaults<'r, 'a> {
    /// `None`: the file has no such table.
    table: Option<&'r DeTable<'a>>,
    header: Range<usize>,
    kind: DefaultsKind,
    /// The keys that the sections have read.
    known: RefCell<BTreeSet<&'static str>>,
    /// The keys that a section has taken from here.
    taken: RefCell<BTreeSet<&'static str>>,
}

/// Which sections take the defaults.
struct DefaultsKind {
    key: &'static str,
    /// The sections, for messages.
    sections: &'static str,
    /// Keys that belong to one section.
    own: &'static [&'static str],
}

/// Keys that belong to one frontend.
pub(super) const FRONTEND_OWN: &[&str] = &["bind", "enabled", "pool", "route", "sources"];

/// Keys that belong to one pool.
pub(super) const POOL_OWN: &[&str] = &["backend", "discover", "heartbeat", "of", "probe", "role"];

const FRONTEND: DefaultsKind =
    DefaultsKind { key: "frontend", sections: "[frontend.NAME]", own: FRONTEND_OWN };
const POOL: DefaultsKind = DefaultsKind { key: "pool", sections: "[pool.NAME]", own: POOL_OWN };
const PROBE: DefaultsKind = DefaultsKind { key: "probe", sections: "[pool.NAME.probe]", own: &[] };

// === impl Defaults ===

impl<'r, 'a> Defaults<'r, 'a> {
    pub(super) fn read(top: &Section<'r, 'a>) -> Defaults<'r, 'a> {
        let section = top.table("defaults", "[defaults]".to_owned());
        let of = |kind: DefaultsKind| SectionDefaults::read(section.as_ref(), kind);
        let defaults = Defaults { frontend: of(FRONTEND), pool: of(POOL), probe: of(PROBE) };
        if let Some(section) = section {
            section.finish();
        }
        defaults
    }

    /// Reports keys without effect. Must be called after all sections were read.
    pub(super) fn finish(self, report: &ProblemCollector<'_>) {
        for one in [self.frontend, self.pool, self.probe] {
            one.finish(report);
        }
    }
}

// === impl SectionDefaults ===

impl<'r, 'a> SectionDefaults<'r, 'a> {
    fn read(defaults: Option<&Section<'r, 'a>>, kind: DefaultsKind) -> SectionDefaults<'r, 'a> {
        let label = format!("[defaults.{}]", kind.key);
        let section = defaults.and_then(|defaults| defaults.table(kind.key, label));
        let header = section.as_ref().map_or(0..0, |section| section.header.clone());
        let table = section.map(|section| section.keys());
        SectionDefaults {
            table,
            header,
            kind,
            known: RefCell::default(),
            taken: RefCell::default(),
        }
    }

    /// Returns the default of a key.
    pub(super) fn node(&self, key: &'static str) -> Option<&'r ValueNode<'a>> {
        self.table?.get(key).filter(|_| !self.kind.own.contains(&key))
    }

    /// Notes the keys that a section has read, and those that it has taken from here.
    pub(super) fn note(&self, known: &[&'static str], taken: &[&'static str]) {
        if self.table.is_some() {
            self.known.borrow_mut().extend(known);
            self.taken.borrow_mut().extend(taken);
        }
    }

    fn finish(self, report: &ProblemCollector<'_>) {
        let Some(table) = self.table else { return };
        let DefaultsKind { key: kind, sections, own } = self.kind;
        let (known, taken) = (self.known.into_inner(), self.taken.into_inner());
        if known.is_empty() {
            let message = format!("[defaults.{kind}] has no effect: the file has no {sections}");
            return report.error(self.header, ValueError::new(message));
        }
        for key in table.keys() {
            let name = key.get_ref().as_ref();
            let complaint = if own.contains(&name) {
                ValueError::new(format!("{name} cannot be a default"))
                    .help(format!("write it in {sections}"))
            } else if !known.contains(name) {
                let complaint =
                    ValueError::new(format!("unknown key {} in [defaults.{kind}]", shown(name)));
                let candidates = known.iter().copied().filter(|key| !own.contains(key));
                complaint.help(did_you_mean_or(name, candidates.clone(), || {
                    format!("known here: {}", candidates.collect::<Vec<_>>().join(", "))
                }))
            } else if !taken.contains(name) {
                ValueError::new(format!("this default has no effect: no {sections} takes it"))
            } else {
                continue;
            };
            report.error(key.span(), complaint);
        }
    }
}

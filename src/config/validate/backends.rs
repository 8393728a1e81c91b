//! `[[pool.NAME.backend]]`: the backends of a pool, by address and by name.
//!
//! Called by `pool`. It never resolves a name.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::hash::Hash;
use std::ops::Range;
use std::sync::Arc;

use toml::Spanned;

use super::{CONNECTIONS_MAX, tiers};
use crate::Spot;
use crate::address::{self, BackendPlace};
use crate::file::{Field, Section};
use crate::value::{self, ValueError, shown};
use tidegate_core::model::{BackendConfig, NameQuestion, NamedBackend, SourceKey, WEIGHT_MAX};

/// The backends of one pool.
#[derive(Default)]
pub(super) struct BackendsRead {
    pub(super) backends: Vec<BackendConfig>,
    /// Place of each address; as many as `backends`.
    pub(super) address_places: Vec<Range<usize>>,
    pub(super) named: Vec<NamedBackend>,
    /// Place of each name; as many as `named`.
    pub(super) name_places: Vec<Range<usize>>,
}

/// Reads the backends. Returns those with a valid address.
pub(super) fn read(pool: &Section<'_, '_>, pool_name: &str, may_be_empty: bool) -> BackendsRead {
    let label = format!("pool.{}.backend", value::cut(pool_name));
    let sections = pool.array_of_tables("backend", &label);
    let given = pool.key_place("backend").is_some();
    let misspelled = !given && (pool.misspells("backend") || pool.misspells("discover"));
    if !may_be_empty && !misspelled && (!given || (sections.is_empty() && is_empty_array(pool))) {
        let place = pool.key_place("backend").unwrap_or_else(|| pool.header.clone());
        let complaint = ValueError::new(format!("pool {} has no backend", shown(pool_name)));
        pool.report
            .error(place, complaint.help(format!("add [[{label}]] with address = \"IP:PORT\"")));
    }
    let mut seen = SeenBackends::default();
    let mut read = BackendsRead::default();
    for section in sections {
        backend(section, pool_name, &mut seen, &mut read);
    }
    let none = read.backends.is_empty() && read.named.is_empty();
    if !may_be_empty && none && seen.disabled > 0 {
        let message = format!("every backend of pool {} is disabled", shown(pool_name));
        let help = "a pool needs a backend; to keep one out of rotation, drain it";
        pool.report.error(pool.header.clone(), ValueError::new(message).help(help));
    }
    let tiers = read.backends.iter().map(|backend| backend.tier);
    let mut tiers = tiers.chain(read.named.iter().map(|named| named.tier)).peekable();
    // A source can announce primaries.
    if !may_be_empty && tiers.peek().is_some() && tiers.all(|tier| tier > 0) {
        let message = format!("every backend of pool {} is a backup", shown(pool_name));
        pool.report.warning(pool.header.clone(), ValueError::new(message));
    }
    read
}

fn is_empty_array(pool: &Section<'_, '_>) -> bool {
    let array = pool.node("backend").and_then(|node| node.get_ref().as_array());
    array.is_some_and(|array| array.is_empty())
}

/// Names and addresses of the backends of one pool that were read before, with their
/// places.
#[derive(Default)]
struct SeenBackends {
    names: HashMap<Arc<str>, Range<usize>>,
    addresses: HashMap<BackendPlace, Range<usize>>,
    /// Number of backends with `enabled = false`.
    disabled: usize,
}

fn backend(section: Section<'_, '_>, pool: &str, seen: &mut SeenBackends, read: &mut BackendsRead) {
    let name =
        section.text("name", "a string", |text| value::name(text).map(|()| Arc::<str>::from(text)));
    let address =
        section.text("address", "an address such as \"10.0.0.1:8080\"", address::backend_place);
    if address.is_absent() {
        section.missing("address", "\"IP:PORT\"");
    }
    let enabled = section.boolean("enabled").or(true);
    let weight = section.integer("weight", 1..=WEIGHT_MAX).or(1);
    let tier = tiers::of_backend(&section);
    let connections_max = section.integer("connections_max", 0..=CONNECTIONS_MAX);
    section.report.limit("connections_max of this backend", &connections_max);
    let connections_max = connections_max.or(0);
    seen.disabled += usize::from(!enabled);
    if let Field::Good(name) = &name {
        seen.name(&section, name);
    }
    if let Field::Good(address) = &address {
        seen.address(&section, address);
    }
    if let Field::Good(address) = address {
        let place = address.span();
        let address = address.into_inner();
        // A given name has neither a colon nor an @. So it is never equal to a default name,
        // and never to NAME@IP:PORT, the name of a member of a named backend.
        let name = name.good().map_or_else(|| address.to_string().into(), Spanned::into_inner);
        match address {
            _ if !enabled => {}
            BackendPlace::Address(address) => {
                read.backends.push(BackendConfig { name, address, weight, tier, connections_max });
                read.address_places.push(place);
            }
            BackendPlace::Name(question) => {
                let key = SourceKey { pool: pool.into(), backend: Some(Arc::clone(&name)) };
                section.report.keep(Spot::MemberSource(key), Some(place.clone()));
                let named = NamedBackend { name, question, weight, tier, connections_max };
                read.named.push(named);
                read.name_places.push(place);
            }
        }
    }
    section.finish();
}

// === impl SeenBackends ===

impl SeenBackends {
    fn name(&mut self, section: &Section<'_, '_>, name: &Spanned<Arc<str>>) {
        if let Some(first) = earlier(&mut self.names, name.get_ref().clone(), name.span()) {
            section.report.error_with(name.span(), || {
                let (name, first) = (shown(name.get_ref()), section.report.place_name(first));
                ValueError::new(format!("backend name {name} is already used at {first}"))
            });
        }
    }

    fn address(&mut self, section: &Section<'_, '_>, address: &Spanned<BackendPlace>) {
        let key = without_case(address.get_ref());
        if let Some(first) = earlier(&mut self.addresses, key, address.span()) {
            section.report.error_with(address.span(), || {
                let (address, first) = (address.get_ref(), section.report.place_name(first));
                ValueError::new(format!("backend address {address} is already used at {first}"))
                    .help("give one backend a larger weight instead")
            });
        }
    }
}

/// Returns the place in lower case, because DNS ignores the case of names.
fn without_case(place: &BackendPlace) -> BackendPlace {
    match place {
        BackendPlace::Address(_) => place.clone(),
        BackendPlace::Name(question) => BackendPlace::Name(NameQuestion {
            name: question.name.to_ascii_lowercase().into(),
            ..question.clone()
        }),
    }
}

/// Returns the place of an equal value that was read before.
fn earlier<T: Eq + Hash>(
    seen: &mut HashMap<T, Range<usize>>,
    value: T,
    place: Range<usize>,
) -> Option<&Range<usize>> {
    match seen.entry(value) {
        Entry::Occupied(first) => Some(first.into_mut()),
        Entry::Vacant(free) => {
            free.insert(place);
            None
        }
    }
}

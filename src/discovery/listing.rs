//! The JSON form of a list of members, and of one member.
//!
//! The file and HTTP sources read lists. The values of etcd and the nodes of ZooKeeper hold one
//! member each, with the same keys.
//!
//! ```json
//! [
//!   "10.0.0.1:8080",
//!   {"address": "10.0.0.2:8080", "name": "b", "weight": 5, "state": "draining",
//!    "backup": true, "labels": {"zone": "a"}}
//! ]
//! ```
//!
//! The decoder is pure. An unknown key, a wrong value or a repeated name makes the whole
//! list unreadable: a list that is partly read would remove members that its author still
//! lists. A prefix of a list is never a list, so an incomplete file is never a shorter one.

#[cfg(any(test, fuzzing))]
pub mod fuzz;

use serde::Deserialize;
use serde::de::{self, Deserializer, MapAccess, SeqAccess, Visitor};
use std::cell::Cell;
use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::net::SocketAddr;
use std::sync::{Arc, LazyLock};
use tidegate_core::control::MEMBERS_MAX;
use tidegate_core::discovery::labels::MemberLabels;
use tidegate_core::discovery::view::canonical;
use tidegate_core::discovery::{Announced, Wish};
use tidegate_core::model::TIER_MAX;

/// Longest name of a member, in bytes.
pub const LISTED_NAME_BYTES_MAX: usize = 128;

/// Most labels of a member, and the longest key or value in bytes.
pub const LABELS_MAX: usize = 32;
const LABEL_BYTES_MAX: usize = 256;

/// Why a list or a member cannot be read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListingProblem {
    /// Number of the entry, from 1; `None`: the list itself, or one member.
    pub entry: Option<usize>,
    /// From 1; 0 if the fault has no place in the text.
    pub line: usize,
    /// In bytes, from 1.
    pub column: usize,
    /// What is wrong, and the values that are right.
    pub message: String,
}

/// Reads a list. An empty list is a list.
///
/// # Errors
/// Any entry is unreadable, names or addresses repeat, or the list has more than
/// [`MEMBERS_MAX`] entries.
pub fn decode_list(bytes: &[u8]) -> Result<Vec<Announced>, ListingProblem> {
    let entry = Cell::new(0);
    let mut json = serde_json::Deserializer::from_slice(bytes);
    let read = json.deserialize_seq(ListVisitor { entry: &entry });
    let members = read.and_then(|members| json.end().map(|()| members)).map_err(|error| {
        let entry = Some(entry.get()).filter(|number| *number > 0);
        ListingProblem::of(&error, entry)
    })?;
    refuse_repeated(&members)?;
    Ok(members)
}

/// Reads one member. `name` is used if the value has none; it is the name of a key or a node.
///
/// # Errors
/// The value is unreadable, or `name` is needed and cannot be the name of a member.
pub fn decode_member(bytes: &[u8], name: &str) -> Result<Announced, ListingProblem> {
    let read: Result<ListedEntry, _> = serde_json::from_slice(bytes);
    let entry = read.map_err(|error| ListingProblem::of(&error, None))?;
    if entry.0.name.is_none() {
        let problem = |message| ListingProblem { entry: None, line: 0, column: 0, message };
        check_name(name).map_err(problem)?;
    }
    Ok(entry.0.announced(Some(name)))
}

/// Returns what is wrong with the name of a member.
pub(crate) fn check_name(name: &str) -> Result<(), String> {
    if name.is_empty() || name.len() > LISTED_NAME_BYTES_MAX {
        return Err(format!("name has {} bytes; 1 to 128 are possible", name.len()));
    }
    if name.contains(|c: char| c.is_control() || c.is_whitespace() || c == '/') {
        return Err(format!("name {name:?} contains a space, a control character or \"/\""));
    }
    Ok(())
}

fn refuse_repeated(members: &[Announced]) -> Result<(), ListingProblem> {
    let mut names = HashMap::with_capacity(members.len());
    let mut addresses = HashMap::with_capacity(members.len());
    for (number, member) in (1..).zip(members) {
        let repeated = |what: &str, first: usize| ListingProblem {
            entry: Some(number),
            line: 0,
            column: 0,
            message: format!("{what} is also in entry {first}"),
        };
        if let Some(first) = names.insert(&member.name, number) {
            return Err(repeated(&format!("name {:?}", member.name), first));
        }
        if let Some(first) = addresses.insert(member.address, number) {
            return Err(repeated(&format!("address {}", member.address), first));
        }
    }
    Ok(())
}

// === decoding ===

/// The keys of an entry.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct ListedKeys {
    address: ListedAddress,
    name: Option<ListedName>,
    weight: Option<ListedWeight>,
    #[serde(default)]
    state: ListedState,
    backup: Option<bool>,
    tier: Option<ListedTier>,
    #[serde(default)]
    labels: ListedLabels,
}

/// Keys, or a text with the address.
#[derive(Debug)]
struct ListedEntry(ListedKeys);

/// The address of one host and a port other than 0, as `IP:PORT`.
#[derive(Debug, Deserialize)]
#[serde(try_from = "String")]
struct ListedAddress(SocketAddr);

#[derive(Debug, Deserialize)]
#[serde(try_from = "String")]
struct ListedName(Arc<str>);

#[derive(Debug, Deserialize)]
#[serde(try_from = "u64")]
struct ListedWeight(u16);

/// 0..=[`TIER_MAX`].
#[derive(Debug, Deserialize)]
#[serde(try_from = "u64")]
struct ListedTier(u8);

/// Labels; each is checked.
#[derive(Debug, Default)]
struct ListedLabels(MemberLabels);

/// `state`: the words of heartbeats, and those that registries use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
enum ListedState {
    #[default]
    Ready,
    Starting,
    Draining,
    Maintenance,
    Stopping,
    Critical,
    Down,
}

struct ListVisitor<'a> {
    /// The number of the entry that is read.
    entry: &'a Cell<usize>,
}

struct EntryVisitor;

struct LabelsVisitor;

impl<'de> Visitor<'de> for ListVisitor<'_> {
    type Value = Vec<Announced>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list of members")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Vec<Announced>, A::Error> {
        let mut members = Vec::new();
        loop {
            self.entry.set(members.len() + 1);
            let Some(entry) = list.next_element::<ListedEntry>()? else { break };
            if members.len() == MEMBERS_MAX {
                let most = format_args!("the list has more than {MEMBERS_MAX} entries");
                return Err(de::Error::custom(most));
            }
            members.push(entry.0.announced(None));
        }
        self.entry.set(0);
        Ok(members)
    }
}

impl<'de> Deserialize<'de> for ListedEntry {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<ListedEntry, D::Error> {
        deserializer.deserialize_any(EntryVisitor).map(ListedEntry)
    }
}

impl<'de> Visitor<'de> for EntryVisitor {
    type Value = ListedKeys;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a member: \"IP:PORT\" or an object with the key `address`")
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<ListedKeys, E> {
        let address = ListedAddress::read(text).map_err(E::custom)?;
        Ok(ListedKeys {
            address,
            name: None,
            weight: None,
            state: ListedState::Ready,
            backup: None,
            tier: None,
            labels: ListedLabels::default(),
        })
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<ListedKeys, A::Error> {
        let keys = ListedKeys::deserialize(de::value::MapAccessDeserializer::new(map))?;
        keys.check_tier().map_err(de::Error::custom)?;
        Ok(keys)
    }
}

// === values ===

impl TryFrom<String> for ListedAddress {
    type Error = String;

    fn try_from(text: String) -> Result<ListedAddress, String> {
        ListedAddress::read(&text)
    }
}

impl ListedAddress {
    fn read(text: &str) -> Result<ListedAddress, String> {
        let wrong = |cause: &str| {
            let shown: String = text.chars().take(64).collect();
            format!("address {shown:?} {cause}; write \"IP:PORT\", such as \"10.0.0.1:8080\"")
        };
        let address: SocketAddr = text.parse().map_err(|_| wrong("is not IP:PORT"))?;
        // An address that is written in two ways is one address.
        let address = canonical(address);
        if address.port() == 0 {
            return Err(wrong("has port 0"));
        }
        let ip = address.ip().to_canonical();
        if ip.is_unspecified() || ip.is_multicast() {
            return Err(wrong("is not the address of one host"));
        }
        Ok(ListedAddress(address))
    }
}

impl TryFrom<String> for ListedName {
    type Error = String;

    fn try_from(text: String) -> Result<ListedName, String> {
        check_name(&text)?;
        Ok(ListedName(text.into()))
    }
}

impl TryFrom<u64> for ListedWeight {
    type Error = String;

    fn try_from(number: u64) -> Result<ListedWeight, String> {
        match u16::try_from(number) {
            Ok(0) => Err("weight is 0; write state \"draining\" for no new sessions".to_owned()),
            Ok(weight) => Ok(ListedWeight(weight)),
            Err(_) => Err(format!("weight {number} is larger than 65535")),
        }
    }
}

impl TryFrom<u64> for ListedTier {
    type Error = String;

    fn try_from(number: u64) -> Result<ListedTier, String> {
        let tier = u8::try_from(number).ok().filter(|tier| *tier <= TIER_MAX);
        tier.map(ListedTier).ok_or_else(|| format!("tier {number} is larger than {TIER_MAX}"))
    }
}

impl<'de> Deserialize<'de> for ListedLabels {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<ListedLabels, D::Error> {
        deserializer.deserialize_map(LabelsVisitor)
    }
}

impl<'de> Visitor<'de> for LabelsVisitor {
    type Value = ListedLabels;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of texts")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut labels: A) -> Result<ListedLabels, A::Error> {
        let long = |text: &String| text.len() > LABEL_BYTES_MAX;
        let mut read = BTreeMap::new();
        while let Some((key, value)) = labels.next_entry::<String, String>()? {
            if read.len() == LABELS_MAX || long(&key) || long(&value) {
                let most = "labels are more than 32, or one is longer than 256 bytes";
                return Err(de::Error::custom(most));
            }
            read.insert(key, value);
        }
        let texts = read.iter().map(|(key, value)| (&**key, &**value));
        Ok(ListedLabels(MemberLabels::of(texts)))
    }
}

impl ListedState {
    /// Returns the wish, and the word itself.
    fn wish(self) -> (Wish, Arc<str>) {
        let (wish, word) = match self {
            ListedState::Ready => (Wish::Sessions, "ready"),
            ListedState::Starting => (Wish::Starting, "starting"),
            ListedState::Draining => (Wish::Draining, "draining"),
            ListedState::Maintenance => (Wish::Draining, "maintenance"),
            ListedState::Stopping => (Wish::Draining, "stopping"),
            ListedState::Critical => (Wish::Critical, "critical"),
            ListedState::Down => (Wish::Critical, "down"),
        };
        (wish, shared_word(word))
    }
}

/// Returns a text that all members with this word share, because a set can have thousands.
fn shared_word(word: &'static str) -> Arc<str> {
    static READY: LazyLock<Arc<str>> = LazyLock::new(|| "ready".into());
    if word == "ready" { Arc::clone(&READY) } else { word.into() }
}

impl ListedKeys {
    /// `backup` is a tier of 1, and `tier` must not contradict it.
    fn check_tier(&self) -> Result<(), String> {
        match (&self.tier, self.backup) {
            (Some(ListedTier(tier)), Some(backup)) if *tier != u8::from(backup) => Err(format!(
                "tier {tier} contradicts backup {backup}, which is tier {}",
                u8::from(backup)
            )),
            _ => Ok(()),
        }
    }

    /// The name is the entry's own, else `default`, else the address.
    fn announced(self, default: Option<&str>) -> Announced {
        let address = self.address.0;
        let (wish, raw) = self.state.wish();
        let name = match (self.name, default) {
            (Some(name), _) => name.0,
            (None, Some(name)) => name.into(),
            (None, None) => address.to_string().into(),
        };
        let weight = self.weight.map(|weight| weight.0);
        let backup = u8::from(self.backup.unwrap_or(false));
        let (tier, labels) = (self.tier.map_or(backup, |tier| tier.0), self.labels.0);
        Announced { name, address, weight, tier, wish, raw, labels }
    }
}

// === impl ListingProblem ===

impl ListingProblem {
    fn of(error: &serde_json::Error, entry: Option<usize>) -> ListingProblem {
        let text = error.to_string();
        let place = format!(" at line {} column {}", error.line(), error.column());
        let message = text.strip_suffix(&place).unwrap_or(&text).to_owned();
        ListingProblem { entry, line: error.line(), column: error.column(), message }
    }
}

impl fmt::Display for ListingProblem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(entry) = self.entry {
            write!(f, "entry {entry}, ")?;
        }
        if self.line > 0 {
            write!(f, "line {}, column {}: ", self.line, self.column)?;
        }
        f.write_str(&self.message)
    }
}

impl std::error::Error for ListingProblem {}

#[cfg(test)]
mod tests;

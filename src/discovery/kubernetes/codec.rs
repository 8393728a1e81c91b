//! EndpointSlices and watch events of the Kubernetes API: bytes to values.
//!
//! The source calls it. The types follow discovery.k8s.io/v1 and meta/v1; fields that
//! Tidegate does not use are skipped. Nothing here reads a socket, and no input panics.

use crate::parse::AtMost;
use serde::Deserialize;
use serde::de::{self, DeserializeSeed, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use std::borrow::Cow;
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use tidegate_core::discovery::Unreadable;

/// Largest event of a watch. The API server stores objects of at most 1.5 MiB.
pub(crate) const EVENT_BYTES_MAX: usize = 8 << 20;

/// Longest version and longest token of a next page, in bytes. Both go into a URL, which has
/// a bound. Servers send some hundred bytes.
const TOKEN_BYTES_MAX: usize = 8 << 10;

/// Most endpoints and most ports of a slice. The API permits 1,000 and 20,000.
const SLICE_ENDPOINTS_MAX: usize = 10_000;
const SLICE_PORTS_MAX: usize = 20_000;

/// A page of a list. Only the facts of a slice stay in memory.
#[derive(Debug, Default)]
struct SliceListPage {
    metadata: ListMetadata,
    slices: Vec<SliceFacts>,
}

/// Reads a page, or its items, for the configured port.
#[derive(Clone, Copy)]
struct PageReader<'p>(Option<&'p str>);

#[derive(Clone, Copy)]
struct ItemsReader<'p>(Option<&'p str>);

/// Metadata of a list.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct ListMetadata {
    #[serde(deserialize_with = "token")]
    pub(crate) resource_version: String,
    /// Empty after the last page.
    #[serde(rename = "continue", deserialize_with = "token")]
    pub(crate) next: String,
}

/// The refusal of a request, or the end of a watch.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct StatusObject {
    pub(crate) message: String,
    pub(crate) reason: String,
    pub(crate) code: u16,
}

/// An event of a watch.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum SliceEvent {
    /// A slice is new or changed.
    Put(SliceFacts),
    /// A slice was deleted, in this version.
    Deleted { name: Arc<str>, version: String },
    /// The history up to this version has no further event.
    Bookmark { version: String },
    /// The server ends the watch.
    Error { code: u16, message: String },
}

/// What Tidegate uses of a slice.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct SliceFacts {
    /// Unique in the namespace.
    pub(crate) name: Arc<str>,
    pub(crate) version: String,
    pub(crate) endpoints: Vec<EndpointFacts>,
    /// Endpoints without a usable address or port.
    pub(crate) unreadable: Unreadable,
}

/// An endpoint of a slice.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct EndpointFacts {
    /// UID of the pod; `None`: the address is the identity.
    pub(crate) target: Option<Arc<str>>,
    /// Name of the pod, else the address.
    pub(crate) name: Arc<str>,
    pub(crate) address: SocketAddr,
    pub(crate) state: EndpointState,
}

/// The conditions of an endpoint, the best last.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum EndpointState {
    /// Not ready and not serving.
    Out,
    /// Not ready; it terminates, and still answers.
    Leaving,
    /// Ready.
    Ready,
}

/// The type of an event decides the type of its object, and can come after it.
#[derive(Debug, Deserialize)]
struct EventKind {
    #[serde(rename = "type")]
    kind: String,
}

#[derive(Debug, Deserialize)]
struct EventOf<T> {
    object: T,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct SliceObject {
    metadata: ObjectMetadata,
    /// Absent in a bookmark, `null` in an empty slice.
    endpoints: Option<AtMost<EndpointObject, SLICE_ENDPOINTS_MAX>>,
    ports: Option<AtMost<PortObject, SLICE_PORTS_MAX>>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct ObjectMetadata {
    #[serde(default)]
    name: Arc<str>,
    #[serde(default, deserialize_with = "token")]
    resource_version: String,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct EndpointObject {
    #[serde(default)]
    addresses: FirstAddress,
    conditions: Option<ConditionsObject>,
    target_ref: Option<TargetObject>,
}

/// The first of the addresses. The API fixes that further ones are ignored.
#[derive(Debug, Default)]
struct FirstAddress(Option<IpAddr>);

struct FirstAddressVisitor;

#[derive(Debug, Default, Deserialize)]
struct ConditionsObject {
    ready: Option<bool>,
    serving: Option<bool>,
    terminating: Option<bool>,
}

#[derive(Debug, Deserialize)]
struct TargetObject {
    name: Option<Arc<str>>,
    uid: Option<Arc<str>>,
}

#[derive(Debug, Deserialize)]
struct PortObject {
    name: Option<String>,
    port: Option<u16>,
    protocol: Option<String>,
}

/// Reads a text that is sent back to the server.
fn token<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    let text = String::deserialize(deserializer)?;
    match text.len() > TOKEN_BYTES_MAX {
        true => Err(de::Error::custom("a version or a continue token has more than 8 KiB")),
        false => Ok(text),
    }
}

/// Reads a page of a list. `port` is the configured name or number.
pub(crate) fn page(
    body: &[u8],
    port: Option<&str>,
) -> Result<(ListMetadata, Vec<SliceFacts>), serde_json::Error> {
    let mut json = serde_json::Deserializer::from_slice(body);
    let page = json.deserialize_map(PageReader(port))?;
    json.end()?;
    Ok((page.metadata, page.slices))
}

/// Reads the text of a refused request.
pub(crate) fn status(body: &[u8]) -> StatusObject {
    serde_json::from_slice(body).unwrap_or_default()
}

/// Reads a line of a watch. A later version of the API can have further types of events:
/// `None`.
pub(crate) fn event(
    line: &[u8],
    port: Option<&str>,
) -> Result<Option<SliceEvent>, serde_json::Error> {
    let EventKind { kind } = serde_json::from_slice(line)?;
    let slice = || serde_json::from_slice(line).map(|event: EventOf<SliceObject>| event.object);
    Ok(Some(match &*kind {
        "ADDED" | "MODIFIED" => SliceEvent::Put(slice()?.facts(port)),
        "DELETED" => {
            let ObjectMetadata { name, resource_version } = slice()?.metadata;
            SliceEvent::Deleted { name, version: resource_version }
        }
        "BOOKMARK" => SliceEvent::Bookmark { version: slice()?.metadata.resource_version },
        "ERROR" => {
            let EventOf::<StatusObject> { object } = serde_json::from_slice(line)?;
            let text = if object.message.is_empty() { object.reason } else { object.message };
            SliceEvent::Error { code: object.code, message: text }
        }
        _ => return Ok(None),
    }))
}

// === impl PageReader, ItemsReader ===

impl<'de> Visitor<'de> for PageReader<'_> {
    type Value = SliceListPage;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list of EndpointSlices")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<SliceListPage, A::Error> {
        let mut page = SliceListPage::default();
        while let Some(key) = map.next_key::<Cow<'de, str>>()? {
            match &*key {
                "metadata" => page.metadata = map.next_value()?,
                "items" => page.slices = map.next_value_seed(ItemsReader(self.0))?,
                _ => drop(map.next_value::<IgnoredAny>()?),
            }
        }
        Ok(page)
    }
}

impl<'de> DeserializeSeed<'de> for ItemsReader<'_> {
    type Value = Vec<SliceFacts>;

    fn deserialize<D: Deserializer<'de>>(self, items: D) -> Result<Vec<SliceFacts>, D::Error> {
        items.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for ItemsReader<'_> {
    type Value = Vec<SliceFacts>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list of EndpointSlices")
    }

    /// `null` in lists of some servers.
    fn visit_unit<E: de::Error>(self) -> Result<Vec<SliceFacts>, E> {
        Ok(Vec::new())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Vec<SliceFacts>, A::Error> {
        let mut slices = Vec::new();
        while let Some(slice) = items.next_element::<SliceObject>()? {
            slices.push(slice.facts(self.0));
        }
        Ok(slices)
    }
}

// === impl FirstAddress ===

impl<'de> Deserialize<'de> for FirstAddress {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<FirstAddress, D::Error> {
        deserializer.deserialize_seq(FirstAddressVisitor)
    }
}

impl<'de> Visitor<'de> for FirstAddressVisitor {
    type Value = FirstAddress;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list of addresses")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<FirstAddress, A::Error> {
        let first = list.next_element::<Cow<'de, str>>()?;
        while list.next_element::<IgnoredAny>()?.is_some() {}
        Ok(FirstAddress(first.and_then(|text| text.parse().ok())))
    }
}

// === impl SliceObject ===

impl SliceObject {
    fn facts(self, port: Option<&str>) -> SliceFacts {
        let ports = self.ports.map(|ports| ports.0).unwrap_or_default();
        let port = chosen_port(&ports, port);
        let mut unreadable = Unreadable::default();
        let mut facts = Vec::new();
        for endpoint in self.endpoints.map(|endpoints| endpoints.0).unwrap_or_default() {
            match endpoint.facts(port) {
                Ok(endpoint) => facts.push(endpoint),
                Err(Some(pod)) => unreadable.add(&pod),
                Err(None) => unreadable.add_unnamed(1),
            }
        }
        SliceFacts {
            name: self.metadata.name,
            version: self.metadata.resource_version,
            endpoints: facts,
            unreadable,
        }
    }
}

/// Returns the port by name, by number, or the first. Only TCP ports count. A number needs
/// no entry if the slice has no ports, or one that means all ports.
fn chosen_port(ports: &[PortObject], wanted: Option<&str>) -> Option<u16> {
    let mut tcp = ports.iter().filter(|port| port.protocol.as_deref().is_none_or(|p| p == "TCP"));
    let Some(wanted) = wanted else { return tcp.find_map(|port| port.port) };
    let Ok(number) = wanted.parse::<u16>() else {
        return tcp.find(|port| port.name.as_deref() == Some(wanted)).and_then(|port| port.port);
    };
    let listed = ports.is_empty() || tcp.any(|port| port.port.is_none_or(|port| port == number));
    listed.then_some(number)
}

// === impl EndpointObject ===

impl EndpointObject {
    /// Returns the name of the pod, if it has one, without a usable address or port.
    fn facts(self, port: Option<u16>) -> Result<EndpointFacts, Option<Arc<str>>> {
        let TargetObject { name, uid } =
            self.target_ref.unwrap_or(TargetObject { name: None, uid: None });
        let pod = name.filter(|name| is_name(name));
        let ip = self.addresses.0.map(|ip| ip.to_canonical());
        let ip = ip.filter(|ip| !ip.is_unspecified() && !ip.is_multicast());
        let Some((ip, port)) = ip.zip(port.filter(|port| *port != 0)) else { return Err(pod) };
        let address = SocketAddr::new(ip, port);
        let name = pod.unwrap_or_else(|| address.to_string().into());
        let state = self.conditions.unwrap_or_default().state();
        Ok(EndpointFacts { target: uid, name, address, state })
    }
}

/// Whether a text can be the name of a pod: a DNS subdomain of up to 253 characters.
fn is_name(text: &str) -> bool {
    let valid = |c: char| c.is_ascii_alphanumeric() || ".-_".contains(c);
    (1..=253).contains(&text.len()) && text.chars().all(valid)
}

// === impl ConditionsObject ===

impl ConditionsObject {
    /// Unknown (`null`) means ready. An older API server sends no `serving`.
    fn state(&self) -> EndpointState {
        if self.ready.unwrap_or(true) {
            EndpointState::Ready
        } else if self.serving == Some(true) && self.terminating == Some(true) {
            EndpointState::Leaving
        } else {
            EndpointState::Out
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SLICE: &str = r#"{"kind":"EndpointSlice","apiVersion":"discovery.k8s.io/v1",
        "metadata":{"name":"web-abc","namespace":"shop","uid":"u","resourceVersion":"41",
          "labels":{"kubernetes.io/service-name":"web"}},
        "addressType":"IPv4",
        "endpoints":[
          {"addresses":["10.1.2.3"],"conditions":{"ready":true,"serving":true,"terminating":false},
           "targetRef":{"kind":"Pod","namespace":"shop","name":"web-0","uid":"p0"},
           "nodeName":"n1","zone":"a"},
          {"addresses":["10.1.2.4"],"conditions":{"ready":null}},
          {"addresses":["10.1.2.5"],"conditions":{"ready":false,"serving":true,"terminating":true}},
          {"addresses":["10.1.2.6"],"conditions":{"ready":false}},
          {"addresses":["web.example"],"conditions":{}},
          {"addresses":[]}],
        "ports":[{"name":"dns","port":53,"protocol":"UDP"},{"name":"http","port":8080,
          "protocol":"TCP"},{"name":"admin","port":9090}]}"#;

    fn slice(port: Option<&str>) -> SliceFacts {
        let line = format!("{{\"type\":\"ADDED\",\"object\":{SLICE}}}");
        match event(line.as_bytes(), port).unwrap() {
            Some(SliceEvent::Put(slice)) => slice,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn conditions_become_states() {
        let slice = slice(None);
        let states: Vec<_> = slice.endpoints.iter().map(|endpoint| endpoint.state).collect();
        use EndpointState::{Leaving, Out, Ready};
        assert_eq!(states, [Ready, Ready, Leaving, Out]);
        assert_eq!((slice.unreadable.count(), &*slice.version, &*slice.name), (2, "41", "web-abc"));
        let names: Vec<_> = slice.endpoints.iter().map(|endpoint| &*endpoint.name).collect();
        assert_eq!(names[..2], ["web-0", "10.1.2.4:8080"]);
    }

    #[test]
    fn the_port_is_the_first_of_tcp_or_the_named_one() {
        let port = |wanted| slice(wanted).endpoints.first().map(|first| first.address.port());
        assert_eq!(port(None), Some(8080));
        assert_eq!(port(Some("admin")), Some(9090));
        assert_eq!(port(Some("9090")), Some(9090));
        assert_eq!(port(Some("dns")), None);
        assert_eq!(port(Some("9999")), None);
        let unreadable = slice(Some("missing")).unreadable;
        assert_eq!(unreadable.text(), r#"6 unreadable: "web-0" and 5 more"#);
        assert_eq!(chosen_port(&[], Some("80")), Some(80));
        assert_eq!(chosen_port(&[], None), None);
    }

    #[test]
    fn events_are_read_by_type() {
        let read = |line: &str| event(line.as_bytes(), None).unwrap();
        let meta = r#""object":{"kind":"EndpointSlice","metadata":{"resourceVersion":"9"}}}"#;
        let bookmark = Some(SliceEvent::Bookmark { version: "9".into() });
        assert_eq!(read(&format!("{{\"type\":\"BOOKMARK\",{meta}")), bookmark);
        let status = r#"{"kind":"Status","code":410,"reason":"Expired","message":"too old"}"#;
        let gone = Some(SliceEvent::Error { code: 410, message: "too old".into() });
        assert_eq!(read(&format!("{{\"type\":\"ERROR\",\"object\":{status}}}")), gone);
        assert_eq!(read(&format!("{{\"type\":\"LATER\",{meta}")), None);
        assert!(event(b"{\"type\":\"ADDED\"}", None).is_err());
    }

    #[test]
    fn a_version_that_fits_in_no_url_is_refused() {
        let long = "9".repeat(TOKEN_BYTES_MAX + 1);
        for key in ["resourceVersion", "continue"] {
            let list = |text: &str| format!(r#"{{"metadata":{{"{key}":"{text}"}},"items":null}}"#);
            assert!(page(list(&long).as_bytes(), None).is_err());
            assert!(page(list(&long[1..]).as_bytes(), None).is_ok());
        }
        let line = format!(
            r#"{{"type":"BOOKMARK","object":{{"metadata":{{"resourceVersion":"{long}"}}}}}}"#
        );
        assert!(event(line.as_bytes(), None).is_err());
    }

    #[test]
    fn only_usable_endpoints_cost_memory() {
        let empty = vec!["{}"; SLICE_PORTS_MAX + 1].join(",");
        let read = |slice: &str| {
            let list = format!(r#"{{"kind":"List","items":[{{"metadata":{{}},{slice}}}]}}"#);
            page(list.as_bytes(), None).map(|(_, slices)| slices[0].clone())
        };
        let error = read(&format!("\"ports\":[{empty}]")).unwrap_err();
        assert!(error.to_string().contains("at most 20000 entries"), "{error}");
        assert!(read(&format!("\"endpoints\":[{empty}]")).is_err());
        // The API fixes that further addresses are ignored.
        let many = vec!["\"10.1.2.3\""; 1000].join(",");
        let slice = format!(r#""endpoints":[{{"addresses":[{many}]}}],"ports":[{{"port":80}}]"#);
        assert_eq!(read(&slice).unwrap().endpoints.len(), 1);
        let slice = r#""endpoints":[{"addresses":["::ffff:0.0.0.0"]}],"ports":[{"port":80}]"#;
        assert_eq!(read(slice).unwrap().unreadable.count(), 1);
    }

    proptest! {
        #[test]
        fn no_bytes_panic(at in 0..SLICE.len(), byte in any::<u8>(), any in proptest::collection::vec(any::<u8>(), 0..99)) {
            let mut changed = SLICE.as_bytes().to_vec();
            changed[at] = byte;
            let line = [b"{\"type\":\"ADDED\",\"object\":", &changed[..], b"}"].concat();
            let list = [b"{\"items\":[", &changed[..], b"]}"].concat();
            for bytes in [&line, &list, &any] {
                let _ = (event(bytes, None), page(bytes, Some("http")), status(bytes));
            }
        }
    }
}

//! The documents of the Kubernetes double: EndpointSlices, lists, events, Status objects
//! and the discovery documents that kubectl reads.

use serde::Serialize;

/// An EndpointSlice (discovery.k8s.io/v1).
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct SliceDocument {
    kind: &'static str,
    api_version: &'static str,
    /// Name, namespace, version and labels.
    pub metadata: SliceMetadata,
    address_type: &'static str,
    /// `null` without endpoints, as the real server writes it.
    pub endpoints: Option<Vec<EndpointDocument>>,
    ports: Option<Vec<PortDocument>>,
}

/// Metadata of a slice.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct SliceMetadata {
    /// Unique in its namespace.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub name: String,
    /// Its namespace.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub namespace: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    uid: String,
    /// Set by the double.
    pub resource_version: String,
    creation_timestamp: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    labels: Option<SliceLabels>,
}

/// The labels that the controller of Kubernetes writes.
#[derive(Debug, Clone, PartialEq, Serialize)]
struct SliceLabels {
    #[serde(rename = "endpointslice.kubernetes.io/managed-by")]
    managed_by: &'static str,
    #[serde(rename = "kubernetes.io/service-name")]
    service: String,
}

/// An endpoint of a slice.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct EndpointDocument {
    /// One address.
    pub addresses: Vec<String>,
    /// `ready`, `serving`, `terminating`.
    pub conditions: ConditionsDocument,
    target_ref: TargetDocument,
}

/// Conditions of an endpoint.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ConditionsDocument {
    ready: Option<bool>,
    serving: Option<bool>,
    terminating: Option<bool>,
}

/// The pod of an endpoint.
#[derive(Debug, Clone, PartialEq, Serialize)]
struct TargetDocument {
    kind: &'static str,
    namespace: String,
    name: String,
    uid: String,
}

/// A port of a slice.
#[derive(Debug, Clone, PartialEq, Serialize)]
struct PortDocument {
    name: &'static str,
    port: u16,
    protocol: &'static str,
}

/// A list of slices.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct SliceListDocument {
    kind: &'static str,
    api_version: &'static str,
    metadata: ListMetadataDocument,
    items: Vec<SliceDocument>,
}

/// Metadata of a list.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct ListMetadataDocument {
    resource_version: String,
    #[serde(rename = "continue", skip_serializing_if = "String::is_empty")]
    next: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    remaining_item_count: Option<usize>,
}

/// A line of a watch.
#[derive(Serialize)]
pub(super) struct EventDocument<T> {
    #[serde(rename = "type")]
    pub(super) kind: &'static str,
    pub(super) object: T,
}

/// The refusal of a request.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct StatusDocument {
    kind: &'static str,
    api_version: &'static str,
    metadata: EmptyDocument,
    status: &'static str,
    message: String,
    reason: &'static str,
    pub(super) code: u16,
}

#[derive(Debug, Clone, Serialize)]
struct EmptyDocument {}

// === impl SliceDocument ===

impl SliceDocument {
    /// A slice of a service with TCP port 8080, named `http`.
    pub fn new(
        namespace: &str,
        service: &str,
        name: &str,
        endpoints: Vec<EndpointDocument>,
    ) -> SliceDocument {
        SliceDocument {
            kind: "EndpointSlice",
            api_version: "discovery.k8s.io/v1",
            metadata: SliceMetadata {
                name: name.to_owned(),
                namespace: namespace.to_owned(),
                uid: format!("uid-of-{name}"),
                resource_version: String::new(),
                creation_timestamp: Some("2026-01-01T00:00:00Z"),
                labels: Some(SliceLabels {
                    managed_by: "endpointslice-controller.k8s.io",
                    service: service.to_owned(),
                }),
            },
            address_type: "IPv4",
            endpoints: (!endpoints.is_empty()).then_some(endpoints),
            ports: Some(vec![PortDocument { name: "http", port: 8080, protocol: "TCP" }]),
        }
    }

    /// The slice with another TCP port.
    #[must_use]
    pub fn with_port(mut self, port: u16) -> SliceDocument {
        self.ports = Some(vec![PortDocument { name: "http", port, protocol: "TCP" }]);
        self
    }

    /// The object of a bookmark: nothing but a version.
    pub(super) fn bookmark(version: u64) -> SliceDocument {
        let mut slice = SliceDocument::new("", "", "", Vec::new());
        slice.metadata.uid.clear();
        slice.metadata.resource_version = version.to_string();
        (slice.metadata.creation_timestamp, slice.metadata.labels) = (None, None);
        (slice.address_type, slice.ports) = ("", None);
        slice
    }

    pub(super) fn service(&self) -> &str {
        self.metadata.labels.as_ref().map_or("", |labels| &labels.service)
    }
}

// === impl EndpointDocument ===

impl EndpointDocument {
    /// A ready pod. Its number gives its name, UID and address.
    pub fn ready(pod: u16) -> EndpointDocument {
        EndpointDocument::with_conditions(pod, Some(true), Some(true), Some(false))
    }

    /// A pod that terminates and still answers.
    pub fn terminating(pod: u16) -> EndpointDocument {
        EndpointDocument::with_conditions(pod, Some(false), Some(true), Some(true))
    }

    /// A pod with these conditions.
    pub fn with_conditions(
        pod: u16,
        ready: Option<bool>,
        serving: Option<bool>,
        terminating: Option<bool>,
    ) -> EndpointDocument {
        EndpointDocument {
            addresses: vec![format!("10.{}.{}.1", pod / 256 + 1, pod % 256)],
            conditions: ConditionsDocument { ready, serving, terminating },
            target_ref: TargetDocument {
                kind: "Pod",
                namespace: "shop".to_owned(),
                name: format!("web-{pod}"),
                uid: format!("00000000-0000-0000-0000-{pod:012}"),
            },
        }
    }
}

// === impl SliceListDocument ===

impl SliceListDocument {
    pub(super) fn new(
        version: u64,
        items: Vec<SliceDocument>,
        next: String,
        remaining: usize,
    ) -> SliceListDocument {
        SliceListDocument {
            kind: "EndpointSliceList",
            api_version: "discovery.k8s.io/v1",
            metadata: ListMetadataDocument {
                resource_version: version.to_string(),
                next,
                remaining_item_count: (remaining > 0).then_some(remaining),
            },
            items,
        }
    }
}

// === impl StatusDocument ===

impl StatusDocument {
    pub(super) fn failure(code: u16, message: impl Into<String>) -> StatusDocument {
        let reason = match code {
            400 => "BadRequest",
            401 => "Unauthorized",
            403 => "Forbidden",
            404 => "NotFound",
            405 => "MethodNotAllowed",
            410 => "Expired",
            429 => "TooManyRequests",
            504 => "Timeout",
            _ => "InternalError",
        };
        StatusDocument {
            kind: "Status",
            api_version: "v1",
            metadata: EmptyDocument {},
            status: "Failure",
            message: message.into(),
            reason,
            code,
        }
    }
}

/// Returns the discovery document at a path.
pub(super) fn discovery_document(path: &str) -> Option<&'static str> {
    Some(match path {
        "/version" => {
            r#"{"major":"1","minor":"32","gitVersion":"v1.32.0","gitCommit":"","gitTreeState":"clean","buildDate":"2026-01-01T00:00:00Z","goVersion":"go1.23","compiler":"gc","platform":"linux/amd64"}"#
        }
        "/api" => {
            r#"{"kind":"APIVersions","versions":["v1"],"serverAddressByClientCIDRs":[{"clientCIDR":"0.0.0.0/0","serverAddress":"127.0.0.1"}]}"#
        }
        "/apis" => {
            r#"{"kind":"APIGroupList","apiVersion":"v1","groups":[{"name":"discovery.k8s.io","versions":[{"groupVersion":"discovery.k8s.io/v1","version":"v1"}],"preferredVersion":{"groupVersion":"discovery.k8s.io/v1","version":"v1"}}]}"#
        }
        "/api/v1" => {
            r#"{"kind":"APIResourceList","apiVersion":"v1","groupVersion":"v1","resources":[]}"#
        }
        // kubectl asks for the namespace of an object that does not exist.
        "/api/v1/namespaces/shop" => {
            r#"{"kind":"Namespace","apiVersion":"v1","metadata":{"name":"shop"}}"#
        }
        "/apis/discovery.k8s.io/v1" => {
            r#"{"kind":"APIResourceList","apiVersion":"v1","groupVersion":"discovery.k8s.io/v1","resources":[{"name":"endpointslices","singularName":"endpointslice","namespaced":true,"kind":"EndpointSlice","verbs":["get","list","watch"],"storageVersionHash":"Nx3SIv6I0mE="}]}"#
        }
        _ => return None,
    })
}

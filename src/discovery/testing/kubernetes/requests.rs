//! The requests of the Kubernetes double: path, parameters, token.

use super::objects::{SliceDocument, StatusDocument};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use percent_encoding::percent_decode_str;
use std::time::Duration;

/// A request without its body.
#[derive(Debug)]
pub(super) struct ApiRequest {
    pub(super) method: String,
    pub(super) target: String,
    pub(super) path: String,
    parameters: Vec<(String, String)>,
    pub(super) token: Option<String>,
}

/// What a request selects.
pub(super) enum Selection {
    Document(&'static str),
    /// An empty namespace means all.
    List {
        namespace: String,
        service: Option<String>,
        name: Option<String>,
    },
    Watch {
        namespace: String,
    },
}

// === impl ApiRequest ===

impl ApiRequest {
    pub(super) fn parse(head: &str) -> Option<ApiRequest> {
        let mut lines = head.lines();
        let mut first = lines.next()?.split(' ');
        let (method, target) = (first.next()?.to_owned(), first.next()?.to_owned());
        let (path, query) = target.split_once('?').unwrap_or((&target, ""));
        let decoded = |text: &str| {
            percent_decode_str(&text.replace('+', " ")).decode_utf8_lossy().into_owned()
        };
        let pairs = query.split('&').filter(|pair| !pair.is_empty());
        let pairs = pairs.map(|pair| pair.split_once('=').unwrap_or((pair, "")));
        let parameters = pairs.map(|(key, value)| (decoded(key), decoded(value))).collect();
        let token = lines.filter_map(|line| line.split_once(": ")).find_map(|(name, value)| {
            let bearer = value.strip_prefix("Bearer ")?;
            name.eq_ignore_ascii_case("authorization").then(|| bearer.to_owned())
        });
        let path = decoded(path);
        Some(ApiRequest { method, path, parameters, token, target: target.clone() })
    }

    fn parameter(&self, name: &str) -> Option<&str> {
        let found = self.parameters.iter().find(|(key, _)| key == name);
        found.map(|(_, value)| &**value).filter(|value| !value.is_empty())
    }

    fn number(&self, name: &str) -> Result<Option<u64>, StatusDocument> {
        let Some(text) = self.parameter(name) else { return Ok(None) };
        let wrong = || {
            let text = format!("Invalid value: {text:?}: invalid {name}");
            StatusDocument::failure(400, text)
        };
        text.parse().map(Some).map_err(|_| wrong())
    }

    fn flag(&self, name: &str) -> bool {
        matches!(self.parameter(name), Some("true" | "1"))
    }

    pub(super) fn selection(&self) -> Result<Selection, StatusDocument> {
        let missing =
            || StatusDocument::failure(404, "the server could not find the requested resource");
        let rest = self.path.strip_prefix("/apis/discovery.k8s.io/v1/").ok_or_else(missing)?;
        let parts: Vec<&str> = rest.split('/').collect();
        let (namespace, name) = match parts[..] {
            ["endpointslices"] => ("", None),
            ["namespaces", namespace, "endpointslices"] => (namespace, None),
            ["namespaces", namespace, "endpointslices", name] => (namespace, Some(name.to_owned())),
            _ => return Err(missing()),
        };
        if let Some(field) = self.parameter("fieldSelector") {
            let text = format!("field label not supported: {field}");
            return Err(StatusDocument::failure(400, text));
        }
        let (service, namespace) = (self.service()?, namespace.to_owned());
        Ok(match self.flag("watch") && name.is_none() {
            true => Selection::Watch { namespace },
            false => Selection::List { namespace, service, name },
        })
    }

    /// The service of the label selector. The double knows this one form.
    fn service(&self) -> Result<Option<String>, StatusDocument> {
        let Some(selector) = self.parameter("labelSelector") else { return Ok(None) };
        let service = selector.strip_prefix("kubernetes.io/service-name=");
        let service = service.ok_or_else(|| {
            StatusDocument::failure(400, format!("unable to parse requirement: {selector}"))
        })?;
        Ok(Some(service.trim_start_matches('=').to_owned()))
    }

    pub(super) fn matches(&self, slice: &SliceDocument) -> bool {
        match self.selection() {
            Ok(Selection::Watch { namespace }) => {
                matches(slice, &namespace, self.service().ok().flatten().as_deref())
            }
            _ => false,
        }
    }

    pub(super) fn version(&self) -> Result<Option<u64>, StatusDocument> {
        self.number("resourceVersion")
    }

    pub(super) fn limit(&self) -> Result<Option<usize>, StatusDocument> {
        Ok(self.number("limit")?.filter(|limit| *limit > 0).map(|limit| limit as usize))
    }

    /// Returns the version of the first page and the last name of the page before.
    pub(super) fn continued(&self) -> Result<Option<(u64, String)>, StatusDocument> {
        let Some(token) = self.parameter("continue") else { return Ok(None) };
        let read = || {
            let text = String::from_utf8(STANDARD.decode(token).ok()?).ok()?;
            let (version, name) = text.split_once('/')?;
            Some((version.parse().ok()?, name.to_owned()))
        };
        let wrong = || StatusDocument::failure(400, "continue key is not valid");
        read().map(Some).ok_or_else(wrong)
    }

    pub(super) fn wants_bookmarks(&self) -> bool {
        self.flag("allowWatchBookmarks")
    }

    pub(super) fn watch_timeout(&self) -> Duration {
        let seconds = self.number("timeoutSeconds").ok().flatten();
        Duration::from_secs(seconds.filter(|seconds| *seconds > 0).unwrap_or(1800))
    }
}

/// Whether a slice is in a namespace and of a service.
pub(super) fn matches(slice: &SliceDocument, namespace: &str, service: Option<&str>) -> bool {
    (namespace.is_empty() || slice.metadata.namespace == namespace)
        && service.is_none_or(|service| slice.service() == service)
}

/// Returns the token of the next page.
pub(super) fn continue_token(version: u64, last: &str) -> String {
    STANDARD.encode(format!("{version}/{last}"))
}

//! Serves the files of the operator page. The page is a client of the admin API like any other.
//!
//! Mounted by `routes`. The files are part of the program, and hold nothing of this host, so they
//! need no token. They load nothing from other hosts, and run no inline script.

use super::routes::ErrorResponse;
use axum::body::Body;
use axum::extract::Path;
use axum::extract::rejection::PathRejection;
use axum::response::Response;
use hyper::header::{self, HeaderMap, HeaderName, HeaderValue};
use hyper::{StatusCode, Uri};
use std::hash::{DefaultHasher, Hash, Hasher};

/// One file of the page.
struct PageFile {
    name: &'static str,
    text: &'static str,
}

macro_rules! page_files {
    ($($name:literal),+ $(,)?) => {
        &[$(PageFile { name: $name, text: include_str!(concat!("page/", $name)) }),+]
    };
}

const INDEX: &str = "index.html";

const FILES: &[PageFile] = page_files![
    "index.html",
    "actions.js",
    "api.js",
    "backends.js",
    "base.css",
    "chart.js",
    "dom.js",
    "drawer.css",
    "drawer.js",
    "events.js",
    "findings.js",
    "heatmap.js",
    "keys.js",
    "main.js",
    "model.js",
    "overview.js",
    "parts.css",
    "parts.js",
    "pool.js",
    "room.css",
    "sessions.js",
    "shell.css",
    "shell.js",
    "table.js",
    "text.js",
];

/// Nothing but the files of this host. Text of backends can run no script, whatever it is.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; \
                      connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; \
                      frame-ancestors 'none'";

const HEADERS: [(HeaderName, &str); 5] = [
    (header::CONTENT_SECURITY_POLICY, POLICY),
    (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
    (header::REFERRER_POLICY, "no-referrer"),
    (header::X_FRAME_OPTIONS, "DENY"),
    // The browser asks again each time, and gets 304 for a file that has not changed.
    (header::CACHE_CONTROL, "no-cache"),
];

/// Returns true for the paths of the page.
pub(super) fn is_page(path: &str) -> bool {
    path == "/" || path.starts_with("/page/")
}

pub(super) async fn index(uri: Uri, headers: HeaderMap) -> Result<Response, ErrorResponse> {
    answer(INDEX, &uri, &headers)
}

pub(super) async fn file(
    uri: Uri,
    name: Result<Path<String>, PathRejection>,
    headers: HeaderMap,
) -> Result<Response, ErrorResponse> {
    answer(&name.map(|Path(name)| name).unwrap_or_default(), &uri, &headers)
}

fn answer(name: &str, uri: &Uri, asked: &HeaderMap) -> Result<Response, ErrorResponse> {
    let Some(file) = FILES.iter().find(|file| file.name == name) else {
        return Err(ErrorResponse::new(StatusCode::NOT_FOUND, "unknown path", uri.path()));
    };
    let tag = file.tag();
    let known =
        asked.get(header::IF_NONE_MATCH).is_some_and(|value| value.as_bytes() == tag.as_bytes());
    let mut response = Response::new(if known { Body::empty() } else { Body::from(file.text) });
    if known {
        *response.status_mut() = StatusCode::NOT_MODIFIED;
    }
    let headers = response.headers_mut();
    for (name, value) in HEADERS {
        headers.insert(name, HeaderValue::from_static(value));
    }
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(file.content_type()));
    if let Ok(tag) = HeaderValue::from_str(&tag) {
        headers.insert(header::ETAG, tag);
    }
    Ok(response)
}

// === impl PageFile ===

impl PageFile {
    fn content_type(&self) -> &'static str {
        match self.name.rsplit_once('.') {
            Some((_, "css")) => "text/css; charset=utf-8",
            Some((_, "js")) => "text/javascript; charset=utf-8",
            _ => "text/html; charset=utf-8",
        }
    }

    /// The entity tag (RFC 9110 section 8.8.3).
    fn tag(&self) -> String {
        let mut hasher = DefaultHasher::new();
        self.text.hash(&mut hasher);
        format!("\"{:016x}\"", hasher.finish())
    }
}

#[cfg(test)]
mod tests {
    use super::{FILES, POLICY};
    use std::collections::BTreeSet;

    #[test]
    fn every_file_of_the_directory_is_served() {
        let dir = concat!(env!("CARGO_MANIFEST_DIR"), "/admin/page");
        let there: BTreeSet<String> = std::fs::read_dir(dir)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        let served: BTreeSet<String> = FILES.iter().map(|file| file.name.to_owned()).collect();
        assert_eq!(there, served);
    }

    #[test]
    fn files_name_no_other_host_and_have_no_inline_code() {
        let sources = POLICY.split("; ").flat_map(|directive| directive.split(' ').skip(1));
        for source in sources {
            assert!(["'none'", "'self'", "data:"].contains(&source), "{source}");
        }
        for file in FILES {
            let own = file.text.replace("http://www.w3.org/2000/svg", "");
            assert!(!own.contains("http://") && !own.contains("https://"), "{}", file.name);
            for word in ["innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("]
            {
                assert!(!file.text.contains(word), "{}: {word}", file.name);
            }
            for word in [" style=", " onclick=", "<style", "<script>"] {
                let inline = file.name.ends_with(".html") && file.text.contains(word);
                assert!(!inline, "{}: {word}", file.name);
            }
        }
    }
}

//! The keys of an HTTP probe: request, and accepted answers.
//!
//! Called by `probe`. It never sends a request.

use toml::Spanned;
use toml::de::DeValue;

use crate::file::{Field, Section};
use crate::value::{self, ValueError, shown};
use tidegate_core::model::{Expect, HttpProbe, HttpVersion};

const PATH_BYTES_MAX: usize = 2_048;
const HOST_BYTES_MAX: usize = 255;
const METHOD_BYTES_MAX: usize = 32;
/// Most headers of a request, and the longest name and value.
const HEADERS_MAX: usize = 16;
const HEADER_NAME_BYTES_MAX: usize = 64;
const HEADER_VALUE_BYTES_MAX: usize = 1_024;

/// Headers that decide where the request and the answer end, or that have an own key.
const RESERVED: [&str; 5] = ["connection", "content-length", "host", "te", "transfer-encoding"];

/// The keys that only HTTP probes take.
pub(super) struct HttpKeys {
    path: Field<String>,
    host: Field<String>,
    method: Field<String>,
    version: Field<HttpVersion>,
    headers: Field<Vec<(String, String)>>,
    status: Field<Vec<(u16, u16)>>,
}

pub(super) fn keys(section: &Section<'_, '_>) -> HttpKeys {
    HttpKeys {
        path: section.text("path", "a string", path),
        host: section.text("host", "a string", host),
        method: section.text("method", "a string", method),
        version: section.choice("http"),
        headers: headers(section),
        status: section.text("status", "a string such as \"200-399\"", value::status_ranges),
    }
}

fn path(text: &str) -> Result<String, ValueError> {
    if !text.starts_with('/') {
        return Err(ValueError::new(format!("{} does not start with /", shown(text)))
            .help("give the path alone, without scheme and host"));
    }
    visible(text, PATH_BYTES_MAX)
}

fn host(text: &str) -> Result<String, ValueError> {
    if text.is_empty() {
        return Err(ValueError::new("it is empty").help("remove it to send the backend's address"));
    }
    visible(text, HOST_BYTES_MAX)
}

fn method(text: &str) -> Result<String, ValueError> {
    if !is_token(text) || text.len() > METHOD_BYTES_MAX {
        return Err(ValueError::new(format!("{} is not an HTTP method", shown(text)))
            .help("write \"GET\" or \"HEAD\""));
    }
    Ok(text.to_owned())
}

/// Reads `headers = { Name = "value" }`.
fn headers(section: &Section<'_, '_>) -> Field<Vec<(String, String)>> {
    let Some(node) = section.node("headers") else { return Field::Absent };
    let DeValue::Table(table) = node.get_ref() else {
        return section.wrong_type("headers", node, "a table such as { Authorization = \"...\" }");
    };
    let mut headers = Vec::with_capacity(table.len());
    let mut bad = false;
    for (name, entry) in table.iter() {
        let read = match entry.get_ref() {
            DeValue::String(text) => header(name.get_ref(), text),
            _ => Err(ValueError::new("the value of a header is a string")),
        };
        match read {
            Ok(header) => headers.push(header),
            Err(complaint) => {
                bad = true;
                section.report.error(name.span(), complaint.named("headers"));
            }
        }
    }
    if headers.len() > HEADERS_MAX {
        let message = format!("{} headers, at most {HEADERS_MAX} are allowed", headers.len());
        section.report.error(node.span(), ValueError::new(message));
        bad = true;
    }
    if bad { Field::Bad } else { Field::Good(Spanned::new(node.span(), headers)) }
}

fn header(name: &str, value: &str) -> Result<(String, String), ValueError> {
    if !is_token(name) || name.len() > HEADER_NAME_BYTES_MAX {
        return Err(ValueError::new(format!("{} is not the name of a header", shown(name))));
    }
    if RESERVED.contains(&name.to_ascii_lowercase().as_str()) {
        let complaint = ValueError::new(format!("the probe itself sets the header {name}"));
        return Err(match name.eq_ignore_ascii_case("host") {
            true => complaint.help("use the key host"),
            false => complaint,
        });
    }
    let allowed = |c: char| c == ' ' || c == '\t' || c.is_ascii_graphic();
    if !value.chars().all(allowed) || value.trim() != value {
        return Err(ValueError::new(format!("{} is not the value of a header", shown(value)))
            .help("only visible ASCII characters, with spaces and tabs between them"));
    }
    if value.len() > HEADER_VALUE_BYTES_MAX {
        let length = value.len();
        let message = format!("{length} bytes, at most {HEADER_VALUE_BYTES_MAX} are allowed");
        return Err(ValueError::new(message));
    }
    Ok((name.to_owned(), value.to_owned()))
}

/// A token of HTTP (RFC 9110, section 5.6.2).
fn is_token(text: &str) -> bool {
    let token = |b: u8| b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&b);
    !text.is_empty() && text.bytes().all(token)
}

/// Accepts only text that cannot end the request line or the header that holds it.
fn visible(text: &str, max: usize) -> Result<String, ValueError> {
    if let Some(wrong) = text.chars().find(|c| !c.is_ascii_graphic()) {
        let wrong = shown(&wrong.to_string());
        return Err(ValueError::new(format!("{wrong} is not allowed here"))
            .help("only visible ASCII characters; escape others as %XX"));
    }
    if text.len() > max {
        return Err(ValueError::new(format!("{} bytes, at most {max} are allowed", text.len())));
    }
    Ok(text.to_owned())
}

// === impl HttpKeys ===

impl HttpKeys {
    pub(super) fn into_probe(self, expect: Option<Expect>) -> HttpProbe {
        HttpProbe {
            path: self.path.or("/".to_owned()),
            host: self.host.value(),
            method: self.method.or("GET".to_owned()),
            version: self.version.or(HttpVersion::Http11),
            headers: self.headers.or(Vec::new()),
            status: self.status.or(vec![(200, 399)]),
            expect,
        }
    }
}

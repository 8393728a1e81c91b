//! Checks host names and URLs, and the names of services in registries.
//!
//! Called by `address` and `validate`. Pure: it never resolves a name.

use super::value::{ValueError, cut, shown};
use std::net::{IpAddr, Ipv4Addr};

/// Longest name in DNS without the final dot (RFC 1035, 2.3.4).
const NAME_BYTES_MAX: usize = 253;

/// Longest part of a name between two dots (RFC 1035, 2.3.4).
const LABEL_BYTES_MAX: usize = 63;

/// Longest URL.
const URL_BYTES_MAX: usize = 2_048;

/// Longest text that a registry is asked for.
const ASKED_BYTES_MAX: usize = 1_024;

/// Checks a name for DNS. A final dot makes it absolute.
pub(super) fn host_name(text: &str) -> Result<(), ValueError> {
    let name = text.strip_suffix('.').unwrap_or(text);
    if name.is_empty() {
        return Err(ValueError::new("the host name is empty"));
    }
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    if let Some(wrong) = text.chars().find(|c| !allowed(*c)) {
        let wrong = shown(&wrong.to_string());
        let complaint = ValueError::new(format!("{wrong} is not allowed in a host name"));
        let help = "host names have the characters A-Z a-z 0-9 - _ and dots; write other \
                    letters in the xn-- form";
        return Err(complaint.help(help));
    }
    if name.len() > NAME_BYTES_MAX {
        let message = format!("the host name has {} characters", name.len());
        return Err(ValueError::new(message).help(format!("at most {NAME_BYTES_MAX} are allowed")));
    }
    for label in name.split('.') {
        if label.is_empty() {
            return Err(ValueError::new(format!(
                "the host name {} has an empty part",
                shown(text)
            ))
            .help("write one dot between two parts"));
        }
        if label.len() > LABEL_BYTES_MAX {
            let message =
                format!("{} has {} characters between two dots", shown(label), label.len());
            let help = format!("at most {LABEL_BYTES_MAX} are allowed in a part of a host name");
            return Err(ValueError::new(message).help(help));
        }
    }
    Ok(())
}

/// Checks a name of a question to DNS: a host name and not an address.
pub(super) fn question_name(text: &str) -> Result<(), ValueError> {
    if text.parse::<IpAddr>().is_ok() || text.bytes().all(|b| b.is_ascii_digit() || b == b'.') {
        return Err(ValueError::new(format!("{} is not a name", shown(text)))
            .help("give an address in a [[pool.NAME.backend]]"));
    }
    if let Some((name, port)) = text.split_once(':') {
        let is_port = port.parse::<u16>().is_ok();
        let help = match is_port {
            true => format!("write name = \"{}\" and port = {port}", cut(name)),
            false => format!("write name = \"{}\"", cut(port)),
        };
        return Err(ValueError::new(format!("{} is not a host name", shown(text))).help(help));
    }
    host_name(text)
}

/// Checks the name that a certificate must have: a host name or an IP address.
pub(super) fn certificate_name(text: &str) -> Result<(), ValueError> {
    if text.parse::<IpAddr>().is_ok() {
        return Ok(());
    }
    if text.contains(':') {
        return Err(ValueError::new(format!("{} is not a host name", shown(text)))
            .help("write the name alone, without a port"));
    }
    host_name(text)
}

/// Returns whether a name always is this host (RFC 6761, 6.3).
pub(super) fn is_loopback_name(name: &str) -> bool {
    let name = name.strip_suffix('.').unwrap_or(name).to_ascii_lowercase();
    name == "localhost" || name.ends_with(".localhost")
}

/// The parts of a URL that other keys depend on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct UrlRead {
    pub(super) text: String,
    /// Whether the scheme is `https`.
    pub(super) tls: bool,
    /// Whether the host is this host for certain.
    pub(super) loopback: bool,
}

/// Checks a URL: `http://HOST[:PORT][/PATH]`, or the same with `https`.
pub(super) fn url(text: &str) -> Result<UrlRead, ValueError> {
    if text.len() > URL_BYTES_MAX {
        let message = format!("a URL has at most {URL_BYTES_MAX} bytes, not {}", text.len());
        return Err(ValueError::new(message));
    }
    let (tls, rest) = match (text.strip_prefix("http://"), text.strip_prefix("https://")) {
        (Some(rest), _) => (false, rest),
        (_, Some(rest)) => (true, rest),
        (None, None) => {
            return Err(ValueError::new(format!("{} is not a URL", shown(text)))
                .help("write \"http://HOST:PORT/PATH\" or \"https://HOST:PORT/PATH\""));
        }
    };
    if let Some(wrong) = text.chars().find(|c| !c.is_ascii_graphic() || *c == '#') {
        let wrong = shown(&wrong.to_string());
        return Err(ValueError::new(format!("{wrong} is not allowed in this URL"))
            .help("only visible ASCII characters without #; escape others as %XX"));
    }
    let authority = rest.split(['/', '?']).next().unwrap_or_default();
    if authority.contains('@') {
        return Err(ValueError::new("a URL must not have a user or a password")
            .help("write a bearer token to a file and set token_file"));
    }
    let loopback = url_host(authority)?;
    Ok(UrlRead { text: text.to_owned(), tls, loopback })
}

/// Checks the host and the port of a URL. Returns whether the host is this host.
fn url_host(authority: &str) -> Result<bool, ValueError> {
    let (host, port) = match authority.strip_prefix('[') {
        Some(rest) => rest.split_once(']').unwrap_or((authority, "")),
        None => authority.split_at(authority.find(':').unwrap_or(authority.len())),
    };
    if let Some(port) = port.strip_prefix(':') {
        super::address::port_number(authority, port)?;
    } else if !port.is_empty() {
        return Err(ValueError::new(format!("{} is not HOST:PORT", shown(authority))));
    }
    if authority.starts_with('[') {
        let ip = host.parse::<IpAddr>().ok().filter(IpAddr::is_ipv6);
        let wrong = || ValueError::new(format!("{} is not an IPv6 address", shown(host)));
        return ip.map(|ip| ip.is_loopback()).ok_or_else(wrong);
    }
    if let Ok(ip) = host.parse::<Ipv4Addr>() {
        return Ok(ip.is_loopback());
    }
    if host.bytes().all(|b| b.is_ascii_digit() || b == b'.') && !host.is_empty() {
        return Err(ValueError::new(format!("{} is not an IPv4 address", shown(host))));
    }
    host_name(host).map(|()| is_loopback_name(host))
}

/// Checks a text that a registry is asked for: not empty and on one line.
pub(super) fn asked(text: &str) -> Result<(), ValueError> {
    if text.is_empty() {
        return Err(ValueError::new("it is empty"));
    }
    if text.len() > ASKED_BYTES_MAX {
        let message = format!("{} bytes, at most {ASKED_BYTES_MAX} are allowed", text.len());
        return Err(ValueError::new(message));
    }
    if let Some(wrong) = text.chars().find(|c| c.is_control()) {
        let wrong = shown(&wrong.to_string());
        return Err(ValueError::new(format!("{wrong} is not allowed here")));
    }
    Ok(())
}

/// Checks the name of a Kubernetes object, or of one of its ports (RFC 1123 label, but with
/// dots as in a subdomain).
pub(super) fn kubernetes_name(text: &str) -> Result<(), ValueError> {
    let allowed = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, '-' | '.');
    let ends = |c: char| c == '-' || c == '.';
    if text.is_empty() || text.len() > NAME_BYTES_MAX || !text.chars().all(allowed) {
        return Err(ValueError::new(format!("{} is not a name in Kubernetes", shown(text)))
            .help("such names have the characters a-z 0-9 - ."));
    }
    if text.starts_with(ends) || text.ends_with(ends) {
        return Err(ValueError::new(format!("{} starts or ends with - or a dot", shown(text))));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn names_have_the_bounds_of_dns() {
        let label = "a".repeat(63);
        let longest = [&*label, &label, &label, &"b".repeat(61)].join(".");
        assert_eq!(longest.len(), 253);
        for good in ["a", "a.", "_pg._tcp.db", "xn--bcher-kva.example", "A-1", &label, &longest] {
            assert_eq!(host_name(good), Ok(()), "{good}");
            assert_eq!(host_name(&format!("{}.", good.trim_end_matches('.'))), Ok(()), "{good}");
        }
        let (long_label, too_long) = (format!("{label}a"), format!("{longest}b"));
        for bad in ["", ".", "a..b", ".a", "a b", "b\u{fc}cher", "a/b", &long_label, &too_long] {
            assert!(host_name(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn urls_have_a_scheme_and_a_host_and_no_password() {
        let read = |text| url(text).map(|url| (url.tls, url.loopback));
        assert_eq!(read("http://127.0.0.1:1/a?b=c"), Ok((false, true)));
        assert_eq!(read("https://[::1]/"), Ok((true, true)));
        assert_eq!(read("https://members.example"), Ok((true, false)));
        assert_eq!(read("http://LOCALHOST:80"), Ok((false, true)));
        for bad in [
            "members.example/",
            "ftp://a/",
            "http://",
            "http://:80/",
            "http://a:0/",
            "http://a:b/",
            "http://u:p@a/",
            "http://a b/",
            "http://a/#x",
            "http://[::1/",
            "http://[1.2.3.4]/",
            "http://1.2.3/",
            "http://[::1]x/",
        ] {
            assert!(url(bad).is_err(), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn arbitrary_text_never_panics(text in "\\PC{0,80}") {
            let _ = (host_name(&text), question_name(&text), certificate_name(&text));
            let _ = (url(&text), url(&format!("http://{text}")), kubernetes_name(&text));
            let _ = (asked(&text), is_loopback_name(&text));
        }
    }
}

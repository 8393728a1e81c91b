//! `acl` and the conditions after `if` and `unless`.
//!
//! Called by `frontend` for routes and for rules that reject clients.

use super::lines::Directive;
use crate::report::SourceLine;
use std::collections::BTreeMap;
use std::net::IpAddr;

/// Most alternatives of a condition.
const ALTERNATIVES_MAX: usize = 256;

/// What a test looks at, and its values.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum AclTest {
    /// Prefixes of client addresses.
    Sources(Vec<String>),
    /// Ports and ranges that clients connect to.
    Ports(Vec<String>),
    /// Prefixes of addresses that clients connect to.
    Destinations(Vec<String>),
    /// More open connections of a client than this.
    Connections(u64),
    /// More new connections of a client in the period of the table than this.
    Rate(u64),
    /// Always true.
    Always,
    /// The client has sent bytes of the right protocol.
    Protocol(String),
    /// Not possible, with the reason.
    Unknown(String),
}

/// One test of a condition.
#[derive(Debug, Clone)]
pub(super) struct AclTerm {
    pub(super) negated: bool,
    pub(super) test: AclTest,
    /// The `acl` lines of a test with a name.
    pub(super) at: Vec<SourceLine>,
}

/// Tests by name.
#[derive(Debug, Default)]
pub(super) struct Acls(BTreeMap<String, (AclTest, Vec<SourceLine>)>);

impl Acls {
    /// Reads the `acl` lines of a section. Several lines with one name are alternatives.
    pub(super) fn read(lines: &[&Directive]) -> Self {
        let mut acls = Acls::default();
        for line in lines {
            let test = test(line.from(2));
            match acls.0.get_mut(line.word(1)) {
                None => drop(acls.0.insert(line.word(1).to_owned(), (test, vec![line.at]))),
                Some((known, at)) => {
                    *known = joined(known.clone(), test);
                    at.push(line.at);
                }
            }
        }
        acls
    }

    /// Parses a condition: alternatives of terms. The words begin after `if` or `unless`.
    ///
    /// # Errors
    /// A test without definition, or more alternatives than Tidegate takes.
    pub(super) fn condition(&self, words: &[String]) -> Result<Vec<Vec<AclTerm>>, String> {
        let mut alternatives = vec![Vec::new()];
        let mut negated = false;
        let mut at = 0;
        while let Some(word) = words.get(at) {
            at += 1;
            let mut name = &**word;
            match name {
                "||" | "or" => {
                    if alternatives.len() == ALTERNATIVES_MAX {
                        return Err("the condition has too many alternatives".to_owned());
                    }
                    alternatives.push(Vec::new());
                    continue;
                }
                "!" => {
                    negated = !negated;
                    continue;
                }
                _ => {}
            }
            while let Some(rest) = name.strip_prefix('!') {
                negated = !negated;
                name = rest;
            }
            let (test, lines) = if name == "{" {
                let rest = words.get(at..).unwrap_or_default();
                let end = rest.iter().position(|word| word == "}");
                let end = end.ok_or_else(|| "the closing } is missing".to_owned())?;
                at += end + 1;
                (test(&rest[..end]), Vec::new())
            } else {
                self.named(name)?
            };
            let term = AclTerm { negated, test, at: lines };
            alternatives.last_mut().into_iter().for_each(|terms| terms.push(term.clone()));
            negated = false;
        }
        Ok(alternatives)
    }

    fn named(&self, name: &str) -> Result<(AclTest, Vec<SourceLine>), String> {
        if let Some((test, at)) = self.0.get(name) {
            return Ok((test.clone(), at.clone()));
        }
        let test = match name {
            "TRUE" | "WAIT_END" => AclTest::Always,
            "LOCALHOST" => AclTest::Sources(vec!["127.0.0.0/8".to_owned()]),
            "REQ_CONTENT" | "RDP_COOKIE" | "HTTP" => AclTest::Protocol(name.to_owned()),
            _ => return Err(format!("there is no acl {name}")),
        };
        Ok((test, Vec::new()))
    }
}

fn joined(one: AclTest, other: AclTest) -> AclTest {
    let both = |mut one: Vec<String>, other: Vec<String>| {
        one.extend(other);
        one
    };
    match (one, other) {
        (AclTest::Sources(a), AclTest::Sources(b)) => AclTest::Sources(both(a, b)),
        (AclTest::Ports(a), AclTest::Ports(b)) => AclTest::Ports(both(a, b)),
        (AclTest::Destinations(a), AclTest::Destinations(b)) => AclTest::Destinations(both(a, b)),
        (unknown @ AclTest::Unknown(_), _) | (_, unknown @ AclTest::Unknown(_)) => unknown,
        _ => AclTest::Unknown("alternatives of different kinds have no route".to_owned()),
    }
}

/// Reads `CRITERION [flags] [values]`.
fn test(words: &[String]) -> AclTest {
    let Some(criterion) = words.first() else {
        return AclTest::Unknown("the test is empty".to_owned());
    };
    let mut values: Vec<&str> = words[1..].iter().map(String::as_str).collect();
    let flags = values.iter().take_while(|value| matches!(**value, "-i" | "--" | "-n")).count();
    values.drain(..flags);
    // `-m ip` and `-m int` are the usual ways to compare.
    if let ["-m", "ip" | "int", ..] = values[..] {
        values.drain(..2);
    }
    if values.contains(&"-f") {
        return AclTest::Unknown("copy the values of the file into the configuration".to_owned());
    }
    let name = criterion.split(['(', ',']).next().unwrap_or_default();
    match name {
        "src" => addresses(&values).map_or_else(AclTest::Unknown, AclTest::Sources),
        "dst" => addresses(&values).map_or_else(AclTest::Unknown, AclTest::Destinations),
        "dst_port" => ports(&values).map_or_else(AclTest::Unknown, AclTest::Ports),
        "always_true" | "wait_end" => AclTest::Always,
        _ if name.ends_with("_conn_cur") => {
            above(&values).map_or_else(AclTest::Unknown, AclTest::Connections)
        }
        _ if name.ends_with("_conn_rate") => {
            above(&values).map_or_else(AclTest::Unknown, AclTest::Rate)
        }
        "req_ssl_hello_type" | "req.ssl_hello_type" | "req_len" | "req.len" | "req.proto_http" => {
            AclTest::Protocol(name.to_owned())
        }
        _ if criterion.ends_with("mqtt_is_valid") => AclTest::Protocol("mqtt_is_valid".to_owned()),
        "req_ssl_sni" | "req.ssl_sni" | "req_ssl.sni" | "ssl_fc_sni" => {
            AclTest::Unknown("Tidegate does not route by the name of a TLS handshake".to_owned())
        }
        "req_ssl_alpn" | "req.ssl_alpn" | "ssl_fc_alpn" => {
            AclTest::Unknown("Tidegate does not route by ALPN".to_owned())
        }
        _ => AclTest::Unknown(format!("Tidegate has no condition like {name}")),
    }
}

fn addresses(values: &[&str]) -> Result<Vec<String>, String> {
    let valid = |value: &&str| {
        let (address, length) = value.split_once('/').unwrap_or((value, "0"));
        address.parse::<IpAddr>().is_ok() && length.parse::<u8>().is_ok()
    };
    match values.iter().all(valid) && !values.is_empty() {
        true => Ok(values.iter().map(|value| (*value).to_owned()).collect()),
        false => Err("only addresses and prefixes can be compared".to_owned()),
    }
}

fn ports(values: &[&str]) -> Result<Vec<String>, String> {
    let wrong = || "only ports and ranges of ports can be compared".to_owned();
    let number = |text: &str| text.parse::<u16>().map_err(|_| wrong());
    let range = |from: u16, to: u16| Ok(vec![format!("{from}-{to}")]);
    match values {
        ["ge", port] => range(number(port)?, u16::MAX),
        ["gt", port] => range(number(port)?.checked_add(1).ok_or_else(wrong)?, u16::MAX),
        ["le", port] => range(1, number(port)?),
        ["lt", port] => range(1, number(port)?.checked_sub(1).ok_or_else(wrong)?),
        [] => Err(wrong()),
        _ => {
            let values = values.iter().filter(|value| **value != "eq");
            let one = |value: &&str| match value.split_once(':') {
                None => number(value).map(|port| port.to_string()),
                Some((from, to)) => {
                    let from = if from.is_empty() { 1 } else { number(from)? };
                    let to = if to.is_empty() { u16::MAX } else { number(to)? };
                    Ok(format!("{from}-{to}"))
                }
            };
            values.map(one).collect()
        }
    }
}

/// Reads `gt NUMBER` or `ge NUMBER`.
fn above(values: &[&str]) -> Result<u64, String> {
    let wrong = || "only gt and ge can be compared".to_owned();
    match values {
        ["gt", number] => number.parse().map_err(|_| wrong()),
        ["ge", number] => {
            number.parse::<u64>().ok().and_then(|n| n.checked_sub(1)).ok_or_else(wrong)
        }
        _ => Err(wrong()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn condition(text: &str) -> Result<Vec<Vec<AclTerm>>, String> {
        let words: Vec<String> = text.split(' ').map(str::to_owned).collect();
        Acls::default().condition(&words)
    }

    #[test]
    fn conditions_are_alternatives_of_terms() {
        let read = condition("{ src 10.0.0.0/8 } !{ dst_port 80:90 443 } || TRUE").unwrap();
        assert_eq!(read.len(), 2);
        assert_eq!(read[0][0].test, AclTest::Sources(vec!["10.0.0.0/8".to_owned()]));
        assert!(read[0][1].negated);
        assert_eq!(read[0][1].test, AclTest::Ports(vec!["80-90".to_owned(), "443".to_owned()]));
        assert_eq!(read[1][0].test, AclTest::Always);
        assert!(condition("{ src 10.0.0.0/8").is_err() && condition("NONE").is_err());
    }
}

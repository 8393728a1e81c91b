//! The content of a child node as a member: JSON as in other registries, or the payload of
//! Curator's service discovery.
//!
//! The source calls it for each child. Nothing here reads a socket, and no input panics.

use crate::listing::{check_name, decode_member};
use serde::Deserialize;
use serde::de::IgnoredAny;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use tidegate_core::discovery::labels::MemberLabels;
use tidegate_core::discovery::{Announced, Wish};
use tidegate_core::model::ZookeeperFormat;

/// Longest content of a child, in bytes.
pub const CONTENT_BYTES_MAX: usize = 64 * 1024;

/// An instance of Curator's service discovery (ServiceInstance.java). Fields that
/// Tidegate does not use can have any value.
#[derive(Debug, Deserialize)]
struct CuratorInstance {
    id: Option<String>,
    address: String,
    port: Option<u16>,
    #[serde(rename = "sslPort")]
    ssl_port: Option<u16>,
    /// Absent in versions before 2.7.2.
    enabled: Option<bool>,
    #[serde(rename = "payload")]
    _payload: Option<IgnoredAny>,
}

/// Reads a child.
///
/// # Errors
/// What is wrong, without the name of the child.
pub(crate) fn member(
    format: ZookeeperFormat,
    child: &str,
    content: &[u8],
) -> Result<Announced, String> {
    if content.len() > CONTENT_BYTES_MAX {
        return Err(format!("it has more than {CONTENT_BYTES_MAX} bytes"));
    }
    let member = match format {
        ZookeeperFormat::Json => {
            decode_member(content, child).map_err(|problem| problem.to_string())
        }
        ZookeeperFormat::Curator => curator(child, content),
    }?;
    // The id in a document of Curator can have any character.
    check_name(&member.name)?;
    Ok(member)
}

fn curator(child: &str, content: &[u8]) -> Result<Announced, String> {
    let instance: CuratorInstance =
        serde_json::from_slice(content).map_err(|error| error.to_string())?;
    let ip: IpAddr = instance
        .address
        .parse()
        .map_err(|_| format!("address {:?} is not an IP address", instance.address))?;
    let ip = ip.to_canonical();
    if ip.is_unspecified() || ip.is_multicast() {
        return Err(format!("address {ip} is not the address of one host"));
    }
    // Curator writes 0 for an absent port in some versions.
    let mut ports = [instance.port, instance.ssl_port].into_iter().flatten();
    let port = ports.find(|port| *port != 0);
    let port = port.ok_or("it has neither port nor sslPort")?;
    let enabled = instance.enabled.unwrap_or(true);
    Ok(Announced {
        name: instance.id.filter(|id| !id.is_empty()).unwrap_or_else(|| child.to_owned()).into(),
        address: SocketAddr::new(ip, port),
        weight: None,
        tier: 0,
        wish: if enabled { Wish::Sessions } else { Wish::Draining },
        raw: if enabled { Arc::from("") } else { Arc::from("disabled") },
        labels: MemberLabels::default(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const INSTANCE: &str = r#"{"name":"web","id":"7f1e","address":"10.0.0.4","port":8080,
        "sslPort":null,"payload":{"@class":"com.example.Details","zone":["a"]},
        "registrationTimeUTC":1700000000000,"serviceType":"DYNAMIC","uriSpec":null,
        "enabled":true,"from":"a later version"}"#;

    fn curator(text: &str) -> Result<Announced, String> {
        member(ZookeeperFormat::Curator, "child", text.as_bytes())
    }

    #[test]
    fn an_instance_of_curator_is_a_member() {
        let member = curator(INSTANCE).unwrap();
        assert_eq!((&*member.name, member.wish), ("7f1e", Wish::Sessions));
        assert_eq!(member.address.to_string(), "10.0.0.4:8080");
        let disabled = curator(&INSTANCE.replace("true", "false")).unwrap();
        assert_eq!((disabled.wish, &*disabled.raw), (Wish::Draining, "disabled"));
        let old = curator(r#"{"address":"2001:db8::1","port":null,"sslPort":8443}"#).unwrap();
        assert_eq!((&*old.name, old.address.port()), ("child", 8443));
    }

    #[test]
    fn faults_name_what_is_wrong() {
        for (text, fault) in [
            (r#"{"address":"web.example","port":1}"#, "\"web.example\" is not an IP address"),
            (r#"{"address":"10.0.0.4"}"#, "neither port nor sslPort"),
            (r#"{"address":"0.0.0.0","port":1}"#, "is not the address of one host"),
            (r#"{"address":"::ffff:0.0.0.0","port":1}"#, "is not the address of one host"),
            (r#"{"address":"10.0.0.4","port":70000}"#, "invalid value"),
            (r#"{"port":1}"#, "missing field `address`"),
            (r#"{"id":"a b","address":"10.0.0.4","port":1}"#, "contains a space"),
            ("", "EOF"),
        ] {
            let said = curator(text).unwrap_err();
            assert!(said.contains(fault), "{text}: {said}");
        }
        let long = member(ZookeeperFormat::Json, "a", &vec![b' '; CONTENT_BYTES_MAX + 1]);
        assert!(long.unwrap_err().contains("more than 65536 bytes"));
    }

    #[test]
    fn json_has_the_form_of_lists() {
        let json = |text: &str| member(ZookeeperFormat::Json, "child", text.as_bytes());
        let member = json(r#"{"address":"10.0.0.1:80","weight":5,"state":"draining"}"#).unwrap();
        assert_eq!((&*member.name, member.weight, member.wish), ("child", Some(5), Wish::Draining));
        assert!(json(r#"{"address":"10.0.0.1:80","wieght":5}"#).is_err());
    }

    proptest! {
        #[test]
        fn no_content_panics(at in 0..INSTANCE.len(), byte in any::<u8>(), any in proptest::collection::vec(any::<u8>(), 0..99)) {
            let mut changed = INSTANCE.as_bytes().to_vec();
            changed[at] = byte;
            for content in [&changed, &any] {
                for format in [ZookeeperFormat::Json, ZookeeperFormat::Curator] {
                    let _ = member(format, "child", content);
                }
            }
        }
    }
}

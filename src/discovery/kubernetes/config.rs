//! How to reach the Kubernetes API: from inside of a pod, or by a kubeconfig file.
//!
//! `access` calls it with the content of the files. Nothing here reads a file or runs a
//! program: a kubeconfig that needs a program for its token is refused.

use crate::client::InlinePem;
use crate::parse::at_most;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tidegate_core::model::{ServerAddr, TlsClientConfig};
use zeroize::Zeroizing;

/// Largest kubeconfig file, in bytes.
pub(super) const KUBECONFIG_BYTES_MAX: u64 = 1 << 20;

/// Most contexts, clusters and users of the file, each.
const ENTRIES_MAX: usize = 1000;

/// What a kubeconfig says about its current context.
#[derive(Debug, Default)]
pub(super) struct KubeContext {
    pub(super) server: Option<ServerAddr>,
    /// Path below which the API is, without a slash at its end.
    pub(super) prefix: String,
    pub(super) tls: Option<TlsClientConfig>,
    pub(super) inline_pem: InlinePem,
    pub(super) token: Option<KubeToken>,
    pub(super) namespace: Option<Arc<str>>,
}

/// Where the token is.
pub(super) enum KubeToken {
    Inline(Zeroizing<String>),
    File(PathBuf),
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct KubeConfigFile {
    #[serde(default)]
    current_context: String,
    #[serde(default, deserialize_with = "at_most::<_, _, ENTRIES_MAX>")]
    contexts: Vec<NamedContext>,
    #[serde(default, deserialize_with = "at_most::<_, _, ENTRIES_MAX>")]
    clusters: Vec<NamedCluster>,
    #[serde(default, deserialize_with = "at_most::<_, _, ENTRIES_MAX>")]
    users: Vec<NamedUser>,
}

#[derive(Deserialize)]
struct NamedContext {
    name: String,
    context: ContextEntry,
}

#[derive(Deserialize)]
struct ContextEntry {
    cluster: String,
    #[serde(default)]
    user: String,
    namespace: Option<Arc<str>>,
}

#[derive(Deserialize)]
struct NamedCluster {
    name: String,
    cluster: ClusterEntry,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct ClusterEntry {
    server: String,
    certificate_authority: Option<PathBuf>,
    certificate_authority_data: Option<String>,
    tls_server_name: Option<String>,
    #[serde(default)]
    insecure_skip_tls_verify: bool,
    proxy_url: Option<String>,
}

#[derive(Deserialize)]
struct NamedUser {
    name: String,
    #[serde(default)]
    user: UserEntry,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct UserEntry {
    token: Option<SecretText>,
    #[serde(rename = "tokenFile")]
    token_file: Option<PathBuf>,
    client_certificate: Option<PathBuf>,
    client_certificate_data: Option<String>,
    client_key: Option<PathBuf>,
    client_key_data: Option<SecretText>,
    exec: Option<serde::de::IgnoredAny>,
    auth_provider: Option<serde::de::IgnoredAny>,
    username: Option<String>,
}

/// A text that is overwritten on drop.
#[derive(Deserialize)]
#[serde(from = "String")]
struct SecretText(Zeroizing<String>);

impl From<String> for SecretText {
    fn from(text: String) -> SecretText {
        SecretText(Zeroizing::new(text))
    }
}

/// Reads a kubeconfig. `dir` is the directory of the file: paths are relative to it.
///
/// # Errors
/// What is wrong, without the name of the file.
pub(super) fn kubeconfig(text: &str, dir: &Path) -> Result<KubeContext, String> {
    let file: KubeConfigFile = serde_norway::from_str(text).map_err(|error| error.to_string())?;
    let wanted = &file.current_context;
    let context = file.contexts.into_iter().find(|context| context.name == *wanted);
    let context = context.ok_or_else(|| format!("current-context {wanted:?} does not exist"))?;
    let ContextEntry { cluster, user, namespace } = context.context;
    let named = |named: &NamedCluster| named.name == cluster;
    let entry = file.clusters.into_iter().find(named);
    let entry = entry.ok_or_else(|| format!("cluster {cluster:?} does not exist"))?.cluster;
    let login = match file.users.into_iter().find(|named| named.name == user) {
        Some(named) => named.user,
        None if user.is_empty() => UserEntry::default(),
        None => return Err(format!("user {user:?} does not exist")),
    };
    login.refuse_unsupported(&user)?;
    entry.refuse_unsupported(&cluster)?;
    let (secure, server, prefix) = server_of(&entry.server)?;
    let inline_pem = InlinePem {
        ca: decoded("certificate-authority-data", entry.certificate_authority_data.as_deref())?,
        cert: decoded("client-certificate-data", login.client_certificate_data.as_deref())?,
        key: secret("client-key-data", login.client_key_data.as_ref())?,
    };
    let path = |path: Option<PathBuf>| path.map(|path| dir.join(path));
    let tls = secure.then(|| TlsClientConfig {
        ca_file: path(entry.certificate_authority),
        cert_file: path(login.client_certificate),
        key_file: path(login.client_key),
        server_name: entry.tls_server_name,
    });
    let token = match (login.token_file, login.token) {
        (Some(file), _) => Some(KubeToken::File(dir.join(file))),
        (None, Some(token)) => Some(KubeToken::Inline(token.0)),
        (None, None) => None,
    };
    if token.is_some() && !secure && !is_local(&server) {
        return Err("a token needs https to a server that is not on this host".to_owned());
    }
    Ok(KubeContext { server: Some(server), prefix, tls, inline_pem, token, namespace })
}

/// Reads the address that Kubernetes puts into the environment of a pod.
///
/// # Errors
/// A value is absent or has the wrong form.
pub(super) fn in_cluster(host: Option<&str>, port: Option<&str>) -> Result<ServerAddr, String> {
    let (Some(host), Some(port)) = (host, port) else {
        return Err("this process runs in no pod (KUBERNETES_SERVICE_HOST and \
            KUBERNETES_SERVICE_PORT are not set); set servers or kubeconfig"
            .to_owned());
    };
    let port = port.parse().map_err(|_| format!("KUBERNETES_SERVICE_PORT is {port:?}"))?;
    Ok(server_addr(host, port))
}

/// Splits the URL of a server into security, address and path.
fn server_of(url: &str) -> Result<(bool, ServerAddr, String), String> {
    let wrong = || format!("server {url:?} has not the form https://HOST:PORT");
    let (scheme, rest) = url.split_once("://").ok_or_else(wrong)?;
    let secure = match scheme {
        "https" => true,
        "http" => false,
        _ => return Err(wrong()),
    };
    let (authority, path) = match rest.split_once('/') {
        Some((authority, path)) => (authority, format!("/{path}")),
        None => (rest, String::new()),
    };
    if authority.is_empty() || authority.contains('@') || path.contains(['?', '#', ' ']) {
        return Err(wrong());
    }
    let standard = if secure { 443 } else { 80 };
    let (host, port) = match authority.rsplit_once(':') {
        Some((host, port)) if !port.ends_with(']') => (host, port.parse().map_err(|_| wrong())?),
        _ => (authority, standard),
    };
    let host = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
    Ok((secure, server_addr(host, port), path.trim_end_matches('/').to_owned()))
}

fn server_addr(host: &str, port: u16) -> ServerAddr {
    match host.parse::<IpAddr>() {
        Ok(ip) => ServerAddr::Ip(SocketAddr::new(ip, port)),
        Err(_) => ServerAddr::Name { host: host.into(), port },
    }
}

fn is_local(server: &ServerAddr) -> bool {
    matches!(server, ServerAddr::Ip(address) if address.ip().is_loopback())
}

fn decoded(key: &str, text: Option<&str>) -> Result<Option<Arc<[u8]>>, String> {
    let Some(text) = text else { return Ok(None) };
    let bytes = STANDARD.decode(text.trim()).map_err(|_| format!("{key} is not base64"))?;
    Ok(Some(bytes.into()))
}

fn secret(key: &str, text: Option<&SecretText>) -> Result<Option<Arc<Zeroizing<Vec<u8>>>>, String> {
    let Some(SecretText(text)) = text else { return Ok(None) };
    let bytes = STANDARD.decode(text.trim()).map_err(|_| format!("{key} is not base64"))?;
    Ok(Some(Arc::new(Zeroizing::new(bytes))))
}

// === impl UserEntry, ClusterEntry ===

impl UserEntry {
    fn refuse_unsupported(&self, name: &str) -> Result<(), String> {
        let refused = |what: &str, instead: &str| {
            Err(format!("user {name:?} has {what}, which is not supported; {instead}"))
        };
        if self.exec.is_some() {
            return refused("exec", "Tidegate runs no programs: use tokenFile or a certificate");
        }
        if self.auth_provider.is_some() {
            return refused("auth-provider", "use tokenFile or a certificate");
        }
        if self.username.is_some() {
            return refused("username", "Kubernetes removed passwords in version 1.19");
        }
        let cert = self.client_certificate.is_some() || self.client_certificate_data.is_some();
        let key = self.client_key.is_some() || self.client_key_data.is_some();
        if cert != key {
            return Err(format!("user {name:?} has only one of client certificate and key"));
        }
        Ok(())
    }
}

impl ClusterEntry {
    fn refuse_unsupported(&self, name: &str) -> Result<(), String> {
        if self.insecure_skip_tls_verify {
            let help = "Tidegate always verifies the server: set certificate-authority";
            return Err(format!("cluster {name:?} has insecure-skip-tls-verify; {help}"));
        }
        if self.proxy_url.is_some() {
            return Err(format!("cluster {name:?} has proxy-url, which is not supported"));
        }
        Ok(())
    }
}

// === impl Debug for KubeToken ===

impl std::fmt::Debug for KubeToken {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            KubeToken::Inline(_) => f.write_str("a token"),
            KubeToken::File(path) => path.fmt(f),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const FILE: &str = r#"
apiVersion: v1
kind: Config
current-context: edge
contexts:
- name: other
  context: {cluster: missing, user: missing}
- name: edge
  context:
    cluster: lab
    user: tidegate
    namespace: shop
clusters:
- name: lab
  cluster:
    server: https://api.lab.example:6443/k8s/
    certificate-authority-data: UEVN
users:
- name: tidegate
  user:
    tokenFile: token
preferences: {}
"#;

    fn refused(from: &str, to: &str) -> String {
        assert!(FILE.contains(from), "{from}");
        kubeconfig(&FILE.replace(from, to), Path::new("/etc/k")).unwrap_err()
    }

    #[test]
    fn the_current_context_counts() {
        let context = kubeconfig(FILE, Path::new("/etc/k")).unwrap();
        assert_eq!(context.server.unwrap().to_string(), "api.lab.example:6443");
        assert_eq!((&*context.prefix, context.namespace.as_deref()), ("/k8s", Some("shop")));
        assert_eq!(context.inline_pem.ca.as_deref(), Some(&b"PEM"[..]));
        let Some(KubeToken::File(file)) = context.token else { panic!("{:?}", context.token) };
        assert_eq!(file, Path::new("/etc/k/token"));
    }

    #[test]
    fn what_is_not_supported_is_refused_by_name() {
        for (from, to, said) in [
            ("tokenFile: token", "exec: {command: aws}", "exec, which is not supported"),
            ("tokenFile: token", "auth-provider: {name: gcp}", "auth-provider"),
            ("tokenFile: token", "username: a", "username"),
            ("tokenFile: token", "client-key: k", "only one of"),
            ("tokenFile: token", "client-key-data: \"?\"\n    client-certificate: c", "base64"),
            ("certificate-authority-data: UEVN", "insecure-skip-tls-verify: true", "verifies"),
            ("certificate-authority-data: UEVN", "proxy-url: http://p", "proxy-url"),
            ("certificate-authority-data: UEVN", "certificate-authority-data: '*'", "base64"),
            ("https://", "ftp://", "HOST:PORT"),
            ("https://", "http://", "a token needs https"),
            ("current-context: edge", "current-context: edgy", "\"edgy\" does not exist"),
            ("current-context: edge", "current-context: other", "\"missing\" does not exist"),
            ("clusters:", "clusters: 7\nx:", "invalid type"),
        ] {
            let error = refused(from, to);
            assert!(error.contains(said), "{to}: {error}");
        }
    }

    #[test]
    fn addresses_of_servers_have_many_forms() {
        for (url, secure, server, prefix) in [
            ("https://10.0.0.1", true, "10.0.0.1:443", ""),
            ("https://[fd00::1]:6443/", true, "[fd00::1]:6443", ""),
            ("https://[fd00::1]", true, "[fd00::1]:443", ""),
            ("http://127.0.0.1:8001/a/b/", false, "127.0.0.1:8001", "/a/b"),
        ] {
            let (is_secure, address, path) = server_of(url).unwrap();
            assert_eq!((is_secure, &*address.to_string(), &*path), (secure, server, prefix));
        }
        assert!(in_cluster(Some("10.96.0.1"), None).unwrap_err().contains("no pod"));
        let inside = in_cluster(Some("fd00::1"), Some("443")).unwrap();
        assert_eq!(inside.to_string(), "[fd00::1]:443");
    }

    proptest! {
        #[test]
        fn no_text_panics(at in 0..FILE.len(), text in any::<String>()) {
            let changed = format!("{}{text}{}", &FILE[..at], &FILE[at..]);
            let _ = (kubeconfig(&changed, Path::new("/")), kubeconfig(&text, Path::new("/")));
            let _ = server_of(&text);
        }
    }
}

//! The API server of a registry: its address, TLS, token and own namespace.
//!
//! Questions to one registry share a [`KubernetesAccess`]. It reads the files at the first
//! use, and again after a failure that they can cause, so a changed kubeconfig needs no
//! restart. The token is read for each request. Nothing here sends a request.

use super::config::{self, KUBECONFIG_BYTES_MAX, KubeContext, KubeToken};
use crate::client::{HttpClient, HttpEndpoint, HttpFailure, HttpRequest, InlinePem};
use crate::resolver::Resolver;
use crate::secret::SecretFile;
use hyper::header::{ACCEPT, AUTHORIZATION, HeaderValue};
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tidegate_core::model::{RegistryConfig, TlsClientConfig};

/// Where Kubernetes mounts the files of a pod's service account.
const ACCOUNT_DIR: &str = "/var/run/secrets/kubernetes.io/serviceaccount";

/// Namespace if nothing names one.
const NAMESPACE: &str = "default";

/// The access to one registry. Clones share it.
#[derive(Debug, Clone)]
pub struct KubernetesAccess(Arc<AccessShared>);

#[derive(Debug)]
struct AccessShared {
    registry: Arc<RegistryConfig>,
    resolver: Resolver,
    account_dir: PathBuf,
    server: Mutex<Option<KubernetesServer>>,
}

/// A client and what its requests need.
#[derive(Debug, Clone)]
pub(super) struct KubernetesServer {
    pub(super) client: HttpClient,
    /// Path below which the API is.
    pub(super) prefix: String,
    /// Namespace of questions without one.
    pub(super) namespace: Arc<str>,
    /// A token that is no file.
    token: Option<HeaderValue>,
}

// === impl KubernetesAccess ===

impl KubernetesAccess {
    /// Reads nothing yet.
    pub fn new(registry: Arc<RegistryConfig>, resolver: Resolver) -> KubernetesAccess {
        KubernetesAccess::with_account(registry, resolver, Path::new(ACCOUNT_DIR))
    }

    /// As [`new`](KubernetesAccess::new), with other files of a service account.
    pub(super) fn with_account(
        registry: Arc<RegistryConfig>,
        resolver: Resolver,
        account_dir: &Path,
    ) -> KubernetesAccess {
        let (account_dir, server) = (account_dir.to_owned(), Mutex::new(None));
        KubernetesAccess(Arc::new(AccessShared { registry, resolver, account_dir, server }))
    }

    /// Returns the client. All questions share its connections.
    pub(super) fn server(&self) -> Result<KubernetesServer, HttpFailure> {
        let mut server = self.0.lock();
        if let Some(server) = &*server {
            return Ok(server.clone());
        }
        Ok(server.insert(self.0.read()?).clone())
    }

    /// The server or the token failed: the files are read again at the next use.
    pub(super) fn forget(&self) {
        // Servers of the configuration come from no file.
        if self.0.registry.kubeconfig.is_some() || self.0.registry.servers.is_empty() {
            *self.0.lock() = None;
        }
    }
}

// === impl AccessShared ===

impl AccessShared {
    fn lock(&self) -> MutexGuard<'_, Option<KubernetesServer>> {
        self.server.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn read(&self) -> Result<KubernetesServer, HttpFailure> {
        match &self.registry.kubeconfig {
            Some(file) => self.by_kubeconfig(file),
            None if self.registry.servers.is_empty() => self.in_cluster(),
            None => {
                let endpoint = HttpEndpoint::of(&self.registry, self.resolver.clone());
                Ok(KubernetesServer::new(endpoint, KubeContext::default()))
            }
        }
    }

    fn by_kubeconfig(&self, file: &Path) -> Result<KubernetesServer, HttpFailure> {
        let wrong = |cause: &dyn std::fmt::Display| {
            HttpFailure::local(format_args!("cannot use kubeconfig {}: {cause}", file.display()))
        };
        let text = read_text(file).map_err(|error| wrong(&error))?;
        let dir = file.parent().unwrap_or(Path::new("/"));
        let mut context = config::kubeconfig(&text, dir).map_err(|error| wrong(&error))?;
        let mut endpoint = HttpEndpoint::of(&self.registry, self.resolver.clone());
        // `servers` of the registry take precedence over the server of the file.
        if endpoint.servers.is_empty() {
            endpoint.servers = context.server.take().into_iter().collect();
        }
        endpoint.tls = context.tls.take().or(endpoint.tls);
        endpoint.inline_pem = std::mem::take(&mut context.inline_pem);
        if let Some(KubeToken::File(path)) = &context.token {
            endpoint.auth = Some(SecretFile::new(path));
        }
        Ok(KubernetesServer::new(endpoint, context))
    }

    fn in_cluster(&self) -> Result<KubernetesServer, HttpFailure> {
        let variable = |name| std::env::var(name).ok();
        let host = variable("KUBERNETES_SERVICE_HOST");
        let port = variable("KUBERNETES_SERVICE_PORT");
        let server = config::in_cluster(host.as_deref(), port.as_deref());
        let account = |name| self.account_dir.join(name);
        let namespace = read_text(&account("namespace")).ok();
        let namespace =
            namespace.map(|text| text.trim().into()).filter(|name: &Arc<str>| !name.is_empty());
        let token = account("token");
        let endpoint = HttpEndpoint {
            servers: vec![server.map_err(HttpFailure::local)?],
            timeout: self.registry.timeout,
            tls: Some(TlsClientConfig {
                ca_file: Some(account("ca.crt")),
                ..self.registry.tls.clone().unwrap_or_default()
            }),
            inline_pem: InlinePem::default(),
            auth: Some(match &self.registry.token_file {
                Some(file) => SecretFile::new(file),
                None => SecretFile::mounted(&token),
            }),
            resolver: self.resolver.clone(),
        };
        Ok(KubernetesServer::new(endpoint, KubeContext { namespace, ..KubeContext::default() }))
    }
}

/// Returns the certificates, keys and tokens that a kubeconfig names, for the sandbox. None if
/// the file cannot be used; the source then tells why.
pub fn files_of_kubeconfig(file: &Path) -> Vec<PathBuf> {
    let dir = file.parent().unwrap_or(Path::new("/"));
    let context = read_text(file).ok().and_then(|text| config::kubeconfig(&text, dir).ok());
    let KubeContext { tls, token, .. } = context.unwrap_or_default();
    let tls = tls.into_iter().flat_map(|tls| [tls.ca_file, tls.cert_file, tls.key_file]);
    let token = match token {
        Some(KubeToken::File(path)) => Some(path),
        Some(KubeToken::Inline(_)) | None => None,
    };
    tls.flatten().chain(token).collect()
}

fn read_text(file: &Path) -> std::io::Result<String> {
    let mut text = String::new();
    File::open(file)?.take(KUBECONFIG_BYTES_MAX).read_to_string(&mut text)?;
    Ok(text)
}

// === impl KubernetesServer ===

impl KubernetesServer {
    fn new(endpoint: HttpEndpoint, context: KubeContext) -> KubernetesServer {
        let token = match &context.token {
            Some(KubeToken::Inline(token)) => {
                let mut header = HeaderValue::from_str(&format!("Bearer {}", token.trim())).ok();
                header.iter_mut().for_each(|header| header.set_sensitive(true));
                header
            }
            _ => None,
        };
        KubernetesServer {
            client: HttpClient::new(endpoint),
            prefix: context.prefix,
            namespace: context.namespace.unwrap_or_else(|| NAMESPACE.into()),
            token,
        }
    }

    /// Returns a GET request.
    pub(super) fn request(&self, target: String) -> HttpRequest {
        let mut request = HttpRequest::get(target);
        request.headers.push((ACCEPT, HeaderValue::from_static("application/json")));
        if let Some(token) = &self.token {
            request.headers.push((AUTHORIZATION, token.clone()));
        }
        request
    }
}

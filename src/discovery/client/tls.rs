//! TLS to registries: trusted certificates, the client's certificate, the server's name.
//!
//! The dialler calls [`handshake`] for each new connection and reads all files again, so a
//! rotated certificate needs no restart. The server's certificate is always verified.

use super::failure::{HttpFailure, failure_of_io, with_causes};
use crate::secret::SecretFile;
use rustls::client::WantsClientCert;
use rustls::{ClientConfig, ConfigBuilder, RootCertStore};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::sync::Arc;
use tidegate_core::discovery::SourceFailure;
use tidegate_core::model::{ServerAddr, TlsClientConfig};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

/// Largest PEM file of certificates, in bytes.
const PEM_BYTES_MAX: u64 = 4 << 20;

/// Does a handshake over a new connection to `server`.
///
/// # Errors
/// `Local`: a file cannot be read. `Connect`: the connection failed. `Protocol`: the
/// server's certificate is not valid for the name, or the server speaks no TLS.
pub(super) async fn handshake<S: AsyncRead + AsyncWrite + Unpin>(
    tls: &TlsClientConfig,
    server: &ServerAddr,
    stream: S,
) -> Result<TlsStream<S>, HttpFailure> {
    let name = server_name(tls, server)?;
    let files = tls.clone();
    // The trusted certificates of a system are some 100 files or one of 200 KiB.
    let config = tokio::task::spawn_blocking(move || client_config(&files)).await;
    let config = config.map_err(|_| HttpFailure::local("reading of certificates panicked"))??;
    TlsConnector::from(Arc::new(config)).connect(name, stream).await.map_err(|error| {
        let otherwise = match error.get_ref().is_some_and(|inner| inner.is::<rustls::Error>()) {
            true => SourceFailure::Protocol,
            false => SourceFailure::Connect,
        };
        let why = failure_of_io(&error, otherwise);
        HttpFailure::new(why, format_args!("TLS handshake failed: {}", with_causes(&error)))
    })
}

/// The name that the certificate must have: `server_name`, else the host of the address.
fn server_name(
    tls: &TlsClientConfig,
    server: &ServerAddr,
) -> Result<ServerName<'static>, HttpFailure> {
    let text = match (&tls.server_name, server) {
        (Some(name), _) => name.clone(),
        (None, ServerAddr::Ip(address)) => return Ok(ServerName::IpAddress(address.ip().into())),
        (None, ServerAddr::Name { host, .. }) => host.trim_end_matches('.').to_owned(),
        (None, ServerAddr::Unix(_)) => "localhost".to_owned(),
    };
    ServerName::try_from(text.clone())
        .map_err(|_| HttpFailure::local(format_args!("{text:?} is no name of a TLS server")))
}

fn client_config(tls: &TlsClientConfig) -> Result<ClientConfig, HttpFailure> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(HttpFailure::local)?
        .with_root_certificates(roots(tls.ca_file.as_deref())?);
    match (&tls.cert_file, &tls.key_file) {
        (Some(cert), Some(key)) => with_client_certificate(builder, cert, key),
        _ => Ok(builder.with_no_client_auth()),
    }
}

fn with_client_certificate(
    builder: ConfigBuilder<ClientConfig, WantsClientCert>,
    cert: &Path,
    key: &Path,
) -> Result<ClientConfig, HttpFailure> {
    let chain = certificates(cert)?;
    let bytes = SecretFile::new(key).bytes().map_err(HttpFailure::local)?;
    let unusable = |cause: &dyn std::fmt::Display| {
        HttpFailure::local(format_args!("cannot use private key {}: {cause}", key.display()))
    };
    let private = PrivateKeyDer::from_pem_slice(&bytes).map_err(|error| unusable(&error))?;
    builder.with_client_auth_cert(chain, private).map_err(|error| unusable(&error))
}

fn roots(file: Option<&Path>) -> Result<RootCertStore, HttpFailure> {
    let mut store = RootCertStore::empty();
    let Some(file) = file else {
        let system = rustls_native_certs::load_native_certs();
        let (added, _) = store.add_parsable_certificates(system.certs);
        return match added {
            0 => Err(HttpFailure::local("this system has no trusted certificates; set ca_file")),
            _ => Ok(store),
        };
    };
    for certificate in certificates(file)? {
        let unusable = |error| {
            HttpFailure::local(format_args!(
                "cannot trust a certificate of {}: {error}",
                file.display()
            ))
        };
        store.add(certificate).map_err(unusable)?;
    }
    Ok(store)
}

/// Reads at least one certificate.
fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, HttpFailure> {
    let unusable = |cause: &dyn std::fmt::Display| {
        HttpFailure::local(format_args!("cannot use certificates of {}: {cause}", path.display()))
    };
    let file = File::open(path).map_err(|error| unusable(&error))?;
    let mut bytes = Vec::new();
    file.take(PEM_BYTES_MAX).read_to_end(&mut bytes).map_err(|error| unusable(&error))?;
    let parsed: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&bytes).collect();
    let found = parsed.map_err(|error| unusable(&error))?;
    match found.is_empty() {
        true => Err(unusable(&"the file has no PEM block CERTIFICATE")),
        false => Ok(found),
    }
}

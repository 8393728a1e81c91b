//! TLS to registries: trusted certificates, the client's certificate, the server's name.
//!
//! The dialler calls [`handshake`] for each new connection and reads all files again, so a
//! rotated certificate needs no restart. The server's certificate is always verified.

use super::failure::{HttpFailure, failure_of_io, with_causes};
use crate::secret::SecretFile;
use crate::tasks;
use rustls::{ClientConfig, RootCertStore};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use std::borrow::Cow;
use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::path::Path;
use std::sync::Arc;
use tidegate_core::discovery::SourceFailure;
use tidegate_core::model::{ServerAddr, TlsClientConfig};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use zeroize::Zeroizing;

/// Largest PEM file of certificates, in bytes.
const PEM_BYTES_MAX: u64 = 4 << 20;

/// PEM texts that are used instead of the files. Clones share them.
#[derive(Clone, Default)]
pub struct InlinePem {
    /// Trusted certificates.
    pub ca: Option<Arc<[u8]>>,
    /// The client's certificate.
    pub cert: Option<Arc<[u8]>>,
    /// Its private key.
    pub key: Option<Arc<Zeroizing<Vec<u8>>>>,
}

impl fmt::Debug for InlinePem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("InlinePem")
    }
}

/// Does a handshake over a new connection to `server`.
///
/// # Errors
/// `Local`: a file cannot be read. `Connect`: the connection failed. `Protocol`: the
/// server's certificate is not valid for the name, or the server speaks no TLS.
pub(super) async fn handshake<S: AsyncRead + AsyncWrite + Unpin>(
    tls: &TlsClientConfig,
    inline: &InlinePem,
    server: &ServerAddr,
    stream: S,
) -> Result<TlsStream<S>, HttpFailure> {
    let name = server_name(tls, server)?;
    let (files, inline) = (tls.clone(), inline.clone());
    // The trusted certificates of a system are some 100 files or one of 200 KiB.
    let config = tasks::blocking(move || client_config(&files, &inline)).await;
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

fn client_config(tls: &TlsClientConfig, inline: &InlinePem) -> Result<ClientConfig, HttpFailure> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(HttpFailure::local)?
        .with_root_certificates(roots(tls.ca_file.as_deref(), inline.ca.as_deref())?);
    let cert = pem(tls.cert_file.as_deref(), inline.cert.as_deref())?;
    let key = match (&inline.key, &tls.key_file) {
        (Some(key), _) => Some((Zeroizing::clone(key), INLINE.to_owned())),
        (None, Some(file)) => {
            let bytes = SecretFile::new(file).bytes().map_err(HttpFailure::local)?;
            Some((bytes, file.display().to_string()))
        }
        (None, None) => None,
    };
    match (cert, key) {
        (Some(cert), Some((key, place))) => {
            let unusable = |cause: &dyn fmt::Display| {
                HttpFailure::local(format_args!("cannot use private key {place}: {cause}"))
            };
            let private = PrivateKeyDer::from_pem_slice(&key).map_err(|error| unusable(&error))?;
            let chain = certificates(&cert)?;
            builder.with_client_auth_cert(chain, private).map_err(|error| unusable(&error))
        }
        _ => Ok(builder.with_no_client_auth()),
    }
}

/// Reads the trusted certificates of a file, else those of the system. It blocks for the
/// time of reading.
///
/// # Errors
/// A text for the operator: the file cannot be read, or there is no usable certificate.
pub fn trusted_certificates(file: Option<&Path>) -> Result<RootCertStore, String> {
    roots(file, None).map_err(|failure| failure.detail)
}

fn roots(file: Option<&Path>, inline: Option<&[u8]>) -> Result<RootCertStore, HttpFailure> {
    let mut store = RootCertStore::empty();
    let Some(text) = pem(file, inline)? else {
        let system = rustls_native_certs::load_native_certs();
        let (added, _) = store.add_parsable_certificates(system.certs);
        return match added {
            0 => Err(HttpFailure::local(
                "this system has no trusted certificates; name a file of certificates",
            )),
            _ => Ok(store),
        };
    };
    for certificate in certificates(&text)? {
        let unusable = |error| {
            let place = &text.place;
            HttpFailure::local(format_args!("cannot trust a certificate of {place}: {error}"))
        };
        store.add(certificate).map_err(unusable)?;
    }
    Ok(store)
}

/// The place of an inline text in messages.
const INLINE: &str = "the kubeconfig";

/// A text with certificates.
struct PemText<'a> {
    bytes: Cow<'a, [u8]>,
    place: String,
}

/// Returns the inline text, else the content of the file.
fn pem<'a>(
    file: Option<&Path>,
    inline: Option<&'a [u8]>,
) -> Result<Option<PemText<'a>>, HttpFailure> {
    if let Some(inline) = inline {
        return Ok(Some(PemText { bytes: Cow::Borrowed(inline), place: INLINE.to_owned() }));
    }
    let Some(path) = file else { return Ok(None) };
    let place = path.display().to_string();
    let unusable = |error: io::Error| {
        HttpFailure::local(format_args!("cannot use certificates of {place}: {error}"))
    };
    let mut bytes = Vec::new();
    let file = File::open(path).map_err(unusable)?;
    file.take(PEM_BYTES_MAX).read_to_end(&mut bytes).map_err(unusable)?;
    Ok(Some(PemText { bytes: Cow::Owned(bytes), place }))
}

/// Reads at least one certificate.
fn certificates(text: &PemText<'_>) -> Result<Vec<CertificateDer<'static>>, HttpFailure> {
    let unusable = |cause: &dyn fmt::Display| {
        HttpFailure::local(format_args!("cannot use certificates of {}: {cause}", text.place))
    };
    let parsed: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&text.bytes).collect();
    let found = parsed.map_err(|error| unusable(&error))?;
    match found.is_empty() {
        true => Err(unusable(&"it has no PEM block CERTIFICATE")),
        false => Ok(found),
    }
}

//! TLS of probes: the handshake, and how the certificate of a backend is verified.
//!
//! Called by probes with `tls`. Sessions of a backend are resumed in no probe, because a
//! resumed session does not show that the certificate is still valid.

use super::ProbeError;
use rustls::client::Resumption;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};
use tidegate_core::metrics::counters::LocalErrorKind;
use tidegate_core::model::{BackendAddr, ProbeTls, TlsVerify};
use tidegate_discovery::client::trusted_certificates;
use tidegate_net::clock;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

/// The trusted certificates of the system are read again after this time.
const SYSTEM_READ_AGAIN: Duration = Duration::from_secs(3600);

/// Most settings that are kept. Each pool has at most one.
const KEPT_MAX: usize = 1024;

/// The settings of TLS that probes share. They are read again when the file of trusted
/// certificates changes.
#[derive(Debug, Default)]
pub struct TlsConfigs(Mutex<HashMap<ProbeTls, KeptConfig>>);

#[derive(Debug)]
struct KeptConfig {
    config: Arc<ClientConfig>,
    read_at: Instant,
    /// Of the file, when it was read.
    modified: Option<SystemTime>,
}

/// Accepts every certificate: `verify = "off"`. It still verifies that the backend has the
/// private key of its certificate.
#[derive(Debug)]
struct AnyCertificate(Arc<CryptoProvider>);

/// TLS of a connection that may start without it.
#[derive(Clone, Copy)]
pub(super) struct StartTls<'a> {
    /// `None`: no TLS.
    pub(super) settings: Option<&'a ProbeTls>,
    pub(super) backend: &'a BackendAddr,
    pub(super) configs: &'a TlsConfigs,
}

/// Announces the end (RFC 8446, section 6.1), so that the backend logs no error. The result of
/// the probe does not depend on it.
pub(super) async fn end<S: AsyncRead + AsyncWrite + Unpin>(stream: &mut TlsStream<S>) {
    let _ = stream.shutdown().await;
}

fn server_name(tls: &ProbeTls, backend: &BackendAddr) -> Result<ServerName<'static>, ProbeError> {
    match (&tls.name, backend) {
        (Some(name), _) => ServerName::try_from(name.clone())
            .map_err(|_| local(format!("{name:?} is no name of a TLS server"))),
        (None, BackendAddr::Tcp(address) | BackendAddr::ClientPort(address, _)) => {
            Ok(ServerName::IpAddress(address.ip().into()))
        }
        (None, BackendAddr::Unix(_)) => ServerName::try_from("localhost")
            .map_err(|_| local("localhost is no name of a TLS server".to_owned())),
    }
}

fn local(reason: String) -> ProbeError {
    ProbeError::Local(reason, LocalErrorKind::Other)
}

fn read(tls: &ProbeTls) -> Result<ClientConfig, String> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ClientConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .map_err(|error| error.to_string())?;
    let roots = match &tls.verify {
        TlsVerify::System => trusted_certificates(None)?,
        TlsVerify::File(path) => trusted_certificates(Some(path))?,
        TlsVerify::Off => RootCertStore::empty(),
    };
    let mut config = builder.with_root_certificates(roots).with_no_client_auth();
    if tls.verify == TlsVerify::Off {
        config.dangerous().set_certificate_verifier(Arc::new(AnyCertificate(provider)));
    }
    config.alpn_protocols = tls.alpn.iter().map(|name| name.clone().into_bytes()).collect();
    config.enable_sni = tls.name.is_some();
    config.resumption = Resumption::disabled();
    Ok(config)
}

fn modified(verify: &TlsVerify) -> Option<SystemTime> {
    match verify {
        TlsVerify::File(path) => std::fs::metadata(path).and_then(|found| found.modified()).ok(),
        TlsVerify::System | TlsVerify::Off => None,
    }
}

// === impl StartTls ===

impl StartTls<'_> {
    /// Does the handshake. Without settings, any certificate is accepted.
    pub(super) async fn handshake<S: AsyncRead + AsyncWrite + Unpin>(
        &self,
        stream: S,
    ) -> Result<TlsStream<S>, ProbeError> {
        let any = ProbeTls { verify: TlsVerify::Off, name: None, alpn: Vec::new() };
        let tls = self.settings.unwrap_or(&any);
        let name = server_name(tls, self.backend)?;
        let config = self.configs.of(tls).await?;
        TlsConnector::from(config)
            .connect(name, stream)
            .await
            .map_err(|error| ProbeError::Backend(format!("TLS handshake failed: {error}")))
    }
}

// === impl TlsConfigs ===

impl TlsConfigs {
    /// Returns the settings. Reads files on another thread, because this one has to handle
    /// heartbeats in the meantime.
    async fn of(&self, tls: &ProbeTls) -> Result<Arc<ClientConfig>, ProbeError> {
        let modified = modified(&tls.verify);
        if let Some(kept) = self.kept(tls, modified) {
            return Ok(kept);
        }
        let wanted = tls.clone();
        let config = tokio::task::spawn_blocking(move || read(&wanted)).await;
        let config = config.map_err(|_| local("reading of certificates panicked".to_owned()))?;
        let config = Arc::new(config.map_err(local)?);
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if all.len() >= KEPT_MAX {
            all.clear();
        }
        let kept = KeptConfig { config: Arc::clone(&config), read_at: clock::now(), modified };
        all.insert(tls.clone(), kept);
        Ok(config)
    }

    fn kept(&self, tls: &ProbeTls, modified: Option<SystemTime>) -> Option<Arc<ClientConfig>> {
        let all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let kept = all.get(tls)?;
        let old = match tls.verify {
            TlsVerify::System => clock::now() - kept.read_at > SYSTEM_READ_AGAIN,
            TlsVerify::File(_) => modified != kept.modified,
            TlsVerify::Off => false,
        };
        (!old).then(|| Arc::clone(&kept.config))
    }
}

// === impl AnyCertificate ===

impl ServerCertVerifier for AnyCertificate {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, cert, dss, &self.0.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, dss, &self.0.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

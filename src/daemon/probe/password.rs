//! Reads the password of a probe.
//!
//! Called once for each probe, so a rotated file needs no reload. It reads on another
//! thread, because the control thread handles heartbeats in the meantime.

use super::ProbeError;
use tidegate_core::metrics::counters::LocalErrorKind;
use tidegate_core::model::ProbeLogin;
use tidegate_discovery::secret::SecretFile;
use zeroize::Zeroizing;

/// Returns the password; `None` if the probe has none. A file that this host cannot read
/// says nothing about the backend.
pub(super) async fn read(login: &ProbeLogin) -> Result<Option<Zeroizing<String>>, ProbeError> {
    let Some(path) = &login.password_file else { return Ok(None) };
    let file = SecretFile::new(path);
    let local = |reason: String| ProbeError::Local(reason, LocalErrorKind::Other);
    let line = tokio::task::spawn_blocking(move || file.line()).await;
    let line = line.map_err(|_| local("reading of the password panicked".to_owned()))?;
    line.map(Some).map_err(|problem| local(problem.to_string()))
}

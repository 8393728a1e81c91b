//! Keys that name files with certificates and secrets for member sources.
//!
//! Called by `registry` and `discover`. The files are read here only to find errors early:
//! the sources read them again for each connection. It opens a file only with
//! [`NamedFiles::Read`] or [`NamedFiles::Kept`].

use std::borrow::Cow;
use std::path::{Path, PathBuf};

use super::globals::file_path;
use crate::file::{Field, Section};
use crate::value::{ValueError, shown};
use crate::{NamedFiles, Spot, source};
use tidegate_heartbeat::secret_file::{self, Openness};
use zeroize::Zeroizing;

/// Most bytes of a token, a password or a private key: the limit of the sources.
const SECRET_BYTES_MAX: usize = 16 * 1024;

/// Most bytes of a kubeconfig, which can hold certificates.
const KUBECONFIG_BYTES_MAX: usize = 1024 * 1024;

/// What a file contains.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum FileContent {
    /// A token or a password.
    Secret,
    /// A private key in PEM form.
    PrivateKey,
    /// Certificates in PEM form.
    Certificates,
    /// Servers and credentials of a Kubernetes client.
    Kubeconfig,
}

/// Reads the path of a file and checks the file.
pub(super) fn read(
    section: &Section<'_, '_>,
    key: &'static str,
    content: FileContent,
    files: NamedFiles<'_>,
) -> Field<PathBuf> {
    let field = section.text(key, "a file path", |text| checked(text, content, files));
    if let Field::Good(path) = &field {
        section.report.keep(Spot::NamedFile(path.get_ref().clone()), Some(path.span()));
    }
    field
}

/// Converts a text to the path of a file and checks the file.
pub(super) fn checked(
    text: &str,
    content: FileContent,
    files: NamedFiles<'_>,
) -> Result<PathBuf, ValueError> {
    let path = file_path(text)?;
    match files {
        NamedFiles::Read => check(&path, None, content)?,
        NamedFiles::Kept(texts) => check(&path, texts.named(&path), content)?,
        NamedFiles::Ignore => {}
    }
    Ok(path)
}

fn check(path: &Path, kept: Option<&[u8]>, content: FileContent) -> Result<(), ValueError> {
    let file = shown(&path.to_string_lossy());
    let unfit = |why: String| ValueError::new(format!("the file {file} {why}"));
    let secret = |max: usize| -> Result<Zeroizing<Vec<u8>>, ValueError> {
        match kept {
            Some(kept) => Ok(Zeroizing::new(kept.to_vec())),
            None => secret_file::read(path, Openness::OwnerAndGroup, max)
                .map_err(|why| unfit(why.to_string())),
        }
    };
    match content {
        FileContent::Secret => {
            one_line(&secret(SECRET_BYTES_MAX)?).map_err(|why| unfit(why.to_owned()))
        }
        FileContent::PrivateKey => {
            private_key(&secret(SECRET_BYTES_MAX)?).map_err(|why| unfit(why.to_owned()))
        }
        FileContent::Kubeconfig => secret(KUBECONFIG_BYTES_MAX).map(drop),
        FileContent::Certificates => {
            let bytes = match kept {
                Some(kept) => Cow::Borrowed(kept),
                None => Cow::Owned(source::read_file(path).map_err(|why| {
                    ValueError::new(format!("cannot use the certificates in {file}: {why}"))
                })?),
            };
            match has(&bytes, "-----BEGIN CERTIFICATE-----") {
                true => Ok(()),
                false => Err(unfit("has no certificate".to_owned())
                    .help("it must be in PEM form, with -----BEGIN CERTIFICATE-----")),
            }
        }
    }
}

/// Checks that a secret is one line of text, with the rules of the sources.
fn one_line(bytes: &[u8]) -> Result<(), &'static str> {
    let text = std::str::from_utf8(bytes).map_err(|_| "is not UTF-8")?.trim();
    if text.is_empty() {
        return Err("is empty");
    }
    match text.contains(char::is_control) {
        true => Err("contains more than one line"),
        false => Ok(()),
    }
}

fn private_key(bytes: &[u8]) -> Result<(), &'static str> {
    if has(bytes, "-----BEGIN ENCRYPTED PRIVATE KEY-----") || has(bytes, "Proc-Type: 4,ENCRYPTED") {
        return Err("has an encrypted private key; Tidegate needs one without a passphrase");
    }
    match has(bytes, "PRIVATE KEY-----") {
        true => Ok(()),
        false => Err("has no private key in PEM form"),
    }
}

fn has(bytes: &[u8], part: &str) -> bool {
    bytes.windows(part.len()).any(|window| window == part.as_bytes())
}

//! The demo's files: a new private directory with the configuration, the admin token
//! and the access log.
//!
//! The demo creates it before the balancer starts. Dropping it removes the whole
//! directory. It never changes other files.

use super::backends::DemoBackend;
use std::fs::{self, DirBuilder, OpenOptions};
use std::io::{self, Read, Write};
use std::net::SocketAddr;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Name of the pool and of the frontend.
pub(crate) const NAME: &str = "demo";

/// Number of random bytes in the admin token.
const TOKEN_BYTES: usize = 24;

/// Maximum number of names that are tried for the directory.
const NAMES_MAX: usize = 16;

/// Size at which the access log is truncated, because a demo can run for days.
const ACCESS_LOG_BYTES_MAX: u64 = 32 * 1024 * 1024;

/// The directory and its contents.
#[derive(Debug)]
pub(crate) struct DemoDirectory {
    directory: PathBuf,
    drain: Duration,
}

impl DemoDirectory {
    /// Creates the directory (mode 0700) and the token (mode 0600). `drain` is the time
    /// for which sessions can continue when the balancer stops or is upgraded.
    pub(crate) fn create(drain: Duration) -> io::Result<DemoDirectory> {
        let place = DemoDirectory { directory: fresh_directory()?, drain };
        let mut random = [0u8; TOKEN_BYTES];
        fs::File::open("/dev/urandom")?.read_exact(&mut random)?;
        let token: String = random.iter().map(|byte| format!("{byte:02x}")).collect();
        write_private(&place.token(), &format!("{token}\n"))?;
        Ok(place)
    }

    /// Returns the path of the configuration file.
    pub(crate) fn config(&self) -> PathBuf {
        self.directory.join("tidegate.toml")
    }

    /// Returns the path of the file with the admin token.
    pub(crate) fn token(&self) -> PathBuf {
        self.directory.join("token")
    }

    /// Returns the path of the access log.
    pub(crate) fn access_log(&self) -> PathBuf {
        self.directory.join("access.log")
    }

    /// Returns the path of the balancer's log.
    pub(crate) fn log(&self) -> PathBuf {
        self.directory.join("log")
    }

    /// Writes the configuration atomically.
    pub(crate) fn write_config(
        &self,
        [frontend, admin]: [SocketAddr; 2],
        backends: &[DemoBackend],
    ) -> io::Result<()> {
        let (token, access) = (quoted(&self.token())?, quoted(&self.access_log())?);
        let drain = self.drain.as_secs().max(1);
        let mut text = format!(
            r#"# Configuration of the demo. Save a change while the demo runs: it is applied at
# once, or rejected as a whole if it has an error.

[process]
# Time for which open sessions can continue after an upgrade.
drain_timeout = "{drain}s"

[admin]
listen = "{admin}"
token_file = {token}

[log]
access = {access}

[frontend.{NAME}]
bind = ["{frontend}"]
pool = "{NAME}"

[pool.{NAME}]
balance = "weighted-round-robin"
# A backend that returns is used at once.
ejection = "off"

[pool.{NAME}.probe]
kind = "tcp"
interval = "200ms"
fast_interval = "200ms"
timeout = "200ms"
rise = 2
fall = 3
"#
        );
        for DemoBackend { name, address, weight } in backends {
            text.push_str(&format!(
                "\n[[pool.{NAME}.backend]]\nname = \"{name}\"\naddress = \"{address}\"\nweight = {weight}\n"
            ));
        }
        let whole = self.directory.join("tidegate.toml.new");
        write_private(&whole, &text)?;
        fs::rename(&whole, self.config())
    }

    /// Truncates the access log if it exceeds [`ACCESS_LOG_BYTES_MAX`]. The balancer
    /// writes in append mode, so it continues at the start.
    pub(crate) fn bound_access_log(&self) {
        let path = self.access_log();
        if fs::metadata(&path).is_ok_and(|facts| facts.len() > ACCESS_LOG_BYTES_MAX)
            && let Ok(file) = OpenOptions::new().write(true).open(&path)
        {
            // After a failure the log stays long. The directory is temporary.
            let _ = file.set_len(0);
        }
    }
}

impl Drop for DemoDirectory {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.directory) {
            eprintln!("tidegate: demo: cannot remove {}: {error}", self.directory.display());
        }
    }
}

fn fresh_directory() -> io::Result<PathBuf> {
    let parent = std::path::absolute(std::env::temp_dir())?;
    let in_parent = |error: io::Error| {
        let message = format!("cannot write to {} (set TMPDIR): {error}", parent.display());
        io::Error::new(error.kind(), message)
    };
    for _ in 0..NAMES_MAX {
        let directory = parent.join(format!("tidegate-demo-{:08x}", fastrand::u32(..)));
        match DirBuilder::new().mode(0o700).create(&directory) {
            Ok(()) => return Ok(directory),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(in_parent(error)),
        }
    }
    Err(in_parent(io::ErrorKind::AlreadyExists.into()))
}

fn write_private(path: &Path, text: &str) -> io::Result<()> {
    let mut options = OpenOptions::new();
    let mut file = options.write(true).create(true).truncate(true).mode(0o600).open(path)?;
    file.write_all(text.as_bytes())
}

/// Formats a path as a TOML basic string.
fn quoted(path: &Path) -> io::Result<String> {
    let not_utf8 = || {
        let message = format!("path {} is not UTF-8; set TMPDIR", path.display());
        io::Error::new(io::ErrorKind::InvalidInput, message)
    };
    path.to_str().map(crate::cli::quoted).ok_or_else(not_utf8)
}

/// Quotes a path for a shell.
pub(crate) fn for_shell(path: &Path) -> String {
    let text = path.display().to_string();
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-+".contains(c);
    if !text.is_empty() && text.chars().all(plain) {
        return text;
    }
    format!("'{}'", text.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;
    use tidegate_config as config;

    fn backends() -> Vec<DemoBackend> {
        let address = "127.0.0.1:9001".parse().unwrap();
        vec![DemoBackend { name: "b1".to_owned(), address, weight: 5 }]
    }

    #[test]
    fn configuration_is_valid_and_without_warnings() {
        let place = DemoDirectory::create(Duration::from_secs(40)).unwrap();
        let (frontend, admin) =
            ("127.0.0.1:8001".parse().unwrap(), "127.0.0.1:8002".parse().unwrap());
        place.write_config([frontend, admin], &backends()).unwrap();
        let loaded = config::load(&place.config()).unwrap();
        assert!(loaded.warnings.is_empty());
        assert_eq!(loaded.config.pools[0].backends[0].weight, 5);
        assert_eq!(loaded.config.admin.token_file, Some(place.token()));
    }

    #[test]
    fn directory_is_private_and_removed_on_drop() {
        let place = DemoDirectory::create(Duration::from_secs(40)).unwrap();
        let directory = place.directory.clone();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&directory), mode(&place.token())), (0o700, 0o600));
        drop(place);
        assert!(!directory.exists());
    }

    #[test]
    fn special_characters_in_paths_are_quoted_for_toml_and_the_shell() {
        let odd = Path::new("/tmp/it's \"odd\"\\\u{7f}");
        let toml: toml::Table = format!("path = {}", quoted(odd).unwrap()).parse().unwrap();
        assert_eq!(toml["path"].as_str(), odd.to_str());
        assert_eq!(for_shell(Path::new("/tmp/it's")), r"'/tmp/it'\''s'");
        assert_eq!(for_shell(Path::new("/tmp/plain-1.x")), "/tmp/plain-1.x");
    }
}

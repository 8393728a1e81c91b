//! Where the demo keeps its files: a fresh private directory with the
//! configuration, the admin token and the access log.
//!
//! Made by the demo before the balancer starts; dropping it removes the whole
//! directory. It never touches anything that was there before.

use super::backends::DemoBackend;
use std::fs::{self, DirBuilder, OpenOptions};
use std::io::{self, Read, Write};
use std::net::SocketAddr;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Pool and frontend.
pub(crate) const NAME: &str = "demo";

/// Random bytes in the admin token.
const TOKEN_BYTES: usize = 24;

/// Names tried for the directory.
const NAMES_MAX: usize = 16;

/// Beyond this size the access log starts over: a demo may run for days.
const ACCESS_LOG_BYTES_MAX: u64 = 32 * 1024 * 1024;

/// The directory and what is in it.
#[derive(Debug)]
pub(crate) struct DemoDirectory {
    directory: PathBuf,
    drain: Duration,
}

impl DemoDirectory {
    /// Makes the directory (mode 0700) and the token (mode 0600).
    /// Sessions may go on for `drain` when the balancer stops or is upgraded.
    pub(crate) fn create(drain: Duration) -> io::Result<DemoDirectory> {
        let place = DemoDirectory { directory: fresh_directory()?, drain };
        let mut random = [0u8; TOKEN_BYTES];
        fs::File::open("/dev/urandom")?.read_exact(&mut random)?;
        let token: String = random.iter().map(|byte| format!("{byte:02x}")).collect();
        write_private(&place.token(), &format!("{token}\n"))?;
        Ok(place)
    }

    /// The configuration file.
    pub(crate) fn config(&self) -> PathBuf {
        self.directory.join("tidegate.toml")
    }

    /// The file with the admin token.
    pub(crate) fn token(&self) -> PathBuf {
        self.directory.join("token")
    }

    /// The access log.
    pub(crate) fn access_log(&self) -> PathBuf {
        self.directory.join("access.log")
    }

    /// What the balancer logs.
    pub(crate) fn log(&self) -> PathBuf {
        self.directory.join("log")
    }

    /// Writes the configuration, whole or not at all.
    pub(crate) fn write_config(
        &self,
        [frontend, admin]: [SocketAddr; 2],
        backends: &[DemoBackend],
    ) -> io::Result<()> {
        let (token, access) = (quoted(&self.token())?, quoted(&self.access_log())?);
        let drain = self.drain.as_secs().max(1);
        let mut text = format!(
            r#"# The demo's configuration. Change it while the demo runs and save it: it is
# put in force at once, or refused as a whole if something is wrong with it.

[process]
# Until then the connections that stay may go on after an upgrade.
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

    /// Keeps the access log within [`ACCESS_LOG_BYTES_MAX`]. Its writer appends,
    /// and goes on at the start.
    pub(crate) fn bound_access_log(&self) {
        let path = self.access_log();
        if fs::metadata(&path).is_ok_and(|facts| facts.len() > ACCESS_LOG_BYTES_MAX)
            && let Ok(file) = OpenOptions::new().write(true).open(&path)
        {
            // A failure leaves a long log in a directory that goes away.
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

/// A path as a TOML basic string.
fn quoted(path: &Path) -> io::Result<String> {
    let not_utf8 = || {
        let message = format!("path {} is not UTF-8; set TMPDIR", path.display());
        io::Error::new(io::ErrorKind::InvalidInput, message)
    };
    path.to_str().map(crate::cli::quoted).ok_or_else(not_utf8)
}

/// A path as a shell takes it.
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
    fn the_configuration_is_one_that_check_accepts_without_a_warning() {
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
    fn the_directory_is_private_and_goes_away_with_its_owner() {
        let place = DemoDirectory::create(Duration::from_secs(40)).unwrap();
        let directory = place.directory.clone();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&directory), mode(&place.token())), (0o700, 0o600));
        drop(place);
        assert!(!directory.exists());
    }

    #[test]
    fn odd_paths_survive_toml_and_the_shell() {
        let odd = Path::new("/tmp/it's \"odd\"\\\u{7f}");
        let toml: toml::Table = format!("path = {}", quoted(odd).unwrap()).parse().unwrap();
        assert_eq!(toml["path"].as_str(), odd.to_str());
        assert_eq!(for_shell(Path::new("/tmp/it's")), r"'/tmp/it'\''s'");
        assert_eq!(for_shell(Path::new("/tmp/plain-1.x")), "/tmp/plain-1.x");
    }
}

//! Finds the running balancer: lists the admin addresses to try and connects to one.
//!
//! Called by `http`. It sends no request.
//!
//! The first setting that is present decides: `--admin`, the variable `TIDEGATE_ADMIN`,
//! `[admin] listen` in the file of `--config`. Otherwise the default paths of the admin
//! socket are tried.

use crate::http::{Address, ClientArgs, ClientError};
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tidegate_api::place;
use tidegate_config as config;
use tidegate_core::model::{AdminListen, Config};
use tokio::net::{TcpStream, UnixStream};
use tokio::time::timeout;

/// The environment variable with an admin address.
pub const VARIABLE: &str = "TIDEGATE_ADMIN";

/// Timeout for a connect. A running balancer accepts much faster.
const CONNECT_MAX: Duration = Duration::from_secs(5);

/// How to reach a balancer.
#[derive(Debug)]
pub struct Reached {
    /// Addresses to try, in this order; never empty.
    pub places: Vec<Address>,
    /// The token file of the configuration.
    pub token_file: Option<PathBuf>,
}

/// A connection to the admin API.
pub enum ClientStream {
    /// Over a Unix socket.
    Unix(UnixStream),
    /// Over TCP.
    Tcp(TcpStream),
}

// === impl Reached ===

impl Reached {
    /// Evaluates the command line and the environment.
    pub fn balancer(args: &ClientArgs) -> Result<Reached, ClientError> {
        let variable = std::env::var(VARIABLE).ok().filter(|text| !text.is_empty());
        Reached::by(args.admin.as_ref(), variable.as_deref(), args.config.as_deref())
    }

    fn by(
        admin: Option<&Address>,
        variable: Option<&str>,
        file: Option<&Path>,
    ) -> Result<Reached, ClientError> {
        let only = |address: Address| Reached { places: vec![address], token_file: None };
        if let Some(address) = admin {
            return Ok(only(address.clone()));
        }
        if let Some(text) = variable {
            return text.parse().map(only).map_err(|why| {
                ClientError::Request(format!("{VARIABLE}={text:?} is not an admin address: {why}"))
            });
        }
        let (listen, token_file) = match file.map(outline).transpose()? {
            Some(Config { admin, .. }) => {
                ((!admin.is_default()).then_some(admin.listen), admin.token_file)
            }
            None => (None, None),
        };
        let places = match listen {
            Some(listen) => vec![listen.into()],
            None => place::places().into_iter().map(Address::Unix).collect(),
        };
        Ok(Reached { places, token_file })
    }
}

fn outline(file: &Path) -> Result<Config, ClientError> {
    let (config, _) = config::outline(file).map_err(|problems| {
        let file = file.display();
        ClientError::Request(format!("cannot read the admin address from {file}:\n{problems}"))
    })?;
    Ok(config)
}

/// Connects to the first address that accepts.
pub async fn connect(places: &[Address]) -> Result<(Address, ClientStream), ClientError> {
    let mut errors = Vec::new();
    for place in places {
        let named = places.len() == 1;
        match timeout(CONNECT_MAX, dial(place, named)).await {
            Ok(Ok(stream)) => return Ok((place.clone(), stream)),
            Ok(Err(error)) => errors.push((place, error.to_string())),
            Err(_) => errors.push((place, format!("not connected within {CONNECT_MAX:?}"))),
        }
    }
    Err(ClientError::Unreachable(unreachable(&errors)))
}

/// Connects to one address. A default path is used only if it is trusted.
async fn dial(place: &Address, named: bool) -> io::Result<ClientStream> {
    match place {
        Address::Unix(path) => {
            if !named {
                place::trusted(path)?;
            }
            Ok(ClientStream::Unix(UnixStream::connect(path).await?))
        }
        Address::Tcp(to) => Ok(ClientStream::Tcp(TcpStream::connect(to).await?)),
    }
}

fn unreachable(errors: &[(&Address, String)]) -> String {
    if let [(place, why)] = errors {
        return format!("cannot reach the balancer at {place}: {why}");
    }
    let mut text = "cannot reach a balancer on this host".to_owned();
    for (place, why) in errors {
        text.push_str(&format!("\n  {place}: {why}"));
    }
    text.push_str(&format!(
        "\n  If it runs, give its admin address: --admin ADDR, {VARIABLE}, or\n  \
         --config FILE with its configuration."
    ));
    text
}

impl From<AdminListen> for Address {
    fn from(listen: AdminListen) -> Address {
        match listen {
            AdminListen::Unix(path) => Address::Unix(path),
            AdminListen::Tcp(address) => Address::Tcp(address),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn places(admin: Option<&str>, variable: Option<&str>, file: Option<&Path>) -> Vec<String> {
        let admin = admin.map(|text| text.parse().unwrap());
        let reached = Reached::by(admin.as_ref(), variable, file).unwrap();
        reached.places.iter().map(Address::to_string).collect()
    }

    #[test]
    fn command_line_precedes_variable_and_variable_precedes_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("t.toml");
        let rest = "[frontend.a]\nbind = \"127.0.0.1:1\"\npool = \"a\"\n\
                    [[pool.a.backend]]\naddress = \"127.0.0.1:2\"\n";
        let text = format!("[admin]\nlisten = \"127.0.0.1:9900\"\ntoken_file = \"/t\"\n{rest}");
        std::fs::write(&path, text).unwrap();
        let file = Some(path.as_path());
        assert_eq!(places(Some("unix:/a"), Some("unix:/b"), file), ["unix:/a"]);
        assert_eq!(places(None, Some("unix:/b"), file), ["unix:/b"]);
        assert_eq!(places(None, None, file), ["127.0.0.1:9900"]);
        let reached = Reached::by(None, None, file).unwrap();
        assert_eq!(reached.token_file, Some("/t".into()));
        std::fs::write(&path, rest).unwrap();
        for file in [file, None] {
            let all = places(None, None, file);
            assert_eq!(all[0], "unix:/run/tidegate/admin.sock");
            assert!(all.last().unwrap().starts_with("unix:/tmp/tidegate-"), "{all:?}");
        }
    }

    #[test]
    fn invalid_variable_or_file_is_named_in_the_error() {
        let wrong = Reached::by(None, Some("nowhere"), None).unwrap_err();
        assert!(matches!(wrong, ClientError::Request(text) if text.contains("TIDEGATE_ADMIN")));
        let wrong = Reached::by(None, None, Some(Path::new("/no/such.toml"))).unwrap_err();
        assert!(matches!(wrong, ClientError::Request(text) if text.contains("/no/such.toml")));
    }

    #[test]
    fn error_names_every_tried_address_with_its_reason() {
        let (a, b) = ("unix:/a".parse().unwrap(), "unix:/b".parse().unwrap());
        let text = unreachable(&[(&a, "no such file".to_owned()), (&b, "refused".to_owned())]);
        for part in ["unix:/a: no such file", "unix:/b: refused", "--admin", "--config"] {
            assert!(text.contains(part), "{text}");
        }
    }
}

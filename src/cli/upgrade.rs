//! `tidegate upgrade`: replaces the running balancer with a new process.
//!
//! Called by the command line. It sends the request to the admin API and waits until the
//! new process serves or the upgrade has failed.

use clap::Args;
use hyper::Method;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tidegate_api::answers::UpgradeDoc;
use tidegate_client::command::Exit;
use tidegate_client::http::{ClientArgs, ask_within, report, segment};

/// Help after the options.
pub(super) const HELP: &str = "\
Example:
  tidegate upgrade
  tidegate upgrade --binary /opt/tidegate-0.2/tidegate

The new binary is the one at the path from which the running balancer was
started, unless --binary names another. If the new process does not become ready,
the old process keeps serving and the exit code is 1.";

const CONFIG: &str = "\
Configuration for the new process (Unix socket only); also used to find the admin \
address";

/// Timeout for the answer; longer than the timeout of the admin API.
const ANSWER_MAX: Duration = Duration::from_secs(70);

/// `tidegate upgrade`
#[derive(Debug, Args)]
#[command(mut_arg("config", |arg| arg.help(CONFIG)))]
pub struct UpgradeArgs {
    /// Start this binary instead (Unix socket only).
    #[arg(long, value_name = "FILE")]
    pub binary: Option<PathBuf>,
    /// How to reach the balancer.
    #[command(flatten)]
    pub client: ClientArgs,
}

/// Requests an upgrade and prints the new process.
pub fn main(args: &UpgradeArgs) -> Exit {
    report(&args.client, ask_within(&args.client, Method::POST, &path(args), ANSWER_MAX), shown)
}

fn path(args: &UpgradeArgs) -> String {
    let mut path = "/v1/upgrade".to_owned();
    let parameters = [("binary", &args.binary), ("config", &args.client.config)];
    let parameters = parameters.into_iter().filter_map(|(key, file)| Some((key, file.as_deref()?)));
    for (index, (key, file)) in parameters.enumerate() {
        path.push(if index == 0 { '?' } else { '&' });
        path.push_str(&format!("{key}={}", encoded(file)));
    }
    path
}

/// Encodes an absolute path, because the balancer can have another working directory.
fn encoded(file: &Path) -> String {
    let absolute = std::path::absolute(file).unwrap_or_else(|_| file.to_owned());
    segment(absolute.as_os_str().as_bytes())
}

fn shown(UpgradeDoc { pid, version, generation }: &UpgradeDoc) -> String {
    format!(
        "upgraded: process {pid}, version {version}, generation {generation}; \
         the old process drains"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_absolute_and_encoded() {
        let args = |binary: Option<&str>, config: Option<&str>| UpgradeArgs {
            binary: binary.map(PathBuf::from),
            client: ClientArgs {
                admin: None,
                config: config.map(PathBuf::from),
                json: false,
                token_file: None,
            },
        };
        assert_eq!(path(&args(None, None)), "/v1/upgrade");
        assert_eq!(
            path(&args(Some("/a b"), Some("/c"))),
            "/v1/upgrade?binary=%2Fa%20b&config=%2Fc"
        );
        assert!(path(&args(None, Some("c"))).starts_with("/v1/upgrade?config=%2F"));
    }

    #[test]
    fn answer_names_the_serving_process() {
        let answer = UpgradeDoc { pid: 7, version: "0.2.0".to_owned(), generation: 3 };
        assert!(shown(&answer).starts_with("upgraded: process 7, version 0.2.0, generation 3;"));
    }
}

//! `tidegate completions SHELL`: completion in bash, zsh and fish.
//!
//! The script of a shell calls this program for each completion. [`answer`] then prints the
//! candidates: commands and options, and names of backends and frontends of the running balancer.
//! It asks the admin API for at most [`ANSWER_MAX`], so that a key press is never slow.

use clap::{CommandFactory, ValueEnum};
use clap_complete::env::{Bash, CompleteEnv, EnvCompleter, Fish, Zsh};
use clap_complete::{ArgValueCandidates, CompletionCandidate};
use hyper::Method;
use std::ffi::OsString;
use std::io::{self, Write};
use std::time::Duration;
use tidegate_api::status::StatusDoc;
use tidegate_client::command::Exit;
use tidegate_client::http::{Address, ClientArgs, ask_within};

/// The end of the help.
pub const HELP: &str = "\
Example:
  tidegate completions bash > /etc/bash_completion.d/tidegate
  tidegate completions zsh > /usr/local/share/zsh/site-functions/_tidegate
  tidegate completions fish > /etc/fish/completions/tidegate.fish";

/// The variable by which the scripts call this program.
const VARIABLE: &str = "TIDEGATE_COMPLETE";

/// Timeout of the question about names.
const ANSWER_MAX: Duration = Duration::from_millis(200);

/// zsh runs a file in `fpath` as the body of a function at the first completion. The script alone
/// then only registers itself.
const FIRST_CALL: &str = r#"
if [ "$funcstack[1]" = "_tidegate" ]; then
    _clap_dynamic_completer_tidegate "$@"
fi
"#;

/// Most names that a completion lists.
const NAMES_MAX: usize = 1_000;

/// `tidegate completions`
#[derive(Debug, clap::Args)]
pub struct CompletionsArgs {
    /// The shell.
    #[arg(value_name = "SHELL")]
    shell: CompletionShell,
}

/// The shells.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum CompletionShell {
    Bash,
    Zsh,
    Fish,
}

/// Prints the script of a shell.
pub fn main(args: &CompletionsArgs) -> Exit {
    let (shell, more): (&dyn EnvCompleter, &[u8]) = match args.shell {
        CompletionShell::Bash => (&Bash, b""),
        CompletionShell::Zsh => (&Zsh, FIRST_CALL.as_bytes()),
        CompletionShell::Fish => (&Fish, b""),
    };
    let name = "tidegate";
    let mut script = Vec::new();
    let written = shell
        .write_registration(VARIABLE, name, name, name, &mut script)
        .map(|()| script.extend_from_slice(more))
        .and_then(|()| io::stdout().lock().write_all(&script));
    match written {
        Ok(()) => Exit::Fine,
        Err(error) => {
            eprintln!("tidegate: cannot write the script: {error}");
            Exit::Failed
        }
    }
}

/// Prints candidates and exits, if the script of a shell has called this program.
pub fn answer() {
    if std::env::var_os(VARIABLE).is_some() {
        CompleteEnv::with_factory(super::Cli::command).var(VARIABLE).complete();
    }
}

/// Completes `POOL/BACKEND`.
pub(super) fn backends() -> ArgValueCandidates {
    ArgValueCandidates::new(|| {
        let status = status();
        let pools = status.iter().flat_map(|status| &status.pools);
        let names = pools.flat_map(|pool| {
            let named =
                pool.backends.iter().map(|backend| format!("{}/{}", pool.name, backend.name));
            named.collect::<Vec<_>>()
        });
        names.take(NAMES_MAX).map(CompletionCandidate::new).collect()
    })
}

/// Completes the name of a pool.
pub(super) fn pools() -> ArgValueCandidates {
    ArgValueCandidates::new(|| {
        let status = status();
        let names = status.iter().flat_map(|status| &status.pools);
        names.take(NAMES_MAX).map(|one| CompletionCandidate::new(&one.name)).collect()
    })
}

/// Completes the name of a frontend.
pub(super) fn frontends() -> ArgValueCandidates {
    ArgValueCandidates::new(|| {
        let status = status();
        let names = status.iter().flat_map(|status| &status.frontends);
        names.take(NAMES_MAX).map(|one| CompletionCandidate::new(&one.name)).collect()
    })
}

/// The status of the balancer that the command line names. `None`: it does not answer in time.
fn status() -> Option<StatusDoc> {
    let client = client_of(std::env::args_os().collect());
    ask_within(&client, Method::GET, "/v1/status", ANSWER_MAX).ok()?.document().ok()
}

/// How to reach the balancer, from the words that are on the command line so far. They can be
/// incomplete, so clap cannot parse them.
fn client_of(words: Vec<OsString>) -> ClientArgs {
    let words: Vec<String> = words.into_iter().filter_map(|word| word.into_string().ok()).collect();
    let value = |names: &[&str]| -> Option<String> {
        words.iter().enumerate().find_map(|(at, word)| {
            if names.contains(&&**word) {
                return words.get(at + 1).cloned();
            }
            let inline = names.iter().find_map(|name| word.strip_prefix(&format!("{name}=")));
            inline.map(str::to_owned)
        })
    };
    ClientArgs {
        admin: value(&["--admin"]).and_then(|text| text.parse::<Address>().ok()),
        config: value(&["--config", "-c"]).map(Into::into),
        json: false,
        token_file: value(&["--token-file"]).map(Into::into),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_of_an_unfinished_command_line_name_the_balancer() {
        let of = |line: &str| client_of(line.split(' ').map(OsString::from).collect());
        let client = of("tidegate -- tidegate drain --admin 127.0.0.1:9 -c f --token-file=t web/");
        assert_eq!(client.admin, Some("127.0.0.1:9".parse().unwrap()));
        assert_eq!(client.config, Some("f".into()));
        assert_eq!(client.token_file, Some("t".into()));
        let client = of("tidegate -- tidegate drain --admin");
        assert_eq!((client.admin, client.config, client.token_file), (None, None, None));
        assert_eq!(of("tidegate -- tidegate drain --admin x").admin, None);
    }
}

//! Generates `docs/cli.md` from the definitions of `--help`.

use crate::generated::cell;
use crate::pages::{column, page};
use clap::{Arg, Args, Command, CommandFactory};
use std::fmt::Write;
use tidegate_cli::Cli;
use tidegate_client::command::Exit;
use tidegate_client::http::ClientArgs;

pub(crate) fn text() -> String {
    let mut cli = Cli::command();
    cli.build();
    let client = ClientArgs::augment_args(Command::new("client"));
    let mut out = "## Options of the commands for a running balancer\n\n".to_owned();
    options(&mut out, client.get_arguments().collect());
    for command in cli.get_subcommands_mut().filter(|command| command.get_name() != "help") {
        let _ = writeln!(out, "## tidegate {}\n", command.get_name());
        one(&mut out, command, &client);
    }
    out
}

fn one(out: &mut String, command: &mut Command, client: &Command) {
    let about = command.get_long_about().or(command.get_about()).expect("what it does");
    let _ = writeln!(out, "{}\n", sentence(&about.to_string()));
    let usage = command.render_usage().to_string();
    let _ = writeln!(out, "```text\n{}\n```\n", usage.trim());
    let shared = |arg: &Arg| {
        let same = |known: &Arg| known.get_id() == arg.get_id() && help(known) == help(arg);
        client.get_arguments().any(same)
    };
    let is_own = |arg: &&Arg| !arg.is_hide_set() && arg.get_id() != "help" && !shared(arg);
    options(out, command.get_arguments().filter(is_own).collect());
    if command.get_arguments().any(shared) {
        let _ = writeln!(
            out,
            "It also has the [options of the commands for a running balancer]\
            (#options-of-the-commands-for-a-running-balancer).\n"
        );
    }
    for arg in command.get_arguments().filter(is_own) {
        values(out, arg);
    }
    if let Some(after) = command.get_after_help() {
        let _ = writeln!(out, "```text\n{}\n```\n", after.to_string().trim_end());
    }
}

fn options(out: &mut String, args: Vec<&Arg>) {
    if args.is_empty() {
        return;
    }
    let _ = writeln!(out, "| option | meaning |\n|---|---|");
    for arg in args {
        let meaning = cell(&help(arg));
        let default = arg.get_default_values().first().map(|value| value.to_string_lossy());
        let default = default.filter(|_| arg.get_action().takes_values());
        let default = default.map(|value| format!(" Default: `{value}`.")).unwrap_or_default();
        let _ = writeln!(out, "| `{}` | {meaning}{default} |", name(arg));
    }
    let _ = writeln!(out);
}

/// The synopsis of an option: `--config FILE`, `--wait[=TIME]`, `MODE`.
fn name(arg: &Arg) -> String {
    let value = arg.get_value_names().map(|names| names[0].to_string());
    let value = value.filter(|_| arg.get_action().takes_values());
    let Some(long) = arg.get_long() else { return value.expect("a name for the value") };
    let short = arg.get_short().map(|short| format!("-{short}, ")).unwrap_or_default();
    match value {
        Some(value) if arg.is_require_equals_set() => format!("{short}--{long}[={value}]"),
        Some(value) => format!("{short}--{long} {value}"),
        None => format!("{short}--{long}"),
    }
}

/// The values of an argument, if each value has its own help.
fn values(out: &mut String, arg: &Arg) {
    let values = arg.get_possible_values();
    let explained: Vec<_> = values.iter().filter(|value| value.get_help().is_some()).collect();
    if explained.is_empty() {
        return;
    }
    let _ = writeln!(out, "| `{}` | meaning |\n|---|---|", name(arg));
    for value in explained {
        let help = value.get_help().map(ToString::to_string).unwrap_or_default();
        let _ = writeln!(out, "| `{}` | {} |", value.get_name(), cell(&sentence(&help)));
    }
    let _ = writeln!(out);
}

fn help(arg: &Arg) -> String {
    sentence(&arg.get_long_help().or(arg.get_help()).map(ToString::to_string).unwrap_or_default())
}

/// Adds the full stop that clap removes from a text of one sentence.
fn sentence(text: &str) -> String {
    let text = text.trim();
    let stop = if text.ends_with('.') { "" } else { "." };
    format!("{text}{stop}")
}

#[test]
fn cli_page_lists_every_exit_code() {
    let codes = [Exit::Fine, Exit::Refused, Exit::Usage, Exit::Failed];
    let codes: Vec<String> = codes.map(|code| (code as u8).to_string()).to_vec();
    assert_eq!(column(&page("docs/cli.md"), "| exit code |", 0), codes);
}

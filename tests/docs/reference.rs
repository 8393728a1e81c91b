//! Reference tables against the program: commands and policies.

use crate::pages::{column, page};
use clap::CommandFactory;
use std::collections::BTreeSet;
use tidegate_cli::Cli;
use tidegate_core::model::{Policy, Words};

fn readme() -> String {
    page("README.md")
}

#[test]
fn every_command_is_listed_and_no_other() {
    let listed: BTreeSet<String> = column(&readme(), "| command |", 0)
        .iter()
        .map(|call| call.split(' ').nth(1).expect("tidegate and a command").to_owned())
        .collect();
    let built: BTreeSet<String> =
        Cli::command().get_subcommands().map(|command| command.get_name().to_owned()).collect();
    assert_eq!(listed, built);
}

#[test]
fn every_policy_is_listed() {
    let known: Vec<&str> = Policy::all().map(|policy| policy.word()).collect();
    assert_eq!(column(&page("docs/balancing.md"), "| `balance` |", 0), known);
}

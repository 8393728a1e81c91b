//! Compares lists of commands, policies, files and functions with the program.

use crate::pages::{column, page, root};
use clap::CommandFactory;
use std::collections::BTreeSet;
use tidegate_cli::Cli;
use tidegate_core::model::{Policy, Words};

fn readme() -> String {
    page("README.md")
}

#[test]
fn readme_lists_every_command() {
    let listed: BTreeSet<String> = column(&readme(), "| command |", 0)
        .iter()
        .map(|call| call.split(' ').nth(1).expect("tidegate and a command").to_owned())
        .collect();
    let built: BTreeSet<String> =
        Cli::command().get_subcommands().map(|command| command.get_name().to_owned()).collect();
    assert_eq!(listed, built);
}

#[test]
fn balancing_page_lists_every_policy() {
    let known: Vec<&str> = Policy::all().map(|policy| policy.word()).collect();
    assert_eq!(column(&page("docs/balancing.md"), "| `balance` |", 0), known);
}

#[test]
fn architecture_page_names_existing_files_and_functions() {
    let text = page("docs/architecture.md");
    let (_, rows) = text.split_once("\n| | file | functions |\n|---:|---|---|\n").unwrap();
    let rows = rows.lines().take_while(|line| line.starts_with('|'));
    let quoted = |cell: &str| -> Vec<String> {
        cell.split('`').skip(1).step_by(2).map(str::to_owned).collect()
    };
    let mut functions_seen = 0;
    for row in rows {
        let cells: Vec<&str> = row.split('|').collect();
        let mut code = String::new();
        for file in quoted(cells[2]) {
            let places = ["src", "src/dataplane"].map(|folder| root().join(folder).join(&file));
            let place = places.iter().find(|place| place.exists());
            let place = place.unwrap_or_else(|| panic!("no file {file}"));
            code += &std::fs::read_to_string(place).unwrap();
        }
        for function in quoted(cells[3]) {
            let defined = [format!("fn {function}("), format!("fn {function}<")];
            assert!(defined.iter().any(|start| code.contains(start)), "no fn {function}: {row}");
            functions_seen += 1;
        }
    }
    assert!(functions_seen > 30, "{functions_seen}");
}

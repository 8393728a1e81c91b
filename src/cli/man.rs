//! `tidegate man DIR`: writes a manual page of every command, and of the configuration.
//!
//! Called by the command line and by scripts/package. The pages of commands come from their help,
//! the page of the configuration from its table of keys.

use clap::CommandFactory;
use std::fmt::Write;
use std::io;
use std::path::{Path, PathBuf};
use tidegate_client::command::Exit;
use tidegate_config::keys::{Applies, ConfigKey, KeyTable, TABLES, plain};

/// The end of the help.
pub const HELP: &str = "\
Example:
  tidegate man /usr/local/share/man
  man tidegate.toml

Pages of commands are in man1, and tidegate.toml is in man5.";

const VERSION: &str = env!("CARGO_PKG_VERSION");

/// `tidegate man`
#[derive(Debug, clap::Args)]
pub struct ManArgs {
    /// Directory of manual pages, such as /usr/local/share/man.
    #[arg(value_name = "DIR")]
    directory: PathBuf,
}

/// Writes the pages.
pub fn main(args: &ManArgs) -> Exit {
    match write(&args.directory) {
        Ok(()) => Exit::Fine,
        Err(error) => {
            let directory = args.directory.display();
            eprintln!("tidegate: cannot write manual pages below {directory}: {error}");
            Exit::Failed
        }
    }
}

fn write(directory: &Path) -> io::Result<()> {
    let (commands, formats) = (directory.join("man1"), directory.join("man5"));
    std::fs::create_dir_all(&commands)?;
    std::fs::create_dir_all(&formats)?;
    let mut program = super::Cli::command().disable_help_subcommand(true);
    program.build();
    page(&program, "tidegate", &commands)?;
    for command in program.get_subcommands().filter(|command| !command.is_hide_set()) {
        let name = format!("tidegate-{}", command.get_name());
        page(command, &name, &commands)?;
        for below in command.get_subcommands().filter(|below| !below.is_hide_set()) {
            page(below, &format!("{name}-{}", below.get_name()), &commands)?;
        }
    }
    std::fs::write(formats.join("tidegate.toml.5"), configuration())
}

/// Writes the page of one command.
fn page(command: &clap::Command, name: &str, directory: &Path) -> io::Result<()> {
    let mut text = Vec::new();
    let man = clap_mangen::Man::new(command.clone().disable_help_flag(true))
        .title(name.to_uppercase())
        .source(format!("Tidegate {VERSION}"))
        .manual("Tidegate");
    man.render(&mut text)?;
    std::fs::write(directory.join(format!("{name}.1")), text)
}

/// The page tidegate.toml(5).
fn configuration() -> String {
    let mut page = format!(
        ".TH TIDEGATE.TOML 5 \"\" \"Tidegate {VERSION}\" \"Tidegate\"\n.SH NAME\ntidegate.toml \
         \\- configuration of Tidegate\n.SH DESCRIPTION\n"
    );
    paragraph(
        &mut page,
        "A configuration is a TOML file. `tidegate check FILE` reports every problem in it, with its \
         place. `tidegate reload`, SIGHUP, or a change of the file applies it. `[defaults.frontend]`, \
         `[defaults.pool]` and `[defaults.probe]` have values for the sections that do not set them.",
    );
    for table in TABLES {
        section(&mut page, table);
    }
    page.push_str(
        ".SH FILES\n.TP\n.I /etc/tidegate/tidegate.toml\nThe file of the systemd unit.\n",
    );
    page.push_str(".SH SEE ALSO\n.BR tidegate (1),\n.BR tidegate\\-check (1),\n");
    page.push_str(".BR tidegate\\-run (1)\n");
    page
}

fn section(page: &mut String, table: &KeyTable) {
    let heading = match table.header.starts_with('[') {
        true => table.header.to_owned(),
        false => format!("Table of {}", table.header),
    };
    // Writing to a string cannot fail.
    let _ = writeln!(page, ".SH \"{}\"", roff(&heading));
    paragraph(page, table.about);
    for key in table.keys {
        let ConfigKey { name, values, default, applies, about } = key;
        let _ = writeln!(page, ".TP\n.B {}", roff(name));
        paragraph(page, about);
        let restart = match applies {
            Applies::Reload => "",
            Applies::Restart => " A new value needs a restart or an upgrade.",
        };
        page.push_str(".br\n");
        let (values, default) = (values.describe(), default.describe());
        paragraph(page, &format!("Values: {values}. Default: {default}.{restart}"));
    }
}

/// Writes Markdown as one paragraph. Code is bold.
fn paragraph(page: &mut String, markdown: &str) {
    let text = plain(markdown);
    let mut bold = false;
    let mut line = String::new();
    for part in text.split('`') {
        match bold {
            true => line.push_str(&format!("\\fB{}\\fR", roff(part))),
            false => line.push_str(&roff(part)),
        }
        bold = !bold;
    }
    // A line that starts with a dot or an apostrophe is a request.
    let start = if line.starts_with(['.', '\'']) { "\\&" } else { "" };
    let _ = writeln!(page, "{start}{line}");
}

/// Escapes characters that roff reads.
fn roff(text: &str) -> String {
    text.replace('\\', "\\e").replace('-', "\\-").replace('\'', "\\(aq").replace('"', "\\(dq")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn page_of_the_configuration_has_every_key_and_escapes_roff() {
        let page = configuration();
        for table in TABLES {
            for key in table.keys {
                assert!(page.contains(&format!(".TP\n.B {}\n", key.name)), "{}", key.name);
            }
        }
        let mut text = String::new();
        paragraph(&mut text, "'a' `b-c` \\n [d](e.md)");
        assert_eq!(text, "\\(aqa\\(aq \\fBb\\-c\\fR \\en d\n");
        let mut text = String::new();
        paragraph(&mut text, ".TH");
        assert_eq!(text, "\\&.TH\n");
    }

    #[test]
    fn every_command_has_a_page() {
        let dir = std::env::temp_dir().join(format!("tidegate-man-{}", std::process::id()));
        write(&dir).unwrap();
        for command in crate::Cli::command().get_subcommands() {
            let page = dir.join(format!("man1/tidegate-{}.1", command.get_name()));
            let text = std::fs::read_to_string(&page).unwrap_or_default();
            assert!(text.contains("Example"), "{}: {text}", page.display());
        }
        assert!(dir.join("man5/tidegate.toml.5").exists());
        std::fs::remove_dir_all(&dir).unwrap();
    }
}

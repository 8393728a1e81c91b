//! `tidegate schema`: prints the JSON Schema of a configuration file.
//!
//! Called by the command line. It reads no file and asks no balancer.

use std::io::{self, Write};
use tidegate_client::command::Exit;

/// The end of the help.
pub const HELP: &str = "\
Example:
  tidegate schema > tidegate.schema.json

The schema is of the 2020-12 draft. docs/editors.md says how editors use it.";

/// Prints the schema.
pub fn main() -> Exit {
    let schema = tidegate_config::schema();
    match writeln!(io::stdout().lock(), "{schema:#}") {
        Ok(()) => Exit::Fine,
        Err(error) => {
            eprintln!("tidegate: cannot write the schema: {error}");
            Exit::Failed
        }
    }
}

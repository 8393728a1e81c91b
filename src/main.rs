//! The `tidegate` command. Everything is in the library; this is the only place
//! the process ends.

use std::process::ExitCode;

fn main() -> ExitCode {
    tidegate_cli::main()
}

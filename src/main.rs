//! The `tidegate` command. It only calls `tidegate_cli::main`, which returns the exit code.

use std::process::ExitCode;

fn main() -> ExitCode {
    tidegate_cli::main()
}

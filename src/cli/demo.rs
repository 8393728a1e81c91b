//! `tidegate demo`.
//!
//! Called by the command line. It does nothing but say that it is not here.

use super::{DemoArgs, Exit};
use std::io::Write;

/// Says so and fails.
pub fn main(_args: DemoArgs) -> Exit {
    let _ = writeln!(std::io::stderr(), "tidegate: demo: not built into this binary");
    Exit::Failed
}

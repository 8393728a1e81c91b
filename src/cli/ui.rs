//! `tidegate ui`: makes the operator page of the running balancer reachable for a browser on this
//! host.
//!
//! Called by the command line. The forwarder is in `tidegate_client::forward`.

use clap::Args;
use std::io::Write;
use tidegate_client::command::Exit;
use tidegate_client::forward::Forwarder;
use tidegate_client::http::{ClientArgs, fail};

/// Help after the options.
pub const HELP: &str = "\
Example:
  tidegate ui
  tidegate ui --port 9900 --config /etc/tidegate/tidegate.toml

Open the printed address in a browser on this host. Its secret is new for each
run. Without it, other users of this host cannot use the page. Ctrl-C ends it.

From another machine, forward a port to the admin socket instead:
  ssh -L 9900:/run/tidegate/admin.sock HOST
and open http://localhost:9900/ there.";

/// `tidegate ui`
#[derive(Debug, Args)]
pub struct UiArgs {
    /// Port on 127.0.0.1. 0: any free port.
    #[arg(long, value_name = "PORT", default_value_t = 0)]
    pub port: u16,
    /// How to reach the balancer.
    #[command(flatten)]
    pub client: ClientArgs,
}

/// Prints the address of the page, and forwards until the process ends.
pub fn main(args: &UiArgs) -> Exit {
    let forwarder = match Forwarder::bind(&args.client, args.port) {
        Ok(forwarder) => forwarder,
        Err(error) => return fail(&args.client, &error),
    };
    let mut out = std::io::stdout();
    // Without a reader of the address nothing is lost: the command can be run again.
    let _ = writeln!(out, "{}", forwarder.url()).and_then(|()| out.flush());
    eprintln!("tidegate: open this address in a browser; Ctrl-C ends the page");
    match forwarder.serve() {
        Ok(()) => Exit::Fine,
        Err(error) => {
            eprintln!("tidegate: cannot serve the page: {error}");
            Exit::Failed
        }
    }
}

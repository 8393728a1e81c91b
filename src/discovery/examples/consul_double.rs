//! A double of a Consul agent as a program, for examples, tests and trials by hand.
//!
//! `cargo run -p tidegate-discovery --example consul_double -- IP:PORT`
//! listens at that address (default 127.0.0.1:8500) and prints it. It keeps everything in
//! memory and serves until it is killed. Not for production: it is no Consul.
//!
//! Each line on standard input is a command, and `done` on standard output answers it:
//! `fault none|no-leader|no-index|empty|error|half|hang|reset`, `token NAME r|rw`, `revoke NAME`, `close`
//! (connections), `indexes N` (small again, as after a restored snapshot).

use std::net::SocketAddr;
use tidegate_discovery::testing::consul;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let listen = std::env::args().nth(1).unwrap_or_else(|| "127.0.0.1:8500".to_owned());
    let listen: SocketAddr = listen.parse()?;
    Ok(consul::serve(listen, std::io::stdin().lock(), std::io::stdout())?)
}

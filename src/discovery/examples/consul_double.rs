//! A double of a Consul agent as a program, for examples and trials by hand.
//!
//! `cargo run -p tidegate-discovery --example consul_double -- IP:PORT`
//! listens at that address (default 127.0.0.1:8500) and prints it. It keeps everything in
//! memory and serves until it is killed. Not for production: it is no Consul.

use std::io::Write;
use std::net::SocketAddr;
use tidegate_discovery::testing::consul::{ConsulDouble, DoubleSettings};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let listen = std::env::args().nth(1).unwrap_or_else(|| "127.0.0.1:8500".to_owned());
    let listen: SocketAddr = listen.parse()?;
    let double = ConsulDouble::start_with(DoubleSettings { listen, ..Default::default() })?;
    println!("listening at {}", double.address());
    std::io::stdout().flush()?;
    double.wait();
    Ok(())
}

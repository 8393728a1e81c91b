//! A double of a Consul agent as a program, for examples, tests and trials by hand.
//!
//! `cargo run -p tidegate-discovery --example consul_double -- IP:PORT`
//! listens at that address (default 127.0.0.1:8500) and prints it. It keeps everything in
//! memory and serves until it is killed. Not for production: it is no Consul.
//!
//! Each line on standard input is a command, and `done` on standard output answers it:
//! `fault none|no-leader|no-index|empty|error|half|hang|reset`, `token NAME r|rw`, `revoke NAME`, `close`
//! (connections), `indexes N` (small again, as after a restored snapshot).

use std::io::{BufRead, Write};
use std::net::SocketAddr;
use tidegate_discovery::testing::consul::{
    ConsulDouble, ConsulFault, DoubleRights, DoubleSettings,
};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let listen = std::env::args().nth(1).unwrap_or_else(|| "127.0.0.1:8500".to_owned());
    let listen: SocketAddr = listen.parse()?;
    let double = ConsulDouble::start_with(DoubleSettings { listen, ..Default::default() })?;
    println!("listening at {}", double.address());
    std::io::stdout().flush()?;
    for line in std::io::stdin().lock().lines() {
        let words = line?;
        let words: Vec<&str> = words.split_whitespace().collect();
        println!("{}", command(&double, &words).unwrap_or("unknown command"));
        std::io::stdout().flush()?;
    }
    double.wait();
    Ok(())
}

/// Carries out a command. `None`: there is no such command.
fn command(double: &ConsulDouble, words: &[&str]) -> Option<&'static str> {
    match *words {
        ["fault", name] => double.set_fault(match name {
            "none" => ConsulFault::None,
            "no-leader" => ConsulFault::NoLeader,
            "no-index" => ConsulFault::IndexZero,
            "empty" => ConsulFault::EmptyWithoutLeader,
            "error" => ConsulFault::Status(500),
            "half" => ConsulFault::HalfAnswer,
            "hang" => ConsulFault::Hang,
            "reset" => ConsulFault::Reset,
            _ => return None,
        }),
        ["token", name, rights] => {
            let rights = DoubleRights { read: rights.contains('r'), write: rights.contains('w') };
            double.create_token(name, rights);
        }
        ["revoke", name] => double.revoke_token(name),
        ["close"] => double.close_connections(),
        ["indexes", number] => double.restart_indexes(number.parse().ok()?),
        _ => return None,
    }
    Some("done")
}

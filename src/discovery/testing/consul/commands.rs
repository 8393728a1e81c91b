//! The double as a process: commands from one stream, answers to another.
//!
//! The example `consul_double` and the tests of the balancer run it. It decides nothing.

use super::{ConsulDouble, ConsulFault, DoubleRights, DoubleSettings};
use std::io::{self, BufRead, Write};
use std::net::SocketAddr;

/// Starts a double at this address, prints `listening at IP:PORT`, and answers each line of
/// `input` with `done`. Serves until the end of the process.
///
/// # Errors
/// The address is in use, or a stream has failed.
pub fn serve(listen: SocketAddr, input: impl BufRead, mut output: impl Write) -> io::Result<()> {
    let double = ConsulDouble::start_with(DoubleSettings { listen, ..Default::default() })?;
    writeln!(output, "listening at {}", double.address())?;
    output.flush()?;
    for line in input.lines() {
        let words = line?;
        let words: Vec<&str> = words.split_whitespace().collect();
        writeln!(output, "{}", command(&double, &words).unwrap_or("unknown command"))?;
        output.flush()?;
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

//! `tidegate ready`: whether the balancer takes new clients, as an exit code.
//!
//! Called by the command line, by health checks and by routers every moment: one
//! blocking exchange without a runtime.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::time::Duration;
use tidegate_client::command::Exit;
use tidegate_client::http::{Address, ClientArgs, error_document, fail, printable, read_token};
use tidegate_client::reach::Reached;

/// Shown with `--help`.
pub const HELP: &str = "\
Example:
  tidegate ready && echo \"takes new clients\"

Exit codes: 0 ready; 3 not ready (starting, leaving, draining, a stalled worker),
or the balancer does not answer.";

/// For each of connect, write and read: a balancer that is ready needs a
/// thousandth of it.
const STEP_MAX: Duration = Duration::from_secs(2);

/// The answer is a line of JSON.
const ANSWER_BYTES_MAX: u64 = 64 * 1024;

/// Asks once.
pub fn main(args: &ClientArgs) -> Exit {
    let reached = match Reached::balancer(args) {
        Ok(reached) => reached,
        Err(error) => return fail(args, &error),
    };
    let token = args.token_file.as_deref().or(reached.token_file.as_deref());
    let request = match token.map(read_token).transpose() {
        Ok(token) => request(token.as_deref()),
        Err(error) => return fail(args, &error),
    };
    let answer = match ask_first(&reached.places, &request) {
        Ok(answer) => answer,
        Err(why) => {
            complain(&format!("cannot reach the balancer: {why}"));
            return Exit::Failed;
        }
    };
    let (status, body) = parse(&answer);
    if args.json {
        // A closed standard output changes nothing about the answer.
        let _ = writeln!(io::stdout(), "{}", body.trim_end());
    }
    match status {
        Some(200) => Exit::Fine,
        Some(503) => {
            if !args.json {
                complain(&format!("not ready: {}", why(body)));
            }
            Exit::Failed
        }
        _ => {
            complain("what answers is not the admin API");
            Exit::Failed
        }
    }
}

/// Asks at the first place where a balancer answers; else why none does.
fn ask_first(places: &[Address], request: &str) -> Result<String, String> {
    let mut why = Vec::new();
    for place in places {
        match ask(place, request) {
            Ok(answer) => return Ok(answer),
            Err(error) => why.push(format!("{place}: {error}")),
        }
    }
    Err(why.join("; "))
}

fn complain(text: &str) {
    // With standard error closed there is nobody to tell.
    let _ = writeln!(io::stderr(), "tidegate: {}", printable(text));
}

fn request(token: Option<&str>) -> String {
    let token = token.map_or_else(String::new, |it| format!("Authorization: Bearer {it}\r\n"));
    format!("GET /ready HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n{token}\r\n")
}

fn ask(address: &Address, request: &str) -> io::Result<String> {
    match address {
        Address::Unix(path) => {
            let stream = UnixStream::connect(path)?;
            stream.set_read_timeout(Some(STEP_MAX))?;
            stream.set_write_timeout(Some(STEP_MAX))?;
            exchange(&stream, request)
        }
        Address::Tcp(address) => {
            let stream = TcpStream::connect_timeout(address, STEP_MAX)?;
            stream.set_read_timeout(Some(STEP_MAX))?;
            stream.set_write_timeout(Some(STEP_MAX))?;
            exchange(&stream, request)
        }
    }
}

fn exchange(mut stream: impl Read + Write, request: &str) -> io::Result<String> {
    stream.write_all(request.as_bytes())?;
    let mut answer = Vec::new();
    stream.take(ANSWER_BYTES_MAX).read_to_end(&mut answer)?;
    Ok(String::from_utf8_lossy(&answer).into_owned())
}

/// Status and body.
fn parse(answer: &str) -> (Option<u16>, &str) {
    let status = answer.strip_prefix("HTTP/1.1 ").and_then(|rest| rest.get(..3)?.parse().ok());
    let body = answer.split_once("\r\n\r\n").map_or("", |(_, body)| body);
    (status, body)
}

fn why(body: &str) -> String {
    let refused = error_document(body);
    refused.map_or_else(|| "it does not say why".to_owned(), |document| document.detail)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn status_and_reason_are_read_from_the_answer() {
        let body = r#"{"error":"not ready","detail":"draining"}"#;
        let text = format!("HTTP/1.1 503 Service Unavailable\r\ncontent-length: 5\r\n\r\n{body}");
        assert_eq!(parse(&text), (Some(503), body));
        assert_eq!(why(body), "draining");
        assert_eq!(parse("SSH-2.0-x\r\n").0, None);
        assert_eq!(parse("HTTP/1.1 2").0, None);
    }
}

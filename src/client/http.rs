//! The command line's side of the admin API.
//!
//! Used by `reload`, `status`, `drain`, `undrain` and `shutdown`: one request,
//! one answer, bounded in time and size. It knows the API's HTTP and its error
//! shape, not its meaning.

use super::reach::{ClientStream, Reached, connect};
use crate::command::Exit;
use clap::Args;
use http_body_util::{BodyExt, Empty, LengthLimitError, Limited};
use hyper::body::Bytes;
use hyper::header::{AUTHORIZATION, CONNECTION, HOST};
use hyper::{Method, Request, StatusCode};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use std::fmt;
use std::io::{self, Write};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::timeout;

/// How to reach a running balancer.
#[derive(Debug, Clone, Args)]
pub struct ClientArgs {
    /// Admin address: unix:PATH or IP:PORT. Default: $TIDEGATE_ADMIN, else what
    /// --config names, else unix:/run/tidegate/admin.sock, else this user's own.
    #[arg(long, value_name = "ADDR")]
    pub admin: Option<Address>,
    /// Configuration of the balancer: says where the admin API listens.
    #[arg(long, short, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Print the API's JSON.
    #[arg(long)]
    pub json: bool,
    /// File with the bearer token that changes over TCP need.
    #[arg(long, value_name = "FILE")]
    pub token_file: Option<PathBuf>,
}

/// Where the admin API listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Address {
    /// A Unix socket.
    Unix(PathBuf),
    /// An IP address and port.
    Tcp(SocketAddr),
}

/// A request refused, or no answer at all; displays for standard error.
#[derive(Debug)]
pub enum ClientError {
    /// What to ask with is unfit: a token file, an admin address.
    Request(String),
    /// The balancer said no: its JSON, or its text where that is none.
    Refused(Value),
    /// Nobody answered, or not as the admin API does.
    Unreachable(String),
}

/// The API itself gives its control loop 5 s and answers in any case.
const ANSWER_MAX: Duration = Duration::from_secs(15);

/// Status of ten thousand backends is 6 MB.
const ANSWER_BYTES_MAX: usize = 256 * 1024 * 1024;

/// Sends one request and gives the answer's body, a success's.
///
/// # Errors
/// See [`ClientError`].
pub fn ask(args: &ClientArgs, method: Method, path: &str) -> Result<String, ClientError> {
    ask_within(args, method, path, ANSWER_MAX)
}

/// The same for what takes its time.
///
/// # Errors
/// See [`ClientError`].
pub fn ask_within(
    args: &ClientArgs,
    method: Method,
    path: &str,
    limit: Duration,
) -> Result<String, ClientError> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| ClientError::Unreachable(format!("cannot start: {error}")))?;
    let reached = Reached::balancer(args)?;
    let token = args.token_file.as_deref().or(reached.token_file.as_deref());
    let token = token.map(read_token).transpose()?;
    runtime.block_on(async {
        let (address, stream) = connect(&reached.places).await?;
        exchange(&address, stream, method, path, token.as_deref(), limit).await
    })
}

/// The bearer token in a file, without the line's end.
///
/// # Errors
/// Why the file cannot be taken.
pub fn read_token(path: &std::path::Path) -> Result<String, ClientError> {
    let text = std::fs::read_to_string(path).map_err(|error| {
        ClientError::Request(format!("cannot read the token file {}: {error}", path.display()))
    })?;
    let token = text.trim();
    if token.is_empty() || !token.bytes().all(|byte| byte.is_ascii_graphic()) {
        let path = path.display();
        return Err(ClientError::Request(format!("the token file {path} holds no token")));
    }
    Ok(token.to_owned())
}

async fn exchange(
    address: &Address,
    stream: ClientStream,
    method: Method,
    path: &str,
    token: Option<&str>,
    limit: Duration,
) -> Result<String, ClientError> {
    let unreachable = |error: &dyn fmt::Display| {
        ClientError::Unreachable(format!("cannot reach the balancer at {address}: {error}"))
    };
    let mut request = Request::builder()
        .method(method)
        .uri(path)
        .header(HOST, address.host())
        .header(CONNECTION, "close");
    if let Some(token) = token {
        request = request.header(AUTHORIZATION, format!("Bearer {token}"));
    }
    let request = request.body(Empty::new()).map_err(|error| unreachable(&error))?;
    let answered = async {
        match stream {
            ClientStream::Unix(stream) => answer(stream, request).await,
            ClientStream::Tcp(stream) => answer(stream, request).await,
        }
    };
    let (status, body) = match timeout(limit, answered).await {
        Ok(answered) => answered.map_err(|error| unreachable(&error))?,
        Err(_) => return Err(unreachable(&format!("no answer within {limit:?}"))),
    };
    check_response(status, body, address)
}

async fn answer(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    request: Request<Empty<Bytes>>,
) -> Result<(StatusCode, String), String> {
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
        .await
        .map_err(|error| error.to_string())?;
    // Its errors come back through the request's.
    let driver = tokio::spawn(connection);
    let response = sender.send_request(request).await.map_err(|error| error.to_string())?;
    let status = response.status();
    let body = Limited::new(response.into_body(), ANSWER_BYTES_MAX).collect().await;
    let body = body.map_err(|error| match error.is::<LengthLimitError>() {
        true => "its answer is too long".to_owned(),
        false => error.to_string(),
    })?;
    driver.abort();
    let body = String::from_utf8(body.to_bytes().into());
    Ok((status, body.map_err(|_| "its answer is not text".to_owned())?))
}

fn check_response(
    status: StatusCode,
    body: String,
    address: &Address,
) -> Result<String, ClientError> {
    if status.is_success() {
        return Ok(body);
    }
    let value =
        serde_json::from_str::<Value>(&body).ok().filter(|value| value["error"].is_string());
    match value {
        Some(mut value) if status.is_client_error() => {
            if status == StatusCode::UNAUTHORIZED {
                value["hint"] =
                    "give the token of [admin] token_file with --token-file FILE".into();
            }
            Err(ClientError::Refused(value))
        }
        Some(value) => Err(ClientError::Unreachable(format!(
            "the balancer at {address} cannot answer: {}",
            sentence(&value)
        ))),
        None => Err(ClientError::Unreachable(format!(
            "what answers at {address} is not the admin API (HTTP {status})"
        ))),
    }
}

/// `error: detail` of an error answer.
fn sentence(value: &Value) -> String {
    let error = value["error"].as_str().unwrap_or_default();
    let hint = value["hint"].as_str().map_or_else(String::new, |hint| format!("; {hint}"));
    match value["detail"].as_str() {
        Some(detail) if !detail.is_empty() => format!("{error}: {detail}{hint}"),
        _ => format!("{error}{hint}"),
    }
}

/// Percent-encodes one path segment (RFC 3986, unreserved characters stay).
pub fn segment(name: impl AsRef<[u8]>) -> String {
    let mut encoded = String::with_capacity(name.as_ref().len());
    for byte in name.as_ref() {
        match *byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => {
                encoded.push(char::from(*byte));
            }
            byte => encoded.push_str(&format!("%{byte:02X}")),
        }
    }
    encoded
}

/// Prints what a command has to say: the API's answer with `--json`, else what
/// `shown` makes of it. Errors go to standard error and decide the exit code.
pub fn report(
    args: &ClientArgs,
    answer: Result<String, ClientError>,
    shown: impl FnOnce(&Value) -> String,
) -> Exit {
    let text = match answer {
        Ok(text) if args.json => text,
        Ok(text) => match serde_json::from_str(&text) {
            Ok(value) => shown(&value),
            Err(error) => {
                return print_error(
                    &format!("tidegate: the answer is no JSON: {error}"),
                    Exit::Failed,
                );
            }
        },
        Err(error) => return fail(args, &error),
    };
    print(&text)
}

fn fail(args: &ClientArgs, error: &ClientError) -> Exit {
    match error {
        ClientError::Unreachable(text) => print_error(&format!("tidegate: {text}"), Exit::Failed),
        ClientError::Request(text) => print_error(&format!("tidegate: {text}"), Exit::Refused),
        ClientError::Refused(value) => {
            if args.json {
                print(&value.to_string());
            }
            print_error(&refusal(value), Exit::Refused)
        }
    }
}

/// Problems as `check` starts them, or one sentence.
fn refusal(value: &Value) -> String {
    let problem = |problem: &Value| {
        let file = problem["file"].as_str()?;
        let (line, column) = (problem["line"].as_u64()?, problem["column"].as_u64()?);
        let message = problem["message"].as_str()?;
        let plain = || format!("{file}:{line}:{column}: error: {message}");
        // An older balancer sends no rendered text.
        Some(problem["rendered"].as_str().map_or_else(plain, |text| format!("{text}\n")))
    };
    let problems = value["problems"].as_array().into_iter().flatten();
    let mut lines: Vec<String> = problems.filter_map(problem).collect();
    if lines.is_empty() {
        lines.push(format!("tidegate: {}", sentence(value)));
    } else {
        lines.push(format!("tidegate: {}", value["error"].as_str().unwrap_or_default()));
    }
    lines.join("\n")
}

fn print_error(text: &str, exit: Exit) -> Exit {
    // With standard error closed there is nobody to tell.
    let _ = writeln!(io::stderr(), "{}", printable(text));
    exit
}

/// Writes a text and a newline to standard output. Whoever closed the other end
/// (`| head`) has seen enough: that is no failure.
fn print(text: &str) -> Exit {
    let mut out = io::stdout().lock();
    match writeln!(out, "{}", text.trim_end_matches('\n')).and_then(|()| out.flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            print_error(&format!("tidegate: cannot write: {error}"), Exit::Failed)
        }
        _ => Exit::Fine,
    }
}

/// Names come from files and may hold anything; a terminal must not obey them.
pub fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() && c != '\n' { '\u{FFFD}' } else { c }).collect()
}

// === impl Address ===

impl Address {
    /// For the `Host` header.
    fn host(&self) -> String {
        match self {
            Address::Unix(_) => "localhost".to_owned(),
            Address::Tcp(address) => address.to_string(),
        }
    }
}

impl FromStr for Address {
    type Err = String;

    fn from_str(text: &str) -> Result<Address, String> {
        let expected = || "expected unix:PATH or IP:PORT".to_owned();
        if let Some(path) = text.strip_prefix("unix:") {
            return if path.is_empty() { Err(expected()) } else { Ok(Address::Unix(path.into())) };
        }
        let address = match text.strip_prefix("localhost:") {
            Some(port) => {
                SocketAddr::from((Ipv4Addr::LOCALHOST, port.parse().map_err(|_| expected())?))
            }
            None => text.parse().map_err(|_| expected())?,
        };
        if address.port() == 0 { Err(expected()) } else { Ok(Address::Tcp(address)) }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Address::Unix(path) => write!(f, "unix:{}", path.display()),
            Address::Tcp(address) => address.fmt(f),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_segment_keeps_no_slash_colon_or_bracket() {
        assert_eq!(segment("unix:/run/a b.sock"), "unix%3A%2Frun%2Fa%20b.sock");
        assert_eq!(segment("[::1]:80"), "%5B%3A%3A1%5D%3A80");
        assert_eq!(segment("ä-._~9"), "%C3%A4-._~9");
    }

    #[test]
    fn problems_are_told_as_check_tells_them() {
        let value = json!({
            "error": "refused", "detail": "1 problem",
            "problems": [{"file": "t.toml", "line": 3, "column": 7, "message": "no such pool"}],
        });
        assert_eq!(refusal(&value), "t.toml:3:7: error: no such pool\ntidegate: refused");
        let rendered = "t.toml:3:7: error: no such pool\n3 | pool = \"x\"";
        let value = json!({
            "error": "refused", "detail": "1 problem",
            "problems": [{"file": "t.toml", "line": 3, "column": 7, "message": "no such pool",
                          "rendered": rendered}],
        });
        assert_eq!(refusal(&value), format!("{rendered}\n\ntidegate: refused"));
        let value = json!({"error": "unknown pool", "detail": "no pool is named \"x\""});
        assert_eq!(refusal(&value), "tidegate: unknown pool: no pool is named \"x\"");
    }

    #[test]
    fn refusals_and_failures_are_told_apart_by_status() {
        let at = Address::Unix("/x".into());
        let judged = |status, body: &str| check_response(status, body.to_owned(), &at);
        let said = r#"{"error":"e","detail":"d"}"#;
        assert!(judged(StatusCode::OK, "anything").is_ok());
        assert!(matches!(judged(StatusCode::NOT_FOUND, said), Err(ClientError::Refused(_))));
        assert!(matches!(
            judged(StatusCode::SERVICE_UNAVAILABLE, said),
            Err(ClientError::Unreachable(_))
        ));
        let Err(ClientError::Refused(value)) = judged(StatusCode::UNAUTHORIZED, said) else {
            panic!("not refused");
        };
        assert!(refusal(&value).contains("--token-file FILE"), "{}", refusal(&value));
        let foreign = judged(StatusCode::NOT_FOUND, "<html>");
        assert!(matches!(foreign, Err(ClientError::Unreachable(_))));
    }

    #[test]
    fn terminals_get_no_control_characters() {
        assert_eq!(printable("a\x1b[31m\r\nb"), "a\u{FFFD}[31m\u{FFFD}\nb");
    }
}

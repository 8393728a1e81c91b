//! Sends one request to the admin API and reads the answer, bounded in time and size.
//!
//! Used by the commands of `cli` and `lab`. It knows the error format of the API, but not
//! the meaning of other documents.

use super::reach::{ClientStream, Reached, connect};
use crate::command::Exit;
use clap::Args;
use http_body_util::{BodyExt, Empty, LengthLimitError, Limited};
use hyper::body::Bytes;
use hyper::header::{AUTHORIZATION, CONNECTION, HOST};
use hyper::{Method, Request, StatusCode};
use hyper_util::rt::TokioIo;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_encode};
use serde::de::DeserializeOwned;
use std::fmt;
use std::io::{self, Write};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;
use tidegate_api::answers::ErrorDoc;
use tidegate_api::reload::ProblemDoc;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::timeout;

/// How to reach a running balancer.
#[derive(Debug, Clone, Args)]
pub struct ClientArgs {
    /// Admin address: unix:PATH or IP:PORT. Default: $TIDEGATE_ADMIN, else the one in
    /// --config, else unix:/run/tidegate/admin.sock, else the socket of this user.
    #[arg(long, value_name = "ADDR")]
    pub admin: Option<Address>,
    /// Configuration of the balancer, to find its admin address.
    #[arg(long, short, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Print the response as JSON.
    #[arg(long)]
    pub json: bool,
    /// File with the bearer token; needed for changes over TCP.
    #[arg(long, value_name = "FILE")]
    pub token_file: Option<PathBuf>,
}

/// An admin address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Address {
    /// A Unix socket.
    Unix(PathBuf),
    /// An IP address and port.
    Tcp(SocketAddr),
}

/// The answer to one request.
#[derive(Debug)]
pub struct Answer {
    /// The request, such as `GET /v1/status`.
    request: String,
    /// The address of the balancer.
    address: Address,
    /// The HTTP status.
    pub status: StatusCode,
    /// The body.
    pub text: String,
}

/// Why a request failed; displays as one sentence.
#[derive(Debug)]
pub enum ClientError {
    /// The request cannot be made, because of an invalid token file or admin address.
    Request(String),
    /// The balancer rejected the request: the error document, parsed and as JSON.
    Refused(ErrorDoc, String),
    /// No balancer answered, or the answer is not one of this version's admin API.
    Unreachable(String),
}

/// Timeout for an answer. The API answers after 5 s even if its control loop does not.
const ANSWER_MAX: Duration = Duration::from_secs(15);

/// Limit on the length of an answer. The status of 10,000 backends has about 6 MB.
const ANSWER_BYTES_MAX: usize = 256 * 1024 * 1024;

/// All characters except the unreserved ones of RFC 3986.
const RESERVED: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');

/// Sends one request and waits for a successful answer.
///
/// # Errors
/// See [`ClientError`].
pub fn ask(args: &ClientArgs, method: Method, path: &str) -> Result<Answer, ClientError> {
    ask_within(args, method, path, ANSWER_MAX)
}

/// Like [`ask`], with another timeout.
///
/// # Errors
/// See [`ClientError`].
pub fn ask_within(
    args: &ClientArgs,
    method: Method,
    path: &str,
    limit: Duration,
) -> Result<Answer, ClientError> {
    exchange(args, method, path, limit)?.success()
}

/// Sends one request and waits at most `limit` for its answer, with any status.
///
/// # Errors
/// No answer arrived, or the request cannot be made.
pub fn exchange(
    args: &ClientArgs,
    method: Method,
    path: &str,
    limit: Duration,
) -> Result<Answer, ClientError> {
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(|error| {
            ClientError::Unreachable(format!("cannot start the async runtime: {error}"))
        })?;
    let reached = Reached::balancer(args)?;
    let token = args.token_file.as_deref().or(reached.token_file.as_deref());
    let token = token.map(read_token).transpose()?;
    let named = format!("{method} {path}");
    runtime.block_on(async {
        let (address, stream) = connect(&reached.places).await?;
        let answered = async {
            let request = request(&address, method, path, token.as_deref())?;
            match stream {
                ClientStream::Unix(stream) => answer(stream, request).await,
                ClientStream::Tcp(stream) => answer(stream, request).await,
            }
        };
        let late = |_| Err(format!("no answer within {limit:?}"));
        match timeout(limit, answered).await.unwrap_or_else(late) {
            Ok((status, text)) => Ok(Answer { request: named, address, status, text }),
            Err(error) => {
                let text = format!("cannot reach the balancer at {address}: {error}");
                Err(ClientError::Unreachable(text))
            }
        }
    })
}

/// Reads the bearer token from a file, without surrounding white space.
pub(crate) fn read_token(path: &Path) -> Result<String, ClientError> {
    let text = std::fs::read_to_string(path).map_err(|error| {
        ClientError::Request(format!("cannot read the token file {}: {error}", path.display()))
    })?;
    let token = text.trim();
    if token.is_empty() || !token.bytes().all(|byte| byte.is_ascii_graphic()) {
        let path = path.display();
        return Err(ClientError::Request(format!(
            "the token file {path} does not contain a token"
        )));
    }
    Ok(token.to_owned())
}

fn request(
    address: &Address,
    method: Method,
    path: &str,
    token: Option<&str>,
) -> Result<Request<Empty<Bytes>>, String> {
    let mut request = Request::builder()
        .method(method)
        .uri(path)
        .header(HOST, address.host())
        .header(CONNECTION, "close");
    if let Some(token) = token {
        request = request.header(AUTHORIZATION, format!("Bearer {token}"));
    }
    request.body(Empty::new()).map_err(|error| error.to_string())
}

async fn answer(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    request: Request<Empty<Bytes>>,
) -> Result<(StatusCode, String), String> {
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
        .await
        .map_err(|error| error.to_string())?;
    // An error of the connection is also returned by the request.
    let driver = tokio::spawn(connection);
    let response = sender.send_request(request).await.map_err(|error| error.to_string())?;
    let status = response.status();
    let body = Limited::new(response.into_body(), ANSWER_BYTES_MAX).collect().await;
    let body = body.map_err(|error| match error.is::<LengthLimitError>() {
        true => "the response is too long".to_owned(),
        false => error.to_string(),
    })?;
    driver.abort();
    let body = String::from_utf8(body.to_bytes().into());
    Ok((status, body.map_err(|_| "the response is not text".to_owned())?))
}

/// Percent-encodes one path segment or query value.
pub fn segment(name: impl AsRef<[u8]>) -> String {
    percent_encode(name.as_ref(), RESERVED).to_string()
}

/// Returns the path for an action on one backend, such as `drain`.
pub fn backend_path(pool: &str, backend: &str, action: &str) -> String {
    format!("/v1/pools/{}/backends/{}/{action}", segment(pool), segment(backend))
}

/// Prints the result of a command: the JSON of the answer with `--json`, else the text that
/// `shown` makes of its document. Prints errors to standard error. Returns the exit code.
pub fn report<T: DeserializeOwned>(
    args: &ClientArgs,
    answer: Result<Answer, ClientError>,
    shown: impl FnOnce(&T) -> String,
) -> Exit {
    let text = answer.and_then(|answer| match args.json {
        true => Ok(answer.text),
        false => answer.document().map(|document| printable(&shown(&document))),
    });
    text.map_or_else(|error| fail(args, &error), |text| print(&text))
}

/// Prints why a request failed and returns the exit code.
pub fn fail(args: &ClientArgs, error: &ClientError) -> Exit {
    let exit = match error {
        ClientError::Unreachable(_) => Exit::Failed,
        ClientError::Request(_) | ClientError::Refused(..) => Exit::Refused,
    };
    if let ClientError::Refused(_, json) = error
        && args.json
    {
        print(json);
    }
    print_error(&error_text(error), exit)
}

/// Returns the problems of a rejected file in the format of `check`, then one sentence.
fn error_text(error: &ClientError) -> String {
    let ClientError::Refused(ErrorDoc { error: refused, problems: Some(problems), .. }, _) = error
    else {
        return format!("tidegate: {error}");
    };
    let problem =
        |ProblemDoc { file, line, column, message, rendered, .. }: &ProblemDoc| match rendered
            .is_empty()
        {
            true => format!("{file}:{line}:{column}: error: {message}"),
            false => format!("{rendered}\n"),
        };
    let mut lines: Vec<String> = problems.iter().map(problem).collect();
    lines.push(format!("tidegate: {refused}"));
    lines.join("\n")
}

fn print_error(text: &str, exit: Exit) -> Exit {
    // If standard error is closed, the text is lost.
    let _ = writeln!(io::stderr(), "{}", printable(text));
    exit
}

/// Prints a text and a newline to standard output. A closed pipe, such as `| head`, is not
/// a failure.
fn print(text: &str) -> Exit {
    let mut out = io::stdout().lock();
    match writeln!(out, "{}", text.trim_end_matches('\n')).and_then(|()| out.flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            print_error(&format!("tidegate: cannot write: {error}"), Exit::Failed)
        }
        _ => Exit::Fine,
    }
}

/// Replaces control characters: names come from files and must not control a terminal.
pub fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() && c != '\n' { '\u{FFFD}' } else { c }).collect()
}

// === impl Answer ===

impl Answer {
    /// Returns the answer if its status is a success, else an error.
    fn success(self) -> Result<Answer, ClientError> {
        let (address, status) = (&self.address, self.status);
        if status.is_success() {
            return Ok(self);
        }
        match self.error_document() {
            Some(mut rejection) if status.is_client_error() => {
                if status == StatusCode::UNAUTHORIZED {
                    rejection.detail +=
                        "; give the token of [admin] token_file with --token-file FILE";
                }
                Err(ClientError::Refused(rejection, self.text))
            }
            Some(rejection) => {
                let why = ClientError::Refused(rejection, String::new());
                let text = format!("the balancer at {address} cannot answer: {why}");
                Err(ClientError::Unreachable(text))
            }
            None => Err(ClientError::Unreachable(format!(
                "{address} is not an admin API (HTTP {status})"
            ))),
        }
    }

    /// Returns the error document; `None` if the body is not one.
    pub fn error_document(&self) -> Option<ErrorDoc> {
        serde_json::from_str(&self.text).ok()
    }

    /// Parses the body.
    ///
    /// # Errors
    /// The body is not a `T`.
    pub fn document<T: DeserializeOwned>(&self) -> Result<T, ClientError> {
        serde_json::from_str(&self.text).map_err(|error| {
            ClientError::Unreachable(format!(
                "cannot read the response to {}: {error}; use the same version as the balancer",
                self.request
            ))
        })
    }
}

// === impl ClientError ===

impl fmt::Display for ClientError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ClientError::Request(text) | ClientError::Unreachable(text) => f.write_str(text),
            ClientError::Refused(ErrorDoc { error, detail, .. }, _) if detail.is_empty() => {
                f.write_str(error)
            }
            ClientError::Refused(ErrorDoc { error, detail, .. }, _) => {
                write!(f, "{error}: {detail}")
            }
        }
    }
}

// === impl Address ===

impl Address {
    /// Returns the value of the `Host` header.
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
    use tidegate_api::reload::ReloadDoc;

    #[test]
    fn segment_encodes_slash_colon_and_bracket() {
        assert_eq!(segment("unix:/run/a b.sock"), "unix%3A%2Frun%2Fa%20b.sock");
        assert_eq!(segment("[::1]:80"), "%5B%3A%3A1%5D%3A80");
        assert_eq!(segment("ä-._~9"), "%C3%A4-._~9");
    }

    fn answer(status: StatusCode, text: &str) -> Answer {
        let (request, address) = ("POST /v1/reload".to_owned(), Address::Unix("/x".into()));
        Answer { request, address, status, text: text.to_owned() }
    }

    fn refused(body: &str) -> String {
        match answer(StatusCode::UNPROCESSABLE_ENTITY, body).success() {
            Err(error @ ClientError::Refused(..)) => error_text(&error),
            other => panic!("not refused: {other:?}"),
        }
    }

    #[test]
    fn problems_are_printed_as_by_check() {
        let problem = r#""file": "t.toml", "line": 3, "column": 7, "message": "no such pool""#;
        let with = |problem: &str| {
            refused(&format!(
                r#"{{"error": "refused", "detail": "1 problem", "problems": [{{{problem}}}]}}"#
            ))
        };
        assert_eq!(with(problem), "t.toml:3:7: error: no such pool\ntidegate: refused");
        let rendered = "t.toml:3:7: error: no such pool\n3 | pool";
        let text = with(&format!(r#"{problem}, "rendered": {rendered:?}"#));
        assert_eq!(text, format!("{rendered}\n\ntidegate: refused"));
        let text = refused(r#"{"error": "unknown pool", "detail": "there is no pool \"x\""}"#);
        assert_eq!(text, "tidegate: unknown pool: there is no pool \"x\"");
    }

    #[test]
    fn error_of_an_unreadable_answer_names_the_expected_field() {
        let read = |text: &str| {
            let document = answer(StatusCode::OK, text).document::<ReloadDoc>();
            document.map_err(|error| error.to_string())
        };
        let newer = r#"{"generation": 4, "changed": true, "warnings": [], "more": 1}"#;
        assert_eq!(read(newer).unwrap().generation, 4);
        for (text, expected) in [
            (r#"{"generation": 4, "warnings": []}"#, "missing field `changed`"),
            (r#"{"generation": "x"}"#, "invalid type: string \"x\", expected u64"),
            ("<html>", "expected value"),
        ] {
            let error = read(text).unwrap_err();
            let start = "cannot read the response to POST /v1/reload: ";
            assert!(error.starts_with(&format!("{start}{expected}")), "{error}");
        }
    }

    #[test]
    fn status_code_decides_between_rejected_and_unreachable() {
        let result = |status, body: &str| answer(status, body).success();
        let body = r#"{"error":"e","detail":"d"}"#;
        assert!(result(StatusCode::OK, "anything").is_ok());
        assert!(matches!(
            result(StatusCode::NOT_FOUND, body),
            Err(ClientError::Refused(_, json)) if json == body
        ));
        assert!(matches!(
            result(StatusCode::SERVICE_UNAVAILABLE, body),
            Err(ClientError::Unreachable(_))
        ));
        let unauthorized = result(StatusCode::UNAUTHORIZED, body).unwrap_err();
        assert!(matches!(unauthorized, ClientError::Refused(..)));
        let text = unauthorized.to_string();
        assert!(text.contains("--token-file FILE"), "{text}");
        let foreign = result(StatusCode::NOT_FOUND, "<html>");
        assert!(matches!(foreign, Err(ClientError::Unreachable(_))));
    }

    #[test]
    fn control_characters_are_replaced() {
        assert_eq!(printable("a\x1b[31m\r\nb"), "a\u{FFFD}[31m\u{FFFD}\nb");
    }
}

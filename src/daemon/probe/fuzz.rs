//! Runs the exchange of each protocol with a service whose answers are known before.
//!
//! Called by the fuzz target of probes.

use super::answer_bytes::AnswerBytes;
use super::dns::ProbeQuestion;
use super::mysql::MysqlLogin;
use super::postgres::PostgresLogin;
use super::{ProbeError, ProbeStage, agent, bounded, ldap, mysql, postgres, redis, smtp};
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use tidegate_core::health::ProbeAnswer;
use tidegate_core::model::{DnsProbe, DnsProbeCode, DnsProbeRecord, DnsProbeTransport, ProbeBytes};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// Number of kinds that [`answered`] knows.
pub const KINDS: usize = 9;

/// The result of a probe.
#[derive(Debug)]
pub struct Answered {
    /// Why the probe failed; `None` if it succeeded.
    pub reason: Option<String>,
    /// Bytes of the answer that the probe has read.
    pub bytes_read: usize,
}

/// Answers with its bytes and takes everything.
struct KnownAnswer<'a> {
    rest: &'a [u8],
    read: usize,
}

/// Runs the exchange of this kind.
pub fn answered(kind: usize, answer: &[u8]) -> Answered {
    let mut stream = KnownAnswer { rest: answer, read: 0 };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build();
    let result = runtime.expect("a runtime").block_on(exchange(kind, &mut stream, answer));
    let reason = match result {
        Ok(_) => None,
        Err(
            ProbeError::Backend(reason)
            | ProbeError::Undecided(reason)
            | ProbeError::Local(reason, _),
        ) => Some(bounded(reason)),
    };
    Answered { reason, bytes_read: stream.read }
}

async fn exchange(
    kind: usize,
    stream: &mut KnownAnswer<'_>,
    answer: &[u8],
) -> Result<ProbeAnswer, ProbeError> {
    let mut stage = ProbeStage::Connecting;
    let password = kind.is_multiple_of(2).then_some("secret");
    match kind {
        0 | 1 => {
            let login = PostgresLogin { user: "a", password, database: None };
            postgres::ask(stream, &login, &mut stage).await
        }
        2 | 3 => {
            let user = (kind == 2).then_some("a");
            mysql::ask(stream, &MysqlLogin { user, password }, &mut stage).await
        }
        4 => smtp::exchange(AnswerBytes::new(stream, &mut stage)).await,
        5 => ldap::exchange(AnswerBytes::new(stream, &mut stage)).await,
        6 => redis::exchange(AnswerBytes::new(stream, &mut stage), None, None).await,
        8 => agent::exchange(stream, &ProbeBytes::default(), &mut stage).await,
        _ => {
            let probe = DnsProbe {
                name: "a.example".to_owned(),
                record: DnsProbeRecord::A,
                transport: DnsProbeTransport::Udp,
                rcode: DnsProbeCode::Noerror,
            };
            let judged = ProbeQuestion { probe: &probe, id: 7 }.judge(answer)?;
            Ok(judged.unwrap_or(ProbeAnswer::Expected))
        }
    }
}

// === impl KnownAnswer ===

impl AsyncRead for KnownAnswer<'_> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let count = self.rest.len().min(into.remaining());
        let (now, later) = self.rest.split_at(count);
        into.put_slice(now);
        self.rest = later;
        self.read += count;
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for KnownAnswer<'_> {
    fn poll_write(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

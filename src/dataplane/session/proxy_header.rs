//! PROXY headers: reads that of the client and sends one to the backend.
//!
//! A stage of `session`: the read is between accept and admission, the send is the end of each
//! connect attempt. Neither counts as bytes of the session.
//!
//! - The header is peeked until it is complete, and only the header is then taken from the
//!   receive queue. The relay finds the client's own bytes where they were.
//! - `SO_RCVLOWAT` is raised to the bytes that are missing, so a header that arrives byte by byte
//!   causes few wake-ups.

use super::route::client_reset;
use super::{RareFacts, Session, TableNumbers, ended};
use crate::relay::ConnectEnd;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tidegate_core::model::{ClientAddr, PeerAddr};
use tidegate_core::outcome::{Cause, Phase, SessionEnd, SessionSide};
use tidegate_core::proxy_protocol::{
    self, Decoded, HEADER_BYTES_MAX, HeaderClient, HeaderFault, Tlvs, tlv,
};

/// Pause if the kernel wakes the session before the missing bytes are there, which it does
/// when its memory is short.
const EARLY_PAUSE: Duration = Duration::from_millis(10);

/// What a session remembers of the client's header.
#[derive(Debug)]
pub(super) struct ReceivedHeader {
    /// Address of the socket, if the header announced another client.
    pub(super) peer: Option<PeerAddr>,
    /// The announced destination.
    destination: Option<SocketAddr>,
    /// The peer opened the connection itself, usually for a health check (`LOCAL`).
    pub(super) probe: bool,
    /// Entries that a pool of the frontend sends on.
    tlvs: Box<[u8]>,
}

/// The header buffers of a worker. Used without waiting, so sessions share them.
#[derive(Debug)]
pub(crate) struct HeaderBuffers {
    /// Peeked bytes; [`HEADER_BYTES_MAX`] long.
    received: Box<[u8]>,
    /// The header to send.
    sent: Vec<u8>,
}

impl Default for HeaderBuffers {
    fn default() -> HeaderBuffers {
        HeaderBuffers { received: vec![0; HEADER_BYTES_MAX].into(), sent: Vec::new() }
    }
}

/// A look at the received bytes.
enum HeaderProgress {
    Complete,
    /// The receive queue has `received` bytes. A complete header needs at least `bytes`.
    Needs {
        bytes: u32,
        received: u32,
    },
}

// === impl Session: receive ===

impl Session {
    /// Waits for the client's PROXY header, takes it from the receive queue and admits the
    /// client that it announces.
    pub(super) async fn receive_header(&mut self) -> Result<(), SessionEnd> {
        let Some(source) = self.route.spec.proxy_protocol.clone() else { return Ok(()) };
        self.waits = Some(Phase::Preread);
        let deadline = self.started + source.timeout;
        let mut awaited = 0;
        while let HeaderProgress::Needs { bytes, received } = self.look_for_header(awaited)? {
            if received < awaited {
                tokio::time::sleep(EARLY_PAUSE).await;
            }
            awaited = bytes;
            // Both futures only wait for readiness or time, so the loser can be dropped.
            tokio::select! {
                biased;
                sent = self.relay.client_sent(bytes) => sent.map_err(interrupted)?,
                () = tokio::time::sleep_until(deadline.into()) => {
                    return Err(ended(Phase::Preread, Cause::ProxyHeaderTimeout));
                }
            }
        }
        self.waits = None;
        if awaited > 0 {
            self.use_newest_table();
        }
        if self.is_probe() {
            return Ok(());
        }
        let admitted = self.permit.admit_source(&self.route.spec, self.client);
        admitted.map_err(|cause| ended(Phase::Admit, cause))
    }

    /// Looks for the header. After a wait, an incomplete header ends the session if the client
    /// has sent FIN: the kernel may not report the FIN again.
    fn look_for_header(&mut self, awaited: u32) -> Result<HeaderProgress, SessionEnd> {
        match self.take_header()? {
            HeaderProgress::Needs { .. } if awaited > 0 && self.relay.client_has_ended() => {}
            progress => return Ok(progress),
        }
        // The rest can have arrived before the FIN.
        match self.take_header()? {
            HeaderProgress::Needs { .. } => Err(self.bad_header(HeaderFault::Truncated)),
            complete => Ok(complete),
        }
    }

    /// Peeks at the received bytes. Takes the header from the receive queue if it is complete.
    fn take_header(&mut self) -> Result<HeaderProgress, SessionEnd> {
        let ctx = std::rc::Rc::clone(self.ctx());
        let buffers = &mut *ctx.headers.borrow_mut();
        let received = match self.relay.peek_client(&mut buffers.received) {
            Ok(0) => return Err(client_left()),
            Ok(count) => &buffers.received[..count],
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => &[],
            Err(error) => return Err(failed(&error)),
        };
        let header = match proxy_protocol::decode(received) {
            Decoded::More(bytes) => {
                let (bytes, received) = (bytes as u32, received.len() as u32);
                return Ok(HeaderProgress::Needs { bytes, received });
            }
            Decoded::Bad(fault) => return Err(self.bad_header(fault)),
            Decoded::Done(header) => header,
        };
        let len = header.len;
        let kept = self.tlvs_to_keep(header.tlvs);
        self.note_header(header.announced, kept);
        self.relay.discard_from_client(&mut buffers.received[..len]).map_err(|e| failed(&e))?;
        Ok(HeaderProgress::Complete)
    }

    fn bad_header(&self, fault: HeaderFault) -> SessionEnd {
        self.log_bad_header(fault);
        ended(Phase::Preread, fault.cause())
    }

    /// Returns the entries that any pool of the frontend copies.
    fn tlvs_to_keep(&self, tlvs: Tlvs<'_>) -> Box<[u8]> {
        let mut kept = Vec::new();
        for (kind, value) in tlvs.iter() {
            let mut specs = self.route.pools().filter_map(|pool| pool.spec.proxy_protocol.as_ref());
            if specs.any(|spec| spec.copies(kind)) {
                Tlvs::append(&mut kept, kind, value);
            }
        }
        kept.into()
    }

    fn note_header(&mut self, announced: HeaderClient, tlvs: Box<[u8]>) {
        let socket = self.client;
        let mut header = ReceivedHeader { peer: None, destination: None, probe: false, tlvs };
        match announced {
            HeaderClient::Local => header.probe = true,
            HeaderClient::Unknown if header.tlvs.is_empty() => return,
            HeaderClient::Unknown => {}
            HeaderClient::Client(client, destination) => {
                header.peer = Some(socket.socket());
                header.destination = Some(destination);
                self.client = ClientAddr::announced(client);
                self.relay.set_client(self.client);
            }
        }
        self.log_header(&header);
        let rare = self.rare.get_or_insert_with(Box::<RareFacts>::default);
        rare.header = Some(header);
    }

    /// Uses the newest table, because no backend has been picked.
    pub(super) fn use_newest_table(&mut self) {
        let table = self.ctx().table();
        if let Some(newer) = table.frontend(&self.route.state) {
            self.route = Arc::clone(newer);
            self.table = TableNumbers { generation: table.generation, serial: table.serial };
        }
    }

    fn received_header(&self) -> Option<&ReceivedHeader> {
        self.rare.as_ref()?.header.as_ref()
    }

    /// Address of the socket, if a header announced another client.
    pub(super) fn peer(&self) -> Option<PeerAddr> {
        self.received_header()?.peer
    }

    /// Whether the peer of a header opened the connection itself.
    pub(super) fn is_probe(&self) -> bool {
        self.received_header().is_some_and(|header| header.probe)
    }
}

// === impl Session: send ===

impl Session {
    /// Sends the pool's header on the connection that was just established. Nothing else is
    /// queued there, so the header fits. If bytes of the client wait, the kernel sends them in
    /// the same segment.
    pub(super) fn send_header(&self) -> io::Result<()> {
        let pool = self.pool();
        let Some(spec) = &pool.spec.proxy_protocol else { return Ok(()) };
        let received = self.received_header();
        let tlvs = received.map_or(Tlvs::NONE, |header| Tlvs::new(&header.tlvs));
        let known = tlvs.iter().any(|(kind, _)| kind == tlv::UNIQUE_ID);
        let number = (spec.needs_unique_id() && !known).then(|| self.number.to_string());
        let copied = tlvs.iter().filter(|(kind, _)| spec.copies(*kind));
        let own = number.iter().map(|number| (tlv::UNIQUE_ID, number.as_bytes()));
        let destination = match received.and_then(|header| header.destination) {
            Some(announced) => Some(announced),
            None => self.relay.client_local_address(),
        };
        let addresses = self.client.socket_addr().zip(destination);
        let buffers = &mut *self.ctx().headers.borrow_mut();
        let header = &mut buffers.sent;
        let tlvs = copied.chain(own);
        proxy_protocol::encode(spec.version, addresses, tlvs, spec.crc32c, header);
        let sent = self.relay.send_to_backend(header, self.relay.unread() > 0)?;
        match sent == header.len() {
            true => Ok(()),
            false => Err(io::Error::from_raw_os_error(libc::ENOBUFS)),
        }
    }
}

fn client_left() -> SessionEnd {
    let closed_first = Some(SessionSide::Client);
    SessionEnd { closed_first, ..ended(Phase::Preread, Cause::ClientLeft) }
}

fn failed(error: &io::Error) -> SessionEnd {
    let errno = error.raw_os_error().unwrap_or(0);
    let cause = Cause::of_failure(SessionSide::Client, errno);
    let closed_first = (cause == Cause::ClientReset).then_some(SessionSide::Client);
    SessionEnd { errno, closed_first, ..ended(Phase::Preread, cause) }
}

pub(super) fn interrupted(end: ConnectEnd) -> SessionEnd {
    match end {
        ConnectEnd::Aborted(cause) => ended(Phase::Preread, cause),
        ConnectEnd::ClientGone(errno) => client_reset(Phase::Preread, errno),
        ConnectEnd::Failed(error) => {
            let errno = error.raw_os_error().unwrap_or(0);
            SessionEnd { errno, ..ended(Phase::Preread, Cause::LocalResource) }
        }
        ConnectEnd::TimedOut => ended(Phase::Preread, Cause::FirstByteTimeout),
    }
}

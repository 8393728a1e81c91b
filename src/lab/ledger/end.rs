//! One end of a ledger's stream: sends the content of the seed, and checks each
//! received byte.
//!
//! Called by the ledger on a thread that can block. It checks one end only. The ledger
//! compares both ends.

use super::{CloseOrder, StreamFault, StreamFaultKind, StreamPlan};
use socket2::Socket;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::sync::LazyLock;
use std::time::Duration;
use xxhash_rust::xxh3::Xxh3;

/// Length of the block that all content is taken from. It is prime: no buffer size
/// divides it, so a repeated or skipped buffer is detected.
const BLOCK_LEN: usize = 1_048_573;

static BLOCK: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let mut random = fastrand::Rng::with_seed(0x7469_6465);
    (0..BLOCK_LEN).map(|_| random.u8(..)).collect()
});

/// Record of one end of a stream.
#[derive(Debug, Clone)]
pub(super) struct StreamEnd {
    pub(super) sent: u64,
    pub(super) sent_hash: u64,
    pub(super) received: u64,
    pub(super) received_hash: u64,
    pub(super) fault: Option<StreamFault>,
}

/// Content of one direction: the block, repeated from a seeded start.
#[derive(Clone, Copy)]
struct Pattern(u64);

impl Pattern {
    fn up(seed: u64) -> Pattern {
        Pattern(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) % BLOCK_LEN as u64)
    }

    fn down(seed: u64) -> Pattern {
        Pattern(seed.wrapping_mul(0xC2B2_AE3D_27D4_EB4F) % BLOCK_LEN as u64)
    }

    /// Returns the bytes from `position`: at most `most`, and not beyond the end of the
    /// block.
    fn at(self, position: u64, most: usize) -> &'static [u8] {
        let start = ((self.0 + position) % BLOCK_LEN as u64) as usize;
        &BLOCK[start..BLOCK_LEN.min(start + most)]
    }
}

/// When an end stops reading.
#[derive(Clone, Copy, PartialEq)]
enum Until {
    /// At FIN, which must follow exactly the planned number of bytes.
    Fin,
    /// After the planned number of bytes; no FIN is expected.
    Count,
    /// At FIN or RST. Only the bytes that arrived are checked.
    Anything,
}

pub(super) fn client_side(socket: &Socket, plan: &StreamPlan) -> StreamEnd {
    let mut half = Half::new(socket, plan.seed, Pattern::up(plan.seed), Pattern::down(plan.seed));
    let result =
        (&*socket).write_all(&plan.seed.to_le_bytes()).map_err(|e| StreamFault::of("seed", &e));
    let result = result.and_then(|()| match plan.order {
        CloseOrder::ClientFinFirst => {
            half.send(plan.up, true).and_then(|()| half.receive(plan.down, Until::Fin))
        }
        CloseOrder::BackendFinFirst => {
            half.receive(plan.down, Until::Fin).and_then(|()| half.send(plan.up, true))
        }
        CloseOrder::Together => half.both(plan.up, true, plan.down, Until::Fin),
        CloseOrder::ClientCloses => half.both(plan.up, false, plan.down, Until::Count),
        CloseOrder::BackendCloses => half.both(plan.up, false, plan.down, Until::Fin),
        CloseOrder::ClientAborts => half.abort(plan.up / 2),
        CloseOrder::BackendAborts => half.tolerate_reset(plan.up, plan.down),
    });
    half.record(result.err())
}

pub(super) fn backend_side(socket: &Socket, plan: &StreamPlan) -> StreamEnd {
    let seed = !plan.seed;
    let mut half = Half::new(socket, seed, Pattern::down(plan.seed), Pattern::up(plan.seed));
    let result = match plan.order {
        CloseOrder::ClientFinFirst => {
            half.receive(plan.up, Until::Fin).and_then(|()| half.send(plan.down, true))
        }
        CloseOrder::BackendFinFirst => {
            half.send(plan.down, true).and_then(|()| half.receive(plan.up, Until::Fin))
        }
        CloseOrder::Together => half.both(plan.down, true, plan.up, Until::Fin),
        CloseOrder::ClientCloses => half.both(plan.down, false, plan.up, Until::Fin),
        CloseOrder::BackendCloses => half.both(plan.down, false, plan.up, Until::Count),
        CloseOrder::ClientAborts => half.tolerate_reset(plan.down, plan.up),
        CloseOrder::BackendAborts => half.abort(plan.down / 2),
    };
    half.record(result.err())
}

struct Half<'a> {
    socket: &'a Socket,
    random: fastrand::Rng,
    outgoing: Pattern,
    incoming: Pattern,
    sent: u64,
    received: u64,
    sent_hash: Xxh3,
    received_hash: Xxh3,
}

impl<'a> Half<'a> {
    fn new(socket: &'a Socket, seed: u64, outgoing: Pattern, incoming: Pattern) -> Half<'a> {
        Half {
            socket,
            random: fastrand::Rng::with_seed(seed),
            outgoing,
            incoming,
            sent: 0,
            received: 0,
            sent_hash: Xxh3::new(),
            received_hash: Xxh3::new(),
        }
    }

    fn record(self, fault: Option<StreamFault>) -> StreamEnd {
        StreamEnd {
            sent: self.sent,
            sent_hash: self.sent_hash.digest(),
            received: self.received,
            received_hash: self.received_hash.digest(),
            fault,
        }
    }

    /// Sends `len` bytes in writes of 1 B to 1 MB, and then FIN if `fin`.
    fn send(&mut self, len: u64, fin: bool) -> Result<(), StreamFault> {
        while self.sent < len {
            let most = self.random.f64() * (1e6f64).ln();
            let most = (most.exp() as usize).min((len - self.sent) as usize);
            let bytes = self.outgoing.at(self.sent, most);
            let n = match (&*self.socket).write(bytes) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                result => result.map_err(|e| {
                    StreamFault::of(format_args!("write failed at byte {}", self.sent), &e)
                })?,
            };
            self.sent_hash.update(&bytes[..n]);
            self.sent += n as u64;
        }
        if fin {
            self.socket.shutdown(Shutdown::Write).map_err(|e| StreamFault::of("FIN", &e))?;
        }
        Ok(())
    }

    /// Receives and checks each byte.
    fn receive(&mut self, len: u64, until: Until) -> Result<(), StreamFault> {
        let mut buffer = vec![0; 64 * 1024];
        loop {
            if until == Until::Count && self.received >= len {
                return Ok(());
            }
            let n = match (&*self.socket).read(&mut buffer) {
                Ok(0) if until == Until::Anything || self.received == len => return Ok(()),
                Ok(0) => {
                    let text = format!("FIN after {} of {len} bytes", self.received);
                    return Err(StreamFault::new(StreamFaultKind::Reset, text));
                }
                Ok(n) => n,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    let text = format!("no data after {} of {len} bytes", self.received);
                    return Err(StreamFault::new(StreamFaultKind::Silent, text));
                }
                Err(_) if until == Until::Anything => return Ok(()),
                Err(error) => {
                    let doing = format!("read failed at byte {} of {len}", self.received);
                    return Err(StreamFault::of(doing, &error));
                }
            };
            self.check(&buffer[..n])?;
            if self.received > len {
                let text = format!("{} bytes received, {len} sent", self.received);
                return Err(StreamFault::new(StreamFaultKind::Wrong, text));
            }
        }
    }

    fn check(&mut self, mut got: &[u8]) -> Result<(), StreamFault> {
        self.received_hash.update(got);
        while !got.is_empty() {
            let wanted = self.incoming.at(self.received, got.len());
            if got[..wanted.len()] != *wanted {
                let at = wanted.iter().zip(got).take_while(|(a, b)| a == b).count() as u64;
                return Err(StreamFault::new(
                    StreamFaultKind::Wrong,
                    format!("wrong byte at {}", self.received + at),
                ));
            }
            self.received += wanted.len() as u64;
            got = &got[wanted.len()..];
        }
        Ok(())
    }

    /// Sends and receives at the same time.
    fn both(&mut self, out: u64, fin: bool, into: u64, until: Until) -> Result<(), StreamFault> {
        let mut writer = Half::new(self.socket, self.random.u64(..), self.outgoing, self.incoming);
        let (written, read) = std::thread::scope(|scope| {
            let thread = scope.spawn(|| writer.send(out, fin));
            let read = self.receive(into, until);
            (thread.join().expect("the writer does not panic"), read)
        });
        self.sent = writer.sent;
        self.sent_hash = writer.sent_hash;
        read.and(written)
    }

    /// Sends `len` bytes and resets.
    fn abort(&mut self, len: u64) -> Result<(), StreamFault> {
        let sent = self.send(len, false);
        self.socket.set_linger(Some(Duration::ZERO)).map_err(|e| StreamFault::of("linger", &e))?;
        sent
    }

    /// Sends and receives while the peer resets. Errors are expected. Wrong bytes and
    /// silence are faults.
    fn tolerate_reset(&mut self, out: u64, into: u64) -> Result<(), StreamFault> {
        let mut writer = Half::new(self.socket, self.random.u64(..), self.outgoing, self.incoming);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let _ = writer.send(out, false);
            });
            self.receive(into, Until::Anything)
        })
    }
}

//! Fuzz target: arbitrary bytes as messages of the other process of an upgrade.
//!
//! Called through `crate::fuzz`. The bytes arrive on a socket, in the functions that
//! receive the messages of an old or a new process.
//!
//! - Nothing panics.
//! - No function waits after the other end is closed.
//! - Accepted state can be used and handed over again.

use super::incoming;
use super::message::{Commit, FinalCounts, Hello, Ready, Serving};
use crate::upgrade::message;
use std::io::Write;
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tidegate_config as config;
use tidegate_core::control::{ControlEvent, Controller};
use tidegate_core::metrics::counters::WorkerCounters;
use tidegate_core::metrics::histograms::{MergedHistograms, Series};
use tidegate_core::model;
use tidegate_core::outcome::{Cause, Phase};
use tidegate_net::clock;
use tidegate_net::fd_channel::HandoverChannel;

/// Bytes that fit in a socket buffer old_process the other side reads.
const INPUT_MAX: usize = 32 * 1024;

const CONFIG: &str = "[frontend.web]\nbind = '127.0.0.1:80'\npool = 'web'\n\
    [pool.web]\nprobe = { kind = 'tcp' }\nejection = {}\n\
    backend = [{ address = '127.0.0.1:81' }, { name = 'b', address = '127.0.0.1:82' }]\n";

/// Checks one input. The first byte selects the tested side and the encoding of the other
/// bytes: raw, or frames (kind, number of descriptors, 2 bytes of length, body).
pub fn check(data: &[u8]) {
    accepted_messages(data);
}

/// Returns how many of the three messages that a side waits for were accepted.
fn accepted_messages(data: &[u8]) -> u32 {
    let [mode, sent @ ..] = data else { return 0 };
    let Ok((own, other)) = HandoverChannel::pair() else { return 0 };
    let other = UnixStream::from(other);
    send_all(&other, &sent[..sent.len().min(INPUT_MAX)], mode & 1 != 0);
    if mode & 2 == 0 { as_new_process(own) } else { as_old_process(&own) }
}

/// Sends all bytes and closes that side.
fn send_all(mut other: &UnixStream, sent: &[u8], framed: bool) {
    other.set_nonblocking(true).expect("the socket is open");
    if framed {
        let channel = HandoverChannel::from(other.try_clone().expect("a descriptor is left"));
        let mut rest = sent;
        while let [kind, fds, low, high, more @ ..] = rest {
            let len = usize::from(u16::from_le_bytes([*low, *high])).min(more.len());
            let fds: Vec<BorrowedFd<'_>> = (0..fds & 7).map(|_| other.as_fd()).collect();
            if channel.send(u16::from(*kind), &more[..len], &fds, soon()).is_err() {
                break;
            }
            rest = &more[len..];
        }
    } else {
        // Bytes that do not fit are not sent.
        let _ = other.write(sent);
    }
    let _ = other.shutdown(Shutdown::Write);
}

/// Receives *offer*, *commit* and *final counts*.
fn as_new_process(channel: HandoverChannel) -> u32 {
    let Ok(mut old_process) = incoming::send_hello(channel) else { return 0 };
    let config = Arc::new(config::parse(CONFIG, "a file").expect("the configuration is valid"));
    old_process.take_sockets();
    let generation = old_process.generation_of(8);
    let mut start = FuzzStart::new(config, generation, old_process.state());
    let Ok(commit) = old_process.ready(Vec::new(), false, generation, false) else { return 1 };
    start.take_over(&commit);
    let Ok(FinalCounts(last)) = old_process.wait_for_final_counts(soon()) else { return 2 };
    start.count(&last);
    3
}

/// Receives *hello*, *ready* and *serving*.
fn as_old_process(channel: &HandoverChannel) -> u32 {
    let accepted = [
        message::receive::<Hello>(channel, soon()).is_ok(),
        message::receive::<Ready>(channel, soon()).is_ok(),
        message::receive::<Serving>(channel, soon()).is_ok(),
    ];
    accepted.into_iter().map(u32::from).sum()
}

fn soon() -> Instant {
    clock::now() + Duration::from_secs(5)
}

/// The state that a new process takes over.
struct FuzzStart {
    controller: Controller,
    workers: Vec<Arc<WorkerCounters>>,
    latency: MergedHistograms,
}

impl FuzzStart {
    fn new(
        config: Arc<model::Config>,
        generation: u64,
        saved: &tidegate_core::control::handover::Saved,
    ) -> FuzzStart {
        let now = clock::now();
        let mut controller = Controller::new(2, 1);
        controller.add_carried_counts(generation.saturating_sub(1), saved.serial);
        controller.apply(ControlEvent::Configure(config), now);
        controller.adopt(saved, now);
        let worker = || Arc::new(WorkerCounters::new(Cause::COUNT, Phase::COUNT));
        FuzzStart {
            controller,
            workers: vec![worker(), worker()],
            latency: MergedHistograms::new(),
        }
    }

    fn take_over(&mut self, known: &Commit) {
        let now = clock::now();
        self.controller.adopt(&known.state, now);
        self.count(known);
        self.controller.serves_as(&known.state);
        for ahead in [0, 1, 3600, 86_400 * 365] {
            self.controller.apply(ControlEvent::Tick, now + Duration::from_secs(ahead));
        }
        self.controller.status(now);
        self.controller.save(now);
    }

    /// Adds the counts and checks that they can be increased, shown and handed over.
    fn count(&mut self, known: &Commit) {
        self.controller.adopt_counts(&known.state);
        known.counts.carry(&self.workers);
        for worker in &self.workers {
            worker.accepted.add(1);
        }
        for saved in &known.latency {
            let found = self.controller.find_saved(&saved.pool, &saved.backend, &saved.address);
            let Some(id) = found else { continue };
            self.latency.add_saved(id.0, &saved.series);
            for data in Series::ALL.into_iter().filter_map(|s| self.latency.get(id.0, s)) {
                let cumulative = data.cumulative();
                assert!(cumulative.is_sorted() && cumulative.iter().all(|n| *n <= data.count()));
                data.quantile(0.99);
                assert!(data.sum_seconds() >= 0.0);
            }
            self.latency.save(id.0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::accepted_messages;

    #[test]
    fn seeds_are_accepted_completely() {
        let new_process = include_bytes!("../../../tests/fuzz/seeds/handshake/successor");
        let old_process = include_bytes!("../../../tests/fuzz/seeds/handshake/predecessor");
        let raw = include_bytes!("../../../tests/fuzz/seeds/handshake/raw");
        assert_eq!(accepted_messages(new_process), 3);
        assert_eq!(accepted_messages(old_process), 3);
        assert_eq!(accepted_messages(raw), 1);
    }
}

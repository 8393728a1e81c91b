//! Any bytes as what the other process says during an upgrade.
//!
//! Called through `crate::fuzz`. A socket carries them to the very functions
//! that take a predecessor's offer, its last word and its farewell, or a
//! successor's greeting. Nothing may panic, nothing waits once the other end is
//! closed, and whatever was taken over can be served by and handed on again.

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

/// What one socket takes without anybody reading.
const SAID_MAX: usize = 32 * 1024;

const CONFIG: &str = "[frontend.web]\nbind = '127.0.0.1:80'\npool = 'web'\n\
    [pool.web]\nprobe = { kind = 'tcp' }\nejection = {}\n\
    backend = [{ address = '127.0.0.1:81' }, { name = 'b', address = '127.0.0.1:82' }]\n";

/// The first byte says which side is tested and how the rest is put: as it is,
/// or as frames (kind, descriptors, two bytes of length, body).
pub fn check(data: &[u8]) {
    messages_taken(data);
}

/// How many of the three messages that a side waits for were understood.
fn messages_taken(data: &[u8]) -> u32 {
    let [mode, said @ ..] = data else { return 0 };
    let Ok((own, other)) = HandoverChannel::pair() else { return 0 };
    let other = UnixStream::from(other);
    say(&other, &said[..said.len().min(SAID_MAX)], mode & 1 != 0);
    if mode & 2 == 0 { as_successor(own) } else { as_predecessor(&own) }
}

/// Says everything and ends that side.
fn say(mut other: &UnixStream, said: &[u8], framed: bool) {
    other.set_nonblocking(true).expect("a socket of ours");
    if framed {
        let channel = HandoverChannel::from(other.try_clone().expect("a descriptor is left"));
        let mut rest = said;
        while let [kind, fds, low, high, more @ ..] = rest {
            let len = usize::from(u16::from_le_bytes([*low, *high])).min(more.len());
            let fds: Vec<BorrowedFd<'_>> = (0..fds & 7).map(|_| other.as_fd()).collect();
            if channel.send(u16::from(*kind), &more[..len], &fds, soon()).is_err() {
                break;
            }
            rest = &more[len..];
        }
    } else {
        // What does not fit is not said.
        let _ = other.write(said);
    }
    let _ = other.shutdown(Shutdown::Write);
}

/// Takes an offer, the last word and the farewell, as far as they come.
fn as_successor(channel: HandoverChannel) -> u32 {
    let Ok(mut before) = incoming::send_hello(channel) else { return 0 };
    let config = Arc::new(config::parse(CONFIG, "a file").expect("it is right"));
    before.take_sockets();
    let generation = before.generation_of(8);
    let mut place = FuzzStart::new(config, generation, before.state());
    let Ok(commit) = before.ready(Vec::new(), false, generation, false) else { return 1 };
    place.take_over(&commit);
    let Ok(FinalCounts(last)) = before.wait_for_final_counts(soon()) else { return 2 };
    place.count(&last);
    3
}

/// Takes a greeting, and that the other is ready, and that it serves.
fn as_predecessor(channel: &HandoverChannel) -> u32 {
    let took = [
        message::receive::<Hello>(channel, soon()).is_ok(),
        message::receive::<Ready>(channel, soon()).is_ok(),
        message::receive::<Serving>(channel, soon()).is_ok(),
    ];
    took.into_iter().map(u32::from).sum()
}

fn soon() -> Instant {
    clock::now() + Duration::from_secs(5)
}

/// What a new process goes on with.
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

    /// The counts, and that they can go on, be shown and be handed on.
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
    use super::messages_taken;

    #[test]
    fn the_seeds_are_understood_to_the_end() {
        let successor = include_bytes!("../../../tests/fuzz/seeds/handshake/successor");
        let predecessor = include_bytes!("../../../tests/fuzz/seeds/handshake/predecessor");
        let raw = include_bytes!("../../../tests/fuzz/seeds/handshake/raw");
        assert_eq!(messages_taken(successor), 3);
        assert_eq!(messages_taken(predecessor), 3);
        assert_eq!(messages_taken(raw), 1);
    }
}

//! The bound addresses: the listening sockets of each worker and address.
//!
//! Owned by the control loop. A reload binds what is new before anything else
//! changes, all or nothing, and retires what is gone afterwards; an upgrade
//! hands everything on. Workers hold shares of the sockets; an address is closed
//! when the last share is dropped, here and in whatever process shares it.

use super::due;
use super::refused::BindError;
use super::supervised::Supervised;
use serde::{Deserialize, Serialize};
use socket2::Socket;
use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tidegate_core::model::{Bind, BindKey, Config, FrontendConfig};
use tidegate_dataplane::worker::{Worker, WorkerCommand};
use tidegate_net::clock;
use tidegate_net::holders::{self, ListeningSocket, overlap};
use tidegate_net::listen;

/// How often given-up addresses are looked at until they are closed: before
/// that, new clients get no answer instead of a refusal.
const RETIRE_STEP: Duration = Duration::from_millis(20);

/// Who else holds an address's sockets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum SocketOwner {
    /// Nobody, or a balancer that is on its way out: closing them closes the
    /// address.
    #[serde(rename = "nobody")]
    Process,
    /// A service manager, which goes on listening when we are gone.
    #[serde(rename = "manager")]
    ServiceManager,
}

/// The sockets of one address.
#[derive(Debug, Clone)]
pub(super) struct BindSockets {
    /// In the order workers take turns with them.
    pub(super) sockets: Vec<Arc<Socket>>,
    pub(super) holder: SocketOwner,
}

/// Every address this process listens on.
#[derive(Debug)]
pub(super) struct Binds {
    workers: usize,
    active: BTreeMap<BindKey, BindSockets>,
    /// Emptying their queues; closed once the workers have let go.
    retiring: Vec<(BindKey, BindSockets)>,
    /// Given to us and not yet asked for.
    inherited: BTreeMap<BindKey, BindSockets>,
}

/// Addresses bound and not yet in use.
#[derive(Debug)]
pub(super) struct NewBinds {
    groups: BTreeMap<BindKey, BindSockets>,
    /// Those of them that do not listen yet.
    silent: Vec<(BindKey, Arc<Socket>)>,
}

impl Binds {
    pub(super) fn new(workers: usize) -> Binds {
        Binds { workers, active: BTreeMap::new(), retiring: Vec::new(), inherited: BTreeMap::new() }
    }

    /// Takes sockets of another process, for [`Binds::reserve_new`] to find.
    pub(super) fn inherit(&mut self, groups: BTreeMap<BindKey, BindSockets>) {
        self.inherited = groups;
    }

    /// Binds the addresses of `config` that are not bound yet: all of them, or
    /// none.
    pub(super) fn bind_new(&mut self, config: &Config) -> Result<NewBinds, BindError> {
        let mut fresh = self.reserve_new(config)?;
        fresh.start()?;
        Ok(fresh)
    }

    /// The same without letting anybody in yet; see [`NewBinds::start`].
    pub(super) fn reserve_new(&mut self, config: &Config) -> Result<NewBinds, BindError> {
        let mut fresh = NewBinds { groups: BTreeMap::new(), silent: Vec::new() };
        let foreign = self.foreign(config);
        for frontend in &config.frontends {
            for bind in &frontend.binds {
                if self.active.contains_key(&bind.key) {
                    continue;
                }
                let address = bind.key.socket_addr();
                if let Some(other) = foreign.iter().find(|other| overlap(other.address, address)) {
                    return Err(BindError::taken(address, *other));
                }
                match self.reserve(bind, frontend, &mut fresh) {
                    Err(error) if bind.options.if_ipv6 && no_ipv6(&error) => {
                        tracing::info!(%address, %error, "no IPv6 on this host; listening on IPv4 only");
                    }
                    done => done.map_err(|error| BindError::new(address, error))?,
                }
            }
        }
        Ok(fresh)
    }

    fn reserve(
        &self,
        bind: &Bind,
        frontend: &FrontendConfig,
        fresh: &mut NewBinds,
    ) -> io::Result<()> {
        let (address, freebind) = (bind.key.socket_addr(), bind.options.freebind);
        let mut group = match self.inherited.get(&bind.key) {
            Some(group) => group.clone(),
            None => {
                // Sockets of this process that overlap would be in the way of this
                // check; `foreign` has looked for others.
                if !self.overlaps(address) {
                    listen::taken(address, freebind)?;
                }
                BindSockets { sockets: Vec::new(), holder: SocketOwner::Process }
            }
        };
        if group.can_add_sockets()? {
            let missing = self.workers.saturating_sub(group.sockets.len());
            for socket in listen::reserve(address, missing, freebind)? {
                let socket = Arc::new(socket);
                fresh.silent.push((bind.key.clone(), Arc::clone(&socket)));
                group.sockets.push(socket);
            }
        }
        for socket in &group.sockets {
            listen::prepare(socket)?;
            listen::tune(socket, frontend.keepalive, frontend.user_timeout)?;
        }
        fresh.groups.insert(bind.key.clone(), group);
        Ok(())
    }

    /// Whether this process holds a socket that a check by bind(2) would find.
    fn overlaps(&self, address: SocketAddr) -> bool {
        let mut held = self.active.keys().chain(self.inherited.keys());
        held.any(|held| overlap(held.socket_addr(), address))
    }

    /// Listening sockets of this host that are none of this process's; looked for
    /// only where bind(2) cannot tell them apart: a new address overlaps one that
    /// is held, and SO_REUSEPORT would let both share the traffic. A socket that
    /// several processes hold is one socket.
    fn foreign(&self, config: &Config) -> Vec<ListeningSocket> {
        let binds = config.frontends.iter().flat_map(|frontend| &frontend.binds);
        let unsure: Vec<SocketAddr> = binds
            .filter(|bind| !self.active.contains_key(&bind.key))
            .map(|bind| bind.key.socket_addr())
            .filter(|address| self.overlaps(*address))
            .collect();
        if unsure.is_empty() {
            return Vec::new();
        }
        let groups = self.active.values().chain(self.inherited.values());
        let groups = groups.chain(self.retiring.iter().map(|(_, group)| group));
        let ours: HashSet<u64> = groups
            .flat_map(|group| &group.sockets)
            .filter_map(|socket| holders::number_of(&**socket).ok())
            .collect();
        let mut all = holders::listening().unwrap_or_default();
        all.retain(|other| {
            !ours.contains(&other.socket)
                && unsure.iter().any(|address| overlap(*address, other.address))
        });
        all
    }

    /// Lets go of what was inherited and is not in `fresh`; says which.
    pub(super) fn release(&mut self, fresh: &NewBinds) -> Vec<BindKey> {
        let inherited = std::mem::take(&mut self.inherited);
        inherited.into_keys().filter(|key| !fresh.groups.contains_key(key)).collect()
    }

    /// Whether an address that `config` wants is still being closed.
    pub(super) fn cancel_retirement(&mut self, config: &Config) -> bool {
        self.forget_retired();
        let retiring: HashSet<&BindKey> = self.retiring.iter().map(|(key, _)| key).collect();
        let mut wanted = config.frontends.iter().flat_map(|frontend| &frontend.binds);
        !retiring.is_empty() && wanted.any(|bind| retiring.contains(&bind.key))
    }

    /// Puts `fresh` in use, brings socket options up to date and retires what
    /// `config` no longer names.
    pub(super) fn adopt(
        &mut self,
        fresh: NewBinds,
        config: &Config,
        workers: &[Worker],
        supervised: &Supervised,
    ) {
        for (key, group) in fresh.groups {
            supervised.hold(&key, &group);
            group.listen(&key, workers);
            self.active.insert(key, group);
        }
        let mut gone: BTreeSet<BindKey> = self.active.keys().cloned().collect();
        for frontend in &config.frontends {
            for Bind { key, .. } in &frontend.binds {
                gone.remove(key);
                for socket in self.active.get(key).into_iter().flat_map(|g| &g.sockets) {
                    if let Err(error) =
                        listen::tune(socket, frontend.keepalive, frontend.user_timeout)
                    {
                        tracing::warn!(address = %key, %error, "cannot change socket options; the old values stay in effect");
                    }
                }
            }
        }
        for key in gone {
            self.retire(key, workers, supervised);
        }
    }

    /// Retires everything.
    pub(super) fn retire_all(&mut self, workers: &[Worker], supervised: &Supervised) {
        let all: Vec<BindKey> = self.active.keys().cloned().collect();
        for key in all {
            self.retire(key, workers, supervised);
        }
    }

    fn retire(&mut self, key: BindKey, workers: &[Worker], supervised: &Supervised) {
        let Some(group) = self.active.remove(&key) else { return };
        // First: from then on a crash closes the address.
        supervised.release(&key, &group);
        if group.holder == SocketOwner::ServiceManager {
            // What is queued there is for whom the manager starts next, and a
            // filter would keep clients from that one, too.
            self.close_group(key, group, workers);
            return;
        }
        for socket in &group.sockets {
            if let Err(error) = listen::retire(socket) {
                // Then clients may still be queued when it closes, and be reset.
                tracing::warn!(address = %key, %error, "cannot stop new connections on a retired address; queued clients can be reset");
            }
        }
        for worker in workers {
            worker.mailbox.send(WorkerCommand::Retire(key.clone()));
        }
        self.retiring.push((key, group));
    }

    /// Another process accepts from our sockets now: stops accepting at once and leaves
    /// the queues to it, but for what it has `not_taken`. The sockets stay open.
    pub(super) fn step_down(&mut self, not_taken: &[BindKey], workers: &[Worker]) {
        for key in self.active.keys().filter(|key| !not_taken.contains(key)) {
            for worker in workers {
                worker.mailbox.send(WorkerCommand::Release(key.clone()));
            }
        }
    }

    /// That process has ended: accepts again.
    pub(super) fn go_on(&mut self, not_taken: &[BindKey], workers: &[Worker]) {
        for (key, group) in &self.active {
            if !not_taken.contains(key) {
                group.listen(key, workers);
            }
        }
    }

    /// That process has lived long enough: lets go of what it accepts from, and retires
    /// what it has `not_taken`.
    pub(super) fn hand_over(
        &mut self,
        not_taken: &[BindKey],
        workers: &[Worker],
        supervised: &Supervised,
    ) {
        for key in not_taken {
            self.retire(key.clone(), workers, supervised);
        }
        self.retiring.extend(std::mem::take(&mut self.active));
    }

    fn close_group(&mut self, key: BindKey, group: BindSockets, workers: &[Worker]) {
        for worker in workers {
            worker.mailbox.send(WorkerCommand::Release(key.clone()));
        }
        self.retiring.push((key, group));
    }

    /// Closes what the workers have let go of; true once nothing is retiring.
    pub(super) fn forget_retired(&mut self) -> bool {
        let in_use =
            |group: &BindSockets| group.sockets.iter().any(|socket| Arc::strong_count(socket) > 1);
        self.retiring.retain(|(_, group)| in_use(group));
        self.retiring.is_empty()
    }

    /// Resolves when given-up addresses need a look; never while there are none.
    pub(super) async fn wake(&mut self) {
        let due = (!self.retiring.is_empty()).then(|| clock::now() + RETIRE_STEP);
        due::reached(due).await;
    }

    /// Everything in use, to be handed to another process.
    pub(super) fn active(&self) -> impl Iterator<Item = (&BindKey, &BindSockets)> {
        self.active.iter()
    }

    /// Listening sockets open now.
    pub(super) fn sockets(&self) -> usize {
        let retiring = self.retiring.iter().map(|(_, group)| group);
        self.active.values().chain(retiring).map(|group| group.sockets.len()).sum()
    }
}

/// Whether the kernel has no IPv6 at all, or no address of it.
fn no_ipv6(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EAFNOSUPPORT | libc::EADDRNOTAVAIL))
}

// === impl BindSockets ===

impl BindSockets {
    /// Whether more sockets can listen on the same address beside these.
    fn can_add_sockets(&self) -> io::Result<bool> {
        self.sockets.iter().try_fold(true, |all, socket| Ok(all && socket.reuse_port()?))
    }

    /// Has every worker accept from those that are its own.
    fn listen(&self, key: &BindKey, workers: &[Worker]) {
        for (index, worker) in workers.iter().enumerate() {
            for socket in self.of_worker(index, workers.len()) {
                worker.mailbox.send(WorkerCommand::Listen(key.clone(), Arc::clone(socket)));
            }
        }
    }

    /// The sockets that worker number `index` of `count` accepts from: with
    /// enough of them each belongs to one worker, else workers share.
    fn of_worker(&self, index: usize, count: usize) -> impl Iterator<Item = &Arc<Socket>> {
        let have = self.sockets.len();
        let of_this = move |number: usize| match have < count {
            true => number == index % have.max(1),
            false => number % count == index,
        };
        self.sockets.iter().enumerate().filter(move |(n, _)| of_this(*n)).map(|(_, socket)| socket)
    }
}

// === impl NewBinds ===

impl NewBinds {
    /// Lets clients in: they queue until a worker accepts.
    pub(super) fn start(&mut self) -> Result<(), BindError> {
        for (key, socket) in self.silent.drain(..) {
            listen::start(&socket).map_err(|error| BindError::new(key.socket_addr(), error))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn group(sockets: usize) -> BindSockets {
        let address = "127.0.0.1:0".parse().unwrap();
        let socket = || listen::reserve(address, 1, false).unwrap().pop().unwrap();
        let sockets = (0..sockets).map(|_| Arc::new(socket())).collect();
        BindSockets { sockets, holder: SocketOwner::Process }
    }

    /// How many workers accept from each socket, and the fewest sockets a
    /// worker has.
    fn spread(sockets: usize, workers: usize) -> (Vec<usize>, usize) {
        let group = group(sockets);
        let mut takers = vec![0; sockets];
        let mut fewest = usize::MAX;
        for worker in 0..workers {
            let mine: Vec<_> = group.of_worker(worker, workers).collect();
            fewest = fewest.min(mine.len());
            for socket in mine {
                let at = group.sockets.iter().position(|one| Arc::ptr_eq(one, socket)).unwrap();
                takers[at] += 1;
            }
        }
        (takers, fewest)
    }

    #[test]
    fn every_socket_has_a_worker_and_every_worker_a_socket() {
        assert_eq!(spread(2, 2), (vec![1, 1], 1));
        assert_eq!(spread(5, 2), (vec![1; 5], 2), "more sockets than workers");
        assert_eq!(spread(1, 3), (vec![3], 1), "one socket that cannot be had twice");
        assert_eq!(spread(2, 3), (vec![2, 1], 1));
    }
}

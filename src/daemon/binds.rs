//! The bound addresses of this process and their listening sockets.
//!
//! Owned by the control loop. It never accepts a connection: workers do.
//!
//! - A reload first binds all new addresses, or none. After the commit it retires the
//!   removed addresses.
//! - An upgrade hands over all sockets.
//! - Workers share the sockets. An address is closed when the last reference is dropped,
//!   in this process and in every process that shares the socket.

use super::due;
use super::refused::BindError;
use super::supervised::Supervised;
use super::unix_sockets::{self, ListenFile, NewListenFile};
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
use tidegate_net::listen::{self, ListenPlace};
use tidegate_net::stream;

/// Time between two checks whether retired addresses can be closed. Until an address is
/// closed, new clients get no answer instead of a refused connection.
const RETIRE_STEP: Duration = Duration::from_millis(20);

/// Which process keeps the sockets of an address open after this process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum SocketOwner {
    /// No other process, or an old process that exits. Closing the sockets closes the
    /// address.
    #[serde(rename = "nobody")]
    Process,
    /// A service manager, which keeps listening after this process exits.
    #[serde(rename = "manager")]
    ServiceManager,
}

/// The sockets of one address.
#[derive(Debug, Clone)]
pub(super) struct BindSockets {
    /// Assigned to workers by their index, see [`BindSockets::of_worker`].
    pub(super) sockets: Vec<Arc<Socket>>,
    pub(super) holder: SocketOwner,
}

/// Every address this process listens on.
#[derive(Debug)]
pub(super) struct Binds {
    workers: usize,
    active: BTreeMap<BindKey, BindSockets>,
    /// Workers still accept from their listen queues. Closed when the workers have
    /// dropped the sockets.
    retiring: Vec<(BindKey, BindSockets)>,
    /// Sockets from another process that no frontend uses yet.
    inherited: BTreeMap<BindKey, BindSockets>,
    /// Files of Unix sockets, which this process removes when it retires them.
    files: BTreeMap<BindKey, ListenFile>,
}

/// Addresses that are bound and not yet in use.
#[derive(Debug, Default)]
pub(super) struct NewBinds {
    groups: BTreeMap<BindKey, BindSockets>,
    /// Sockets that do not listen yet.
    not_listening: Vec<(Bind, Arc<Socket>)>,
    /// Files of new Unix sockets. Removed if the sockets are not used.
    files: Vec<NewListenFile>,
}

impl Binds {
    pub(super) fn new(workers: usize) -> Binds {
        Binds {
            workers,
            active: BTreeMap::new(),
            retiring: Vec::new(),
            inherited: BTreeMap::new(),
            files: BTreeMap::new(),
        }
    }

    /// Takes the sockets of another process. [`Binds::reserve_new`] uses them.
    pub(super) fn inherit(&mut self, groups: BTreeMap<BindKey, BindSockets>) {
        self.inherited = groups;
    }

    /// Binds the addresses of `config` that are not bound yet, all or none, and listens
    /// on them.
    pub(super) fn bind_new(&mut self, config: &Config) -> Result<NewBinds, BindError> {
        let mut fresh = self.reserve_new(config)?;
        fresh.start()?;
        Ok(fresh)
    }

    /// Binds like [`Binds::bind_new`] but does not listen yet; see [`NewBinds::start`].
    pub(super) fn reserve_new(&mut self, config: &Config) -> Result<NewBinds, BindError> {
        let mut fresh = NewBinds::default();
        let foreign = self.foreign(config);
        for frontend in &config.frontends {
            for bind in &frontend.binds {
                if let Some(group) = self.active.get(&bind.key) {
                    let tried = group
                        .sockets
                        .first()
                        .map(|socket| listen::try_mark(socket, bind.options.mark));
                    tried.unwrap_or(Ok(())).map_err(|error| BindError::new(&bind.key, error))?;
                    continue;
                }
                let address = bind.key.socket_addr();
                let in_the_way = |other: &&ListeningSocket| {
                    address.is_some_and(|address| overlap(other.address, address))
                };
                if let Some(other) = foreign.iter().find(in_the_way) {
                    return Err(BindError::taken(&bind.key, *other));
                }
                match self.reserve(bind, frontend, &mut fresh) {
                    Err(error) if bind.options.if_ipv6 && no_ipv6(&error) => {
                        tracing::info!(address = %bind.key, %error, "no IPv6 on this host; listening on IPv4 only");
                    }
                    done => done.map_err(|error| BindError::new(&bind.key, error))?,
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
        let Some(place) = place_of(bind) else { return self.reserve_unix(bind, fresh) };
        let mut group = match self.inherited.get(&bind.key) {
            Some(group) => group.clone(),
            None => {
                // An overlapping socket of this process would fail this check. `foreign`
                // has checked for sockets of other processes.
                if !self.overlaps(&bind.key) {
                    listen::check_unused(place)?;
                }
                BindSockets { sockets: Vec::new(), holder: SocketOwner::Process }
            }
        };
        if group.can_add_sockets()? {
            let missing = self.workers.saturating_sub(group.sockets.len());
            for socket in listen::reserve(place, missing)? {
                let socket = Arc::new(socket);
                fresh.not_listening.push((bind.clone(), Arc::clone(&socket)));
                group.sockets.push(socket);
            }
        }
        for socket in &group.sockets {
            listen::prepare(socket)?;
            tune(socket, bind, frontend)?;
        }
        fresh.groups.insert(bind.key.clone(), group);
        Ok(())
    }

    /// Binds a Unix socket. All workers share it, because the kernel does not distribute the
    /// clients of a path among several sockets.
    fn reserve_unix(&self, bind: &Bind, fresh: &mut NewBinds) -> io::Result<()> {
        let group = match (self.inherited.get(&bind.key), bind.key.unix_path()) {
            (Some(group), _) => group.clone(),
            (None, None) => return Ok(()),
            (None, Some(path)) => {
                let (socket, file) = unix_sockets::bind(path, bind.options.mode)?;
                let socket = Arc::new(socket);
                fresh.files.push(file);
                fresh.not_listening.push((bind.clone(), Arc::clone(&socket)));
                BindSockets { sockets: vec![socket], holder: SocketOwner::Process }
            }
        };
        group.sockets.iter().try_for_each(|socket| listen::prepare(socket))?;
        fresh.groups.insert(bind.key.clone(), group);
        Ok(())
    }

    /// Returns whether this process holds a socket that overlaps `key`.
    fn overlaps(&self, key: &BindKey) -> bool {
        let mut held = self.active.keys().chain(self.inherited.keys());
        held.any(|held| {
            let apart = held.interface.is_some()
                && key.interface.is_some()
                && held.interface != key.interface;
            let addresses = held.socket_addr().zip(key.socket_addr());
            !apart && addresses.is_some_and(|(held, new)| overlap(held, new))
        })
    }

    /// Returns listening sockets of other processes that overlap new addresses of
    /// `config`. Checked only for addresses that also overlap a socket of this process:
    /// bind(2) does not fail for those because of SO_REUSEPORT, and both processes would
    /// share the traffic. Sockets that this process shares with others are not returned.
    fn foreign(&self, config: &Config) -> Vec<ListeningSocket> {
        let binds = config.frontends.iter().flat_map(|frontend| &frontend.binds);
        let unsure: Vec<SocketAddr> = binds
            .filter(|bind| !self.active.contains_key(&bind.key))
            .filter(|bind| self.overlaps(&bind.key))
            .filter_map(|bind| bind.key.socket_addr())
            .collect();
        if unsure.is_empty() {
            return Vec::new();
        }
        let groups = self.active.values().chain(self.inherited.values());
        let groups = groups.chain(self.retiring.iter().map(|(_, group)| group));
        let own: HashSet<u64> = groups
            .flat_map(|group| &group.sockets)
            .filter_map(|socket| holders::number_of(&**socket).ok())
            .collect();
        let mut all = holders::listening().unwrap_or_default();
        all.retain(|other| {
            !own.contains(&other.socket)
                && unsure.iter().any(|address| overlap(*address, other.address))
        });
        all
    }

    /// Drops the inherited sockets that are not in `fresh`. Returns their addresses.
    pub(super) fn release(&mut self, fresh: &NewBinds) -> Vec<BindKey> {
        let inherited = std::mem::take(&mut self.inherited);
        inherited.into_keys().filter(|key| !fresh.groups.contains_key(key)).collect()
    }

    /// Returns whether an address of `config` is still retiring.
    pub(super) fn is_retiring(&mut self, config: &Config) -> bool {
        self.close_retired();
        let retiring: HashSet<&BindKey> = self.retiring.iter().map(|(key, _)| key).collect();
        let mut wanted = config.frontends.iter().flat_map(|frontend| &frontend.binds);
        !retiring.is_empty() && wanted.any(|bind| retiring.contains(&bind.key))
    }

    /// Uses the addresses of `fresh`, updates socket options and retires the addresses
    /// that are not in `config`.
    pub(super) fn adopt(
        &mut self,
        fresh: NewBinds,
        config: &Config,
        workers: &[Worker],
        supervised: &Supervised,
    ) {
        fresh.files.into_iter().for_each(NewListenFile::keep);
        for (key, group) in fresh.groups {
            let file = key.socket_file().and_then(ListenFile::at);
            self.files.extend(file.map(|file| (key.clone(), file)));
            supervised.hold(&key, &group);
            group.listen(&key, workers);
            self.active.insert(key, group);
        }
        let mut removed: BTreeSet<BindKey> = self.active.keys().cloned().collect();
        for frontend in &config.frontends {
            for bind in &frontend.binds {
                removed.remove(&bind.key);
                if let Some(group) = self.active.get(&bind.key)
                    && let Err(error) = group.set_options(bind, frontend)
                {
                    tracing::warn!(address = %bind.key, %error, "cannot change socket options; the old values stay in effect");
                }
            }
        }
        for key in removed {
            self.retire(key, workers, supervised);
        }
    }

    /// Retires all addresses.
    pub(super) fn retire_all(&mut self, workers: &[Worker], supervised: &Supervised) {
        let all: Vec<BindKey> = self.active.keys().cloned().collect();
        for key in all {
            self.retire(key, workers, supervised);
        }
    }

    fn retire(&mut self, key: BindKey, workers: &[Worker], supervised: &Supervised) {
        let Some(group) = self.active.remove(&key) else { return };
        // First, so that a crash from now on closes the address.
        supervised.release(&key, &group);
        if group.holder == SocketOwner::ServiceManager {
            // The next process that the manager starts accepts the queued clients. A
            // filter on the socket would reject clients of that process, too.
            self.close_group(key, group, workers);
            return;
        }
        // New clients find no file. Those in the listen queue are accepted.
        if let Some(file) = self.files.remove(&key) {
            file.remove();
        }
        for socket in &group.sockets {
            if let Err(error) = listen::retire(socket) {
                tracing::warn!(address = %key, %error, "cannot stop new connections on a retired address; queued clients can be reset");
            }
        }
        for worker in workers {
            worker.mailbox.send(WorkerCommand::Retire(key.clone()));
        }
        self.retiring.push((key, group));
    }

    /// Stops accepting, because the new process accepts from the same sockets. Addresses
    /// that it has `not_taken` are not affected. The sockets stay open.
    pub(super) fn step_down(&mut self, not_taken: &[BindKey], workers: &[Worker]) {
        for key in self.active.keys().filter(|key| !not_taken.contains(key)) {
            for worker in workers {
                worker.mailbox.send(WorkerCommand::Release(key.clone()));
            }
        }
    }

    /// Accepts again, because the new process has exited.
    pub(super) fn resume(&mut self, not_taken: &[BindKey], workers: &[Worker]) {
        for (key, group) in &self.active {
            if !not_taken.contains(key) {
                group.listen(key, workers);
            }
        }
    }

    /// Completes the handover: closes the sockets that the new process accepts from, and
    /// retires those that it has `not_taken`.
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

    /// Closes retiring addresses whose sockets no worker uses. Returns whether no address
    /// is retiring any more.
    pub(super) fn close_retired(&mut self) -> bool {
        let in_use =
            |group: &BindSockets| group.sockets.iter().any(|socket| Arc::strong_count(socket) > 1);
        self.retiring.retain(|(_, group)| in_use(group));
        self.retiring.is_empty()
    }

    /// Resolves when [`Binds::close_retired`] is due. Never resolves while no address is
    /// retiring.
    pub(super) async fn wake(&mut self) {
        let due = (!self.retiring.is_empty()).then(|| clock::now() + RETIRE_STEP);
        due::reached(due).await;
    }

    /// Returns all addresses in use, for the handover to another process.
    pub(super) fn active(&self) -> impl Iterator<Item = (&BindKey, &BindSockets)> {
        self.active.iter()
    }

    /// Returns the number of open listening sockets.
    pub(super) fn sockets(&self) -> usize {
        let retiring = self.retiring.iter().map(|(_, group)| group);
        self.active.values().chain(retiring).map(|group| group.sockets.len()).sum()
    }
}

/// Returns where the sockets of a bind listen; `None`: a Unix socket.
pub(super) fn place_of(bind: &Bind) -> Option<ListenPlace<'_>> {
    Some(ListenPlace {
        address: bind.key.socket_addr()?,
        freebind: bind.options.freebind,
        interface: bind.key.interface.as_deref(),
    })
}

/// Sets the options that connections inherit.
fn tune(socket: &Socket, bind: &Bind, frontend: &FrontendConfig) -> io::Result<()> {
    listen::tune(socket, frontend.keepalive, frontend.user_timeout)?;
    stream::set_max_rate(socket, frontend.download_rate)?;
    listen::set_marks(socket, bind.options.mark, bind.options.dscp)
}

/// Returns whether the error means that this host has no IPv6, or not this address.
fn no_ipv6(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EAFNOSUPPORT | libc::EADDRNOTAVAIL))
}

// === impl BindSockets ===

impl BindSockets {
    /// Returns whether more sockets can listen on the same address.
    fn can_add_sockets(&self) -> io::Result<bool> {
        self.sockets.iter().try_fold(true, |all, socket| Ok(all && socket.reuse_port()?))
    }

    /// Sets the options of a bind that can change while clients connect.
    fn set_options(&self, bind: &Bind, frontend: &FrontendConfig) -> io::Result<()> {
        // A service manager sets the mode of its sockets.
        if let (Some(path), SocketOwner::Process) = (bind.key.socket_file(), self.holder) {
            unix_sockets::set_mode(path, bind.options.mode)?;
        }
        for socket in &self.sockets {
            if bind.key.unix_path().is_none() {
                tune(socket, bind, frontend)?;
            }
            // A service manager sets the listen queues of its sockets.
            if self.holder == SocketOwner::Process {
                listen::start(socket, bind.options.backlog)?;
            }
        }
        Ok(())
    }

    /// Makes every worker accept from its sockets.
    fn listen(&self, key: &BindKey, workers: &[Worker]) {
        for (index, worker) in workers.iter().enumerate() {
            for socket in self.of_worker(index, workers.len()) {
                worker.mailbox.send(WorkerCommand::Listen(key.clone(), Arc::clone(socket)));
            }
        }
    }

    /// Returns the sockets that worker `index` of `count` accepts from. With at least
    /// `count` sockets, each belongs to one worker. With fewer, workers share them.
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
    /// Starts to listen. Clients wait in the listen queue until a worker accepts.
    pub(super) fn start(&mut self) -> Result<(), BindError> {
        for (bind, socket) in self.not_listening.drain(..) {
            listen::start(&socket, bind.options.backlog)
                .map_err(|error| BindError::new(&bind.key, error))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn group(sockets: usize) -> BindSockets {
        let address: SocketAddr = "127.0.0.1:0".parse().unwrap();
        let socket = || listen::reserve(address.into(), 1).unwrap().pop().unwrap();
        let sockets = (0..sockets).map(|_| Arc::new(socket())).collect();
        BindSockets { sockets, holder: SocketOwner::Process }
    }

    /// Returns the number of workers per socket and the smallest number of sockets of a
    /// worker.
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
        assert_eq!(spread(1, 3), (vec![3], 1), "one socket for all workers");
        assert_eq!(spread(2, 3), (vec![2, 1], 1));
    }
}

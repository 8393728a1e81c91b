//! A simulated machine: the context, engine and listener of a worker on the fake kernel, with
//! clients, backends and an operator.
//!
//! Run by the tests of `sim`. A run has random steps, each followed by turns of the worker's
//! tasks. Then all peers close with FIN, and `checks` checks the run.

use super::{At, SimOutcome};
use crate::accept::listener::{Listener, ListenerRetirement};
use crate::accept::wait_queue::SlotWaiters;
use crate::access_log::{AccessLogRecord, AccessLogSender};
use crate::relay::{self, Engine, RingSettings};
use crate::worker::EngineKind;
use crate::worker::context::{CarryOver, ProcessContext, ReportQueue, WorkerContext, WorkerReport};
use fastrand::Rng;
use socket2::{Domain, Socket, Type};
use std::os::fd::AsRawFd;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;
use tidegate_config as config;
use tidegate_core::balance::in_flight::InFlight;
use tidegate_core::control::{ControlEffect, ControlEvent, Controller};
use tidegate_core::decision::rings::Decisions;
use tidegate_core::metrics::counters::WorkerCounters;
use tidegate_core::model::BindKey;
use tidegate_core::outcome::{Cause, Phase};
use tidegate_core::sessions::SessionsToEnd;
use tidegate_core::table::Table;
use tidegate_core::table::publish::TablePublisher;
use tidegate_net::budget::MemoryBudget;
use tidegate_net::clock;
use tidegate_net::fake::{self, KernelGuard, SimKernel, SocketRole};

/// Parameters of a run.
#[derive(Debug, Clone, Copy)]
pub(super) struct SimScript {
    pub(super) seed: u64,
    /// No peer fails and time does not jump.
    pub(super) calm: bool,
    /// The only injected fault, if set.
    pub(super) fault: At,
}

pub(super) struct SimWorld {
    pub(super) rng: Rng,
    pub(super) ctx: Rc<WorkerContext>,
    /// Budget for buffered bytes.
    pub(super) budget: Arc<MemoryBudget>,
    pub(super) records: Vec<AccessLogRecord>,
    pub(super) reports: Vec<WorkerReport>,
    /// All published tables.
    pub(super) tables: Vec<Arc<Table>>,
    controller: Controller,
    publisher: TablePublisher,
    listener: Arc<Socket>,
    /// Makes the listener readable when a client arrives.
    arrivals: Socket,
    calm: bool,
    /// Most bytes that a peer sends in a step.
    portion: u64,
    clients_left: u32,
    /// Time has jumped.
    pub(super) jumped: bool,
    /// The operator has aborted sessions.
    pub(super) aborted: bool,
}

/// Virtual time after which all sessions must have ended once no fault occurs: three connect
/// timeouts, and the time that a reset can be delayed.
const END_MAX: Duration = Duration::from_secs(12);

/// Returns a budget: usually unlimited, else for a few reads, for one, or for none.
fn some_budget(rng: &mut Rng) -> usize {
    rng.choice([usize::MAX, usize::MAX, 100_000, 20_000, 0]).unwrap_or(usize::MAX)
}

fn config_text(rng: &mut Rng) -> String {
    let backend =
        |number: u32| format!("[[pool.web.backend]]\naddress = '127.0.0.1:{}'\n", 1000 + number);
    let backends: String = (1..=rng.u32(1..4)).map(backend).collect();
    let balance = ["weighted-round-robin", "least-connections", "peak-ewma"][rng.usize(..3)];
    let cap = ["", "connections_max = 2\n"][usize::from(rng.u8(..4) == 0)];
    format!(
        "[frontend.web]\nbind = '127.0.0.1:80'\npool = 'web'\nidle_timeout = '30s'\n\
         half_closed_timeout = '20s'\n{cap}\
         [pool.web]\nbalance = '{balance}'\nconnect_timeout = '2s'\nconnect_attempts = 3\n\
         ejection = {{}}\n{backends}"
    )
}

// === impl SimScript ===

impl SimScript {
    pub(super) fn random(seed: u64) -> SimScript {
        SimScript { seed, calm: false, fault: None }
    }

    pub(super) fn calm(seed: u64) -> SimScript {
        SimScript { seed, calm: true, fault: None }
    }
}

// === impl SimWorld ===

impl SimWorld {
    pub(super) fn run(runtime: EngineKind, script: SimScript) -> SimOutcome {
        let mut kernel = SimKernel::new(script.seed);
        kernel.log = script.calm.then(Vec::new);
        kernel.plan = script.plan(&mut Rng::with_seed(script.seed));
        let _installed = KernelGuard::new(kernel);
        let tokio = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .start_paused(true)
            .build()
            .unwrap();
        let local = tokio::task::LocalSet::new();
        let outcome = local.block_on(&tokio, async {
            let mut rng = Rng::with_seed(script.seed ^ 0x5151);
            let budget = Arc::new(MemoryBudget::new(some_budget(&mut rng)));
            let counters = Arc::new(WorkerCounters::new(Cause::COUNT, Phase::COUNT));
            let engine = match runtime {
                EngineKind::Epoll => {
                    relay::epoll_engine(None, Arc::clone(&budget), Arc::clone(&counters))
                }
                EngineKind::IoUring => {
                    let buffers = rng.choice([4, 64, 256]).unwrap();
                    let settings = RingSettings { buffers, shown: 4 };
                    relay::ring_engine(None, settings, Arc::clone(&budget), Arc::clone(&counters))
                }
            };
            let mut world = SimWorld::new(rng, engine.unwrap(), budget, counters, script);
            let task = tokio::task::spawn_local(Rc::clone(&world.ctx.engine).run());
            world.live().await;
            world.end().await;
            assert!(!task.is_finished(), "engine task ended");
            world.outcome()
        });
        // Dropping the engine is part of the run: a ring waits for its operations.
        drop((local, tokio));
        outcome
    }

    fn new(
        mut rng: Rng,
        engine: Engine,
        budget: Arc<MemoryBudget>,
        counters: Arc<WorkerCounters>,
        script: SimScript,
    ) -> SimWorld {
        let mut controller = Controller::new(1, rng.u64(..));
        let publisher = TablePublisher::new(controller.current_table());
        let shared = ProcessContext {
            in_flight: Arc::new(InFlight::new()),
            sessions: Arc::default(),
            waiters: Arc::new(SlotWaiters::new()),
            numbers: Arc::default(),
            decisions: Arc::new(Decisions::new(1)),
            reports: Arc::new(ReportQueue::new()),
            ended: Arc::default(),
            buffers: Arc::clone(&budget),
        };
        let tables = publisher.reader();
        let log = AccessLogSender::kept();
        let ctx = WorkerContext::new(
            0,
            engine,
            shared,
            tables,
            counters,
            log,
            rng.u64(..),
            CarryOver::default(),
        );
        let (arrivals, listener) = Socket::pair(Domain::UNIX, Type::DGRAM, None).unwrap();
        arrivals.set_nonblocking(true).unwrap();
        listener.set_nonblocking(true).unwrap();
        let portions: &[u64] =
            if script.calm { &[300, 40_000, 400_000] } else { &[1, 300, 20_000, 400_000] };
        let portion = *rng.choice(portions).unwrap();
        // Bulk in single bytes would take too long.
        fake::with(|kernel| kernel.most = kernel.most.max(portion / 50));
        let clients_left = if script.calm { 1 } else { rng.u32(1..7) };
        let config = Arc::new(config::parse(&config_text(&mut rng), "sim").unwrap());
        let effects = controller.apply(ControlEvent::Configure(config), clock::now());
        let mut world = SimWorld {
            ctx: Rc::new(ctx),
            budget,
            tables: Vec::new(),
            records: Vec::new(),
            reports: Vec::new(),
            controller,
            publisher,
            listener: Arc::new(listener),
            arrivals,
            calm: script.calm,
            portion,
            clients_left,
            jumped: false,
            aborted: false,
            rng,
        };
        world.perform(effects);
        let (bind, socket) =
            (BindKey::tcp(([127, 0, 0, 1], 80).into()), Arc::clone(&world.listener));
        let retirement = Rc::new(ListenerRetirement::default());
        tokio::task::spawn_local(Listener::serve(Rc::clone(&world.ctx), bind, socket, retirement));
        world
    }

    fn perform(&mut self, effects: Vec<ControlEffect>) {
        for effect in effects {
            if let ControlEffect::Publish(table) = effect {
                self.tables.push(Arc::clone(&table));
                self.publisher.publish(table);
                self.ctx.shared.waiters.slot_freed();
            }
        }
    }

    /// Lets the worker's tasks run.
    async fn turn(&mut self, turns: u32) {
        for _ in 0..turns {
            tokio::task::yield_now().await;
        }
        self.records.extend(std::iter::from_fn(|| self.ctx.access_log.take()));
        self.reports.extend(std::iter::from_fn(|| self.ctx.shared.reports.pop()));
    }

    async fn live(&mut self) {
        let steps = if self.calm { 25 } else { self.rng.u32(10..120) };
        for _ in 0..steps {
            self.act().await;
            let turns = self.rng.u32(1..5);
            self.turn(turns).await;
        }
    }

    fn some_socket(&mut self) -> Option<usize> {
        let open = fake::with(|kernel| {
            let open = kernel.sockets.iter().enumerate().filter(|(_, socket)| socket.is_open());
            open.map(|(id, _)| id).collect::<Vec<_>>()
        });
        self.rng.choice(open)
    }

    async fn act(&mut self) {
        let kind = self.rng.u8(..if self.calm { 24 } else { 34 });
        match kind {
            0..4 => self.arrive(),
            24 => return self.jump().await,
            25 => self.operate(),
            26..28 => {
                let millis = self.rng.u64(1..900);
                return self.pass(Duration::from_millis(millis)).await;
            }
            28 => return self.be_idle().await,
            _ => {}
        }
        let Some(id) = self.some_socket() else { return };
        let bytes = self.rng.u64(1..=self.portion);
        let (reset, gone) = (self.rng.u8(..3) > 0, !self.calm && self.rng.u8(..3) == 0);
        fake::with(SimKernel::note_closed);
        fake::with(|kernel| match kind {
            4..10 => kernel.peer_sends(id, bytes),
            10..14 => kernel.decide(id),
            14..17 => kernel.peer_reads(id, bytes * 2),
            17..23 => kernel.run_events(),
            23 => kernel.peer_ends(id, gone),
            29 => kernel.peer_fails(id, if reset { libc::ECONNRESET } else { libc::ETIMEDOUT }),
            30 => kernel.wake_for_nothing(id),
            31 => kernel.sockets[id].room = 0,
            _ => {}
        });
    }

    fn arrive(&mut self) {
        if self.clients_left > 0 {
            self.clients_left -= 1;
            fake::with(|kernel| kernel.arrive(self.listener.as_raw_fd()));
            // If the socket is full, the listener is readable already.
            let _ = self.arrivals.send(b"!");
        }
    }

    async fn pass(&mut self, time: Duration) {
        tokio::time::advance(time).await;
    }

    /// Advances time by a large step, as after a suspend or without CPU time.
    async fn jump(&mut self) {
        self.jumped = true;
        let seconds = self.rng.choice([3, 15, 45, 100_000]).unwrap();
        self.pass(Duration::from_secs(seconds)).await;
    }

    /// A random action of the operator.
    fn operate(&mut self) {
        match self.rng.u8(..5) {
            4 => {
                self.aborted = true;
                let mut open = Vec::new();
                self.ctx.engine.visit(0..64, &mut |one| open.push(one.identity.number));
                let some = open.into_iter().filter(|_| self.rng.bool()).collect();
                let order = SessionsToEnd::new(some, Cause::ClosedByOperator, self.rng.u64(..9));
                self.ctx.engine.end_some(0..64, &order);
            }
            3 => self.budget.set_max(some_budget(&mut self.rng)),
            0 => {
                self.aborted = true;
                self.ctx.engine.abort_all(Cause::DrainDeadline);
            }
            1 => {
                self.aborted = true;
                if let Some(backend) = self.publisher.current().pools[0].serving.first() {
                    let causes = [Cause::BackendRemoved, Cause::BackupReleased];
                    let cause = causes[self.rng.usize(..causes.len())];
                    self.ctx.engine.abort_backend(backend.id, cause);
                }
            }
            _ => {
                let config = config::parse(&config_text(&mut self.rng), "sim").unwrap();
                let event = ControlEvent::Configure(Arc::new(config));
                let effects = self.controller.apply(event, clock::now());
                self.perform(effects);
            }
        }
    }

    /// Checks that the worker makes no system calls without events.
    async fn be_idle(&mut self) {
        let mut idle_turns = 0;
        for _ in 0..3000 {
            let before = fake::with(|kernel| kernel.calls);
            self.turn(1).await;
            let idle = fake::with(|kernel| kernel.calls) == before;
            idle_turns = if idle { idle_turns + 1 } else { 0 };
            if idle_turns == 40 {
                return;
            }
        }
        panic!("a task makes system calls without events");
    }

    /// Ends all sessions: no new faults, all peers read and close with FIN.
    async fn end(&mut self) {
        fake::with(|kernel| {
            if !matches!(kernel.plan, fake::FaultSchedule::At(..)) {
                kernel.plan = fake::FaultSchedule::Never;
            }
            kernel.most = u64::MAX;
        });
        while self.clients_left > 0 {
            self.arrive();
        }
        let give_up = clock::now() + END_MAX;
        loop {
            self.let_all_end();
            self.turn(4).await;
            if self.all_is_over() {
                break;
            }
            assert!(clock::now() < give_up, "sessions hang:\n{}", self.describe());
            self.pass(Duration::from_millis(10)).await;
        }
        // Idle pipes are closed after a delay.
        for _ in 0..4 {
            self.pass(Duration::from_millis(700)).await;
            self.turn(20).await;
        }
        self.be_idle().await;
        fake::with(SimKernel::note_closed);
        super::checks::check_run(self);
    }

    fn let_all_end(&self) {
        fake::with(|kernel| {
            for id in 0..kernel.sockets.len() {
                kernel.decide(id);
                kernel.peer_reads(id, 1 << 40);
                if !kernel.sockets[id].fin {
                    kernel.peer_ends(id, false);
                }
            }
            kernel.run_events();
        });
    }

    fn all_is_over(&self) -> bool {
        fake::with(|kernel| {
            let mut clients = kernel.sockets.iter().filter(|s| s.role == SocketRole::Client);
            kernel.queued() == 0
                && self.records.len() == clients.by_ref().count()
                && kernel.sockets.iter().all(|socket| !socket.is_open())
        })
    }

    pub(super) fn describe(&self) -> String {
        let sockets = fake::with(|kernel| format!("{:#?}", kernel.sockets));
        format!("{} open sessions, {:?}\n{sockets}", self.ctx.engine.open_sessions(), self.records)
    }

    fn outcome(&self) -> SimOutcome {
        fake::with(|kernel| {
            for record in &self.records {
                let ends = (record.cause, record.phase, record.errno, record.closed_first);
                let bytes = (record.bytes_in, record.bytes_out, record.bytes_undelivered);
                kernel.note((ends, bytes, record.attempts));
            }
            SimOutcome {
                trace: kernel.trace(),
                calls: kernel.log.take().unwrap_or_default(),
                causes: self.records.iter().map(|record| record.cause).collect(),
            }
        })
    }
}

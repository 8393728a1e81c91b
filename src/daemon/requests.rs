//! Answers requests of the admin API.
//!
//! Part of the control loop. Reloads, upgrades and renderings take longer. The module
//! that does the work answers them later.

use super::config_reloads::ReloadRequest;
use super::control_loop::Control;
use super::event_log::NewEvent;
use super::rendering::Reader;
use crate::admin::{
    self, AdminRequest, AskedWorkers, DeferredText, ForecastBasis, HistoryPart, SessionRecords,
};
use std::sync::Arc;
use tidegate_api::names::{EventKindName, EventLevelName};
use tidegate_core::control::OperatorError;
use tidegate_core::control::what_if::{UnknownAssumption, WhatIf};
use tidegate_core::health::Intent;
use tidegate_core::sessions::SessionQuery;
use tidegate_dataplane::worker::{Worker, WorkerCommand};
use tidegate_net::clock;
use tidegate_supervisor::SuccessorChanges;
use tokio::sync::oneshot;

/// The backend that a request names.
struct RequestedBackend {
    pool: String,
    backend: String,
}

impl Control {
    /// Answers a request or passes it to the module that will answer it. Errors of
    /// `send` are ignored: the client has closed its connection.
    pub(super) async fn answer(&mut self, request: AdminRequest) {
        match request {
            AdminRequest::Status(reply) => self.request_rendering(Reader::Status(reply)),
            AdminRequest::Observe { latencies, reply } => {
                self.request_rendering(Reader::Observed { latencies, reply });
            }
            AdminRequest::Metrics(reply) => self.request_rendering(Reader::Metrics(reply)),
            // Dropped after the handover: the client must ask the new process.
            AdminRequest::Reload { .. } | AdminRequest::SetIntent { .. }
                if self.upgrades.handed_over() => {}
            AdminRequest::Reload { who, reply } => {
                self.request_reload(ReloadRequest { who, reply: Some(reply) }).await;
            }
            AdminRequest::Upgrade { binary, config, asked_over, who, reply } => {
                let changes = SuccessorChanges { binary, config };
                self.begin_upgrade(changes, asked_over, who, Some(reply));
            }
            AdminRequest::Explain { pool, backend, reply } => {
                let _ = reply.send(self.explain(&pool, &backend));
            }
            AdminRequest::History { pool, backend, part, reply } => {
                let _ = reply.send(self.history(&pool, &backend, part));
            }
            AdminRequest::Sessions { query, reply } => {
                let _ = reply.send(self.ask_workers(&query));
            }
            AdminRequest::EndSessions { order, reply } => {
                let command = |reply| WorkerCommand::EndSessions(Arc::clone(&order), reply);
                let _ = reply.send(self.ask_each(command));
            }
            AdminRequest::PoolTable { pool, reply } => {
                let table = self.controller.current_table();
                let found = table.pools.iter().find(|one| *one.spec.name == *pool).cloned();
                let _ = reply.send(found);
            }
            AdminRequest::Decisions(reply) => {
                let context = self.workers.context();
                let (decisions, given_out) =
                    (Arc::clone(&context.decisions), context.numbers.given_out());
                let _ = reply.send(SessionRecords { decisions, given_out });
            }
            AdminRequest::Names { ids, reply } => {
                let _ = reply.send(self.controller.names_of(&ids));
            }
            AdminRequest::Forecast { assumed, reply } => {
                let _ = reply.send(self.forecast_basis(&assumed));
            }
            AdminRequest::SetIntent { pool, backend, intent, who, reply } => {
                self.set_intent(&RequestedBackend { pool, backend }, intent, who, reply);
            }
            #[cfg(debug_assertions)]
            AdminRequest::Fault { place, worker, millis, reply } => {
                let _ = reply.send(self.workers.order_fault(&place, worker, millis));
            }
            AdminRequest::Shutdown { who, reply } => {
                self.leave("admin request", &who);
                let _ = reply.send(());
            }
        }
    }

    fn ask_workers(&self, query: &Arc<SessionQuery>) -> AskedWorkers {
        let lists = self.ask_each(|reply| WorkerCommand::ListSessions(Arc::clone(query), reply));
        AskedWorkers { lists, elsewhere: self.upgrades.sessions_elsewhere() }
    }

    /// Sends a command to each worker. Returns where the answers arrive.
    fn ask_each<T>(
        &self,
        command: impl Fn(oneshot::Sender<T>) -> WorkerCommand,
    ) -> Vec<oneshot::Receiver<T>> {
        let ask = |worker: &Worker| {
            let (reply, answer) = oneshot::channel();
            worker.mailbox.send(command(reply));
            answer
        };
        self.workers.list().iter().map(ask).collect()
    }

    fn explain(&mut self, pool: &str, backend: &str) -> Result<DeferredText, OperatorError> {
        self.feed([]);
        let rejected = self.evidence.heartbeats.rejection(pool, backend);
        let explained = self.controller.explain(pool, backend, clock::now())?;
        let decisions = Arc::clone(&self.workers.context().decisions);
        Ok(DeferredText::new(move || {
            let picks = decisions.share_of(explained.pool, explained.backend.state.id);
            admin::explain::render(&explained, rejected.as_ref(), picks)
        }))
    }

    fn history(
        &mut self,
        pool: &str,
        backend: &str,
        part: HistoryPart,
    ) -> Result<DeferredText, OperatorError> {
        self.feed([]);
        let explained = self.controller.explain(pool, backend, clock::now())?;
        let traffic = self.telemetry.traffic.shared().clone();
        Ok(DeferredText::new(move || {
            let traffic = traffic.lock();
            match part {
                HistoryPart::Hour => admin::history::render(&explained, &traffic),
                HistoryPart::Minute => admin::history::render_minute(&explained, &traffic),
            }
        }))
    }

    fn forecast_basis(&mut self, assumed: &[WhatIf]) -> Result<ForecastBasis, UnknownAssumption> {
        self.feed([]);
        let assumed = self.controller.what_if(assumed)?;
        let context = self.workers.context();
        let (queued, sessions) = (context.waiters.all_queued(), context.in_flight.get());
        let (table, draining) = (self.controller.current_table(), self.lifecycle.is_draining());
        Ok(ForecastBasis { table, assumed, queued, sessions, draining })
    }

    fn set_intent(
        &mut self,
        RequestedBackend { pool, backend }: &RequestedBackend,
        intent: Intent,
        who: String,
        reply: oneshot::Sender<Result<(), OperatorError>>,
    ) {
        self.feed([]);
        let done = self.controller.set_intent(pool, backend, intent, clock::now());
        let sent = match done {
            Ok(_) => {
                self.record_intent(pool, backend, intent, who);
                self.order_intent(pool, backend, intent)
            }
            Err(_) => None,
        };
        let done = done.map(|effects| self.apply_effects(effects));
        let written = self.keep_intents();
        self.answer_intent(sent, written, reply, done);
    }
    fn record_intent(&self, pool: &str, backend: &str, intent: Intent, who: String) {
        let text = match intent {
            Intent::Draining => "drained: no new sessions",
            Intent::Ready => "undrained: gets new sessions if it is healthy",
            Intent::Maintenance => "maintenance",
        };
        let subject = format!("{pool}/{backend}");
        let event =
            NewEvent::new(EventKindName::Operator, EventLevelName::Info, subject, text).by(who);
        self.telemetry.events.record(event);
    }
}

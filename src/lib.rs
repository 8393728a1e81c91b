//! Tidegate: a layer-4 load balancer. *Change anything while it runs, lose
//! nothing, and it can tell you why each connection went where it did.*
//!
//! This page is the map. The README says what it does; each module's first
//! lines say what it is, who calls it and what it never does.
//!
//! # In one picture
//!
//! ```text
//!                       ┌───────────────────── control thread (tokio, current_thread) ────────────────────┐
//!  configuration ─watch─┤                                                                                 │
//!  probes ──────────────┤ events ─► Controller (pure, single writer) ─► build Table ─► publish (ArcSwap)  │
//!  admin API, signals ──┤                ▲                                                 │              │
//!                       └────────────────┼─────────────────────────────────────────────────┼──────────────┘
//!                                        │ connect failures (bounded queue)                ▼ cached reader
//!   client ─► listener ─► admission ─► session: route ─► pick ─► connect ─► relay ─► close ─► account
//!                └──── one worker thread a CPU: own runtime, own SO_REUSEPORT sockets, own counters ──┘
//! ```
//!
//! Workers share nothing they write but what balancing and caps need: the
//! in-flight counts, the round robin's position, a backend's row of failed
//! connects. The control thread may block or fall behind without a session
//! noticing; the last table stays.
//!
//! # Code map
//!
//! | module | what it is |
//! |---|---|
//! | [`cli`] | one file a subcommand; arguments in, exit code out |
//! | [`app`] | start and stop order; the control thread's loop; owns every thread |
//! | [`admin`] | the HTTP API, and what it says: status, metrics |
//! | [`proxy`] | the data path: workers, listeners, sessions, the relay engine |
//! | [`dataplane::accept::admission`] | whether one more connection may be accepted (pure) |
//! | [`core::outcome`] | how sessions end: cause by phase (pure) |
//! | [`dataplane::worker::catch_panic`] | keeping a panic inside the future it happened in |
//! | [`control`] | the controller: events and the time in, effects out (pure) |
//! | [`table`] | the immutable snapshot sessions are routed by; its build and publication |
//! | [`balance`] | the policies: prepared at table build, picked from without locks (pure) |
//! | [`health`] | what is known of a backend and whether it is eligible (pure) |
//! | [`daemon::probe`] | running one active check (a shell) |
//! | [`heartbeat`] | signed datagrams from backends: format, keys, what is refused and why (pure) |
//! | [`daemon::heartbeat::receive`] | the thread that receives them (a shell) |
//! | [`heartbeat::sender`] | sending them, for services and the sidecar (a shell) |
//! | [`config`] | file text to validated model, or every problem at its place |
//! | [`daemon::config_watch`] | noticing that the file may have changed (a shell) |
//! | [`load`] | load and the servers that answer it, for `bench`, `streams`, `selftest` (a shell) |
//! | [`supervisor`] | the parent process: holds sockets, starts, reaps and replaces the process that serves |
//! | [`net`] | sockets, readiness, affinity, limits, what the process may do; the only unsafe code |
//! | [`secret_file`] | reading a file that holds a secret, for whoever has one |
//! | [`telemetry`] | per-worker counters and histograms, the access log |
//! | [`clock`] | the only place time is read |
//!
//! # Data: the life of one connection
//!
//! 1. *accept*, *admit*: `dataplane::accept::listener` asks [`dataplane::accept::admission`] for a slot
//!    before it takes a connection off the kernel's queue; at a cap nobody
//!    accepts.
//! 2. *route*, *pick*: the bind address names the frontend in the worker's
//!    table, the pool's [`core::balance::Balancer`] chooses and raises the backend's
//!    in-flight count in one step. Where every backend is full, the pool may
//!    have a line to wait in (`dataplane::accept::queue`).
//! 3. *connect*: `dataplane::session::connect`, with a deadline; failures go to another
//!    backend and, as a report, to the control thread.
//! 4. *relay*: [`dataplane::relay`]; one long-lived engine task a worker drives all
//!    sessions, and the session awaits one completion.
//! 5. *close*, *account*: `dataplane::session` ends both sockets the way the session
//!    ended and counts it once by [`core::outcome::Cause`] and
//!    [`core::outcome::Phase`], in metrics and access log alike.
//!
//! # Control: how anything changes
//!
//! A changed file, a probe's result, a failed connect or an operator's wish
//! becomes a [`core::control::Event`] (an operator's a call of
//! [`core::control::Controller::set_intent`]) -> [`core::control::Controller`] -> its
//! effects -> `app` performs them. If sessions would be routed otherwise than
//! before, the first effect is a new [`core::table::Table`], which
//! [`core::table::publish`] swaps in; otherwise there is none. The part of a pool with
//! thousands of backends is built on another thread ([`core::control::Effect::Build`]):
//! a backend that is taken out is shut at once, and the table follows.
//!
//! A reload does first what can fail (read, validate, bind, open), changing
//! nothing; what follows cannot fail.
//!
//! # Architecture invariants
//!
//! - Architecture invariant: `main` uses [`cli`], which uses [`app`], which uses
//!   the shells [`admin`], [`proxy`], [`daemon::probe`], [`daemon::heartbeat::receive`],
//!   [`heartbeat::sender`], [`daemon::config_watch`], [`supervisor`]; these use the core [`control`],
//!   [`table`], [`balance`], [`health`], [`heartbeat`], [`config`]; the base
//!   [`net`], [`clock`], [`telemetry`], [`secret_file`] uses none of them.
//!   Nothing uses what is above it, and shells never use each other.
//! - Architecture invariant: the core, [`dataplane::accept::admission`] and
//!   [`core::outcome`] do no I/O and read no clock (but for [`config::load`],
//!   which reads one file and those that it names). Time and randomness come in as arguments, effects go
//!   out as values.
//! - Architecture invariant: unsafe code stands in [`net`] alone, and time is
//!   read in [`clock`] alone.
//! - Architecture invariant: there is one table in force, behind one `ArcSwap`
//!   with one writer. A session takes route, pool and balancer from one load of
//!   it, retries included, and never looks at a newer one; who waits in line for a
//!   backend (`dataplane::accept::queue`) takes them when its turn comes.
//! - Architecture invariant: no operation is cancelled by dropping its future
//!   while the kernel still works on it. Accept, connect and relay go by
//!   readiness on non-blocking sockets; deadlines act on the sockets.
//! - Architecture invariant: a listening socket is never bound anew for an upgrade
//!   and never closed while somebody may be in its queue; what another process
//!   goes on with gets no filter, for filters belong to the socket.
//! - Architecture invariant: every session that ends is counted once, with one
//!   cause and one phase; one whose task or worker panics, too.
//! - Architecture invariant: what workers share is sound whenever any of them
//!   panics: atomics, shards of their own, and guards that give back what they
//!   hold. A worker falls alone, and its next thread waits for nobody
//!   (`dataplane::worker::supervisor`).
//! - Architecture invariant: what the processes of an upgrade share in memory is counts
//!   alone (`net::cells`), each changed in one step: a process that ends at any point
//!   leaves them right.
//! - Architecture invariant: intent, observation and ejection are stored apart;
//!   *eligible* is derived from them and stored nowhere.
//! - Architecture invariant: everything that can grow has a named bound, and
//!   what happens beyond it is counted.

pub mod api;
pub mod cli;
pub mod client;
pub mod config;
pub mod core;
pub mod daemon;
pub mod dataplane;
pub mod heartbeat;
pub mod lab;
pub mod logging;
pub mod net;
pub mod supervisor;

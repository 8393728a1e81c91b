//! Minimal configurations for tests and benches.
//!
//! Called by tests of this crate and, with the feature `testing`, of other crates. Each
//! field has the simplest value. A test sets the fields that it is about.

use crate::decision::{Decision, Figures, Outcome, SkippedList, Why};
use crate::model::{
    AccessLogTarget, Admin, AdminListen, BackendId, Backups, Bind, ClientAddr, Config, DnsConfig,
    EngineChoice, FrontendConfig, FrontendId, HASH_SLOTS, Log, LogFormat, LogLevel, LogTarget,
    OnDown, OnRecover, OnRemoval, PeerAddr, Policy, PoolConfig, ProcessConfig, Sandbox,
    SyslogFacility, Tiers, WhenNoneEligible,
};
use std::sync::Arc;
use std::time::Duration;

/// Returns a pool without backends, probes, ejection and heartbeats.
pub fn pool(name: &str) -> PoolConfig {
    PoolConfig {
        name: name.into(),
        of: None,
        role: None,
        balance: Policy::WeightedRoundRobin,
        hash_slots: HASH_SLOTS,
        source: [].into(),
        connect_timeout: Duration::from_secs(5),
        queue_max: 0,
        queue_timeout: Duration::from_secs(5),
        connect_attempts: 3,
        when_none_eligible: WhenNoneEligible::Refuse,
        backups: Backups::All,
        tiers: Tiers::Strict,
        on_recover: OnRecover::Keep,
        startup_grace: Duration::from_secs(5),
        on_removal: OnRemoval::Keep,
        on_down: OnDown::Keep,
        proxy_protocol: None,
        probe: None,
        ejection: None,
        heartbeat: None,
        slow_start: None,
        discover: None,
        backends: Vec::new(),
        named: Vec::new(),
    }
}

/// Returns a frontend at `port` of 127.0.0.1, without timeouts and limits.
pub fn frontend(name: &str, port: u16, pool: &PoolConfig) -> FrontendConfig {
    FrontendConfig {
        name: name.into(),
        binds: vec![Bind::tcp(([127, 0, 0, 1], port).into())],
        routes: vec![],
        pool: Arc::clone(&pool.name),
        client_first: None,
        first_byte_timeout: None,
        idle_timeout: None,
        half_closed_timeout: None,
        session_max: None,
        stalled_timeout: None,
        keepalive: None,
        user_timeout: None,
        download_rate: None,
        upload_rate: None,
        connections_max: 0,
        sources: None,
        proxy_protocol: None,
    }
}

/// Returns a configuration with these frontends and pools, for at most 1,000 sessions.
pub fn config(frontends: Vec<FrontendConfig>, pools: Vec<Arc<PoolConfig>>) -> Config {
    Config {
        process: ProcessConfig {
            workers: None,
            pin: false,
            engine: EngineChoice::Auto,
            spin: None,
            leave_delay: Duration::ZERO,
            drain_timeout: Duration::from_secs(30),
            upgrade_timeout: Duration::from_secs(30),
            connections_max: 1000,
            user: None,
            group: None,
            sandbox: Sandbox::Auto,
            state: None,
            probe_helper: false,
            buffers_max: 1 << 28,
        },
        admin: Admin {
            listen: AdminListen::Unix("/nowhere".into()),
            token_file: None,
            read_token_file: None,
            backend_metrics_max: 0,
        },
        log: Log {
            level: LogLevel::Info,
            format: LogFormat::Text,
            target: LogTarget::Stderr,
            facility: SyslogFacility::Daemon,
            access: AccessLogTarget::Off,
            access_facility: SyslogFacility::Local0,
        },
        frontends,
        pools,
        heartbeat: None,
        registries: Vec::new(),
        dns: DnsConfig::default(),
        includes: crate::model::Includes::default(),
    }
}

/// A first pick of that session; every number in it is the session's.
pub fn decision(session: u64) -> Decision {
    Decision {
        session,
        at_micros: session,
        serial: session,
        client: ClientAddr::of_peer(PeerAddr::new(([127, 0, 0, 1], 1).into())),
        peer: None,
        frontend: FrontendId(1),
        route: 0,
        pool: None,
        policy: Policy::Random,
        why: Why::Draw,
        chosen: Some(BackendId(session as u32)),
        candidates: session as u32,
        tier: session as u8 % 10,
        spilled: false,
        figures: Figures::Turn { position: session, period: session },
        skipped: SkippedList::EMPTY,
        attempt: 1,
        waited_micros: session as u32,
        outcome: Outcome::default(),
    }
}

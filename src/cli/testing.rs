//! Example documents of the admin API, for tests of `status`, `explain` and `drain`.

use tidegate_api::explain::ExplainDoc;
use tidegate_api::status::StatusDoc;

const STATUS: &str = r#"{
    "version": "0.1.0", "generation": 3, "table_serial": 9, "engine": "epoll",
    "engine_reason": "configured", "workers": 2, "stalled": [], "worker_panics_total": 0,
    "worker_restarts_total": 0, "uptime_seconds": 7384.2, "state": "serving",
    "connections_active": 12, "connections_max": 100000,
    "trouble": [{"kind": "backends", "severity": 2, "state": "down", "short": "web/c is down",
        "title": "web/c is down", "why": "3 probes failed.", "since_seconds": 41.3,
        "effect": "Its 25% of new sessions goes to the other 2.", "pool": "web",
        "backend": "c", "backends": 1
    }, {"kind": "cap", "severity": 1, "state": null, "short": "sessions are near the cap",
        "title": "Open sessions are near the cap", "why": "", "since_seconds": null,
        "effect": "", "pool": null, "backend": null, "backends": 0
    }, {"kind": "warning", "severity": 1, "state": null, "short": "a warning",
        "title": "Warning", "why": "Process.workers: 2 runs until a restart, then 4.",
        "since_seconds": null, "effect": "", "pool": null, "backend": null, "backends": 0}],
    "warnings": ["process.workers: 2 runs until a restart, then 4"], "confinement": [],
    "frontends": [{
        "name": "web", "binds": ["0.0.0.0:8080", "[::]:8080"], "pool": "web",
        "connections_max": 0, "sessions_active": 12, "sessions_total": 12345,
        "bytes_in_total": 999, "bytes_out_total": 5368709120, "refused_total": 0
    }],
    "pools": [{
        "name": "web", "balance": "random", "none_eligible": null, "frozen": null,
        "registered": 0, "registered_max": 0, "probes": true, "heartbeats": false, "queued": 0,
        "backends": [{
            "name": "a", "address": "10.0.0.11:8080", "registered": false, "weight": 3,
            "effective_weight": 1, "backup": false, "connections_max": 0, "intent": "ready",
            "observation": "suspect", "ejected": false, "on_trial": false,
            "ejections_total": 0, "ejections_held_total": 0, "eligible": true,
            "ramp_percent": 100, "sessions_active": 12, "sessions_total": 12000,
            "connect_failures_total": 0, "bytes_in_total": 0, "bytes_out_total": 0,
            "connect_seconds": {"p50": 0.000213, "p99": 0.0312},
            "first_byte_seconds": {"p50": null, "p99": null}
        }, {
            "name": "b", "address": "unix:/run/b.sock", "registered": false, "weight": 1,
            "effective_weight": 0, "backup": true, "connections_max": 0, "intent": "draining",
            "observation": "up", "ejected": true, "on_trial": false,
            "ejections_total": 1, "ejections_held_total": 0, "eligible": false,
            "ramp_percent": 100, "sessions_active": 0, "sessions_total": 345,
            "connect_failures_total": 7, "bytes_in_total": 0, "bytes_out_total": 0,
            "connect_seconds": {"p50": null, "p99": 2.5},
            "first_byte_seconds": {"p50": null, "p99": null},
            "last_transition": {"from": "up", "to": "draining", "reason": "operator",
                                "seconds_ago": 75.9, "lasted_seconds": 3.0}
        }]
    }],
    "leaving": [{"pool": "web", "name": "c", "address": "10.0.0.9:80", "sessions_active": 2}]
}"#;

/// Returns the status of a pool with two backends, one of them drained.
pub(crate) fn status() -> StatusDoc {
    serde_json::from_str(STATUS).expect("a status")
}

const EXPLANATION: &str = r#"{
    "pool": "web", "backend": "a", "address": "10.0.0.11:8080", "registered": true,
    "eligible": false, "why": "down: 2 confirmation probes failed",
    "observation": "down", "observation_seconds": 75.0,
    "intent": "ready", "intent_seconds": 7300.0, "backup": false,
    "connections_max": 0, "connections_max_in_force": 0, "sessions_active": 3,
    "picks": {"backend": 512, "pool": 4096},
    "weight": {"effective": 0, "configured": 10,
               "health_percent": 0, "ramp_percent": 100, "load_percent": 65},
    "probe": null, "slow_start": null,
    "last_probe": {"result": "failure", "detail": "timed out after 100ms while connecting",
        "took_seconds": 0.1, "ended_seconds_ago": 0.4, "confirmation": true},
    "none_eligible": null,
    "heartbeat": {"required": true, "pulse": "silent", "sender": {
        "state": "ready", "state_seconds": 7300.0, "key": 1, "incarnation": 17,
        "sequence": 72000, "weight_asked": 10, "load": 500, "load_smoothed": 480.2,
        "in_flight": 3, "known_seconds": 7300.0, "detector": "down", "detector_seconds": 75.0,
        "received_total": 71990, "lost_total": 10, "lost_share": 0.0, "loss": 0.001,
        "loss_after_loss": 0.0, "jitter_seconds": 0.0012, "interval_seconds": 0.1,
        "interval_learned_seconds": 0.1, "missing_allowed": 3, "timeout_seconds": 0.325,
        "try_timeout_seconds": 0.1, "silent_seconds": 75.6, "ttl_seconds": 10.0,
        "expired": false, "phi_normal": 300.0, "phi_exponential": 300.0,
        "suspicions_total": 1, "downs_total": 1, "flaps": 0, "held": null}},
    "failures": {"within_seconds": 12.0, "connects": 3, "early_resets": 1,
        "last": "connection refused", "last_seconds_ago": 1.25, "in_a_row": 2,
        "eject_at": 5, "connects_total": 9},
    "ejection": {"on": true, "ejected": false, "in_a_row": 0, "total": 0, "held_total": 0},
    "guards": {"channel_silent": false, "all_frozen": null, "max_ejected_percent": 50,
        "pool_frozen": {"reason": "2 of 4 backends became suspect together", "seconds": 0.6},
        "pool_down": 1, "pool_suspect": 2, "pool_heard": 2, "pool_senders": 5},
    "history": [
        {"from": "suspect", "to": "down", "reason": "2 confirmation probes failed",
         "seconds_ago": 75.0, "lasted_seconds": 0.2},
        {"from": "up", "to": "suspect", "reason": "no heartbeat for 325 ms",
         "seconds_ago": 75.2, "lasted_seconds": 7000.0}]
}"#;

/// Returns the explanation of a backend that is down because of missing heartbeats.
pub(crate) fn explanation() -> ExplainDoc {
    serde_json::from_str(EXPLANATION).expect("an explanation")
}

//! `GET /v1/explain`: every answer and every error, with a real controller and real rings.

use crate::harness::{Answer, Api, Control};
use serde_json::{Value, json};
use std::collections::HashMap;
use std::sync::Arc;
use tidegate_core::control::what_if::{UnknownAssumption, WhatIf};
use tidegate_core::control::{ControlEvent, Controller};
use tidegate_core::decision::rings::Decisions;
use tidegate_core::decision::{AttemptFailureKind, Decision, Outcome, Why};
use tidegate_core::limits::access_list::AccessList;
use tidegate_core::limits::client_sources::SourceLimits;
use tidegate_core::model::{
    BackendAddr, BackendConfig, Bind, FrontendConfig, Policy, PoolConfig, RouteConfig, RouteTarget,
    SourceRules,
};
use tidegate_core::outcome::{Cause, Phase};
use tidegate_core::testing;
use tidegate_daemon::admin::{ForecastBasis, SessionRecords};
use tidegate_net::clock;

/// First number of the process in these tests.
const FIRST: u64 = 100;

/// A session with a failed attempt and a retry.
const SESSION: u64 = 117;

/// A control loop's state: frontends `in`, `few` and `routed`, pools `web`, `turns` and
/// `empty`, and the decisions about one session.
pub(crate) struct Questioned {
    pub(crate) controller: Controller,
    decisions: Arc<Decisions>,
}

impl Questioned {
    pub(crate) fn new() -> Questioned {
        let mut controller = Controller::new(1, 1);
        let pools = [
            pool("web", Policy::SourceHash, &["a", "b", "c"]),
            pool("turns", Policy::WeightedRoundRobin, &["a", "b"]),
            pool("drawn", Policy::Random, &["a", "b"]),
            pool("empty", Policy::Random, &[]),
        ];
        let frontends = vec![
            testing::frontend("in", 80, &pools[0]),
            testing::frontend("turns", 81, &pools[1]),
            testing::frontend("drawn", 82, &pools[2]),
            testing::frontend("empty", 83, &pools[3]),
            few(&pools[0]),
            routed(&pools[0]),
        ];
        let config = testing::config(frontends, pools.into_iter().map(Arc::new).collect());
        controller.apply(ControlEvent::Configure(Arc::new(config)), clock::now());
        let decisions = Arc::new(Decisions::new(1));
        record(&controller, &decisions);
        Questioned { controller, decisions }
    }

    pub(crate) fn records(&self) -> SessionRecords {
        SessionRecords { decisions: Arc::clone(&self.decisions), given_out: FIRST..192 }
    }

    pub(crate) fn basis(&self, assumed: &[WhatIf]) -> Result<ForecastBasis, UnknownAssumption> {
        let assumed = self.controller.what_if(assumed)?;
        let table = self.controller.current_table();
        let queued = HashMap::new();
        Ok(ForecastBasis { table, assumed, queued, sessions: 0, draining: false })
    }
}

fn pool(name: &str, balance: Policy, backends: &[&str]) -> PoolConfig {
    let backend = |(name, port): (&&str, u16)| BackendConfig {
        name: (*name).into(),
        address: BackendAddr::Tcp(([127, 0, 0, 1], port).into()),
        weight: 1,
        tier: 0,
        connections_max: 0,
    };
    let backends = backends.iter().zip(1..).map(backend).collect();
    PoolConfig { balance, backends, ..testing::pool(name) }
}

/// A frontend that allows 10.0.0.0/8 without 10.9.0.0/16. Its files allow 172.16.0.0/12 without
/// 172.16.5.0/24.
fn few(pool: &PoolConfig) -> FrontendConfig {
    let ranges =
        |texts: &[&str]| texts.iter().map(|text| text.parse().unwrap()).collect::<Vec<_>>();
    let rules = SourceRules {
        access: AccessList::new(
            &ranges(&["10.0.0.0/8", "172.16.0.0/12"]),
            &ranges(&["10.9.0.0/16", "172.16.5.0/24"]),
        ),
        allow: ranges(&["10.0.0.0/8"]),
        deny: ranges(&["10.9.0.0/16"]),
        allow_file: Some("/allow".into()),
        deny_file: Some("/deny".into()),
        limits: SourceLimits { prefix_v4: 24, prefix_v6: 64, connections_max: 2, rate: None },
    };
    FrontendConfig { sources: Some(Arc::new(rules)), ..testing::frontend("few", 84, pool) }
}

/// A frontend whose routes depend on the local address.
fn routed(pool: &PoolConfig) -> FrontendConfig {
    let route = |sources: &[&str], addresses: &[&str], target| RouteConfig {
        sources: sources.iter().map(|range| range.parse().unwrap()).collect(),
        ports: vec![],
        addresses: addresses.iter().map(|range| range.parse().unwrap()).collect(),
        target,
    };
    FrontendConfig {
        binds: vec![Bind::tcp(([0, 0, 0, 0], 85).into())],
        routes: vec![
            route(&[], &["10.0.0.5/32"], RouteTarget::Refuse),
            route(&["10.0.0.0/8"], &[], RouteTarget::Pool("turns".into())),
        ],
        ..testing::frontend("routed", 85, pool)
    }
}

fn record(controller: &Controller, decisions: &Decisions) {
    let table = controller.current_table();
    let pool = &table.pools[0];
    let first = Decision {
        frontend: table.frontends[0].state.id,
        pool: Some(pool.id),
        chosen: Some(pool.serving[0].id),
        waited_micros: 0,
        outcome: Outcome {
            failure: Some((AttemptFailureKind::Refused, 111)),
            ..Outcome::default()
        },
        ..testing::decision(SESSION)
    };
    let second = Decision {
        why: Why::Retry,
        attempt: 2,
        chosen: Some(pool.serving[1].id),
        outcome: Outcome {
            connect_micros: Some(400),
            failure: None,
            failed_micros: 250,
            end: Some((Cause::Finished, Phase::Closed)),
            lasted_millis: 2_500,
        },
        ..first.clone()
    };
    decisions.of(0).first.push(&first);
    decisions.of(0).failed.push(&first);
    decisions.of(0).failed.push(&second);
}

fn explain(api: &Api, query: &str) -> Answer {
    api.ask("GET", &format!("/v1/explain?{query}"))
}

fn told(api: &Api, query: &str) -> Value {
    let answer = explain(api, query);
    assert_eq!(answer.status, 200, "{query}: {answer:?}");
    answer.json()
}

fn detail(api: &Api, query: &str, status: u16) -> String {
    let answer = explain(api, query);
    assert_eq!(answer.error().0, status, "{query}: {answer:?}");
    answer.json()["detail"].as_str().unwrap().to_owned()
}

#[test]
fn session_is_explained_with_its_attempts() {
    let api = Api::unix(Control::Answers);
    let session = told(&api, &format!("session={SESSION}"));
    assert_eq!(session["frontend"], "in");
    assert_eq!(
        (&session["state"], &session["end"]["cause"]),
        (&json!("ended"), &json!("finished"))
    );
    let decisions = session["decisions"].as_array().unwrap();
    assert_eq!(decisions.len(), 2, "{session:#}");
    assert_eq!(decisions[0]["backend"]["backend"], "a");
    assert_eq!(
        (&decisions[0]["failure"], &decisions[0]["errno"]),
        (&json!("refused"), &json!(111))
    );
    assert_eq!(decisions[1]["why"], "retry");
    assert_eq!(decisions[1]["backend"]["address"], "127.0.0.1:2");
    assert_eq!(decisions[1]["connect_seconds"], 0.0004);
}

#[test]
fn unknown_session_is_404_with_the_reason() {
    let api = Api::unix(Control::Answers);
    assert_eq!(explain(&api, "session=1").error(), (404, "unknown session".to_owned()));
    assert!(detail(&api, "session=99", 404).contains("by an earlier process"));
    assert!(detail(&api, "session=101", 404).contains("no decision of session 101 is kept"));
    assert!(detail(&api, "session=192", 404).contains("has not been accepted yet"));
}

#[test]
fn wrong_question_is_400_and_names_the_parameter() {
    let api = Api::unix(Control::Answers);
    for (query, named) in [
        ("", "session or client is missing"),
        ("session=x", "session is not a number"),
        ("session=1&client=10.0.0.1", "session cannot be combined"),
        ("client=10.0.0.1", "frontend is missing"),
        ("client=x&frontend=in", "client is not an IP address"),
        ("client=10.0.0.1&frontend=in&address=x", "address is not"),
        (
            "client=10.0.0.1&frontend=in&address=10.0.0.1",
            "address: frontend \"in\" does not listen",
        ),
        ("client=10.0.0.1&frontend=in&address=127.0.0.1:81", "does not listen at 127.0.0.1:81"),
        ("client=10.0.0.1&frontend=routed", "address is missing"),
        ("client=10.0.0.1&frontend=in&without=a", "without is not POOL/BACKEND"),
        ("client=10.0.0.1&frontend=in&with=web/a=2", "with is not weight:"),
    ] {
        let detail = detail(&api, query, 400);
        assert!(detail.contains(named), "{query}: {detail}");
    }
}

#[test]
fn unknown_names_of_a_question_are_404() {
    let api = Api::unix(Control::Answers);
    let error = |query: &str| explain(&api, &format!("client=10.0.0.1&{query}")).error();
    assert_eq!(error("frontend=x"), (404, "unknown frontend".to_owned()));
    assert_eq!(error("frontend=in&without=x/a"), (404, "unknown pool".to_owned()));
    assert_eq!(error("frontend=in&without=web/x"), (404, "unknown backend".to_owned()));
    assert_eq!(error("frontend=in&with=weight:web/x=2"), (404, "unknown backend".to_owned()));
}

#[test]
fn certain_forecast_names_backend_and_retries() {
    let api = Api::unix(Control::Answers);
    let forecast = told(&api, "client=10.1.2.3&frontend=in");
    let pick = &forecast["pick"];
    assert_eq!((&pick["certain"], &pick["why"]), (&json!(true), &json!("hash")), "{forecast:#}");
    assert_eq!(pick["figures"]["kind"], "slot");
    assert_eq!(forecast["pool"]["candidates"], 3);
    assert_eq!(forecast["local"], "127.0.0.1:80");
    assert_eq!(forecast["admission"]["allowed"], true);
    let mut all: Vec<&Value> = vec![&pick["backend"]["backend"]];
    all.extend(pick["retries"].as_array().unwrap().iter().map(|retry| &retry["backend"]));
    all.sort_by_key(|name| name.to_string());
    assert_eq!(all, ["a", "b", "c"], "{forecast:#}");
    let turn = told(&api, "client=10.1.2.3&frontend=turns");
    assert_eq!((&turn["pick"]["why"], &turn["pick"]["shares"]), (&json!("turn"), &json!([])));
}

#[test]
fn forecast_of_draws_has_shares() {
    let api = Api::unix(Control::Answers);
    let pick = told(&api, "client=10.1.2.3&frontend=drawn&with=weight:drawn/b=9")["pick"].take();
    assert_eq!((&pick["certain"], &pick["backend"]["backend"]), (&json!(false), &json!("b")));
    let shares = pick["shares"].as_array().unwrap();
    let percent = shares[0]["percent"].as_f64().unwrap();
    assert!((percent - 90.0).abs() < 1.0, "{pick:#}");
    assert_eq!(pick["figures"], json!({"kind": "share", "weight": 9, "total": 10}));
    assert!(pick["draws"].as_u64().unwrap() >= 1_000);
}

#[test]
fn excluded_backend_of_source_hash_moves_only_its_own_clients() {
    let api = Api::unix(Control::Answers);
    let mut moved = 0;
    for last in 0..40 {
        let query = format!("client=10.1.2.{last}&frontend=in");
        let before = told(&api, &query)["pick"]["backend"].take();
        let after = told(&api, &format!("{query}&without=web/b"));
        let pick = &after["pick"];
        assert_eq!(pick["unchanged"], before, "{after:#}");
        assert_ne!(pick["backend"]["backend"], "b", "{after:#}");
        if before["backend"] == "b" {
            moved += 1;
        } else {
            assert_eq!(pick["backend"], before, "{after:#}");
        }
        let skipped = &after["pool"]["skipped"][0];
        assert_eq!((&skipped["backend"], &skipped["reason"]), (&json!("b"), &json!("excluded")));
        assert_eq!(after["pool"]["skipped_total"], 1);
    }
    assert!(moved > 0);
}

#[test]
fn forecast_without_any_backend_says_what_the_client_sees() {
    let api = Api::unix(Control::Answers);
    let query = "client=10.1.2.3&frontend=turns&without=turns/a&without=turns/b";
    for forecast in [told(&api, query), told(&api, "client=10.1.2.3&frontend=empty")] {
        assert_eq!(forecast["pick"], Value::Null, "{forecast:#}");
        let refusal = &forecast["refusal"];
        assert_eq!((&refusal["cause"], &refusal["phase"]), (&json!("no-backend"), &json!("admit")));
        assert_eq!(refusal["waits_for"], Value::Null);
    }
}

#[test]
fn forecast_names_the_range_that_decides() {
    let api = Api::unix(Control::Answers);
    let allowed = told(&api, "client=10.1.2.3&frontend=few");
    let admission = &allowed["admission"];
    assert_eq!(admission["rule"], json!({"allows": true, "range": "10.0.0.0/8"}));
    assert_eq!(admission["source"]["source"], "10.1.2.0/24");
    assert_eq!(admission["source"]["connections_max"], 2);
    let denied = told(&api, "client=10.9.2.3&frontend=few");
    assert_eq!(denied["admission"]["rule"], json!({"allows": false, "range": "10.9.0.0/16"}));
    assert_eq!((&denied["refusal"]["cause"], &denied["route"]), (&json!("denied"), &Value::Null));
    let outside = told(&api, "client=192.0.2.1&frontend=few");
    assert_eq!(outside["admission"]["rule"], Value::Null);
    let listed = |client: &str| {
        let told = told(&api, &format!("client={client}&frontend=few"));
        told["admission"]["rule"].clone()
    };
    assert_eq!(listed("172.16.5.1"), json!({"allows": false, "range": "/deny"}));
    assert_eq!(listed("172.16.6.1"), json!({"allows": true, "range": "/allow"}));
    assert_eq!(outside["refusal"]["cause"], "denied");
}

#[test]
fn forecast_says_why_earlier_routes_do_not_match() {
    let api = Api::unix(Control::Answers);
    let second = told(&api, "client=10.1.2.3&frontend=routed&address=127.0.0.1");
    assert_eq!(second["local"], "127.0.0.1:85");
    assert_eq!((&second["route"]["position"], &second["route"]["routes"]), (&json!(2), &json!(2)));
    let mismatch = json!([{"position": 1, "condition": "addresses", "values": "10.0.0.5/32"}]);
    assert_eq!(second["route"]["mismatches"], mismatch);
    assert_eq!(second["pool"]["name"], "turns");
    let refused = told(&api, "client=10.1.2.3&frontend=routed&address=10.0.0.5:85");
    assert_eq!(refused["refusal"]["cause"], "route");
    let last = told(&api, "client=192.0.2.1&frontend=routed&address=127.0.0.1");
    assert_eq!((&last["route"]["position"], &last["pool"]["name"]), (&Value::Null, &json!("web")));
    assert_eq!(last["route"]["mismatches"].as_array().unwrap().len(), 2);
}

#[test]
fn questions_need_the_same_permissions_as_other_reads() {
    let api = Api::tcp("127.0.0.1:0", None);
    assert_eq!(explain(&api, "client=10.1.2.3&frontend=in").status, 200);
    let posted = api.ask("POST", "/v1/explain?session=1");
    assert_eq!(posted.error().0, 403, "{posted:?}");
    let socket = Api::unix(Control::Answers);
    assert_eq!(socket.ask("POST", "/v1/explain?session=1").error().0, 405);
}

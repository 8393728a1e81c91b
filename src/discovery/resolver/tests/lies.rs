//! Servers that answer wrongly, slowly or not at all.

use super::*;
use std::sync::atomic::{AtomicBool, Ordering};

const GOOD: &[&str] = &["192.0.2.1"];

async fn liar(
    script: impl FnMut(&LiarQuestion) -> Vec<LiarStep> + Send + 'static,
) -> (DnsLiar, TestResolver) {
    let liar = DnsLiar::start(script).await;
    let test = TestResolver::new(&[liar.address]);
    (liar, test)
}

#[tokio::test]
async fn wrong_ids_and_questions_are_ignored_and_counted() {
    let (_liar, test) = liar(|question| {
        let forged = question.addresses(60, &["192.0.2.66"]);
        let good = question.addresses(60, GOOD);
        let messages = [
            forged.clone().id(question.id ^ 1).bytes(),
            forged.question(Some(("other.example", question.kind))).bytes(),
            b"garbage".to_vec(),
            Vec::new(),
            good.bytes(),
        ];
        messages.map(LiarStep::Send).to_vec()
    })
    .await;
    assert_eq!(test.host("web.example").await.unwrap(), GOOD);
    assert_eq!(
        test.resolver.counters().results(QuestionResult::Foreign),
        8,
        "4 for A and 4 for AAAA"
    );
}

#[tokio::test]
async fn datagrams_of_other_hosts_do_not_reach_the_resolver() {
    let other = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    let (_liar, test) = liar(move |question| {
        let forged = question.addresses(60, &["192.0.2.66"]).bytes();
        let _ = other.send_to(&forged, ("127.0.0.1", question.port));
        let mut steps = vec![LiarStep::Wait(Duration::from_millis(50))];
        steps.extend(question.addresses(60, GOOD).send());
        steps
    })
    .await;
    assert_eq!(test.host("web.example").await.unwrap(), GOOD);
    assert_eq!(test.resolver.counters().results(QuestionResult::Foreign), 0);
}

#[tokio::test]
async fn many_forged_datagrams_lead_to_tcp() {
    let (_liar, test) = liar(|question| {
        let forged = question.addresses(60, &["192.0.2.66"]).id(question.id ^ 1);
        let count = if question.tcp { 0 } else { 20 };
        let mut steps = vec![LiarStep::Send(forged.bytes()); count];
        steps.extend(question.addresses(60, GOOD).send());
        steps
    })
    .await;
    assert_eq!(test.host("web.example").await.unwrap(), GOOD);
    assert_eq!(count(&test.resolver.counters().over_tcp), 2);
}

#[tokio::test]
async fn truncated_and_malformed_datagrams_lead_to_tcp() {
    let (liar, test) = liar(|question| match (question.tcp, question.kind) {
        (true, _) => question.addresses(60, GOOD).send(),
        (false, TYPE_A) => question.addresses(60, &["192.0.2.66"]).truncated().send(),
        (false, _) => {
            let mut bytes = question.addresses(60, &["2001:db8::66"]).bytes();
            bytes.truncate(bytes.len() - 3);
            vec![LiarStep::Send(bytes)]
        }
    })
    .await;
    assert_eq!(test.host("web.example").await.unwrap(), GOOD);
    assert_eq!(liar.seen().iter().filter(|question| question.tcp).count(), 2);
    assert_eq!(test.resolver.counters().results(QuestionResult::Malformed), 1);
}

#[tokio::test]
async fn answers_that_stay_truncated_or_loop_are_failures() {
    let (_liar, test) = liar(|question| {
        let loops = question.reply().record("loop.example", 9, LiarData::Alias("loop.example"));
        match &*question.name {
            "tc.example" => question.reply().truncated().send(),
            "loop.example" => loops.send(),
            _ => vec![LiarStep::Send(question.reply().id(question.id ^ 1).bytes())],
        }
    })
    .await;
    let truncated = test.failure("tc.example").await;
    assert_eq!(truncated.why, SourceFailure::Protocol);
    assert!(truncated.detail.contains("truncated"), "{truncated}");
    let looped = test.failure("loop.example").await;
    assert!(looped.detail.contains("loop of aliases"), "{looped}");
    // Only foreign datagrams come, in both rounds.
    let silent = test.failure("other.example").await;
    assert_eq!(silent.why, SourceFailure::Timeout);
}

#[tokio::test]
async fn slow_bytes_over_tcp_end_at_the_timeout() {
    let (_liar, test) = liar(|question| {
        let good = question.addresses(60, GOOD).bytes();
        match question.tcp {
            false => question.reply().truncated().send(),
            true => vec![
                LiarStep::Drip((good.len() as u16).to_be_bytes().to_vec(), Duration::ZERO),
                LiarStep::Drip(good, Duration::from_millis(100)),
            ],
        }
    })
    .await;
    let start = clock::now();
    assert_eq!(test.failure("web.example").await.why, SourceFailure::Timeout);
    let took = clock::now() - start;
    assert!(took < Duration::from_secs(4), "two rounds of 1 s: {took:?}");
}

#[tokio::test]
async fn servers_without_edns_are_asked_again_without_it() {
    let (liar, test) = liar(|question| match question.edns {
        true => question.reply().code(1).question(None).send(),
        false => question.addresses(60, GOOD).send(),
    })
    .await;
    assert_eq!(test.host("web.example").await.unwrap(), GOOD);
    assert_eq!(liar.seen().len(), 4);
}

#[tokio::test]
async fn lost_datagrams_are_repeated_without_edns() {
    let (_liar, test) = liar(|question| match question.edns {
        true => Vec::new(),
        false => question.addresses(60, GOOD).send(),
    })
    .await;
    assert_eq!(test.host("web.example").await.unwrap(), GOOD);
}

#[tokio::test]
async fn the_next_server_is_asked_after_a_failure_or_silence() {
    for first in [Some(2), Some(5), Some(4), None] {
        let bad = DnsLiar::start(move |question| {
            first.map_or_else(Vec::new, |code| question.reply().code(code).send())
        });
        let (bad, good) = (bad.await, DnsLiar::start(|q| q.addresses(60, GOOD).send()).await);
        let test = TestResolver::new(&[bad.address, good.address]);
        assert_eq!(test.host("web.example").await.unwrap(), GOOD);
        let before = bad.seen().len();
        assert_eq!(test.host("other.example").await.unwrap(), GOOD);
        let asked = bad.seen().len() - before;
        assert_eq!(asked, if first.is_some() { 2 } else { 0 }, "a silent server comes last");
    }
}

#[tokio::test]
async fn a_closed_port_is_a_failure_at_once() {
    let gone = DnsLiar::start(|_| Vec::new()).await.address;
    let test = TestResolver::new(&[gone]);
    let start = clock::now();
    tokio::time::sleep(Duration::from_millis(20)).await;
    let failure = test.failure("web.example").await;
    assert_eq!(failure.why, SourceFailure::Connect, "{failure}");
    assert!(clock::now() - start < Duration::from_millis(900));
}

#[tokio::test]
async fn refused_and_missing_records_say_what_the_server_answered() {
    let (liar, test) = liar(|question| match &*question.name {
        "refused.example" => question.reply().code(5).send(),
        "empty.example" => question.reply().send(),
        _ => question.addresses(60, &["0.0.0.0"]).send(),
    })
    .await;
    let refused = test.failure("refused.example").await;
    assert_eq!(refused.why, SourceFailure::Auth);
    let expected = format!("cannot resolve refused.example AAAA: {}: REFUSED", liar.address);
    assert_eq!(refused.detail, expected);
    for name in ["empty.example", "zero.example"] {
        let empty = test.failure(name).await;
        assert_eq!(empty.why, SourceFailure::NotFound);
        assert!(empty.detail.contains("NOERROR"), "{empty}");
    }
}

#[tokio::test]
async fn one_question_serves_all_that_ask_at_the_same_time() {
    let (liar, test) = liar(|question| {
        let mut steps = vec![LiarStep::Wait(Duration::from_millis(50))];
        steps.extend(question.addresses(60, GOOD).send());
        steps
    })
    .await;
    let mut tasks = tokio::task::JoinSet::new();
    for _ in 0..100 {
        let resolver = test.resolver.clone();
        tasks.spawn(async move { resolver.host("web.example").await.unwrap() });
    }
    while let Some(found) = tasks.join_next().await {
        assert_eq!(found.unwrap().len(), 1);
    }
    assert_eq!((liar.count(TYPE_A), liar.count(TYPE_AAAA)), (1, 1));
}

#[tokio::test]
async fn a_caller_that_stops_to_wait_does_not_end_the_question() {
    let (liar, test) = liar(|question| {
        let mut steps = vec![LiarStep::Wait(Duration::from_millis(200))];
        steps.extend(question.addresses(60, GOOD).send());
        steps
    })
    .await;
    let short = Duration::from_millis(50);
    assert!(tokio::time::timeout(short, test.host("web.example")).await.is_err());
    assert_eq!(test.host("web.example").await.unwrap(), GOOD);
    assert_eq!(liar.count(TYPE_A), 1);
}

#[tokio::test]
async fn last_known_addresses_count_while_no_server_answers() {
    let up = Arc::new(AtomicBool::new(true));
    let is_up = Arc::clone(&up);
    let (_liar, test) = liar(move |question| match is_up.load(Ordering::Relaxed) {
        true => question.addresses(0, GOOD).send(),
        false => question.reply().code(2).send(),
    })
    .await;
    assert_eq!(test.host("web.example").await.unwrap(), GOOD);
    up.store(false, Ordering::Relaxed);
    eventually(async || {
        count(&test.resolver.counters().failures) > 0 || {
            assert_eq!(test.host("web.example").await.unwrap(), GOOD);
            false
        }
    })
    .await;
    assert_eq!(test.host("web.example").await.unwrap(), GOOD);
    assert!(test.host("other.example").await.is_err());
}

#[tokio::test]
async fn last_known_addresses_count_after_a_second_of_silence() {
    let (_liar, test) = liar(|question| match question.kind {
        TYPE_A => question.addresses(0, GOOD).send(),
        _ => question.reply().send(),
    })
    .await;
    assert_eq!(test.host("web.example").await.unwrap(), GOOD);
    let silent = DnsLiar::start(|_| Vec::new()).await;
    let servers = Some(vec![silent.address]);
    test.resolver.configure(DnsConfig { servers, ..DnsConfig::default() });
    let start = clock::now();
    assert_eq!(test.host("web.example").await.unwrap(), GOOD);
    let took = clock::now() - start;
    assert!(took < Duration::from_millis(1800), "{took:?}, and two rounds take 2 s");
}

#[tokio::test]
async fn each_lookup_has_another_port_and_each_question_another_id() {
    let (liar, test) = liar(|question| question.addresses(60, GOOD).send()).await;
    for name in 0..20 {
        test.host(&format!("web{name}.example")).await.unwrap();
    }
    let seen = liar.seen();
    let ports: std::collections::HashSet<u16> = seen.iter().map(|question| question.port).collect();
    let ids: std::collections::HashSet<u16> = seen.iter().map(|question| question.id).collect();
    assert_eq!(seen.len(), 40);
    assert!(ports.len() > 15 && ids.len() > 35, "{} ports, {} ids", ports.len(), ids.len());
}

#[tokio::test]
async fn names_that_are_due_together_share_a_socket_and_none_waits_for_another() {
    let (liar, test) = liar(|question| match &*question.name {
        "n7.example" => question.reply().code(2).send(),
        "n8.example" => Vec::new(),
        _ => question.addresses(60, GOOD).send(),
    })
    .await;
    let names: Vec<String> = (0..10).map(|number| format!("n{number}.example")).collect();
    let began = clock::now();
    let ask = |name: &String| {
        let (resolver, name) = (test.resolver.clone(), name.clone());
        tokio::spawn(async move { (resolver.host(&name).await, clock::now() - began) })
    };
    let asked: Vec<_> = names.iter().map(ask).collect();
    let mut ended = Vec::new();
    for one in asked {
        ended.push(one.await.unwrap());
    }
    for (at, (result, after)) in ended.iter().enumerate() {
        match at {
            // The server is silent for one second in each of two rounds.
            8 => assert!(result.is_err() && *after > Duration::from_secs(1), "{result:?}"),
            7 => assert!(result.is_err() && *after < Duration::from_secs(1), "{after:?}"),
            _ => assert!(result.is_ok() && *after < Duration::from_secs(1), "{result:?} {after:?}"),
        }
    }
    let firsts = liar.seen().into_iter().take(20).map(|question| question.port);
    assert_eq!(firsts.collect::<std::collections::HashSet<_>>().len(), 1);
}

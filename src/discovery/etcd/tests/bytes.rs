//! Codec and lines: any bytes, cut at any place.

use super::super::codec::{
    Base64Bytes, GatewayRefusal, RangeAnswer, RangeRequest, StoreEventKind, StreamLine,
    WatchMessage,
};
use super::super::contents::PrefixContents;
use super::super::followed::Followed;
use super::*;
use crate::lines::LineBuffer;
use proptest::prelude::*;

const MESSAGE: &str = r#"{"result":{"header":{"cluster_id":"9","revision":"7","raft_term":"2"},
    "watch_id":"1","events":[{"kv":{"key":"L2Ev","mod_revision":"7","value":"eA=="}},
    {"type":"DELETE","kv":{"key":"L2Iv","mod_revision":"7"}}]}}"#;

fn message(text: &str) -> WatchMessage {
    match StreamLine::parse(text.as_bytes()).unwrap() {
        StreamLine::Watch(message) => message,
        StreamLine::Ended(refusal) => panic!("{refusal:?}"),
    }
}

#[test]
fn recorded_answers_of_etcd_3_4_are_read() {
    let read = message(MESSAGE);
    assert_eq!((read.header.revision, read.watch_id, read.events.len()), (7, 1, 2));
    assert_eq!(read.events[0].kv.key, Base64Bytes(b"/a/".to_vec()));
    assert_eq!(read.events[1].kind, StoreEventKind::Delete);
    let canceled = message(
        r#"{"result":{"header":{"cluster_id":"9","raft_term":"2"},"watch_id":"2",
            "canceled":true,"compact_revision":"3"}}"#,
    );
    let refusal = GatewayRefusal::of_cancel(&canceled);
    assert_eq!((refusal.why, refusal.token), (SourceFailure::Compacted, false));
    let of_reason = |reason: &str| {
        let line = format!(
            r#"{{"result":{{"watch_id":"-1","created":true,"canceled":true,"cancel_reason":
               "rpc error: code = {reason}"}}}}"#
        );
        let refusal = GatewayRefusal::of_cancel(&message(&line));
        (refusal.why, refusal.token)
    };
    let denied = of_reason("PermissionDenied desc = etcdserver: permission denied");
    assert_eq!(denied, (SourceFailure::Auth, false));
    let nameless = of_reason("InvalidArgument desc = etcdserver: user name is empty");
    assert_eq!(nameless, (SourceFailure::Auth, true));
    let expired = of_reason("Unauthenticated desc = etcdserver: invalid auth token");
    assert_eq!(expired, (SourceFailure::Auth, true));
    let ended = StreamLine::parse(
        br#"{"error":{"grpc_code":14,"http_code":503,"message":"etcdserver: no leader"}}"#,
    );
    let Ok(StreamLine::Ended(refusal)) = ended else { panic!("{ended:?}") };
    assert_eq!(refusal.why, SourceFailure::Stale);
}

#[test]
fn refusals_have_their_class() {
    use SourceFailure::{Auth, Connect, NotFound, Protocol, Timeout};
    let of = |status, message: &str, code| {
        let body = format!(r#"{{"error":"x","message":"etcdserver: {message}","code":{code}}}"#);
        let refusal = GatewayRefusal::of_answer(status, body.as_bytes());
        (refusal.why, refusal.token)
    };
    assert_eq!(of(401, "invalid auth token", 16), (Auth, true));
    assert_eq!(of(400, "user name is empty", 3), (Auth, true));
    assert_eq!(of(400, "revision of auth store is old", 3), (Auth, true));
    assert_eq!(of(400, "authentication failed, invalid user ID or password", 3), (Auth, false));
    assert_eq!(of(403, "permission denied", 7), (Auth, false));
    assert_eq!(of(404, "requested lease not found", 5), (NotFound, false));
    assert_eq!(of(503, "request timed out", 14), (Timeout, false));
    assert_eq!(of(503, "too many requests", 8), (Connect, false));
    assert_eq!(of(400, "duplicate key given in txn request", 3), (Protocol, false));
    let page = GatewayRefusal::of_answer(403, b"<html>Forbidden</html>");
    assert_eq!((page.why, page.token), (Auth, false));
}

#[test]
fn values_have_the_form_of_listed_members() {
    use tidegate_core::discovery::Wish;
    let read = |name: &str, value: &str| {
        let (name, value) = (b64(&key(name)), b64(value));
        let line =
            format!(r#"{{"result":{{"events":[{{"kv":{{"key":"{name}","value":"{value}"}}}}]}}}}"#);
        let mut contents = PrefixContents::new(WEB.into());
        contents.apply(message(&line).events);
        contents.whole(true).members.first().cloned()
    };
    let full = r#"{"address":"[::2]:80","weight":5,"state":"draining","backup":true,
                   "labels":{"zone":"a"}}"#;
    let member = read("a", full).unwrap();
    assert_eq!((member.weight, member.tier, member.wish), (Some(5), 1, Wish::Draining));
    assert_eq!((&*member.name, &*member.raw), ("a", "draining"));
    assert_eq!(member.labels.iter().collect::<Vec<_>>(), [("zone", "a")]);
    assert_eq!(read("a", &value(80)).unwrap().wish, Wish::Sessions);
    assert_eq!(&*read("a", r#""10.0.0.1:80""#).unwrap().name, "a");
    let named = r#"{"address":"10.0.0.1:80","name":"own"}"#;
    assert_eq!(&*read("a", named).unwrap().name, "own");
    for wrong in [
        r#"{"address":"10.0.0.1:0"}"#,
        r#"{"address":"0.0.0.0:80"}"#,
        r#"{"address":"web:80"}"#,
        r#"{"address":"10.0.0.1:80","weight":0}"#,
        r#"{"address":"10.0.0.1:80","wieght":1}"#,
        r#"{"address":"10.0.0.1:80","state":"up"}"#,
    ] {
        assert_eq!(read("a", wrong), None, "{wrong}");
    }
    for name in ["a/b", "a b", &"x".repeat(129)] {
        assert_eq!(read(name, &value(80)), None, "{name}");
    }
}

#[test]
fn unreadable_entries_and_members_with_another_name_have_their_keys() {
    let put = |name: &[u8], value: &str| {
        let key = [WEB.as_bytes(), name].concat();
        let (key, value) =
            (base64::Engine::encode(&base64::engine::general_purpose::STANDARD, key), b64(value));
        let line =
            format!(r#"{{"result":{{"events":[{{"kv":{{"key":"{key}","value":"{value}"}}}}]}}}}"#);
        message(&line).events
    };
    let mut contents = PrefixContents::new(WEB.into());
    let named = r#"{"address":"10.0.0.7:80","name":"own"}"#;
    for (name, value) in [("a", &*value(80)), ("b", named), ("c", "no JSON"), ("b", "no JSON")] {
        contents.apply(put(name.as_bytes(), value));
    }
    let set = contents.whole(true);
    assert_eq!(set.unreadable.text(), r#"2 unreadable: "b", "c""#);
    assert_eq!(&*set.keys, [("10.0.0.7:80".parse().unwrap(), "b".into())], "b keeps its member");
    assert!(set.unreadable.are_named());
    contents.apply(put(b"\xff", "no JSON"));
    let unreadable = contents.whole(true).unreadable;
    assert_eq!((unreadable.count(), unreadable.are_named()), (3, false), "a key is no text");
}

#[test]
fn ranges_end_after_the_prefix() {
    let end = |prefix: &str| RangeRequest::below(prefix).range_end.0;
    assert_eq!(end("/a/"), b"/a0");
    assert_eq!(end(""), [0]);
    let text = serde_json::to_string(&RangeRequest::below("/a/")).unwrap();
    assert_eq!(text, r#"{"key":"L2Ev","range_end":"L2Ew"}"#);
}

#[test]
fn list_beyond_the_bound_is_cut_and_counted() {
    let entry = |at: usize| {
        format!(
            "{{\"key\":\"{}\",\"value\":\"{}\"}}",
            b64(&key(&format!("{at:05}"))),
            b64(&value(80))
        )
    };
    let kvs = (0..10_001).map(entry).collect::<Vec<_>>().join(",");
    let answer =
        format!("{{\"header\":{{\"revision\":\"9\"}},\"kvs\":[{kvs}],\"count\":\"12000\"}}");
    let answer: RangeAnswer = serde_json::from_str(&answer).unwrap();
    let mut contents = PrefixContents::new(WEB.into());
    assert!(contents.replace(answer.kvs, answer.count, 9));
    let set = contents.whole(true);
    assert_eq!(
        (set.members.len(), set.unreadable.count(), contents.is_cut()),
        (10_000, 2000, true)
    );
    // The watch adds an entry to a full set.
    let entries = (0..10_000).map(entry).collect::<Vec<_>>().join(",");
    let answer: RangeAnswer = serde_json::from_str(&format!("{{\"kvs\":[{entries}]}}")).unwrap();
    contents.replace(answer.kvs, 10_000, 10);
    let (name, value) = (b64(&key("one-more")), b64(&value(80)));
    let put = format!(
        r#"{{"result":{{"events":[{{"kv":{{"key":"{name}","value":"{value}","mod_revision":"{}"}}}}]}}}}"#,
        i64::MAX
    );
    assert!(!contents.is_cut() && contents.apply(message(&put).events));
    let set = contents.whole(true);
    assert_eq!((set.members.len(), set.unreadable.count(), contents.is_cut()), (10_000, 1, true));
}

#[test]
fn events_beyond_the_bound_are_counted_and_not_kept() {
    let event = |at: usize| {
        let (key, value) = (b64(&key(&format!("{at:05}"))), b64(&value(80)));
        format!("{{\"kv\":{{\"key\":\"{key}\",\"value\":\"{value}\"}}}}")
    };
    let events = (0..10_005).map(event).collect::<Vec<_>>().join(",");
    let mut contents = PrefixContents::new(WEB.into());
    contents.apply(message(&format!("{{\"result\":{{\"events\":[{events}]}}}}")).events);
    let set = contents.whole(true);
    assert_eq!((set.members.len(), set.unreadable.count(), contents.is_cut()), (10_000, 5, true));
}

#[test]
fn entries_of_two_bytes_cost_no_memory() {
    let many = vec!["{}"; 20_000].join(",");
    assert!(serde_json::from_str::<RangeAnswer>(&format!("{{\"kvs\":[{many}]}}")).is_err());
    assert!(StreamLine::parse(br#"{"result":{"events":[{}]}}"#).is_err());
    assert!(StreamLine::parse(br#"{"result":{"events":[{"kv":{}}]}}"#).is_err());
    let keys = vec![r#"{"key":"YQ=="}"#; 10_002].join(",");
    let error = serde_json::from_str::<RangeAnswer>(&format!("{{\"kvs\":[{keys}]}}"));
    assert!(error.unwrap_err().to_string().contains("at most 10001 entries"));
}

#[test]
fn numbers_at_their_ends_do_not_overflow() {
    let number = i64::MIN;
    let read = message(&format!(r#"{{"result":{{"watch_id":"{number}"}}}}"#));
    assert_eq!(read.position(3), None);
    assert_eq!(message(r#"{"result":{"watch_id":"2"}}"#).position(3), Some(1));
    let mut followed = Followed::new(WEB.into());
    followed.take_list(Vec::new(), 0, i64::MAX);
    assert_eq!(followed.watch(1).start_revision, i64::MAX);
    assert_eq!(followed.check().0.min_mod_revision, i64::MAX);
}

fn b64(text: &str) -> String {
    serde_json::to_string(&Base64Bytes(text.as_bytes().to_vec())).unwrap().replace('"', "")
}

proptest! {
    #[test]
    fn lines_cut_at_any_byte_are_the_same_lines(
        lines in proptest::collection::vec("[a-z]{0,40}", 0..20),
        cuts in proptest::collection::vec(1..50_usize, 1..20),
    ) {
        let bytes = lines.iter().flat_map(|line| format!("{line}\n").into_bytes());
        let bytes = bytes.collect::<Vec<u8>>();
        let (mut buffer, mut found, mut at) = (LineBuffer::new(1 << 20), Vec::new(), 0);
        for size in cuts.iter().cycle() {
            if at == bytes.len() {
                break;
            }
            let end = bytes.len().min(at + size);
            buffer.push(&bytes[at..end]).unwrap();
            at = end;
            while let Some(line) = buffer.next_line() {
                found.push(String::from_utf8(line.to_vec()).unwrap());
            }
        }
        let wanted = lines.into_iter().filter(|line| !line.is_empty()).collect::<Vec<_>>();
        prop_assert_eq!(found, wanted);
    }

    #[test]
    fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        let _ = StreamLine::parse(&bytes);
        let _ = GatewayRefusal::of_answer(500, &bytes);
        let _ = serde_json::from_slice::<RangeAnswer>(&bytes);
    }

    #[test]
    fn no_damaged_message_panics(at in 0..MESSAGE.len(), byte in any::<u8>(), cut in any::<bool>()) {
        let mut bytes = MESSAGE.as_bytes().to_vec();
        bytes[at] = byte;
        if cut {
            bytes.truncate(at);
        }
        if let Ok(StreamLine::Watch(message)) = StreamLine::parse(&bytes) {
            let mut contents = PrefixContents::new("/a/".into());
            contents.apply(message.events);
            contents.whole(true);
        }
    }

    /// The contents after any events are those of a list at the end.
    #[test]
    fn events_lead_to_the_contents_of_a_list(
        changes in proptest::collection::vec((0..6_u8, 0..4_u16), 0..40),
    ) {
        let mut followed = PrefixContents::new(WEB.into());
        let mut store = std::collections::BTreeMap::new();
        for (revision, (name, port)) in (1..).zip(&changes) {
            let name = key(&name.to_string());
            let (kind, value) = match port {
                0 => ("DELETE", String::new()),
                port => ("PUT", value(*port)),
            };
            match port {
                0 => drop(store.remove(&name)),
                _ => drop(store.insert(name.clone(), value.clone())),
            }
            let line = format!(
                r#"{{"result":{{"events":[{{"type":"{kind}","kv":{{"key":"{}","value":"{}",
                   "mod_revision":"{revision}"}}}}]}}}}"#,
                b64(&name), b64(&value),
            );
            followed.apply(message(&line).events);
        }
        let listed = store.iter().map(|(key, value)| {
            format!(r#"{{"key":"{}","value":"{}"}}"#, b64(key), b64(value))
        });
        let listed = format!(r#"{{"kvs":[{}]}}"#, listed.collect::<Vec<_>>().join(","));
        let listed: RangeAnswer = serde_json::from_str(&listed).unwrap();
        let mut fresh = PrefixContents::new(WEB.into());
        fresh.replace(listed.kvs, store.len() as i64, changes.len() as i64);
        prop_assert_eq!(followed.whole(true).members, fresh.whole(true).members);
        prop_assert_eq!(followed.count(), store.len() as i64);
    }
}

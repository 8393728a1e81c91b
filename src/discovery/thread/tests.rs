//! Tests of the thread: which questions run, what they share, how they end.

use super::*;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener};
use std::path::PathBuf;
use std::sync::atomic::AtomicUsize;
use std::time::Instant;
use tidegate_net::clock;

/// Longest wait for an answer.
const PATIENCE: Duration = Duration::from_secs(20);

fn key(pool: &str) -> SourceKey {
    SourceKey { pool: pool.into(), backend: None }
}

fn file(path: &str) -> SourceQuestion {
    SourceQuestion::File { path: PathBuf::from(path) }
}

fn url(address: SocketAddr) -> SourceQuestion {
    SourceQuestion::Http {
        url: format!("http://{address}/list"),
        interval: Duration::from_secs(1),
        ca_file: None,
        token_file: None,
    }
}

/// A server that answers each request with a list and counts requests.
fn list_server() -> (SocketAddr, Arc<AtomicUsize>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let (address, count) = (listener.local_addr().unwrap(), Arc::<AtomicUsize>::default());
    let requests = Arc::clone(&count);
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { return };
            let requests = Arc::clone(&requests);
            std::thread::spawn(move || {
                let mut request = [0; 4096];
                while stream.read(&mut request).is_ok_and(|read| read > 0) {
                    requests.fetch_add(1, Ordering::Relaxed);
                    let body = r#"["10.0.0.1:80"]"#;
                    let length = body.len();
                    let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {length}\r\n\r\n");
                    let _ = stream.write_all(format!("{head}{body}").as_bytes());
                }
            });
        }
    });
    (address, count)
}

/// Waits until a condition holds.
fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let start = clock::now();
    while !holds() {
        assert!(clock::now().duration_since(start) < PATIENCE, "{what} did not happen");
        clock::pause(Duration::from_millis(5));
    }
}

/// Collects answers until one of this pool satisfies.
fn answer_of(answers: &Answers, pool: &str, wanted: impl Fn(&Told) -> bool) {
    eventually(pool, || {
        answers.take().iter().any(|answer| answer.key == key(pool) && wanted(&answer.told))
    });
}

fn is_whole(told: &Told) -> bool {
    matches!(told, Told::Whole(_))
}

#[test]
fn unchanged_questions_keep_running_and_gone_ones_end() {
    let (address, requests) = list_server();
    let answers = Answers::default();
    let thread = DiscoveryThread::start(answers.clone()).unwrap();
    let both = vec![(key("a"), url(address)), (key("b"), file("/nonexistent"))];
    thread.configure(both.clone(), DnsConfig::default());
    answer_of(&answers, "a", is_whole);
    answer_of(&answers, "b", |told| {
        matches!(told, Told::Failed { why: SourceFailure::NotFound, .. })
    });
    // A source that restarts would tell the whole list again.
    thread.configure(both, DnsConfig::default());
    answer_of(&answers, "a", |told| {
        assert!(!is_whole(told));
        true
    });
    assert_eq!(thread.counters().len(), 2);
    thread.refresh();
    answer_of(&answers, "a", is_whole);
    thread.configure(vec![(key("b"), file("/nonexistent"))], DnsConfig::default());
    let after = requests.load(Ordering::Relaxed);
    clock::pause(Duration::from_millis(1500));
    assert!(requests.load(Ordering::Relaxed) <= after + 1);
    assert!(answers.take().iter().all(|answer| answer.key == key("b")));
}

#[test]
fn changed_question_restarts_with_the_same_counters() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("list");
    std::fs::write(&path, r#"["10.0.0.1:80"]"#).unwrap();
    let answers = Answers::default();
    let thread = DiscoveryThread::start(answers.clone()).unwrap();
    thread.configure(vec![(key("a"), file("/nonexistent"))], DnsConfig::default());
    answer_of(&answers, "a", |told| matches!(told, Told::Failed { .. }));
    thread.configure(vec![(key("a"), file(path.to_str().unwrap()))], DnsConfig::default());
    answer_of(&answers, "a", is_whole);
    assert!(thread.counters()[0].1.failures(SourceFailure::NotFound) >= 1);
}

#[test]
fn thread_that_another_one_replaces_tells_nothing_more() {
    let (address, requests) = list_server();
    let answers = Answers::default();
    let old = DiscoveryThread::start(answers.clone()).unwrap();
    old.configure(vec![(key("a"), url(address))], DnsConfig::default());
    answer_of(&answers, "a", is_whole);
    let new = DiscoveryThread::start(answers.clone()).unwrap();
    new.configure(vec![(key("a"), file("/no/such/list"))], DnsConfig::default());
    let before = requests.load(Ordering::Relaxed);
    eventually("two more answers to the old thread", || {
        let failed = |told: &Told| matches!(told, Told::Failed { .. });
        assert!(answers.take().iter().all(|answer| failed(&answer.told)));
        requests.load(Ordering::Relaxed) >= before + 3
    });
}

#[test]
fn end_takes_less_than_a_second() {
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let answers = Answers::default();
    let thread = DiscoveryThread::start(answers).unwrap();
    let address = silent.local_addr().unwrap();
    let questions = (0..50).map(|n| (key(&n.to_string()), url(address)));
    let files = (50..60).map(|n| (key(&n.to_string()), file("/nonexistent")));
    thread.configure(questions.chain(files).collect(), DnsConfig::default());
    eventually("start", || thread.counters().len() == 60);
    silent.accept().unwrap();
    let start = clock::now();
    drop(thread);
    let took = clock::now().duration_since(start);
    assert!(took < Duration::from_secs(1), "{took:?}");
}

#[test]
fn questions_beyond_the_bound_fail_until_there_is_room() {
    let answers = Answers::default();
    let thread = DiscoveryThread::start(answers.clone()).unwrap();
    let unreachable = SourceQuestion::Http {
        url: "ftp://x".to_owned(),
        interval: Duration::from_secs(1),
        ca_file: None,
        token_file: None,
    };
    let all: Vec<_> =
        (0..=QUESTIONS_MAX).map(|n| (key(&format!("{n:05}")), unreachable.clone())).collect();
    thread.configure(all.clone(), DnsConfig::default());
    let last = format!("{QUESTIONS_MAX:05}");
    let says = |part: &'static str| move |told: &Told| matches!(told, Told::Failed { detail, .. } if detail.contains(part));
    answer_of(&answers, &last, says("more than 4096"));
    assert_eq!(thread.counters().len(), QUESTIONS_MAX);
    thread.configure(all[1..].to_vec(), DnsConfig::default());
    answer_of(&answers, &last, says("ftp://x"));
}

#[test]
fn one_question_is_answered_once() {
    let (address, _) = list_server();
    let limit = Duration::from_millis(400);
    let ask = |question| ask_once(&question, &DnsConfig::default(), limit).unwrap();
    assert!(is_whole(&ask(url(address))));
    let Told::Failed { why, .. } = ask(file("/nonexistent")) else { panic!() };
    assert_eq!(why, SourceFailure::NotFound);
    let refused = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let Told::Failed { why, detail } = ask(url(refused)) else { panic!() };
    assert_eq!(why, SourceFailure::Connect, "{detail}");
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let Told::Failed { why, .. } = ask(url(silent.local_addr().unwrap())) else { panic!() };
    assert_eq!(why, SourceFailure::Timeout);
}

#[tokio::test]
async fn panicked_source_tells_a_failure_and_restarts() {
    let answers = Answers::default();
    let counters = Arc::<SourceCounters>::default();
    let teller = answers.teller(key("a"), Arc::clone(&counters));
    let panicking = || async { panic!("on purpose") };
    let mut task = tokio::task::JoinSet::new();
    task.spawn(supervise(panicking, teller));
    while counters.panics.load(Ordering::Relaxed) < 2 {
        answers.arrived().await;
        let [answer] = &answers.take()[..] else { panic!() };
        assert!(matches!(answer.told, Told::Failed { why: SourceFailure::Local, .. }));
    }
}

#[tokio::test]
async fn thread_that_ended_is_reported_and_restarts_with_all_questions() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("list");
    std::fs::write(&path, r#"["10.0.0.1:80"]"#).unwrap();
    let answers = Answers::default();
    let mut thread = DiscoveryThread::start(answers.clone()).unwrap();
    thread.configure(vec![(key("a"), file(path.to_str().unwrap()))], DnsConfig::default());
    answer_of(&answers, "a", is_whole);
    thread.panic_on_purpose();
    tokio::time::timeout(PATIENCE, thread.ended()).await.unwrap();
    thread.tell_ended();
    answer_of(&answers, "a", |told| matches!(told, Told::Failed { why: SourceFailure::Local, .. }));
    // The next thread also gets a question that came after the end.
    let questions = ["a", "b"].map(|name| (key(name), file(path.to_str().unwrap())));
    thread.configure(questions.to_vec(), DnsConfig::default());
    thread.restart().unwrap();
    answer_of(&answers, "b", is_whole);
    answer_of(&answers, "a", |_| true);
    assert!(thread.is_running());
}

/// Returns the longest delay of a tick of 1 ms on this thread, while `work` runs.
fn longest_delay(mut until: impl FnMut() -> bool) -> Duration {
    let mut longest = Duration::ZERO;
    let mut before: Instant = clock::now();
    while !until() {
        clock::pause(Duration::from_millis(1));
        let now = clock::now();
        longest = longest.max(now.duration_since(before));
        before = now;
    }
    longest
}

#[test]
fn answer_of_10_megabytes_delays_no_other_thread() {
    let entry = |n: usize| {
        let labels = "x".repeat(250);
        let filler = format!(
            r#""labels": {{"a": "{labels}", "b": "{labels}", "c": "{labels}", "d": "{labels}"}}"#
        );
        format!(r#"{{"address": "10.0.{}.{}:80", "weight": 5, {filler}}}"#, n / 256, n % 256)
    };
    let list = format!("[{}]", (0..9_500).map(entry).collect::<Vec<_>>().join(","));
    assert!(list.len() > 10_000_000, "{}", list.len());
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("list");
    std::fs::write(&path, list).unwrap();
    let answers = Answers::default();
    let thread = DiscoveryThread::start(answers.clone()).unwrap();
    thread.configure(vec![(key("a"), file(path.to_str().unwrap()))], DnsConfig::default());
    let start = clock::now();
    let longest = longest_delay(|| {
        answers.take().iter().any(|answer| match &answer.told {
            Told::Whole(set) => set.members.len() == 9_500,
            _ => false,
        })
    });
    let took = clock::now().duration_since(start);
    println!("10 MB list after {took:?}, longest delay of this thread {longest:?}");
    assert!(longest < Duration::from_millis(500), "{longest:?}");
}

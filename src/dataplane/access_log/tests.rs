//! Tests of the access log with real files, FIFOs and full devices.

use super::*;
use expect_test::expect;
use std::fs;
use std::io::Read;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tidegate_core::model::{ClientAddr, PeerAddr};
use tidegate_logging::syslog::SyslogForm;

fn record(worker: u32, session: u64) -> AccessLogRecord {
    AccessLogRecord {
        time: UNIX_EPOCH + Duration::from_micros(1_760_000_000_000_042),
        session,
        worker,
        generation: 3,
        frontend: Some("web".into()),
        client: ClientAddr::of_peer(PeerAddr::new("192.0.2.1:50000".parse().unwrap())),
        peer: None,
        probe: false,
        route: None,
        pool: Some("web".into()),
        backend: Some("a".into()),
        backend_address: Some("10.0.0.11:8080".into()),
        cause: "finished",
        phase: "closed",
        code: *b"--",
        timer: "",
        errno: None,
        closed_first: Some("client"),
        attempts: 1,
        why: Some("turn"),
        skipped: 2,
        tries: Vec::new(),
        bytes_in: 78,
        bytes_out: 1_234,
        bytes_undelivered: 5,
        connect: Some(Duration::from_micros(210)),
        first_byte: Some(Duration::from_millis(2)),
        duration: Duration::from_millis(1_500),
    }
}

fn line(record: &AccessLogRecord) -> String {
    let mut buffer = Vec::new();
    record.append_to(&mut buffer);
    String::from_utf8(buffer).unwrap()
}

fn syslog(path: &Path) -> AccessLogDestination {
    let header = SyslogHeader {
        form: SyslogForm::Rfc5424,
        facility: 16,
        host: "lb".to_owned(),
        pid: 7,
        kind: "access",
    };
    AccessLogDestination::Syslog(SyslogAddress::Unix(path.to_owned()), header)
}

/// Waits up to 10 s until `condition` holds.
fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = tidegate_net::clock::now() + Duration::from_secs(10);
    while !condition() {
        assert!(tidegate_net::clock::now() < deadline, "not within 10 s: {what}");
        std::thread::park_timeout(Duration::from_millis(2));
    }
}

fn sessions(path: &Path) -> Vec<(u64, u64)> {
    let text = fs::read_to_string(path).unwrap_or_default();
    let whole = &text[..text.rfind('\n').map_or(0, |end| end + 1)];
    whole
        .lines()
        .map(|line| {
            let value: serde_json::Value = serde_json::from_str(line).expect(line);
            (value["worker"].as_u64().unwrap(), value["session"].as_u64().unwrap())
        })
        .collect()
}

fn file(path: &Path) -> AccessLogDestination {
    AccessLogDestination::File(path.to_owned())
}

#[test]
fn line_has_exactly_the_documented_fields_in_order() {
    expect![[r#"
        {"time":"2025-10-09T08:53:20.000042Z","session":9,"worker":1,"generation":3,"frontend":"web","client":"192.0.2.1:50000","peer":null,"probe":false,"route":null,"pool":"web","backend":"a","backend_address":"10.0.0.11:8080","cause":"finished","phase":"closed","code":"--","timer":null,"errno":null,"closed_first":"client","attempts":1,"why":"turn","skipped":2,"tries":[],"bytes_in":78,"bytes_out":1234,"bytes_undelivered":5,"connect_seconds":0.00021,"first_byte_seconds":0.002,"duration_seconds":1.5}
    "#]]
    .assert_eq(&line(&record(1, 9)));
}

#[test]
fn unknown_values_are_null_and_special_characters_are_escaped() {
    let refused = AccessLogRecord {
        time: UNIX_EPOCH - Duration::from_secs(5),
        frontend: Some("we\"b\n".into()),
        pool: None,
        backend: None,
        backend_address: None,
        cause: "connect-timeout",
        timer: "connect_timeout",
        errno: Some(110),
        closed_first: None,
        tries: vec![TryRecord {
            backend: "b\"\n".into(),
            failure: "refused",
            errno: 111,
            took: Duration::from_millis(1),
        }],
        connect: None,
        first_byte: None,
        ..record(0, 1)
    };
    expect![[r#"
        {"time":"1970-01-01T00:00:00.000000Z","session":1,"worker":0,"generation":3,"frontend":"we\"b\n","client":"192.0.2.1:50000","peer":null,"probe":false,"route":null,"pool":null,"backend":null,"backend_address":null,"cause":"connect-timeout","phase":"closed","code":"--","timer":"connect_timeout","errno":110,"closed_first":null,"attempts":1,"why":"turn","skipped":2,"tries":[{"backend":"b\"\n","failure":"refused","errno":111,"seconds":0.001}],"bytes_in":78,"bytes_out":1234,"bytes_undelivered":5,"connect_seconds":null,"first_byte_seconds":null,"duration_seconds":1.5}
    "#]]
    .assert_eq(&line(&refused));
}

#[test]
fn time_after_the_year_9999_is_clamped() {
    let far = SystemTime::UNIX_EPOCH + Duration::from_secs(1 << 40);
    let text = line(&AccessLogRecord { time: far, ..record(0, 1) });
    assert!(text.starts_with(r#"{"time":"9999-12-31T23:59:59.000000Z""#), "{text}");
}

#[test]
fn lines_of_one_worker_keep_their_order_and_all_arrive() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("access.log");
    let (log, senders) = AccessLog::start(file(&path), 3).unwrap();
    std::thread::scope(|scope| {
        for (worker, sender) in senders.iter().enumerate() {
            scope.spawn(move || {
                assert!((0..1_000).all(|n| sender.push(record(worker as u32, n))));
            });
        }
    });
    // A busy machine cannot write many more within the time that `close` waits.
    assert_eq!(log.close(), 0);
    let lines = sessions(&path);
    for worker in 0..3 {
        let of_worker = lines.iter().filter(|line| line.0 == worker).map(|line| line.1);
        assert!(of_worker.eq(0..1_000), "worker {worker}");
    }
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o137, 0);
}

#[test]
fn disabled_log_discards_records_without_counting_them_as_dropped() {
    let (mut log, senders) = AccessLog::start(AccessLogDestination::Off, 1).unwrap();
    assert!(!senders[0].enabled());
    assert!((0..QUEUE_MAX as u64 + 10).all(|n| senders[0].push(record(0, n))));
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("access.log");
    log.set_target(file(&path)).unwrap();
    assert!(senders[0].enabled());
    assert!(senders[0].push(record(0, 7)));
    eventually("the line is written", || sessions(&path) == [(0, 7)]);
    log.set_target(AccessLogDestination::Off).unwrap();
    assert!(!senders[0].enabled());
    assert_eq!(log.close(), 0);
}

#[test]
fn fifo_without_reader_does_not_block_and_drops_are_reported() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("fifo");
    rustix::fs::mkfifoat(rustix::fs::CWD, &path, 0o600.into()).unwrap();
    let (log, senders) = AccessLog::start(file(&path), 1).unwrap();
    let pushed = 4 * QUEUE_MAX as u64;
    let dropped = (0..pushed).filter(|n| !senders[0].push(record(0, *n))).count() as u64;
    assert!(dropped > 0, "a pipe, a batch and a queue cannot hold {pushed} lines");
    // A late reader gets whole lines, in order.
    let mut reader = fs::OpenOptions::new().read(true).write(true).open(&path).unwrap();
    let mut text = vec![0; 128 * 1024];
    let mut length = 0;
    while length < 100 * 1024 {
        length += reader.read(&mut text[length..]).unwrap();
    }
    let copy = dir.path().join("copy");
    fs::write(&copy, &text[..length]).unwrap();
    let lines = sessions(&copy);
    assert!(lines.len() > 100 && lines.is_sorted());
    assert!(log.close() > 0, "lines not written are reported");
}

#[test]
fn hanging_syslog_receiver_blocks_no_worker_and_no_close() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("log");
    let receiver = std::os::unix::net::UnixDatagram::bind(&path).unwrap();
    let (log, senders) = AccessLog::start(syslog(&path), 1).unwrap();
    let pushed = 2 * QUEUE_MAX as u64 + 1_000;
    let dropped = (0..pushed).filter(|n| !senders[0].push(record(0, *n))).count() as u64;
    assert!(dropped > 0, "a socket, a batch and a queue cannot hold {pushed} lines");
    let start = tidegate_net::clock::now();
    assert!(log.close() > 0, "lines not sent are reported");
    assert!(tidegate_net::clock::now() - start < CLOSE_MAX + Duration::from_secs(1));
    // The messages that the socket holds are whole and in order.
    receiver.set_nonblocking(true).unwrap();
    let mut buffer = [0; 4096];
    let mut numbers = Vec::new();
    while let Ok(length) = receiver.recv(&mut buffer) {
        let text = std::str::from_utf8(&buffer[..length]).unwrap();
        let json = text.strip_prefix("<134>1 2025-10-09T08:53:20.000042Z lb tidegate 7 access - ");
        let line: serde_json::Value = serde_json::from_str(json.expect(text)).unwrap();
        numbers.push(line["session"].as_u64().unwrap());
    }
    assert!(!numbers.is_empty() && numbers.iter().copied().eq(0..numbers.len() as u64));
}

#[test]
fn slow_syslog_receiver_does_not_delay_another_target() {
    let dir = tempfile::tempdir().unwrap();
    let (path, file_path) = (dir.path().join("log"), dir.path().join("access.log"));
    let receiver = std::os::unix::net::UnixDatagram::bind(&path).unwrap();
    let (mut log, senders) = AccessLog::start(syslog(&path), 1).unwrap();
    // Each message takes less than the wait of a call, so that every call succeeds.
    std::thread::spawn(move || {
        let mut buffer = [0; 4096];
        while receiver.recv(&mut buffer).is_ok() {
            std::thread::park_timeout(Duration::from_millis(3));
        }
    });
    let pushed = QUEUE_MAX as u64;
    assert!((0..pushed).all(|n| senders[0].push(record(0, n))));
    eventually("the receiver is at work", || log.shared.queued() < pushed);
    let start = tidegate_net::clock::now();
    log.set_target(file(&file_path)).unwrap();
    eventually("the file has the last record", || {
        fs::read_to_string(&file_path).is_ok_and(|text| text.contains("\"session\":8191,"))
    });
    // All records over the receiver would take 24 s.
    assert!(tidegate_net::clock::now() - start < Duration::from_secs(5));
    assert_eq!(log.close(), 0);
}

#[test]
fn moved_log_file_is_reopened() {
    let dir = tempfile::tempdir().unwrap();
    let (path, old) = (dir.path().join("access.log"), dir.path().join("access.log.1"));
    let (log, senders) = AccessLog::start(file(&path), 1).unwrap();
    assert!(senders[0].push(record(0, 1)));
    eventually("the first line is written", || sessions(&path).len() == 1);
    fs::rename(&path, &old).unwrap();
    eventually("the path exists again", || path.exists());
    assert!(senders[0].push(record(0, 2)));
    eventually("the second line is in the new file", || sessions(&path) == [(0, 2)]);
    assert_eq!(sessions(&old), [(0, 1)]);
    fs::remove_file(&path).unwrap();
    eventually("a removed file is created again", || path.exists());
    assert_eq!(log.close(), 0);
}

#[test]
fn next_target_gets_the_lines_that_a_full_device_rejected() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("access.log");
    let (mut log, senders) = AccessLog::start(file(Path::new("/dev/full")), 1).unwrap();
    assert!((0..1_000).all(|n| senders[0].push(record(0, n))));
    // The writer then holds a batch that the device has rejected.
    eventually("the writer has taken records", || log.shared.queued() < 1_000);
    log.set_target(file(&path)).unwrap();
    eventually("every line arrives at the new target", || sessions(&path).len() == 1_000);
    assert!(sessions(&path).iter().map(|line| line.1).eq(0..1_000));
    assert_eq!(log.close(), 0);
}

#[test]
fn close_on_a_full_device_keeps_its_timeout_and_returns_the_lost_lines() {
    let (log, senders) = AccessLog::start(file(Path::new("/dev/full")), 1).unwrap();
    assert!((0..10).all(|n| senders[0].push(record(0, n))));
    let start = tidegate_net::clock::now();
    assert_eq!(log.close(), 10);
    assert!(tidegate_net::clock::now() - start < CLOSE_MAX + Duration::from_secs(1));
}

#[test]
fn target_that_cannot_be_opened_leaves_the_old_target_in_use() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("access.log");
    let (mut log, senders) = AccessLog::start(file(&path), 1).unwrap();
    assert!(log.set_target(file(&dir.path().join("no/such/directory"))).is_err());
    assert!(log.set_target(file(dir.path())).is_err());
    assert!(senders[0].push(record(0, 1)));
    assert_eq!(log.close(), 0);
    assert_eq!(sessions(&path), [(0, 1)]);
    assert!(AccessLog::start(file(&dir.path().join("no/file")), 1).is_err());
}

#[test]
fn partial_line_from_a_crash_is_terminated_before_the_next_line() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("access.log");
    fs::write(&path, "{\"time\":\"20").unwrap();
    let (log, senders) = AccessLog::start(file(&path), 1).unwrap();
    assert!(senders[0].push(record(0, 1)));
    assert_eq!(log.close(), 0);
    let text = fs::read_to_string(&path).unwrap();
    assert_eq!(text, format!("{{\"time\":\"20\n{}", line(&record(0, 1))));
    assert!(fs::metadata(&path).unwrap().size() > 0);
}

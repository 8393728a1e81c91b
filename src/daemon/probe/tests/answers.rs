//! Answers of several segments, and interim responses before the final response.

use super::*;

fn wants(status: (u16, u16)) -> ProbeSpec {
    spec(ProbeKind::Http(HttpProbe { path: "/".into(), status: vec![status], ..http_probe() }))
}

async fn outcome(answer: &'static [&'static [u8]], status: (u16, u16)) -> ProbeOutcome {
    run(&server(answer).await, &wants(status)).await
}

async fn holds_master(answer: &'static [&'static [u8]]) -> ProbeOutcome {
    let expect = Expect::Contains("role:master".into());
    let spec = spec(ProbeKind::SendExpect { send: "INFO\r\n".into(), expect });
    run(&server(answer).await, &spec).await
}

#[test]
fn expected_text_is_found_anywhere_in_the_answer() {
    on_runtime(async {
        let first: &'static [&'static [u8]] = &[b"role:master\r\n"];
        let late: &'static [&'static [u8]] = &[b"# Replication\r\nrole:master\r\nconnected"];
        let split: &'static [&'static [u8]] = &[b"# Replication\r\nrole:", b"mas", b"ter"];
        for answer in [first, late, split] {
            assert_success(&holds_master(answer).await);
        }
        let reason = failure(holds_master(&[b"role:slave\r\n", b"role:maste"]).await);
        assert!(reason.starts_with("connection closed after 22 bytes"), "{reason}");
        assert!(reason.ends_with("expected \"role:master\" in the answer"), "{reason}");
    });
}

#[test]
fn endless_answer_is_searched_up_to_64_kib() {
    on_runtime(async {
        let whole: &'static [u8] = Vec::leak(vec![b'x'; 200 * 1024]);
        let reason = failure(holds_master(Box::leak(Box::new([whole]))).await);
        assert_eq!(
            reason,
            "no match in the first 64 KiB of the answer: expected \"role:master\" in the answer"
        );
    });
}

#[test]
fn interim_responses_are_skipped_and_the_final_status_decides() {
    on_runtime(async {
        const EARLY: &[u8] = b"HTTP/1.1 103 Early Hints\r\nLink: </style.css>; rel=preload\r\n\r\n";
        static GOOD: [&[u8]; 2] = [EARLY, b"HTTP/1.1 200 OK\r\n\r\n"];
        static BAD: [&[u8]; 2] = [EARLY, b"HTTP/1.1 503 no\r\n\r\n"];
        assert_success(&outcome(&GOOD, (200, 399)).await);
        let reason = failure(outcome(&BAD, (200, 399)).await);
        assert_eq!(reason, "status 503, expected 200-399");
    });
}

#[test]
fn interim_responses_are_skipped_in_any_segmentation() {
    on_runtime(async {
        let one: &'static [&'static [u8]] =
            &[b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 102\r\n\r\nHTTP/1.0 204\r\n\r\n"];
        let many: &'static [&'static [u8]] =
            &[b"HTTP/1.1 1", b"00 Continue\r", b"\n\r", b"\nHTTP/1.1 204", b"\n"];
        for answer in [one, many] {
            assert_success(&outcome(answer, (204, 204)).await);
        }
    });
}

#[test]
fn interim_response_does_not_succeed_even_with_a_status_in_range() {
    on_runtime(async {
        let reason = failure(outcome(&[b"HTTP/1.1 100 Continue\r\n\r\n"], (100, 399)).await);
        assert!(reason.starts_with("connection closed after 25 bytes"), "{reason}");
    });
}

#[test]
fn switching_protocols_is_final() {
    on_runtime(async {
        let answer: &'static [&'static [u8]] =
            &[b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n"];
        assert_success(&outcome(answer, (101, 101)).await);
        assert_eq!(failure(outcome(answer, (200, 399)).await), "status 101, expected 200-399");
    });
}

#[test]
fn endless_interim_responses_fail_at_8_kib() {
    static ENDLESS: [&[u8]; 300] = [b"HTTP/1.1 102 Processing\r\nX: 0123456789\r\n\r\n"; 300];
    on_runtime(async {
        let whole: &'static [u8] = Vec::leak(ENDLESS.concat());
        let reason = failure(outcome(Box::leak(Box::new([whole])), (200, 399)).await);
        assert!(reason.starts_with("no final status line in the first 8 KiB"), "{reason}");
    });
}

//! Tests of how sessions end. Both engines must report the same.

use super::*;
use crate::relay::close_state::TurnBytes;
use crate::relay::session_timers::SessionTimers;
use tidegate_core::outcome::SessionEnd;

fn idle(idle: u64, half_closed: u64) -> SessionTimeouts {
    SessionTimeouts {
        stalled: None,
        idle: Some(Duration::from_millis(idle)),
        half_closed: Some(Duration::from_millis(half_closed)),
        ..NO_TIMEOUTS
    }
}

/// Asserts that both sockets can be used: no operation is in flight on them.
async fn assert_sockets_are_usable(
    relayed: RelayResult,
    mut client: TcpStream,
    mut backend: TcpStream,
) {
    let [to_client, to_backend] = relayed.sockets.unwrap();
    assert_eq!(tidegate_net::stream::send(&to_client, b"bye").unwrap(), 3);
    assert_eq!(tidegate_net::stream::send(&to_backend, b"bye").unwrap(), 3);
    drop((to_client, to_backend));
    for peer in [&mut client, &mut backend] {
        let mut last = Vec::new();
        peer.read_to_end(&mut last).await.unwrap();
        assert!(last.ends_with(b"bye"));
    }
}

#[test]
fn answer_after_the_clients_fin_arrives() {
    on_each(|rig| async move {
        let Session { mut client, mut backend, relayed } = rig.session(NO_TIMEOUTS);
        client.write_all(b"question").await.unwrap();
        client.shutdown().await.unwrap();
        let mut question = Vec::new();
        backend.read_to_end(&mut question).await.unwrap();
        assert_eq!(question, b"question");

        tokio::time::sleep(Duration::from_millis(30)).await;
        backend.write_all(b"answer").await.unwrap();
        drop(backend);
        let mut answer = Vec::new();
        client.read_to_end(&mut answer).await.unwrap();
        assert_eq!(answer, b"answer");
        let (cause, phase) = (Cause::Finished, Phase::Closed);
        let expected =
            SessionEnd { cause, phase, errno: 0, closed_first: Some(SessionSide::Client) };
        assert_eq!(relayed.await.unwrap().ending, expected);
    });
}

#[test]
fn bytes_before_a_reset_are_delivered_and_the_reset_is_reported() {
    on_each(|rig| async move {
        for side in SessionSide::BOTH {
            let Session { client, backend, relayed } = rig.session(NO_TIMEOUTS);
            let (mut failing, mut other) = match side {
                SessionSide::Client => (client, backend),
                SessionSide::Backend => (backend, client),
            };
            failing.write_all(b"last words").await.unwrap();
            reset(failing);
            let mut got = [0; 10];
            other.read_exact(&mut got).await.unwrap();
            assert_eq!(&got, b"last words");
            let relayed = relayed.await.unwrap();
            let cause = Cause::of_failure(side, libc::ECONNRESET);
            let errno = libc::ECONNRESET;
            let closed_first = Some(side);
            let expected = SessionEnd { cause, phase: Phase::Data, errno, closed_first };
            assert_eq!(relayed.ending, expected);
        }
    });
}

#[test]
fn reset_after_512_kib_waits_for_a_slow_reader() {
    on_each(|rig| async move {
        let Session { mut client, mut backend, relayed } = rig.session(NO_TIMEOUTS);
        // No more than the queues on the path hold, because all of it must be acknowledged.
        let sent = 1 << 19;
        let drain = |socket: TcpStream| async move {
            let mut socket = socket;
            let mut buffer = vec![0; 10_000];
            let mut all = 0;
            while let Ok(len @ 1..) = socket.read(&mut buffer).await {
                all += len;
                tokio::task::yield_now().await;
            }
            all
        };
        backend.write_all(&vec![1; sent]).await.unwrap();
        // A reset would discard unacknowledged bytes.
        eventually("all is acknowledged", || tidegate_net::stream::unacknowledged(&backend) == 0)
            .await;
        client.write_all(b"x").await.unwrap();
        reset(backend);
        let received = tokio::task::spawn_local(drain(client));
        let relayed = relayed.await.unwrap();
        assert_eq!(relayed.ending.cause, Cause::BackendReset);
        assert_eq!(relayed.bytes.bytes_out, sent as u64);
        drop(relayed);
        assert_eq!(received.await.unwrap(), sent);
    });
}

/// Returns a session whose backend has reset its connection after an answer that the client has
/// not read.
async fn unread_answer(rig: &Rig, limits: SessionTimeouts, answer: usize) -> Session {
    let Session { client, mut backend, relayed } = rig.session(limits);
    SockRef::from(&client).set_recv_buffer_size(8192).unwrap();
    backend.write_all(&vec![7; answer]).await.unwrap();
    eventually("all is acknowledged", || tidegate_net::stream::unacknowledged(&backend) == 0).await;
    let (other, _) = tcp_pair();
    let other = TcpStream::from_std(other).unwrap();
    reset(std::mem::replace(&mut backend, other));
    Session { client, backend, relayed }
}

#[test]
fn reset_waits_until_the_reader_has_all_bytes() {
    on_each(|rig| async move {
        let answer = 200_000;
        let limits = idle(60_000, 1_000);
        let Session { mut client, backend: _, relayed } = unread_answer(&rig, limits, answer).await;
        let mut buffer = vec![0; answer / 20];
        let mut left = answer;
        while left > 0 {
            assert!(!relayed.is_finished() || left < answer / 2, "{left} bytes undelivered");
            tokio::time::sleep(Duration::from_millis(70)).await;
            left -= client.read(&mut buffer).await.unwrap();
        }
        let relayed = relayed.await.unwrap();
        assert_eq!(relayed.ending.cause, Cause::BackendReset);
        let bytes = Bytes { bytes_in: 0, bytes_out: answer as u64, undelivered: 0 };
        assert_eq!(relayed.bytes, bytes);
    });
}

#[test]
fn bytes_without_progress_are_given_up_and_counted() {
    on_each(|rig| async move {
        let session = unread_answer(&rig, idle(60_000, 400), 200_000).await;
        let relayed = session.relayed.await.unwrap();
        assert!(relayed.bytes.undelivered > 0, "{relayed:?}");
        assert!(!relayed.ending.cause.closes_in_order(relayed.bytes.undelivered));
        relayed.sockets.into_iter().flatten().for_each(tidegate_net::stream::reset);
        drop(session.client);
    });
}

#[test]
fn abort_ends_the_wait_for_delivery() {
    on_each(|rig| async move {
        let session = unread_answer(&rig, NO_TIMEOUTS, 200_000).await;
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert!(!session.relayed.is_finished());
        assert_eq!(rig.engine.abort_backend(BackendId(0), Cause::DrainDeadline), 1);
        let relayed = session.relayed.await.unwrap();
        assert!(relayed.bytes.undelivered > 0, "{relayed:?}");
        relayed.sockets.into_iter().flatten().for_each(tidegate_net::stream::reset);
        drop(session.client);
    });
}

#[test]
fn timeout_counts_undelivered_bytes() {
    on_each(|rig| async move {
        let Session { mut client, backend, relayed } = rig.session(idle(200, 200));
        fill(&mut client).await;
        let relayed = relayed.await.unwrap();
        assert_eq!(relayed.ending.cause, Cause::IdleTimeout);
        let mut got = vec![0; 1 << 16];
        let mut backend = backend;
        let Bytes { bytes_in, undelivered, .. } = relayed.bytes;
        relayed.sockets.into_iter().flatten().for_each(tidegate_net::stream::reset);
        let mut read = 0;
        while let Ok(len @ 1..) = backend.read(&mut got).await {
            read += len as u64;
        }
        assert!(read < bytes_in && bytes_in - read <= undelivered, "{read} of {bytes_in}");
    });
}

#[test]
fn answer_of_a_backend_that_resets_an_upload_is_delivered() {
    on_each(|rig| async move {
        let Session { mut client, mut backend, relayed } = rig.session(NO_TIMEOUTS);
        client.write_all(&[1; 1000]).await.unwrap();
        backend.write_all(b"413").await.unwrap();
        backend.peek(&mut [0]).await.unwrap();
        // A close with unread bytes sends a RST.
        drop(backend);
        let mut answer = [0; 3];
        client.read_exact(&mut answer).await.unwrap();
        assert_eq!(&answer, b"413");
        let ending = relayed.await.unwrap().ending;
        assert_eq!((ending.cause, ending.errno), (Cause::BackendReset, libc::ECONNRESET));
        assert_eq!(ending.closed_first, Some(SessionSide::Backend));
    });
}

#[test]
fn abort_ends_busy_sessions_and_hands_out_their_sockets() {
    on_each(|rig| async move {
        let mut sessions: Vec<Session> = (0..20).map(|_| rig.session(NO_TIMEOUTS)).collect();
        for session in &mut sessions {
            // Neither side reads, so sends are in flight in both directions.
            for peer in [&mut session.client, &mut session.backend] {
                let flood = peer.write_all(&[3; 8 << 20]);
                let _ = tokio::time::timeout(Duration::from_millis(10), flood).await;
            }
        }
        assert_eq!(rig.engine.abort_backend(BackendId(7), Cause::BackendRemoved), 0);
        assert_eq!(rig.engine.abort_backend(BackendId(0), Cause::BackendRemoved), 20);
        for session in sessions {
            let relayed = session.relayed.await.unwrap();
            let (cause, phase) = (Cause::BackendRemoved, Phase::Data);
            assert_eq!(relayed.ending, SessionEnd { cause, phase, errno: 0, closed_first: None });
            for socket in relayed.sockets.unwrap() {
                tidegate_net::stream::reset(socket);
            }
        }
    });
}

#[test]
fn idle_timeout_ends_a_session_and_hands_out_its_sockets() {
    on_each(|rig| async move {
        let Session { mut client, backend, relayed } = rig.session(idle(150, 10_000));
        client.write_all(b"hello").await.unwrap();
        let started = clock::now();
        let relayed = relayed.await.unwrap();
        let took = clock::now() - started;
        assert!(took >= Duration::from_millis(140) && took < Duration::from_secs(3), "{took:?}");
        let (cause, phase) = (Cause::IdleTimeout, Phase::Data);
        assert_eq!(relayed.ending, SessionEnd { cause, phase, errno: 0, closed_first: None });
        assert_sockets_are_usable(relayed, client, backend).await;
    });
}

#[test]
fn half_closed_timeout_replaces_the_idle_timeout() {
    on_each(|rig| async move {
        let Session { mut client, mut backend, relayed } = rig.session(idle(60_000, 150));
        backend.shutdown().await.unwrap();
        let ending = relayed.await.unwrap().ending;
        let (cause, phase) = (Cause::HalfClosedTimeout, Phase::HalfClosed);
        let closed_first = Some(SessionSide::Backend);
        assert_eq!(ending, SessionEnd { cause, phase, errno: 0, closed_first });
        assert_eq!(client.read(&mut [0; 8]).await.unwrap(), 0);
    });
}

fn aged(age: u64) -> SessionTimeouts {
    SessionTimeouts { age: Some(Duration::from_millis(age)), ..NO_TIMEOUTS }
}

#[test]
fn session_is_closed_for_its_age_when_it_is_quiet() {
    on(
        EngineKind::Epoll,
        || epoll_engine(None, Arc::new(MemoryBudget::new(usize::MAX)), counters()),
        |rig| async move {
            let began = clock::now();
            let at = |seconds| began + Duration::from_secs(seconds);
            let mut timers = SessionTimers::new(aged(100_000), rig.meter(), began);
            assert!(timers.take_liveness(at(10)));
            assert_eq!(timers.due(false, at(10)), at(90));
            assert!(!timers.is_too_old(at(89)));
            assert!(timers.is_too_old(at(90)), "it is quiet");
            let moved = TurnBytes { received: [1, 0], ..TurnBytes::default() };
            for second in 80..99 {
                timers.account(&moved, at(second));
                assert!(!timers.is_too_old(at(second)));
                assert_eq!(timers.due(false, at(second)), at(90.max(second + 1)));
            }
            assert!(timers.is_too_old(at(99)), "a second without a byte");
            timers.account(&moved, at(99));
            timers.account(&moved, at(100));
            assert!(timers.is_too_old(at(100)), "bytes move");
            let off = SessionTimers::new(NO_TIMEOUTS, rig.meter(), began);
            assert!(!off.is_too_old(at(1_000_000)));
        },
    );
}

#[test]
fn session_ends_at_its_age_although_bytes_move() {
    on_each(|rig| async move {
        let Session { mut client, mut backend, relayed } = rig.session(aged(400));
        let started = clock::now();
        let talk = tokio::task::spawn_local(async move {
            let mut byte = [0];
            while client.write_all(b"x").await.is_ok() && backend.read(&mut byte).await.is_ok() {
                tokio::time::sleep(Duration::from_millis(20)).await;
                if clock::now() - started > TIMEOUT {
                    break;
                }
            }
        });
        let relayed = relayed.await.unwrap();
        let took = clock::now() - started;
        assert!(took >= Duration::from_millis(390) && took < Duration::from_secs(4), "{took:?}");
        assert_eq!((relayed.ending.cause, relayed.ending.phase), (Cause::SessionMax, Phase::Data));
        drop(relayed.sockets);
        talk.await.unwrap();
    });
}

/// Fills all queues towards a backend that does not read.
async fn fill(client: &mut TcpStream) {
    // Five pauses in a row: a single pause can be due to a slow machine.
    let (block, mut pauses) = (vec![9; 1 << 16], 0);
    while pauses < 5 {
        match tokio::time::timeout(Duration::from_millis(40), client.write(&block)).await {
            Ok(written) => pauses = written.map(|_| 0).unwrap(),
            Err(_) => pauses += 1,
        }
    }
}

#[test]
fn session_with_a_reader_that_never_reads_ends_by_idle_timeout() {
    on_each(|rig| async move {
        let Session { mut client, backend, relayed } = rig.session(idle(200, 200));
        fill(&mut client).await;
        let ending = relayed.await.unwrap().ending;
        assert_eq!(ending.cause, Cause::IdleTimeout);
        drop((client, backend));
    });
}

#[test]
fn session_with_a_slow_reader_does_not_end_by_idle_timeout() {
    on_each(|rig| async move {
        let small = |socket: SockRef<'_>| {
            socket.set_send_buffer_size(128 * 1024).unwrap();
            socket.set_recv_buffer_size(128 * 1024).unwrap();
        };
        let Session { mut client, mut backend, relayed } = rig.session_with(idle(600, 600), small);
        let writing = tokio::task::spawn_local(async move {
            while client.write_all(&[9; 1 << 16]).await.is_ok() {}
        });
        let started = clock::now();
        let mut buffer = vec![0; 16 * 1024];
        while clock::now() - started < Duration::from_millis(2500) {
            assert!(backend.read(&mut buffer).await.unwrap() > 0);
            assert!(!relayed.is_finished(), "session ended although bytes move");
            tokio::time::sleep(Duration::from_millis(30)).await;
        }
        writing.abort();
        drop(backend);
        relayed.await.unwrap();
    });
}

#[test]
fn client_failure_with_unsent_bytes_starts_the_half_closed_timeout() {
    // Without bulk on the ring, which can wait for room with an empty pipe.
    on_each_within(usize::MAX, |rig| async move {
        let Session { mut client, backend, relayed } = rig.session(idle(60_000, 300));
        fill(&mut client).await;
        tokio::time::sleep(Duration::from_millis(250)).await;
        reset(client);
        let ending = relayed.await.unwrap().ending;
        assert_eq!(ending.cause, Cause::HalfClosedTimeout);
        assert_eq!(ending.closed_first, Some(SessionSide::Client));
        drop(backend);
    });
}

#[test]
fn dropped_session_resets_both_sockets() {
    on_each(|rig| async move {
        let Session { mut client, mut backend, relayed } = rig.session(NO_TIMEOUTS);
        client.write_all(b"x").await.unwrap();
        backend.read_exact(&mut [0]).await.unwrap();
        relayed.abort();
        for peer in [&mut client, &mut backend] {
            let error = peer.read(&mut [0]).await.unwrap_err();
            assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
        }
    });
}

#[test]
fn dropped_engine_closes_all_sockets() {
    for (runtime, ring) in [(EngineKind::Epoll, None), (EngineKind::IoUring, Some(RING_SETTINGS))] {
        let peers = std::cell::RefCell::new(Vec::new());
        let main = async {
            let engine = match ring {
                None => epoll_engine(None, Arc::default(), counters()).unwrap(),
                Some(settings) => ring_engine(None, settings, Arc::default(), counters()).unwrap(),
            };
            let task = tokio::task::spawn_local(Rc::clone(&engine).run());
            let rig = Rig::new(engine);
            for number in 0..30 {
                let mut session = rig.session(NO_TIMEOUTS);
                if number % 2 == 0 {
                    fill(&mut session.client).await;
                }
                peers.borrow_mut().push((session.client, session.backend));
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
            task.abort();
            for (client, backend) in peers.take() {
                let pair = (client.into_std().unwrap(), backend.into_std().unwrap());
                PEERS.with_borrow_mut(|left| left.push(pair));
            }
        };
        runtime.block_on(main).unwrap();
        for (client, backend) in PEERS.take() {
            for mut peer in [client, backend] {
                peer.set_nonblocking(false).unwrap();
                peer.set_read_timeout(Some(TIMEOUT)).unwrap();
                // Queued bytes, then FIN or RST.
                let end = std::io::copy(&mut peer, &mut std::io::sink());
                assert!(end.is_ok() || end.unwrap_err().kind() == io::ErrorKind::ConnectionReset);
            }
        }
    }
}

thread_local! {
    static PEERS: std::cell::RefCell<Vec<(StdTcpStream, StdTcpStream)>> =
        const { std::cell::RefCell::new(Vec::new()) };
}

//! Ends: how sessions are over, and that both engines report the same.

use super::*;
use tidegate_core::outcome::SessionEnd;

fn idle(idle: u64, half_closed: u64) -> SessionTimeouts {
    SessionTimeouts {
        stalled: None,
        idle: Some(Duration::from_millis(idle)),
        half_closed: Some(Duration::from_millis(half_closed)),
        ..FOREVER
    }
}

/// Both sockets can be used as if nothing had ever been in flight on them.
async fn sockets_are_ours(relayed: RelayResult, mut client: TcpStream, mut backend: TcpStream) {
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
fn an_answer_after_the_clients_fin_arrives() {
    on_each(|rig| async move {
        let Session { mut client, mut backend, relayed } = rig.session(FOREVER);
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
fn what_came_before_a_reset_is_delivered_and_the_reset_is_told() {
    on_each(|rig| async move {
        for side in SessionSide::BOTH {
            let Session { client, backend, relayed } = rig.session(FOREVER);
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
fn a_reset_behind_half_a_megabyte_waits_for_its_slow_reader() {
    on_each(|rig| async move {
        let Session { mut client, mut backend, relayed } = rig.session(FOREVER);
        // As much as the queues on the way hold, for all of it has to have left.
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
        // So that the reset does not throw away what is still on its way.
        eventually("sent", || tidegate_net::stream::unacknowledged(&backend) == 0).await;
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

/// A session whose client has not read the answer of a backend that is gone.
async fn unread_answer(rig: &Rig, limits: SessionTimeouts, answer: usize) -> Session {
    let Session { client, mut backend, relayed } = rig.session(limits);
    SockRef::from(&client).set_recv_buffer_size(8192).unwrap();
    backend.write_all(&vec![7; answer]).await.unwrap();
    eventually("all is received", || tidegate_net::stream::unacknowledged(&backend) == 0).await;
    let (other, _) = tcp_pair();
    let other = TcpStream::from_std(other).unwrap();
    reset(std::mem::replace(&mut backend, other));
    Session { client, backend, relayed }
}

#[test]
fn a_reset_waits_until_the_reader_has_everything() {
    on_each(|rig| async move {
        let answer = 200_000;
        let limits = idle(60_000, 1_000);
        let Session { mut client, backend: _, relayed } = unread_answer(&rig, limits, answer).await;
        let mut buffer = vec![0; answer / 20];
        let mut left = answer;
        while left > 0 {
            assert!(!relayed.is_finished() || left < answer / 2, "{left} B are on their way");
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
fn last_words_that_stand_still_are_given_up_and_counted() {
    on_each(|rig| async move {
        let session = unread_answer(&rig, idle(60_000, 400), 200_000).await;
        let relayed = session.relayed.await.unwrap();
        assert!(relayed.bytes.undelivered > 0, "{relayed:?}");
        let given_up = relayed.bytes.bytes_out <= 200_000;
        assert!(given_up && !relayed.ending.cause.closes_in_order(relayed.bytes.undelivered));
        relayed.sockets.into_iter().flatten().for_each(tidegate_net::stream::reset);
        drop(session.client);
    });
}

#[test]
fn a_cut_ends_the_wait_for_last_words() {
    on_each(|rig| async move {
        let session = unread_answer(&rig, FOREVER, 200_000).await;
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
fn a_time_out_with_bytes_on_their_way_counts_them() {
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
fn a_backend_that_refuses_more_still_has_its_answer_delivered() {
    on_each(|rig| async move {
        let Session { mut client, mut backend, relayed } = rig.session(FOREVER);
        client.write_all(&[1; 1000]).await.unwrap();
        backend.write_all(b"413").await.unwrap();
        backend.peek(&mut [0]).await.unwrap();
        // Closing with unread bytes resets.
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
fn a_cut_ends_busy_sessions_and_hands_their_sockets_back() {
    on_each(|rig| async move {
        let mut sessions: Vec<Session> = (0..20).map(|_| rig.session(FOREVER)).collect();
        for session in &mut sessions {
            // Nobody reads: sends are in flight both ways.
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
fn a_quiet_session_is_cut_by_the_idle_timer_with_its_sockets_whole() {
    on_each(|rig| async move {
        let Session { mut client, backend, relayed } = rig.session(idle(150, 10_000));
        client.write_all(b"hello").await.unwrap();
        let started = clock::now();
        let relayed = relayed.await.unwrap();
        let took = clock::now() - started;
        assert!(took >= Duration::from_millis(140) && took < Duration::from_secs(3), "{took:?}");
        let (cause, phase) = (Cause::IdleTimeout, Phase::Data);
        assert_eq!(relayed.ending, SessionEnd { cause, phase, errno: 0, closed_first: None });
        sockets_are_ours(relayed, client, backend).await;
    });
}

#[test]
fn a_half_closed_session_has_a_timer_of_its_own() {
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

/// Fills the way to a backend that does not read.
async fn fill(client: &mut TcpStream) {
    // Until nothing moves. A pause alone may be the machine's own.
    let (block, mut pauses) = (vec![9; 1 << 16], 0);
    while pauses < 5 {
        match tokio::time::timeout(Duration::from_millis(40), client.write(&block)).await {
            Ok(written) => pauses = written.map(|_| 0).unwrap(),
            Err(_) => pauses += 1,
        }
    }
}

#[test]
fn a_reader_that_never_reads_is_idle_in_the_end() {
    on_each(|rig| async move {
        let Session { mut client, backend, relayed } = rig.session(idle(200, 200));
        fill(&mut client).await;
        let ending = relayed.await.unwrap().ending;
        assert_eq!(ending.cause, Cause::IdleTimeout);
        drop((client, backend));
    });
}

#[test]
fn a_slow_reader_is_not_idle() {
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
            assert!(!relayed.is_finished(), "cut although it moves");
            tokio::time::sleep(Duration::from_millis(30)).await;
        }
        writing.abort();
        drop(backend);
        relayed.await.unwrap();
    });
}

#[test]
fn a_client_that_fails_while_its_bytes_wait_starts_the_half_closed_timer() {
    // Without the ring's bulk: it waits for room with its pipe empty at times.
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
fn a_dropped_session_resets_both_its_sockets_as_nothing_of_it_is_whole() {
    on_each(|rig| async move {
        let Session { mut client, mut backend, relayed } = rig.session(FOREVER);
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
fn a_dropped_engine_lets_go_of_every_socket() {
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
                let mut session = rig.session(FOREVER);
                if number % 2 == 0 {
                    fill(&mut session.client).await;
                }
                peers.borrow_mut().push((session.client, session.backend));
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
            task.abort();
            for (client, backend) in peers.take() {
                let pair = (client.into_std().unwrap(), backend.into_std().unwrap());
                LEFT.with_borrow_mut(|left| left.push(pair));
            }
        };
        runtime.block_on(main).unwrap();
        for (client, backend) in LEFT.take() {
            for mut peer in [client, backend] {
                peer.set_nonblocking(false).unwrap();
                peer.set_read_timeout(Some(PATIENCE)).unwrap();
                // Bytes on their way, then the end: FIN or RST.
                let end = std::io::copy(&mut peer, &mut std::io::sink());
                assert!(end.is_ok() || end.unwrap_err().kind() == io::ErrorKind::ConnectionReset);
            }
        }
    }
}

thread_local! {
    static LEFT: std::cell::RefCell<Vec<(StdTcpStream, StdTcpStream)>> =
        const { std::cell::RefCell::new(Vec::new()) };
}

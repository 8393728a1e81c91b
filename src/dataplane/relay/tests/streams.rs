//! Tests that all bytes arrive once and in order, for all sizes and reader speeds.

use super::*;

/// Returns byte `index` of the stream `seed`.
fn byte(seed: u64, index: u64) -> u8 {
    let mixed = (index / 7 + seed).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    (mixed >> 56) as u8 ^ index as u8
}

fn part(seed: u64, from: u64, len: usize) -> Vec<u8> {
    (from..from + len as u64).map(|index| byte(seed, index)).collect()
}

/// Sends `total` bytes of the stream `seed` in random pieces, then FIN.
async fn send_all(
    socket: &mut tokio::net::tcp::OwnedWriteHalf,
    seed: u64,
    total: u64,
    mut random: fastrand::Rng,
) {
    let mut at = 0;
    while at < total {
        let most = [1, 64, 2_000, 40_000, 300_000][random.usize(..5)];
        let len = random.usize(1..=most).min((total - at) as usize);
        socket.write_all(&part(seed, at, len)).await.unwrap();
        at += len as u64;
        if random.u8(..8) == 0 {
            tokio::time::sleep(Duration::from_millis(random.u64(..3))).await;
        }
    }
    socket.shutdown().await.unwrap();
}

/// Reads to FIN with random pauses. Checks the stream `seed` and returns its length.
async fn receive_all(
    socket: &mut tokio::net::tcp::OwnedReadHalf,
    seed: u64,
    mut random: fastrand::Rng,
) -> u64 {
    let mut buffer = vec![0; 100_000];
    let mut at = 0;
    loop {
        let most = random.usize(1..buffer.len());
        let len = socket.read(&mut buffer[..most]).await.unwrap();
        if len == 0 {
            return at;
        }
        assert!(buffer[..len] == part(seed, at, len), "stream {seed} is garbled at {at}");
        at += len as u64;
        if random.u8(..16) == 0 {
            tokio::time::sleep(Duration::from_millis(random.u64(..3))).await;
        }
    }
}

async fn exchange(rig: Rig, seed: u64) {
    let mut random = fastrand::Rng::with_seed(seed);
    let lengths: [u64; 2] = std::array::from_fn(|_| {
        let most = [0, 1, 500, 20_000, 200_000, 2_000_000][random.usize(..6)];
        random.u64(..=most)
    });
    let Session { client, backend, relayed } = rig.session(NO_TIMEOUTS);
    let ((mut client_reads, mut client_writes), (mut backend_reads, mut backend_writes)) =
        (client.into_split(), backend.into_split());
    let over = async {
        let relayed = relayed.await.unwrap();
        // A session does the same: one of the two peers may wait for this FIN.
        drop(relayed.sockets);
        let RelayResult { ending, bytes, first_byte, .. } = relayed;
        let Bytes { bytes_in, bytes_out, .. } = bytes;
        (ending, [bytes_in, bytes_out], first_byte)
    };
    let (got_back, got_there, (), (), (ending, counted, first_byte)) = tokio::join!(
        receive_all(&mut client_reads, seed + 1_000_000, random.fork()),
        receive_all(&mut backend_reads, seed, random.fork()),
        send_all(&mut client_writes, seed, lengths[0], random.fork()),
        send_all(&mut backend_writes, seed + 1_000_000, lengths[1], random.fork()),
        over,
    );
    assert_eq!([got_there, got_back], lengths);
    assert_eq!(ending.cause, Cause::Finished, "{ending:?}");
    assert_eq!(counted, lengths);
    assert_eq!(first_byte.is_some(), lengths[1] > 0);
}

#[test]
fn streams_arrive_completely_in_any_order_of_ends() {
    on_each(|rig| async move {
        for round in 0..8 {
            let streams = (0..32).map(|number| {
                tokio::task::spawn_local(exchange(rig.clone(), round * 100 + number))
            });
            for stream in streams.collect::<Vec<_>>() {
                stream.await.unwrap();
            }
        }
    });
}

#[test]
fn short_sessions_reuse_keys_without_mixing_bytes() {
    on_each(|rig| async move {
        for _ in 0..30 {
            let sessions = (0..40u8).map(|number| {
                let mut session = rig.session(NO_TIMEOUTS);
                tokio::task::spawn_local(async move {
                    session.client.write_all(&[number; 64]).await.unwrap();
                    let mut got = [0; 64];
                    session.backend.read_exact(&mut got).await.unwrap();
                    session.backend.write_all(&got).await.unwrap();
                    session.client.read_exact(&mut got).await.unwrap();
                    assert_eq!(got, [number; 64]);
                    // Ends of all kinds, some with unread bytes.
                    match number % 4 {
                        0 => reset(session.client),
                        1 => reset(session.backend),
                        2 => {
                            session.backend.write_all(&[0; 50_000]).await.unwrap();
                            reset(session.client);
                        }
                        _ => drop((session.client, session.backend)),
                    }
                    let relayed = session.relayed.await.unwrap();
                    assert_eq!(relayed.bytes.bytes_in, 64);
                    assert!(relayed.bytes.bytes_out >= 64);
                })
            });
            for session in sessions.collect::<Vec<_>>() {
                session.await.unwrap();
            }
        }
    });
}

/// Most bytes that the engine may accept from a sender whose reader stalls: kernel buffers
/// (small here) and the engine's queue.
const STALLED_MAX: u64 = 2 * 1024 * 1024;

fn small_buffers(socket: SockRef<'_>) {
    socket.set_send_buffer_size(32 * 1024).unwrap();
    socket.set_recv_buffer_size(32 * 1024).unwrap();
}

#[test]
fn stalled_reader_stops_its_sender_and_loses_no_bytes() {
    on_each(|rig| async move {
        let Session { mut client, mut backend, relayed } =
            rig.session_with(NO_TIMEOUTS, small_buffers);
        let total = 24 * 1024 * 1024;
        let sending = tokio::task::spawn_local(async move {
            let mut at = 0;
            while at < total {
                client.write_all(&part(5, at, 64 * 1024)).await.unwrap();
                at += 64 * 1024;
            }
            client.shutdown().await.unwrap();
            client
        });
        let mut before = u64::MAX;
        while std::mem::replace(&mut before, rig.bytes_in()) != rig.bytes_in() || before == 0 {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        assert!(before <= STALLED_MAX, "{before} bytes accepted");

        let mut buffer = vec![0; 256 * 1024];
        let mut at = 0;
        while at < total {
            let len = backend.read(&mut buffer).await.unwrap();
            assert!(len > 0 && buffer[..len] == part(5, at, len));
            at += len as u64;
        }
        drop((sending.await.unwrap(), backend));
        assert_eq!(relayed.await.unwrap().bytes.bytes_in, total);
    });
}

#[test]
fn stalled_readers_do_not_delay_other_sessions() {
    on_each(|rig| async move {
        let mut stalled: Vec<_> = (0..40).map(|_| rig.session(NO_TIMEOUTS)).collect();
        for session in &mut stalled {
            // Until the queues are full; the backend does not read.
            while tokio::time::timeout(
                Duration::from_millis(20),
                session.client.write_all(&[7; 1 << 20]),
            )
            .await
            .is_ok()
            {}
        }
        let mut active = rig.session(NO_TIMEOUTS);
        for number in 0..200u8 {
            let mut got = [0; 3];
            active.client.write_all(&[number; 3]).await.unwrap();
            active.backend.read_exact(&mut got).await.unwrap();
            active.backend.write_all(&got).await.unwrap();
            active.client.read_exact(&mut got).await.unwrap();
            assert_eq!(got, [number; 3]);
        }
        drop(active);
        rig.engine.abort_all(Cause::DrainDeadline);
    });
}

#[test]
fn urgent_byte_stays_in_the_stream() {
    on_each(|rig| async move {
        let Session { client, mut backend, relayed } = rig.session_with(NO_TIMEOUTS, |_| {});
        backend.write_all(b"be").await.unwrap();
        let mut client = client;
        let mut got = [0; 2];
        client.read_exact(&mut got).await.unwrap();
        SockRef::from(&backend).send_out_of_band(b"!").unwrap();
        // Read inline, the byte is not dropped, whether it arrives as urgent or not.
        let mut after = [0; 2];
        tokio::time::sleep(Duration::from_millis(20)).await;
        backend.write_all(b"a").await.unwrap();
        client.read_exact(&mut after).await.unwrap();
        assert_eq!(&after, b"!a");
        drop((client, backend));
        relayed.await.unwrap();
    });
}

const BULK: u64 = 6 * 1024 * 1024;

/// Sends the bytes `at..at + BULK` of the stream `seed` in large pieces, and checks them.
async fn bulk(from: &mut TcpStream, to: &mut TcpStream, seed: u64, at: u64) {
    let sending = async {
        for start in (at..at + BULK).step_by(256 * 1024) {
            from.write_all(&part(seed, start, 256 * 1024)).await.unwrap();
        }
    };
    let receiving = async {
        let mut got = vec![0; BULK as usize];
        to.read_exact(&mut got).await.unwrap();
        assert!(got == part(seed, at, got.len()), "garbled after {at}");
    };
    tokio::join!(sending, receiving);
}

#[test]
fn alternating_bulk_and_small_messages_lose_no_bytes() {
    on_each(|rig| async move {
        let Session { mut client, mut backend, relayed } = rig.session(NO_TIMEOUTS);
        let mut at = 0;
        for _ in 0..4 {
            bulk(&mut client, &mut backend, 1, at).await;
            bulk(&mut backend, &mut client, 2, at).await;
            at += BULK;
            for _ in 0..40 {
                let mut got = [0; 5];
                client.write_all(&part(1, at, 5)).await.unwrap();
                backend.read_exact(&mut got).await.unwrap();
                assert_eq!(got, *part(1, at, 5));
                backend.write_all(&part(2, at, 5)).await.unwrap();
                client.read_exact(&mut got).await.unwrap();
                assert_eq!(got, *part(2, at, 5));
                at += 5;
            }
        }
        drop((client, backend));
        let relayed = relayed.await.unwrap();
        assert_eq!((relayed.bytes.bytes_in, relayed.bytes.bytes_out), (at, at));
    });
}

/// The sizes of the queues of a socket.
struct QueueSizes {
    receives: usize,
    sends: usize,
}

/// Relays bulk or a small message from a client to a backend. Returns the sizes of the queues to
/// the client and to the backend.
async fn queues_after(rig: &Rig, bulky: bool) -> [QueueSizes; 2] {
    let Session { mut client, mut backend, relayed } = rig.session(NO_TIMEOUTS);
    if bulky {
        bulk(&mut client, &mut backend, 1, 0).await;
    } else {
        client.write_all(&part(1, 0, 5_000)).await.unwrap();
        backend.read_exact(&mut [0; 5_000]).await.unwrap();
    }
    drop((client, backend));
    let sockets = relayed.await.unwrap().sockets.unwrap();
    sockets.each_ref().map(|socket| QueueSizes {
        receives: SockRef::from(socket).recv_buffer_size().unwrap(),
        sends: SockRef::from(socket).send_buffer_size().unwrap(),
    })
}

#[test]
fn bulk_between_local_peers_uses_short_socket_queues() {
    let most: usize = std::fs::read_to_string("/proc/sys/net/core/rmem_max")
        .map_or(usize::MAX, |text| text.trim().parse().unwrap());
    let (sends, receives) = (2 * 208 * 1024, 2 * most.min(256 * 1024));
    let test = |rig: Rig| async move {
        let [from, to] = queues_after(&rig, false).await;
        assert!(from.receives != receives && to.sends != sends);
        for _ in 0..20 {
            let [from, to] = queues_after(&rig, true).await;
            assert_eq!(to.sends, sends);
            // No bulk went in the other direction.
            assert!(from.sends > sends);
            assert_ne!(to.receives, receives);
            if from.receives == receives {
                return;
            }
            // The kernel lengthened the queue before the stream was bulk. Such a queue remains.
            assert!(from.receives > receives, "{}", from.receives);
        }
        panic!("the kernel always lengthened the queue before the stream was bulk");
    };
    on(EngineKind::Epoll, || epoll_engine(None, Arc::default(), counters()), test);
    on(EngineKind::IoUring, || ring_engine(None, RING_SETTINGS, Arc::default(), counters()), test);
}

#[test]
fn fin_after_bulk_follows_the_last_byte_and_the_answer_still_arrives() {
    on_each(|rig| async move {
        let Session { mut client, mut backend, relayed } = rig.session(NO_TIMEOUTS);
        bulk(&mut client, &mut backend, 1, 0).await;
        client.write_all(&part(1, BULK, 700_000)).await.unwrap();
        client.shutdown().await.unwrap();
        let mut tail = Vec::new();
        backend.read_to_end(&mut tail).await.unwrap();
        assert!(tail == part(1, BULK, 700_000));
        bulk(&mut backend, &mut client, 2, 0).await;
        drop(backend);
        assert_eq!(client.read(&mut [0]).await.unwrap(), 0);
        assert_eq!(relayed.await.unwrap().ending.cause, Cause::Finished);
    });
}

#[test]
fn urgent_byte_amid_bulk_delays_no_bytes() {
    on_each(|rig| async move {
        let Session { mut client, mut backend, relayed } = rig.session(NO_TIMEOUTS);
        bulk(&mut backend, &mut client, 2, 0).await;
        SockRef::from(&backend).send_out_of_band(b"!").unwrap();
        backend.write_all(b"a").await.unwrap();
        let mut after = [0; 2];
        client.read_exact(&mut after).await.unwrap();
        assert_eq!(&after, b"!a");
        bulk(&mut backend, &mut client, 2, BULK).await;
        drop((client, backend));
        relayed.await.unwrap();
    });
}

#[test]
fn urgent_byte_and_fin_after_bulk_lose_no_bytes() {
    let runs = if std::env::var("TIDEGATE_LONG").is_ok_and(|long| long == "1") { 200 } else { 8 };
    on_each(|rig| async move {
        for run in 0..runs {
            let Session { client, backend, relayed } = rig.session(NO_TIMEOUTS);
            let (mut from, mut to) =
                if run % 2 == 0 { (client, backend) } else { (backend, client) };
            let (bulk, tail) = ([300_000, 4_000_000][run / 2 % 2], [10, 100_000][run / 4 % 2]);
            let sending = async {
                from.write_all(&vec![1; bulk]).await.unwrap();
                from.writable().await.unwrap();
                while SockRef::from(&from).send_out_of_band(b"!").is_err() {
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
                from.write_all(&vec![2; tail]).await.unwrap();
                from.shutdown().await.unwrap();
            };
            let mut got = Vec::new();
            let (read, ()) = tokio::join!(to.read_to_end(&mut got), sending);
            read.unwrap();
            assert_eq!((got.len(), got[bulk]), (bulk + 1 + tail, b'!'), "run {run}");
            to.shutdown().await.unwrap();
            relayed.await.unwrap();
        }
    });
}

#[test]
fn reset_amid_unread_bulk_is_passed_on() {
    on_each(|rig| async move {
        for side in SessionSide::BOTH {
            let Session { mut client, mut backend, relayed } = rig.session(NO_TIMEOUTS);
            bulk(&mut client, &mut backend, 1, 0).await;
            let flood = async { while client.write_all(&[9; 1 << 16]).await.is_ok() {} };
            let _ = tokio::time::timeout(Duration::from_millis(50), flood).await;
            let (failing, other) = match side {
                SessionSide::Client => (client, backend),
                SessionSide::Backend => (backend, client),
            };
            reset(failing);
            // A failed receiver ends the session at once; a failed sender, once its bytes are
            // delivered.
            let reading = tokio::task::spawn_local(async move {
                let mut other = other;
                let mut buffer = vec![0; 1 << 18];
                while other.read(&mut buffer).await.is_ok_and(|len| len > 0) {}
            });
            let ending = relayed.await.unwrap().ending;
            assert_eq!(ending.cause, Cause::of_failure(side, libc::ECONNRESET));
            reading.await.unwrap();
        }
    });
}

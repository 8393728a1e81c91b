//! Bytes: all of them, once, in order, whatever the sizes and the readers.

use super::*;

/// The `index`-th byte of the stream `seed`.
fn byte(seed: u64, index: u64) -> u8 {
    let mixed = (index / 7 + seed).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    (mixed >> 56) as u8 ^ index as u8
}

fn stretch(seed: u64, from: u64, len: usize) -> Vec<u8> {
    (from..from + len as u64).map(|index| byte(seed, index)).collect()
}

/// Sends `total` bytes of the stream `seed` in odd pieces, then FIN.
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
        socket.write_all(&stretch(seed, at, len)).await.unwrap();
        at += len as u64;
        if random.u8(..8) == 0 {
            tokio::time::sleep(Duration::from_millis(random.u64(..3))).await;
        }
    }
    socket.shutdown().await.unwrap();
}

/// Reads to FIN, at times slowly; how much came of the stream `seed`.
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
        assert!(buffer[..len] == stretch(seed, at, len), "stream {seed} is garbled at {at}");
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
    let Session { client, backend, relayed } = rig.session(FOREVER);
    let ((mut client_reads, mut client_writes), (mut backend_reads, mut backend_writes)) =
        (client.into_split(), backend.into_split());
    let over = async {
        let relayed = relayed.await.unwrap();
        // As the session does: one of the two may wait for this FIN.
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
fn hundreds_of_streams_arrive_whole_in_any_order_of_ends() {
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
fn short_sessions_reuse_each_others_places() {
    on_each(|rig| async move {
        for _ in 0..30 {
            let sessions = (0..40u8).map(|number| {
                let mut session = rig.session(FOREVER);
                tokio::task::spawn_local(async move {
                    session.client.write_all(&[number; 64]).await.unwrap();
                    let mut got = [0; 64];
                    session.backend.read_exact(&mut got).await.unwrap();
                    session.backend.write_all(&got).await.unwrap();
                    session.client.read_exact(&mut got).await.unwrap();
                    assert_eq!(got, [number; 64]);
                    // Ends of all kinds, some with bytes nobody will read.
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

/// What the engine may take off a sender whose reader stalls: the kernel's
/// buffers (small ones here), and what is queued.
const STALLED_MAX: u64 = 2 * 1024 * 1024;

fn small_buffers(socket: SockRef<'_>) {
    socket.set_send_buffer_size(32 * 1024).unwrap();
    socket.set_recv_buffer_size(32 * 1024).unwrap();
}

#[test]
fn a_reader_that_stalls_holds_its_sender_up_and_loses_nothing() {
    on_each(|rig| async move {
        let Session { mut client, mut backend, relayed } = rig.session_with(FOREVER, small_buffers);
        let total = 24 * 1024 * 1024;
        let sending = tokio::task::spawn_local(async move {
            let mut at = 0;
            while at < total {
                client.write_all(&stretch(5, at, 64 * 1024)).await.unwrap();
                at += 64 * 1024;
            }
            client.shutdown().await.unwrap();
            client
        });
        let mut before = u64::MAX;
        while std::mem::replace(&mut before, rig.bytes_in()) != rig.bytes_in() || before == 0 {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        assert!(before <= STALLED_MAX, "{before} bytes taken");

        let mut buffer = vec![0; 256 * 1024];
        let mut at = 0;
        while at < total {
            let len = backend.read(&mut buffer).await.unwrap();
            assert!(len > 0 && buffer[..len] == stretch(5, at, len));
            at += len as u64;
        }
        drop((sending.await.unwrap(), backend));
        assert_eq!(relayed.await.unwrap().bytes.bytes_in, total);
    });
}

#[test]
fn stalled_readers_do_not_starve_the_others() {
    on_each(|rig| async move {
        let mut stalled: Vec<_> = (0..40).map(|_| rig.session(FOREVER)).collect();
        for session in &mut stalled {
            // As much as is taken at once; nobody will read it.
            while tokio::time::timeout(
                Duration::from_millis(20),
                session.client.write_all(&[7; 1 << 20]),
            )
            .await
            .is_ok()
            {}
        }
        let mut lively = rig.session(FOREVER);
        for number in 0..200u8 {
            let mut got = [0; 3];
            lively.client.write_all(&[number; 3]).await.unwrap();
            lively.backend.read_exact(&mut got).await.unwrap();
            lively.backend.write_all(&got).await.unwrap();
            lively.client.read_exact(&mut got).await.unwrap();
            assert_eq!(got, [number; 3]);
        }
        drop(lively);
        rig.engine.abort_all(Cause::DrainDeadline);
    });
}

#[test]
fn an_urgent_byte_stays_in_the_stream() {
    on_each(|rig| async move {
        let Session { client, mut backend, relayed } = rig.session_with(FOREVER, |_| {});
        backend.write_all(b"be").await.unwrap();
        let mut client = client;
        let mut got = [0; 2];
        client.read_exact(&mut got).await.unwrap();
        SockRef::from(&backend).send_out_of_band(b"!").unwrap();
        // Whether it came as urgent or not, it is not dropped once read inline.
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

/// Sends the bytes `at..at + BULK` of the stream `seed` one way, in big pieces.
async fn bulk(from: &mut TcpStream, to: &mut TcpStream, seed: u64, at: u64) {
    let sending = async {
        for start in (at..at + BULK).step_by(256 * 1024) {
            from.write_all(&stretch(seed, start, 256 * 1024)).await.unwrap();
        }
    };
    let receiving = async {
        let mut got = vec![0; BULK as usize];
        to.read_exact(&mut got).await.unwrap();
        assert!(got == stretch(seed, at, got.len()), "garbled after {at}");
    };
    tokio::join!(sending, receiving);
}

#[test]
fn bulk_and_small_talk_take_turns_and_nothing_is_lost() {
    on_each(|rig| async move {
        let Session { mut client, mut backend, relayed } = rig.session(FOREVER);
        let mut at = 0;
        for _ in 0..4 {
            bulk(&mut client, &mut backend, 1, at).await;
            bulk(&mut backend, &mut client, 2, at).await;
            at += BULK;
            for _ in 0..40 {
                let mut got = [0; 5];
                client.write_all(&stretch(1, at, 5)).await.unwrap();
                backend.read_exact(&mut got).await.unwrap();
                assert_eq!(got, *stretch(1, at, 5));
                backend.write_all(&stretch(2, at, 5)).await.unwrap();
                client.read_exact(&mut got).await.unwrap();
                assert_eq!(got, *stretch(2, at, 5));
                at += 5;
            }
        }
        drop((client, backend));
        let relayed = relayed.await.unwrap();
        assert_eq!((relayed.bytes.bytes_in, relayed.bytes.bytes_out), (at, at));
    });
}

#[test]
fn bulk_between_peers_on_this_host_is_queued_no_longer_than_the_caches_hold() {
    let most: usize = std::fs::read_to_string("/proc/sys/net/core/rmem_max")
        .map_or(usize::MAX, |text| text.trim().parse().unwrap());
    let (sends, receives) = (2 * 208 * 1024, 2 * most.min(256 * 1024));
    let test = |rig: Rig| async move {
        for bulky in [false, true] {
            let Session { mut client, mut backend, relayed } = rig.session(FOREVER);
            if bulky {
                bulk(&mut client, &mut backend, 1, 0).await;
            } else {
                client.write_all(&stretch(1, 0, 5_000)).await.unwrap();
                backend.read_exact(&mut [0; 5_000]).await.unwrap();
            }
            drop((client, backend));
            let sockets = relayed.await.unwrap().sockets.unwrap();
            let [from, to] = sockets.each_ref().map(SockRef::from);
            assert_eq!(from.recv_buffer_size().unwrap() == receives, bulky);
            assert_eq!(to.send_buffer_size().unwrap() == sends, bulky);
            // Nothing of the kind went the other way.
            assert!(from.send_buffer_size().unwrap() > sends);
            assert_ne!(to.recv_buffer_size().unwrap(), receives);
        }
    };
    on(EngineKind::Epoll, || epoll_engine(None, Arc::default(), counters()), test);
    on(EngineKind::IoUring, || ring_engine(None, RING_SETTINGS, Arc::default(), counters()), test);
}

#[test]
fn a_fin_behind_bulk_comes_after_the_last_byte_and_the_answer_still_passes() {
    on_each(|rig| async move {
        let Session { mut client, mut backend, relayed } = rig.session(FOREVER);
        bulk(&mut client, &mut backend, 1, 0).await;
        client.write_all(&stretch(1, BULK, 700_000)).await.unwrap();
        client.shutdown().await.unwrap();
        let mut tail = Vec::new();
        backend.read_to_end(&mut tail).await.unwrap();
        assert!(tail == stretch(1, BULK, 700_000));
        bulk(&mut backend, &mut client, 2, 0).await;
        drop(backend);
        assert_eq!(client.read(&mut [0]).await.unwrap(), 0);
        assert_eq!(relayed.await.unwrap().ending.cause, Cause::Finished);
    });
}

#[test]
fn an_urgent_byte_amid_bulk_holds_nothing_up() {
    on_each(|rig| async move {
        let Session { mut client, mut backend, relayed } = rig.session(FOREVER);
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
fn bulk_an_urgent_byte_and_a_fin_lose_nothing() {
    let runs = if std::env::var("TIDEGATE_LONG").is_ok_and(|long| long == "1") { 200 } else { 8 };
    on_each(|rig| async move {
        for run in 0..runs {
            let Session { client, backend, relayed } = rig.session(FOREVER);
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
            let Session { mut client, mut backend, relayed } = rig.session(FOREVER);
            bulk(&mut client, &mut backend, 1, 0).await;
            let flood = async { while client.write_all(&[9; 1 << 16]).await.is_ok() {} };
            let _ = tokio::time::timeout(Duration::from_millis(50), flood).await;
            let (failing, other) = match side {
                SessionSide::Client => (client, backend),
                SessionSide::Backend => (backend, client),
            };
            reset(failing);
            // A receiver that is gone ends it at once; a sender that is, once
            // what it had sent is taken.
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

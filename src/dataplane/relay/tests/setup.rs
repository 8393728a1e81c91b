//! Tests of sessions before the relay: connects, their timeouts, and clients that reset.

use super::*;
use tidegate_net::stream::{self, ConnectTarget, Connecting};

/// A listener with a full listen queue: connects to it stay pending.
struct FullListener {
    _listener: Socket,
    _queued: Vec<(OwnedFd, Connecting)>,
    address: SocketAddr,
}

impl FullListener {
    fn new() -> FullListener {
        let listener = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        listener.bind(&"127.0.0.1:0".parse::<SocketAddr>().unwrap().into()).unwrap();
        listener.listen(0).unwrap();
        let address = listener.local_addr().unwrap().as_socket().unwrap();
        let queued =
            (0..4).map(|_| stream::connect(ConnectTarget::Tcp(address)).unwrap()).collect();
        FullListener { _listener: listener, _queued: queued, address }
    }
}

fn pending(address: SocketAddr) -> OwnedFd {
    let (socket, progress) = stream::connect(ConnectTarget::Tcp(address)).unwrap();
    assert_eq!(progress, Connecting::Pending);
    socket
}

fn soon(millis: u64) -> Instant {
    clock::now() + Duration::from_millis(millis)
}

#[test]
fn successful_connect_is_relayed() {
    on_each(|rig| async move {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let (client, downstream) = tcp_pair();
        let handle = RelayHandle::open(&rig.engine, downstream.into(), identity(), clock::now());
        let upstream = pending(listener.local_addr().unwrap());
        handle.connected(upstream, soon(5_000)).await.unwrap();
        let relayed = tokio::task::spawn_local(relay(handle, NO_TIMEOUTS, rig.meter()));

        let (backend, _) = listener.accept().unwrap();
        backend.set_nonblocking(true).unwrap();
        let mut backend = TcpStream::from_std(backend).unwrap();
        let mut client = TcpStream::from_std(client).unwrap();
        client.write_all(b"ping").await.unwrap();
        let mut got = [0; 4];
        backend.read_exact(&mut got).await.unwrap();
        assert_eq!(&got, b"ping");
        drop((client, backend));
        assert_eq!(relayed.await.unwrap().bytes.bytes_in, 4);
    });
}

#[test]
fn session_can_connect_after_a_refused_attempt() {
    on_each(|rig| async move {
        let (_bound, closed) = refusing_address();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let (client, downstream) = tcp_pair();
        let handle = RelayHandle::open(&rig.engine, downstream.into(), identity(), clock::now());

        let refused = handle.connected(pending(closed), soon(5_000)).await.unwrap_err();
        let ConnectEnd::Failed(error) = refused else { panic!("{refused:?}") };
        assert_eq!(error.raw_os_error(), Some(libc::ECONNREFUSED));

        let upstream = pending(listener.local_addr().unwrap());
        handle.connected(upstream, soon(5_000)).await.unwrap();
        drop((handle, client));
    });
}

#[test]
fn connect_ends_at_its_deadline() {
    on_each(|rig| async move {
        let full = FullListener::new();
        let (client, downstream) = tcp_pair();
        let handle = RelayHandle::open(&rig.engine, downstream.into(), identity(), clock::now());
        let started = clock::now();
        let end = handle.connected(pending(full.address), soon(200)).await.unwrap_err();
        let took = clock::now() - started;
        assert!(matches!(end, ConnectEnd::TimedOut), "{end:?}");
        assert!(took >= Duration::from_millis(199) && took < Duration::from_secs(3), "{took:?}");

        drop(handle);
        let mut client = TcpStream::from_std(client).unwrap();
        let error = client.read(&mut [0]).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
    });
}

#[test]
fn client_reset_ends_a_pending_connect() {
    on_each(|rig| async move {
        let full = FullListener::new();
        let (client, downstream) = tcp_pair();
        let handle = RelayHandle::open(&rig.engine, downstream.into(), identity(), clock::now());
        let upstream = pending(full.address);
        let connecting =
            tokio::task::spawn_local(async move { handle.connected(upstream, soon(10_000)).await });
        tokio::time::sleep(Duration::from_millis(50)).await;
        reset(TcpStream::from_std(client).unwrap());
        let end = connecting.await.unwrap().unwrap_err();
        assert!(matches!(end, ConnectEnd::ClientGone(libc::ECONNRESET)), "{end:?}");
    });
}

#[test]
fn abort_ends_a_pending_connect_and_a_wait() {
    on_each(|rig| async move {
        let full = FullListener::new();
        let (_client, downstream) = tcp_pair();
        let handle = RelayHandle::open(&rig.engine, downstream.into(), identity(), clock::now());
        let upstream = pending(full.address);
        let connecting =
            tokio::task::spawn_local(async move { handle.connected(upstream, soon(10_000)).await });
        let (_waiting_client, downstream) = tcp_pair();
        let handle = RelayHandle::open(&rig.engine, downstream.into(), identity(), clock::now());
        let waiting = tokio::task::spawn_local(async move { handle.interrupted().await });
        tokio::time::sleep(Duration::from_millis(20)).await;

        assert_eq!(rig.engine.abort_all(Cause::DrainDeadline), 2);
        let end = connecting.await.unwrap().unwrap_err();
        assert!(matches!(end, ConnectEnd::Aborted(Cause::DrainDeadline)), "{end:?}");
        let end = waiting.await.unwrap();
        assert!(matches!(end, ConnectEnd::Aborted(Cause::DrainDeadline)), "{end:?}");
    });
}

#[test]
fn client_reset_ends_a_wait() {
    on_each(|rig| async move {
        let (client, downstream) = tcp_pair();
        let handle = RelayHandle::open(&rig.engine, downstream.into(), identity(), clock::now());
        let waiting = tokio::task::spawn_local(async move { handle.interrupted().await });
        tokio::time::sleep(Duration::from_millis(20)).await;
        reset(TcpStream::from_std(client).unwrap());
        assert!(matches!(waiting.await.unwrap(), ConnectEnd::ClientGone(_)));
    });
}

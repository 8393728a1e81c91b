//! Before the relay: connects that come to an end, or not, and clients that do
//! not wait for it.

use super::*;
use tidegate_net::stream::{self, ConnectTarget, Connecting};

/// A listener whose queue is full: connects to it stay pending.
struct Deaf {
    _listener: Socket,
    _queued: Vec<(OwnedFd, Connecting)>,
    address: SocketAddr,
}

impl Deaf {
    fn new() -> Deaf {
        let listener = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        listener.bind(&"127.0.0.1:0".parse::<SocketAddr>().unwrap().into()).unwrap();
        listener.listen(0).unwrap();
        let address = listener.local_addr().unwrap().as_socket().unwrap();
        let queued =
            (0..4).map(|_| stream::connect(ConnectTarget::Tcp(address)).unwrap()).collect();
        Deaf { _listener: listener, _queued: queued, address }
    }
}

fn pending(address: SocketAddr) -> OwnedFd {
    let (socket, how_far) = stream::connect(ConnectTarget::Tcp(address)).unwrap();
    assert_eq!(how_far, Connecting::Pending);
    socket
}

fn soon(millis: u64) -> Instant {
    clock::now() + Duration::from_millis(millis)
}

#[test]
fn a_connect_that_succeeds_is_relayed_over() {
    on_each(|rig| async move {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let (client, downstream) = tcp_pair();
        let flow = RelayHandle::open(&rig.engine, downstream.into());
        let upstream = pending(listener.local_addr().unwrap());
        flow.connected(upstream, soon(5_000)).await.unwrap();
        let relayed = tokio::task::spawn_local(relay(flow, FOREVER, rig.meter()));

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
fn a_refused_connect_may_be_followed_by_one_that_stands() {
    on_each(|rig| async move {
        let (_bound, closed) = refusing_address();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let (client, downstream) = tcp_pair();
        let flow = RelayHandle::open(&rig.engine, downstream.into());

        let refused = flow.connected(pending(closed), soon(5_000)).await.unwrap_err();
        let ConnectEnd::Failed(error) = refused else { panic!("{refused:?}") };
        assert_eq!(error.raw_os_error(), Some(libc::ECONNREFUSED));

        let upstream = pending(listener.local_addr().unwrap());
        flow.connected(upstream, soon(5_000)).await.unwrap();
        drop((flow, client));
    });
}

#[test]
fn a_connect_that_takes_too_long_is_timed_out() {
    on_each(|rig| async move {
        let deaf = Deaf::new();
        let (client, downstream) = tcp_pair();
        let flow = RelayHandle::open(&rig.engine, downstream.into());
        let started = clock::now();
        let end = flow.connected(pending(deaf.address), soon(200)).await.unwrap_err();
        let took = clock::now() - started;
        assert!(matches!(end, ConnectEnd::TimedOut), "{end:?}");
        assert!(took >= Duration::from_millis(199) && took < Duration::from_secs(3), "{took:?}");

        drop(flow);
        let mut client = TcpStream::from_std(client).unwrap();
        let told = client.read(&mut [0]).await.unwrap_err();
        assert_eq!(told.kind(), io::ErrorKind::ConnectionReset);
    });
}

#[test]
fn a_client_that_resets_ends_a_slow_connect() {
    on_each(|rig| async move {
        let deaf = Deaf::new();
        let (client, downstream) = tcp_pair();
        let flow = RelayHandle::open(&rig.engine, downstream.into());
        let upstream = pending(deaf.address);
        let connecting =
            tokio::task::spawn_local(async move { flow.connected(upstream, soon(10_000)).await });
        tokio::time::sleep(Duration::from_millis(50)).await;
        reset(TcpStream::from_std(client).unwrap());
        let end = connecting.await.unwrap().unwrap_err();
        assert!(matches!(end, ConnectEnd::ClientGone(libc::ECONNRESET)), "{end:?}");
    });
}

#[test]
fn a_cut_ends_a_slow_connect_and_a_wait() {
    on_each(|rig| async move {
        let deaf = Deaf::new();
        let (_client, downstream) = tcp_pair();
        let flow = RelayHandle::open(&rig.engine, downstream.into());
        let upstream = pending(deaf.address);
        let connecting =
            tokio::task::spawn_local(async move { flow.connected(upstream, soon(10_000)).await });
        let (_waiting_client, downstream) = tcp_pair();
        let flow = RelayHandle::open(&rig.engine, downstream.into());
        let waiting = tokio::task::spawn_local(async move { flow.interrupted().await });
        tokio::time::sleep(Duration::from_millis(20)).await;

        assert_eq!(rig.engine.abort_all(Cause::DrainDeadline), 2);
        let end = connecting.await.unwrap().unwrap_err();
        assert!(matches!(end, ConnectEnd::Aborted(Cause::DrainDeadline)), "{end:?}");
        let end = waiting.await.unwrap();
        assert!(matches!(end, ConnectEnd::Aborted(Cause::DrainDeadline)), "{end:?}");
    });
}

#[test]
fn a_client_that_resets_ends_a_wait() {
    on_each(|rig| async move {
        let (client, downstream) = tcp_pair();
        let flow = RelayHandle::open(&rig.engine, downstream.into());
        let waiting = tokio::task::spawn_local(async move { flow.interrupted().await });
        tokio::time::sleep(Duration::from_millis(20)).await;
        reset(TcpStream::from_std(client).unwrap());
        assert!(matches!(waiting.await.unwrap(), ConnectEnd::ClientGone(_)));
    });
}

//! Connections to receivers that answer, hang, end and come back.

use super::*;
use std::io::Read;
use std::net::{TcpListener, UdpSocket};
use std::os::unix::net::UnixDatagram;
use tidegate_net::clock::now;

fn connection(address: SyslogAddress) -> SyslogConnection {
    SyslogConnection::new(address, now)
}

/// Repeats until the message is sent.
#[track_caller]
fn sent(to: &mut SyslogConnection, message: &str) {
    let start = now();
    while to.send(message.as_bytes()).is_err() {
        assert!(now() - start < Duration::from_secs(20), "{message:?} is not sent");
        std::thread::park_timeout(WAIT);
    }
}

fn loopback_listener() -> (TcpListener, SocketAddr) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    (listener, address)
}

#[test]
fn datagram_receivers_get_one_message_per_datagram() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("log");
    let unix = UnixDatagram::bind(&path).unwrap();
    let udp = UdpSocket::bind("[::1]:0").unwrap();
    let mut to_unix = connection(SyslogAddress::Unix(path));
    let mut to_udp = connection(SyslogAddress::Udp(udp.local_addr().unwrap()));
    let mut buffer = [0; MESSAGE_MAX + 1];
    for message in ["<134>1 first", "<134>1 second"] {
        sent(&mut to_unix, message);
        sent(&mut to_udp, message);
        let count = unix.recv(&mut buffer).unwrap();
        assert_eq!(&buffer[..count], message.as_bytes());
        let count = udp.recv(&mut buffer).unwrap();
        assert_eq!(&buffer[..count], message.as_bytes());
    }
    sent(&mut to_udp, &"x".repeat(2 * MESSAGE_MAX));
    assert_eq!(udp.recv(&mut buffer).unwrap(), MESSAGE_MAX);
}

#[test]
fn unix_receiver_that_hangs_is_would_block_and_one_that_returns_gets_the_next_message() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("log");
    let mut to = connection(SyslogAddress::Unix(path.clone()));
    assert_eq!(to.send(b"early").unwrap_err().kind(), io::ErrorKind::NotFound);
    let receiver = UnixDatagram::bind(&path).unwrap();
    sent(&mut to, "first");
    let full = (0..10_000).find_map(|_| to.send(b"more").err()).expect("the queue is full");
    assert_eq!(full.kind(), io::ErrorKind::WouldBlock);
    assert!(!to.has_unsent(), "a datagram has no rest");
    drop(receiver);
    std::fs::remove_file(&path).unwrap();
    assert!(to.send(b"lost").is_err());
    let receiver = UnixDatagram::bind(&path).unwrap();
    sent(&mut to, "after the restart");
    let mut buffer = [0; 64];
    let count = receiver.recv(&mut buffer).unwrap();
    assert_eq!(&buffer[..count], b"after the restart");
}

#[test]
fn tcp_frames_have_their_length_and_are_sent_again_after_a_restart_of_the_receiver() {
    let (listener, address) = loopback_listener();
    let mut to = connection(SyslogAddress::Tcp(address));
    sent(&mut to, "one");
    let (mut stream, _) = listener.accept().unwrap();
    let mut frame = [0; 5];
    stream.read_exact(&mut frame).unwrap();
    assert_eq!(&frame, b"3 one");
    drop((stream, listener));
    // The end of the stream has arrived when a new connect is refused.
    assert!(to.send(b"never sent").is_err());
    let listener = TcpListener::bind(address).unwrap();
    sent(&mut to, "\u{e9}t\u{e9}");
    let (mut stream, _) = listener.accept().unwrap();
    let mut frame = [0; 7];
    stream.read_exact(&mut frame).unwrap();
    assert_eq!(&frame, "5 \u{e9}t\u{e9}".as_bytes());
}

#[test]
fn frame_that_a_lost_connection_cut_is_sent_whole_on_the_next() {
    let (listener, address) = loopback_listener();
    let mut to = connection(SyslogAddress::Tcp(address));
    let message = "x".repeat(8_000);
    // The receiver does not read, so a frame is cut when the buffers are full.
    let mut count = 0;
    while !to.has_unsent() || to.sent == 0 {
        if to.send(message.as_bytes()).is_ok() {
            count += 1;
        }
        assert!(count < 10_000, "the buffers never fill");
    }
    assert_eq!(to.send(b"later").unwrap_err().kind(), io::ErrorKind::WouldBlock);
    // Unread data makes the close a reset.
    drop(listener.accept().unwrap());
    sent(&mut to, "after it");
    let (mut stream, _) = listener.accept().unwrap();
    let mut text = vec![0; 5 + 8_000 + 10];
    stream.read_exact(&mut text).unwrap();
    assert_eq!(String::from_utf8(text).unwrap(), format!("8000 {message}8 after it"));
}

#[test]
fn failed_connects_are_repeated_with_growing_pauses() {
    let (listener, address) = loopback_listener();
    drop(listener);
    let mut to = connection(SyslogAddress::Tcp(address));
    let (start, mut errors) = (now(), 0);
    while now() - start < Duration::from_millis(850) {
        let error = to.send(b"message").unwrap_err();
        errors += u32::from(error.kind() != io::ErrorKind::WouldBlock);
        std::thread::park_timeout(Duration::from_millis(1));
    }
    // At 0, 100, 300 and 700 ms.
    assert!((2..=4).contains(&errors), "{errors} connects");
}

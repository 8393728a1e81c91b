//! A receiver with one key, and helpers to wait for its heartbeats.

use crate::wait::eventually_some;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;
use tidegate_daemon::heartbeat::receive::{ReceivedHeartbeat, Receiver};
use tidegate_daemon::heartbeat::verify::{Verifier, VerifierLimits};
use tidegate_heartbeat::keys::{HeartbeatKey, KeyRing, Secret};
use tidegate_heartbeat::sender::SenderSettings;
use tidegate_heartbeat::wire::SenderIdentity;

pub const SECRET: [u8; 32] = [b'k'; 32];

/// The timeout of every wait.
pub const PATIENCE: Duration = Duration::from_secs(20);

pub fn secret() -> Secret {
    Secret::new(&SECRET).unwrap()
}

/// Key 7 for pool `web` on loopback.
pub fn key() -> HeartbeatKey {
    HeartbeatKey {
        id: 7,
        secret: secret(),
        pools: vec!["web".into()],
        addresses: vec!["127.0.0.0/8".parse().unwrap(), "::1/128".parse().unwrap()],
    }
}

pub fn gate() -> Verifier {
    Verifier::new(KeyRing::new([key()]).unwrap(), VerifierLimits::default(), 1)
}

/// Starts a receiver on loopback. Returns it with its address.
pub fn receiver() -> (Receiver, SocketAddr) {
    let receiver = Receiver::start(&["127.0.0.1:0".parse().unwrap()], gate()).unwrap();
    let address = receiver.addresses()[0];
    (receiver, address)
}

/// Settings of a sender for backend `a` with an interval of 20 ms.
pub fn settings(to: SocketAddr) -> SenderSettings {
    SenderSettings {
        to: vec![to],
        identity: SenderIdentity::new("web", "a", "127.0.0.1:80".parse().unwrap()).unwrap(),
        key_id: 7,
        secret: secret(),
        interval: Duration::from_millis(20),
    }
}

/// A key file in a directory that is removed with the returned handle.
pub fn key_file() -> (tempfile::TempDir, PathBuf) {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("hb.key");
    std::fs::write(&path, SECRET).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
    (dir, path)
}

/// Returns the next heartbeat for which `wanted` is true. Earlier heartbeats are dropped.
pub fn next_heartbeat(
    receiver: &Receiver,
    what: &str,
    wanted: impl Fn(&ReceivedHeartbeat) -> bool,
) -> ReceivedHeartbeat {
    eventually_some(PATIENCE, what, || std::iter::from_fn(|| receiver.pop()).find(&wanted))
}

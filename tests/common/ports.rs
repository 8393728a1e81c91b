//! Ports that no other process uses, including other processes of this suite.
//!
//! Ports are below the ephemeral range, so that no outgoing connection uses one. A
//! file lock reserves the port while the test process lives, because listeners with
//! SO_REUSEPORT could otherwise share a port unnoticed.

use std::fs::File;
use std::net::{Ipv4Addr, Ipv6Addr, TcpListener};
use std::sync::Mutex;

/// Below Linux's default ephemeral range (32768..) and above the usual services.
const RANGE: std::ops::Range<u16> = 12_000..32_000;

/// Locks held until this process ends.
static TAKEN: Mutex<Vec<File>> = Mutex::new(Vec::new());

/// Returns a TCP port that was free on IPv4 and IPv6. No other test gets it while this
/// process lives.
pub fn free_port() -> u16 {
    let dir = std::env::temp_dir().join("tidegate-test-ports");
    std::fs::create_dir_all(&dir).expect("create the port directory");
    for _ in 0..1000 {
        let port = fastrand::u16(RANGE);
        let path = dir.join(port.to_string());
        let Ok(file) = File::options().create(true).truncate(false).write(true).open(path) else {
            continue;
        };
        if file.try_lock().is_err() {
            continue;
        }
        let v4 = TcpListener::bind((Ipv4Addr::UNSPECIFIED, port));
        let v6 = TcpListener::bind((Ipv6Addr::LOCALHOST, port));
        if v4.is_ok() && v6.is_ok() {
            TAKEN.lock().expect("no test panics in here").push(file);
            return port;
        }
    }
    panic!("no free port in {RANGE:?}");
}

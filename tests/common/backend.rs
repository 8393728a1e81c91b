//! Scripted backends: threads that run one script for every connection.
//!
//! Tests start a backend on loopback or on a Unix socket. Each backend counts what
//! it observed, so that a test can compare Tidegate's numbers with it. Dropping a
//! backend closes its listener and its connections and joins its threads.

use super::ports::free_port;
use super::{patience, secs};
use socket2::{Domain, SockAddr, Socket, Type};
use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

/// What a backend does with one connection. The connection closes when the script returns.
pub type Script = Arc<dyn Fn(&Conn) + Send + Sync>;

/// One connection at the backend.
pub struct Conn {
    pub socket: Arc<Socket>,
    counts: Arc<Counts>,
}

/// What a backend has seen.
#[derive(Debug, Default)]
pub struct Counts {
    pub accepted: AtomicU64,
    pub active: AtomicU64,
    pub active_peak: AtomicU64,
    pub bytes_read: AtomicU64,
    pub bytes_written: AtomicU64,
    /// Connections that ended with a RST from Tidegate.
    pub resets_seen: AtomicU64,
    /// Connections that ended with a FIN from Tidegate.
    pub fins_seen: AtomicU64,
}

/// A listening backend.
pub struct ScriptedBackend {
    address: String,
    socket_address: Option<SocketAddr>,
    listener: Arc<Socket>,
    shared: Arc<Shared>,
    acceptor: Option<JoinHandle<()>>,
}

struct Shared {
    stopping: AtomicBool,
    counts: Arc<Counts>,
    open: Mutex<HashMap<u64, Arc<Socket>>>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

/// A barrier at which scripts wait until the test opens it.
#[derive(Clone, Default)]
pub struct Gate(Arc<(Mutex<bool>, Condvar)>);

impl Gate {
    /// Releases all waiting scripts, and every later script at once.
    pub fn open(&self) {
        *self.0.0.lock().expect("no panic in here") = true;
        self.0.1.notify_all();
    }

    /// Waits until the gate opens, for at most 60 s.
    pub fn wait(&self) {
        let held = self.0.0.lock().expect("no panic in here");
        let _ = self.0.1.wait_timeout_while(held, secs(60), |open| !*open);
    }
}

// === scripts ===

/// Sends back every byte it receives, and a FIN for a FIN.
pub fn echo() -> Script {
    Arc::new(|conn| {
        let mut buffer = vec![0; 64 * 1024];
        while let Ok(n) = conn.read(&mut buffer) {
            if n == 0 || conn.write_all(&buffer[..n]).is_err() {
                break;
            }
        }
    })
}

/// Sends its name and closes after the client has closed.
pub fn name(name: &str) -> Script {
    let name = name.to_string();
    Arc::new(move |conn| {
        let _ = conn.write_all(name.as_bytes());
        conn.fin();
        conn.drain();
    })
}

/// Sends a greeting first, then echoes.
pub fn greet(greeting: &str) -> Script {
    let greeting = greeting.to_string();
    let echo = echo();
    Arc::new(move |conn| {
        if conn.write_all(greeting.as_bytes()).is_ok() {
            echo(conn);
        }
    })
}

/// Accepts the connection and neither reads nor writes until it closes.
pub fn stall() -> Script {
    Arc::new(|conn| conn.wait_for_close())
}

/// Resets the connection after `n` received bytes.
pub fn reset_after(n: u64) -> Script {
    Arc::new(move |conn| {
        if conn.read_exactly(n) {
            conn.reset();
        }
    })
}

/// Sends FIN after `n` received bytes and continues to read.
pub fn half_close_after(n: u64) -> Script {
    Arc::new(move |conn| {
        if conn.read_exactly(n) {
            conn.fin();
            conn.drain();
        }
    })
}

/// Reads `chunk` bytes per `pause` until the stream ends.
pub fn slow_read(chunk: usize, pause: Duration) -> Script {
    Arc::new(move |conn| {
        // A small window, because the kernel otherwise buffers megabytes. Not below the
        // segment size of loopback, because each segment would wait for the persist timer.
        let _ = conn.socket.set_recv_buffer_size(128 * 1024);
        let mut buffer = vec![0; chunk];
        while matches!(conn.read(&mut buffer), Ok(n) if n > 0) {
            // The pace of this reader.
            std::thread::sleep(pause);
        }
    })
}

/// Answers every HTTP request on the connection with `status` and the backend's name.
/// Closes after a request with `Connection: close`.
pub fn http(name: &str, status: u16) -> Script {
    let answer = format!(
        "HTTP/1.1 {status} X\r\nContent-Length: {}\r\nContent-Type: text/plain\r\n\r\n{name}",
        name.len()
    );
    Arc::new(move |conn| {
        let mut seen = Vec::new();
        let mut buffer = [0; 4096];
        while let Ok(n @ 1..) = conn.read(&mut buffer) {
            seen.extend_from_slice(&buffer[..n]);
            while let Some(end) = seen.windows(4).position(|window| window == b"\r\n\r\n") {
                let head = String::from_utf8_lossy(&seen[..end]).to_ascii_lowercase();
                seen.drain(..end + 4);
                if conn.write_all(answer.as_bytes()).is_err() || head.contains("connection: close")
                {
                    return;
                }
            }
        }
    })
}

/// Makes a script of a closure.
pub fn script(run: impl Fn(&Conn) + Send + Sync + 'static) -> Script {
    Arc::new(run)
}

// === impl Conn ===

impl Conn {
    /// Reads some bytes and counts them and the end of the stream.
    pub fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        let result = (&*self.socket).read(buffer);
        match &result {
            Ok(0) => self.counts.fins_seen.fetch_add(1, Ordering::Relaxed),
            Ok(n) => self.counts.bytes_read.fetch_add(*n as u64, Ordering::Relaxed),
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => {
                self.counts.resets_seen.fetch_add(1, Ordering::Relaxed)
            }
            Err(_) => 0,
        };
        result
    }

    pub fn write_all(&self, bytes: &[u8]) -> io::Result<()> {
        (&*self.socket).write_all(bytes)?;
        self.counts.bytes_written.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        Ok(())
    }

    /// Closes the sending direction with a FIN.
    pub fn fin(&self) {
        let _ = self.socket.shutdown(Shutdown::Write);
    }

    /// Closes with a RST when the script returns.
    pub fn reset(&self) {
        let _ = self.socket.set_linger(Some(Duration::ZERO));
    }

    /// Reads and discards everything until the stream ends.
    pub fn drain(&self) {
        let mut buffer = vec![0; 64 * 1024];
        while matches!(self.read(&mut buffer), Ok(n) if n > 0) {}
    }

    /// Reads exactly `n` bytes. Returns false if the stream ends earlier.
    pub fn read_exactly(&self, n: u64) -> bool {
        let mut left = n;
        let mut buffer = vec![0; 64 * 1024];
        while left > 0 {
            let most = buffer.len().min(usize::try_from(left).unwrap_or(usize::MAX));
            match self.read(&mut buffer[..most]) {
                Ok(got @ 1..) => left -= got as u64,
                _ => return false,
            }
        }
        true
    }

    /// Returns after the peer has closed or reset the connection. Reads no byte.
    pub fn wait_for_close(&self) {
        use rustix::event::{PollFd, PollFlags, poll};
        let mut fds = [PollFd::new(&*self.socket, PollFlags::RDHUP)];
        let _ = poll(&mut fds, None);
    }
}

// === impl ScriptedBackend ===

impl ScriptedBackend {
    /// Listens on a free port of 127.0.0.1.
    pub fn start(script: Script) -> ScriptedBackend {
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, free_port()));
        ScriptedBackend::start_on(address, script)
    }

    /// Listens on `address`: for IPv6, or to restart on an earlier address.
    pub fn start_on(address: SocketAddr, script: Script) -> ScriptedBackend {
        let listener = listen(address, 4096);
        ScriptedBackend::serve(listener, address.to_string(), Some(address), script)
    }

    /// Listens on a Unix socket.
    pub fn start_unix(path: &std::path::Path, script: Script) -> ScriptedBackend {
        let listener = Socket::new(Domain::UNIX, Type::STREAM, None).expect("a Unix socket");
        listener.bind(&SockAddr::unix(path).expect("a short path")).expect("bind");
        listener.listen(4096).expect("listen");
        ScriptedBackend::serve(listener, format!("unix:{}", path.display()), None, script)
    }

    fn serve(
        listener: Socket,
        address: String,
        socket_address: Option<SocketAddr>,
        script: Script,
    ) -> ScriptedBackend {
        let listener = Arc::new(listener);
        let shared = Arc::new(Shared {
            stopping: AtomicBool::new(false),
            counts: Arc::default(),
            open: Mutex::default(),
            threads: Mutex::default(),
        });
        let acceptor = std::thread::spawn({
            let (listener, shared) = (listener.clone(), shared.clone());
            move || accept_loop(&listener, &shared, &script)
        });
        ScriptedBackend { address, socket_address, listener, shared, acceptor: Some(acceptor) }
    }

    /// The address in the form of the configuration.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// The TCP address of the listener.
    pub fn socket_address(&self) -> SocketAddr {
        self.socket_address.expect("a TCP backend")
    }

    /// Connections accepted since the start.
    pub fn accepted(&self) -> u64 {
        self.shared.counts.accepted.load(Ordering::Relaxed)
    }

    /// Connections open now.
    pub fn active(&self) -> u64 {
        self.shared.counts.active.load(Ordering::Relaxed)
    }

    /// The largest number of connections that were open at the same time.
    pub fn active_peak(&self) -> u64 {
        self.shared.counts.active_peak.load(Ordering::Relaxed)
    }

    pub fn counts(&self) -> &Counts {
        &self.shared.counts
    }

    /// Resets every open connection and continues to listen.
    pub fn reset_all(&self) {
        for socket in self.shared.open.lock().expect("no panic in here").values() {
            let _ = socket.set_linger(Some(Duration::ZERO));
            // Wakes the script's read without sending a FIN; its close then resets.
            let _ = socket.shutdown(Shutdown::Read);
        }
    }

    /// Stops listening and closes every connection, as the exit of a process does.
    pub fn stop(&mut self) {
        if self.shared.stopping.swap(true, Ordering::SeqCst) {
            return;
        }
        // shutdown(2) on a listening TCP socket wakes accept(2) on Linux.
        let _ = self.listener.shutdown(Shutdown::Both);
        if let Some(acceptor) = self.acceptor.take() {
            let _ = acceptor.join();
        }
        for socket in self.shared.open.lock().expect("no panic in here").values() {
            let _ = socket.shutdown(Shutdown::Both);
        }
        let threads = std::mem::take(&mut *self.shared.threads.lock().expect("no panic in here"));
        for thread in threads {
            let _ = thread.join();
        }
    }
}

impl Drop for ScriptedBackend {
    fn drop(&mut self) {
        self.stop();
    }
}

fn accept_loop(listener: &Socket, shared: &Arc<Shared>, script: &Script) {
    let mut next = 0u64;
    while !shared.stopping.load(Ordering::SeqCst) {
        let Ok((socket, _)) = listener.accept() else {
            if shared.stopping.load(Ordering::SeqCst) {
                return;
            }
            // An accept error usually lasts, so the loop must not spin.
            std::thread::sleep(Duration::from_millis(1));
            continue;
        };
        next += 1;
        let counts = &shared.counts;
        counts.accepted.fetch_add(1, Ordering::Relaxed);
        let active = counts.active.fetch_add(1, Ordering::Relaxed) + 1;
        counts.active_peak.fetch_max(active, Ordering::Relaxed);
        let _ = socket.set_read_timeout(Some(patience(secs(60))));
        let _ = socket.set_write_timeout(Some(patience(secs(60))));
        let socket = Arc::new(socket);
        shared.open.lock().expect("no panic in here").insert(next, socket.clone());
        let thread = std::thread::Builder::new().stack_size(256 * 1024).spawn({
            let (shared, script, id) = (shared.clone(), script.clone(), next);
            move || {
                let conn = Conn { socket, counts: shared.counts.clone() };
                script(&conn);
                shared.open.lock().expect("no panic in here").remove(&id);
                // Counted before the close, because Tidegate can fill the slot as soon as it
                // receives the FIN.
                shared.counts.active.fetch_sub(1, Ordering::SeqCst);
                drop(conn);
            }
        });
        let mut threads = shared.threads.lock().expect("no panic in here");
        threads.push(thread.expect("one more thread"));
        if threads.len() > 256 {
            threads.retain(|thread| !thread.is_finished());
        }
    }
}

// === addresses without a server ===

/// A bound socket that does not listen: connects are refused, and no other process gets the port.
pub struct Refusing {
    pub address: SocketAddr,
    _socket: Socket,
}

impl Refusing {
    pub fn new() -> Refusing {
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, free_port()));
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).expect("a socket");
        // A connection of an earlier test may still be in TIME_WAIT on that port.
        socket.set_reuse_address(true).expect("SO_REUSEADDR");
        socket.bind(&address.into()).expect("bind");
        Refusing { address, _socket: socket }
    }
}

/// A listener with a full accept queue: connects get no answer.
pub struct Unresponsive {
    pub address: SocketAddr,
    _listener: Socket,
    _filling: Vec<Socket>,
}

impl Unresponsive {
    pub fn new() -> Unresponsive {
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, free_port()));
        let listener = listen(address, 0);
        // A queue of 0 holds one connection (tcp(7)). The second connection stays in
        // SYN_SENT.
        let filling = (0..2).map(|_| {
            let socket = Socket::new(Domain::IPV4, Type::STREAM, None).expect("a socket");
            let _ = socket.connect_timeout(&address.into(), Duration::from_millis(100));
            socket
        });
        let filling = filling.collect();
        let probe = Socket::new(Domain::IPV4, Type::STREAM, None).expect("a socket");
        let result = probe.connect_timeout(&address.into(), Duration::from_millis(200));
        let kind = result.expect_err("a full accept queue gives no answer").kind();
        assert_eq!(kind, io::ErrorKind::TimedOut);
        Unresponsive { address, _listener: listener, _filling: filling }
    }
}

fn listen(address: SocketAddr, backlog: i32) -> Socket {
    let listener = Socket::new(Domain::for_address(address), Type::STREAM, None).expect("a socket");
    listener.set_reuse_address(true).expect("set SO_REUSEADDR");
    listener.bind(&address.into()).unwrap_or_else(|error| panic!("bind {address}: {error}"));
    listener.listen(backlog).expect("listen");
    listener
}

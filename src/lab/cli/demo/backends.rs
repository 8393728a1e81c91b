//! The demo's servers: each answers every line with its name.
//!
//! The demo starts them on one thread with its own runtime. A killed server behaves
//! like a crashed process: its port refuses connections and its open connections are
//! reset. They listen on loopback only.

use socket2::{Domain, Protocol, SockAddr, Socket, Type};
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::thread::JoinHandle;
use tidegate_net::stream;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;

/// Weights, assigned in turn.
const WEIGHTS: [u32; 3] = [5, 3, 2];

/// Maximum number of concurrent connections of a backend; more wait in its listen
/// queue. The demo's clients need far fewer.
const CONNECTIONS_MAX: usize = 1024;

const BACKLOG: i32 = 1024;

/// Name, address and weight of a backend.
#[derive(Debug, Clone)]
pub(crate) struct DemoBackend {
    pub(crate) name: String,
    pub(crate) address: SocketAddr,
    pub(crate) weight: u32,
}

/// All backends. Dropping it ends their thread.
#[derive(Debug)]
pub(crate) struct Backends {
    all: Vec<DemoBackend>,
    /// `None` only during drop.
    commands: Option<mpsc::Sender<DemoBackendCommand>>,
    thread: Option<JoinHandle<()>>,
}

/// A command to the thread of the servers.
#[derive(Debug)]
enum DemoBackendCommand {
    Kill(usize, oneshot::Sender<io::Result<()>>),
    Restart(usize, oneshot::Sender<io::Result<()>>),
}

/// A server.
struct Server {
    name: String,
    address: SocketAddr,
    /// Bound and not listening: reserves the port while the server is stopped.
    spare: Socket,
    /// `None` while the server is stopped.
    serving: Option<tokio::task::JoinHandle<()>>,
}

/// A connection that is reset on drop unless it ended with FIN.
struct Connection(Option<TcpStream>);

// === impl Backends ===

impl Backends {
    /// Starts `count` backends on free ports.
    pub(crate) fn start(count: usize) -> io::Result<Backends> {
        let mut all = Vec::with_capacity(count);
        let mut servers = Vec::with_capacity(count);
        for index in 0..count {
            let spare = bound(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)))?;
            let address = spare.local_addr()?.as_socket().ok_or(io::ErrorKind::Unsupported)?;
            let name = format!("b{}", index + 1);
            all.push(DemoBackend {
                name: name.clone(),
                address,
                weight: WEIGHTS[index % WEIGHTS.len()],
            });
            servers.push(Server { name, address, spare, serving: None });
        }
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        {
            let _entered = runtime.enter();
            for server in &mut servers {
                server.restart()?;
            }
        }
        let (commands, inbox) = mpsc::channel(1);
        let thread = std::thread::Builder::new()
            .name("demo-backends".to_owned())
            .spawn(move || runtime.block_on(run_commands(servers, inbox)))?;
        Ok(Backends { all, commands: Some(commands), thread: Some(thread) })
    }

    /// Returns the backends in order.
    pub(crate) fn all(&self) -> &[DemoBackend] {
        &self.all
    }

    /// Closes the listener of a backend and resets its connections.
    pub(crate) async fn kill(&self, index: usize) -> io::Result<()> {
        self.command(|reply| DemoBackendCommand::Kill(index, reply)).await
    }

    /// Makes a backend listen again, on the same port.
    pub(crate) async fn restart(&self, index: usize) -> io::Result<()> {
        self.command(|reply| DemoBackendCommand::Restart(index, reply)).await
    }

    async fn command(
        &self,
        make: impl FnOnce(oneshot::Sender<io::Result<()>>) -> DemoBackendCommand,
    ) -> io::Result<()> {
        let gone = || io::Error::other("backend thread exited");
        let (reply, answer) = oneshot::channel();
        let commands = self.commands.as_ref().ok_or_else(gone)?;
        commands.send(make(reply)).await.map_err(|_| gone())?;
        answer.await.map_err(|_| gone())?
    }
}

impl Drop for Backends {
    fn drop(&mut self) {
        self.commands = None;
        if let Some(thread) = self.thread.take() {
            // A panic was already printed by its thread.
            let _ = thread.join();
        }
    }
}

/// Executes commands until the sender is dropped.
async fn run_commands(mut servers: Vec<Server>, mut inbox: mpsc::Receiver<DemoBackendCommand>) {
    while let Some(command) = inbox.recv().await {
        // The sender of a command may have been interrupted, so errors of `send` are
        // ignored.
        match command {
            DemoBackendCommand::Kill(index, reply) => {
                servers[index].kill().await;
                let _ = reply.send(Ok(()));
            }
            DemoBackendCommand::Restart(index, reply) => {
                let _ = reply.send(servers[index].restart());
            }
        }
    }
}

/// Binds a socket to `address`. Several sockets can be bound to one address; only one
/// of them listens.
fn bound(address: SocketAddr) -> io::Result<Socket> {
    let kind = Type::STREAM.nonblocking().cloexec();
    let socket = Socket::new(Domain::for_address(address), kind, Some(Protocol::TCP))?;
    socket.set_reuse_address(true)?;
    socket.set_reuse_port(true)?;
    socket.bind(&SockAddr::from(address))?;
    Ok(socket)
}

// === impl Server ===

impl Server {
    /// Must be called within the runtime.
    fn restart(&mut self) -> io::Result<()> {
        if self.serving.is_some() {
            return Ok(());
        }
        let spare = bound(self.address)?;
        let socket = std::mem::replace(&mut self.spare, spare);
        socket.listen(BACKLOG)?;
        let listener = TcpListener::from_std(socket.into())?;
        self.serving = Some(tokio::spawn(serve(listener, self.name.clone())));
        Ok(())
    }

    async fn kill(&mut self) {
        if let Some(serving) = self.serving.take() {
            serving.abort();
            // After this the listener is closed.
            let _ = serving.await;
        }
    }
}

async fn serve(listener: TcpListener, name: String) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept(), if connections.len() < CONNECTIONS_MAX => {
                if let Ok((stream, _)) = accepted {
                    connections.spawn(answer(Connection(Some(stream)), format!("{name}\n")));
                }
            }
            Some(_) = connections.join_next() => {}
        }
    }
}

/// Answers each line until the client sends FIN.
async fn answer(mut connection: Connection, name: String) {
    let mut buffer = [0u8; 256];
    while let Some(stream) = &mut connection.0 {
        let Ok(count) = stream.read(&mut buffer).await else { return };
        if count == 0 {
            connection.0 = None;
        }
        for _ in buffer[..count].iter().filter(|byte| **byte == b'\n') {
            if let Some(stream) = &mut connection.0
                && stream.write_all(name.as_bytes()).await.is_err()
            {
                return;
            }
        }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        if let Some(stream) = self.0.take()
            && let Ok(stream) = stream.into_std()
        {
            stream::reset(stream.into());
        }
    }
}

//! The demo's own servers: each answers every line it is sent with its name.
//!
//! Started by the demo on one thread with a runtime of its own, so that killing
//! one looks to the balancer as a real death does: the port refuses, open
//! connections are reset. They listen on loopback only.

use socket2::{Domain, Protocol, SockAddr, Socket, Type};
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::thread::JoinHandle;
use tidegate_net::stream;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;

/// Weights, dealt out in turn.
const WEIGHTS: [u32; 3] = [5, 3, 2];

/// Connections one backend serves at once; more wait in its queue. The demo's
/// clients hold far fewer.
const CONNECTIONS_MAX: usize = 1024;

const BACKLOG: i32 = 1024;

/// Who a backend is.
#[derive(Debug, Clone)]
pub(crate) struct DemoBackend {
    pub(crate) name: String,
    pub(crate) address: SocketAddr,
    pub(crate) weight: u32,
}

/// All of them. Dropping it ends their thread.
#[derive(Debug)]
pub(crate) struct Backends {
    all: Vec<DemoBackend>,
    /// `None` only while it is dropped.
    commands: Option<mpsc::Sender<DemoBackendCommand>>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
enum DemoBackendCommand {
    Kill(usize, oneshot::Sender<io::Result<()>>),
    Revive(usize, oneshot::Sender<io::Result<()>>),
}

/// One server.
struct Server {
    name: String,
    address: SocketAddr,
    /// Bound and not listening: keeps the port ours while the server is dead.
    spare: Socket,
    /// `None` while it is dead.
    serving: Option<tokio::task::JoinHandle<()>>,
}

/// A connection that is reset unless it ended in order.
struct Connection(Option<TcpStream>);

// === impl Backends ===

impl Backends {
    /// Starts `count` of them on free ports.
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
                server.revive()?;
            }
        }
        let (commands, inbox) = mpsc::channel(1);
        let thread = std::thread::Builder::new()
            .name("demo-backends".to_owned())
            .spawn(move || runtime.block_on(obey(servers, inbox)))?;
        Ok(Backends { all, commands: Some(commands), thread: Some(thread) })
    }

    /// In order.
    pub(crate) fn all(&self) -> &[DemoBackend] {
        &self.all
    }

    /// Closes the listener of one and resets its connections.
    pub(crate) async fn kill(&self, index: usize) -> io::Result<()> {
        self.command(|reply| DemoBackendCommand::Kill(index, reply)).await
    }

    /// Has it listen again, on the same port.
    pub(crate) async fn revive(&self, index: usize) -> io::Result<()> {
        self.command(|reply| DemoBackendCommand::Revive(index, reply)).await
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

/// Serves until the other end of `inbox` is dropped.
async fn obey(mut servers: Vec<Server>, mut inbox: mpsc::Receiver<DemoBackendCommand>) {
    while let Some(command) = inbox.recv().await {
        // Whoever asked may have been interrupted meanwhile.
        match command {
            DemoBackendCommand::Kill(index, reply) => {
                servers[index].kill().await;
                let _ = reply.send(Ok(()));
            }
            DemoBackendCommand::Revive(index, reply) => {
                let _ = reply.send(servers[index].revive());
            }
        }
    }
}

/// Several sockets may be bound to one address here, of which one listens.
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
    fn revive(&mut self) -> io::Result<()> {
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
            // Once this is over the listener is closed.
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

/// Answers each line until the client has ended its half.
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

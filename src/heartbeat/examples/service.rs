//! A service that sends heartbeats: an echo server that reports its number of
//! connections. When its standard input ends, it drains and then exits.
//!
//! ```sh
//! cargo run -p tidegate-heartbeat --example service -- \
//!     10.0.0.5:7946 web a 10.0.0.11:8080 1 /etc/tidegate/hb.key
//! ```

use std::error::Error;
use std::io::{self, Read};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::mpsc::{Receiver, Sender as EventSender, channel};
use std::time::Duration;
use tidegate_heartbeat::sender::{Sender, SenderSettings};
use tidegate_heartbeat::wire::SenderIdentity;
use tidegate_heartbeat::{SenderState, key_file};

enum ServiceEvent {
    Opened,
    Closed,
    InputEnded,
}

/// Draining ends if no connection has closed for this long.
const DRAIN_MAX: Duration = Duration::from_secs(30);

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [to, pool, name, address, key_id, key] = arguments.as_slice() else {
        return Err("usage: service TO POOL NAME ADDRESS KEY_ID KEY_FILE".into());
    };
    let address: SocketAddr = address.parse()?;
    let settings = SenderSettings {
        to: vec![to.parse()?],
        identity: SenderIdentity::new(pool, name, address)?,
        key_id: key_id.parse()?,
        secret: key_file::read(key.as_ref())?,
        interval: Duration::from_millis(100),
    };
    run(TcpListener::bind(address)?, settings, io::stdin())?;
    Ok(())
}

/// Serves until `input` ends and the last connection has closed.
pub(crate) fn run(
    listener: TcpListener,
    settings: SenderSettings,
    input: impl Read + Send + 'static,
) -> io::Result<()> {
    let (events, happened) = channel();
    let ended = events.clone();
    std::thread::spawn(move || {
        // A read error also counts as the end of the input.
        let _ = io::copy(&mut { input }, &mut io::sink());
        let _ = ended.send(ServiceEvent::InputEnded);
    });
    std::thread::spawn(move || accept(&listener, &events));

    let sender = Sender::start(settings)?;
    sender.set_state(SenderState::Ready);
    let open = report(&sender, &happened, 0, None);
    sender.set_state(SenderState::Draining);
    report(&sender, &happened, open, Some(DRAIN_MAX));
    sender.close();
    Ok(())
}

/// Reports the number of connections until the input ends. With a `limit`, reports until
/// no connection is left or no connection has closed for that time. Returns the number of
/// open connections.
fn report(
    sender: &Sender,
    happened: &Receiver<ServiceEvent>,
    mut open: u32,
    limit: Option<Duration>,
) -> u32 {
    while limit.is_none() || open > 0 {
        let event = match limit {
            Some(limit) => happened.recv_timeout(limit).ok(),
            None => happened.recv().ok(),
        };
        match event {
            Some(ServiceEvent::Opened) => open += 1,
            Some(ServiceEvent::Closed) => open -= 1,
            Some(ServiceEvent::InputEnded) | None => break,
        }
        sender.set_in_flight(open);
    }
    open
}

fn accept(listener: &TcpListener, events: &EventSender<ServiceEvent>) {
    for client in listener.incoming().flatten() {
        let events = events.clone();
        let _ = events.send(ServiceEvent::Opened);
        std::thread::spawn(move || {
            // An error means that the client has closed or reset the connection.
            let _ = echo(&client);
            let _ = events.send(ServiceEvent::Closed);
        });
    }
}

fn echo(mut client: &TcpStream) -> io::Result<u64> {
    let mut answer = client;
    io::copy(&mut client, &mut answer)
}

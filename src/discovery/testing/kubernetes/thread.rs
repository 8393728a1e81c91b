//! A Kubernetes double on a thread of its own, which a test kills, stops and continues as if
//! it was a process. Its objects survive, as those of an API server do in etcd.
//!
//! Tests of the whole program use it. While the thread is stopped, the kernel accepts
//! connections and acknowledges bytes, as it does for a process after SIGSTOP.

use super::KubernetesDouble;
use std::sync::mpsc as blocking;
use std::thread::JoinHandle;
use tokio::runtime::{Builder, Runtime};
use tokio::sync::mpsc;

/// The double and its thread. Dropping it kills the thread.
#[derive(Debug)]
pub struct KubernetesThread {
    double: KubernetesDouble,
    running: Option<RunningDouble>,
    /// Dropping it continues the thread.
    stopped: Option<blocking::Sender<()>>,
}

#[derive(Debug)]
struct RunningDouble {
    /// Each message stops the thread until its other end is dropped.
    stops: mpsc::UnboundedSender<blocking::Receiver<()>>,
    thread: JoinHandle<()>,
}

// === impl KubernetesThread ===

impl KubernetesThread {
    /// Starts a double without TLS.
    ///
    /// # Panics
    /// No free port or thread.
    pub fn start() -> KubernetesThread {
        let runtime = runtime();
        let double = runtime.block_on(KubernetesDouble::start(None));
        let double = double.unwrap_or_else(|error| panic!("the double does not start: {error}"));
        KubernetesThread { double, running: Some(run(runtime)), stopped: None }
    }

    /// The double, for its objects and faults. It does not answer while it is killed.
    pub fn double(&self) -> &KubernetesDouble {
        &self.double
    }

    /// Closes the listener and all connections.
    pub fn kill(&mut self) {
        self.resume();
        if let Some(RunningDouble { stops, thread }) = self.running.take() {
            drop(stops);
            let _ = thread.join();
        }
    }

    /// Serves again at the same address, with the same objects.
    ///
    /// # Panics
    /// Another program has taken the port.
    pub fn start_again(&mut self) {
        self.kill();
        let runtime = runtime();
        let listening = runtime.block_on(self.double.listen(None));
        listening.unwrap_or_else(|error| panic!("the double does not start again: {error}"));
        self.running = Some(run(runtime));
    }

    /// Stops the thread.
    pub fn pause(&mut self) {
        let (sender, receiver) = blocking::channel();
        if let Some(running) = &self.running {
            let _ = running.stops.send(receiver);
        }
        self.stopped = Some(sender);
    }

    /// Continues the thread.
    pub fn resume(&mut self) {
        self.stopped = None;
    }
}

impl Drop for KubernetesThread {
    fn drop(&mut self) {
        self.kill();
    }
}

fn runtime() -> Runtime {
    let runtime = Builder::new_current_thread().enable_all().build();
    runtime.unwrap_or_else(|error| panic!("no runtime: {error}"))
}

/// Runs the tasks of the runtime until the sender is dropped. The end closes all sockets.
fn run(runtime: Runtime) -> RunningDouble {
    let (stops, mut received) = mpsc::unbounded_channel::<blocking::Receiver<()>>();
    let thread = std::thread::spawn(move || {
        runtime.block_on(async {
            while let Some(stop) = received.recv().await {
                // Blocks every task of this thread.
                let _ = stop.recv();
            }
        });
    });
    RunningDouble { stops, thread }
}

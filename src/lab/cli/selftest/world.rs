//! The self-test's backends, clients and configuration, and the changes to them.
//!
//! Used by `selftest`. There are three backends behind two frontends. A reload changes
//! the weights, removes or adds a backend, and adds or removes a third frontend. A kill
//! stops a backend that has sessions.

use super::balancer::{SelftestProcesses, last_lines};
use super::{SelftestError, SelftestOutcome};
use crate::cli::quoted;
use crate::ledger::{Ledger, LedgerBackend, StreamSizes};
use std::fmt::Write;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::os::unix::fs::DirBuilderExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use tidegate_net::clock;

/// Number of backends. At most one of them is stopped at a time.
const BACKENDS: usize = 3;

/// Number of concurrent clients.
const CLIENTS: usize = 8;

const SIZES: StreamSizes = StreamSizes { most: 128 * 1024, large_one_in: 200 };

/// Time without data after which an end reports a fault.
const SILENCE: Duration = Duration::from_secs(20);

/// Time for which sessions can continue in the old process after an upgrade: longer
/// than any stream takes.
const DRAIN: Duration = Duration::from_secs(30);

/// Time between kill and restart of a backend.
const DOWN_TIME: Duration = Duration::from_millis(300);

/// First seed of streams through the added frontend, above the seeds of the others.
const EXTRA_SEEDS: u64 = 1 << 60;

/// A change that the test makes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum SelftestStep {
    Reload,
    Upgrade,
    Kill,
}

/// Everything that the test has created.
#[derive(Debug)]
pub(crate) struct SelftestWorld {
    seed: u64,
    random: fastrand::Rng,
    ledger: Arc<Ledger>,
    backends: Vec<LedgerBackend>,
    /// Two permanent frontends, and one that reloads add and remove.
    frontends: [SocketAddr; 3],
    shape: Shape,
    balancer: SelftestProcesses,
    cut: usize,
    broken: Vec<String>,
    // Last, because everything else must be dropped before its directory.
    directory: SelftestDirectory,
}

/// What reloads change.
#[derive(Debug, Clone)]
struct Shape {
    weights: [u16; BACKENDS],
    /// The backend that is not in the file.
    omitted: Option<usize>,
    extra_frontend: bool,
}

#[derive(Debug)]
struct SelftestDirectory(PathBuf);

// === impl SelftestWorld ===

impl SelftestWorld {
    pub(crate) fn start(seed: u64) -> Result<SelftestWorld, SelftestError> {
        let directory = SelftestDirectory::create()?;
        let ledger = Arc::new(Ledger::new(SIZES, false, SILENCE));
        let backends = (0..BACKENDS)
            .map(|_| LedgerBackend::start(Arc::clone(&ledger)))
            .collect::<Result<Vec<_>, _>>()
            .map_err(|error| format!("cannot start a backend: {error}"))?;
        let frontends = free_addresses().map_err(|error| format!("no free port: {error}"))?;
        let shape = Shape { weights: [1; BACKENDS], omitted: None, extra_frontend: false };
        let config = shape.write(&directory, &frontends, &backends)?;
        let balancer = SelftestProcesses::start(&directory.0, &config)?;
        let random = fastrand::Rng::with_seed(seed);
        let (cut, broken) = (0, Vec::new());
        Ok(SelftestWorld {
            seed,
            random,
            ledger,
            backends,
            frontends,
            shape,
            balancer,
            cut,
            broken,
            directory,
        })
    }

    /// Executes `steps` at regular intervals within `span` while clients run. Returns
    /// the result.
    pub(crate) fn run(
        mut self,
        steps: &[SelftestStep],
        span: Duration,
    ) -> Result<SelftestOutcome, SelftestError> {
        let stop = AtomicBool::new(false);
        let ledger = Arc::clone(&self.ledger);
        let (first, frontends) = (self.seed << 32, [self.frontends[0], self.frontends[1]]);
        std::thread::scope(|scope| {
            let _stop = StopOnDrop(&stop);
            scope.spawn(|| ledger.run_from(first, &frontends, &stop, CLIENTS));
            let begin = clock::now();
            let count = u32::try_from(steps.len()).unwrap_or(u32::MAX);
            for (number, step) in (1..).zip(steps) {
                pause_until(begin + span * number / (count + 1));
                self.execute(*step);
            }
            pause_until(begin + span);
        });
        self.sum_up()
    }

    fn execute(&mut self, step: SelftestStep) {
        let done = match step {
            SelftestStep::Reload => self.reload(),
            SelftestStep::Upgrade => self.balancer.upgrade(),
            SelftestStep::Kill => self.kill(),
        };
        if let Err(why) = done {
            self.broken.push(why);
        }
    }

    fn reload(&mut self) -> Result<(), String> {
        let random = &mut self.random;
        self.shape = Shape {
            weights: std::array::from_fn(|_| random.u16(1..=10)),
            omitted: Some(random.usize(..2 * BACKENDS)).filter(|omitted| *omitted < BACKENDS),
            extra_frontend: !self.shape.extra_frontend,
        };
        self.shape.write(&self.directory, &self.frontends, &self.backends)?;
        self.balancer.reload()?;
        if self.shape.extra_frontend {
            let seed = EXTRA_SEEDS + self.random.u64(..EXTRA_SEEDS);
            self.ledger.run(&[self.frontends[2]], seed..seed + 1, 1);
        }
        Ok(())
    }

    fn kill(&mut self) -> Result<(), String> {
        // A backend in the file: killing another would have no effect.
        let in_use: Vec<usize> = (0..BACKENDS).filter(|n| self.shape.omitted != Some(*n)).collect();
        let one = in_use[self.random.usize(..in_use.len())];
        self.cut += self.backends[one].kill();
        clock::pause(DOWN_TIME);
        self.backends[one].restart().map_err(|error| format!("cannot restart a backend: {error}"))
    }

    fn sum_up(self) -> Result<SelftestOutcome, SelftestError> {
        let SelftestWorld { ledger, balancer, mut broken, cut, .. } = self;
        let log = balancer.log();
        broken.extend(balancer.stop(DRAIN + Duration::from_secs(5)));
        let bytes = |count: &std::sync::atomic::AtomicU64| count.load(Ordering::Relaxed);
        Ok(SelftestOutcome {
            streams: ledger.streams(),
            bytes: bytes(&ledger.bytes_up) + bytes(&ledger.bytes_down),
            cut,
            faults: ledger.faults(),
            broken,
            log: last_lines(&log),
        })
    }
}

struct StopOnDrop<'a>(&'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

fn pause_until(when: Instant) {
    clock::pause(when.saturating_duration_since(clock::now()));
}

/// Returns addresses that are not in use.
fn free_addresses() -> std::io::Result<[SocketAddr; 3]> {
    let any = || TcpListener::bind((Ipv4Addr::LOCALHOST, 0));
    let held = [any()?, any()?, any()?];
    Ok([held[0].local_addr()?, held[1].local_addr()?, held[2].local_addr()?])
}

// === impl Shape ===

impl Shape {
    /// Writes the configuration atomically. Returns its path.
    fn write(
        &self,
        directory: &SelftestDirectory,
        frontends: &[SocketAddr; 3],
        backends: &[LedgerBackend],
    ) -> Result<PathBuf, String> {
        let path = directory.0.join("tidegate.toml");
        let whole = directory.0.join("tidegate.toml.new");
        let text = self.render(&directory.0.join("admin.sock"), frontends, backends);
        std::fs::write(&whole, text)
            .and_then(|()| std::fs::rename(&whole, &path))
            .map_err(|error| format!("cannot write {}: {error}", path.display()))?;
        Ok(path)
    }

    fn render(
        &self,
        admin: &std::path::Path,
        frontends: &[SocketAddr; 3],
        backends: &[LedgerBackend],
    ) -> String {
        let admin = quoted(&format!("unix:{}", admin.display()));
        let drain = humantime::format_duration(DRAIN);
        let mut text = format!(
            "[process]\npin = false\ndrain_timeout = \"{drain}\"\n\n[admin]\nlisten = {admin}\n"
        );
        let count = if self.extra_frontend { 3 } else { 2 };
        for (number, address) in frontends.iter().enumerate().take(count) {
            let _ =
                write!(text, "\n[frontend.f{number}]\nbind = [\"{address}\"]\npool = \"all\"\n");
        }
        // A backend that returns must be used immediately.
        text.push_str("\n[pool.all]\nejection = \"off\"\n");
        for (number, (backend, weight)) in backends.iter().zip(self.weights).enumerate() {
            if self.omitted != Some(number) {
                let address = backend.address();
                let _ = write!(
                    text,
                    "\n[[pool.all.backend]]\nname = \"b{number}\"\naddress = \"{address}\"\nweight = {weight}\n"
                );
            }
        }
        text
    }
}

// === impl SelftestDirectory ===

impl SelftestDirectory {
    fn create() -> Result<SelftestDirectory, SelftestError> {
        let name = format!("tidegate-selftest-{:08x}", fastrand::u32(..));
        let path = std::env::temp_dir().join(name);
        std::fs::DirBuilder::new()
            .mode(0o700)
            .create(&path)
            .map_err(|error| format!("cannot create {} (set TMPDIR): {error}", path.display()))?;
        Ok(SelftestDirectory(path))
    }
}

impl Drop for SelftestDirectory {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_dir_all(&self.0) {
            eprintln!("tidegate: selftest: cannot remove {}: {error}", self.0.display());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tidegate_config as config;

    #[test]
    fn all_shapes_are_valid_configurations() {
        let ledger = Arc::new(Ledger::new(SIZES, false, SILENCE));
        let backends: Vec<LedgerBackend> =
            (0..BACKENDS).map(|_| LedgerBackend::start(Arc::clone(&ledger)).unwrap()).collect();
        let frontends = free_addresses().unwrap();
        for omitted in [None, Some(0), Some(2)] {
            for extra_frontend in [false, true] {
                let shape = Shape { weights: [1, 5, 10], omitted, extra_frontend };
                let text = shape.render(std::path::Path::new("/run/a.sock"), &frontends, &backends);
                let config = config::parse(&text, "selftest").unwrap_or_else(|p| panic!("{p}"));
                assert_eq!(config.frontends.len(), if extra_frontend { 3 } else { 2 });
                let left = if omitted.is_some() { BACKENDS - 1 } else { BACKENDS };
                assert_eq!(config.pools[0].backends.len(), left);
            }
        }
    }
}

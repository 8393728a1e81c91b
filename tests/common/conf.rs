//! Configurations as values that a test can change and render again.
//!
//! Tests describe frontends and pools. The proxy handle adds the admin socket and the
//! log. The rendered text is a configuration file as an operator writes it, with
//! documented keys only.

use super::Engine;
use super::ports::free_port;
use std::fmt::Write;
use std::net::SocketAddr;

/// A whole configuration file.
#[derive(Debug, Clone)]
pub struct Conf {
    pub engine: Engine,
    /// A value for the `engine` key that differs from the engine's name.
    pub engine_key: Option<String>,
    /// 0 means "auto".
    pub workers: usize,
    /// More keys of `[process]`, one per line.
    pub process: String,
    /// More keys of `[log]`. The handle adds `access`.
    pub log: String,
    /// An access-log target other than a file in the handle's directory.
    pub access: Option<String>,
    pub frontends: Vec<Frontend>,
    pub pools: Vec<Pool>,
    /// `[heartbeat]` and its keys, as text.
    pub heartbeat: String,
    /// `[registry.NAME]` and `[dns]` tables, as text.
    pub registries: String,
}

/// `[frontend.NAME]`
#[derive(Debug, Clone)]
pub struct Frontend {
    pub name: String,
    pub binds: Vec<SocketAddr>,
    /// Keys that each bind has in addition to its address, such as `proxy_protocol = true`.
    pub bind_keys: String,
    pub pool: String,
    /// More keys, one per line.
    pub keys: String,
}

/// `[pool.NAME]`
#[derive(Debug, Clone)]
pub struct Pool {
    pub name: String,
    /// More keys of the pool itself, one per line.
    pub keys: String,
    /// Keys of `[pool.NAME.probe]`; empty for none.
    pub probe: String,
    /// Keys of `[pool.NAME.ejection]`; empty for the default.
    pub ejection: String,
    /// Keys of `[pool.NAME.heartbeat]`; empty for none.
    pub heartbeat: String,
    /// Keys of `[pool.NAME.discover]`; empty for none.
    pub discover: String,
    pub backends: Vec<Backend>,
}

/// `[[pool.NAME.backend]]`
#[derive(Debug, Clone)]
pub struct Backend {
    pub name: String,
    pub address: String,
    /// More keys, one per line.
    pub keys: String,
}

// === impl Conf ===

impl Conf {
    /// A configuration with two workers and nothing else.
    pub fn new(engine: Engine) -> Conf {
        Conf {
            engine,
            engine_key: None,
            workers: 2,
            process: String::new(),
            log: String::new(),
            access: None,
            frontends: Vec::new(),
            pools: Vec::new(),
            heartbeat: String::new(),
            registries: String::new(),
        }
    }

    /// One frontend `web` on a free IPv4 port and one pool `web`.
    pub fn simple(engine: Engine, pool: Pool) -> Conf {
        Conf::new(engine).frontend("web", &pool.name.clone(), "").pool(pool)
    }

    pub fn workers(mut self, workers: usize) -> Conf {
        self.workers = workers;
        self
    }

    pub fn process(mut self, line: &str) -> Conf {
        self.process += line;
        self.process.push('\n');
        self
    }

    /// Adds a frontend on a free port of 127.0.0.1.
    pub fn frontend(self, name: &str, pool: &str, keys: &str) -> Conf {
        self.frontend_on("127.0.0.1", name, pool, keys)
    }

    /// Adds a frontend on a free port of the address `ip`.
    pub fn frontend_on(mut self, ip: &str, name: &str, pool: &str, keys: &str) -> Conf {
        let ip = ip.parse().expect("an IP address");
        self.frontends.push(Frontend {
            name: name.into(),
            binds: vec![SocketAddr::new(ip, free_port())],
            bind_keys: String::new(),
            pool: pool.into(),
            keys: keys.into(),
        });
        self
    }

    /// Adds a `[registry.NAME]` or `[dns]` table.
    pub fn registry(mut self, table: &str) -> Conf {
        self.registries += table;
        self.registries.push('\n');
        self
    }

    pub fn pool(mut self, pool: Pool) -> Conf {
        self.pools.push(pool);
        self
    }

    /// Returns the pool of this name for changes.
    #[track_caller]
    pub fn pool_mut(&mut self, name: &str) -> &mut Pool {
        self.pools.iter_mut().find(|pool| pool.name == name).expect("a pool of that name")
    }

    /// Returns the frontend of this name for changes.
    #[track_caller]
    pub fn frontend_mut(&mut self, name: &str) -> &mut Frontend {
        self.frontends
            .iter_mut()
            .find(|frontend| frontend.name == name)
            .expect("a frontend of that name")
    }

    /// The first address on which the frontend of this name listens.
    #[track_caller]
    pub fn address(&self, frontend: &str) -> SocketAddr {
        let found = self.frontends.iter().find(|entry| entry.name == frontend);
        found.expect("a frontend of that name").binds[0]
    }

    /// Gives every frontend new ports after an address conflict.
    pub fn move_ports(&mut self) {
        for bind in self.frontends.iter_mut().flat_map(|frontend| &mut frontend.binds) {
            bind.set_port(free_port());
        }
    }

    /// The file's text. `admin` is the admin address, `access` the access-log target.
    pub fn render(&self, admin: &str, access: &str) -> String {
        let mut text = String::new();
        let engine = self.engine_key.as_deref().unwrap_or(self.engine.name());
        let workers = match self.workers {
            0 => "\"auto\"".to_string(),
            number => number.to_string(),
        };
        let _ = writeln!(text, "[process]\nworkers = {workers}\nengine = \"{engine}\"");
        // Several processes under test share the CPUs, so no process pins its workers.
        if !self.process.contains("pin") {
            text.push_str("pin = false\n");
        }
        if !self.process.contains("drain_timeout") {
            text.push_str("drain_timeout = \"2s\"\n");
        }
        let _ = writeln!(text, "{}\n[admin]\nlisten = \"{admin}\"\n", self.process);
        let access = self.access.as_deref().unwrap_or(access);
        let _ = writeln!(text, "[log]\naccess = \"{access}\"\n{}", self.log);
        for frontend in &self.frontends {
            let bind_form = |bind: &SocketAddr| match &*frontend.bind_keys {
                "" => format!("\"{bind}\""),
                keys => format!("{{ address = \"{bind}\", {keys} }}"),
            };
            let binds: Vec<String> = frontend.binds.iter().map(bind_form).collect();
            let _ = writeln!(
                text,
                "[frontend.{}]\nbind = [{}]\npool = \"{}\"\n{}\n",
                frontend.name,
                binds.join(", "),
                frontend.pool,
                frontend.keys,
            );
        }
        text.push_str(&self.heartbeat);
        text.push('\n');
        text.push_str(&self.registries);
        for pool in &self.pools {
            pool.render(&mut text);
        }
        text
    }
}

// === impl Pool ===

impl Pool {
    /// A pool without backends or probes.
    pub fn new(name: &str) -> Pool {
        Pool {
            name: name.into(),
            keys: String::new(),
            probe: String::new(),
            ejection: String::new(),
            heartbeat: String::new(),
            discover: String::new(),
            backends: Vec::new(),
        }
    }

    /// Adds one `key = value` line.
    pub fn key(mut self, line: &str) -> Pool {
        self.keys += line;
        self.keys.push('\n');
        self
    }

    pub fn probe(mut self, keys: &str) -> Pool {
        self.probe = keys.into();
        self
    }

    pub fn ejection(mut self, keys: &str) -> Pool {
        self.ejection = keys.into();
        self
    }

    pub fn heartbeat(mut self, keys: &str) -> Pool {
        self.heartbeat = keys.into();
        self
    }

    pub fn discover(mut self, keys: &str) -> Pool {
        self.discover = keys.into();
        self
    }

    pub fn backend(self, name: &str, address: impl ToString) -> Pool {
        self.backend_with(name, address, "")
    }

    pub fn backend_with(mut self, name: &str, address: impl ToString, keys: &str) -> Pool {
        self.backends.push(Backend {
            name: name.into(),
            address: address.to_string(),
            keys: keys.into(),
        });
        self
    }

    fn render(&self, text: &mut String) {
        let name = &self.name;
        let _ = writeln!(text, "[pool.{name}]\n{}", self.keys);
        if !self.probe.is_empty() {
            let _ = writeln!(text, "[pool.{name}.probe]\n{}\n", self.probe);
        }
        if !self.ejection.is_empty() {
            let _ = writeln!(text, "[pool.{name}.ejection]\n{}\n", self.ejection);
        }
        if !self.heartbeat.is_empty() {
            let _ = writeln!(text, "[pool.{name}.heartbeat]\n{}\n", self.heartbeat);
        }
        if !self.discover.is_empty() {
            let _ = writeln!(text, "[pool.{name}.discover]\n{}\n", self.discover);
        }
        for backend in &self.backends {
            let _ = writeln!(
                text,
                "[[pool.{name}.backend]]\nname = \"{}\"\naddress = \"{}\"\n{}\n",
                backend.name, backend.address, backend.keys
            );
        }
    }
}

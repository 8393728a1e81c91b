//! Real etcd nodes on loopback, for tests: start, kill, stop, compact, back up, restore.
//!
//! Tests call it from their own thread, because every call blocks. Ports come from the
//! kernel. It needs the programs `etcd` and `etcdctl`.

#![allow(clippy::unwrap_used)]

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use rustix::process::{Pid, Signal, kill_process};
use std::cell::RefCell;
use std::fmt::Write as _;
use std::io::{Read, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;
use tempfile::TempDir;
use tidegate_net::clock;

/// A cluster whose nodes are processes of this host. Dropping it kills them.
#[derive(Debug)]
pub struct EtcdCluster {
    dir: TempDir,
    nodes: Vec<EtcdNode>,
    extra: Vec<String>,
    /// Backups restored so far. Each has its own data directories.
    restored: u32,
    /// Value of `Authorization` in requests of the test, if there are users.
    token: RefCell<Option<String>>,
}

#[derive(Debug)]
struct EtcdNode {
    client: SocketAddr,
    peer: SocketAddr,
    process: Option<Child>,
}

/// Returns whether the programs exist. A test returns early without them, except in CI.
pub fn is_installed() -> bool {
    let found = ["etcd", "etcdctl"].iter().all(|program| {
        let mut run = Command::new(program);
        run.arg("--help").stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok()
    });
    assert!(found || std::env::var_os("CI").is_none(), "CI needs etcd-server and etcd-client");
    if !found {
        eprintln!("etcd is not installed; the test is skipped");
    }
    found
}

/// Calls `done` every 20 ms until it returns a value.
///
/// # Panics
/// It returned none for `limit`.
pub fn eventually<T>(what: &str, limit: Duration, mut done: impl FnMut() -> Option<T>) -> T {
    let start = clock::now();
    loop {
        if let Some(value) = done() {
            return value;
        }
        assert!(clock::now().duration_since(start) < limit, "not after {limit:?}: {what}");
        clock::pause(Duration::from_millis(20));
    }
}

// === impl EtcdCluster ===

impl EtcdCluster {
    /// Starts that many nodes and waits until they have a leader.
    pub fn start(nodes: usize) -> EtcdCluster {
        EtcdCluster::start_with(nodes, &[])
    }

    /// Starts nodes with further arguments.
    pub fn start_with(nodes: usize, extra: &[&str]) -> EtcdCluster {
        let node = |_| EtcdNode { client: free_port(), peer: free_port(), process: None };
        let mut cluster = EtcdCluster {
            dir: tempfile::tempdir().unwrap(),
            nodes: (0..nodes).map(node).collect(),
            extra: extra.iter().map(|text| (*text).to_owned()).collect(),
            restored: 0,
            token: RefCell::new(None),
        };
        (0..nodes).for_each(|node| cluster.start_node(node));
        cluster.wait_until_healthy();
        cluster
    }

    /// Client addresses of all nodes.
    pub fn servers(&self) -> Vec<SocketAddr> {
        self.nodes.iter().map(|node| node.client).collect()
    }

    /// Starts a node that is not running.
    pub fn start_node(&mut self, node: usize) {
        let (client, peer) = (self.nodes[node].client, self.nodes[node].peer);
        let log = self.dir.path().join(format!("n{node}.log"));
        let log = std::fs::File::options().create(true).append(true).open(log).unwrap();
        let process = Command::new("etcd")
            .args(["--name", &format!("n{node}"), "--log-level", "error"])
            .arg("--data-dir")
            .arg(self.data_dir(node))
            .args(["--listen-client-urls", &format!("http://{client}")])
            .args(["--advertise-client-urls", &format!("http://{client}")])
            .args(["--listen-peer-urls", &format!("http://{peer}")])
            .args(["--initial-advertise-peer-urls", &format!("http://{peer}")])
            .args(["--initial-cluster", &self.initial_cluster()])
            .args(&self.extra)
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        self.nodes[node].process = Some(process);
    }

    /// Kills a node with SIGKILL.
    pub fn kill(&mut self, node: usize) {
        let mut process = self.nodes[node].process.take().unwrap();
        process.kill().unwrap();
        process.wait().unwrap();
    }

    /// Stops a node with SIGSTOP. Its kernel still acknowledges what peers send.
    pub fn pause(&self, node: usize) {
        self.signal(node, Signal::STOP);
    }

    /// Continues a stopped node.
    pub fn resume(&self, node: usize) {
        self.signal(node, Signal::CONT);
    }

    fn signal(&self, node: usize, signal: Signal) {
        let id = self.nodes[node].process.as_ref().unwrap().id();
        kill_process(Pid::from_raw(id as i32).unwrap(), signal).unwrap();
    }

    /// Waits until every running node answers a linearizable read.
    pub fn wait_until_healthy(&self) {
        for node in (0..self.nodes.len()).filter(|node| self.nodes[*node].process.is_some()) {
            eventually("a node with a leader", Duration::from_secs(60), || {
                let answer = self.try_post(node, "/v3/kv/range", &range("health"));
                let answer = answer.unwrap_or_else(|refusal| refusal);
                // With users, a refusal shows that the node has a leader.
                let refused = ["user name is empty", "invalid auth token"];
                let says = |text: &&str| answer.contains(*text);
                (says(&"\"header\"") || refused.iter().any(says)).then_some(())
            });
        }
    }

    /// Position of the leader.
    pub fn leader(&self) -> usize {
        eventually("a leader", Duration::from_secs(10), || {
            (0..self.nodes.len()).filter(|node| self.nodes[*node].process.is_some()).find(|node| {
                let status = self.try_post(*node, "/v3/maintenance/status", "{}");
                let status = status.unwrap_or_default();
                let own = text_of(&status, "member_id");
                own.is_some() && own == text_of(&status, "leader")
            })
        })
    }

    // === the store ===

    /// Puts a value and returns the revision.
    pub fn put(&self, key: &str, value: &str) -> i64 {
        revision_of(&self.ask("/v3/kv/put", &put_body(key, value)))
    }

    /// Puts many values, 100 in a transaction.
    pub fn put_all(&self, entries: impl IntoIterator<Item = (String, String)>) {
        let entries: Vec<_> = entries.into_iter().collect();
        for part in entries.chunks(100) {
            let puts = part
                .iter()
                .map(|(key, value)| format!("{{\"request_put\":{}}}", put_body(key, value)));
            let puts = puts.collect::<Vec<_>>().join(",");
            self.ask("/v3/kv/txn", &format!("{{\"success\":[{puts}]}}"));
        }
    }

    /// Deletes a key and returns the revision.
    pub fn delete(&self, key: &str) -> i64 {
        revision_of(&self.ask("/v3/kv/deleterange", &range(key)))
    }

    /// Deletes all keys with this prefix, which ends with `/`, in one step.
    pub fn delete_below(&self, prefix: &str) {
        self.ask("/v3/kv/deleterange", &below(prefix));
    }

    /// Returns the keys with this prefix, which ends with `/`.
    pub fn keys(&self, prefix: &str) -> Vec<String> {
        let answer = self.ask("/v3/kv/range", &below(prefix));
        let keys = answer.split("\"key\":\"").skip(1).filter_map(|rest| rest.split('"').next());
        keys.map(|key| String::from_utf8(STANDARD.decode(key).unwrap()).unwrap()).collect()
    }

    /// Puts a value with a lease of `seconds` that nothing renews.
    pub fn put_with_lease(&self, key: &str, value: &str, seconds: u32) {
        let granted = self.ask("/v3/lease/grant", &format!("{{\"TTL\":{seconds}}}"));
        let lease = text_of(&granted, "ID").unwrap();
        let put = put_body(key, value).replace('}', &format!(",\"lease\":\"{lease}\"}}"));
        self.ask("/v3/kv/put", &put);
    }

    /// Returns the value of a key.
    pub fn get(&self, key: &str) -> Option<String> {
        let value = text_of(&self.ask("/v3/kv/range", &range(key)), "value")?;
        Some(String::from_utf8(STANDARD.decode(value).unwrap()).unwrap())
    }

    /// Returns the number of the lease of a key.
    pub fn lease_of(&self, key: &str) -> Option<String> {
        text_of(&self.ask("/v3/kv/range", &range(key)), "lease")
    }

    /// Drops the history before `revision`, and waits until it is gone.
    pub fn compact(&self, revision: i64) {
        self.ask("/v3/kv/compaction", &format!("{{\"revision\":{revision},\"physical\":true}}"));
    }

    /// Enables users: `root` with password `root`, and `reader` with password `secret`, which
    /// can read `prefix`.
    pub fn enable_users(&self, prefix: &str) {
        self.ask("/v3/auth/user/add", r#"{"name":"root","password":"root"}"#);
        self.ask("/v3/auth/user/grant", r#"{"user":"root","role":"root"}"#);
        self.ask("/v3/auth/user/add", r#"{"name":"reader","password":"secret"}"#);
        self.ask("/v3/auth/role/add", r#"{"name":"reading"}"#);
        let end = format!("{}0", prefix.trim_end_matches('/'));
        let (key, end) = (STANDARD.encode(prefix), STANDARD.encode(end));
        let permission = format!(
            r#"{{"name":"reading","perm":{{"permType":"READWRITE","key":"{key}","range_end":"{end}"}}}}"#
        );
        self.ask("/v3/auth/role/grant", &permission);
        self.grant_role();
        self.ask("/v3/auth/enable", "{}");
        self.log_in();
    }

    fn log_in(&self) {
        let login = r#"{"name":"root","password":"root"}"#;
        self.token.replace(None);
        let token = text_of(&self.ask("/v3/auth/authenticate", login), "token");
        self.token.replace(token);
    }

    /// Gives `reader` its role.
    pub fn grant_role(&self) {
        self.ask("/v3/auth/user/grant", r#"{"user":"reader","role":"reading"}"#);
    }

    /// Takes the role of `reader` away.
    pub fn revoke_role(&self) {
        self.ask("/v3/auth/user/revoke", r#"{"name":"reader","role":"reading"}"#);
    }

    /// Changes the password of `reader`. Its tokens are worthless from now on.
    pub fn change_password(&self, password: &str) {
        let change = format!(r#"{{"name":"reader","password":"{password}"}}"#);
        self.ask("/v3/auth/user/changepw", &change);
    }

    /// Writes a backup.
    pub fn back_up(&self, name: &str) {
        let file = self.dir.path().join(name);
        let endpoint = self.nodes[0].client.to_string();
        let mut arguments = vec!["--endpoints", &endpoint, "snapshot", "save"];
        arguments.push(file.to_str().unwrap());
        if self.token.borrow().is_some() {
            arguments.extend(["--user", "root:root"]);
        }
        self.ctl(&arguments);
    }

    /// Kills all nodes, restores a backup and starts them again.
    pub fn restore(&mut self, name: &str) {
        for node in 0..self.nodes.len() {
            self.kill(node);
        }
        self.restored += 1;
        let file = self.dir.path().join(name);
        for (at, node) in self.nodes.iter().enumerate() {
            let (dir, peer) = (self.data_dir(at), format!("http://{}", node.peer));
            let name = format!("n{at}");
            let (file, dir) = (file.to_str().unwrap(), dir.to_str().unwrap().to_owned());
            self.ctl(&[
                "snapshot",
                "restore",
                file,
                "--name",
                &name,
                "--data-dir",
                &dir,
                "--initial-cluster",
                &self.initial_cluster(),
                "--initial-advertise-peer-urls",
                &peer,
            ]);
        }
        (0..self.nodes.len()).for_each(|node| self.start_node(node));
        // The server would wait until it reaches the transaction that the token names.
        let has_users = self.token.replace(None).is_some();
        self.wait_until_healthy();
        if has_users {
            self.log_in();
        }
    }

    /// Sends a request to the first node that answers it, and returns the answer.
    ///
    /// # Panics
    /// No node answers with success within 10 s.
    pub fn ask(&self, path: &str, body: &str) -> String {
        let mut refused = String::new();
        let asked = clock::now();
        while clock::now().duration_since(asked) < Duration::from_secs(10) {
            for node in (0..self.nodes.len()).filter(|node| self.nodes[*node].process.is_some()) {
                match self.try_post(node, path, body) {
                    Ok(answer) => return answer,
                    Err(answer) => refused = answer,
                }
                if refused.contains("invalid auth token") {
                    self.log_in();
                }
            }
            clock::pause(Duration::from_millis(100));
        }
        panic!("{path} {body}: {refused}");
    }

    /// Sends a request to one node. An error has the refusal.
    pub fn try_post(&self, node: usize, path: &str, body: &str) -> Result<String, String> {
        let text = |error: std::io::Error| error.to_string();
        let mut request = format!("POST {path} HTTP/1.0\r\nContent-Length: {}\r\n", body.len());
        if let Some(token) = &*self.token.borrow() {
            let _ = write!(request, "Authorization: {token}\r\n");
        }
        request += &format!("\r\n{body}");
        let mut stream = TcpStream::connect(self.nodes[node].client).map_err(text)?;
        stream.set_read_timeout(Some(Duration::from_secs(2))).map_err(text)?;
        stream.write_all(request.as_bytes()).map_err(text)?;
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).map_err(text)?;
        let answer = String::from_utf8_lossy(&answer).into_owned();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap_or_default();
        match head.split(' ').nth(1) {
            Some("200") => Ok(body.to_owned()),
            _ => Err(body.to_owned()),
        }
    }

    fn ctl(&self, arguments: &[&str]) {
        let run = Command::new("etcdctl").env("ETCDCTL_API", "3").args(arguments).output();
        let run = run.unwrap();
        assert!(run.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&run.stderr));
    }

    fn data_dir(&self, node: usize) -> PathBuf {
        self.dir.path().join(format!("n{node}-{}", self.restored))
    }

    fn initial_cluster(&self) -> String {
        let nodes = self.nodes.iter().enumerate();
        nodes.map(|(at, node)| format!("n{at}=http://{}", node.peer)).collect::<Vec<_>>().join(",")
    }
}

impl Drop for EtcdCluster {
    fn drop(&mut self) {
        for node in &mut self.nodes {
            if let Some(mut process) = node.process.take() {
                let _ = process.kill();
                let _ = process.wait();
            }
        }
    }
}

/// Returns a port that was free a moment ago.
fn free_port() -> SocketAddr {
    TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap()
}

fn range(key: &str) -> String {
    format!(r#"{{"key":"{}"}}"#, STANDARD.encode(key))
}

/// All keys with a prefix: the end of the range is the prefix with its last byte, `/`, increased.
fn below(prefix: &str) -> String {
    let end = format!("{}0", prefix.trim_end_matches('/'));
    let (key, end) = (STANDARD.encode(prefix), STANDARD.encode(end));
    format!(r#"{{"key":"{key}","range_end":"{end}"}}"#)
}

fn put_body(key: &str, value: &str) -> String {
    format!(r#"{{"key":"{}","value":"{}"}}"#, STANDARD.encode(key), STANDARD.encode(value))
}

/// Returns the text at a key of a JSON document, at any depth.
fn text_of(document: &str, key: &str) -> Option<String> {
    let (_, rest) = document.split_once(&format!("\"{key}\":\""))?;
    Some(rest.split('"').next()?.to_owned())
}

fn revision_of(answer: &str) -> i64 {
    text_of(answer, "revision").unwrap().parse().unwrap()
}

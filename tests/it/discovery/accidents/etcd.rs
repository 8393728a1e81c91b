//! Accidents of a real etcd of three nodes with users.

use super::{Accident, MemberRegistry};
use crate::discovery::registries::{entry, write_secret};
use std::net::SocketAddr;
use tempfile::TempDir;
use tidegate_discovery::testing::etcd::{self, EtcdCluster};

/// Keys of the members.
const PREFIX: &str = "/services/etcd/";

pub(super) struct EtcdRegistry {
    cluster: EtcdCluster,
    dir: TempDir,
    /// The node that an accident kills.
    killed: usize,
}

// === impl EtcdRegistry ===

impl EtcdRegistry {
    /// Returns `None` if etcd is not installed.
    pub(super) fn start() -> Option<EtcdRegistry> {
        etcd::is_installed().then(|| {
            let cluster = EtcdCluster::start_with(3, &["--bcrypt-cost", "4"]);
            cluster.enable_users(PREFIX);
            let dir = tempfile::tempdir().expect("temp dir");
            write_secret(&dir.path().join("password"), "secret");
            EtcdRegistry { cluster, dir, killed: 0 }
        })
    }

    /// Restarts all nodes, so that every connection and token is lost.
    fn restart(&mut self) {
        (0..3).for_each(|node| self.cluster.kill(node));
        (0..3).for_each(|node| self.cluster.start_node(node));
        self.cluster.wait_until_healthy();
    }
}

impl MemberRegistry for EtcdRegistry {
    fn name(&self) -> &'static str {
        "etcd"
    }

    fn tables(&self) -> String {
        let servers = self.cluster.servers();
        let servers: Vec<String> = servers.iter().map(|server| format!("\"{server}\"")).collect();
        format!(
            "[registry.etcd]\nkind = \"etcd\"\nservers = [{}]\ntimeout = \"2s\"\n\
             user = \"reader\"\npassword_file = \"{}\"",
            servers.join(", "),
            self.dir.path().join("password").display()
        )
    }

    fn discover(&self, _: u16) -> String {
        format!("from = \"etcd\"\nprefix = \"{PREFIX}\"")
    }

    fn accidents(&self) -> &'static [Accident] {
        &[
            Accident::LeaderKilled,
            Accident::QuorumLost,
            Accident::Hung,
            Accident::Revoked,
            Accident::Rotated,
            Accident::Compacted,
            Accident::Killed,
            Accident::Restored,
            Accident::Emptied,
        ]
    }

    fn announce(&mut self, members: &[SocketAddr]) {
        let key = |member: &SocketAddr| format!("{PREFIX}{}", member.ip());
        self.cluster.put_all(members.iter().map(|member| (key(member), entry(*member))));
        let announced: Vec<String> = members.iter().map(key).collect();
        for key in self.cluster.keys(PREFIX).iter().filter(|key| !announced.contains(key)) {
            self.cluster.delete(key);
        }
    }

    fn back_up(&mut self) {
        self.cluster.back_up("backup");
    }

    fn begin(&mut self, accident: Accident) {
        match accident {
            Accident::LeaderKilled => {
                self.killed = self.cluster.leader();
                self.cluster.kill(self.killed);
            }
            Accident::QuorumLost => (0..2).for_each(|node| self.cluster.pause(node)),
            Accident::Hung => (0..3).for_each(|node| self.cluster.pause(node)),
            Accident::Killed => (0..3).for_each(|node| self.cluster.kill(node)),
            Accident::Revoked => {
                self.cluster.revoke_role();
                self.restart();
            }
            Accident::Rotated => {
                self.cluster.change_password("rotated");
                self.restart();
            }
            Accident::Compacted => {
                let last = (0..20).map(|number| self.cluster.put("/other", &number.to_string()));
                let last = last.last().expect("20 writes");
                self.cluster.compact(last);
                self.restart();
            }
            Accident::Restored => {
                // The backup has the first password.
                write_secret(&self.dir.path().join("password"), "secret");
                self.cluster.restore("backup");
            }
            Accident::Emptied => self.cluster.delete_below(PREFIX),
            _ => unreachable!("{accident:?} is not in the list"),
        }
    }

    fn end(&mut self, accident: Accident) {
        match accident {
            Accident::LeaderKilled => self.cluster.start_node(self.killed),
            Accident::QuorumLost => (0..2).for_each(|node| self.cluster.resume(node)),
            Accident::Hung => (0..3).for_each(|node| self.cluster.resume(node)),
            Accident::Killed => (0..3).for_each(|node| self.cluster.start_node(node)),
            Accident::Revoked => self.cluster.grant_role(),
            Accident::Rotated => write_secret(&self.dir.path().join("password"), "rotated"),
            _ => {}
        }
        self.cluster.wait_until_healthy();
    }
}

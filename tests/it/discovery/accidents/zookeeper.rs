//! Accidents of a real ZooKeeper server.

use super::{Accident, MemberRegistry};
use crate::discovery::registries::entry;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use tempfile::TempDir;
use tidegate_discovery::testing::zookeeper::ZookeeperServer;

/// The node whose children are the members.
const NODE: &str = "/zookeeper-members";

/// Sessions of clients that are silent for longer than this expire. A server that hangs for
/// longer expires all of them when it continues.
const SESSION_MAX: &str = "maxSessionTimeout=2000";

pub(super) struct ZookeeperRegistry {
    server: ZookeeperServer,
    _dir: TempDir,
}

// === impl ZookeeperRegistry ===

impl ZookeeperRegistry {
    /// Returns `None` if ZooKeeper is not installed.
    pub(super) fn start() -> Option<ZookeeperRegistry> {
        ZookeeperServer::is_available().then(|| {
            let dir = tempfile::tempdir().expect("temp dir");
            ZookeeperRegistry {
                server: ZookeeperServer::start_with(dir.path(), SESSION_MAX),
                _dir: dir,
            }
        })
    }
}

impl MemberRegistry for ZookeeperRegistry {
    fn name(&self) -> &'static str {
        "zookeeper"
    }

    fn tables(&self) -> String {
        format!(
            "[registry.zookeeper]\nkind = \"zookeeper\"\nservers = [\"{}\"]\ntimeout = \"2s\"",
            self.server.address()
        )
    }

    fn discover(&self, _: u16) -> String {
        format!("from = \"zookeeper\"\npath = \"{NODE}\"")
    }

    fn accidents(&self) -> &'static [Accident] {
        &[Accident::Killed, Accident::Hung, Accident::Restored, Accident::RemovedOneByOne]
    }

    fn announce(&mut self, members: &[SocketAddr]) {
        let child = |member: &SocketAddr| (member.ip().to_string(), entry(*member));
        self.server.set_children(NODE, &members.iter().map(child).collect());
    }

    fn back_up(&mut self) {
        self.server.back_up();
    }

    fn begin(&mut self, accident: Accident) {
        match accident {
            Accident::Killed => self.server.kill(),
            Accident::Hung => self.server.stop(),
            Accident::Restored => self.server.restore(),
            Accident::RemovedOneByOne => self.server.set_children(NODE, &BTreeMap::new()),
            _ => unreachable!("{accident:?} is not in the list"),
        }
    }

    fn end(&mut self, accident: Accident) {
        match accident {
            Accident::Killed => self.server.restart(),
            Accident::Hung => self.server.resume(),
            _ => {}
        }
    }
}

//! MariaDB servers.

use super::{command_as, directory, output};
use crate::common::ports::free_port;
use crate::common::servers::{Running, find};
use crate::common::{eventually, secs};
use std::net::SocketAddr;
use std::process::{Command, Stdio};

/// The programs that a test checks for.
pub const PROGRAMS: [&str; 3] = ["mariadbd", "mariadb-install-db", "mariadb"];

const USER: &str = "mysql";

pub struct Mariadb {
    pub address: SocketAddr,
    _running: Running,
    dir: tempfile::TempDir,
}

impl Mariadb {
    /// Starts a server with these arguments. The user `root` has no password.
    pub fn start(arguments: &[&str]) -> Mariadb {
        let dir = directory(USER);
        let data = format!("--datadir={}", dir.path().join("data").display());
        let mut install = command_as(USER, "mariadb-install-db");
        install.args(["--no-defaults", "--auth-root-authentication-method=normal", &data]);
        // A starting server removes the temporary tables of others in the same directory.
        let temporary = format!("--tmpdir={}", dir.path().display());
        output(install.args(["--skip-test-db", &temporary])).expect("mariadb-install-db");
        let address = SocketAddr::from(([127, 0, 0, 1], free_port()));
        let log = std::fs::File::create(dir.path().join("log")).expect("create the log");
        let running = Running::start(
            command_as(USER, "mariadbd")
                .args(["--no-defaults", &data, "--bind-address=127.0.0.1", "--log-warnings=9"])
                .arg(&temporary)
                .arg(format!("--socket={}", dir.path().join("socket").display()))
                .arg(format!("--port={}", address.port()))
                .args(["--innodb-flush-log-at-trx-commit=0", "--innodb-buffer-pool-size=16M"])
                .args(arguments)
                .stdout(Stdio::null())
                .stderr(log),
        );
        let server = Mariadb { address, _running: running, dir };
        eventually(secs(20), "MariaDB answers", || server.sql("SELECT 1").is_ok());
        server
    }

    /// Runs statements as `root`.
    pub fn sql(&self, sql: &str) -> Result<String, String> {
        let mut command = Command::new(find("mariadb").expect("the test checked for mariadb"));
        let port = self.address.port().to_string();
        command.args(["--no-defaults", "-h127.0.0.1", "-uroot", "-P", &port, "-NBe", sql]);
        output(&mut command)
    }

    /// Returns a counter of the server.
    pub fn counter(&self, name: &str) -> u64 {
        let row = self.sql(&format!("SHOW GLOBAL STATUS LIKE '{name}'")).expect("read a counter");
        row.split_whitespace().nth(1).and_then(|count| count.parse().ok()).expect("a number")
    }

    pub fn log(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("log")).unwrap_or_default()
    }
}

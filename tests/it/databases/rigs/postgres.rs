//! PostgreSQL servers: a primary, and standbys that stream from it.

use super::{command_as, directory, give, output};
use crate::common::ports::free_port;
use crate::common::servers::{Running, find};
use crate::common::{eventually, proc, secs};
use rustix::process::Signal;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// The programs that a test checks for.
pub const PROGRAMS: [&str; 6] =
    ["initdb", "postgres", "pg_basebackup", "pg_ctl", "psql", "pgbench"];

/// The password of every user that has one.
pub const PASSWORD: &str = "a pässword";

const USER: &str = "postgres";

/// Each user logs in by the method of its name. `postgres` needs no password.
const ACCESS: &str = "\
local all all trust
host replication all 127.0.0.1/32 trust
hostssl all overtls 127.0.0.1/32 scram-sha-256
host all scram 127.0.0.1/32 scram-sha-256
host all md5 127.0.0.1/32 md5
host all cleartext 127.0.0.1/32 password
host all postgres 127.0.0.1/32 trust
";

const SETTINGS: &str = "\
listen_addresses = '127.0.0.1'
unix_socket_directories = ''
fsync = off
full_page_writes = off
shared_buffers = '16MB'
max_connections = 50
max_wal_senders = 4
hot_standby = on
log_disconnections = on
log_destination = 'stderr'
lc_messages = 'C'
";

pub struct Postgres {
    pub address: SocketAddr,
    running: Option<Running>,
    dir: tempfile::TempDir,
}

impl Postgres {
    /// Starts a primary with the users of [`ACCESS`].
    pub fn start() -> Postgres {
        let server = Postgres::made(|data| {
            let mut initdb = command_as(USER, "initdb");
            initdb.args(["--no-sync", "-A", "trust", "-U", USER, "--locale=C", "-E", "UTF8", "-D"]);
            initdb.arg(data);
            output(&mut initdb).expect("initdb");
        });
        for (user, kind) in [
            ("scram", "scram-sha-256"),
            ("overtls", "scram-sha-256"),
            ("md5", "md5"),
            ("cleartext", "md5"),
        ] {
            let sql = format!(
                "SET password_encryption = '{kind}'; CREATE ROLE {user} LOGIN PASSWORD '{PASSWORD}'"
            );
            server.sql(&sql).expect("create a user");
        }
        server
    }

    /// Starts a standby that streams from this server.
    pub fn standby(&self) -> Postgres {
        let port = self.address.port().to_string();
        Postgres::made(|data| {
            let mut backup = command_as(USER, "pg_basebackup");
            backup.args(["-h", "127.0.0.1", "-p", &port, "-U", USER, "-R", "-X", "stream"]);
            backup.args(["--checkpoint=fast", "--no-sync", "-D"]).arg(data);
            output(&mut backup).expect("pg_basebackup");
        })
    }

    /// Starts a primary with a table `writes`, and its standby.
    pub fn primary_and_standby() -> (Postgres, Postgres) {
        let primary = Postgres::start();
        primary.sql("CREATE TABLE writes (at timestamptz DEFAULT now())").expect("create a table");
        let standby = primary.standby();
        (primary, standby)
    }

    fn made(fill: impl FnOnce(&Path)) -> Postgres {
        let dir = directory(USER);
        let address = SocketAddr::from(([127, 0, 0, 1], free_port()));
        let mut server = Postgres { address, running: None, dir };
        fill(&server.data());
        let settings = format!("{SETTINGS}port = {}\n", address.port());
        let main = server.data().join("postgresql.conf");
        std::fs::write(main, settings).expect("write postgresql.conf");
        std::fs::write(server.data().join("pg_hba.conf"), ACCESS).expect("write pg_hba.conf");
        give(USER, &server.data());
        server.restart();
        server
    }

    fn data(&self) -> PathBuf {
        self.dir.path().join("data")
    }

    /// Starts the server in its directory.
    pub fn restart(&mut self) {
        self.launch();
        eventually(secs(20), "PostgreSQL answers", || self.sql("SELECT 1").is_ok());
    }

    /// Starts the server and does not wait for it.
    pub fn launch(&mut self) {
        let log = std::fs::File::options().create(true).append(true).open(self.log_path());
        let mut command = command_as(USER, "postgres");
        command.arg("-D").arg(self.data()).stdout(Stdio::null());
        self.running = Some(Running::start(command.stderr(log.expect("open the log"))));
    }

    /// Uses this certificate for TLS from now on.
    pub fn take_tls(&self, certificate: &str, key: &str) {
        let (cert_file, key_file) =
            (self.data().join("server.crt"), self.data().join("server.key"));
        std::fs::write(cert_file, certificate).expect("write the certificate");
        std::fs::write(&key_file, key).expect("write the key");
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o600);
        std::fs::set_permissions(key_file, mode).expect("protect the key");
        give(USER, &self.data());
        self.sql("ALTER SYSTEM SET ssl = on").expect("set ssl");
        self.sql("SELECT pg_reload_conf()").expect("reload");
        eventually(secs(5), "the server takes TLS", || {
            self.sql("SHOW ssl").is_ok_and(|ssl| ssl == "on")
        });
    }

    /// Sends SIGKILL.
    pub fn kill(&mut self) {
        self.running = None;
    }

    /// Stops the process that accepts sessions. The processes of open sessions continue.
    pub fn hang(&self) {
        self.signal(Signal::STOP);
    }

    /// Ends [`Postgres::hang`].
    pub fn resume(&self) {
        self.signal(Signal::CONT);
    }

    fn signal(&self, signal: Signal) {
        proc::signal(self.running.as_ref().expect("the server runs").pid(), signal);
    }

    /// Stops the server after its standbys have received everything.
    pub fn stop(&mut self) {
        let mut stop = command_as(USER, "pg_ctl");
        output(stop.args(["stop", "-w", "-m", "fast", "-D"]).arg(self.data()))
            .expect("pg_ctl stop");
        self.running = None;
    }

    /// Starts the stopped server as a standby of this primary.
    pub fn follow(&mut self, primary: SocketAddr) {
        let conninfo = format!(
            "primary_conninfo = 'host={} port={} user={USER}'\n",
            primary.ip(),
            primary.port()
        );
        let settings = self.data().join("postgresql.auto.conf");
        std::fs::write(settings, conninfo).expect("write postgresql.auto.conf");
        std::fs::write(self.data().join("standby.signal"), "").expect("write standby.signal");
        give(USER, &self.data());
        self.restart();
    }

    pub fn promote(&self) {
        let mut promote = command_as(USER, "pg_ctl");
        output(promote.args(["promote", "-w", "-D"]).arg(self.data())).expect("pg_ctl promote");
    }

    /// Runs a statement as the superuser.
    pub fn sql(&self, sql: &str) -> Result<String, String> {
        let mut command = Command::new(find("psql").expect("the test checked for psql"));
        let port = self.address.port().to_string();
        command.args(["-h", "127.0.0.1", "-p", &port, "-U", USER, "-XAtqc", sql]);
        output(&mut command)
    }

    fn log_path(&self) -> PathBuf {
        self.dir.path().join("log")
    }

    pub fn log(&self) -> String {
        std::fs::read_to_string(self.log_path()).unwrap_or_default()
    }
}

/// pgbench with a script of its own. It starts again when its sessions have ended.
pub struct Pgbench {
    _running: Running,
    dir: tempfile::TempDir,
}

impl Pgbench {
    /// Four sessions run the script, together at most 200 times per second.
    pub fn start(address: SocketAddr, script: &str) -> Pgbench {
        let dir = directory(USER);
        let file = dir.path().join("script");
        std::fs::write(&file, script).expect("write the script");
        let errors = std::fs::File::create(dir.path().join("errors")).expect("create a file");
        let mut command = Command::new("sh");
        command.args(["-c", "while :; do \"$@\"; sleep 0.05; done", "sh"]);
        command.arg(find("pgbench").expect("the test checked for pgbench"));
        command.args(["-n", "-c", "4", "-R", "200", "-T", "3600", "-U", USER, "-f"]).arg(file);
        command.args(["-h", "127.0.0.1", "-p", &address.port().to_string(), "postgres"]);
        command.stdout(Stdio::null()).stderr(errors);
        Pgbench { _running: Running::start(&mut command), dir }
    }

    /// What pgbench has written about errors.
    pub fn errors(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("errors")).expect("read the errors")
    }
}

/// What a server answers to a statement.
#[derive(Default)]
pub struct PostgresAnswer {
    /// The code of the error.
    pub error: Option<String>,
    /// The last row, if it has one column.
    pub value: String,
}

/// A session of the user `postgres`, which needs no password.
pub struct PostgresSession(TcpStream);

impl PostgresSession {
    pub fn open(address: SocketAddr) -> std::io::Result<PostgresSession> {
        let stream = TcpStream::connect_timeout(&address, secs(5))?;
        stream.set_read_timeout(Some(secs(5)))?;
        let mut session = PostgresSession(stream);
        let body = b"\0\x03\0\0user\0postgres\0\0";
        let length = u32::try_from(body.len() + 4).unwrap_or_default().to_be_bytes();
        session.0.write_all(&[&length, body.as_slice()].concat())?;
        session.finish().map(|_| session)
    }

    /// Runs a statement. Returns the code of its error, if there is one.
    pub fn run(&mut self, sql: &str) -> std::io::Result<Option<String>> {
        self.ask(sql).map(|answer| answer.error)
    }

    /// Runs a statement and returns the answer.
    pub fn ask(&mut self, sql: &str) -> std::io::Result<PostgresAnswer> {
        let length = u32::try_from(sql.len() + 5).unwrap_or_default().to_be_bytes();
        self.0.write_all(&[b"Q", length.as_slice(), sql.as_bytes(), b"\0"].concat())?;
        self.finish()
    }

    /// Reads until the server is ready.
    fn finish(&mut self) -> std::io::Result<PostgresAnswer> {
        let mut answer = PostgresAnswer::default();
        loop {
            let mut header = [0; 5];
            self.0.read_exact(&mut header)?;
            let [kind, length @ ..] = header;
            let mut body = vec![0; u32::from_be_bytes(length) as usize - 4];
            self.0.read_exact(&mut body)?;
            match kind {
                b'Z' => return Ok(answer),
                // The number of columns, and the length of the first one.
                b'D' => answer.value = String::from_utf8_lossy(&body[6..]).into_owned(),
                b'E' => {
                    let mut fields = body.split(|byte| *byte == 0);
                    let code = fields.find_map(|field| field.strip_prefix(b"C"));
                    answer.error =
                        Some(String::from_utf8_lossy(code.unwrap_or_default()).into_owned());
                }
                _ => {}
            }
        }
    }
}

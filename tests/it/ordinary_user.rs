//! The first use by a user without privileges: no `[admin] listen`, no `--admin`.
//!
//! If root runs the tests, they switch to a user that owns nothing.

use crate::common::backend::{self, ScriptedBackend};
use crate::common::ports::free_port;
use crate::common::proxy::PROGRAM;
use crate::common::{Engine, client, eventually, on_every_engine, secs};
use std::fs::File;
use std::net::SocketAddr;
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

on_every_engine!(
    commands_find_the_process_in_the_runtime_directory,
    user_without_a_runtime_directory_uses_a_directory_in_tmp,
    mistakes_of_a_user_are_explained,
);

/// A Tidegate process that this user has started, and commands of the same user.
struct UserProcess {
    dir: tempfile::TempDir,
    uid: Option<u32>,
    runtime: Option<PathBuf>,
    config: PathBuf,
    address: SocketAddr,
    child: Child,
}

impl UserProcess {
    fn start(engine: Engine, uid: u32, with_runtime: bool, backend: SocketAddr) -> UserProcess {
        let uid = rustix::process::geteuid().is_root().then_some(uid);
        let dir = tempfile::Builder::new().prefix("tg-").tempdir_in("/tmp").unwrap();
        std::fs::set_permissions(dir.path(), PermissionsExt::from_mode(0o755)).unwrap();
        let runtime = with_runtime.then(|| dir.path().join("runtime"));
        if let Some(runtime) = &runtime {
            std::fs::create_dir(runtime).unwrap();
            std::fs::set_permissions(runtime, PermissionsExt::from_mode(0o700)).unwrap();
            chown(runtime, uid, uid).unwrap();
        }
        let address = SocketAddr::from(([127, 0, 0, 1], free_port()));
        let config = dir.path().join("tidegate.toml");
        let text = format!(
            "[process]\nworkers = 1\nengine = \"{}\"\n[frontend.web]\nbind = \"{address}\"\n\
             pool = \"web\"\n[[pool.web.backend]]\nname = \"a\"\naddress = \"{backend}\"\n",
            engine.name()
        );
        std::fs::write(&config, text).unwrap();
        let log = File::create(dir.path().join("stderr")).unwrap();
        let mut run = as_user(uid, runtime.as_deref());
        run.args(["run", "--config"]).arg(&config);
        run.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        let child = run.spawn().unwrap();
        UserProcess { dir, uid, runtime, config, address, child }
    }

    fn command(&self, arguments: &[&str]) -> Output {
        as_user(self.uid, self.runtime.as_deref()).args(arguments).output().unwrap()
    }

    #[track_caller]
    fn stdout(&self, arguments: &[&str]) -> String {
        let output = self.command(arguments);
        assert!(output.status.success(), "{arguments:?}: {output:?}\n{}", self.log());
        String::from_utf8(output.stdout).unwrap()
    }

    #[track_caller]
    fn wait_for_an_answer(&mut self) {
        eventually(secs(20), "a command reaches the process", || {
            let ended = self.child.try_wait().unwrap();
            assert_eq!(ended, None, "the process did not start:\n{}", self.log());
            self.command(&["status"]).status.success()
        });
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("stderr")).unwrap()
    }

    /// Shuts the process down by a command and waits until its socket is removed.
    #[track_caller]
    fn shut_down(mut self, socket: &Path) {
        self.stdout(&["shutdown"]);
        eventually(secs(20), "the socket is removed", || !socket.exists());
        eventually(secs(20), "the process ends", || self.child.try_wait().unwrap().is_some());
    }
}

impl Drop for UserProcess {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn as_user(uid: Option<u32>, runtime: Option<&Path>) -> Command {
    let mut command = Command::new(PROGRAM);
    command.env_remove("TIDEGATE_ADMIN").env_remove("XDG_RUNTIME_DIR");
    if let Some(runtime) = runtime {
        command.env("XDG_RUNTIME_DIR", runtime);
    }
    if let Some(uid) = uid {
        // The standard library also clears the supplementary groups.
        command.uid(uid).gid(uid);
    }
    command
}

fn commands_find_the_process_in_the_runtime_directory(engine: Engine) {
    let a = ScriptedBackend::start(backend::name("a"));
    let mut own = UserProcess::start(engine, 65534, true, a.address().parse().unwrap());
    own.wait_for_an_answer();
    let socket = own.runtime.clone().unwrap().join("tidegate/admin.sock");
    let line = format!("address=unix:{}", socket.display());
    let said = own.log().lines().filter(|entry| entry.contains(&line)).count();
    assert_eq!(said, 1, "{}", own.log());
    assert!(own.log().contains("/run/tidegate"), "the reason is missing: {}", own.log());
    assert_eq!(client::ask(own.address).unwrap(), "a");

    let config = own.config.to_str().unwrap().to_owned();
    own.stdout(&["drain", "web/a"]);
    own.stdout(&["undrain", "web/a", "--config", &config]);
    own.stdout(&["explain", "web/a"]);
    let reloaded = own.stdout(&["reload"]);
    assert!(reloaded.contains("unchanged") && !reloaded.contains("warning"), "{reloaded}");
    own.stdout(&["upgrade"]);
    let status = own.stdout(&["status", "--json"]);
    let status: serde_json::Value = serde_json::from_str(&status).unwrap();
    assert_eq!(status["warnings"], serde_json::json!([]), "{status}");
    assert_eq!(client::ask(own.address).unwrap(), "a");
    own.shut_down(&socket);
}

fn user_without_a_runtime_directory_uses_a_directory_in_tmp(engine: Engine) {
    if !rustix::process::geteuid().is_root() {
        // This user can have a Tidegate process with that directory.
        return;
    }
    // No account and no other test has this uid.
    let uid = 1_900_000_000 + u32::from(free_port()) * 2 + u32::from(engine == Engine::Epoll);
    let a = ScriptedBackend::start(backend::name("a"));
    let mut own = UserProcess::start(engine, uid, false, a.address().parse().unwrap());
    own.wait_for_an_answer();
    let directory = PathBuf::from(format!("/tmp/tidegate-{uid}"));
    let mode = std::fs::metadata(&directory).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o700);
    let socket = directory.join("admin.sock");

    // The variable takes precedence over the address that a command finds itself.
    let output = as_user(own.uid, None)
        .env("TIDEGATE_ADMIN", "unix:/nowhere/admin.sock")
        .arg("status")
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.code() == Some(3) && said.contains("unix:/nowhere/"), "{output:?}");
    own.shut_down(&socket);

    // A directory that another user created is used neither for listening nor for commands.
    chown(&directory, Some(0), Some(0)).unwrap();
    let output = as_user(Some(uid), None).arg("status").output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("is not a directory of this user"), "{said}");
    let mut own = UserProcess::start(engine, uid, false, a.address().parse().unwrap());
    eventually(secs(20), "the process exits", || own.child.try_wait().unwrap().is_some());
    assert!(own.log().contains("or set [admin] listen"), "{}", own.log());
    std::fs::remove_dir_all(&directory).unwrap();
}

/// Each message names the object and what to do.
fn mistakes_of_a_user_are_explained(engine: Engine) {
    let a = ScriptedBackend::start(backend::name("a"));
    let mut own = UserProcess::start(engine, 65534, true, a.address().parse().unwrap());
    own.wait_for_an_answer();
    let socket = own.runtime.clone().unwrap().join("tidegate/admin.sock");
    let text = std::fs::read_to_string(&own.config).unwrap();
    let second = own.dir.path().join("second.toml");
    let refused = |arguments: &[&str], code: i32, parts: &[&str]| {
        let output = own.command(arguments);
        let said = String::from_utf8(output.stderr.clone()).unwrap();
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {output:?}");
        for part in parts {
            assert!(said.contains(part), "{arguments:?}: {part:?} is not in: {said}");
        }
        said
    };
    let file = second.to_str().unwrap();
    let port = own.address.port().to_string();

    std::fs::write(&second, text.replace(&port, &free_port().to_string())).unwrap();
    let taken = format!("another process listens on unix:{}", socket.display());
    refused(&["run", file], 3, &[&taken, "stop it or choose another [admin] listen"]);

    refused(&["explain", "web/b"], 1, &["no backend \"b\"; tidegate status lists its backends"]);
    refused(&["drain", "b/a"], 1, &["no pool \"b\"; tidegate status lists all pools"]);

    // The status shows that the file is not the configuration in force.
    let rejected = "warning: configuration file rejected; the previous one stays in effect";
    std::fs::write(&own.config, text.replace("workers = 1", "workers = 0")).unwrap();
    refused(&["reload"], 1, &["workers must be from 1 to 256"]);
    let shown = own.stdout(&["status"]);
    assert!(shown.contains(rejected) && shown.contains(":2:11: workers must be"), "{shown}");
    std::fs::write(&own.config, &text).unwrap();
    own.stdout(&["reload"]);
    assert!(!own.stdout(&["status"]).contains(rejected));

    if own.uid.is_some() {
        // With its own name as `user`, the process also uses the directory of the user.
        let user = "[process]\nuser = \"65534\"\ngroup = \"65534\"\n";
        std::fs::write(&second, text.replace("[process]\n", user)).unwrap();
        refused(&["run", file], 3, &[&taken]);

        let user = "[process]\nuser = \"54321\"\ngroup = \"54321\"\n";
        std::fs::write(&second, text.replace("[process]\n", user)).unwrap();
        let switch = ":2:8: error: [process] user: ";
        refused(&["run", file], 3, &[switch, "cannot switch to 54321", "start as root"]);
        let checked = own.command(&["check", file]);
        let warned = String::from_utf8(checked.stderr).unwrap();
        assert!(checked.status.success() && warned.contains("warning: [process] user"), "{warned}");

        std::fs::write(&own.config, text.replace(&port, "1")).unwrap();
        let low = ["cannot listen on 127.0.0.1:1: Permission denied", "use a port above 1023"];
        let said = refused(&["reload"], 1, &low);
        assert!(!said.contains("sandbox"), "{said}");
    }
    own.shut_down(&socket);
}

//! Real database servers, each in its own directory and at its own port. Dropping one kills it.

pub mod mariadb;
pub mod postgres;
pub mod services;

use crate::common::servers::find;
use rustix::process::geteuid;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

/// Returns the command of a program that refuses to run as root. As root it becomes `user`.
fn command_as(user: &str, program: &str) -> Command {
    let program = find(program).expect("the test checked for the program");
    if !geteuid().is_root() {
        return Command::new(program);
    }
    let mut command = Command::new(find("setpriv").expect("setpriv is a part of util-linux"));
    command.args([&format!("--reuid={user}"), &format!("--regid={user}"), "--clear-groups"]);
    command.arg(program);
    command
}

/// Makes a directory for a server of `user`.
fn directory(user: &str) -> tempfile::TempDir {
    let dir = tempfile::Builder::new().prefix("tg-db-").tempdir_in("/tmp").expect("directory");
    give(user, dir.path());
    dir
}

/// As root, makes `user` the owner.
pub fn give(user: &str, path: &Path) {
    if geteuid().is_root() {
        let done = Command::new("chown").arg("-R").arg(format!("{user}:")).arg(path).status();
        assert!(done.expect("run chown").success(), "chown {user} {}", path.display());
    }
}

/// Runs a command to its end and returns its output.
#[track_caller]
fn output(command: &mut Command) -> Result<String, String> {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    match output.status.success() {
        true => Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned()),
        false => Err(String::from_utf8_lossy(&output.stderr).trim().to_owned()),
    }
}

/// Writes a file that only its owner can read, and returns its path.
pub fn private_file(dir: &Path, name: &str, text: &str) -> String {
    let path = dir.join(name);
    std::fs::write(&path, text).expect("write");
    let mode = std::fs::Permissions::from_mode(0o600);
    std::fs::set_permissions(&path, mode).expect("protect");
    path.display().to_string()
}

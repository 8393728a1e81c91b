//! The program and arguments of the processes that the supervisor starts.
//!
//! Made at the start of the supervisor from its own command line, and used for each
//! process. It searches the path at each start, so that a replaced file or link is used.
//! It never starts a process itself.

use serde::{Deserialize, Serialize};
use std::ffi::{OsStr, OsString};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A program, as a process was started with it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Program {
    /// The first word of the command line.
    name: OsString,
    /// The working directory.
    directory: OsString,
    /// The executable file at the start.
    file: OsString,
    /// The command line after the first word.
    arguments: Vec<OsString>,
}

// === impl Program ===

impl Program {
    /// Returns the program of this process with `arguments`.
    ///
    /// # Errors
    /// The working directory or the executable file is unknown.
    pub fn of_this_process(arguments: Vec<OsString>) -> io::Result<Program> {
        let name = std::env::args_os().next().unwrap_or_default();
        let directory = std::env::current_dir()?.into();
        Ok(Program { name, directory, file: std::env::current_exe()?.into(), arguments })
    }

    /// Returns this program with `binary` and `config` in place of its file and its
    /// configuration file, if they are given.
    pub fn with_changes(&self, binary: Option<&Path>, config: Option<&Path>) -> Program {
        let mut changed = self.clone();
        if let Some(binary) = binary {
            changed.file = self.directory().join(binary).into();
            changed.name = changed.file.clone();
        }
        if let Some(config) = config
            && let Some(at) = changed.arguments.iter().position(|word| word == "--config")
            && let Some(word) = changed.arguments.get_mut(at + 1)
        {
            *word = self.directory().join(config).into();
        }
        changed
    }

    /// Returns the command that starts the program from the file that its name resolves to
    /// now.
    ///
    /// # Errors
    /// A message: the file does not exist or is not executable.
    pub fn command(&self) -> Result<Command, String> {
        let path = self.path()?;
        let mut command = Command::new(path);
        command.arg0(&self.name).args(&self.arguments);
        Ok(command)
    }

    /// Returns the path of the file that the name resolves to now.
    ///
    /// # Errors
    /// A message: the file does not exist or is not executable.
    pub fn path(&self) -> Result<PathBuf, String> {
        let path = self.find(std::env::var_os("PATH").as_deref());
        check(&path)?;
        Ok(path)
    }

    /// Searches the file as a shell does: by its path, or in the directories of `PATH`.
    /// Returns the file at the start if it finds none.
    fn find(&self, path: Option<&OsStr>) -> PathBuf {
        if self.name.as_encoded_bytes().contains(&b'/') {
            return self.directory().join(&self.name);
        }
        let directories = path.map(std::env::split_paths).into_iter().flatten();
        let found = directories
            .filter(|_| !self.name.is_empty())
            .map(|directory| self.directory().join(directory).join(&self.name))
            .find(|candidate| check(candidate).is_ok());
        found.unwrap_or_else(|| self.file.clone().into())
    }

    fn directory(&self) -> &Path {
        Path::new(&self.directory)
    }
}

/// Checks that the path is an executable file.
fn check(path: &Path) -> Result<(), String> {
    let facts = std::fs::metadata(path)
        .map_err(|error| format!("cannot start {}: {error}", path.display()))?;
    if !facts.is_file() || facts.permissions().mode() & 0o111 == 0 {
        return Err(format!("cannot start {}: not an executable file", path.display()));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::{File, Permissions};

    fn program(name: &str, directory: &Path) -> Program {
        Program {
            name: name.into(),
            directory: directory.into(),
            file: "/proc/self/exe".into(),
            arguments: ["run", "--config", "a.toml"].map(OsString::from).into(),
        }
    }

    fn executable(path: &Path) {
        File::create(path).unwrap().set_permissions(Permissions::from_mode(0o755)).unwrap();
    }

    #[test]
    fn relative_path_is_resolved_at_each_start_from_the_working_directory() {
        let dir = tempfile::tempdir().unwrap();
        let program = program("./tidegate", dir.path());
        let error = program.command().unwrap_err();
        assert!(error.contains("tidegate: No such file"), "{error}");
        executable(&dir.path().join("tidegate"));
        assert_eq!(program.path().unwrap(), dir.path().join("./tidegate"));
        let command = program.command().unwrap();
        assert_eq!(command.get_args().collect::<Vec<_>>(), ["run", "--config", "a.toml"]);
    }

    #[test]
    fn name_is_searched_in_path_as_a_shell_does() {
        let (one, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        File::create(one.path().join("tidegate")).unwrap();
        executable(&other.path().join("tidegate"));
        let program = program("tidegate", one.path());
        let path = std::env::join_paths([one.path(), other.path()]).unwrap();
        assert_eq!(program.find(Some(&path)), other.path().join("tidegate"));
        assert_eq!(program.find(None), Path::new("/proc/self/exe"));
    }

    #[test]
    fn changed_binary_and_configuration_apply_to_later_processes() {
        let dir = tempfile::tempdir().unwrap();
        executable(&dir.path().join("new"));
        let program = program("tidegate", dir.path());
        let changed = program.with_changes(Some(Path::new("new")), Some(Path::new("/b.toml")));
        assert_eq!(changed.path().unwrap(), dir.path().join("new"));
        assert_eq!(changed.arguments, ["run", "--config", "/b.toml"]);
        assert_eq!(changed.with_changes(None, None), changed, "the next program is the same");
        let error = program.with_changes(Some(dir.path()), None).path().unwrap_err();
        assert!(error.contains("not an executable file"), "{error}");
    }
}

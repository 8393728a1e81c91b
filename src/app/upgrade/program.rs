//! Which program an upgrade starts, and with which arguments.
//!
//! Made once at start, from what this process was started with; asked by each
//! upgrade. It looks the path up anew each time, so that a file that was replaced
//! (or a link that was turned) is taken.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

/// How this process was started.
#[derive(Debug, Clone)]
pub struct Program {
    /// The first word of its command line.
    name: OsString,
    /// Where it was started.
    directory: PathBuf,
    /// The file it runs, as of its start.
    file: PathBuf,
    /// Everything after the first word.
    arguments: Vec<OsString>,
}

/// One upgrade's command line.
#[derive(Debug)]
pub(super) struct CommandLine {
    pub(super) path: PathBuf,
    /// The first word, as other processes see it.
    pub(super) name: OsString,
    pub(super) arguments: Vec<OsString>,
}

// === impl Program ===

impl Program {
    /// This process, to be started again with `arguments`.
    ///
    /// # Errors
    /// The kernel does not say where it was started from.
    pub fn of_this_process(arguments: Vec<OsString>) -> io::Result<Program> {
        let name = std::env::args_os().next().unwrap_or_default();
        let directory = std::env::current_dir()?;
        Ok(Program { name, directory, file: std::env::current_exe()?, arguments })
    }

    /// What to start: `binary`, or whatever is found now by the name this
    /// process was started by; with `config` in the place of its own
    /// configuration file.
    pub(super) fn command_line(
        &self,
        binary: Option<&Path>,
        config: Option<&Path>,
    ) -> Result<CommandLine, String> {
        let (path, name) = match binary {
            Some(binary) => (self.directory.join(binary), binary.as_os_str().to_owned()),
            None => (self.find(std::env::var_os("PATH").as_deref()), self.name.clone()),
        };
        check(&path)?;
        let mut arguments = self.arguments.clone();
        if let Some(config) = config {
            let config = self.directory.join(config);
            if let Some(at) = arguments.iter().position(|word| word == "--config")
                && let Some(word) = arguments.get_mut(at + 1)
            {
                *word = config.into();
            }
        }
        Ok(CommandLine { path, name, arguments })
    }

    /// As a shell would find it: by the path, or in the directories of `PATH`;
    /// the file of this process where that finds nothing.
    fn find(&self, path: Option<&OsStr>) -> PathBuf {
        if self.name.as_encoded_bytes().contains(&b'/') {
            return self.directory.join(&self.name);
        }
        let directories = path.map(std::env::split_paths).into_iter().flatten();
        let found = directories
            .filter(|_| !self.name.is_empty())
            .map(|directory| self.directory.join(directory).join(&self.name))
            .find(|candidate| check(candidate).is_ok());
        found.unwrap_or_else(|| self.file.clone())
    }
}

/// A file that may be run.
fn check(path: &Path) -> Result<(), String> {
    let facts = std::fs::metadata(path)
        .map_err(|error| format!("cannot start {}: {error}", path.display()))?;
    if !facts.is_file() || facts.permissions().mode() & 0o111 == 0 {
        return Err(format!("cannot start {}: it is no program", path.display()));
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
            directory: directory.to_owned(),
            file: "/proc/self/exe".into(),
            arguments: ["run", "--config", "a.toml"].map(OsString::from).into(),
        }
    }

    fn executable(path: &Path) {
        File::create(path).unwrap().set_permissions(Permissions::from_mode(0o755)).unwrap();
    }

    #[test]
    fn a_path_is_looked_up_anew_from_where_the_process_was_started() {
        let dir = tempfile::tempdir().unwrap();
        let program = program("./tidegate", dir.path());
        let error = program.command_line(None, None).unwrap_err();
        assert!(error.contains("tidegate: No such file"), "{error}");
        executable(&dir.path().join("tidegate"));
        let line = program.command_line(None, None).unwrap();
        assert_eq!(line.path, dir.path().join("./tidegate"));
        assert_eq!((line.name, line.arguments), ("./tidegate".into(), program.arguments));
    }

    #[test]
    fn a_name_is_searched_for_as_a_shell_does() {
        let (one, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        File::create(one.path().join("tidegate")).unwrap();
        executable(&other.path().join("tidegate"));
        let program = program("tidegate", one.path());
        let path = std::env::join_paths([one.path(), other.path()]).unwrap();
        assert_eq!(program.find(Some(&path)), other.path().join("tidegate"));
        assert_eq!(program.find(None), Path::new("/proc/self/exe"));
    }

    #[test]
    fn another_binary_and_another_configuration_are_taken() {
        let dir = tempfile::tempdir().unwrap();
        executable(&dir.path().join("new"));
        let program = program("tidegate", dir.path());
        let line =
            program.command_line(Some(Path::new("new")), Some(Path::new("/b.toml"))).unwrap();
        assert_eq!(line.path, dir.path().join("new"));
        assert_eq!(line.arguments, ["run", "--config", "/b.toml"]);
        let error = program.command_line(Some(dir.path()), None).unwrap_err();
        assert!(error.contains("no program"), "{error}");
    }
}

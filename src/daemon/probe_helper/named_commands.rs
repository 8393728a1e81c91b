//! The commands that the configuration file has.
//!
//! Owned by the runner of the probe helper, which runs no other command. It reads the file itself
//! and never takes a command from the balancer. It reads no file that the configuration names,
//! except included ones.

use super::message::RunCommand;
use std::collections::HashSet;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use tidegate_core::model::{CommandSubject, Config, NO_PORT};

/// Shortest time between two reads because a command is unknown.
const REREAD_INTERVAL: Duration = Duration::from_secs(1);

/// Longest name or address that a command gets.
const NAME_BYTES_MAX: usize = 512;

/// See the module's documentation.
#[derive(Debug)]
pub(super) struct NamedCommands {
    file: PathBuf,
    /// Pools with the words of their commands.
    known: HashSet<(String, Vec<String>)>,
    /// The last read because a command was unknown.
    reread_at: Option<Instant>,
    /// Why the last read failed.
    problem: Option<String>,
}

// === impl NamedCommands ===

impl NamedCommands {
    /// Reads the file at the first use.
    pub(super) fn of(file: &Path) -> NamedCommands {
        NamedCommands {
            file: file.to_owned(),
            known: HashSet::new(),
            reread_at: None,
            problem: None,
        }
    }

    /// Forgets commands that the file no longer has. An unreadable file changes nothing.
    pub(super) fn reread(&mut self) {
        if let Some(now) = self.read() {
            self.known = now;
        }
    }

    /// Returns the words of a command with the values of its placeholders, or why the helper
    /// does not run it.
    ///
    /// For an unknown command, the file is read again, because it can be newer than the last
    /// notice. Known commands stay: a balancer can keep an older configuration than
    /// the file has.
    pub(super) fn words(&mut self, run: &RunCommand, now: Instant) -> Result<Vec<String>, String> {
        let key = (run.subject.pool.clone(), run.command.clone());
        let recent = |at: Instant| now.saturating_duration_since(at) < REREAD_INTERVAL;
        if !self.known.contains(&key) && !self.reread_at.is_some_and(recent) {
            self.reread_at = Some(now);
            let read = self.read();
            self.known.extend(read.into_iter().flatten());
        }
        if !self.known.contains(&key) {
            let file = self.file.display();
            return Err(match &self.problem {
                Some(problem) => format!("the probe helper cannot read {file}: {problem}"),
                None => format!("{file} does not have this command"),
            });
        }
        filled(run)
    }

    fn read(&mut self) -> Option<HashSet<(String, Vec<String>)>> {
        match tidegate_config::outline(&self.file) {
            Ok((config, _)) => {
                self.problem = None;
                Some(commands_of(&config))
            }
            Err(problems) => {
                let first = problems.list.first().map(|problem| problem.message.clone());
                self.problem = Some(first.unwrap_or_default());
                None
            }
        }
    }
}

fn commands_of(config: &Config) -> HashSet<(String, Vec<String>)> {
    let of = |pool: &tidegate_core::model::PoolConfig| {
        Some((pool.name.to_string(), pool.exec_probe()?.command.clone()))
    };
    config.pools.iter().filter_map(|pool| of(pool)).collect()
}

/// Fills in the placeholders.
///
/// The balancer chooses the values. A value must not become an option of the program, and an
/// address must be one.
fn filled(run: &RunCommand) -> Result<Vec<String>, String> {
    let CommandSubject { pool: _, backend, address, port } = &run.subject;
    let is_address = address.parse::<IpAddr>().is_ok() || address.starts_with(['/', '@']);
    let is_port = port == NO_PORT || port.parse::<u16>().is_ok();
    let bounded = [backend, address]
        .iter()
        .all(|text| text.len() <= NAME_BYTES_MAX && !text.contains(|c: char| c.is_control()));
    if !is_address || !is_port || !bounded {
        return Err("the name or the address of the backend is not valid".to_owned());
    }
    let fill = |word: &String| {
        let filled = run.subject.fill(word);
        let option = filled.starts_with('-') && !word.starts_with('-');
        (!option).then_some(filled).ok_or_else(|| format!("{word} would become an option"))
    };
    run.command.iter().map(fill).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use tidegate_net::clock;

    fn write(file: &Path, commands: &[&str]) {
        let mut text = "[process]\nprobe_helper = true\n".to_owned();
        for (at, command) in commands.iter().enumerate() {
            text += &format!(
                "[frontend.f{at}]\nbind = \"127.0.0.1:{}\"\npool = \"p{at}\"\n\
                 [pool.p{at}]\nprobe = {{ kind = \"exec\", command = {command} }}\n\
                 backend = [{{ address = \"127.0.0.2:1\" }}]\n",
                at + 1
            );
        }
        std::fs::write(file, text).unwrap();
    }

    fn run(pool: &str, words: &[&str]) -> RunCommand {
        RunCommand {
            timeout: Duration::from_secs(1),
            subject: CommandSubject {
                pool: pool.into(),
                backend: "a".into(),
                address: "127.0.0.2".into(),
                port: "1".into(),
            },
            command: words.iter().map(|word| (*word).to_owned()).collect(),
        }
    }

    #[test]
    fn only_commands_of_the_file_are_allowed_and_only_in_their_pool() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("t.toml");
        write(&file, &["['/bin/a', '{address}:{port}']", "['/bin/b']"]);
        let mut named = NamedCommands::of(&file);
        let now = clock::now();
        let words = named.words(&run("p0", &["/bin/a", "{address}:{port}"]), now);
        assert_eq!(words.unwrap(), ["/bin/a", "127.0.0.2:1"]);
        for (pool, words) in [
            ("p1", &["/bin/a", "{address}:{port}"][..]),
            ("p0", &["/bin/a", "127.0.0.2:1"]),
            ("p0", &["/bin/a"]),
            ("p0", &[]),
            ("p0", &["/bin/sh", "-c", "id"]),
        ] {
            let error = named.words(&run(pool, words), now).unwrap_err();
            assert!(error.ends_with("t.toml does not have this command"), "{error}");
        }
    }

    #[test]
    fn new_command_is_found_in_the_file_and_an_old_one_ends_with_a_reload() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("t.toml");
        let (old, new) = (run("p0", &["/bin/a"]), run("p0", &["/bin/b"]));
        write(&file, &["['/bin/a']"]);
        let mut named = NamedCommands::of(&file);
        let start = clock::now();
        assert!(named.words(&old, start).is_ok());
        write(&file, &["['/bin/b']"]);
        // The file is not read for every unknown command.
        assert!(named.words(&new, start).is_err());
        let later = start + REREAD_INTERVAL;
        assert!(named.words(&new, later).is_ok());
        assert!(named.words(&old, later).is_ok(), "the balancer can still have the old file");
        named.reread();
        assert!(named.words(&old, later).is_err());
        std::fs::write(&file, "[process\n").unwrap();
        named.reread();
        assert!(named.words(&new, later).is_ok(), "an unreadable file changes nothing");
        let error = named.words(&old, later + REREAD_INTERVAL).unwrap_err();
        assert!(error.contains("the probe helper cannot read"), "{error}");
    }

    #[test]
    fn value_of_a_placeholder_never_becomes_an_option() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("t.toml");
        write(&file, &["['/bin/a', '{backend}']"]);
        let mut named = NamedCommands::of(&file);
        let mut run = run("p0", &["/bin/a", "{backend}"]);
        for (backend, address, port) in [
            ("-x", "127.0.0.1", "1"),
            ("a\nb", "127.0.0.1", "1"),
            ("a", "host", "1"),
            ("a", "-oProxyCommand=x", "1"),
            ("a", "127.0.0.1", "70000"),
        ] {
            run.subject.backend = backend.into();
            run.subject.address = address.into();
            run.subject.port = port.into();
            assert!(named.words(&run, clock::now()).is_err(), "{backend:?} {address} {port}");
        }
    }
}

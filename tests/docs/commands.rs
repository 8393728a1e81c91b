//! Runs the commands of the pages in an empty directory, as they are written. Only addresses and
//! the admin socket are replaced.

use crate::pages::{blocks, page, pages, prose};
use clap::Parser;
use std::fmt::Write;
use std::fs;
use std::net::{SocketAddr, TcpListener};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use tidegate_cli::Cli;

#[test]
fn quickstart_commands_get_answers_from_both_services() {
    let text = page("docs/quickstart.md");
    let (_, rest) = text.split_once("\n## Start two services").unwrap();
    let (steps, _) = rest.split_once("\n## How commands find").unwrap();
    let mut script = blocks(steps, "sh").join("\n");
    assert!(script.contains("tidegate upgrade") && script.contains("curl"), "{script}");
    for (written, free) in ["8080", "9001", "9002"].iter().zip(free_addresses()) {
        script = script.replace(written, &free.port().to_string());
    }
    let shell = Shell::new();
    let script = script.replace("[frontend.web]", &shell.with_admin("[frontend.web]"));
    let printed = shell.run(&script);
    for line in [
        "answer from a",
        "answer from b",
        "tidegate.toml: ok: 1 frontend, 1 pool, 2 backends",
        "IN ROTATION: ",
        "web/a has no sessions",
        "reloaded; generation 2 is in effect",
        "upgraded: process",
        "draining; exits when",
    ] {
        assert!(printed.contains(line), "no {line:?} in:\n{printed}");
    }
    // The two answers differ, and the head of the table is as the page shows it.
    let spaced = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
    let [answers, status] = blocks(steps, "text")[..] else { panic!("two blocks of output") };
    let mut first: Vec<&str> =
        printed.lines().filter(|line| line.starts_with("answer from")).take(2).collect();
    first.sort_unstable();
    assert_eq!(first, answers.lines().collect::<Vec<_>>(), "{printed}");
    for line in status.lines().take(2) {
        assert!(spaced(&printed).contains(&spaced(line)), "no {line:?} in:\n{printed}");
    }
}

/// Words per minute of a reader, and of a typist. A typed word has five characters.
const READ: f64 = 200.0;
const TYPED: f64 = 40.0;

#[test]
fn quickstart_takes_at_most_five_minutes_without_the_build() {
    let text = page("docs/quickstart.md");
    let (_, build) = text.split_once("\n## Build\n").unwrap();
    let (start, _) = build.split_once("\nThe two answers come").expect("the first request");
    // Readers with two services skip the commands that start two.
    let (before, rest) = start.split_once("\n## Start two services\n").unwrap();
    let (own, after) = rest.split_once("\n## Write a configuration\n").unwrap();
    let skip = own.split("```").next().unwrap();
    let path = [before, skip, after].join("\n");
    let words = prose(&path).split_whitespace().count();
    let commands: usize = blocks(&path, "sh").iter().map(|block| block.len()).sum();
    assert!(words > 80 && commands > 400, "{words} words, {commands} characters");
    let minutes = words as f64 / READ + commands as f64 / 5.0 / TYPED;
    assert!(minutes <= 5.0, "{minutes:.1} min: {words} words, {commands} characters");
}

#[test]
fn readme_example_loses_no_connection() {
    let text = page("README.md");
    let [frontend, a, b] = free_addresses();
    let shell = Shell::new();
    let configuration = blocks(&text, "toml")[0]
        .replace("10.0.0.10:8080", &frontend.to_string())
        .replace("10.0.0.11:8080", &a.to_string())
        .replace("10.0.0.12:8080", &b.to_string());
    shell.write("tidegate.toml", &shell.with_admin(&configuration));
    let console = blocks(&text, "console").join("\n");
    let commands: Vec<&str> = console.lines().filter_map(|line| line.strip_prefix("$ ")).collect();
    let [drain, status, undrain, reload, upgrade] = commands[..] else { panic!("{commands:?}") };
    let printed = shell.run(&format!(
        "tidegate backend --listen {a} echo & A=$!
         tidegate backend --listen {b} echo & B=$!
         tidegate run --config tidegate.toml &
         until tidegate ready; do sleep 0.1; done
         tidegate bench --to {frontend} churn --size 64 --connections 40 --lifetime 300ms \
           --for 6s --json >load.json & LOAD=$!
         sleep 1
         {drain}; {status}
         kill $A; wait $A || true; tidegate backend --listen {a} echo & A=$!
         sleep 0.5
         {undrain}
         sed -i 's/name = \"a\"/name = \"a\"\\nweight = 3/' tidegate.toml
         {reload}
         {upgrade}
         wait $LOAD
         tidegate shutdown
         kill $A $B"
    ));
    let load: serde_json::Value = serde_json::from_str(&shell.read("load.json")).unwrap();
    assert_eq!(load["errors_total"], 0, "{load}\n{printed}");
    assert!(load["opened"].as_u64().unwrap() > 100, "{load}");
    let numbers = |text: &str| text.replace(|c: char| c.is_ascii_digit(), "");
    let printed = numbers(&printed);
    let said = console.lines().filter(|line| line.starts_with("web/") || line.contains("; "));
    for line in said.filter(|line| !line.starts_with(['$', 'a', 'b'])) {
        // On a busy host the watcher of the file reloads before the command does.
        let watched = line.starts_with("reloaded") && printed.contains("configuration applied");
        assert!(watched || printed.contains(&numbers(line)), "no {line:?} in:\n{printed}");
    }
}

#[test]
fn requests_of_the_admin_api_page_get_answers() {
    let shell = Shell::new();
    let directory = shell.directory();
    let [one, other, tcp] = free_addresses();
    let serving = |bind: SocketAddr| {
        format!(
            "[frontend.web]\nbind = \"{bind}\"\npool = \"web\"\n\
             [[pool.web.backend]]\naddress = \"127.0.0.1:1\"\n"
        )
    };
    shell.write("unix.toml", &shell.with_admin(&serving(one)));
    let over_tcp = format!("listen = \"{tcp}\"\ntoken_file = \"{directory}/admin.token\"");
    shell.write("tcp.toml", &format!("[admin]\n{over_tcp}\n{}", serving(other)));
    let requests = blocks(&page("docs/admin-api.md"), "sh")[0]
        .replace("/run/tidegate", &directory)
        .replace("/etc/tidegate", &directory)
        .replace("127.0.0.1:9900", &tcp.to_string())
        .replace(" | jq .pools", "");
    let printed = shell.run(&format!(
        "(umask 077; head -c 12 /dev/urandom | base64 >admin.token)
         tidegate run --config unix.toml & A=$!
         tidegate run --config tcp.toml & B=$!
         until tidegate ready && tidegate ready --admin {tcp}; do sleep 0.1; done
         {requests}
         kill $A $B; wait $A $B"
    ));
    assert!(printed.contains("\"balance\":"), "{printed}");
    assert_eq!(printed.matches("\"changed\":false").count(), 2, "{printed}");
    assert!(!printed.contains("\"error\":"), "{printed}");
}

#[test]
fn every_command_in_the_pages_is_valid() {
    let (mut wrong, mut seen) = (String::new(), 0);
    for name in pages() {
        let text = page(&name);
        let shown: Vec<&str> =
            ["sh", "console"].iter().flat_map(|language| blocks(&text, language)).collect();
        let whole = shown.join("\n").replace("\\\n", " ");
        for line in whole.lines() {
            let line = line.trim_start_matches("$ ");
            let words: Vec<&str> = line
                .split_whitespace()
                .take_while(|word| {
                    !word.starts_with(['#', '|', '&', '>', ';']) && !word.starts_with("2>")
                })
                .collect();
            if words.first() != Some(&"tidegate") {
                continue;
            }
            seen += 1;
            if let Err(error) = Cli::try_parse_from(words) {
                let _ = writeln!(wrong, "{name}: {line}: {error}");
            }
        }
    }
    assert!(wrong.is_empty(), "\n{wrong}");
    assert!(seen > 15, "{seen}");
}

/// A directory for scripts, with an admin socket that no other balancer uses.
pub(crate) struct Shell(tempfile::TempDir);

impl Shell {
    pub(crate) fn new() -> Shell {
        Shell(tempfile::tempdir().unwrap())
    }

    pub(crate) fn directory(&self) -> String {
        self.0.path().display().to_string()
    }

    fn admin(&self) -> String {
        format!("unix:{}/admin.sock", self.directory())
    }

    pub(crate) fn with_admin(&self, configuration: &str) -> String {
        format!("[admin]\nlisten = \"{}\"\n\n{configuration}", self.admin())
    }

    pub(crate) fn write(&self, name: &str, text: &str) {
        fs::write(self.0.path().join(name), text).unwrap();
    }

    fn read(&self, name: &str) -> String {
        fs::read_to_string(self.0.path().join(name)).unwrap()
    }

    /// Runs the script and returns its output. Fails if the script fails.
    pub(crate) fn run(&self, script: &str) -> String {
        let program = Path::new(env!("CARGO_BIN_EXE_tidegate")).parent().unwrap();
        let path = format!("{}:{}", program.display(), std::env::var("PATH").unwrap());
        let output = fs::File::create(self.0.path().join("output")).unwrap();
        let mut shell = Command::new("timeout")
            .args(["--kill-after=5", "120", "bash", "-e", "-c", script])
            .current_dir(self.0.path())
            .env("PATH", path)
            .env("TIDEGATE_ADMIN", self.admin())
            // A process group, so that the processes of the script end with it.
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(output.try_clone().unwrap())
            .stderr(output)
            .spawn()
            .unwrap();
        let group = rustix::process::Pid::from_child(&shell);
        let status = shell.wait().unwrap();
        // This fails if no process of the group is left.
        let _ = rustix::process::kill_process_group(group, rustix::process::Signal::KILL);
        let printed = self.read("output");
        assert!(status.success(), "{status}: {printed}");
        printed
    }
}

fn free_addresses() -> [SocketAddr; 3] {
    let free = [(); 3].map(|()| TcpListener::bind("127.0.0.1:0").unwrap());
    free.map(|listener| listener.local_addr().unwrap())
}

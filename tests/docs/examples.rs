//! Checks the files in `examples`: configurations, command lines, and the start of the systemd
//! example with a passed socket.

use crate::pages::{page, root};
use clap::Parser;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::time::Duration;
use tidegate_cli::Cli;
use tidegate_core::model::Config;
use tidegate_discovery::testing::consul::ConsulDouble;

const TIDEGATE_YAML: &str = "examples/kubernetes/tidegate.yaml";
const APP_YAML: &str = "examples/kubernetes/app.yaml";
const SYSTEMD: &str = "examples/systemd/tidegate.toml";

/// A process that is killed when its test ends.
struct Started(Child);

impl Drop for Started {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn accepted(text: &str, name: &str) -> Config {
    tidegate_config::parse(text, name)
        .unwrap_or_else(|problems| panic!("{}", problems.render(false)))
}

/// The text of a block (`|`) in YAML, without its indentation.
fn block(yaml: &str, key: &str) -> String {
    let (before, rest) = yaml.split_once(&format!("{key}: |\n")).expect("the block");
    let outer = before.lines().last().map_or(0, |line| line.len());
    let lines = rest
        .lines()
        .take_while(|line| line.is_empty() || line.len() - line.trim_start().len() > outer);
    let inner = " ".repeat(outer + 2);
    lines.map(|line| format!("{}\n", line.strip_prefix(inner.as_str()).unwrap_or(line))).collect()
}

/// Every command in a manifest, from both notations of a list.
fn commands(yaml: &str) -> Vec<Vec<String>> {
    let inline = yaml.split("command: [").skip(1).map(|rest| {
        let list = rest.split_once(']').expect("an end of the list").0;
        list.split(", ").map(|word| word.trim_matches('"').to_owned()).collect()
    });
    let lines = yaml.split("command:\n").skip(1).map(|rest| {
        let items = rest.lines().map_while(|line| line.trim().strip_prefix("- "));
        items.map(str::to_owned).collect()
    });
    inline.chain(lines).collect()
}

fn seconds_after(text: &str, key: &str) -> u64 {
    let (_, rest) = text.split_once(key).unwrap_or_else(|| panic!("no {key:?}"));
    let digits: String = rest.trim_start().chars().take_while(char::is_ascii_digit).collect();
    digits.parse().unwrap()
}

#[test]
fn config_map_is_valid_and_fits_the_grace_period() {
    let yaml = page(TIDEGATE_YAML);
    let text = block(&yaml, "tidegate.toml");
    assert!(text.contains("[frontend.web]") && text.ends_with("register = true\n"), "{text}");
    let process = accepted(&text, TIDEGATE_YAML).process;
    let needed = process.leave_delay + process.drain_timeout;
    let grace = Duration::from_secs(seconds_after(&yaml, "terminationGracePeriodSeconds:"));
    assert!(grace > needed, "{grace:?} for {needed:?}");
}

#[test]
fn application_serves_while_its_sender_drains() {
    let yaml = page(APP_YAML);
    let slept = seconds_after(&yaml, "[\"sleep\", \"");
    assert!(slept >= seconds_after(&yaml, "--drain="));
    assert!(seconds_after(&yaml, "terminationGracePeriodSeconds:") > slept);
}

#[test]
fn every_command_of_the_manifests_is_valid() {
    let mut understood = 0;
    for name in [TIDEGATE_YAML, APP_YAML] {
        for command in commands(&page(name)).iter().filter(|command| command[0] == "tidegate") {
            let words = command.iter().map(|word| {
                let word = word.replace("$(TIDEGATE_HEARTBEAT_SERVICE_HOST)", "10.96.0.5");
                word.replace("$(POD_IP)", "10.244.0.7").replace("$(POD_NAME)", "app-0")
            });
            if let Err(error) = Cli::try_parse_from(words) {
                panic!("{name}: {command:?}: {error}");
            }
            understood += 1;
        }
    }
    assert_eq!(understood, 5);
}

#[test]
fn socket_unit_has_the_bind_of_the_example() {
    let unit = page("config/tidegate.socket");
    let listened: Vec<&str> =
        unit.lines().filter_map(|line| line.strip_prefix("ListenStream=")).collect();
    assert_eq!(listened.len(), 1);
    let bind = format!("bind = \"{}\"", listened[0]);
    assert!(page(SYSTEMD).contains(&bind), "{bind}");
    accepted(&page(SYSTEMD), SYSTEMD);
}

#[test]
fn systemd_example_serves_on_a_passed_socket() {
    let directory = tempfile::tempdir().unwrap();
    let backend = TcpListener::bind("127.0.0.1:0").unwrap();
    let frontend = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let admin = format!("unix:{}/admin.sock", directory.path().display());
    let text = page(SYSTEMD)
        .replace("0.0.0.0:8080", &frontend.to_string())
        .replace("127.0.0.1:9001", &backend.local_addr().unwrap().to_string());
    let file = directory.path().join("tidegate.toml");
    std::fs::write(&file, format!("[admin]\nlisten = \"{admin}\"\n{text}")).unwrap();
    let started = Command::new("systemd-socket-activate")
        .args(["-l", &frontend.to_string(), "--fdname=web", env!("CARGO_BIN_EXE_tidegate")])
        .args(["run", "--config"])
        .arg(&file)
        .stderr(Stdio::null())
        .spawn();
    let Ok(started) = started else {
        assert!(std::env::var_os("CI").is_none(), "no systemd-socket-activate");
        eprintln!("skipped: no systemd-socket-activate");
        return;
    };
    let _started = Started(started);
    std::thread::spawn(move || {
        for client in backend.incoming() {
            let _ = client.unwrap().write_all(b"served");
        }
    });
    let mut client = crate::balancer::eventually(|| TcpStream::connect(frontend).ok());
    let mut answer = String::new();
    client.read_to_string(&mut answer).unwrap();
    assert_eq!(answer, "served");
}

#[test]
fn consul_configuration_finds_two_services() {
    let name = "examples/consul/tidegate.toml";
    let config = accepted(&page(name), name);
    assert_eq!(config.member_sources().count(), 2);
}

#[test]
fn consul_example_loses_no_request() {
    let double = ConsulDouble::start().unwrap();
    let free = || TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    let output = Command::new("bash")
        .arg(root().join("examples/consul/run.sh"))
        .env("CONSUL", double.address().to_string())
        .env("TIDEGATE", env!("CARGO_BIN_EXE_tidegate"))
        .envs([("USERS", free()), ("ORDERS", free())])
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}{errors}");
    assert!(said.ends_with("ok: no request failed\n"), "{said}");
}

#[test]
fn index_lists_every_example() {
    let index = page("examples/README.md");
    let mut folders = vec![root().join("examples")];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
                continue;
            }
            let name = path.strip_prefix(root().join("examples")).unwrap().display().to_string();
            assert!(name == "README.md" || index.contains(&format!("({name})")), "{name}");
        }
    }
}

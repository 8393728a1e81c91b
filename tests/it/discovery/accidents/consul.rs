//! Accidents of the Consul double in a process of its own, which is another run of this test
//! program.

use super::{Accident, MemberRegistry, number_of};
use crate::common::{ms, proc};
use crate::discovery::registries::{deregister, register, write_secret};
use rustix::process::Signal;
use std::io::{BufRead, BufReader, Write};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use tempfile::TempDir;
use tidegate_discovery::testing::consul;

/// Environment variable with the address of the double.
const LISTEN: &str = "TIDEGATE_TEST_CONSUL_DOUBLE";

/// Number of a service that is no member.
const EXTRA: u16 = 999;

pub(super) struct ConsulRegistry {
    agent: AgentProcess,
    dir: TempDir,
    /// The number of the last token.
    token: u32,
    announced: Vec<SocketAddr>,
}

/// The double, which reads commands.
struct AgentProcess {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
    address: SocketAddr,
}

// === impl ConsulRegistry ===

impl ConsulRegistry {
    pub(super) fn start() -> ConsulRegistry {
        let dir = tempfile::tempdir().expect("temp dir");
        let agent = AgentProcess::start(SocketAddr::from(([127, 0, 0, 1], 0)));
        let mut registry = ConsulRegistry { agent, dir, token: 1, announced: Vec::new() };
        registry.create_tokens();
        registry.write_token();
        registry
    }

    fn token_file(&self) -> PathBuf {
        self.dir.path().join("token")
    }

    fn create_tokens(&mut self) {
        self.agent.command("token operator rw");
        self.agent.command(&format!("token reader-{} r", self.token));
    }

    fn write_token(&self) {
        write_secret(&self.token_file(), &format!("reader-{}", self.token));
    }

    fn register_all(&self) {
        for member in &self.announced {
            register(self.agent.address, number_of(*member), *member);
        }
    }

    /// Takes all members out but the first ones, in one step as the sources see it: while the
    /// agent has no leader, and for longer than the pause between two queries.
    fn remove_after(&mut self, kept: usize, index: &str) {
        self.agent.command("fault no-leader");
        for member in &self.announced[kept..] {
            deregister(self.agent.address, number_of(*member));
        }
        self.agent.command(index);
        std::thread::sleep(ms(300));
        self.agent.command("fault none");
    }

    /// Begins a fault of every answer. A change ends the waiting query, which gets one.
    fn fault(&mut self, name: &str) {
        self.agent.command(&format!("fault {name}"));
        register(self.agent.address, EXTRA, self.announced[0]);
        deregister(self.agent.address, EXTRA);
    }
}

impl MemberRegistry for ConsulRegistry {
    fn name(&self) -> &'static str {
        "consul"
    }

    fn tables(&self) -> String {
        format!(
            "[registry.consul]\nkind = \"consul\"\nservers = [\"{}\"]\ntimeout = \"2s\"\n\
             token_file = \"{}\"",
            self.agent.address,
            self.token_file().display()
        )
    }

    fn discover(&self, _: u16) -> String {
        "from = \"consul\"\nservice = \"web\"".to_owned()
    }

    fn accidents(&self) -> &'static [Accident] {
        &[
            Accident::NoLeader,
            Accident::EmptyWithoutLeader,
            Accident::Failing,
            Accident::HalfAnswer,
            Accident::Reset,
            Accident::Hung,
            Accident::Killed,
            Accident::Rotated,
            Accident::Restored,
            Accident::Emptied,
        ]
    }

    fn announce(&mut self, members: &[SocketAddr]) {
        let before = std::mem::replace(&mut self.announced, members.to_vec());
        self.register_all();
        for member in before.iter().filter(|member| !members.contains(member)) {
            deregister(self.agent.address, number_of(*member));
        }
    }

    fn begin(&mut self, accident: Accident) {
        match accident {
            Accident::NoLeader => self.fault("no-leader"),
            Accident::EmptyWithoutLeader => self.fault("empty"),
            Accident::Failing => self.fault("error"),
            Accident::HalfAnswer => self.fault("half"),
            Accident::Reset => {
                self.agent.command("fault reset");
                // A source can be between two queries, and ask when the connections are closed.
                for _ in 0..3 {
                    self.agent.command("close");
                    std::thread::sleep(ms(200));
                }
            }
            Accident::Hung => self.agent.signal(Signal::STOP),
            Accident::Killed => self.agent.kill(),
            Accident::Rotated => {
                self.agent.command(&format!("revoke reader-{}", self.token));
                self.token += 1;
                self.agent.command(&format!("token reader-{} r", self.token));
            }
            Accident::Restored => self.remove_after(1, "indexes 1"),
            Accident::Emptied => self.remove_after(0, "close"),
            _ => unreachable!("{accident:?} is not in the list"),
        }
    }

    fn end(&mut self, accident: Accident) {
        match accident {
            Accident::Hung => self.agent.signal(Signal::CONT),
            Accident::Killed => {
                self.agent = AgentProcess::start(self.agent.address);
                // An agent has its services when it starts, but the double has none.
                self.agent.command("fault no-leader");
                self.create_tokens();
                self.register_all();
            }
            Accident::Rotated => self.write_token(),
            // In one step as the sources see it, as in `remove_after`.
            Accident::Restored | Accident::Emptied => {
                self.agent.command("fault no-leader");
                self.register_all();
            }
            _ => {}
        }
        self.agent.command("fault none");
    }
}

// === impl AgentProcess ===

impl AgentProcess {
    fn start(address: SocketAddr) -> AgentProcess {
        let test = concat!(module_path!(), "::process_of_the_double");
        let test = test.split_once("::").expect("a path in the test program").1;
        let program = std::env::current_exe().expect("this program");
        let mut child = Command::new(program)
            .args(["--exact", test, "--ignored", "--nocapture"])
            .env(LISTEN, address.to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("the double starts");
        let input = child.stdin.take().expect("a pipe");
        let output = BufReader::new(child.stdout.take().expect("a pipe"));
        let mut agent = AgentProcess { child, input, output, address };
        // The test program says something first.
        agent.address = loop {
            let line = agent.line();
            if let Some((_, found)) = line.split_once("listening at ") {
                break found.parse().expect("an address");
            }
        };
        agent
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        let bytes = self.output.read_line(&mut line).expect("a line of the double");
        assert!(bytes > 0, "the double has ended");
        line.trim_end().to_owned()
    }

    #[track_caller]
    fn command(&mut self, command: &str) {
        writeln!(self.input, "{command}").expect("the double reads");
        assert_eq!(self.line(), "done", "{command}");
    }

    fn signal(&self, signal: Signal) {
        proc::signal(self.child.id(), signal);
    }

    fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for AgentProcess {
    fn drop(&mut self) {
        self.kill();
    }
}

/// The double, if [`AgentProcess`] runs this test in another process.
#[test]
#[ignore = "the process of the Consul double"]
fn process_of_the_double() {
    let Ok(listen) = std::env::var(LISTEN) else { return };
    let listen = listen.parse().expect("an address");
    consul::serve(listen, std::io::stdin().lock(), std::io::stdout()).expect("the double serves");
}

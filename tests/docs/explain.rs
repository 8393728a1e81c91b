//! Compares docs/explain.md with the program: its words, and the output of its commands.
//!
//! The commands run against a real balancer in the order of the page. The output of each block is
//! compared without numbers and times. `scripts/docs` writes a block that differs.

use crate::commands::Shell;
use crate::pages::{blocks, column, page, root};
use std::fs;
use std::net::TcpListener;
use tidegate_core::decision::rings::{FAILED_MAX, FIRST_MAX};
use tidegate_core::decision::{SkipReason, Why};

const PAGE: &str = "docs/explain.md";

/// Line of the transcript before the output of each block.
const MARK: &str = "@@@";

/// Ports of the page's configuration. Those of the backends come last.
const PORTS: [u16; 7] = [8080, 5432, 6379, 2525, 9001, 9002, 9003];

/// Commands before the first block. `session PORT` returns when its line is in the access log.
const START: &str = r#"
session() {
  local lines=$(wc -l <access.log)
  exec 5<>/dev/tcp/127.0.0.1/$1; echo hello >&5; head -n 1 <&5 >/dev/null; exec 5>&-
  until [ "$(wc -l <access.log)" -gt "$lines" ]; do sleep 0.02; done
}
number() { tail -n 1 access.log | grep -o '"session":[0-9]*' | grep -o '[0-9]*'; }
touch access.log
tidegate backend --listen 127.0.0.1:9002 echo >/dev/null 2>&1 & B=$!
tidegate backend --listen 127.0.0.1:9003 echo >/dev/null 2>&1 & C=$!
tidegate run --config tidegate.toml 2>log & R=$!
until tidegate ready 2>/dev/null; do sleep 0.02; done
until (exec 4<>/dev/tcp/127.0.0.1/9002) && (exec 4<>/dev/tcp/127.0.0.1/9003); do sleep 0.02; done 2>/dev/null
until tail -n 1 access.log | grep -q '"attempts":2'; do session 8080; done
N=$(number)
CLIENT=$(tail -n 1 access.log | grep -o '"client":"[^"]*' | grep -o '127.*')
"#;

/// Commands before each block.
const BEFORE: [&str; 7] = [
    START,
    "",
    "",
    "until tidegate explain web/a | grep -q '^NOT IN ROTATION'; do session 8080; done",
    "until tidegate explain web/a | grep -q 'IN ROTATION for one trial'; do sleep 0.1; done
     session 8080; N=$(number)",
    "exec 6<>/dev/tcp/127.0.0.1/5432; echo hold >&6; head -n 1 <&6",
    "(exec 6>&-; session 5432) & W=$!; sleep 0.5; exec 6>&-; wait $W
     until tail -n 1 access.log | grep -q '\"why\":\"queue\"'; do sleep 0.02; done; N=$(number)",
];

const END: &str = "tidegate shutdown; wait $R; kill $B $C; wait";

#[test]
fn explain_page_shows_what_its_commands_print() {
    let text = page(PAGE);
    let shown = blocks(&text, "console");
    assert_eq!(shown.len(), BEFORE.len(), "each block has its preparation");
    let ports = FreePorts::new();
    let shell = Shell::new();
    let configuration = blocks(&text, "toml")[0]
        .replace("/var/log/tidegate", &shell.directory())
        .replace("[log]", "[process]\nworkers = 1\n\n[log]");
    shell.write("tidegate.toml", &shell.with_admin(&ports.free(&configuration)));
    let mut script = String::new();
    for (before, block) in BEFORE.iter().zip(&shown) {
        script.push_str(&format!("{}\necho {MARK}\n", ports.free(before)));
        for command in block.lines().filter_map(|line| line.strip_prefix("$ ")) {
            let command = with_variables(command);
            // Between single quotes the shell replaces no variable.
            let run = command.replace("$CLIENT", "'$CLIENT'");
            script.push_str(&format!("cat <<END\n$ {command}\nEND\n{run}\n"));
        }
        script.push_str(&format!("echo {MARK}\n"));
    }
    let printed = ports.written(&shell.run(&format!("{script}{END}")));
    let fresh: Vec<&str> = printed.split(&format!("{MARK}\n")).skip(1).step_by(2).collect();
    compare(&text, &shown, &fresh);
}

/// Ports that were free, for the ports of the page.
struct FreePorts(Vec<(u16, u16)>);

impl FreePorts {
    fn new() -> FreePorts {
        let free = PORTS.map(|_| TcpListener::bind("127.0.0.1:0").unwrap());
        let number = |listener: &TcpListener| listener.local_addr().unwrap().port();
        FreePorts(PORTS.into_iter().zip(free.iter().map(number)).collect())
    }

    /// Replaces the ports of the page.
    fn free(&self, text: &str) -> String {
        let marks = ["127.0.0.1:", "127.0.0.1/", "session "];
        self.0.iter().fold(text.to_owned(), |text, (written, free)| {
            let replace = |text: String, mark| {
                text.replace(&format!("{mark}{written}"), &format!("{mark}{free}"))
            };
            marks.into_iter().fold(text, replace)
        })
    }

    /// Replaces the free ports by those of the page.
    fn written(&self, text: &str) -> String {
        self.0.iter().fold(text.to_owned(), |text, (written, free)| {
            text.replace(&format!("127.0.0.1:{free}"), &format!("127.0.0.1:{written}"))
        })
    }
}

/// Writes the blocks that differ if `TIDEGATE_WRITE_DOCS` is set, else fails.
fn compare(text: &str, shown: &[&str], fresh: &[&str]) {
    let write = std::env::var_os("TIDEGATE_WRITE_DOCS").is_some();
    let mut new = text.to_owned();
    for (shown, fresh) in shown.iter().zip(fresh) {
        let fresh = fresh.trim_end();
        if shape(shown) == shape(fresh) {
            continue;
        }
        assert!(write, "stale, run scripts/docs:\n{shown}\n---\n{fresh}");
        new = new.replace(shown, fresh);
    }
    if new != text {
        fs::write(root().join(PAGE), new).unwrap();
    }
}

/// The command with the number and the client of the run.
fn with_variables(command: &str) -> String {
    let after = |command: &str, mark: &str, variable: &str| match command.split_once(mark) {
        Some((before, rest)) => {
            let rest =
                rest.trim_start_matches(|c: char| c.is_ascii_digit() || c == '.' || c == ':');
            format!("{before}{mark}{variable}{rest}")
        }
        None => command.to_owned(),
    };
    after(&after(command, "--session ", "$N"), "\"client\":\"", "$CLIENT")
}

/// The text without numbers, times and line breaks: a time is `0s`, a number is `0`.
fn shape(text: &str) -> String {
    let text: Vec<&str> = text.split_whitespace().collect();
    let text = text.join(" ").replace("less than 1 ms", "0 s").replace("less than 1 s", "0 s");
    let mut words: Vec<String> = Vec::new();
    for word in text.split_whitespace() {
        let mut shape = String::new();
        for c in word.chars() {
            let digit = c.is_ascii_digit() || (c == '.' && shape.ends_with('0'));
            if !digit {
                shape.push(c);
            } else if !shape.ends_with('0') {
                shape.push('0');
            }
        }
        // The dot belonged to the sentence.
        if word.ends_with('.') && shape.ends_with('0') {
            shape.push('.');
        }
        let unit = shape.trim_end_matches(['.', ',', ':', ';', ')']).to_owned();
        let stop = shape[unit.len()..].to_owned();
        let is_unit = ["us", "ms", "s"].contains(&unit.as_str());
        let is_time = ["0us", "0ms", "0s"].contains(&unit.as_str());
        match words.last_mut() {
            Some(number) if is_unit && number == "0" => *number = format!("0s{stop}"),
            // `5s 1ms`
            Some(last) if last == "0s" && is_time => *last = format!("0s{stop}"),
            _ if is_time => words.push(format!("0s{stop}")),
            _ => words.push(shape),
        }
    }
    words.join(" ")
}

#[test]
fn shapes_differ_in_words_and_not_in_numbers() {
    let shape_of = |text: &str| shape(text);
    assert_eq!(shape_of("after 1.5 ms. 3 of 4"), shape_of("after\n    20 s. 12 of 7"));
    assert_eq!(shape_of("for 3.1s, ejected for less than 1 s more"), "for 0s, ejected for 0s more");
    assert_eq!(shape_of("after less\n    than 1 ms: finished"), shape_of("after 1.0 ms: finished"));
    assert_ne!(shape_of("web/a refused"), shape_of("web/b refused"));
}

#[test]
fn explain_page_lists_every_word() {
    let page = page(PAGE);
    let mut listed = column(&page, "| `why` |", 0);
    let mut built: Vec<&str> = Why::ALL.iter().map(|why| why.name()).collect();
    listed.sort();
    built.sort_unstable();
    assert_eq!(listed, built);
    let built: Vec<&str> = SkipReason::ALL.iter().map(|reason| reason.name()).collect();
    assert_eq!(column(&page, "| reason |", 0), built);
    let grouped = |number: usize| format!("{},{:03}", number / 1_000, number % 1_000);
    for number in [grouped(FIRST_MAX), grouped(FAILED_MAX)] {
        assert!(page.contains(&number), "{number}");
    }
}

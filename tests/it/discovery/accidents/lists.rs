//! Accidents of a list of members: at a URL of a real nginx, and in a file.

use super::{Accident, MemberRegistry};
use crate::common::have;
use crate::common::servers::Nginx;
use crate::discovery::registries::{entry, write_secret};
use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use tempfile::TempDir;

/// A list of nginx, and files whose presence makes it fail.
const LOCATIONS: &str = "
    location = /members.json {
        if ($http_authorization != $authorization) { return 401; }
        if (-f $document_root/failing) { return 500; }
    }
    location / { return 200 here; }";

/// The list as a file of a directory.
struct MemberList {
    dir: TempDir,
    announced: Vec<SocketAddr>,
}

pub(super) struct FileRegistry {
    list: MemberList,
}

pub(super) struct UrlRegistry {
    server: Nginx,
    list: MemberList,
}

// === impl MemberList ===

impl MemberList {
    fn new() -> MemberList {
        MemberList { dir: tempfile::tempdir().expect("temp dir"), announced: Vec::new() }
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("members.json")
    }

    fn write(&self, text: &str) {
        let fresh = self.path().with_extension("new");
        fs::write(&fresh, text).expect("a writable directory");
        fs::rename(fresh, self.path()).expect("a rename");
    }

    fn announce(&mut self, members: &[SocketAddr]) {
        self.announced = members.to_vec();
        let entries: Vec<String> = members.iter().map(|member| entry(*member)).collect();
        self.write(&format!("[{}]", entries.join(", ")));
    }

    /// Begins an accident of the content.
    fn begin(&self, accident: Accident) {
        match accident {
            Accident::Missing => fs::remove_file(self.path()).expect("the list"),
            Accident::HalfAnswer => {
                let text = fs::read_to_string(self.path()).expect("the list");
                self.write(&text[..text.len() / 2]);
            }
            Accident::NoContent => self.write(""),
            Accident::Renamed => {
                let entry = |member: &SocketAddr| {
                    format!("{{\"address\": \"{member}\", \"name\": \"n{}\"}}", member.ip())
                };
                let entries: Vec<String> = self.announced.iter().map(entry).collect();
                self.write(&format!("[{}]", entries.join(", ")));
            }
            Accident::Emptied => self.write("[]"),
            _ => unreachable!("{accident:?} is not in the list"),
        }
    }
}

// === impl FileRegistry ===

impl FileRegistry {
    pub(super) fn start() -> FileRegistry {
        FileRegistry { list: MemberList::new() }
    }
}

impl MemberRegistry for FileRegistry {
    fn name(&self) -> &'static str {
        "file"
    }

    fn discover(&self, _: u16) -> String {
        format!("kind = \"file\"\npath = \"{}\"", self.list.path().display())
    }

    fn accidents(&self) -> &'static [Accident] {
        &[
            Accident::Missing,
            Accident::HalfAnswer,
            Accident::NoContent,
            Accident::Emptied,
            Accident::Renamed,
        ]
    }

    fn announce(&mut self, members: &[SocketAddr]) {
        self.list.announce(members);
    }

    fn begin(&mut self, accident: Accident) {
        self.list.begin(accident);
    }

    fn end(&mut self, _: Accident) {}
}

// === impl UrlRegistry ===

impl UrlRegistry {
    /// Returns `None` if nginx is not installed.
    pub(super) fn start() -> Option<UrlRegistry> {
        have(&["nginx"]).then(|| {
            let list = MemberList::new();
            let server = Nginx::start_with("list", &locations(list.dir.path(), "first"));
            let registry = UrlRegistry { server, list };
            registry.write_token("first");
            registry
        })
    }

    fn write_token(&self, token: &str) {
        write_secret(&self.list.dir.path().join("token"), token);
    }

    /// Starts nginx again. The list needs this token.
    fn restart(&mut self, token: &str) {
        self.server.restart_with(&locations(self.list.dir.path(), token));
    }

    fn failing(&self) -> PathBuf {
        self.list.dir.path().join("failing")
    }
}

impl MemberRegistry for UrlRegistry {
    fn name(&self) -> &'static str {
        "http"
    }

    fn discover(&self, _: u16) -> String {
        format!(
            "kind = \"http\"\nurl = \"http://{}/members.json\"\ninterval = \"1s\"\n\
             token_file = \"{}\"",
            self.server.address,
            self.list.dir.path().join("token").display()
        )
    }

    fn accidents(&self) -> &'static [Accident] {
        &[
            Accident::Killed,
            Accident::Hung,
            Accident::Failing,
            Accident::Rotated,
            Accident::Missing,
            Accident::HalfAnswer,
            Accident::NoContent,
            Accident::Emptied,
        ]
    }

    fn announce(&mut self, members: &[SocketAddr]) {
        self.list.announce(members);
    }

    fn begin(&mut self, accident: Accident) {
        match accident {
            Accident::Killed => self.server.kill(),
            Accident::Hung => self.server.pause(),
            Accident::Failing => fs::write(self.failing(), "").expect("a file"),
            Accident::Rotated => self.restart("second"),
            _ => self.list.begin(accident),
        }
    }

    fn end(&mut self, accident: Accident) {
        match accident {
            Accident::Killed => self.restart("first"),
            Accident::Hung => self.server.resume(),
            Accident::Failing => fs::remove_file(self.failing()).expect("the file"),
            Accident::Rotated => self.write_token("second"),
            _ => {}
        }
    }
}

/// The lines of nginx: the list needs this token.
fn locations(root: &Path, token: &str) -> String {
    let wanted = format!("Bearer {token}");
    format!("root {};\nset $authorization \"{wanted}\";\n{LOCATIONS}", root.display())
}

//! `kind = "file"`: members from a JSON list.
//!
//! The tests write the list as an operator or a program does: by a rename, or in place.

use super::load::{LastingSessions, Load, NamedBackends};
use crate::common::conf::{Conf, Pool};
use crate::common::proxy::TestProxy;
use crate::common::{Engine, eventually, on_every_engine, proc, secs};
use rustix::process::Signal;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use tempfile::TempDir;

on_every_engine!(
    members_of_a_list_join_and_leave_without_a_failed_session,
    unreadable_list_changes_nothing,
    list_that_loses_most_members_is_held_until_it_is_repeated,
    members_survive_a_restart_without_the_list,
    members_stay_through_an_upgrade,
    age_of_a_view_continues_after_a_crash,
);

struct ListSite {
    dir: TempDir,
    backends: NamedBackends,
    proxy: TestProxy,
}

// === impl ListSite ===

impl ListSite {
    /// Starts a proxy whose list has the first `listed` of `count` backends.
    fn start(engine: Engine, count: usize, listed: usize, keys: &str) -> ListSite {
        let dir = tempfile::tempdir().expect("temp dir");
        let backends = NamedBackends::start(count);
        let path = dir.path().join("members.json");
        write(&path, &backends.addresses(&(0..listed).collect::<Vec<_>>()));
        let pool = Pool::new("web").discover(&format!(
            "kind = \"file\"\npath = \"{}\"\naddresses = [\"127.0.0.0/8\"]\n{keys}",
            path.display()
        ));
        let conf = Conf::simple(engine, pool)
            .process(&format!("state = \"{}\"", dir.path().join("state").display()));
        let site = ListSite { proxy: TestProxy::start(conf), dir, backends };
        site.wait_for_members(listed);
        site
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("members.json")
    }

    fn list(&self, numbers: &[usize]) {
        write(&self.path(), &self.backends.addresses(numbers));
    }

    fn members(&self) -> usize {
        let status = self.proxy.status();
        status["pools"][0]["backends"].as_array().map_or(0, |backends| {
            backends.iter().filter(|backend| backend["eligible"] == true).count()
        })
    }

    #[track_caller]
    fn wait_for_members(&self, count: usize) {
        eventually(secs(15), "the members are eligible", || self.members() == count);
    }
}

fn write(path: &Path, addresses: &[SocketAddr]) {
    let entry = |address: &SocketAddr| format!("{{\"address\": \"{address}\"}}");
    let entries: Vec<String> = addresses.iter().map(entry).collect();
    let fresh = path.with_extension("new");
    std::fs::write(&fresh, format!("[{}]", entries.join(", "))).expect("a writable directory");
    std::fs::rename(fresh, path).expect("a rename");
}

fn members_of_a_list_join_and_leave_without_a_failed_session(engine: Engine) {
    let site = ListSite::start(engine, 4, 2, "");
    let load = Load::start(site.proxy.addr("web"));
    site.list(&[0, 1, 2, 3]);
    site.wait_for_members(4);
    eventually(secs(5), "the newcomers serve", || {
        load.report().of("2") > 0 && load.report().of("3") > 0
    });
    site.list(&[1, 2, 3]);
    site.wait_for_members(3);
    load.end();
}

fn unreadable_list_changes_nothing(engine: Engine) {
    let site = ListSite::start(engine, 2, 2, "");
    let load = Load::start(site.proxy.addr("web"));
    for text in ["", "[", "[{\"address\": \"127.0.0.1\"}]", "{}", "[{\"adress\": 1}]"] {
        std::fs::write(site.path(), text).expect("a writable file");
        eventually(secs(10), "status shows the failure", || {
            let source = &site.proxy.status()["pools"][0]["sources"][0];
            !source["last_word"]["failure"].is_null()
        });
        assert_eq!(site.members(), 2);
        site.list(&[0, 1]);
        eventually(secs(10), "the list is read again", || {
            let source = &site.proxy.status()["pools"][0]["sources"][0];
            source["last_word"]["failure"].is_null()
        });
    }
    std::fs::remove_file(site.path()).expect("the list");
    eventually(secs(10), "status shows the missing file", || {
        let source = &site.proxy.status()["pools"][0]["sources"][0];
        source["last_word"]["failure"] == "not-found"
    });
    assert_eq!(site.members(), 2);
    load.end();
}

fn list_that_loses_most_members_is_held_until_it_is_repeated(engine: Engine) {
    let site = ListSite::start(engine, 4, 4, "confirm_after = \"1s\"");
    let load = Load::start(site.proxy.addr("web"));
    site.list(&[3]);
    eventually(secs(5), "status shows the held answer", || {
        let source = &site.proxy.status()["pools"][0]["sources"][0];
        source["held_answer"]["reason"] == "max-removed"
    });
    let explained = site.proxy.explained("web", &site.backends.address(0).to_string());
    assert_eq!(explained["announced"][0]["held"]["reason"], "max-removed", "{explained}");
    site.wait_for_members(1);
    load.end();
}

fn members_survive_a_restart_without_the_list(engine: Engine) {
    let mut site = ListSite::start(engine, 2, 2, "");
    let saved = site.dir.path().join("state/views.json");
    eventually(secs(5), "the view is saved", || saved.exists());
    std::fs::remove_file(site.path()).expect("the list");
    site.proxy.restart();
    let load = Load::start(site.proxy.addr("web"));
    site.wait_for_members(2);
    let source = &site.proxy.status()["pools"][0]["sources"][0];
    assert_eq!(source["restored"], true, "{source}");
    site.list(&[1]);
    site.wait_for_members(1);
    load.end();
}

fn members_stay_through_an_upgrade(engine: Engine) {
    let mut site = ListSite::start(engine, 2, 2, "");
    let lasting = LastingSessions::open(site.proxy.addr("web"), 0);
    let load = Load::start(site.proxy.addr("web"));
    site.proxy.cli_ok(&["upgrade"]);
    site.proxy.find_serving();
    site.wait_for_members(2);
    site.list(&[0]);
    site.wait_for_members(1);
    lasting.assert_alive();
    load.end();
}

fn age_of_a_view_continues_after_a_crash(engine: Engine) {
    let mut site = ListSite::start(engine, 2, 2, "");
    std::fs::remove_file(site.path()).expect("the list");
    let age = |site: &ListSite| {
        let source = &site.proxy.status()["pools"][0]["sources"][0];
        source["confirmed_seconds_ago"].as_f64().expect("an age")
    };
    eventually(secs(15), "the last answer is 4 s old", || age(&site) >= 4.0);
    let before = age(&site);
    proc::signal(site.proxy.pid(), Signal::KILL);
    site.proxy.find_serving();
    site.wait_for_members(2);
    assert!(age(&site) >= before, "{} after {before}", age(&site));
}

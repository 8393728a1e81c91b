//! The watcher against a real file system: every way files get replaced.
//! Waits for events only; a missed one fails after a long patience.

use std::os::unix::fs::symlink;
use std::sync::mpsc::{Receiver, channel};

use super::*;

/// Longer than any test may run: what is noticed, the kernel told us.
const NEVER: Duration = Duration::from_secs(3600);
const PATIENCE: Duration = Duration::from_secs(10);

struct Watched {
    watcher: ConfigWatcher,
    changes: Receiver<String>,
}

/// Each change sends what the file then holds.
fn watched(path: &Path, settings: Settings) -> Watched {
    let (send, changes) = channel();
    let file = path.to_owned();
    let watcher = ConfigWatcher::start_with(path, settings, move || {
        let _ = send.send(fs::read_to_string(&file).unwrap_or_default());
    });
    Watched { watcher: watcher.unwrap(), changes }
}

fn notified(path: &Path) -> Watched {
    let watched = watched(path, Settings { poll: NEVER, notify: true });
    assert_eq!(watched.watcher.polling_reason(), None);
    watched
}

impl Watched {
    #[track_caller]
    fn sees(&self, content: &str) {
        while self.changes.recv_timeout(PATIENCE).expect("a change was missed") != content {}
    }

    fn is_quiet(&self) -> bool {
        while self.changes.try_recv().is_ok() {}
        self.changes.recv_timeout(4 * SETTLE).is_err()
    }
}

#[test]
fn write_in_place_is_noticed_each_time() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("t.toml");
    fs::write(&file, "0").unwrap();
    let watched = notified(&file);
    for content in ["1", "2", "3"] {
        fs::write(&file, content).unwrap();
        watched.sees(content);
    }
}

#[test]
fn rename_over_the_file_is_noticed_each_time() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("t.toml");
    fs::write(&file, "0").unwrap();
    let watched = notified(&file);
    for content in ["1", "2", "3"] {
        let fresh = directory.path().join("t.toml.new");
        fs::write(&fresh, content).unwrap();
        fs::rename(&fresh, &file).unwrap();
        watched.sees(content);
    }
}

/// As the kubelet does: a new directory, then `..data` renamed over.
fn publish(volume: &Path, version: &str) {
    let fresh = volume.join(format!("..{version}"));
    fs::create_dir(&fresh).unwrap();
    fs::write(fresh.join("t.toml"), version).unwrap();
    symlink(format!("..{version}"), volume.join("..data_tmp")).unwrap();
    let old = fs::read_link(volume.join("..data")).ok();
    fs::rename(volume.join("..data_tmp"), volume.join("..data")).unwrap();
    if let Some(old) = old {
        fs::remove_dir_all(volume.join(old)).unwrap();
    }
}

#[test]
fn config_map_swaps_are_noticed_each_time() {
    let volume = tempfile::tempdir().unwrap();
    publish(volume.path(), "v0");
    let file = volume.path().join("t.toml");
    symlink("..data/t.toml", &file).unwrap();
    let watched = notified(&file);
    for version in ["v1", "v2", "v3"] {
        publish(volume.path(), version);
        watched.sees(version);
    }
    publish(volume.path(), "v4");
    publish(volume.path(), "v5");
    watched.sees("v5");
}

#[test]
fn deleted_and_created_again_is_noticed_each_time() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("t.toml");
    fs::write(&file, "0").unwrap();
    let watched = notified(&file);
    for content in ["1", "2", "3"] {
        fs::remove_file(&file).unwrap();
        watched.sees("");
        fs::write(&file, content).unwrap();
        watched.sees(content);
    }
}

#[test]
fn target_of_a_link_in_another_directory_is_noticed() {
    let (near, far) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (link, file) = (near.path().join("t.toml"), far.path().join("real.toml"));
    fs::write(&file, "0").unwrap();
    symlink(&file, &link).unwrap();
    let watched = notified(&link);
    for content in ["1", "2", "3"] {
        fs::write(&file, content).unwrap();
        watched.sees(content);
    }
}

#[test]
fn file_appearing_in_a_directory_made_later_is_noticed() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("a/b/t.toml");
    let watched = notified(&file);
    fs::create_dir_all(file.parent().unwrap()).unwrap();
    fs::write(&file, "1").unwrap();
    watched.sees("1");
    fs::write(&file, "2").unwrap();
    watched.sees("2");
}

#[test]
fn neighbours_and_readers_are_not_noticed() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("t.toml");
    fs::write(&file, "0").unwrap();
    let watched = notified(&file);
    fs::write(directory.path().join("other.toml"), "x").unwrap();
    fs::read(&file).unwrap();
    assert!(watched.is_quiet());
}

#[test]
fn without_inotify_the_file_is_polled_and_the_reason_told() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("t.toml");
    fs::write(&file, "0").unwrap();
    let watched = watched(&file, Settings { poll: Duration::from_millis(20), notify: false });
    assert!(watched.watcher.polling_reason().is_some());
    for content in ["1", "2", "3"] {
        fs::write(&file, content).unwrap();
        watched.sees(content);
    }
}

#[test]
fn replaced_directory_is_found_by_the_slow_look() {
    let root = tempfile::tempdir().unwrap();
    let (old, new) = (root.path().join("etc"), root.path().join("etc.new"));
    let file = old.join("t.toml");
    fs::create_dir(&old).unwrap();
    fs::write(&file, "0").unwrap();
    let watched = watched(&file, Settings { poll: Duration::from_millis(20), notify: true });
    fs::create_dir(&new).unwrap();
    fs::write(new.join("t.toml"), "1").unwrap();
    fs::rename(&old, root.path().join("etc.old")).unwrap();
    fs::rename(&new, &old).unwrap();
    watched.sees("1");
}

#[test]
fn directory_deleted_and_made_again_is_noticed_each_time() {
    let root = tempfile::tempdir().unwrap();
    let file = root.path().join("etc/t.toml");
    fs::create_dir(root.path().join("etc")).unwrap();
    fs::write(&file, "0").unwrap();
    // The parent of the watched directory is not watched: the look helps.
    let watched = watched(&file, Settings { poll: Duration::from_millis(50), notify: true });
    for content in ["1", "2", "3"] {
        fs::remove_dir_all(root.path().join("etc")).unwrap();
        fs::create_dir(root.path().join("etc")).unwrap();
        fs::write(&file, content).unwrap();
        watched.sees(content);
    }
}

#[test]
fn dropping_stops_the_calls() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("t.toml");
    fs::write(&file, "0").unwrap();
    let Watched { watcher, changes } = notified(&file);
    drop(watcher);
    // The sender lived in the callback: gone with the thread.
    assert!(
        changes
            .recv_timeout(PATIENCE)
            .is_err_and(|e| e == std::sync::mpsc::RecvTimeoutError::Disconnected)
    );
}

#[test]
fn endless_links_end_the_walk() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("t.toml");
    symlink("t.toml", &file).unwrap();
    assert_eq!(Way::walk(&file).names.len(), LINKS_MAX + 1);
}

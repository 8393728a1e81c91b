//! The watcher against a real file system: every way files get replaced.
//! Waits for events only; a missed one fails after a long patience.

use std::io::Write;
use std::os::unix::fs::symlink;
use std::sync::mpsc::{Receiver, channel};

use super::way::LINKS_MAX;
use super::*;

/// Longer than any test may run: what is noticed, the kernel told us.
const NEVER: Duration = Duration::from_secs(3600);
const PATIENCE: Duration = Duration::from_secs(10);

struct Watched {
    watcher: ConfigWatcher,
    changes: Receiver<String>,
}

/// Each change sends what the file then holds.
fn watched(path: &Path, settings: WatchSettings) -> Watched {
    let (send, changes) = channel();
    let file = path.to_owned();
    let watcher = ConfigWatcher::start_with(path, settings, move || {
        let _ = send.send(fs::read_to_string(&file).unwrap_or_default());
    });
    Watched { watcher: watcher.unwrap(), changes }
}

fn notified(path: &Path) -> Watched {
    let watched = watched(path, WatchSettings { poll: NEVER, notify: true, silence: SILENCE });
    assert_eq!(watched.watcher.polling_reason(), None);
    watched
}

fn polling(millis: u64, notify: bool) -> WatchSettings {
    WatchSettings { poll: Duration::from_millis(millis), notify, silence: SILENCE }
}

/// Writes `content` piece by piece through one descriptor, with pauses that are
/// longer than the watcher's.
fn write_slowly(mut file: fs::File, content: &str) {
    for piece in content.as_bytes().chunks(content.len().div_ceil(6)) {
        file.write_all(piece).unwrap();
        clock::pause(SETTLE + SETTLE / 4);
    }
}

impl Watched {
    /// One call, with that content, and none before or after.
    #[track_caller]
    fn sees_only(&self, content: &str) {
        let first = self.changes.recv_timeout(PATIENCE).expect("a change was missed");
        assert_eq!(first, content);
        assert!(self.is_quiet(), "told twice");
    }

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
    let watched = watched(&file, polling(20, false));
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
    let watched = watched(&file, polling(20, true));
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
    let watched = watched(&file, polling(50, true));
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
    assert_eq!(WatchedPath::walk(&file).names.len(), LINKS_MAX + 1);
}

#[test]
fn a_file_written_slowly_is_told_of_once_and_whole() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("t.toml");
    fs::write(&file, "0").unwrap();
    let watched = notified(&file);
    write_slowly(fs::File::create(&file).unwrap(), "a slow writer, truncating");
    watched.sees_only("a slow writer, truncating");
    let appended = fs::OpenOptions::new().append(true).open(&file).unwrap();
    write_slowly(appended, ", then appending");
    watched.sees_only("a slow writer, truncating, then appending");
    fs::remove_file(&file).unwrap();
    write_slowly(fs::File::create(&file).unwrap(), "a new file");
    watched.sees_only("a new file");
}

#[test]
fn a_file_that_is_not_written_to_yet_is_not_told_of() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("t.toml");
    let watched = notified(&file);
    let mut writer = fs::File::create(&file).unwrap();
    assert!(watched.is_quiet(), "an empty file was taken for a whole one");
    writer.write_all(b"1").unwrap();
    drop(writer);
    watched.sees_only("1");
}

#[test]
fn two_writes_in_a_row_are_told_of_once() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("t.toml");
    fs::write(&file, "0").unwrap();
    let watched = notified(&file);
    fs::write(&file, "1").unwrap();
    clock::pause(SETTLE / 2);
    fs::write(&file, "2").unwrap();
    watched.sees_only("2");
}

#[test]
fn a_writer_that_says_no_more_is_waited_for_as_long_as_the_bound() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("t.toml");
    fs::write(&file, "0").unwrap();
    let silence = 6 * SETTLE;
    let watched = watched(&file, WatchSettings { poll: NEVER, notify: true, silence });
    let mut writer = fs::OpenOptions::new().append(true).open(&file).unwrap();
    writer.write_all(b"1").unwrap();
    assert!(watched.is_quiet(), "the writer has it open");
    watched.sees_only("01");
}

#[test]
fn a_question_is_answered_at_once_or_when_the_writer_is_done() {
    let directory = tempfile::tempdir().unwrap();
    let (file, list) = (directory.path().join("t.toml"), directory.path().join("list"));
    fs::write(&file, "0").unwrap();
    fs::write(&list, "a").unwrap();
    let watched = notified(&file);
    watched.watcher.wait_for_writers_of(vec![list.clone()]);
    watched.watcher.ask();
    watched.sees_only("0");
    for path in [&file, &list] {
        let mut writer = fs::OpenOptions::new().append(true).open(path).unwrap();
        writer.write_all(b"1").unwrap();
        // The kernel's report arrives within this time, or the look sees more.
        clock::pause(SETTLE / 2);
        assert_eq!(watched.watcher.being_written().as_ref(), Some(path));
        watched.watcher.ask();
        assert!(watched.is_quiet(), "answered while a writer was at it");
        drop(writer);
        watched.sees_only("01");
    }
    fs::write(&list, "b").unwrap();
    assert!(watched.is_quiet(), "a list alone asks for nothing");
}

#[test]
fn a_polled_file_is_told_of_once_two_looks_agree() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("t.toml");
    fs::write(&file, "0").unwrap();
    let watched = watched(&file, polling(500, false));
    write_slowly(fs::File::create(&file).unwrap(), "a slow writer");
    watched.sees_only("a slow writer");
}

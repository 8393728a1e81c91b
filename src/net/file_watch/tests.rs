//! Tests of the watcher with real files: each method of replacing a file.
//!
//! The tests wait for notifications. A missing notification fails after `PATIENCE`.

use std::io::Write;
use std::os::unix::fs::symlink;
use std::sync::mpsc::{Receiver, channel};

use super::watched_path::LINKS_MAX;
use super::*;

/// Longer than any test runs, so all changes are detected by inotify.
const NEVER: Duration = Duration::from_secs(3600);
const PATIENCE: Duration = Duration::from_secs(10);

struct Watched {
    watcher: FileWatcher,
    changes: Receiver<String>,
}

/// Starts a watcher. Each notification sends the content of the file.
fn watched(path: &Path, settings: WatchSettings) -> Watched {
    let (send, changes) = channel();
    let file = path.to_owned();
    let watcher = FileWatcher::start_with(path, settings, move || {
        let _ = send.send(fs::read_to_string(&file).unwrap_or_default());
    });
    Watched { watcher: watcher.unwrap(), changes }
}

fn notified(path: &Path) -> Watched {
    let watched = watched(path, settings(NEVER, SILENCE));
    assert_eq!(watched.watcher.polling_reason(), None);
    watched
}

fn settings(poll: Duration, silence: Duration) -> WatchSettings {
    WatchSettings { poll, notify: true, silence, settle: SETTLE }
}

fn polling(millis: u64, notify: bool) -> WatchSettings {
    WatchSettings { notify, ..settings(Duration::from_millis(millis), SILENCE) }
}

/// Writes `content` in pieces through one file descriptor. The pauses are longer than
/// `SETTLE`.
fn write_slowly(mut file: fs::File, content: &str) {
    for piece in content.as_bytes().chunks(content.len().div_ceil(6)) {
        file.write_all(piece).unwrap();
        clock::pause(SETTLE + SETTLE / 4);
    }
}

impl Watched {
    /// Expects one notification, with that content, and no other.
    #[track_caller]
    fn sees_only(&self, content: &str) {
        let first = self.changes.recv_timeout(PATIENCE).expect("no notification");
        assert_eq!(first, content);
        assert!(self.is_quiet(), "second notification");
    }

    #[track_caller]
    fn sees(&self, content: &str) {
        while self.changes.recv_timeout(PATIENCE).expect("no notification") != content {}
    }

    fn is_quiet(&self) -> bool {
        while self.changes.try_recv().is_ok() {}
        self.changes.recv_timeout(4 * SETTLE).is_err()
    }
}

#[test]
fn each_write_in_place_is_detected() {
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
fn each_rename_over_the_file_is_detected() {
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

/// Updates a volume as the kubelet does: creates a new directory, then renames a new
/// link over `..data`.
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
fn each_config_map_swap_is_detected() {
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
fn each_deletion_and_creation_is_detected() {
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
fn change_of_a_link_target_in_another_directory_is_detected() {
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
fn file_in_a_directory_created_later_is_detected() {
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
fn readers_and_other_files_cause_no_notification() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("t.toml");
    fs::write(&file, "0").unwrap();
    let watched = notified(&file);
    fs::write(directory.path().join("other.toml"), "x").unwrap();
    fs::read(&file).unwrap();
    assert!(watched.is_quiet());
}

#[test]
fn without_inotify_the_file_is_polled_and_the_reason_is_reported() {
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
fn replaced_directory_is_detected_by_the_periodic_check() {
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
fn each_deletion_and_creation_of_the_directory_is_detected() {
    let root = tempfile::tempdir().unwrap();
    let file = root.path().join("etc/t.toml");
    fs::create_dir(root.path().join("etc")).unwrap();
    fs::write(&file, "0").unwrap();
    // The parent of the watched directory is not watched. The periodic check detects
    // the new directory.
    let watched = watched(&file, polling(50, true));
    for content in ["1", "2", "3"] {
        fs::remove_dir_all(root.path().join("etc")).unwrap();
        fs::create_dir(root.path().join("etc")).unwrap();
        fs::write(&file, content).unwrap();
        watched.sees(content);
    }
}

#[test]
fn drop_ends_the_notifications() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("t.toml");
    fs::write(&file, "0").unwrap();
    let Watched { watcher, changes } = notified(&file);
    drop(watcher);
    // The callback owned the sender, so it is dropped with the thread.
    assert!(
        changes
            .recv_timeout(PATIENCE)
            .is_err_and(|e| e == std::sync::mpsc::RecvTimeoutError::Disconnected)
    );
}

#[test]
fn link_loop_ends_at_the_largest_number_of_links() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("t.toml");
    symlink("t.toml", &file).unwrap();
    assert_eq!(WatchedPath::walk(&file).names.len(), LINKS_MAX + 1);
}

#[test]
fn slowly_written_file_causes_one_notification_when_complete() {
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
fn new_empty_file_causes_no_notification_before_its_writer_closes_it() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("t.toml");
    let watched = notified(&file);
    let mut writer = fs::File::create(&file).unwrap();
    assert!(watched.is_quiet(), "notification for an empty file with a writer");
    writer.write_all(b"1").unwrap();
    drop(writer);
    watched.sees_only("1");
}

#[test]
fn two_quick_writes_cause_one_notification() {
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
fn silent_writer_delays_the_notification_up_to_the_bound() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("t.toml");
    fs::write(&file, "0").unwrap();
    let silence = 6 * SETTLE;
    let watched = watched(&file, settings(NEVER, silence));
    let mut writer = fs::OpenOptions::new().append(true).open(&file).unwrap();
    writer.write_all(b"1").unwrap();
    assert!(watched.is_quiet(), "notification while the writer has the file open");
    watched.sees_only("01");
}

#[test]
fn request_is_answered_at_once_or_after_the_writer_closes_the_file() {
    let directory = tempfile::tempdir().unwrap();
    let (file, list) = (directory.path().join("t.toml"), directory.path().join("list"));
    fs::write(&file, "0").unwrap();
    fs::write(&list, "a").unwrap();
    let watched = notified(&file);
    watched.watcher.wait_for_writers_of(vec![list.clone()]);
    watched.watcher.request();
    watched.sees_only("0");
    for path in [&file, &list] {
        let mut writer = fs::OpenOptions::new().append(true).open(path).unwrap();
        writer.write_all(b"1").unwrap();
        // inotify reports the write within this time.
        clock::pause(SETTLE / 2);
        assert_eq!(watched.watcher.being_written().as_ref(), Some(path));
        watched.watcher.request();
        assert!(watched.is_quiet(), "notification while a writer has a file open");
        drop(writer);
        watched.sees_only("01");
    }
    fs::write(&list, "b").unwrap();
    assert!(watched.is_quiet(), "notification for a file that the watched file names");
}

#[test]
fn polled_file_causes_a_notification_after_two_equal_checks() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("t.toml");
    fs::write(&file, "0").unwrap();
    let watched = watched(&file, polling(500, false));
    write_slowly(fs::File::create(&file).unwrap(), "a slow writer");
    watched.sees_only("a slow writer");
}

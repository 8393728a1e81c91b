//! Tests of the file source: changes, incomplete and missing files.

use super::*;
use crate::tell::Answers;
use std::fs;
use std::io::Write;
use tidegate_core::model::SourceKey;
use tidegate_net::clock;

/// Longest wait for an answer.
const PATIENCE: Duration = Duration::from_secs(20);

struct AskedFile {
    _dir: tempfile::TempDir,
    path: PathBuf,
    answers: Answers,
    _task: tokio::task::JoinSet<Infallible>,
}

impl AskedFile {
    /// Starts a source for a file, perhaps with this content.
    fn new(content: Option<&str>) -> AskedFile {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("list.json");
        if let Some(content) = content {
            fs::write(&path, content).unwrap();
        }
        let answers = Answers::default();
        let key = SourceKey { pool: "web".into(), backend: None };
        let teller = answers.teller(key, Arc::default());
        let mut task = tokio::task::JoinSet::new();
        task.spawn(run(path.clone(), teller));
        AskedFile { _dir: dir, path, answers, _task: task }
    }

    /// The next set or failure: names, or the reason with the detail.
    async fn next(&self) -> String {
        tokio::time::timeout(PATIENCE, self.answers.arrived()).await.unwrap();
        shown(self.answers.take().pop().unwrap().told)
    }

    /// Waits for this answer; others can precede it.
    async fn sees(&self, part: &str) {
        let mut seen = Vec::new();
        while seen.last().is_none_or(|last: &String| !last.contains(part)) {
            let all = tokio::time::timeout(PATIENCE, self.next()).await;
            seen.push(all.unwrap_or_else(|_| panic!("{part} did not arrive; {seen:?}")));
        }
    }
}

fn shown(told: Told) -> String {
    match told {
        Told::Whole(set) => {
            set.members.iter().map(|member| &*member.name).collect::<Vec<_>>().join(" ")
        }
        Told::Failed { why, detail } => format!("{why}: {detail}"),
        Told::Alive => "alive".to_owned(),
    }
}

#[tokio::test]
async fn file_changes_reach_the_answers() {
    let file = AskedFile::new(Some(r#"["10.0.0.1:80"]"#));
    assert_eq!(file.next().await, "10.0.0.1:80");
    fs::write(&file.path, r#"["10.0.0.1:80", "10.0.0.2:80"]"#).unwrap();
    file.sees("10.0.0.1:80 10.0.0.2:80").await;
    let new = file.path.with_extension("new");
    fs::write(&new, "[]").unwrap();
    fs::rename(&new, &file.path).unwrap();
    assert_eq!(file.next().await, "");
}

#[tokio::test]
async fn swapped_link_is_a_change() {
    let file = AskedFile::new(None);
    file.sees("not-found: cannot read").await;
    let target = |name: &str, content: &str| {
        let path = file.path.with_file_name(name);
        fs::write(&path, content).unwrap();
        let link = file.path.with_file_name("link");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        fs::rename(&link, &file.path).unwrap();
    };
    target("a", r#"["10.0.0.1:80"]"#);
    file.sees("10.0.0.1:80").await;
    target("b", r#"["10.0.0.2:80"]"#);
    file.sees("10.0.0.2:80").await;
}

#[tokio::test]
async fn incomplete_wrong_and_missing_files_are_failures_and_recover() {
    let file = AskedFile::new(Some(r#"["10.0.0.1:80", "10.0.0.2"#));
    let said = file.next().await;
    assert!(said.contains("/list.json: entry 2, line 1, column "), "{said}");
    fs::write(&file.path, r#"["10.0.0.1:80"]"#).unwrap();
    file.sees("10.0.0.1:80").await;
    fs::remove_file(&file.path).unwrap();
    file.sees("not-found").await;
    fs::create_dir(&file.path).unwrap();
    file.sees("is not a regular file").await;
    fs::remove_dir(&file.path).unwrap();
    let start = clock::now();
    fs::write(&file.path, r#"["10.0.0.1:80"]"#).unwrap();
    file.sees("alive").await;
    assert!(clock::now().duration_since(start) < Duration::from_secs(5));
}

#[tokio::test]
async fn slowly_written_file_is_read_when_complete() {
    let file = AskedFile::new(Some(r#"["10.0.0.1:80"]"#));
    file.sees("10.0.0.1:80").await;
    let path = file.path.clone();
    let writing = tokio::task::spawn_blocking(move || {
        let mut writer = fs::File::create(path).unwrap();
        for byte in br#"["10.0.0.1:80", "10.0.0.2:80"]"# {
            writer.write_all(&[*byte]).unwrap();
            clock::pause(Duration::from_millis(50));
        }
    });
    assert_eq!(file.next().await, "10.0.0.1:80 10.0.0.2:80");
    writing.await.unwrap();
}

#[test]
fn fifo_and_large_files_are_refused_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let large = dir.path().join("large");
    fs::File::create(&large).unwrap().set_len(ANSWER_BYTES_MAX as u64 + 1).unwrap();
    assert!(read(&large).unwrap_err().detail.contains("larger than"));
    let fifo = dir.path().join("fifo");
    rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, 0o600.into(), 0)
        .unwrap();
    assert_eq!(read(&fifo).unwrap_err().why, SourceFailure::Local);
}

//! Resolves a configured path link by link to the final file.
//!
//! Used by the watcher to find the directories to watch. It reads links and metadata,
//! never the content of a file.

use std::collections::{HashMap, VecDeque};
use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};

/// Largest number of symbolic links in a path, as in the kernel (path_resolution(7)).
pub(super) const LINKS_MAX: usize = 40;

/// The paths whose replacement changes which file is read: every symbolic link of the
/// configured path, and the final file.
#[derive(Debug, PartialEq, Eq, Default)]
pub(super) struct WatchedPath {
    /// Full paths. Their directories contain no symbolic links.
    pub(super) names: Vec<PathBuf>,
}

impl WatchedPath {
    /// Resolves `path`, which is absolute. Stops at the file, at the first missing
    /// component, or after [`LINKS_MAX`] links.
    pub(super) fn walk(path: &Path) -> WatchedPath {
        let mut names = Vec::new();
        let mut links = 0;
        let mut at = PathBuf::from("/");
        let mut ahead: VecDeque<OsString> = parts(path).collect();
        while let Some(part) = ahead.pop_front() {
            if part == ".." {
                at.pop();
                continue;
            }
            let here = at.join(&part);
            let kind = fs::symlink_metadata(&here).map(|data| data.file_type());
            let target = match kind {
                Ok(kind) if kind.is_symlink() => fs::read_link(&here).ok(),
                Ok(_) => None,
                Err(_) => {
                    names.push(here);
                    break;
                }
            };
            let Some(target) = target else {
                if ahead.is_empty() {
                    names.push(here);
                    break;
                }
                at = here;
                continue;
            };
            names.push(here);
            links += 1;
            if links > LINKS_MAX {
                break;
            }
            if target.is_absolute() {
                at = PathBuf::from("/");
            }
            parts(&target).rev().for_each(|part| ahead.push_front(part));
        }
        WatchedPath { names }
    }

    /// Returns the parent directories of the names, with device and inode.
    pub(super) fn directories(&self) -> HashMap<PathBuf, (u64, u64)> {
        let parents = self.names.iter().filter_map(|name| name.parent());
        parents
            .filter_map(|parent| {
                let data = fs::metadata(parent).ok()?;
                Some((parent.to_owned(), (data.dev(), data.ino())))
            })
            .collect()
    }
}

/// Returns the components of a path without `/` and `.`.
fn parts(path: &Path) -> impl DoubleEndedIterator<Item = OsString> {
    path.components().filter_map(|part| match part {
        Component::Normal(name) => Some(name.to_owned()),
        Component::ParentDir => Some("..".into()),
        Component::RootDir | Component::CurDir | Component::Prefix(_) => None,
    })
}

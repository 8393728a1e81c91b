//! The way from a configured path to the final file, link by link: every name
//! on it whose replacement changes what is read. Used by the watcher. It only
//! looks at names and links, never at contents.

use std::collections::{HashMap, VecDeque};
use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};

/// Symbolic links followed before giving up, as the kernel does (path_resolution(7)).
pub(super) const LINKS_MAX: usize = 40;

/// The names on the way from the configured path to the final file whose
/// replacement changes what is read.
#[derive(Debug, PartialEq, Eq, Default)]
pub(super) struct WatchedPath {
    /// Full paths, each below a directory free of symbolic links.
    pub(super) names: Vec<PathBuf>,
}

impl WatchedPath {
    /// Follows `path`, which is absolute, link by link. Ends at the file, at
    /// the first missing name or at [`LINKS_MAX`].
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

    /// The directories the names stand in, with device and inode.
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

/// The parts of a path that lead somewhere.
fn parts(path: &Path) -> impl DoubleEndedIterator<Item = OsString> {
    path.components().filter_map(|part| match part {
        Component::Normal(name) => Some(name.to_owned()),
        Component::ParentDir => Some("..".into()),
        Component::RootDir | Component::CurDir | Component::Prefix(_) => None,
    })
}

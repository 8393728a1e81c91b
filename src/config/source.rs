//! The text of one configuration file, and an index that converts byte offsets to lines
//! and columns.
//!
//! Called by `load`, `parse` and `diagnose`. It never waits for a writer of the file and
//! never interprets the text.

use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::ops::Range;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;

/// Largest configuration file: three times the size of a file with 100,000 backends and
/// all their keys. A larger file is rejected before it is read to the end.
pub const FILE_BYTES_MAX: usize = 16 * 1024 * 1024;

/// Longest part of a line kept for display, in characters.
const LINE_CHARS_MAX: usize = 120;

/// Most characters of a cut line before the caret.
const BEFORE_CARET_CHARS_MAX: usize = 40;

/// Replaces the part of a long line that was cut off.
const CUT: &str = "...";

/// A text with its name and the offsets at which its lines start. It can be several files in
/// a row.
#[derive(Debug)]
pub(crate) struct SourceText<'t> {
    /// Name of the first file.
    pub(crate) file: Arc<str>,
    pub(crate) text: &'t str,
    pub(crate) index: Arc<LineIndex>,
}

/// Where the lines and files of a text start.
#[derive(Debug, PartialEq)]
pub(crate) struct LineIndex {
    /// Offsets, ascending; the first is 0.
    line_starts: Vec<usize>,
    /// The files after the first: offset and name. Each starts at the start of a line.
    further_files: Vec<(usize, Arc<str>)>,
}

/// A part of one source line, short enough to show, and the byte range that the caret
/// marks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Excerpt {
    pub(crate) text: String,
    pub(crate) mark: Range<usize>,
}

/// Reads a regular file of at most [`FILE_BYTES_MAX`] bytes.
///
/// It does not wait for the writer of a FIFO: it opens the file with `O_NONBLOCK` and
/// checks the type before the first read (open(2), fifo(7)).
///
/// # Errors
/// A message for the operator: the file is missing, unreadable, too large or not a
/// regular file.
pub fn read_file(path: &Path) -> Result<Vec<u8>, String> {
    read_bounded(open_regular(path)?, FILE_BYTES_MAX)?.ok_or_else(too_large)
}

fn open_regular(path: &Path) -> Result<File, String> {
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
        .open(path)
        .map_err(|error| format!("cannot open the file: {}", plain(&error)))?;
    let kind =
        file.metadata().map_err(|error| format!("cannot read the file: {}", plain(&error)))?;
    if kind.is_dir() {
        return Err("this is a directory, not a file".to_owned());
    }
    if !kind.is_file() {
        return Err("this is not a regular file".to_owned());
    }
    Ok(file)
}

/// Reads a file. Returns `None` if it is longer than `bytes_max`.
fn read_bounded(file: File, bytes_max: usize) -> Result<Option<Vec<u8>>, String> {
    let mut bytes = Vec::new();
    file.take(bytes_max as u64 + 1)
        .read_to_end(&mut bytes)
        .map_err(|error| format!("cannot read the file: {}", plain(&error)))?;
    Ok((bytes.len() <= bytes_max).then_some(bytes))
}

/// Returns the index of the network interface with this name.
pub(crate) fn interface_index(name: &str) -> Option<u32> {
    use rustix::net::{AddressFamily, SocketType, netdevice, socket};
    let socket = socket(AddressFamily::UNIX, SocketType::DGRAM, None).ok()?;
    netdevice::name_to_index(&socket, name).ok().filter(|index| *index > 0)
}

/// Returns the message for a file over [`FILE_BYTES_MAX`].
pub(crate) fn too_large() -> String {
    format!("the file is larger than {} MiB", FILE_BYTES_MAX / (1024 * 1024))
}

/// Returns the text of an OS error without Rust's "(os error 2)".
fn plain(error: &io::Error) -> String {
    let text = error.to_string();
    match text.find(" (os error") {
        Some(end) => text[..end].to_lowercase(),
        None => text,
    }
}

// === impl SourceText ===

impl<'t> SourceText<'t> {
    pub(crate) fn new(file: &str, text: &'t str) -> Self {
        let newlines = text.bytes().enumerate().filter(|(_, byte)| *byte == b'\n');
        let line_starts = std::iter::once(0).chain(newlines.map(|(at, _)| at + 1)).collect();
        let index = LineIndex { line_starts, further_files: Vec::new() };
        SourceText { file: file.into(), text, index: Arc::new(index) }
    }

    /// Creates a text of several files. Each starts at an offset; the first is 0.
    pub(crate) fn of_files(files: &[(usize, String)], text: &'t str) -> Self {
        let file = files.first().map_or("", |(_, name)| name);
        let mut source = SourceText::new(file, text);
        let further = files.iter().skip(1).map(|(at, name)| (*at, name.as_str().into()));
        if let Some(index) = Arc::get_mut(&mut source.index) {
            index.further_files = further.collect();
        }
        source
    }

    /// Returns the file, and line and column of a byte offset, both from 1, columns in
    /// characters.
    ///
    /// The end of the file counts as the end of its last line.
    pub(crate) fn locate(&self, offset: usize) -> (Arc<str>, usize, usize) {
        let offset = self.clamp(offset);
        let starts = &self.index.line_starts;
        let line = starts.partition_point(|start| *start <= offset);
        let start_of_file = self.start_of_file(offset);
        let first_line = starts.partition_point(|start| *start < start_of_file);
        let start = starts[line - 1];
        (self.file_at(offset), line - first_line, self.text[start..offset].chars().count() + 1)
    }

    /// Returns `FILE:LINE:COLUMN`.
    pub(crate) fn place_name(&self, offset: usize) -> String {
        let (file, line, column) = self.locate(offset);
        format!("{file}:{line}:{column}")
    }

    /// Returns the number of files that start before or at the offset, without the first.
    fn files_before(&self, offset: usize) -> usize {
        self.index.further_files.partition_point(|(start, _)| *start <= offset)
    }

    fn file_at(&self, offset: usize) -> Arc<str> {
        let last = self.files_before(offset).checked_sub(1);
        let further = last.and_then(|last| self.index.further_files.get(last));
        further.map_or_else(|| Arc::clone(&self.file), |(_, file)| Arc::clone(file))
    }

    /// Returns the offset at which the file that contains an offset starts.
    pub(crate) fn start_of_file(&self, offset: usize) -> usize {
        let last = self.files_before(offset).checked_sub(1);
        last.and_then(|last| self.index.further_files.get(last)).map_or(0, |(start, _)| *start)
    }

    /// Returns the offset at which the file that contains an offset ends.
    pub(crate) fn end_of_file(&self, offset: usize) -> usize {
        let next = self.index.further_files.get(self.files_before(offset));
        next.map_or(self.text.len(), |(start, _)| *start)
    }

    /// Returns the line that holds the start of `place`, cut to [`LINE_CHARS_MAX`].
    pub(crate) fn excerpt(&self, place: &Range<usize>) -> Excerpt {
        let start = self.clamp(place.start);
        let line = self.line(start);
        let end = self.clamp(place.end).clamp(start, line.end.max(start));
        let from = self.text[line.start..start]
            .char_indices()
            .rev()
            .nth(BEFORE_CARET_CHARS_MAX - 1)
            .map_or(line.start, |(at, _)| line.start + at);
        // A line that fits is not cut, even if the caret is near its end.
        let whole = self.text[line.clone()].chars().nth(LINE_CHARS_MAX).is_none();
        let from = if whole { line.start } else { from };
        let to = self.text[from..line.end]
            .char_indices()
            .nth(LINE_CHARS_MAX)
            .map_or(line.end, |(at, _)| from + at);
        let (before, after) =
            (if from > line.start { CUT } else { "" }, if to < line.end { CUT } else { "" });
        let moved = |offset: usize| offset.clamp(from, to) - from + before.len();
        Excerpt {
            text: format!("{before}{}{after}", &self.text[from..to]),
            mark: moved(start)..moved(end),
        }
    }

    /// Returns the byte range of the line that holds `offset`, without its line end.
    fn line(&self, offset: usize) -> Range<usize> {
        let starts = &self.index.line_starts;
        let line = starts.partition_point(|start| *start <= offset);
        let start = starts[line - 1];
        let end = starts.get(line).map_or(self.text.len(), |next| next - 1);
        let end = if self.text[start..end].ends_with('\r') { end - 1 } else { end };
        start..end
    }

    /// Moves an offset to a character boundary that belongs to a line.
    fn clamp(&self, offset: usize) -> usize {
        let bytes = self.text.as_bytes();
        let mut offset = offset.min(bytes.len());
        if offset == bytes.len() && bytes.ends_with(b"\n") {
            offset -= 1;
        }
        if bytes.get(offset) == Some(&b'\n') && bytes[..offset].ends_with(b"\r") {
            offset -= 1;
        }
        while !self.text.is_char_boundary(offset) {
            offset -= 1;
        }
        offset
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_count_characters_and_offsets_beyond_the_end_are_clamped() {
        let source = SourceText::new("t", "aé\tx\r\nb\n");
        let places: Vec<_> = (0..12).map(|offset| place(&source, offset)).collect();
        let expected = [
            (1, 1),
            (1, 2),
            (1, 2),
            (1, 3),
            (1, 4),
            (1, 5),
            (1, 5),
            (2, 1),
            (2, 2),
            (2, 2),
            (2, 2),
            (2, 2),
        ];
        assert_eq!(places, expected);
        assert_eq!(place(&SourceText::new("t", ""), 7), (1, 1));
    }

    fn place(source: &SourceText<'_>, offset: usize) -> (usize, usize) {
        let (_, line, column) = source.locate(offset);
        (line, column)
    }

    #[test]
    fn each_file_of_a_text_counts_its_own_lines() {
        let files = [(0, "a".to_owned()), (4, "b".to_owned()), (4, "c".to_owned())];
        let source = SourceText::of_files(&files, "1\n2\n1\n23\n");
        let places: Vec<_> = [0, 2, 4, 7].map(|at| source.place_name(at)).into();
        assert_eq!(places, ["a:1:1", "a:2:1", "c:1:1", "c:2:2"]);
        assert_eq!((source.start_of_file(7), source.end_of_file(1)), (4, 4));
    }

    #[test]
    fn long_line_is_cut_around_the_mark() {
        let text = format!("{}MARK{}", "é".repeat(500), "x".repeat(500));
        let source = SourceText::new("t", &text);
        let excerpt = source.excerpt(&(1000..1004));
        assert_eq!(&excerpt.text[excerpt.mark.clone()], "MARK");
        assert_eq!(excerpt.text.chars().count(), LINE_CHARS_MAX + 2 * CUT.len());
    }

    #[test]
    fn mark_over_several_lines_ends_with_the_first_line() {
        let source = SourceText::new("t", "a = [\r\n 1,\n]\n");
        let excerpt = source.excerpt(&(4..13));
        assert_eq!((excerpt.text.as_str(), excerpt.mark), ("a = [", 4..5));
    }
}

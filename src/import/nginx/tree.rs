//! Reads nginx configurations as a tree of directives, with `include`.
//!
//! Called by `nginx::read`. It never opens a file itself.

use crate::report::{ImportReport, LineVerdict, SourceLine};
use crate::{ImportRequest, IncludedFile};

/// Deepest chain of files and deepest nesting of blocks.
const DEPTH_MAX: usize = 32;

/// Most files of one import.
const FILES_MAX: usize = 1_000;

/// One directive, with its block.
#[derive(Debug)]
pub(super) struct NginxDirective {
    pub(super) at: SourceLine,
    /// Never empty.
    pub(super) words: Vec<String>,
    /// The directives between braces; `None` for a directive that ends with `;`.
    pub(super) block: Option<Vec<NginxDirective>>,
}

/// A word or a sign of the text.
enum NginxToken {
    Word(String),
    End,
    Open,
    Close,
}

/// Reads a file and the files that it includes.
pub(super) fn read(request: &ImportRequest<'_>, report: &mut ImportReport) -> Vec<NginxDirective> {
    let file = report.add_file(request.name);
    let mut reader = TreeReader { request, report, files: 1 };
    reader.file(file, request.text, 0)
}

struct TreeReader<'r, 's> {
    request: &'r ImportRequest<'s>,
    report: &'r mut ImportReport,
    files: usize,
}

impl TreeReader<'_, '_> {
    fn file(&mut self, file: usize, text: &str, depth: usize) -> Vec<NginxDirective> {
        // The open blocks: the directive that opened each, and what it has so far.
        let mut open: Vec<(Vec<String>, SourceLine, Vec<NginxDirective>)> = Vec::new();
        let mut top = Vec::new();
        let (mut words, mut start) = (Vec::new(), None);
        let mut lexer = NginxLexer { text, at: 0, line: 1 };
        while let Some((token, line)) = lexer.next() {
            let at = *start.get_or_insert(SourceLine { file, line });
            match token {
                NginxToken::Word(word) => {
                    if words.is_empty() {
                        self.report.add_line(at, lexer.text_of_line());
                    }
                    words.push(word);
                    continue;
                }
                NginxToken::End if words.is_empty() => {}
                NginxToken::End => {
                    let words = std::mem::take(&mut words);
                    let into = open.last_mut().map_or(&mut top, |block| &mut block.2);
                    if words[0] == "include" {
                        let included = self.include(&words, at, depth);
                        into.extend(included);
                    } else {
                        into.push(NginxDirective { at, words, block: None });
                    }
                }
                NginxToken::Open if open.len() >= DEPTH_MAX => {
                    self.report.note(at, LineVerdict::NotUnderstood, "blocks are nested too deep");
                    return top;
                }
                NginxToken::Open => {
                    if words.is_empty() {
                        self.report.add_line(at, "{");
                        words.push("{".to_owned());
                    }
                    open.push((std::mem::take(&mut words), at, Vec::new()));
                }
                NginxToken::Close => {
                    if let Some((words, at, block)) = open.pop() {
                        let into = open.last_mut().map_or(&mut top, |block| &mut block.2);
                        into.push(NginxDirective { at, words, block: Some(block) });
                    }
                }
            }
            start = None;
        }
        self.unfinished(words, start, open, &mut top);
        top
    }

    /// Keeps what a text without its end has.
    fn unfinished(
        &mut self,
        words: Vec<String>,
        start: Option<SourceLine>,
        open: Vec<(Vec<String>, SourceLine, Vec<NginxDirective>)>,
        top: &mut Vec<NginxDirective>,
    ) {
        if let (Some(at), false) = (start, words.is_empty()) {
            self.report.note(at, LineVerdict::NotUnderstood, "the ; after it is missing");
        }
        let mut inner: Option<NginxDirective> = None;
        for (words, at, mut block) in open.into_iter().rev() {
            self.report.note(at, LineVerdict::NotUnderstood, "the closing } is missing");
            block.extend(inner.take());
            inner = Some(NginxDirective { at, words, block: Some(block) });
        }
        top.extend(inner);
    }

    fn include(&mut self, words: &[String], at: SourceLine, depth: usize) -> Vec<NginxDirective> {
        let pattern = words.get(1).map_or("", String::as_str);
        let Some(include) = self.request.include.filter(|_| depth < DEPTH_MAX) else {
            self.report.note(at, LineVerdict::NotUnderstood, "files are not included here");
            return Vec::new();
        };
        let mut directives = Vec::new();
        let files = match include(pattern) {
            Ok(files) => files,
            Err(why) => {
                self.report.note(at, LineVerdict::NotUnderstood, why);
                return Vec::new();
            }
        };
        let what = match files.len() {
            0 => "no file matches".to_owned(),
            1 => "1 file".to_owned(),
            number => format!("{number} files"),
        };
        self.report.note(at, LineVerdict::Translated, what);
        for IncludedFile { name, text } in files {
            if self.files >= FILES_MAX {
                self.report.note(at, LineVerdict::NotUnderstood, "there are too many files");
                break;
            }
            self.files += 1;
            let file = self.report.add_file(&name);
            directives.extend(self.file(file, &text, depth + 1));
        }
        directives
    }
}

/// Divides a text into tokens with their lines.
struct NginxLexer<'t> {
    text: &'t str,
    at: usize,
    line: usize,
}

impl<'t> NginxLexer<'t> {
    fn peek(&self) -> Option<char> {
        self.text[self.at..].chars().next()
    }

    fn advance(&mut self) -> Option<char> {
        let c = self.peek()?;
        self.at += c.len_utf8();
        self.line += usize::from(c == '\n');
        Some(c)
    }

    fn next(&mut self) -> Option<(NginxToken, usize)> {
        while let Some(c) = self.peek() {
            if c == '#' {
                while self.peek().is_some_and(|c| c != '\n') {
                    self.advance();
                }
            } else if c.is_whitespace() {
                self.advance();
            } else {
                break;
            }
        }
        let line = self.line;
        let token = match self.peek()? {
            ';' => NginxToken::End,
            '{' => NginxToken::Open,
            '}' => NginxToken::Close,
            _ => return Some((NginxToken::Word(self.word()), line)),
        };
        self.advance();
        Some((token, line))
    }

    fn word(&mut self) -> String {
        let mut word = String::new();
        let quote = self.peek().filter(|c| matches!(c, '"' | '\''));
        if quote.is_some() {
            self.advance();
        }
        // A brace after `$` belongs to a variable.
        let mut variable = false;
        while let Some(c) = self.peek() {
            match quote {
                Some(quote) if c == quote => {
                    self.advance();
                    break;
                }
                None if c.is_whitespace() || c == ';' => break,
                None if c == '{' && !word.ends_with('$') => break,
                None if c == '}' && !variable => break,
                _ => {}
            }
            self.advance();
            variable = (variable || c == '{') && c != '}';
            match c {
                '\\' => self.escape(&mut word),
                c => word.push(c),
            }
        }
        word
    }

    fn escape(&mut self, word: &mut String) {
        match self.advance() {
            Some('n') => word.push('\n'),
            Some('r') => word.push('\r'),
            Some('t') => word.push('\t'),
            Some(c @ ('"' | '\'' | '\\')) => word.push(c),
            Some(c) => word.extend(['\\', c]),
            None => word.push('\\'),
        }
    }

    /// Returns the current line without what ends a directive.
    fn text_of_line(&self) -> &'t str {
        let start = self.text[..self.at].rfind('\n').map_or(0, |newline| newline + 1);
        self.text[start..]
            .lines()
            .next()
            .unwrap_or_default()
            .trim()
            .trim_end_matches([';', ' ', '{'])
    }
}

//! Formats the fields of a text log line as logfmt.
//!
//! Called by the log layer for each event. It never changes JSON lines.
//!
//! - A value is quoted and escaped as in JSON if it has a space, a quote, an equals sign, a
//!   backslash or a character that controls a terminal. Therefore untrusted text (a path,
//!   a name, an error) cannot forge a line or a field.
//! - A message is written unchanged. If it has one of these characters other than a
//!   space, it is written as the field `message`.

use std::fmt::{self, Write};
use tracing::field::{Field, Visit};
use tracing_subscriber::field::{RecordFields, VisitOutput};
use tracing_subscriber::fmt::FormatFields;
use tracing_subscriber::fmt::format::Writer;

/// Writes fields as logfmt.
#[derive(Debug, Clone, Copy, Default)]
pub struct Logfmt;

struct Visitor<'a> {
    writer: Writer<'a>,
    first: bool,
    result: fmt::Result,
}

/// Returns `text` on one line, with characters that control a terminal escaped.
pub fn one_line(text: &str) -> String {
    let mut line = String::with_capacity(text.len());
    for c in text.chars() {
        // Writing to a string cannot fail.
        let _ = if controls_terminal(c) { write_escaped(&mut line, c) } else { line.write_char(c) };
    }
    line
}

fn write_value(to: &mut dyn Write, text: &str, quote: bool) -> fmt::Result {
    if !quote && !text.is_empty() && !text.chars().any(|c| c.is_whitespace() || is_special(c)) {
        return to.write_str(text);
    }
    to.write_char('"')?;
    for c in text.chars() {
        match c {
            '=' => to.write_char(c)?,
            c if is_special(c) => write_escaped(to, c)?,
            c => to.write_char(c)?,
        }
    }
    to.write_char('"')
}

fn write_escaped(to: &mut dyn Write, c: char) -> fmt::Result {
    match c {
        '"' | '\\' => write!(to, "\\{c}"),
        '\n' => to.write_str("\\n"),
        '\r' => to.write_str("\\r"),
        '\t' => to.write_str("\\t"),
        c => write!(to, "\\u{:04x}", u32::from(c)),
    }
}

fn is_special(c: char) -> bool {
    matches!(c, '"' | '=' | '\\') || controls_terminal(c)
}

/// Returns whether the character is a control character, a line separator or a mark that
/// changes the direction of text.
fn controls_terminal(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{2028}' | '\u{2029}' | '\u{200e}' | '\u{200f}')
        || matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

// === impl Logfmt ===

impl<'writer> FormatFields<'writer> for Logfmt {
    fn format_fields<R: RecordFields>(&self, writer: Writer<'writer>, fields: R) -> fmt::Result {
        let mut visitor = Visitor { writer, first: true, result: Ok(()) };
        fields.record(&mut visitor);
        visitor.finish()
    }
}

// === impl Visitor ===

impl Visitor<'_> {
    fn write(&mut self, field: &Field, text: &str, quote: bool) {
        if self.result.is_err() {
            return;
        }
        self.result = self.try_write(field.name(), text, quote);
        self.first = false;
    }

    fn try_write(&mut self, name: &str, text: &str, quote: bool) -> fmt::Result {
        if !self.first {
            self.writer.write_char(' ')?;
        }
        if name == "message" && !text.chars().any(is_special) {
            return self.writer.write_str(text);
        }
        self.writer.write_str(name)?;
        self.writer.write_char('=')?;
        write_value(&mut self.writer, text, quote)
    }
}

impl Visit for Visitor<'_> {
    fn record_str(&mut self, field: &Field, value: &str) {
        self.write(field, value, true);
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.write(field, &format!("{value:?}"), false);
    }
}

impl VisitOutput<fmt::Result> for Visitor<'_> {
    fn finish(self) -> fmt::Result {
        self.result
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{Arc, Mutex};
    use tracing_subscriber::layer::SubscriberExt;

    /// Returns what a subscriber writes for the events in `log`.
    fn written(json: bool, log: impl FnOnce()) -> String {
        #[derive(Clone, Default)]
        struct Buffer(Arc<Mutex<Vec<u8>>>);
        impl std::io::Write for Buffer {
            fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
                self.0.lock().unwrap().extend(bytes);
                Ok(bytes.len())
            }
            fn flush(&mut self) -> std::io::Result<()> {
                Ok(())
            }
        }
        let buffer = Buffer::default();
        let to = buffer.clone();
        let layer = tracing_subscriber::fmt::layer().with_writer(move || to.clone());
        let base = tracing_subscriber::registry();
        if json {
            tracing::subscriber::with_default(base.with(layer.json()), log);
        } else {
            let layer = layer.with_ansi(false).without_time().fmt_fields(Logfmt);
            tracing::subscriber::with_default(base.with(layer), log);
        }
        let bytes = buffer.0.lock().unwrap().clone();
        String::from_utf8(bytes).unwrap()
    }

    /// Parses the fields of a line as strictly as common logfmt parsers.
    fn parse(line: &str) -> Vec<(String, String)> {
        let (mut rest, mut pairs) = (line, Vec::new());
        while !rest.is_empty() {
            let end = rest.find([' ', '=']).unwrap_or(rest.len());
            let (key, tail) = rest.split_at(end);
            assert!(!key.contains('"') && !key.is_empty(), "{line}");
            let Some(tail) = tail.strip_prefix('=') else {
                pairs.push((key.to_owned(), String::new()));
                rest = tail.strip_prefix(' ').unwrap_or(tail);
                continue;
            };
            let (value, tail) = match tail.starts_with('"') {
                true => {
                    let mut text = serde_json::Deserializer::from_str(tail).into_iter::<String>();
                    let value = text.next().unwrap().unwrap();
                    (value, &tail[text.byte_offset()..])
                }
                false => {
                    let (value, tail) = tail.split_at(tail.find(' ').unwrap_or(tail.len()));
                    assert!(!value.contains(['"', '=']), "{line}");
                    (value.to_owned(), tail)
                }
            };
            pairs.push((key.to_owned(), value));
            rest = tail.strip_prefix(' ').unwrap_or(tail);
        }
        pairs
    }

    const HOSTILE: [&str; 7] = [
        "plain",
        "two words",
        "a=b \"c\" \\d",
        "\n2026-01-01T00:00:00Z ERROR forged: line pool=web",
        "\x1b[31mred\u{9b}0m\r\t\0",
        "\u{202e}turned\u{2028}",
        "",
    ];

    #[test]
    fn every_value_parses_back_and_forges_no_line() {
        for text in HOSTILE {
            let error = std::io::Error::other(text);
            let lines = written(false, || {
                tracing::warn!(pool = %text, backend = text, %error, count = 3, "backend");
            });
            assert_eq!(lines.matches('\n').count(), 1, "{lines:?}");
            assert!(!lines.trim_end().chars().any(controls_terminal), "{lines:?}");
            let (_, fields) = lines.trim_end_matches('\n').split_once("tests: ").unwrap();
            let pairs = parse(fields);
            let pair = |key: &str, value: &str| (key.to_owned(), value.to_owned());
            let wanted = [
                pair("backend", ""),
                pair("pool", text),
                pair("backend", text),
                pair("error", text),
                pair("count", "3"),
            ];
            assert_eq!(pairs, wanted);
        }
    }

    #[test]
    fn message_is_unquoted_unless_it_could_forge_a_field() {
        let line = written(false, || tracing::info!(from = "up", "backend came back"));
        assert!(line.ends_with(": backend came back from=\"up\"\n"), "{line}");
        for text in HOSTILE {
            let line = written(false, || tracing::info!("refused: {text}"));
            assert_eq!(line.matches('\n').count(), 1, "{line:?}");
            assert!(!line.contains(" pool=web") || line.contains("message=\""), "{line}");
        }
    }

    #[test]
    fn json_lines_have_the_same_values() {
        for text in HOSTILE {
            let lines = written(true, || tracing::warn!(pool = %text, "refused: {text}"));
            assert_eq!(lines.matches('\n').count(), 1, "{lines:?}");
            let value: serde_json::Value = serde_json::from_str(&lines).unwrap();
            assert_eq!(value["fields"]["pool"], text);
            assert_eq!(value["fields"]["message"], format!("refused: {text}"));
        }
    }

    #[test]
    fn one_line_escapes_only_control_characters() {
        assert_eq!(one_line("cannot bind /a\nb: \"no\" = é"), "cannot bind /a\\nb: \"no\" = é");
    }
}

//! Divides the lines of a `haproxy.cfg` into words: quotes, escapes, variables, comments.
//!
//! Called by `haproxy::read`. The rules are those of section 2.2 of HAProxy's configuration
//! manual. Variables are expanded inside double quotes only, as HAProxy does.

use std::collections::BTreeMap;

/// Variables and their values.
pub(super) type Environment = BTreeMap<String, String>;

/// Divides a line into words. A comment ends the line.
///
/// # Errors
/// A variable that is not set, or a quote that is not closed.
pub(super) fn words(line: &str, environment: &Environment) -> Result<Vec<String>, String> {
    let mut lexer = Lexer { rest: line, word: None, words: Vec::new(), environment };
    lexer.run()?;
    Ok(lexer.words)
}

struct Lexer<'l> {
    rest: &'l str,
    /// The word that was begun. An empty one comes from `""`.
    word: Option<String>,
    words: Vec<String>,
    environment: &'l Environment,
}

impl Lexer<'_> {
    fn run(&mut self) -> Result<(), String> {
        while let Some(c) = self.next() {
            match c {
                '#' => break,
                '\'' => self.strong()?,
                '"' => self.weak()?,
                '\\' => self.escape(),
                c if c.is_whitespace() => self.words.extend(self.word.take()),
                c => self.push(c),
            }
        }
        self.words.extend(self.word.take());
        Ok(())
    }

    fn next(&mut self) -> Option<char> {
        let c = self.rest.chars().next()?;
        self.rest = &self.rest[c.len_utf8()..];
        Some(c)
    }

    fn push(&mut self, c: char) {
        self.word.get_or_insert_default().push(c);
    }

    /// Reads up to the closing single quote. Nothing is special inside.
    fn strong(&mut self) -> Result<(), String> {
        let Some((inside, rest)) = self.rest.split_once('\'') else {
            return Err("the closing ' is missing".to_owned());
        };
        self.word.get_or_insert_default().push_str(inside);
        self.rest = rest;
        Ok(())
    }

    /// Reads up to the closing double quote, with escapes and variables.
    fn weak(&mut self) -> Result<(), String> {
        self.word.get_or_insert_default();
        while let Some(c) = self.next() {
            match c {
                '"' => return Ok(()),
                '\\' => self.escape(),
                '$' => self.variable()?,
                c => self.push(c),
            }
        }
        Err("the closing \" is missing".to_owned())
    }

    fn escape(&mut self) {
        match self.next() {
            Some('r') => self.push('\r'),
            Some('n') => self.push('\n'),
            Some('t') => self.push('\t'),
            Some('x') => {
                let digits = self.rest.get(..2).and_then(|two| u8::from_str_radix(two, 16).ok());
                match digits {
                    Some(byte) => {
                        self.rest = &self.rest[2..];
                        self.push(char::from(byte));
                    }
                    None => ['\\', 'x'].into_iter().for_each(|c| self.push(c)),
                }
            }
            Some(c @ (' ' | '\\' | '#' | '\'' | '"' | '$')) => self.push(c),
            Some(c) => ['\\', c].into_iter().for_each(|c| self.push(c)),
            None => self.push('\\'),
        }
    }

    /// Expands `$NAME`, `${NAME}` or `${NAME-default}`.
    fn variable(&mut self) -> Result<(), String> {
        let is_name = |c: char| !(c.is_ascii_alphanumeric() || c == '_');
        let braced = self.rest.starts_with('{');
        let start = usize::from(braced);
        let end = self.rest[start..].find(is_name).map_or(self.rest.len(), |end| start + end);
        let name = self.rest[start..end].to_owned();
        self.rest = &self.rest[end..];
        let mut default = None;
        if braced {
            let Some((inside, rest)) = self.rest.split_once('}') else {
                return Err("the closing } of a variable is missing".to_owned());
            };
            self.rest = rest;
            default = inside.strip_prefix('-');
        }
        if name.is_empty() {
            self.push('$');
            return Ok(());
        }
        match self.environment.get(&name).map(String::as_str).or(default) {
            Some(value) => {
                self.word.get_or_insert_default().push_str(value);
                Ok(())
            }
            None => Err(format!("the variable {name} is not set; give --env {name}=VALUE")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lexed(line: &str) -> Result<Vec<String>, String> {
        words(line, &[("HOST".to_owned(), "db 1".to_owned())].into())
    }

    #[test]
    fn quotes_and_escapes_make_words() {
        assert_eq!(
            lexed(r#"a "b c" 'd "e' f\ g ""  # rest"#).unwrap(),
            ["a", "b c", "d \"e", "f g", ""]
        );
        assert_eq!(lexed(r"send AUTH\ x\r\n\x41\\").unwrap(), ["send", "AUTH x\r\nA\\"]);
        assert_eq!(lexed(r"a\#b c#d").unwrap(), ["a#b", "c"]);
        assert!(lexed("'a").is_err() && lexed("\"a").is_err());
    }

    #[test]
    fn variables_are_expanded_inside_double_quotes_only() {
        assert_eq!(
            lexed(r#""${HOST}:${PORT-80}" ${HOST} '$HOST' "$HOST.x""#).unwrap(),
            ["db 1:80", "${HOST}", "$HOST", "db 1.x"]
        );
        let error = lexed(r#"server a "${NONE}:1""#).unwrap_err();
        assert!(error.contains("NONE is not set"), "{error}");
    }
}

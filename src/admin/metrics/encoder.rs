//! The Prometheus text exposition format 0.0.4, as far as it is needed here.
//!
//! Used by the metrics renderer alone; the format is described at
//! prometheus.io/docs/instrumenting/exposition_formats. It knows no metric.

use std::fmt::{Display, Write};

/// A metric's name, type and help; stands in the output once.
#[derive(Debug)]
pub(super) struct Family {
    name: &'static str,
    kind: &'static str,
    help: &'static str,
}

pub(super) const fn counter(name: &'static str, help: &'static str) -> Family {
    Family { name, kind: "counter", help }
}

pub(super) const fn gauge(name: &'static str, help: &'static str) -> Family {
    Family { name, kind: "gauge", help }
}

pub(super) const fn histogram(name: &'static str, help: &'static str) -> Family {
    Family { name, kind: "histogram", help }
}

/// The text so far.
#[derive(Debug, Default)]
pub(super) struct Encoder {
    text: String,
}

/// Writes the samples of one family.
#[derive(Debug)]
pub(super) struct Samples<'e> {
    text: &'e mut String,
    name: &'static str,
}

type Label<'l> = (&'static str, &'l str);

// === impl Encoder ===

impl Encoder {
    pub(super) fn new() -> Encoder {
        Encoder::default()
    }

    /// Starts a family; its samples must follow before the next one starts.
    pub(super) fn family(&mut self, family: &Family) -> Samples<'_> {
        let Family { name, kind, help } = family;
        push(&mut self.text, format_args!("# HELP {name} "));
        escape(&mut self.text, help, false);
        push(&mut self.text, format_args!("\n# TYPE {name} {kind}\n"));
        Samples { text: &mut self.text, name }
    }

    pub(super) fn finish(self) -> String {
        self.text
    }
}

// === impl Samples ===

impl Samples<'_> {
    pub(super) fn count(&mut self, labels: &[Label<'_>], value: u64) {
        self.sample("", labels, None, value);
    }

    pub(super) fn value(&mut self, labels: &[Label<'_>], value: f64) {
        self.sample("", labels, None, value);
    }

    /// One cumulative bucket; `None` is `+Inf`.
    pub(super) fn bucket(&mut self, labels: &[Label<'_>], bound: Option<f64>, count: u64) {
        match bound {
            Some(bound) => self.sample("_bucket", labels, Some(&bound), count),
            None => self.sample("_bucket", labels, Some(&"+Inf"), count),
        }
    }

    pub(super) fn sum_and_count(&mut self, labels: &[Label<'_>], sum: f64, count: u64) {
        self.sample("_sum", labels, None, sum);
        self.sample("_count", labels, None, count);
    }

    fn sample(
        &mut self,
        suffix: &str,
        labels: &[Label<'_>],
        le: Option<&dyn Display>,
        value: impl Display,
    ) {
        push(self.text, format_args!("{}{suffix}", self.name));
        let mut before = '{';
        for (name, value) in labels {
            push(self.text, format_args!("{before}{name}=\""));
            escape(self.text, value, true);
            self.text.push('"');
            before = ',';
        }
        if let Some(le) = le {
            push(self.text, format_args!("{before}le=\"{le}\""));
            before = ',';
        }
        if before == ',' {
            self.text.push('}');
        }
        push(self.text, format_args!(" {value}\n"));
    }
}

fn push(text: &mut String, arguments: std::fmt::Arguments<'_>) {
    text.write_fmt(arguments).expect("a String takes all text");
}

/// Backslash and newline everywhere, the quote in label values.
fn escape(text: &mut String, raw: &str, quote: bool) {
    for character in raw.chars() {
        match character {
            '\\' => text.push_str("\\\\"),
            '\n' => text.push_str("\\n"),
            '"' if quote => text.push_str("\\\""),
            other => text.push(other),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use expect_test::expect;

    #[test]
    fn names_with_quotes_backslashes_and_newlines_are_escaped() {
        let mut encoder = Encoder::new();
        let family = gauge("g", "A \\ and a\nnewline, a \" as it is.");
        encoder.family(&family).count(&[("backend", "a\"b\\c\nd"), ("pool", "")], 3);
        encoder.family(&counter("c_total", "None yet."));
        encoder.family(&histogram("h", "H.")).bucket(&[], Some(0.00005), 1);
        expect![[r#"
            # HELP g A \\ and a\nnewline, a " as it is.
            # TYPE g gauge
            g{backend="a\"b\\c\nd",pool=""} 3
            # HELP c_total None yet.
            # TYPE c_total counter
            # HELP h H.
            # TYPE h histogram
            h_bucket{le="0.00005"} 1
        "#]]
        .assert_eq(&encoder.finish());
    }
}

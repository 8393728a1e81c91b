//! Encodes the parts of the Prometheus text exposition format 0.0.4 that Tidegate uses.
//!
//! Called by the metrics renderer. It contains no metric. The format is described at
//! prometheus.io/docs/instrumenting/exposition_formats.

use std::fmt::{Display, Write};

/// Name, type and help of a metric.
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

/// The text encoded so far.
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

    /// Starts a family. Its samples must be written before the next family starts.
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
        self.sample("", "", labels, None, value);
    }

    pub(super) fn value(&mut self, labels: &[Label<'_>], value: f64) {
        self.sample("", "", labels, None, value);
    }

    /// Writes a sample with [`prepared`] labels and `more` labels.
    pub(super) fn count_of(&mut self, prepared: &str, more: &[Label<'_>], value: u64) {
        self.sample("", prepared, more, None, value);
    }

    pub(super) fn value_of(&mut self, prepared: &str, value: f64) {
        self.sample("", prepared, &[], None, value);
    }

    /// Writes one cumulative bucket; the bound `None` is `+Inf`.
    pub(super) fn bucket(&mut self, prepared: &str, bound: Option<f64>, count: u64) {
        match bound {
            Some(bound) => self.sample("_bucket", prepared, &[], Some(&bound), count),
            None => self.sample("_bucket", prepared, &[], Some(&"+Inf"), count),
        }
    }

    pub(super) fn sum_and_count(&mut self, prepared: &str, sum: f64, count: u64) {
        self.sample("_sum", prepared, &[], None, sum);
        self.sample("_count", prepared, &[], None, count);
    }

    fn sample(
        &mut self,
        suffix: &str,
        prepared: &str,
        labels: &[Label<'_>],
        le: Option<&dyn Display>,
        value: impl Display,
    ) {
        self.text.push_str(self.name);
        self.text.push_str(suffix);
        let mut before = '{';
        if !prepared.is_empty() {
            self.text.push('{');
            self.text.push_str(prepared);
            before = ',';
        }
        for label in labels {
            self.text.push(before);
            push_label(self.text, label);
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

/// Returns labels as text, to be used for many samples.
pub(super) fn prepared(labels: &[Label<'_>]) -> String {
    let mut text = String::new();
    for label in labels {
        if !text.is_empty() {
            text.push(',');
        }
        push_label(&mut text, label);
    }
    text
}

fn push_label(text: &mut String, (name, value): &Label<'_>) {
    text.push_str(name);
    text.push_str("=\"");
    escape(text, value, true);
    text.push('"');
}

fn push(text: &mut String, arguments: std::fmt::Arguments<'_>) {
    text.write_fmt(arguments).expect("writing to a String cannot fail");
}

/// Escapes backslash and newline, and quotes in label values.
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
        encoder.family(&histogram("h", "H.")).bucket("", Some(0.00005), 1);
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

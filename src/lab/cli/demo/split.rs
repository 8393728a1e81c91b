//! The measured distribution of requests, and the distribution expected from the
//! weights.
//!
//! `show` creates one per measurement. Weighted round robin is exact over any whole
//! number of rounds, so any difference is a failed check. Nothing is rounded.

use super::balancer::DemoStatus;
use super::traffic::RequestCounts;

/// Maximum number of backends with their own row; the others are added up.
const ROWS_MAX: usize = 12;

/// Result of one measurement.
#[derive(Debug)]
pub(crate) struct Split {
    rows: Vec<Row>,
    failed: u64,
    unknown: u64,
    /// Reason of the first failure.
    why: Option<String>,
}

#[derive(Debug)]
struct Row {
    name: String,
    weight: u64,
    expected: u64,
    got: u64,
}

/// Returns the number of requests in one round: the sum of the weights in their lowest
/// terms.
pub(crate) fn round(seen: &DemoStatus) -> u64 {
    let weights = || seen.backends.iter().map(|backend| backend.effective);
    let divisor = weights().fold(0, gcd).max(1);
    weights().map(|weight| weight / divisor).sum::<u64>().max(1)
}

fn gcd(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { gcd(b, a % b) }
}

impl Split {
    /// `tally` was measured while the status was `seen`. `names` are its backends, in
    /// order.
    pub(crate) fn new(seen: &DemoStatus, names: &[String], tally: &RequestCounts) -> Split {
        let sum = seen.backends.iter().map(|backend| backend.effective).sum::<u64>().max(1);
        let total = tally.total();
        let row = |(name, got): (&String, &u64)| {
            let weight = seen.backend(name).map_or(0, |backend| backend.effective);
            Row { name: name.clone(), weight, expected: total * weight / sum, got: *got }
        };
        Split {
            rows: names.iter().zip(&tally.answered).map(row).collect(),
            failed: tally.failed,
            unknown: tally.unknown,
            why: tally.failures.first().map(|failed| failed.why.clone()),
        }
    }

    /// Returns whether every backend got exactly its share and no request failed.
    pub(crate) fn exact(&self) -> bool {
        self.failed == 0 && self.unknown == 0 && self.rows.iter().all(Row::exact)
    }

    /// Describes the first difference.
    pub(crate) fn complaint(&self) -> String {
        if self.failed > 0 {
            let why = self.why.as_deref().unwrap_or("no reason");
            return format!("{} requests failed, the first with: {why}", self.failed);
        }
        if self.unknown > 0 {
            return format!("{} requests were answered by another server", self.unknown);
        }
        let off = self.rows.iter().find(|row| !row.exact());
        off.map_or_else(String::new, |row| {
            format!("{} got {} requests, expected {}", row.name, row.got, row.expected)
        })
    }

    /// Returns the table: one line per backend.
    pub(crate) fn lines(&self) -> Vec<String> {
        let mut lines = vec!["backend  weight  expected     got   share".to_owned()];
        let total: u64 = self.rows.iter().map(|row| row.got).sum();
        let share = |got: u64| 100.0 * got as f64 / total.max(1) as f64;
        for Row { name, weight, expected, got } in self.rows.iter().take(ROWS_MAX) {
            let share = share(*got);
            lines.push(format!("{name:<7}  {weight:>6}  {expected:>8}  {got:>6}  {share:>5.1}%"));
        }
        if let Some(rest) = self.rows.get(ROWS_MAX..).filter(|rest| !rest.is_empty()) {
            let sum = |value: fn(&Row) -> u64| rest.iter().map(value).sum::<u64>();
            let (weight, expected, got) =
                (sum(|row| row.weight), sum(|row| row.expected), sum(|row| row.got));
            let (more, share) = (format!("+{} more", rest.len()), share(got));
            lines.push(format!("{more:<8} {weight:>6}  {expected:>8}  {got:>6}  {share:>5.1}%"));
        }
        lines
    }
}

impl Row {
    fn exact(&self) -> bool {
        self.got == self.expected
    }
}

#[cfg(test)]
mod tests {
    use super::super::balancer::DemoBackendStatus;
    use super::*;

    fn seen(weights: &[u64]) -> DemoStatus {
        let backend = |(index, effective): (usize, &u64)| DemoBackendStatus {
            name: format!("b{}", index + 1),
            weight: *effective,
            effective: *effective,
            ..DemoBackendStatus::default()
        };
        DemoStatus {
            backends: weights.iter().enumerate().map(backend).collect(),
            ..DemoStatus::default()
        }
    }

    fn names(count: usize) -> Vec<String> {
        (1..=count).map(|index| format!("b{index}")).collect()
    }

    #[test]
    fn round_is_the_sum_of_the_weights_in_lowest_terms() {
        assert_eq!(round(&seen(&[5, 3, 2])), 10);
        assert_eq!(round(&seen(&[5, 5])), 2);
        assert_eq!(round(&seen(&[5])), 1);
        assert_eq!(round(&seen(&[0, 3, 2])), 5);
        assert_eq!(round(&seen(&[])), 1);
    }

    #[test]
    fn split_with_one_misrouted_request_is_not_exact() {
        let tally = |answered: &[u64]| RequestCounts {
            answered: answered.to_vec(),
            ..RequestCounts::default()
        };
        let exact = |answered| Split::new(&seen(&[5, 3, 2]), &names(3), &tally(answered));
        assert!(exact(&[50, 30, 20]).exact());
        let off = exact(&[50, 31, 19]);
        assert!(!off.exact());
        assert_eq!(off.complaint(), "b2 got 31 requests, expected 30");
    }

    #[test]
    fn split_with_a_failed_request_is_not_exact() {
        let tally = RequestCounts { answered: vec![10], failed: 1, ..RequestCounts::default() };
        let split = Split::new(&seen(&[5]), &names(1), &tally);
        assert!(!split.exact());
        assert!(split.complaint().starts_with("1 requests failed"));
    }

    #[test]
    fn backends_after_the_twelfth_row_are_added_up() {
        let tally = RequestCounts { answered: vec![2; 20], ..RequestCounts::default() };
        let lines = Split::new(&seen(&[1; 20]), &names(20), &tally).lines();
        assert_eq!(lines.len(), 14);
        assert_eq!(lines[13], "+8 more       8        16      16   40.0%");
    }
}

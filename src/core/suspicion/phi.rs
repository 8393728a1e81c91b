//! Phi, the suspicion level of accrual failure detectors, in two variants: normal and
//! exponential tail.
//!
//! Metrics and `explain` show it. Nothing acts on it: under packet loss it either causes
//! false alarms or takes many seconds. `tests/detector_sim` measures both.
//!
//! Sources: Hayashibara et al., *The φ accrual failure detector* (2004); the exponential
//! variant of Cassandra.

use std::f64::consts::{LN_10, LOG10_E, PI, SQRT_2};
use std::time::Duration;

/// Largest phi. Smaller probabilities soon underflow a float.
pub const PHI_MAX: f64 = 300.0;

/// From this z on, the continued fraction converges quickly.
const FRACTION_FROM: f64 = 2.5;

/// Returns `-log10` of the probability that a heartbeat arrives later than `since` after
/// the last one, if gaps are normally distributed. The tail is exact to twelve digits. (The
/// usual logistic approximation is too large above 6.)
///
/// The result is finite and within `0..=PHI_MAX` for any input. Without a deviation it is
/// 0 up to the mean and `PHI_MAX` after it.
pub fn normal(since: Duration, mean: Duration, deviation: Duration) -> f64 {
    let distance = since.as_secs_f64() - mean.as_secs_f64();
    let deviation = deviation.as_secs_f64();
    if deviation <= 0.0 {
        return if distance > 0.0 { PHI_MAX } else { 0.0 };
    }
    normal_tail(distance / deviation).clamp(0.0, PHI_MAX)
}

/// As [`normal`], if gaps are exponentially distributed: `since / (mean · ln 10)`, which
/// reaches 8 at 18.4 means.
pub fn exponential(since: Duration, mean: Duration) -> f64 {
    let mean = mean.as_secs_f64();
    if mean <= 0.0 {
        return if since.is_zero() { 0.0 } else { PHI_MAX };
    }
    (since.as_secs_f64() / (mean * LN_10)).clamp(0.0, PHI_MAX)
}

/// `-log10 Q(z)`; `Q` is the upper tail of the standard normal distribution.
fn normal_tail(z: f64) -> f64 {
    if z < 0.0 {
        return -(-upper_tail(-z)).ln_1p() / LN_10;
    }
    if z < FRACTION_FROM {
        return -upper_tail(z).log10();
    }
    // Q(z) = density(z) / f(z), as a sum of logarithms to avoid underflow.
    z * z / 2.0 * LOG10_E + (2.0 * PI).sqrt().log10() + fraction(z).log10()
}

/// `Q(z)` for `z >= 0`.
fn upper_tail(z: f64) -> f64 {
    if z < FRACTION_FROM {
        return 0.5 * (1.0 - erf(z / SQRT_2));
    }
    (-z * z / 2.0).exp() / ((2.0 * PI).sqrt() * fraction(z))
}

/// Laplace's continued fraction `z + 1/(z + 2/(z + 3/(z + …)))`.
fn fraction(z: f64) -> f64 {
    (1..=80).rev().fold(z, |tail, n| z + f64::from(n) / tail)
}

/// The error function's Maclaurin series; exact enough for `|x| < 2`.
fn erf(x: f64) -> f64 {
    let (mut term, mut sum) = (x, x);
    for n in 1..60 {
        let n = f64::from(n);
        term *= -x * x / n;
        sum += term / (2.0 * n + 1.0);
    }
    2.0 / PI.sqrt() * sum
}

#[cfg(test)]
mod tests {
    use super::*;

    fn phi(seconds: f64) -> f64 {
        normal(Duration::from_secs_f64(seconds), Duration::from_secs(1), Duration::from_millis(100))
    }

    #[test]
    fn normal_tail_matches_known_values() {
        for (seconds, expected) in [
            (0.5, 0.0),
            (1.0, std::f64::consts::LOG10_2),
            (1.2, 1.643_02),
            (1.5, 6.542_65),
            (2.0, 23.118_05),
        ] {
            let got = phi(seconds);
            assert!((got - expected).abs() < 5e-5, "phi({seconds}) = {got}");
        }
        assert!((phi(1.6) - 9.0059).abs() < 1e-3);
    }

    #[test]
    fn both_methods_agree_at_their_boundary() {
        let (below, above) = (FRACTION_FROM - 1e-9, FRACTION_FROM + 1e-9);
        assert!((normal_tail(below) - normal_tail(above)).abs() < 1e-7);
    }

    #[test]
    fn phi_never_decreases_with_time() {
        let values: Vec<f64> = (0..4000).map(|i| phi(f64::from(i) / 1000.0)).collect();
        assert!(values.windows(2).all(|pair| pair[0] <= pair[1]));
    }

    #[test]
    fn phi_is_capped_after_a_year_of_silence() {
        let year = Duration::from_secs(365 * 86_400);
        assert_eq!(normal(year, Duration::from_millis(100), Duration::from_millis(5)), PHI_MAX);
        assert_eq!(exponential(year, Duration::from_millis(100)), PHI_MAX);
        assert_eq!(normal(year, Duration::ZERO, Duration::ZERO), PHI_MAX);
        assert_eq!(exponential(year, Duration::ZERO), PHI_MAX);
    }

    #[test]
    fn exponential_tail_reaches_8_at_18_4_means() {
        let mean = Duration::from_secs(1);
        assert!((exponential(mean.mul_f64(18.42), mean) - 8.0).abs() < 0.001);
    }
}

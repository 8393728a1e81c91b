//! Which tiers of a pool serve, and which share of the new sessions each gets.
//!
//! Called by `build` for each table, and by the controller to see which backups no longer
//! serve (`on_recover`). It picks nothing and knows no backend.
//!
//! With `tiers = "spill"` the shares are those of Envoy's priority levels. A tier can carry
//! [`OVERPROVISIONING`] per cent of the share of its members that are eligible, at most 100 %.
//! The tiers take what they can carry in order. If all of them together can carry less than
//! 100 %, their shares are scaled up.

use crate::model::{Backups, PoolConfig, TIER_MAX, Tiers};

/// Sessions that a tier can carry, in per cent of the share of its eligible members. With 140, a
/// tier carries everything while five of seven members are eligible.
const OVERPROVISIONING: usize = 140;

/// A member of a pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TierMember {
    /// Its tier, 0..=[`TIER_MAX`].
    pub tier: u8,
    /// Whether it can serve.
    pub eligible: bool,
    /// Whether it is on trial. Members on trial are not enough to fill a tier.
    pub on_trial: bool,
    /// Whether it waits for its first result. It does not count for the share of its tier.
    pub undecided: bool,
}

/// The members of one tier that serve.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TierRun {
    /// The tier.
    pub tier: u8,
    /// Positions of its members, in the order of the pool; at least one.
    pub members: Vec<usize>,
    /// Share of the new sessions in per cent, at least 1, if the tiers spill.
    pub load: Option<u8>,
}

/// The rules of a pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TierRules {
    /// `tiers`
    pub tiers: Tiers,
    /// `backups`
    pub backups: Backups,
}

// === impl TierRules ===

impl TierRules {
    /// Returns the rules of a pool.
    pub fn of(pool: &PoolConfig) -> TierRules {
        TierRules { tiers: pool.tiers, backups: pool.backups }
    }

    /// Returns the tiers that serve, the lowest first; none if no member is eligible.
    pub fn serving(self, members: &[TierMember]) -> Vec<TierRun> {
        match self.tiers {
            Tiers::Strict => self.strict(members),
            Tiers::Spill => spill(members),
        }
    }

    /// The lowest tier with an eligible member. While all members so far are on trial, the
    /// next tier joins: a backend on trial gets one session at a time.
    fn strict(self, members: &[TierMember]) -> Vec<TierRun> {
        let mut runs = Vec::new();
        for tier in 0..=TIER_MAX {
            let mut eligible = eligible_of(members, tier);
            let steady = eligible.iter().position(|place| !members[*place].on_trial);
            if tier > 0
                && self.backups == Backups::One
                && let Some(first) = steady
            {
                eligible.truncate(first + 1);
            }
            if !eligible.is_empty() {
                runs.push(TierRun { tier, members: eligible, load: None });
            }
            if steady.is_some() {
                break;
            }
        }
        runs
    }

    /// Returns which members a lower tier has replaced: all after the last one that serves, in
    /// the order of tiers. None are while every serving member of the last tier is on trial.
    pub fn released(self, members: &[TierMember]) -> Vec<bool> {
        let runs = self.serving(members);
        let last = runs.last().and_then(|run| {
            let steady = run.members.iter().any(|place| !members[*place].on_trial);
            let place = *run.members.last()?;
            steady.then_some((run.tier, place))
        });
        let Some((tier, place)) = last else { return vec![false; members.len()] };
        let one = tier > 0 && self.backups == Backups::One;
        let is_after = |(at, member): (usize, &TierMember)| {
            member.tier > tier || (one && member.tier == tier && at > place)
        };
        members.iter().enumerate().map(is_after).collect()
    }
}

fn eligible_of(members: &[TierMember], tier: u8) -> Vec<usize> {
    let of_tier = |(place, member): (usize, &TierMember)| {
        (member.eligible && member.tier == tier).then_some(place)
    };
    members.iter().enumerate().filter_map(of_tier).collect()
}

fn spill(members: &[TierMember]) -> Vec<TierRun> {
    let counts = |tier: u8| {
        let counts = move |member: &&TierMember| member.tier == tier && !member.undecided;
        let of_tier = members.iter().filter(counts);
        (of_tier.clone().filter(|member| member.eligible).count(), of_tier.count())
    };
    let tiers: Vec<(usize, usize)> = (0..=TIER_MAX).map(counts).collect();
    let loads = loads(&tiers);
    let runs = (0..=TIER_MAX).zip(loads).filter(|(_, load)| *load > 0);
    runs.map(|(tier, load)| TierRun { tier, members: eligible_of(members, tier), load: Some(load) })
        .collect()
}

/// Returns the share of each tier in per cent, from its number of eligible members and of all
/// members. The sum is 100, or 0 if no member is eligible.
fn loads(tiers: &[(usize, usize)]) -> Vec<u8> {
    let health = |(eligible, all): &(usize, usize)| match eligible {
        0 => 0,
        _ => (OVERPROVISIONING * eligible / all).clamp(1, 100),
    };
    let health: Vec<usize> = tiers.iter().map(health).collect();
    let total = health.iter().sum::<usize>().min(100);
    let mut left = if total == 0 { 0 } else { 100 };
    let mut loads: Vec<usize> = Vec::with_capacity(health.len());
    for one in &health {
        // Rounded to the nearest per cent.
        let load = (one * 100 + total / 2).checked_div(total).unwrap_or(0).min(left);
        left -= load;
        loads.push(load);
    }
    // What rounding has left.
    if let Some(first) = loads.iter_mut().find(|load| **load > 0) {
        *first += left;
    }
    loads.into_iter().map(|load| load as u8).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const SPILL: TierRules = TierRules { tiers: Tiers::Spill, backups: Backups::All };

    /// The shares of tiers with 100 members each, of which that many are eligible.
    fn shares(eligible: &[usize]) -> Vec<u8> {
        let tiers: Vec<(usize, usize)> = eligible.iter().map(|count| (*count, 100)).collect();
        loads(&tiers)
    }

    #[test]
    fn shares_are_those_of_priority_levels_in_envoy() {
        // From the page "Priority levels" of Envoy's documentation.
        let table: [(&[usize], &[u8]); 19] = [
            (&[100, 100], &[100, 0]),
            (&[72, 72], &[100, 0]),
            (&[72, 100], &[100, 0]),
            (&[71, 71], &[99, 1]),
            (&[71, 100], &[99, 1]),
            (&[50, 50], &[70, 30]),
            (&[50, 60], &[70, 30]),
            (&[50, 100], &[70, 30]),
            (&[25, 100], &[35, 65]),
            (&[25, 25], &[50, 50]),
            (&[0, 100], &[0, 100]),
            (&[100, 100, 100], &[100, 0, 0]),
            (&[72, 72, 100], &[100, 0, 0]),
            (&[71, 71, 100], &[99, 1, 0]),
            (&[50, 50, 100], &[70, 30, 0]),
            (&[25, 100, 100], &[35, 65, 0]),
            (&[25, 25, 100], &[35, 35, 30]),
            (&[25, 25, 20], &[36, 36, 28]),
            (&[0, 0, 0], &[0, 0, 0]),
        ];
        for (eligible, expected) in table {
            assert_eq!(shares(eligible), expected, "{eligible:?}");
        }
    }

    #[test]
    fn shares_of_eligible_tiers_are_100_per_cent_together() {
        let mut random = fastrand::Rng::with_seed(11);
        for _ in 0..20_000 {
            let mut tier = || {
                let all = random.usize(0..400);
                (random.usize(0..=all), all)
            };
            let tiers: Vec<(usize, usize)> = (0..10).map(|_| tier()).collect();
            let loads = loads(&tiers);
            let some = tiers.iter().any(|(eligible, _)| *eligible > 0);
            let sum: u32 = loads.iter().map(|load| u32::from(*load)).sum();
            assert_eq!(sum, if some { 100 } else { 0 }, "{tiers:?}: {loads:?}");
            for ((eligible, _), load) in tiers.iter().zip(&loads) {
                assert!(*eligible > 0 || *load == 0, "{tiers:?}: {loads:?}");
            }
        }
    }

    /// Members by tier: `E` is eligible, `t` on trial, `-` not eligible, `?` undecided.
    fn members(tiers: &[&str]) -> Vec<TierMember> {
        let of_tier = |(tier, text): (usize, &&str)| -> Vec<TierMember> {
            let member = |c| TierMember {
                tier: tier as u8,
                eligible: matches!(c, 'E' | 't'),
                on_trial: c == 't',
                undecided: c == '?',
            };
            text.chars().map(member).collect()
        };
        tiers.iter().enumerate().flat_map(of_tier).collect()
    }

    /// The serving members as text, and the released ones.
    fn decided(rules: TierRules, tiers: &[&str]) -> (String, String) {
        let members = members(tiers);
        let letter = |place: usize| char::from(b'a' + place as u8);
        let serving = rules.serving(&members).into_iter().flat_map(|run| run.members);
        let released = rules.released(&members);
        let released = (0..members.len()).filter(|place| released[*place]);
        (serving.map(letter).collect(), released.map(letter).collect())
    }

    #[test]
    fn lowest_tier_with_an_eligible_member_serves_alone() {
        let all = TierRules { tiers: Tiers::Strict, backups: Backups::All };
        let one = TierRules { backups: Backups::One, ..all };
        let table: [(TierRules, &[&str], &str, &str); 12] = [
            (all, &["E-", "EE", "E"], "a", "cde"),
            (all, &["--", "EE", "E"], "cd", "e"),
            (all, &["--", "-E", "E"], "d", "e"),
            (all, &["--", "--", "E"], "e", ""),
            (all, &["--", "--", "-"], "", ""),
            (all, &["tt", "EE", "E"], "abcd", "e"),
            (all, &["t", "t", "t", "E", "E"], "abcd", "e"),
            (all, &["t", "-", "-"], "a", ""),
            (one, &["--", "EEE", "E"], "c", "def"),
            (one, &["--", "-tE", "E"], "de", "f"),
            (one, &["EE", "EE"], "ab", "cd"),
            (one, &["t", "tt"], "abc", ""),
        ];
        for (rules, tiers, serving, released) in table {
            let expected = (serving.to_owned(), released.to_owned());
            assert_eq!(decided(rules, tiers), expected, "{rules:?} {tiers:?}");
        }
    }

    #[test]
    fn tiers_with_a_share_serve_together_and_higher_ones_are_released() {
        assert_eq!(decided(SPILL, &["EEEEE--", "EE"]), ("abcde".into(), "hi".into()));
        assert_eq!(decided(SPILL, &["EE--", "EE", "E"]), ("abef".into(), "g".into()));
        assert_eq!(decided(SPILL, &["E???", "EE"]), ("a".into(), "ef".into()), "the start");
        assert_eq!(decided(SPILL, &["E-??", "EE"]), ("aef".into(), String::new()));
        assert_eq!(decided(SPILL, &["----", "-E", "E"]), ("fg".into(), String::new()));
    }
}

//! The balancers of a pool: one, or one for each tier while sessions spill to higher tiers.
//!
//! Built with the table, used by every worker without locks. A pick draws the tier, then
//! asks the policy of that tier. The share of a tier is exact for many picks, not for few.
//! With `source-hash` the tier follows from the client's address, so a client keeps its tier
//! while the shares are the same. It does no I/O and generates no randomness.

use super::random_stream::DrawStream;
use super::recorder::PickRecord;
use super::{Balancer, Candidate, PickError, PickKey, RoundRobinPosition, source_hash};
use crate::model::Policy;
use std::sync::Arc;

/// Backends that one session can try.
const TRIED_MAX: usize = 16;

/// See the module documentation.
#[derive(Debug)]
pub struct TierBalancers {
    /// At least one, the lowest tier first.
    tiers: Box<[TierBalancer]>,
}

/// The balancer of one tier, or of several tiers of which the lower are on trial.
#[derive(Debug, Clone)]
pub struct TierBalancer {
    /// The lowest tier.
    pub tier: u8,
    /// Share of the picks in per cent. The sum of all is 100.
    pub load: u8,
    /// Number of candidates of the lower tiers: the index of its first candidate.
    pub first: usize,
    /// Over the candidates of this tier.
    pub balancer: Arc<Balancer>,
}

/// The tried candidates of one tier, by their indices in it.
struct TriedOfTier {
    indices: [usize; TRIED_MAX],
    count: usize,
}

// === impl TierBalancers ===

impl TierBalancers {
    /// Returns the balancers of these tiers; `None` without a tier.
    pub fn new(tiers: Vec<TierBalancer>) -> Option<TierBalancers> {
        (!tiers.is_empty()).then(|| TierBalancers { tiers: tiers.into() })
    }

    /// The tiers, the lowest first.
    pub fn tiers(&self) -> &[TierBalancer] {
        &self.tiers
    }

    /// Whether sessions spill: several tiers have a share.
    pub fn spills(&self) -> bool {
        self.tiers.len() > 1
    }

    /// All candidates, in the order of their indices.
    pub fn candidates(&self) -> impl Iterator<Item = &Candidate> {
        self.tiers.iter().flat_map(|tier| tier.balancer.candidates())
    }

    /// Returns the share of the picks that each candidate should get, as [`Balancer::shares`].
    pub fn shares(&self) -> Vec<f64> {
        let shares = |tier: &TierBalancer| {
            let load = f64::from(tier.load) / 100.0;
            tier.balancer.shares().into_iter().map(move |share| share * load).collect::<Vec<f64>>()
        };
        self.tiers.iter().flat_map(shares).collect()
    }

    /// Picks a candidate as [`Balancer::pick`] does.
    ///
    /// # Errors
    /// All candidates of all tiers were tried or are at their caps.
    #[inline]
    pub fn pick(&self, key: PickKey, tried: &[usize]) -> Result<usize, PickError> {
        if let [only] = &*self.tiers {
            return only.balancer.pick(key, tried);
        }
        self.pick_tier(key, tried, |tier, key, tried| tier.balancer.pick(key, tried))
    }

    /// Picks as [`TierBalancers::pick`] and notes in `record` what decided.
    ///
    /// # Errors
    /// As [`TierBalancers::pick`].
    pub fn pick_recorded(
        &self,
        key: PickKey,
        tried: &[usize],
        record: &mut PickRecord,
    ) -> Result<usize, PickError> {
        if let [only] = &*self.tiers {
            return only.balancer.pick_recorded(key, tried, record);
        }
        record.clear();
        self.pick_tier(key, tried, |tier, key, tried| {
            let mut of_tier = PickRecord::default();
            let picked = tier.balancer.pick_recorded(key, tried, &mut of_tier);
            record.append(of_tier, tier.first);
            picked
        })
    }

    /// Returns what [`TierBalancers::pick`] would return now, and why. Changes nothing.
    pub fn rehearse(
        &self,
        key: PickKey,
        tried: &[usize],
    ) -> (Result<usize, PickError>, PickRecord) {
        if let [only] = &*self.tiers {
            return only.balancer.rehearse(key, tried);
        }
        let mut record = PickRecord::default();
        let picked = self.pick_tier(key, tried, |tier, key, tried| {
            let (picked, of_tier) = tier.balancer.rehearse(key, tried);
            record.append(of_tier, tier.first);
            picked
        });
        (picked, record)
    }

    /// Returns whether at least one candidate is below its cap now.
    #[inline]
    pub fn has_room(&self) -> bool {
        self.tiers.iter().any(|tier| tier.balancer.has_room())
    }

    /// Returns the position of each tier that is a round robin.
    pub fn positions(&self) -> impl Iterator<Item = (u8, RoundRobinPosition)> {
        self.tiers.iter().filter_map(|one| Some((one.tier, one.balancer.round_robin_position()?)))
    }

    /// Moves the round robin of `tier` to `position`, if there is one.
    pub fn resume_at(&self, tier: u8, position: RoundRobinPosition) {
        if let Some(one) = self.tiers.iter().find(|one| one.tier == tier) {
            one.balancer.resume_at(position);
        }
    }

    /// Whether both consist of the same balancers with the same shares.
    pub fn is_same(&self, other: &TierBalancers) -> bool {
        let same = |(a, b): (&TierBalancer, &TierBalancer)| {
            (a.tier, a.load, a.first) == (b.tier, b.load, b.first)
                && Arc::ptr_eq(&a.balancer, &b.balancer)
        };
        self.tiers.len() == other.tiers.len() && self.tiers.iter().zip(&other.tiers).all(same)
    }

    /// Draws a tier and picks in it. If it has no usable candidate, the other tiers follow, the
    /// lowest first.
    fn pick_tier(
        &self,
        key: PickKey,
        tried: &[usize],
        mut pick: impl FnMut(&TierBalancer, PickKey, &[usize]) -> Result<usize, PickError>,
    ) -> Result<usize, PickError> {
        let (drawn, key) = self.draw(key);
        let others = (0..self.tiers.len()).filter(|place| *place != drawn);
        let mut error = PickError::Exhausted;
        for place in std::iter::once(drawn).chain(others) {
            let tier = &self.tiers[place];
            match pick(tier, key, TriedOfTier::of(tier, tried).indices()) {
                Ok(index) => return Ok(tier.first + index),
                Err(PickError::AtCapacity) => error = PickError::AtCapacity,
                Err(PickError::Exhausted) => {}
            }
        }
        Err(error)
    }

    /// Draws the place of a tier. Returns it with the key for its policy, whose draw does not
    /// depend on the tier.
    fn draw(&self, key: PickKey) -> (usize, PickKey) {
        let mut draws = DrawStream::new(key.draw);
        let per_cent = match self.tiers.first().map(|tier| tier.balancer.policy()) {
            Some(Policy::SourceHash) => source_hash::per_cent(key.client),
            _ => draws.below(100),
        };
        let mut upper = 0;
        let place = self.tiers.iter().position(|tier| {
            upper += u64::from(tier.load);
            per_cent < upper
        });
        (place.unwrap_or(0), PickKey { draw: draws.next(), ..key })
    }
}

// === impl TriedOfTier ===

impl TriedOfTier {
    fn of(tier: &TierBalancer, tried: &[usize]) -> TriedOfTier {
        let mut of_tier = TriedOfTier { indices: [0; TRIED_MAX], count: 0 };
        let end = tier.first + tier.balancer.candidates().len();
        let indices = tried.iter().filter(|index| (tier.first..end).contains(index));
        for (free, index) in of_tier.indices.iter_mut().zip(indices) {
            *free = index - tier.first;
            of_tier.count += 1;
        }
        of_tier
    }

    fn indices(&self) -> &[usize] {
        &self.indices[..self.count]
    }
}

#[cfg(test)]
#[cfg(not(feature = "loom"))]
mod tests {
    use super::*;
    use crate::balance::in_flight::InFlight;
    use crate::balance::latency::Latency;
    use crate::decision::{Figures, SkipReason};
    use std::net::{IpAddr, Ipv4Addr};

    fn candidate(port: u16, connections_max: u32) -> Candidate {
        Candidate {
            key: format!("127.0.0.1:{port}").into(),
            weight: 1,
            connections_max,
            slow_start: false,
            in_flight: Arc::new(InFlight::new()),
            latency: Arc::new(Latency::new()),
        }
    }

    /// Tiers of (share, candidates); every candidate with the cap, 0 for none.
    fn tiers(policy: Policy, of: &[(u8, usize)], cap: u32) -> TierBalancers {
        let mut first = 0;
        let mut tiers = Vec::new();
        for (tier, (load, count)) in of.iter().enumerate() {
            let candidates = (first..first + count).map(|port| candidate(port as u16, cap));
            let balancer = Arc::new(Balancer::new(policy, candidates.collect(), None));
            tiers.push(TierBalancer { tier: tier as u8, load: *load, first, balancer });
            first += count;
        }
        TierBalancers::new(tiers).unwrap()
    }

    fn key(number: u32) -> PickKey {
        let client = IpAddr::V4(Ipv4Addr::from_bits(0x0a00_0000 + number));
        PickKey { client, draw: number.into(), at: 0 }
    }

    #[test]
    fn picks_follow_the_shares_of_the_tiers_with_every_policy() {
        for policy in Policy::ALL {
            let balancers = tiers(policy, &[(70, 4), (30, 2)], 0);
            let mut counts = [0_u32; 6];
            for number in 0..20_000 {
                counts[balancers.pick(key(number), &[]).unwrap()] += 1;
            }
            let lower: u32 = counts[..4].iter().sum();
            assert!((13_700..14_300).contains(&lower), "{policy:?}: {counts:?}");
            assert!(counts.iter().all(|count| *count > 2_600), "{policy:?}: {counts:?}");
        }
    }

    #[test]
    fn stated_shares_are_those_of_the_picks_with_every_policy() {
        for (policy, of) in Policy::ALL
            .into_iter()
            .flat_map(|policy| [vec![(100, 7)], vec![(70, 4), (30, 2)]].map(|of| (policy, of)))
        {
            let balancers = tiers(policy, &of, 0);
            let shares = balancers.shares();
            let mut counts = vec![0_u32; shares.len()];
            (0..20_000).for_each(|at| counts[balancers.pick(key(at), &[]).unwrap()] += 1);
            assert!((shares.iter().sum::<f64>() - 1.0).abs() < 1e-9, "{policy:?}: {shares:?}");
            for (count, share) in counts.iter().zip(&shares) {
                let error = f64::from(*count) / 20_000.0 - share;
                assert!(error.abs() < 0.015, "{policy:?}: {counts:?} instead of {shares:?}");
            }
        }
    }

    #[test]
    fn turns_within_a_tier_stay_even() {
        let balancers = tiers(Policy::WeightedRoundRobin, &[(70, 3), (30, 2)], 0);
        let mut counts = [0_u32; 5];
        for number in 0..5_000 {
            counts[balancers.pick(key(number), &[]).unwrap()] += 1;
        }
        let spread = |counts: &[u32]| counts.iter().max().unwrap() - counts.iter().min().unwrap();
        assert!(spread(&counts[..3]) <= 1 && spread(&counts[3..]) <= 1, "{counts:?}");
    }

    #[test]
    fn client_keeps_its_tier_and_only_the_spilled_share_moves() {
        let full = tiers(Policy::SourceHash, &[(100, 5)], 0);
        let spilling = tiers(Policy::SourceHash, &[(70, 5), (30, 5)], 0);
        let worse = tiers(Policy::SourceHash, &[(35, 5), (65, 5)], 0);
        let mut moved = [0_u32; 2];
        for client in 0..10_000 {
            let at = |balancers: &TierBalancers, draw: u64| {
                let key = PickKey { draw, ..key(client) };
                balancers.rehearse(key, &[]).0.unwrap()
            };
            assert_eq!(at(&spilling, 1), at(&spilling, 2), "no draw has a part");
            let (before, now, later) = (at(&full, 0), at(&spilling, 0), at(&worse, 0));
            assert!(now == before || now >= 5, "a client of the lower tier keeps its backend");
            assert!(later == now || (now < 5 && later >= 5), "no client returns");
            moved[0] += u32::from(now != before);
            moved[1] += u32::from(later != now);
        }
        assert!((2_800..3_200).contains(&moved[0]), "{moved:?}");
        assert!((3_300..3_700).contains(&moved[1]), "{moved:?}");
    }

    #[test]
    fn full_or_tried_tier_spills_to_the_others() {
        for policy in Policy::ALL {
            let balancers = tiers(policy, &[(99, 2), (1, 2)], 1);
            let mut picked: Vec<usize> =
                (0..4).map(|number| balancers.pick(key(number), &[]).unwrap()).collect();
            picked.sort_unstable();
            assert_eq!(picked, [0, 1, 2, 3], "{policy:?}");
            assert!(!balancers.has_room());
            assert_eq!(balancers.pick(key(9), &[]), Err(PickError::AtCapacity), "{policy:?}");
            let all = [3, 1, 0, 2];
            assert_eq!(balancers.pick(key(9), &all), Err(PickError::Exhausted), "{policy:?}");
            let free = tiers(policy, &[(50, 2), (50, 2)], 0);
            for number in 0..50 {
                assert_eq!(free.pick(key(number), &[0, 3, 1]), Ok(2), "{policy:?}");
            }
        }
    }

    #[test]
    fn record_names_candidates_by_their_indices_over_all_tiers() {
        let balancers = tiers(Policy::LeastConnections, &[(1, 2), (99, 2)], 0);
        let mut record = PickRecord::default();
        let upper = (0..).map(key).find(|key| balancers.draw(*key).0 == 1).unwrap();
        let picked = balancers.pick_recorded(upper, &[2, 0], &mut record);
        assert_eq!(picked, Ok(3));
        assert_eq!(record.noted(), [(2, SkipReason::Tried)]);
        let (picked, record) = balancers.rehearse(upper, &[]);
        assert_eq!(picked, Ok(2), "the other one has a session");
        let Figures::Loads { other: Some((other, load)), .. } = record.figures() else {
            panic!("{record:?}")
        };
        assert_eq!((other, load.sessions), (3, 1));
        // Both candidates of the drawn tier were tried.
        let (picked, record) = balancers.rehearse(upper, &[2, 3]);
        assert!(picked.unwrap() < 2);
        let noted: Vec<usize> = record.noted().iter().map(|(index, _)| *index).collect();
        assert!(noted.contains(&2) && noted.contains(&3), "{noted:?}");
    }
}

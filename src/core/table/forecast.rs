//! What a pick for a client would be at this moment, and how likely each backend is.
//!
//! `daemon` calls it for `tidegate explain --client`, on a thread that may compute for some
//! milliseconds. It repeats rehearsals of the real pick with different draws, and changes
//! nothing.

use super::decide::Picked;
use super::{NoBackend, PoolTable};
use crate::balance::{PickKey, PickRecord};
use crate::decision::Figures;
use crate::model::Policy;
use std::net::IpAddr;

/// Candidates looked at by all rehearsals together, at most: some 10 ms.
const LOOKS_MAX: usize = 4_000_000;

/// Rehearsals of a pick that depends on draws. The error of a share of 50 % is 0.16 % (one
/// sigma) with the largest number.
const DRAWS: (usize, usize) = (1_000, 100_000);

/// See the module's documentation.
#[derive(Debug)]
pub struct Forecast {
    /// The pick of the first draw.
    pub picked: Result<Picked, NoBackend>,
    /// What decided it.
    pub record: PickRecord,
    /// How often each backend was picked, by its position in `serving`, most often first.
    /// Empty if no draw has a part in the pick.
    pub shares: Vec<(usize, u32)>,
    /// Number of draws; 0 if no draw has a part in the pick.
    pub draws: u32,
}

impl PoolTable {
    /// Returns what a pick for that client would be now. `at` is in the milliseconds of
    /// [`PickKey::at`]; `seed` chooses the draws.
    pub fn forecast(&self, client: IpAddr, at: u64, seed: u64) -> Forecast {
        let key = |draw: u64| PickKey { client, draw: seed.wrapping_add(draw), at };
        let (picked, record) = self.rehearse(key(0), &[]);
        let depends = match (self.spec.balance, record.figures()) {
            (Policy::SourceHash, _) => false,
            _ if self.spills() => true,
            (Policy::WeightedRoundRobin, figures) => !matches!(figures, Figures::Turn { .. }),
            _ => true,
        };
        if !depends || picked.is_err() {
            return Forecast { picked, record, shares: Vec::new(), draws: 0 };
        }
        let draws = (LOOKS_MAX / self.serving.len().max(1)).clamp(DRAWS.0, DRAWS.1);
        let mut counts = vec![0_u32; self.serving.len()];
        for draw in 0..draws as u64 {
            if let (Ok(picked), _) = self.rehearse(key(draw), &[])
                && let Some(count) = counts.get_mut(picked.index)
            {
                *count += 1;
            }
        }
        let mut shares: Vec<(usize, u32)> =
            counts.into_iter().enumerate().filter(|(_, count)| *count > 0).collect();
        shares.sort_by_key(|(index, count)| (std::cmp::Reverse(*count), *index));
        Forecast { picked, record, shares, draws: draws as u32 }
    }
}

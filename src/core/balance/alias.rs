//! Weighted draws in constant time.
//!
//! Built at table build for `random`, `two-choices`, `peak-ewma` and large
//! `least-connections` pools, and used by every pick of these. It depends on weights
//! only, never on load.

use crate::balance::random_stream::DrawStream;

/// Walker's alias method, built as in Vose, "A linear algorithm for generating random
/// numbers with a given distribution" (1991), with integers. The table has one column
/// per candidate. Each column holds the sum of all weights and is shared by at most two
/// candidates.
#[derive(Debug)]
pub(super) struct AliasTable {
    /// Sum of all weights.
    total: u64,
    /// One column per candidate. Invariant: never empty.
    columns: Box<[AliasColumn]>,
}

#[derive(Debug, Clone, Copy)]
struct AliasColumn {
    /// The part of `total` that belongs to the column's own candidate.
    own: u64,
    /// The candidate that gets the rest.
    alias: u32,
}

impl AliasTable {
    /// Builds the table from the weights: fewer than 2^32 of them, at least one above
    /// 0. A candidate of weight 0 is never drawn.
    pub(super) fn new(weights: impl ExactSizeIterator<Item = u32> + Clone) -> AliasTable {
        let count = weights.len() as u64;
        let total: u64 = weights.clone().map(u64::from).sum();
        // What each candidate must still get, in units of which a column holds `total`.
        let mut owed: Vec<u128> =
            weights.map(|weight| u128::from(weight) * u128::from(count)).collect();
        let mut columns: Vec<AliasColumn> =
            (0..owed.len()).map(|i| AliasColumn { own: total, alias: i as u32 }).collect();
        let column = u128::from(total);
        let (mut light, mut heavy): (Vec<usize>, Vec<usize>) =
            (0..owed.len()).partition(|&i| owed[i] < column);
        while let (Some(small), Some(&large)) = (light.pop(), heavy.last()) {
            columns[small] = AliasColumn { own: owed[small] as u64, alias: large as u32 };
            owed[large] -= column - owed[small];
            if owed[large] < column {
                heavy.pop();
                light.push(large);
            }
        }
        AliasTable { total, columns: columns.into() }
    }

    /// Draws the index of a candidate, with a probability in proportion to its weight.
    #[inline]
    pub(super) fn draw(&self, draws: &mut DrawStream) -> usize {
        let index = draws.below(self.columns.len() as u64) as usize;
        let column = self.columns[index];
        if draws.below(self.total) < column.own { index } else { column.alias as usize }
    }
}

#[cfg(test)]
#[cfg(not(feature = "loom"))]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The sum of each candidate's parts of all columns, in units of count * total.
    fn shares(table: &AliasTable) -> Vec<u128> {
        let mut shares = vec![0u128; table.columns.len()];
        for (index, column) in table.columns.iter().enumerate() {
            shares[index] += u128::from(column.own);
            shares[column.alias as usize] += u128::from(table.total - column.own);
        }
        shares
    }

    proptest! {
        #[test]
        fn columns_hold_exactly_the_weights(weights in prop::collection::vec(0u32.., 1..80)) {
            prop_assume!(weights.iter().any(|&weight| weight > 0));
            let table = AliasTable::new(weights.iter().copied());
            let count = weights.len() as u128;
            let expected: Vec<u128> = weights.iter().map(|&w| u128::from(w) * count).collect();
            prop_assert_eq!(shares(&table), expected);
        }
    }
}

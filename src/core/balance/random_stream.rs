//! Expands the `u64` of a pick into many random numbers.
//!
//! Used by the policies of this module. It has no randomness of its own: the same input
//! gives the same numbers, which makes picks testable.

/// A SplitMix64 stream (Steele, Lea, Flood: "Fast splittable pseudorandom number
/// generators", 2014), seeded by the `draw` of a pick. Even consecutive seeds, as from
/// a counter, give uniform draws.
#[derive(Debug, Clone)]
pub(super) struct DrawStream(u64);

impl DrawStream {
    /// Creates the stream of one pick.
    #[inline]
    pub(super) fn new(draw: u64) -> DrawStream {
        DrawStream(draw)
    }

    /// Returns the next 64 bits.
    #[inline]
    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Returns a number less than `bound`, which must not be 0. Multiply and shift: the
    /// bias is at most `bound` / 2^64.
    #[inline]
    pub(super) fn below(&mut self, bound: u64) -> u64 {
        ((u128::from(self.next()) * u128::from(bound)) >> 64) as u64
    }
}

#[cfg(test)]
#[cfg(not(feature = "loom"))]
mod tests {
    use super::*;

    #[test]
    fn stream_matches_the_published_splitmix64() {
        // First outputs for seed 1234567, as in the reference implementation.
        let mut draws = DrawStream::new(1_234_567);
        let first: Vec<u64> = (0..3).map(|_| draws.next()).collect();
        assert_eq!(
            first,
            [6_457_827_717_110_365_317, 3_203_168_211_198_807_973, 9_817_491_932_198_370_423]
        );
    }

    #[test]
    fn numbers_from_a_counter_are_uniform_for_small_bounds() {
        let mut hits = [0u32; 7];
        for counter in 0..70_000 {
            hits[DrawStream::new(counter).below(7) as usize] += 1;
        }
        for hit in hits {
            assert!((9_500..10_500).contains(&hit), "{hits:?}");
        }
    }
}

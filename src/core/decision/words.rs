//! A [`Decision`] as words of 64 bits, the form it has in a ring.
//!
//! Used by `ring` alone. DecisionWords of an unknown layout read as `None`; nothing here panics.

use super::{
    AttemptFailureKind, Decision, Figures, Load, Outcome, SKIPPED_NAMED, SkipReason, Skipped,
    SkippedList, Why,
};
use crate::model::{
    BackendId, ClientAddr, FrontendId, LocalPeer, PeerAddr, Policy, PoolId, TIER_MAX,
};
use crate::outcome::{Cause, Phase};
use std::net::{IpAddr, Ipv6Addr, SocketAddr};

/// DecisionWords of a decision.
pub(super) const WORDS: usize = 24;

/// Where the words of the outcome begin; it is rewritten alone.
pub(super) const OUTCOME: usize = 21;

/// Where the words of the peer begin, if there is one. It replaces the last named skips.
const PEER: usize = 18;

/// Marks a decision with a peer, next to the family of the client.
const HAS_PEER: u64 = 1 << 23;

/// Skips that a decision with a peer names.
const SKIPPED_NAMED_WITH_PEER: usize = SKIPPED_NAMED - (OUTCOME - PEER);

/// A decision in a ring.
pub(super) type DecisionWords = [u64; WORDS];

/// Stands for `None` in a field of 32 bits.
const NONE: u32 = u32::MAX;

/// Stands for `None` in a field of 8 bits.
const NONE_BYTE: u8 = u8::MAX;

/// Marks a decision of a pool whose sessions spilled, next to the policy.
const SPILLED_BIT: u8 = 7;

/// Bits of the kind of figures; the tier is in the bits above.
const KIND_BITS: u8 = 4;

/// Bits of a skip reason; the eight named ones share half a word.
const REASON_BITS: usize = 4;

/// The words of a decision.
pub(super) fn encode(decision: &Decision) -> DecisionWords {
    let mut words = [0; WORDS];
    words[0] = decision.session;
    words[1] = decision.at_micros;
    words[2] = decision.serial;
    let [low, upper, place] = address_words(decision.client.socket());
    words[3] = low;
    words[4] = upper;
    words[5] = place | u64::from(decision.route) << 24 | high(decision.frontend.0);
    words[6] = u64::from(decision.pool.map_or(NONE, |pool| pool.0))
        | high(decision.chosen.map_or(NONE, |backend| backend.0));
    let (kind, figures, other) = figures_words(&decision.figures);
    let kind = kind | decision.tier.min(TIER_MAX) << KIND_BITS;
    let policy = decision.policy.number() | u8::from(decision.spilled) << SPILLED_BIT;
    let bytes = [policy, decision.why as u8, decision.attempt, kind];
    words[7] = u64::from(decision.candidates) | high(u32::from_le_bytes(bytes));
    words[8..11].copy_from_slice(&figures);
    words[11] = u64::from(decision.waited_micros) | high(other);
    words[12] = u64::from(decision.skipped.total);
    words[13..13 + SKIPPED_NAMED].fill(u64::from(SkippedList::NONE.0));
    let named = decision.skipped.named();
    let named = match decision.peer {
        None => named,
        Some(peer) => {
            words[5] |= HAS_PEER;
            words[PEER..OUTCOME].copy_from_slice(&address_words(peer));
            &named[..named.len().min(SKIPPED_NAMED_WITH_PEER)]
        }
    };
    for (place, skipped) in named.iter().enumerate() {
        words[12] |= (skipped.reason as u64) << (32 + REASON_BITS * place);
        words[13 + place] = u64::from(skipped.backend.0) | high(skipped.seconds);
    }
    words[OUTCOME..].copy_from_slice(&encode_outcome(&decision.outcome));
    words
}

/// The words of an outcome.
pub(super) fn encode_outcome(outcome: &Outcome) -> [u64; WORDS - OUTCOME] {
    let (failure, errno) = match outcome.failure {
        Some((kind, errno)) => (kind.number(), errno.cast_unsigned()),
        None => (NONE_BYTE, 0),
    };
    let (cause, phase) = match outcome.end {
        Some((cause, phase)) => (cause as u8, phase as u8),
        None => (NONE_BYTE, NONE_BYTE),
    };
    let bytes = u32::from_le_bytes([failure, cause, phase, 0]);
    [
        u64::from(outcome.connect_micros.unwrap_or(NONE)) | high(errno),
        u64::from(outcome.lasted_millis) | high(bytes),
        outcome.failed_micros.into(),
    ]
}

/// The decision that these words hold.
pub(super) fn decode(words: &DecisionWords) -> Option<Decision> {
    let client = address([words[3], words[4], words[5]])?;
    let peer = match words[5] & HAS_PEER {
        0 => None,
        _ => Some(address([words[PEER], words[PEER + 1], words[PEER + 2]])?),
    };
    let [policy, why, attempt, kind] = high_half(words[7]).to_le_bytes();
    let other = high_half(words[11]);
    Some(Decision {
        session: words[0],
        at_micros: words[1],
        serial: words[2],
        client: ClientAddr::of_peer(client),
        peer,
        frontend: FrontendId(high_half(words[5])),
        route: (words[5] >> 24) as u8,
        pool: some(words[6] as u32).map(PoolId),
        policy: Policy::of_number(policy & !(1 << SPILLED_BIT))?,
        why: *Why::ALL.get(usize::from(why))?,
        chosen: some(high_half(words[6])).map(BackendId),
        candidates: words[7] as u32,
        tier: (kind >> KIND_BITS).min(TIER_MAX),
        spilled: policy >> SPILLED_BIT == 1,
        figures: figures(kind & ((1 << KIND_BITS) - 1), [words[8], words[9], words[10]], other)?,
        skipped: skipped(words)?,
        attempt,
        waited_micros: words[11] as u32,
        outcome: outcome([words[OUTCOME], words[OUTCOME + 1], words[OUTCOME + 2]])?,
    })
}

/// The lower and the upper half of an address, and its port with its family. Family 1 is a peer of
/// a Unix socket.
fn address_words(peer: PeerAddr) -> [u64; 3] {
    let address = match peer {
        PeerAddr::Ip(address) => address,
        PeerAddr::Local(LocalPeer { user, process }) => {
            return [u64::from(user) | high(process), 0, 1 << 16];
        }
    };
    let (octets, family) = match address.ip() {
        IpAddr::V4(v4) => (v4.to_ipv6_mapped().to_bits(), 4),
        IpAddr::V6(v6) => (v6.to_bits(), 6),
    };
    [octets as u64, (octets >> 64) as u64, u64::from(address.port()) | family << 16]
}

fn address([low, upper, place]: [u64; 3]) -> Option<PeerAddr> {
    let octets = Ipv6Addr::from_bits(u128::from(upper) << 64 | u128::from(low));
    let ip = match (place >> 16) as u8 & 0x7f {
        1 => {
            let (user, process) = (low as u32, high_half(low));
            return Some(PeerAddr::Local(LocalPeer { user, process }));
        }
        4 => IpAddr::V4(octets.to_ipv4_mapped()?),
        _ => IpAddr::V6(octets),
    };
    Some(PeerAddr::Ip(SocketAddr::new(ip, place as u16)))
}

/// Kind, three words, and the other backend.
fn figures_words(figures: &Figures) -> (u8, [u64; 3], u32) {
    match *figures {
        Figures::None => (0, [0; 3], NONE),
        Figures::Turn { position, period } => (1, [position, period, 0], NONE),
        Figures::Loads { chosen, other } => {
            let nothing = Load { sessions: 0, weight: 0, answer_micros: 0 };
            let (id, load) = other.map_or((NONE, nothing), |(id, load)| (id.0, load));
            let pair = |load: Load| u64::from(load.sessions) | high(load.weight);
            let answers = u64::from(chosen.answer_micros) | high(load.answer_micros);
            (2, [pair(chosen), pair(load), answers], id)
        }
        Figures::Slot { slot, slots, alternative } => {
            (3, [u64::from(slot) | high(slots), alternative.into(), 0], NONE)
        }
        Figures::Share { weight, total } => (4, [weight.into(), total, 0], NONE),
    }
}

fn figures(kind: u8, [a, b, c]: [u64; 3], other: u32) -> Option<Figures> {
    let load = |pair: u64, answer_micros| Load {
        sessions: pair as u32,
        weight: high_half(pair),
        answer_micros,
    };
    Some(match kind {
        0 => Figures::None,
        1 => Figures::Turn { position: a, period: b },
        2 => Figures::Loads {
            chosen: load(a, c as u32),
            other: some(other).map(|id| (BackendId(id), load(b, high_half(c)))),
        },
        3 => Figures::Slot { slot: a as u32, slots: high_half(a), alternative: b as u16 },
        4 => Figures::Share { weight: a as u32, total: b },
        _ => return None,
    })
}

fn skipped(words: &DecisionWords) -> Option<SkippedList> {
    let mut list = SkippedList::EMPTY;
    let total = words[12] as u32;
    let mask = (1 << REASON_BITS) - 1;
    let most = match words[5] & HAS_PEER {
        0 => SKIPPED_NAMED,
        _ => SKIPPED_NAMED_WITH_PEER,
    };
    for place in 0..most.min(total as usize) {
        let reason = (words[12] >> (32 + REASON_BITS * place)) as usize & mask;
        let word = words[13 + place];
        if BackendId(word as u32) == SkippedList::NONE {
            break;
        }
        list.push(Skipped {
            backend: BackendId(word as u32),
            reason: *SkipReason::ALL.get(reason)?,
            seconds: high_half(word),
        });
    }
    list.count_more(total - list.total());
    Some(list)
}

fn outcome([first, second, third]: [u64; WORDS - OUTCOME]) -> Option<Outcome> {
    let [failure, cause, phase, _] = high_half(second).to_le_bytes();
    let failure = match failure {
        NONE_BYTE => None,
        number => {
            let kind = *AttemptFailureKind::ALL.get(usize::from(number))?;
            Some((kind, high_half(first).cast_signed()))
        }
    };
    let end = match cause {
        NONE_BYTE => None,
        cause => {
            let cause = *Cause::ALL.get(usize::from(cause))?;
            Some((cause, *Phase::ALL.get(usize::from(phase))?))
        }
    };
    Some(Outcome {
        connect_micros: some(first as u32),
        failure,
        failed_micros: third as u32,
        end,
        lasted_millis: second as u32,
    })
}

fn high(half: u32) -> u64 {
    u64::from(half) << 32
}

fn high_half(word: u64) -> u32 {
    (word >> 32) as u32
}

fn some(half: u32) -> Option<u32> {
    (half != NONE).then_some(half)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::counters::LocalErrorKind;
    use proptest::prelude::*;

    fn load() -> impl Strategy<Value = Load> {
        any::<(u32, u32, u32)>().prop_map(|(sessions, weight, answer_micros)| Load {
            sessions,
            weight,
            answer_micros,
        })
    }

    fn any_figures() -> impl Strategy<Value = Figures> {
        prop_oneof![
            Just(Figures::None),
            any::<(u64, u64)>().prop_map(|(position, period)| Figures::Turn { position, period }),
            (load(), proptest::option::of((0..NONE, load()))).prop_map(|(chosen, other)| {
                Figures::Loads { chosen, other: other.map(|(id, load)| (BackendId(id), load)) }
            }),
            any::<(u32, u32, u16)>().prop_map(|(slot, slots, alternative)| Figures::Slot {
                slot,
                slots,
                alternative
            }),
            any::<(u32, u64)>().prop_map(|(weight, total)| Figures::Share { weight, total }),
        ]
    }

    fn any_skipped() -> impl Strategy<Value = SkippedList> {
        let one = ((0..NONE, any::<u32>()), 0..SkipReason::ALL.len()).prop_map(
            |((backend, seconds), reason)| Skipped {
                backend: BackendId(backend),
                reason: SkipReason::ALL[reason],
                seconds,
            },
        );
        (proptest::collection::vec(one, 0..12), 0..9_u32).prop_map(|(all, more)| {
            let mut list = SkippedList::EMPTY;
            all.into_iter().for_each(|skipped| list.push(skipped));
            list.count_more(more);
            list
        })
    }

    /// The list with fewer names and the same total.
    fn first_of(list: &SkippedList, most: usize) -> SkippedList {
        let mut first = SkippedList::EMPTY;
        list.named().iter().take(most).for_each(|skipped| first.push(*skipped));
        first.count_more(list.total() - first.total());
        first
    }

    fn any_outcome() -> impl Strategy<Value = Outcome> {
        let failure = (0..AttemptFailureKind::ALL.len(), any::<i32>())
            .prop_map(|(kind, errno)| (AttemptFailureKind::ALL[kind], errno));
        let end = (0..Cause::ALL.len(), 0..Phase::ALL.len())
            .prop_map(|(cause, phase)| (Cause::ALL[cause], Phase::ALL[phase]));
        (
            proptest::option::of(0..NONE),
            proptest::option::of(failure),
            proptest::option::of(end),
            any::<(u32, u32)>(),
        )
            .prop_map(|(connect_micros, failure, end, (lasted_millis, failed_micros))| {
                Outcome { connect_micros, failure, failed_micros, end, lasted_millis }
            })
    }

    prop_compose! {
        fn any_decision()(
            numbers in any::<(u64, u64, u64)>(),
            (ip, port) in any::<(IpAddr, u16)>(),
            peer in proptest::option::of(any::<(IpAddr, u16)>()),
            (frontend, route, attempt) in any::<(u32, u8, u8)>(),
            (pool, chosen) in (proptest::option::of(0..NONE), proptest::option::of(0..NONE)),
            (policy, why, tier) in (0..Policy::ALL.len(), 0..Why::ALL.len(), 0..=TIER_MAX),
            (candidates, waited_micros) in any::<(u32, u32)>(),
            figures in any_figures(),
            mut skipped in any_skipped(),
            outcome in any_outcome(),
        ) -> Decision {
            if peer.is_some() {
                skipped = first_of(&skipped, SKIPPED_NAMED_WITH_PEER);
            }
            Decision {
                session: numbers.0,
                at_micros: numbers.1,
                serial: numbers.2,
                client: ClientAddr::announced(SocketAddr::new(ip, port)),
                peer: peer.map(|(ip, port)| match route % 2 {
                    0 => PeerAddr::Ip(SocketAddr::new(ip, port)),
                    _ => PeerAddr::Local(LocalPeer { user: port.into(), process: frontend }),
                }),
                frontend: FrontendId(frontend),
                route,
                pool: pool.map(PoolId),
                policy: Policy::ALL[policy],
                why: Why::ALL[why],
                chosen: chosen.map(BackendId),
                candidates,
                tier,
                spilled: tier % 2 == 1,
                figures,
                skipped,
                attempt,
                waited_micros,
                outcome,
            }
        }
    }

    proptest! {
        #[test]
        fn decision_survives_its_words(decision in any_decision()) {
            prop_assert_eq!(decode(&encode(&decision)), Some(decision));
        }

        #[test]
        fn any_words_decode_without_a_panic(words in any::<[u64; WORDS]>()) {
            decode(&words);
        }
    }

    #[test]
    fn each_number_is_a_position_in_its_list() {
        assert!(Why::ALL.iter().enumerate().all(|(n, why)| *why as usize == n));
        assert!(SkipReason::ALL.iter().enumerate().all(|(n, reason)| *reason as usize == n));
        assert!(Cause::ALL.iter().enumerate().all(|(n, cause)| *cause as usize == n));
        assert!(Phase::ALL.iter().enumerate().all(|(n, phase)| *phase as usize == n));
        assert!(SkipReason::ALL.len() <= 1 << REASON_BITS);
        let local = LocalErrorKind::ALL.map(AttemptFailureKind::Local);
        assert!(AttemptFailureKind::ALL.ends_with(&local));
    }
}

//! Arbitrary inputs in arbitrary order: no panic, no value out of range, and no due time in
//! the past.

use super::*;
use proptest::prelude::*;

#[derive(Debug, Clone)]
enum Input {
    Wait(u64),
    /// Advances to the due time, if any, and checks.
    Due,
    Beat {
        incarnation: u64,
        sequence: u64,
        interval: u64,
    },
    /// The next heartbeat of the sender, after this many lost ones.
    Next(u64),
    Check(bool),
    Probed(u8, bool),
    Refused,
    Stopping,
    Excuse,
    Eject,
    Hold,
}

fn input() -> impl Strategy<Value = Input> {
    let anything = prop_oneof![0..50_u64, Just(u64::MAX), any::<u64>()];
    prop_oneof![
        4 => (0..2_000_u64).prop_map(Input::Wait),
        1 => (0..10_000_000_000_u64).prop_map(Input::Wait),
        4 => Just(Input::Due),
        2 => (0..3_u64, anything, prop_oneof![Just(100_u64), any::<u64>()]).prop_map(
            |(incarnation, sequence, interval)| Input::Beat { incarnation, sequence, interval }
        ),
        6 => prop_oneof![4 => 0..4_u64, 1 => any::<u64>()].prop_map(Input::Next),
        3 => any::<bool>().prop_map(Input::Check),
        6 => (0..4_u8, any::<bool>()).prop_map(|(answer, known)| Input::Probed(answer, known)),
        1 => Just(Input::Refused),
        1 => Just(Input::Stopping),
        1 => Just(Input::Excuse),
        3 => Just(Input::Eject),
        1 => Just(Input::Hold),
    ]
}

fn newest(lab: &Lab) -> (u64, u64) {
    let reading = lab.detector.reading(lab.now);
    reading.incarnation.zip(reading.sequence).unwrap_or((1, 0))
}

fn apply(lab: &mut Lab, input: Input) {
    let now = lab.now;
    let step = match input {
        Input::Wait(millis) => {
            lab.now += ms(millis);
            return;
        }
        Input::Due => {
            lab.now = lab.detector.due().map_or(now, |due| due.max(now));
            lab.detector.check(ChannelState::Alive, lab.now)
        }
        Input::Beat { incarnation, sequence, interval } => {
            let beat = BeatInfo { incarnation, sequence, interval: ms(interval) };
            lab.detector.beat(&beat, now).1
        }
        Input::Next(lost) => {
            lab.now += ms(lost.min(1_000) * 100 + 100);
            let (incarnation, sequence) = newest(lab);
            let sequence = sequence.saturating_add(lost).saturating_add(1);
            let beat = BeatInfo { incarnation, sequence, interval: INTERVAL };
            lab.detector.beat(&beat, lab.now).1
        }
        Input::Check(silent) => {
            let channel = if silent { ChannelState::Silent } else { ChannelState::Alive };
            lab.detector.check(channel, now)
        }
        Input::Probed(answer, known) => {
            let id = lab.next_try.filter(|_| known).map_or(TryId(0), |asked| asked.id);
            let answers = [TryResult::Answered, failed(), TryResult::Refused, TryResult::Local];
            lab.detector.probed(id, answers[usize::from(answer)].clone(), now)
        }
        Input::Refused => lab.detector.note_connect_refused(now),
        Input::Stopping => lab.detector.stopping(now),
        Input::Excuse => lab.detector.ignore_silence_until(Duration::MAX, now),
        Input::Eject => lab.detector.eject(now),
        Input::Hold => {
            lab.detector.hold_in_rotation("a guard".to_owned());
            DetectorStep::default()
        }
    };
    lab.take(step);
}

proptest! {
    #[test]
    fn arbitrary_inputs_keep_all_values_in_range(inputs in prop::collection::vec(input(), 1..200)) {
        let mut lab = Lab::new();
        for input in inputs {
            apply(&mut lab, input);
            let now = lab.now;
            let reading = lab.detector.reading(now);
            for figure in [reading.loss, reading.loss_after_loss] {
                prop_assert!((0.0..1.0).contains(&figure), "{reading:?}");
            }
            for phi in [reading.phi_normal, reading.phi_exponential] {
                prop_assert!((0.0..=phi::PHI_MAX).contains(&phi), "{reading:?}");
            }
            prop_assert!((3..=12).contains(&reading.missing_allowed));
            prop_assert!(reading.timeout <= reading.interval.mul_f64(12.6));
            let step = lab.detector.check(ChannelState::Alive, now);
            lab.take(step);
            let due = lab.detector.due();
            prop_assert!(due.is_none_or(|due| due > now), "due {:?} late", now - due.unwrap());
            let idle = matches!(lab.detector.state(), DetectorState::Waiting | DetectorState::Down);
            prop_assert_eq!(due.is_none(), idle, "only these states have no due time");
        }
    }
}

//! Transitions of the detector after silence, probes and heartbeats.

use super::*;
use expect_test::expect;
use std::fmt::Write;

#[test]
fn first_heartbeat_and_successful_probe_make_the_backend_up() {
    let mut lab = Lab::new();
    assert_eq!((lab.detector.due(), lab.detector.weight_percent()), (None, None));
    lab.beat();
    assert_eq!(lab.detector.weight_percent(), None, "never up");
    lab.answer(TryResult::Answered);
    assert_eq!(lab.transitions, ["waiting>recovering", "recovering>up"]);
    assert_eq!(lab.detector.weight_percent(), Some(100));
}

#[test]
fn silence_makes_a_backend_suspect_and_two_failed_tries_make_it_down() {
    let mut lab = Lab::up();
    let heard = lab.now;
    lab.stop_heartbeats();
    assert_eq!(lab.detector.weight_percent(), Some(SUSPECT_WEIGHT_PERCENT));
    lab.answer(failed());
    lab.answer(failed());
    lab.eject();
    assert_eq!(lab.transitions, ["up>suspect", "suspect>down"]);
    assert!(lab.now - heard < ms(600), "{:?}", lab.now - heard);
    assert_eq!(lab.detector.weight_percent(), Some(0));
    expect!["no heartbeat for 318 ms (3 may be missing at 1.0% loss); 2 confirmation probes failed, last: connect timed out"].assert_eq(&lab.reason);
}

#[test]
fn heartbeat_clears_an_unconfirmed_suspicion() {
    let mut lab = Lab::up();
    lab.stop_heartbeats();
    lab.answer(failed());
    let late = lab.next_try;
    lab.beat_now();
    assert_eq!(lab.transitions, ["up>suspect", "suspect>up"]);
    lab.next_try = late;
    lab.answer(failed());
    assert_eq!(lab.detector.state(), DetectorState::Up, "the late result is ignored");
}

#[test]
fn silent_but_answering_backend_stays_suspect_and_is_probed_every_second() {
    let mut lab = Lab::up();
    lab.stop_heartbeats();
    for _ in 0..50 {
        lab.answer(TryResult::Answered);
        assert_eq!(lab.detector.due(), Some(lab.now + SUSPECT_PROBE_INTERVAL));
        lab.wait(SUSPECT_PROBE_INTERVAL);
    }
    assert_eq!(lab.transitions, ["up>suspect"]);
    lab.answer(failed());
    lab.answer(failed());
    lab.eject();
    assert_eq!(lab.detector.state(), DetectorState::Down, "the service has failed too");
}

#[test]
fn one_refused_probe_proves_the_failure() {
    let mut lab = Lab::up();
    lab.stop_heartbeats();
    lab.answer(TryResult::Refused);
    assert_eq!(lab.request, Some(DetectorRequest::Eject { proven: true }));
    lab.eject();
    assert_eq!(lab.detector.state(), DetectorState::Down);
}

#[test]
fn refused_connect_starts_a_probe_and_heartbeats_do_not_clear_it() {
    let mut lab = Lab::up();
    let step = lab.detector.note_connect_refused(lab.now);
    lab.take(step);
    lab.beats(5);
    assert_eq!(lab.detector.state(), DetectorState::Suspect);
    lab.answer(TryResult::Refused);
    lab.eject();
    assert_eq!(lab.transitions, ["up>suspect", "suspect>down"]);

    let mut lab = Lab::up();
    let step = lab.detector.note_connect_refused(lab.now);
    lab.take(step);
    lab.answer(TryResult::Answered);
    assert_eq!(lab.transitions, ["up>suspect", "suspect>up"], "a stray reset");
}

#[test]
fn return_needs_three_heartbeats_a_hold_down_and_a_probe() {
    let mut lab = Lab::down();
    let down_at = lab.now;
    lab.beats(2);
    lab.next_try = None;
    for _ in 0..8 {
        lab.beat();
        let held = lab.now < down_at + flap_damping::HOLD_MIN;
        assert_eq!(lab.next_try.is_none(), held, "{:?} after it went down", lab.now - down_at);
    }
    lab.answer(TryResult::Answered);
    assert_eq!(lab.transitions, ["down>recovering", "recovering>up"]);
    assert!(
        lab.reason.contains("heartbeats received and the confirmation probe succeeded"),
        "{}",
        lab.reason
    );
}

#[test]
fn failed_service_with_a_working_sender_does_not_return() {
    let mut lab = Lab::down();
    let mut probes = 0;
    for _ in 0..300 {
        lab.beat();
        if lab.next_try.is_some() {
            probes += 1;
            lab.answer(TryResult::Refused);
        }
    }
    assert_eq!(lab.transitions, ["down>recovering"]);
    assert!((20..=30).contains(&probes), "about one per second: {probes}");
}

#[test]
fn silence_ends_a_recovery() {
    let mut lab = Lab::down();
    lab.beats(2);
    lab.stop_heartbeats();
    assert_eq!(lab.transitions, ["down>recovering", "recovering>down"]);
    assert_eq!(lab.detector.due(), None);
}

#[test]
fn local_errors_and_lost_reports_are_no_evidence() {
    let mut lab = Lab::up();
    lab.stop_heartbeats();
    for _ in 0..20 {
        lab.answer(TryResult::Local);
        lab.check_at(lab.detector.due().unwrap(), ChannelState::Alive);
        // The report of this try is lost; the try is requested again.
        let lost = lab.next_try.take().unwrap();
        lab.check_at(lab.detector.due().unwrap(), ChannelState::Alive);
        assert_ne!(lab.next_try.unwrap().id, lost.id);
    }
    assert_eq!(lab.transitions, ["up>suspect"]);
}

#[test]
fn stopping_sender_is_down_at_once_and_returns_without_a_hold_down() {
    let mut lab = Lab::up();
    let step = lab.detector.stopping(lab.now);
    lab.take(step);
    assert_eq!((lab.detector.state(), lab.detector.due()), (DetectorState::Down, None));
    lab.incarnation += 1;
    lab.sequence = 0;
    lab.beats(3);
    lab.answer(TryResult::Answered);
    assert_eq!(lab.transitions, ["up>down", "down>recovering", "recovering>up"]);
    assert_eq!(lab.detector.reading(lab.now).downs_total, 0);
}

#[test]
fn local_stall_removes_no_backend() {
    let mut lab = Lab::up();
    lab.now += ms(3_000);
    let step = lab.detector.ignore_silence_until(Duration::MAX, lab.now);
    lab.take(step);
    lab.wait(ms(200));
    lab.beat_now();
    assert!(lab.transitions.is_empty(), "{:?}", lab.transitions);

    // A stall during a confirmation probe: a try that fails during it does not count.
    lab.stop_heartbeats();
    let under_way = lab.next_try;
    let step = lab.detector.ignore_silence_until(ms(300), lab.now);
    lab.take(step);
    let again = std::mem::replace(&mut lab.next_try, under_way);
    lab.answer(failed());
    lab.next_try = again;
    lab.answer(failed());
    assert_eq!(
        lab.request.as_ref().map(|request| matches!(request, DetectorRequest::Probe(_))),
        Some(true)
    );
}

#[test]
fn repeated_stalls_delay_detection_by_at_most_the_time_lost() {
    let (late, every) = (ms(300), ms(1_500));
    let took = |late: Duration| {
        let mut lab = Lab::up();
        let (began, mut lost) = (lab.now, Duration::ZERO);
        let mut next = lab.now + every;
        while lab.detector.state() != DetectorState::Down {
            assert!(lab.now < began + Duration::from_secs(20), "{:?}", lab.transitions);
            lab.now += ms(50);
            if lab.now >= next {
                (lab.now, lost) = (lab.now + late, lost + late);
                next = lab.now + every;
                let step = lab.detector.ignore_silence_until(late, lab.now);
                lab.take(step);
            }
            let step = lab.detector.check(ChannelState::Alive, lab.now);
            lab.take(step);
            if lab.next_try.is_some() {
                lab.answer(failed());
            }
            if matches!(lab.request.take(), Some(DetectorRequest::Eject { .. })) {
                let step = lab.detector.eject(lab.now);
                lab.take(step);
            }
        }
        (lab.now - began, lost)
    };
    let (usual, _) = took(Duration::ZERO);
    let (with, lost) = took(late);
    assert!(with <= usual + lost + ms(200), "{with:?} instead of {usual:?}, {lost:?} were lost");
}

#[test]
fn prevented_removal_is_requested_again_every_second() {
    let mut lab = Lab::up();
    lab.stop_heartbeats();
    lab.answer(failed());
    lab.answer(failed());
    assert!(lab.detector.hold_in_rotation("2 of 4 are down".to_owned()));
    assert!(!lab.detector.hold_in_rotation("2 of 4 are down".to_owned()), "same reason");
    assert_eq!(lab.detector.reading(lab.now).held.as_deref(), Some("2 of 4 are down"));
    assert_eq!(
        lab.detector.reconsider(lab.now).request,
        Some(DetectorRequest::Eject { proven: false })
    );
    lab.request = None;
    lab.wait(SUSPECT_PROBE_INTERVAL);
    lab.answer(failed());
    lab.answer(failed());
    lab.eject();
    assert_eq!(lab.detector.state(), DetectorState::Down);
}

#[test]
fn confirmed_and_held_backend_needs_a_heartbeat_and_a_probe_to_be_up() {
    let mut lab = Lab::up();
    lab.stop_heartbeats();
    lab.answer(failed());
    lab.answer(failed());
    lab.detector.hold_in_rotation("held".to_owned());
    lab.beat_now();
    assert_eq!(lab.detector.state(), DetectorState::Suspect);
    lab.answer(TryResult::Answered);
    assert_eq!(lab.transitions, ["up>suspect", "suspect>up"]);
}

#[test]
fn probes_decide_while_the_channel_is_silent() {
    let mut lab = Lab::up();
    let due = lab.detector.due().unwrap();
    lab.check_at(due, ChannelState::Silent);
    lab.answer(TryResult::Answered);
    lab.check_at(lab.detector.due().unwrap(), ChannelState::Silent);
    assert!(lab.transitions.is_empty(), "silence alone is no evidence");
    lab.answer(failed());
    lab.answer(failed());
    assert_eq!(lab.transitions, ["up>suspect"]);
    lab.eject();
    assert_eq!(lab.detector.state(), DetectorState::Down);
}

#[test]
fn hold_down_doubles_with_each_failure() {
    let mut lab = Lab::down();
    let mut holds = Vec::new();
    for _ in 0..8 {
        let down_at = lab.now;
        lab.next_try = None;
        while lab.next_try.is_none() {
            lab.beat();
        }
        holds.push((lab.now - down_at).as_secs());
        lab.answer(TryResult::Answered);
        lab.stop_heartbeats();
        lab.answer(failed());
        lab.answer(failed());
        lab.eject();
    }
    assert_eq!(holds, [1, 2, 4, 8, 16, 32, 60, 60]);
}

type Build = fn() -> Lab;
type Event = fn(&mut Lab) -> DetectorStep;

#[test]
fn every_state_and_event() {
    let labs: [(&str, Build); 7] = [
        ("waiting", Lab::new),
        ("up", Lab::up),
        ("suspect", || {
            let mut lab = Lab::up();
            lab.stop_heartbeats();
            lab
        }),
        ("answering", || {
            let mut lab = Lab::up();
            lab.stop_heartbeats();
            lab.answer(TryResult::Answered);
            lab
        }),
        ("held", || {
            let mut lab = Lab::up();
            lab.stop_heartbeats();
            lab.answer(failed());
            lab.answer(failed());
            lab.detector.hold_in_rotation("held".to_owned());
            lab
        }),
        ("down", Lab::down),
        ("recovering", || {
            let mut lab = Lab::down();
            lab.beats(1);
            lab.now += ms(1_000);
            lab
        }),
    ];
    let events: [(&str, Event); 6] = [
        ("heartbeat", |lab| {
            let Lab { incarnation, sequence, now, .. } = *lab;
            let sequence = sequence + 20;
            lab.detector.beat(&BeatInfo { incarnation, sequence, interval: INTERVAL }, now).1
        }),
        ("2 s late", |lab| lab.detector.check(ChannelState::Alive, lab.now + ms(2_000))),
        ("refused", |lab| lab.detector.note_connect_refused(lab.now)),
        ("stopping", |lab| lab.detector.stopping(lab.now)),
        ("excuse", |lab| lab.detector.ignore_silence_until(Duration::MAX, lab.now)),
        ("eject", |lab| lab.detector.eject(lab.now)),
    ];
    let mut out = format!("{:<11}", "");
    for (name, _) in events {
        write!(out, "{name:<19}").unwrap();
    }
    for (name, build) in labs {
        write!(out, "\n{name:<11}").unwrap();
        for (_, event) in events {
            let mut lab = build();
            let step = event(&mut lab);
            let asks = match step.request {
                Some(DetectorRequest::Probe(_)) => " + probe",
                Some(DetectorRequest::Eject { .. }) => " + eject",
                None => "",
            };
            let cell = match step.change {
                Some(change) => format!("{}{asks}", change.to.name()),
                None => format!("-{asks}"),
            };
            write!(out, "{cell:<19}").unwrap();
        }
    }
    let out: Vec<&str> = out.lines().map(str::trim_end).collect();
    expect![[r#"
                   heartbeat          2 s late           refused            stopping           excuse             eject
        waiting    recovering + probe -                  -                  down               -                  -
        up         -                  suspect + probe    suspect + probe    down               -                  -
        suspect    up                 - + probe          -                  down               - + probe          -
        answering  up                 - + probe          - + probe          down               -                  -
        held       - + probe          - + probe          -                  down               -                  down
        down       recovering         -                  -                  -                  -                  -
        recovering -                  down               -                  down               -                  -"#]].assert_eq(&out.join("\n"));
}

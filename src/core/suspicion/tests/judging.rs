//! What the state machine makes of silence, probes and heartbeats.

use super::*;
use expect_test::expect;
use std::fmt::Write;

#[test]
fn the_first_heartbeat_and_an_answered_probe_make_it_up() {
    let mut lab = Lab::new();
    assert_eq!((lab.detector.due(), lab.detector.weight_percent()), (None, None));
    lab.beat();
    assert_eq!(lab.detector.weight_percent(), None, "still no opinion");
    lab.answer(TryResult::Answered);
    assert_eq!(lab.story, ["waiting>recovering", "recovering>up"]);
    assert_eq!(lab.detector.weight_percent(), Some(100));
}

#[test]
fn silence_makes_a_suspect_that_two_failed_tries_confirm() {
    let mut lab = Lab::up();
    let heard = lab.now;
    lab.fall_silent();
    assert_eq!(lab.detector.weight_percent(), Some(SUSPECT_WEIGHT_PERCENT));
    lab.answer(failed());
    lab.answer(failed());
    lab.eject();
    assert_eq!(lab.story, ["up>suspect", "suspect>down"]);
    assert!(lab.now - heard < ms(600), "{:?}", lab.now - heard);
    assert_eq!(lab.detector.weight_percent(), Some(0));
    expect!["no heartbeat for 318 ms (3 may be missing at 1.0% loss); 2 confirmation probes failed, last: connect timed out"].assert_eq(&lab.reason);
}

#[test]
fn a_heartbeat_clears_a_suspicion_that_was_not_confirmed() {
    let mut lab = Lab::up();
    lab.fall_silent();
    lab.answer(failed());
    let late = lab.asked;
    lab.beat_now();
    assert_eq!(lab.story, ["up>suspect", "suspect>up"]);
    lab.asked = late;
    lab.answer(failed());
    assert_eq!(lab.detector.state(), DetectorState::Up, "a result nobody waits for");
}

#[test]
fn a_backend_that_is_silent_but_answers_stays_suspect_and_is_probed_every_second() {
    let mut lab = Lab::up();
    lab.fall_silent();
    for _ in 0..50 {
        lab.answer(TryResult::Answered);
        assert_eq!(lab.detector.due(), Some(lab.now + DOUBT_INTERVAL));
        lab.wait(DOUBT_INTERVAL);
    }
    assert_eq!(lab.story, ["up>suspect"]);
    lab.answer(failed());
    lab.answer(failed());
    lab.eject();
    assert_eq!(lab.detector.state(), DetectorState::Down, "now the service died, too");
}

#[test]
fn a_refused_probe_decides_at_once_and_is_proof() {
    let mut lab = Lab::up();
    lab.fall_silent();
    lab.answer(TryResult::Refused);
    assert_eq!(lab.ask, Some(DetectorRequest::Eject { proven: true }));
    lab.eject();
    assert_eq!(lab.detector.state(), DetectorState::Down);
}

#[test]
fn a_refused_connect_is_probed_at_once_and_heartbeats_do_not_clear_it() {
    let mut lab = Lab::up();
    let step = lab.detector.note_connect_refused(lab.now);
    lab.take(step);
    lab.beats(5);
    assert_eq!(lab.detector.state(), DetectorState::Suspect);
    lab.answer(TryResult::Refused);
    lab.eject();
    assert_eq!(lab.story, ["up>suspect", "suspect>down"]);

    let mut lab = Lab::up();
    let step = lab.detector.note_connect_refused(lab.now);
    lab.take(step);
    lab.answer(TryResult::Answered);
    assert_eq!(lab.story, ["up>suspect", "suspect>up"], "a stray reset");
}

#[test]
fn coming_back_takes_three_heartbeats_a_hold_down_and_a_probe() {
    let mut lab = Lab::down();
    let down_at = lab.now;
    lab.beats(2);
    lab.asked = None;
    for _ in 0..8 {
        lab.beat();
        let held = lab.now < down_at + flap_damping::HOLD_MIN;
        assert_eq!(lab.asked.is_none(), held, "{:?} after it fell", lab.now - down_at);
    }
    lab.answer(TryResult::Answered);
    assert_eq!(lab.story, ["down>recovering", "recovering>up"]);
    assert!(
        lab.reason.contains("heartbeats received and the confirmation probe succeeded"),
        "{}",
        lab.reason
    );
}

#[test]
fn a_service_that_stays_dead_beside_its_sender_is_not_let_back() {
    let mut lab = Lab::down();
    let mut probes = 0;
    for _ in 0..300 {
        lab.beat();
        if lab.asked.is_some() {
            probes += 1;
            lab.answer(TryResult::Refused);
        }
    }
    assert_eq!(lab.story, ["down>recovering"]);
    assert!((20..=30).contains(&probes), "about one a second: {probes}");
}

#[test]
fn silence_during_recovery_ends_it() {
    let mut lab = Lab::down();
    lab.beats(2);
    lab.fall_silent();
    assert_eq!(lab.story, ["down>recovering", "recovering>down"]);
    assert_eq!(lab.detector.due(), None);
}

#[test]
fn trouble_of_our_own_and_lost_reports_prove_nothing() {
    let mut lab = Lab::up();
    lab.fall_silent();
    for _ in 0..20 {
        lab.answer(TryResult::Local);
        lab.check_at(lab.detector.due().unwrap(), ChannelState::Alive);
        // The report of this one never comes; it is asked for again.
        let lost = lab.asked.take().unwrap();
        lab.check_at(lab.detector.due().unwrap(), ChannelState::Alive);
        assert_ne!(lab.asked.unwrap().id, lost.id);
    }
    assert_eq!(lab.story, ["up>suspect"]);
}

#[test]
fn a_sender_that_stops_is_out_at_once_and_back_without_a_hold_down() {
    let mut lab = Lab::up();
    let step = lab.detector.stopping(lab.now);
    lab.take(step);
    assert_eq!((lab.detector.state(), lab.detector.due()), (DetectorState::Down, None));
    lab.incarnation += 1;
    lab.sequence = 0;
    lab.beats(3);
    lab.answer(TryResult::Answered);
    assert_eq!(lab.story, ["up>down", "down>recovering", "recovering>up"]);
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
    assert!(lab.story.is_empty(), "{:?}", lab.story);

    // In the midst of a confirming probe: what fails meanwhile counts for nothing.
    lab.fall_silent();
    let under_way = lab.asked;
    let step = lab.detector.ignore_silence_until(ms(300), lab.now);
    lab.take(step);
    let again = std::mem::replace(&mut lab.asked, under_way);
    lab.answer(failed());
    lab.asked = again;
    lab.answer(failed());
    assert_eq!(lab.ask.as_ref().map(|ask| matches!(ask, DetectorRequest::Probe(_))), Some(true));
}

#[test]
fn being_late_again_and_again_puts_a_verdict_off_by_the_time_lost_and_no_more() {
    let (late, every) = (ms(300), ms(1_500));
    let took = |late: Duration| {
        let mut lab = Lab::up();
        let (began, mut lost) = (lab.now, Duration::ZERO);
        let mut next = lab.now + every;
        while lab.detector.state() != DetectorState::Down {
            assert!(lab.now < began + Duration::from_secs(20), "{:?}", lab.story);
            lab.now += ms(50);
            if lab.now >= next {
                (lab.now, lost) = (lab.now + late, lost + late);
                next = lab.now + every;
                let step = lab.detector.ignore_silence_until(late, lab.now);
                lab.take(step);
            }
            let step = lab.detector.check(ChannelState::Alive, lab.now);
            lab.take(step);
            if lab.asked.is_some() {
                lab.answer(failed());
            }
            if matches!(lab.ask.take(), Some(DetectorRequest::Eject { .. })) {
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
fn what_the_guards_hold_back_is_asked_for_again_every_second() {
    let mut lab = Lab::up();
    lab.fall_silent();
    lab.answer(failed());
    lab.answer(failed());
    assert!(lab.detector.hold_in_rotation("2 of 4 are down".to_owned()));
    assert!(!lab.detector.hold_in_rotation("2 of 4 are down".to_owned()), "no news");
    assert_eq!(lab.detector.reading(lab.now).held.as_deref(), Some("2 of 4 are down"));
    assert_eq!(
        lab.detector.reconsider(lab.now).ask,
        Some(DetectorRequest::Eject { proven: false })
    );
    lab.ask = None;
    lab.wait(DOUBT_INTERVAL);
    lab.answer(failed());
    lab.answer(failed());
    lab.eject();
    assert_eq!(lab.detector.state(), DetectorState::Down);
}

#[test]
fn what_was_confirmed_and_held_needs_a_heartbeat_and_a_probe() {
    let mut lab = Lab::up();
    lab.fall_silent();
    lab.answer(failed());
    lab.answer(failed());
    lab.detector.hold_in_rotation("held".to_owned());
    lab.beat_now();
    assert_eq!(lab.detector.state(), DetectorState::Suspect);
    lab.answer(TryResult::Answered);
    assert_eq!(lab.story, ["up>suspect", "suspect>up"]);
}

#[test]
fn without_any_heartbeats_probes_decide() {
    let mut lab = Lab::up();
    let due = lab.detector.due().unwrap();
    lab.check_at(due, ChannelState::Silent);
    lab.answer(TryResult::Answered);
    lab.check_at(lab.detector.due().unwrap(), ChannelState::Silent);
    assert!(lab.story.is_empty(), "silence alone says nothing now");
    lab.answer(failed());
    lab.answer(failed());
    assert_eq!(lab.story, ["up>suspect"]);
    lab.eject();
    assert_eq!(lab.detector.state(), DetectorState::Down);
}

#[test]
fn a_backend_that_keeps_failing_is_held_down_longer_each_time() {
    let mut lab = Lab::down();
    let mut holds = Vec::new();
    for _ in 0..8 {
        let down_at = lab.now;
        lab.asked = None;
        while lab.asked.is_none() {
            lab.beat();
        }
        holds.push((lab.now - down_at).as_secs());
        lab.answer(TryResult::Answered);
        lab.fall_silent();
        lab.answer(failed());
        lab.answer(failed());
        lab.eject();
    }
    assert_eq!(holds, [1, 2, 4, 8, 16, 32, 60, 60]);
}

type Build = fn() -> Lab;
type Event = fn(&mut Lab) -> DetectorStep;

#[test]
fn the_whole_matrix() {
    let labs: [(&str, Build); 7] = [
        ("waiting", Lab::new),
        ("up", Lab::up),
        ("suspect", || {
            let mut lab = Lab::up();
            lab.fall_silent();
            lab
        }),
        ("answering", || {
            let mut lab = Lab::up();
            lab.fall_silent();
            lab.answer(TryResult::Answered);
            lab
        }),
        ("held", || {
            let mut lab = Lab::up();
            lab.fall_silent();
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
            let asks = match step.ask {
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

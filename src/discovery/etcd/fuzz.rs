//! Entry point of the fuzz target in `tests/fuzz`: any bytes to the decoders of etcd.
//!
//! Built only for tests and for the fuzzer. It panics if a decoder violates a guarantee: the
//! lines do not depend on how the network cuts them, the contents have bounds, and every
//! member is usable.

use super::codec::{GatewayRefusal, RangeAnswer, ReadTransactionAnswer, StreamLine, WatchMessage};
use super::contents::PrefixContents;
use super::followed::Followed;
use crate::lines::lines_of;
use crate::listing::fuzz::assert_usable;
use tidegate_core::control::MEMBERS_MAX;
use tidegate_net::clock;

/// All keys that count begin with it.
const PREFIX: &str = "/web/";

/// Passes `data` to the decoder that the first byte selects.
pub fn check(data: &[u8]) {
    let Some((way, data)) = data.split_first() else { return };
    match way % 4 {
        0 | 1 => check_stream(data, usize::from(way / 4) + 1),
        2 => check_list(data),
        _ => {
            let refusal = GatewayRefusal::of_answer(u16::from(way / 4) + 400, data);
            assert_eq!(refusal, GatewayRefusal::of_answer(u16::from(way / 4) + 400, data));
        }
    }
}

/// `step` is the number of bytes that the network gives at once.
fn check_stream(data: &[u8], step: usize) {
    let lines = lines_of(data, step);
    let mut contents = PrefixContents::new(PREFIX.into());
    let mut followed = Followed::new(PREFIX.into());
    for (line, created) in lines.iter().zip(0..) {
        let Ok(StreamLine::Watch(message)) = parse(line) else { continue };
        assert!(!message.created || message.position(created) == Some(created));
        if message.canceled {
            let _ = GatewayRefusal::of_cancel(&message);
        }
        let revision = contents.revision();
        contents.apply(again(line).events);
        assert!(contents.revision() >= revision);
        check_contents(&contents);
        followed.take_events(message);
        check_followed(&mut followed);
    }
}

/// Parses a line twice.
fn parse(line: &[u8]) -> Result<StreamLine, serde_json::Error> {
    let parsed = StreamLine::parse(line);
    assert_eq!(parsed.as_ref().ok(), StreamLine::parse(line).ok().as_ref());
    parsed
}

fn again(line: &[u8]) -> WatchMessage {
    match StreamLine::parse(line) {
        Ok(StreamLine::Watch(message)) => message,
        other => panic!("{other:?}"),
    }
}

fn check_list(data: &[u8]) {
    let _ = serde_json::from_slice::<ReadTransactionAnswer>(data);
    let Ok(answer) = serde_json::from_slice::<RangeAnswer>(data) else { return };
    let again: RangeAnswer = serde_json::from_slice(data).expect("it was parsed");
    assert_eq!(answer, again);
    let revision = answer.header.revision;
    let mut contents = PrefixContents::new(PREFIX.into());
    contents.replace(again.kvs, again.count, revision);
    assert_eq!(contents.revision(), revision);
    check_contents(&contents);
    let mut followed = Followed::new(PREFIX.into());
    let (_, sent) = followed.check();
    followed.take_check(&sent, &answer, revision);
    followed.take_list(answer.kvs, answer.count, revision);
    check_followed(&mut followed);
}

fn check_followed(followed: &mut Followed) {
    let watch = followed.watch(1);
    assert!(watch.start_revision >= followed.revision());
    let (request, _) = followed.check();
    assert_eq!(request.min_mod_revision, watch.start_revision);
    followed.tell_due(clock::now(), true);
}

fn check_contents(contents: &PrefixContents) {
    let whole = contents.whole(true);
    assert!(whole.members.len() <= MEMBERS_MAX && contents.count() >= 0);
    assert!(i64::from(whole.unreadable.count()) <= contents.count());
    whole.members.iter().for_each(assert_usable);
}

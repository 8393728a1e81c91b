//! Entry point of the fuzz target in `tests/fuzz`: any bytes to the decoders of ZooKeeper.
//!
//! Built only for tests and for the fuzzer. It panics if a decoder violates a guarantee: the
//! frames do not depend on how the network cuts them, a value is never larger than its
//! frame, and every member is usable.

use super::codec::member;
use super::frames::FrameBuffer;
use super::watches::ZkWatches;
use super::wire::{
    BadFrame, CHILDREN_MAX, XID_EVENT, ZkReply, ZkRequest, read_event, read_header, read_reply,
    read_welcome,
};
use crate::listing::fuzz::assert_usable;
use tidegate_core::model::ZookeeperFormat;

/// Passes `data` to the decoder that the first byte selects.
pub fn check(data: &[u8]) {
    let Some((way, data)) = data.split_first() else { return };
    match way % 4 {
        0 | 1 => check_connection(data, usize::from(way / 4) + 1),
        2 => check_member(ZookeeperFormat::Json, data),
        _ => check_member(ZookeeperFormat::Curator, data),
    }
}

fn check_member(format: ZookeeperFormat, content: &[u8]) {
    let decoded = member(format, "child", content);
    assert_eq!(decoded, member(format, "child", content));
    match decoded {
        Ok(member) => assert_usable(&member),
        Err(problem) => assert!(!problem.is_empty()),
    }
}

/// `step` is the number of bytes that the network gives at once.
fn check_connection(data: &[u8], step: usize) {
    let (frames, end) = frames(data, data.len().max(1));
    assert_eq!((&frames, end), (&self::frames(data, step).0, end));
    let mut frames = frames.iter();
    let Some(first) = frames.next() else { return };
    assert_eq!(read_welcome(first), read_welcome(first));
    let watches = ZkWatches::default();
    let watch = watches.watch("/web");
    for (number, frame) in (0..).zip(frames) {
        let Ok((header, rest)) = read_header(frame) else { continue };
        if header.xid == XID_EVENT {
            let event = read_event(rest);
            assert_eq!(event, read_event(rest));
            event.iter().for_each(|event| watches.event(event));
        } else {
            check_reply(&request(number), rest);
        }
    }
    let changes = watch.take();
    assert!(changes.nodes.iter().all(|name| !name.is_empty() && !name.contains('/')));
}

fn request(number: usize) -> ZkRequest {
    let (path, watch) = ("/web".to_owned(), true);
    match number % 4 {
        0 => ZkRequest::Children { path, watch },
        1 => ZkRequest::Data { path, watch },
        2 => ZkRequest::Exists { path, watch },
        _ => ZkRequest::Sync { path },
    }
}

fn check_reply(request: &ZkRequest, rest: &[u8]) {
    let reply = read_reply(request, rest);
    assert_eq!(reply, read_reply(request, rest));
    match reply {
        Ok(ZkReply::Children(names, _)) => {
            let bytes: usize = names.iter().map(|name| 4 + name.len()).sum();
            assert!(bytes <= rest.len() && names.len() <= CHILDREN_MAX);
        }
        Ok(ZkReply::Data(content)) => assert!(content.len() <= rest.len()),
        Ok(ZkReply::Done | ZkReply::Exists(_)) | Err(_) => {}
    }
}

/// Returns the frames, and how the connection ends.
fn frames(data: &[u8], step: usize) -> (Vec<Vec<u8>>, Option<BadFrame>) {
    let mut buffer = FrameBuffer::default();
    let mut frames = Vec::new();
    for part in data.chunks(step) {
        buffer.space().extend_from_slice(part);
        loop {
            match buffer.next() {
                Ok(Some(frame)) => frames.push(frame),
                Ok(None) => break,
                Err(bad) => return (frames, Some(bad)),
            }
        }
    }
    (frames, None)
}

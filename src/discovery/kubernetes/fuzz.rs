//! Entry point of the fuzz target in `tests/fuzz`: any bytes to the decoders of Kubernetes.
//!
//! Built only for tests and for the fuzzer. It panics if a decoder violates a guarantee: the
//! events do not depend on how the network cuts them, and every member is usable.

use super::codec::{self, SliceEvent, SliceFacts};
use super::config;
use super::picture::{SETTLE, SlicePicture, parts};
use crate::lines::lines_of;
use std::collections::BTreeSet;
use std::path::Path;
use tidegate_core::control::MEMBERS_MAX;
use tidegate_net::clock;

/// Passes `data` to the decoder that the first byte selects.
pub fn check(data: &[u8]) {
    let Some((way, data)) = data.split_first() else { return };
    let port = [None, Some("http"), Some("8080")][usize::from(way / 4) % 3];
    match way % 4 {
        0 => check_page(data, port),
        1 | 2 => check_watch(data, usize::from(way / 4) + 1, port),
        _ => check_kubeconfig(data),
    }
}

fn check_page(data: &[u8], port: Option<&str>) {
    let status = codec::status(data);
    assert!(status.message.len() + status.reason.len() <= data.len());
    let Ok((metadata, slices)) = codec::page(data, port) else { return };
    let (again, same) = codec::page(data, port).expect("it was parsed");
    assert_eq!(
        (&again.resource_version, &again.next, &same),
        (&metadata.resource_version, &metadata.next, &slices)
    );
    assert!(parts(&slices) <= data.len());
    let mut picture = SlicePicture::default();
    picture.replace(slices);
    check_picture(&mut picture);
}

/// `step` is the number of bytes that the network gives at once.
fn check_watch(data: &[u8], step: usize, port: Option<&str>) {
    let lines = lines_of(data, step);
    let mut picture = SlicePicture::default();
    for line in &lines {
        let event = codec::event(line, port);
        assert_eq!(event.as_ref().ok(), codec::event(line, port).ok().as_ref());
        match event {
            Ok(Some(SliceEvent::Put(slice))) => {
                check_slice(&slice);
                picture.put(slice);
                check_picture(&mut picture);
            }
            Ok(Some(SliceEvent::Deleted { name, .. })) => picture.delete(&name),
            _ => {}
        }
    }
    check_picture(&mut picture);
}

fn check_slice(slice: &SliceFacts) {
    for endpoint in &slice.endpoints {
        let ip = endpoint.address.ip();
        assert!(endpoint.address.port() != 0 && ip == ip.to_canonical(), "{endpoint:?}");
        assert!(!ip.is_unspecified() && !ip.is_multicast(), "{endpoint:?}");
        assert!((1..=253).contains(&endpoint.name.len()), "{endpoint:?}");
    }
}

fn check_picture(picture: &mut SlicePicture) {
    let now = clock::now();
    let shown = picture.show(now);
    assert!(shown.members.len() <= MEMBERS_MAX);
    let names: BTreeSet<&str> = shown.members.iter().map(|member| &*member.name).collect();
    assert_eq!(names.len(), shown.members.len());
    assert_eq!(picture.show(now).members, shown.members);
    // Nothing that is missing stays.
    let later = picture.show(now + SETTLE);
    assert!(later.until.is_none() && later.members.len() <= picture.size());
}

fn check_kubeconfig(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let dir = Path::new("/etc/tidegate");
    match config::kubeconfig(text, dir) {
        Ok(context) => {
            let server = context.server.expect("a context has a server");
            assert!(!server.to_string().is_empty());
            assert!(context.prefix.is_empty() || context.prefix.starts_with('/'));
            assert!(!context.prefix.ends_with('/'));
        }
        Err(problem) => assert!(!problem.is_empty()),
    }
    let _ = config::in_cluster(Some(text), Some("443"));
}

//! The viewers, grouped by selection. Each text is written once per group.
//!
//! Owned by `driver`, which moves it to a blocking thread for the work. Dropping a group ends
//! its streams.

use super::super::snapshot::AdminSnapshot;
use super::changes::{Change, ShownToViewers};
use super::picture::Picture;
use super::selection::StreamSelection;
use super::viewer::StreamViewer;
use hyper::body::Bytes;
use serde::Serialize;
use std::collections::HashMap;
use std::sync::Arc;
use tidegate_net::clock;

/// See the module's documentation.
#[derive(Debug)]
pub(super) struct StreamGroups {
    node: String,
    groups: HashMap<StreamSelection, ViewerGroup>,
}

/// The viewers of one selection.
#[derive(Debug, Default)]
struct ViewerGroup {
    shown: Option<ShownToViewers>,
    /// Viewers that have a snapshot.
    viewers: Vec<Arc<StreamViewer>>,
    /// Viewers that wait for their first snapshot.
    joined: Vec<Arc<StreamViewer>>,
}

// === impl StreamGroups ===

impl StreamGroups {
    pub(super) fn new() -> StreamGroups {
        let node = rustix::system::uname().nodename().to_string_lossy().into_owned();
        StreamGroups { node, groups: HashMap::new() }
    }

    pub(super) fn add(&mut self, selection: StreamSelection, viewer: Arc<StreamViewer>) {
        self.groups.entry(selection).or_default().joined.push(viewer);
    }

    /// Forgets ended streams, and groups without a viewer.
    pub(super) fn forget_ended(&mut self) {
        self.groups.retain(|_, group| {
            group.viewers.retain(|viewer| !viewer.has_ended());
            group.joined.retain(|viewer| !viewer.has_ended());
            !(group.viewers.is_empty() && group.joined.is_empty())
        });
    }

    pub(super) fn is_empty(&self) -> bool {
        self.groups.is_empty()
    }

    /// Sends texts to every viewer that has a snapshot.
    pub(super) fn send_to_all(&self, texts: &[Bytes]) {
        self.groups.values().for_each(|group| send(&group.viewers, texts, false));
    }

    /// Sends what every viewer needs to have this snapshot; a delta only if `regular`.
    pub(super) fn advance(&mut self, snapshot: &Arc<AdminSnapshot>, regular: bool) {
        let picture = Picture::of(Arc::clone(snapshot), &self.node);
        for (selection, group) in &mut self.groups {
            group.advance(&picture, selection, regular);
        }
    }
}

// === impl ViewerGroup ===

impl ViewerGroup {
    fn advance(&mut self, picture: &Picture, selection: &StreamSelection, regular: bool) {
        // Pools whose members change all the time cost one snapshot per second.
        let waits = |shown: &ShownToViewers| !regular && !shown.is_of(picture);
        if !self.viewers.is_empty() && self.shown.as_ref().is_some_and(waits) {
            return;
        }
        let changes = match &mut self.shown {
            Some(shown) if !self.viewers.is_empty() => shown.advance(picture, selection, regular),
            _ => None,
        };
        let (Some(changes), Some(shown)) = (changes, &self.shown) else {
            let (snapshot, shown) = ShownToViewers::begin(picture, selection);
            self.shown = Some(shown);
            self.viewers.append(&mut self.joined);
            send(&self.viewers, &[sse_text("snapshot", &snapshot)], true);
            return;
        };
        let texts: Vec<Bytes> = changes.iter().map(Change::text).collect();
        send(&self.viewers, &texts, false);
        if !self.joined.is_empty() {
            let snapshot = sse_text("snapshot", &shown.snapshot(picture));
            send(&self.joined, &[snapshot], true);
            self.viewers.append(&mut self.joined);
        }
    }
}

impl Drop for ViewerGroup {
    fn drop(&mut self) {
        self.viewers.iter().chain(&self.joined).for_each(|viewer| viewer.end());
    }
}

// === impl Change ===

impl Change {
    fn text(&self) -> Bytes {
        match self {
            Change::Transition(document) => sse_text("transition", document),
            Change::Delta(document) => sse_text("delta", document),
        }
    }
}

fn send(viewers: &[Arc<StreamViewer>], texts: &[Bytes], snapshot: bool) {
    let now = clock::now();
    for viewer in viewers {
        texts.iter().for_each(|text| viewer.send(text, snapshot, now));
    }
}

/// Returns one server-sent event.
pub(super) fn sse_text(name: &str, document: &impl Serialize) -> Bytes {
    let data = serde_json::to_string(document).expect("plain data always serialises");
    format!("event: {name}\ndata: {data}\n\n").into()
}

//! Moves keys that all sections of a kind have alike to `[defaults]`, as the sections of HAProxy
//! share theirs.
//!
//! Called by `lib` before `write`. The meaning stays the same: a key moves only if all of several
//! sections of its kind have it with the same value.

use crate::draft::{Draft, DraftKey, DraftKeys};

/// The tables of `[defaults]`.
#[derive(Debug, Default)]
pub(crate) struct DraftDefaults {
    pub(crate) frontend: DraftKeys,
    pub(crate) pool: DraftKeys,
    pub(crate) probe: DraftKeys,
}

/// Keys of a pool that cannot be defaults.
const OF_ONE_POOL: &[&str] = &["of", "role"];

/// Keys that stay in a probe: without them it is hard to see what the probe does.
const OF_ONE_PROBE: &[&str] = &["kind", "steps", "path", "send", "expect", "tls", "port"];

/// Takes the shared keys out of the sections.
pub(crate) fn take_shared(draft: &mut Draft) -> DraftDefaults {
    let frontends = draft.frontends.iter_mut().map(|frontend| &mut frontend.keys);
    let frontend = shared(frontends.collect(), &[]);
    let probed = draft.pools.iter_mut().filter(|pool| !pool.probe.is_empty());
    let probe = shared(probed.map(|pool| &mut pool.probe).collect(), OF_ONE_PROBE);
    let pool = shared(draft.pools.iter_mut().map(|pool| &mut pool.keys).collect(), OF_ONE_POOL);
    DraftDefaults { frontend, pool, probe }
}

fn shared(mut sections: Vec<&mut DraftKeys>, own: &[&str]) -> DraftKeys {
    let mut shared = DraftKeys::default();
    let [first, second, ..] = &sections[..] else { return shared };
    let mut alike = first.0.clone();
    alike.retain(|key| !own.contains(&key.name) && second.get(key.name).is_some());
    for DraftKey { name, value, .. } in alike {
        if sections.iter().any(|section| section.get(name) != Some(&*value)) {
            continue;
        }
        let mut at = Vec::new();
        for section in &mut sections {
            section.0.retain(|key| {
                let moves = key.name == name;
                at.extend(key.at.iter().copied().filter(|_| moves));
                !moves
            });
        }
        at.sort_unstable();
        at.dedup();
        shared.set(name, value, &at);
    }
    shared
}

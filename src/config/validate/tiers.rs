//! `tier` and `backup` of a backend, `tiers` and `on_recover` of a pool.
//!
//! Called by `backends`, `pool` and `follow`. A rule that can have no effect is an error where the pool
//! sets it. A default of the file has no effect there.

use std::collections::BTreeSet;
use std::ops::Range;

use super::pool::others_join;
use crate::diagnose::ProblemCollector;
use crate::file::Section;
use crate::value::{self, ValueError};
use tidegate_core::model::{Backups, OnRecover, PoolConfig, TIER_MAX, Tiers};

/// Reads the tier of a backend.
pub(super) fn of_backend(backend: &Section<'_, '_>) -> u8 {
    let (tier, backup) = (backend.integer("tier", 0..=TIER_MAX), backend.boolean("backup"));
    let (place, backup_place) = (tier.place(), backup.place());
    let (given, is_backup) = (tier.or(0), backup.or(false));
    let Some(place) = place else { return u8::from(is_backup) };
    if backup_place.is_some() && given != u8::from(is_backup) {
        let message = format!(
            "tier = {given} contradicts backup = {is_backup}, which is tier {}",
            u8::from(is_backup)
        );
        backend.report.error(place, ValueError::new(message).help("write one of the two keys"));
    }
    given
}

/// Places of the keys that need several tiers, if the pool itself sets them.
#[derive(Default)]
pub(super) struct TierPlaces {
    tiers: Option<Range<usize>>,
    on_recover: Option<Range<usize>>,
}

/// Reads `tiers` and `on_recover`, and checks them against the backends of the pool.
pub(super) fn of_pool(pool: &Section<'_, '_>, model: &mut PoolConfig) -> TierPlaces {
    model.tiers = pool.choice("tiers").or(Tiers::Strict);
    let on_recover = pool.text("on_recover", "a string", value::on_recover);
    model.on_recover = on_recover.or(OnRecover::Keep);
    if model.tiers == Tiers::Spill
        && model.backups == Backups::One
        && let Some(place) = pool.key_place("backups").or_else(|| pool.value_place("tiers"))
    {
        let message = "backups = \"one\" has no effect with tiers = \"spill\"";
        let help = "with \"spill\", backups serve together with the backends of lower tiers";
        pool.report.error(place, ValueError::new(message).help(help));
    }
    let places =
        TierPlaces { tiers: pool.key_place("tiers"), on_recover: pool.key_place("on_recover") };
    if model.of.is_none() && !others_join(model) {
        for key in without_effect(pool.report, model, &places) {
            pool.ignore_default(key);
        }
    }
    places
}

/// Reports rules that have no effect because all backends have the same tier, and removes them
/// from the model. Returns their keys.
pub(super) fn without_effect(
    report: &ProblemCollector<'_>,
    model: &mut PoolConfig,
    places: &TierPlaces,
) -> Vec<&'static str> {
    let mut keys = Vec::new();
    if model.backends.is_empty() {
        return keys;
    }
    let tiers: BTreeSet<u8> = model.backends.iter().map(|backend| backend.tier).collect();
    let several = tiers.len() > 1;
    let backups = model.backends.iter().filter(|backend| backend.tier > 0).count();
    let one_of_several = model.backups == Backups::One && backups > 1;
    let mut remove = |key: &'static str, place: &Option<Range<usize>>| {
        keys.push(key);
        if let Some(place) = place {
            let message =
                format!("{key} has no effect: all backends of the pool have the same tier");
            let help = "write tier = 1 or backup = true for the backends that wait";
            report.error(place.clone(), ValueError::new(message).help(help));
        }
    };
    if model.tiers == Tiers::Spill && !several {
        model.tiers = Tiers::Strict;
        remove("tiers", &places.tiers);
    }
    if model.on_recover != OnRecover::Keep && !several && !one_of_several {
        model.on_recover = OnRecover::Keep;
        remove("on_recover", &places.on_recover);
    }
    keys
}

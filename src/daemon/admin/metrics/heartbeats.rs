//! Metrics of heartbeats: the receiver, the guards of each pool, and the detector of each
//! backend.
//!
//! Called by the metrics renderer. Pure. Backends of pools without heartbeats have only
//! the series for suspicion and slow start.

use super::BackendRow;
use super::encoder::{Encoder, Family, counter, gauge};
use crate::admin::snapshot::AdminSnapshot;
use tidegate_core::control::{BackendHeartbeatStatus, BackendStatus};
use tidegate_core::health::{HeartbeatHealth, Observation};

#[rustfmt::skip]
mod families {
    use super::{Family, counter, gauge};

    pub(super) const PUBLISHED: Family = counter("tidegate_tables_published_total", "Routing tables published to the workers, by reason.");
    pub(super) const NONE_ELIGIBLE: Family = gauge("tidegate_pool_none_eligible", "1 if no backend of the pool is eligible and when_none_eligible applies, else 0.");
    pub(super) const FROZEN: Family = gauge("tidegate_pool_frozen", "1 if silent backends of the pool stay in rotation because many became silent together, else 0.");
    pub(super) const REGISTERED: Family = gauge("tidegate_pool_registered", "Backends registered in the pool by heartbeats.");
    pub(super) const ACCEPTED: Family = counter("tidegate_heartbeats_total", "Heartbeats accepted.");
    pub(super) const REJECTED: Family = counter("tidegate_heartbeats_rejected_total", "Heartbeats rejected, by reason.");
    pub(super) const KERNEL_DROPS: Family = counter("tidegate_heartbeat_kernel_drops_total", "Heartbeats dropped by the kernel because the receive buffer was full.");
    pub(super) const EXCUSES: Family = counter("tidegate_heartbeat_excuses_total", "Times part of the silence of all senders was ignored because the process was late or the kernel dropped heartbeats.");
    pub(super) const SILENT: Family = gauge("tidegate_heartbeat_channel_silent", "1 if no heartbeats are received although several backends should send them, else 0.");
    pub(super) const ALL_FROZEN: Family = gauge("tidegate_heartbeat_frozen", "1 if silent backends of all pools stay in rotation because many became silent together, else 0.");
    pub(super) const IS_REGISTERED: Family = gauge("tidegate_backend_registered", "1 if heartbeats registered the backend, 0 if it is in the configuration.");
    pub(super) const SUSPECT: Family = gauge("tidegate_backend_suspect", "1 if the backend is suspect and keeps a tenth of its weight, else 0.");
    pub(super) const BEATING: Family = gauge("tidegate_backend_beating", "1 if the heartbeats of the backend arrive on time, else 0.");
    pub(super) const RAMP: Family = gauge("tidegate_backend_ramp_ratio", "Share of its weight that the backend has in slow start; 1 after slow start.");
    pub(super) const LOSS: Family = gauge("tidegate_backend_heartbeat_loss_ratio", "Measured share of lost heartbeats.");
    pub(super) const TIMEOUT: Family = gauge("tidegate_backend_heartbeat_timeout_seconds", "Heartbeat silence after which the backend becomes suspect.");
    pub(super) const SILENCE: Family = gauge("tidegate_backend_heartbeat_silence_seconds", "Time since the last heartbeat of the backend.");
    pub(super) const PHI: Family = gauge("tidegate_backend_heartbeat_phi", "Phi value of an accrual failure detector (normal distribution), for information only.");
    pub(super) const LOAD: Family = gauge("tidegate_backend_load_ratio", "Smoothed load that the backend reports; 0 is idle, 1 is full.");
}

/// Renders tables, guards, the receiver, and each backend's detector.
pub(super) fn render(out: &mut Encoder, snapshot: &AdminSnapshot, each: &[BackendRow<'_>]) {
    let control = &snapshot.control;
    let mut samples = out.family(&families::PUBLISHED);
    for (reason, total) in &control.published {
        samples.count(&[("reason", reason.name())], *total);
    }
    let mut samples = out.family(&families::NONE_ELIGIBLE);
    for pool in &control.pools {
        samples.count(&[("pool", &pool.name)], pool.none_eligible.is_some().into());
    }
    let pools = || control.pools.iter().filter(|pool| pool.heartbeats);
    let mut samples = out.family(&families::FROZEN);
    for pool in pools() {
        samples.count(&[("pool", &pool.name)], pool.frozen.is_some().into());
    }
    let mut samples = out.family(&families::REGISTERED);
    for pool in pools() {
        samples.count(&[("pool", &pool.name)], pool.registered as u64);
    }
    channel(out, snapshot);
    backends(out, each);
}

fn channel(out: &mut Encoder, snapshot: &AdminSnapshot) {
    let Some(status) = &snapshot.control.heartbeat else { return };
    let received = &snapshot.heartbeats;
    out.family(&families::ACCEPTED).count(&[], received.accepted);
    let mut samples = out.family(&families::REJECTED);
    let ignored = status.ignored.iter().map(|(why, count)| (why.name(), *count));
    for (reason, count) in received.rejected.iter().copied().chain(ignored) {
        samples.count(&[("reason", reason)], count);
    }
    out.family(&families::KERNEL_DROPS).count(&[], received.kernel_drops);
    out.family(&families::EXCUSES).count(&[], status.excuses_total);
    out.family(&families::SILENT).count(&[], status.silent.into());
    out.family(&families::ALL_FROZEN).count(&[], status.frozen.is_some().into());
}

type HeartbeatValue = fn(&BackendHeartbeatStatus) -> f64;
type Flag = fn(&BackendStatus) -> bool;

fn backends(out: &mut Encoder, each: &[BackendRow<'_>]) {
    let listening = || each.iter().filter(|one| one.heartbeats);
    let mut samples = out.family(&families::SUSPECT);
    for one in each {
        let suspect = one.status.observation == Observation::Suspect;
        samples.count_of(&one.labels, &[], suspect.into());
    }
    let mut samples = out.family(&families::RAMP);
    for one in each {
        samples.value_of(&one.labels, f64::from(one.status.ramp_percent) / 100.0);
    }
    let flags: [(&Family, Flag); 2] = [
        (&families::IS_REGISTERED, |b| b.origins.is_registered()),
        (&families::BEATING, |b| b.heartbeat_health == HeartbeatHealth::OnTime),
    ];
    for (family, flag) in flags {
        let mut samples = out.family(family);
        for one in listening() {
            samples.count_of(&one.labels, &[], flag(one.status).into());
        }
    }
    let figures: [(&Family, HeartbeatValue); 5] = [
        (&families::LOSS, |h| h.reading.loss),
        (&families::TIMEOUT, |h| h.reading.timeout.as_secs_f64()),
        (&families::SILENCE, |h| h.reading.silence.unwrap_or_default().as_secs_f64()),
        (&families::PHI, |h| h.reading.phi_normal),
        (&families::LOAD, |h| h.load_mean / 1000.0),
    ];
    for (family, figure) in figures {
        let mut samples = out.family(family);
        for one in listening() {
            if let Some(heartbeats) = &one.status.heartbeats {
                samples.value_of(&one.labels, figure(heartbeats));
            }
        }
    }
}

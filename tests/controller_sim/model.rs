//! Model of eligibility as documented: a second, naive implementation with lists and scans,
//! without a schedule.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tidegate_core::control::{ProbeToken, REMOVED_INTENTS_FOR};
use tidegate_core::health::{Intent, Observation};
use tidegate_core::model::{
    BackendAddr, BackendConfig, Config, EjectionSpec, OnRemoval, PoolConfig, ProbeSpec,
};
use tidegate_core::model::{TIER_MAX, Tiers, WhenNoneEligible};
use tidegate_core::table::state::{BackendId, BackendState};

/// Constants that the controller documents.
const PROBE_LOST_MARGIN: Duration = Duration::from_secs(5);
const LEAVING_CHECK: Duration = Duration::from_secs(1);
const EJECTION_MAX: Duration = Duration::from_secs(300);
const TRIAL_CHECK_INTERVAL: Duration = Duration::from_millis(100);

/// A running trial.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Trial {
    pub(crate) look_at: Instant,
    /// Phase of the trial session.
    pub(crate) told: Option<bool>,
}

#[derive(Debug, Clone)]
pub(crate) struct InFlight {
    pub(crate) token: ProbeToken,
    pub(crate) lost_at: Instant,
    pub(crate) stale: bool,
}

#[derive(Debug, Clone)]
pub(crate) struct ModelBackend {
    pub(crate) id: BackendId,
    pub(crate) state: Arc<BackendState>,
    pub(crate) spec: BackendConfig,
    pub(crate) intent: Intent,
    pub(crate) observation: Observation,
    /// Probe results in a row that contradict the observation.
    pub(crate) row: u32,
    /// Failed connects in a row, as detector and ejection count them.
    pub(crate) connects: u32,
    pub(crate) connects_for_ejection: u32,
    /// The last report to the detector.
    pub(crate) connects_told: u32,
    pub(crate) fails_open: bool,
    pub(crate) ejected_until: Option<Instant>,
    pub(crate) trial: Option<Trial>,
    /// Copied from the controller; other tests cover the slow detector.
    pub(crate) suspect: bool,
    pub(crate) back_at: Option<Instant>,
    pub(crate) repeats: u64,
    pub(crate) probe: Option<InFlight>,
    /// The count that all workers share.
    pub(crate) shared_row: u32,
    pub(crate) last_probe: Option<Instant>,
    /// From this time on, the sessions of a removed backend are reset.
    pub(crate) cut_at: Option<Instant>,
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Startup {
    Waiting(Instant),
    Open,
    Decided,
}

#[derive(Debug, Clone)]
pub(crate) struct ModelPool {
    pub(crate) spec: Arc<PoolConfig>,
    pub(crate) startup: Startup,
    pub(crate) backends: Vec<ModelBackend>,
    /// Settling: its latest end, and the stand-ins.
    pub(crate) settling: Option<(Instant, Vec<BackendId>)>,
}

#[derive(Debug, Default)]
pub(crate) struct Model {
    pub(crate) pools: Vec<ModelPool>,
    pub(crate) leaving: Vec<ModelBackend>,
    pub(crate) check_at: Option<Instant>,
    /// Pool of each frontend.
    pub(crate) routes: HashMap<String, String>,
    /// Intents of removed backends, with the time of removal.
    kept: HashMap<Identity, (Intent, Instant)>,
}

/// Pool, name, address.
type Identity = (String, String, BackendAddr);

impl ModelBackend {
    fn identity(&self) -> (&str, &str, &BackendAddr) {
        (&self.state.pool, &self.state.name, &self.state.address)
    }

    fn owned_identity(&self) -> Identity {
        let (pool, name, address) = self.identity();
        (pool.to_owned(), name.to_owned(), address.clone())
    }

    fn eligible_but_for_ejection(&self, probed: bool) -> bool {
        self.intent == Intent::Ready
            && match self.observation {
                Observation::Up | Observation::Suspect => true,
                Observation::Unknown => !probed || self.fails_open,
                Observation::Down => false,
            }
    }

    pub(crate) fn eligible(&self, probed: bool) -> bool {
        self.ejected_until.is_none() && self.eligible_but_for_ejection(probed)
    }

    /// Whether the backend is eligible and not on trial.
    pub(crate) fn takes_many(&self, probed: bool) -> bool {
        self.eligible(probed) && self.trial.is_none()
    }

    /// Returns the observation of the probes, combined with the suspicion.
    pub(crate) fn shown(&self, probed: bool) -> Observation {
        let serves = match self.observation {
            Observation::Up => true,
            Observation::Unknown => !probed || self.fails_open,
            _ => false,
        };
        if serves && self.suspect { Observation::Suspect } else { self.observation }
    }

    fn eject(&mut self, spec: &EjectionSpec, now: Instant) {
        let unit = spec.time.as_millis();
        if let (Some(back), None) = (self.back_at, self.trial.take()) {
            let faded = (now - back).as_millis() / unit;
            self.repeats = self.repeats.saturating_sub(faded as u64);
        }
        self.repeats = (self.repeats + 1).min(EJECTION_MAX.as_millis().div_ceil(unit) as u64);
        let length = (spec.time * self.repeats as u32).min(EJECTION_MAX);
        self.ejected_until = Some(now + length);
    }

    fn begin_trial(&mut self, now: Instant) {
        self.end_ejection(now);
        self.trial = Some(Trial { look_at: now + TRIAL_CHECK_INTERVAL, told: None });
    }

    fn end_trial(&mut self, now: Instant) {
        if self.trial.take().is_some() {
            self.back_at = Some(now);
        }
    }

    fn end_ejection(&mut self, now: Instant) {
        self.ejected_until = None;
        self.back_at = Some(now);
        self.connects = 0;
        self.connects_told = 0;
        self.connects_for_ejection = 0;
    }

    fn observe_to(&mut self, to: Observation) {
        self.observation = to;
        self.row = 0;
        self.connects_told = 0;
        if to == Observation::Up {
            self.connects_for_ejection = 0;
        }
    }

    fn probe_result(&mut self, spec: &ProbeSpec, success: bool) {
        self.fails_open = false;
        if success {
            self.connects = 0;
            self.connects_told = 0;
        }
        match (self.observation, success) {
            (Observation::Unknown, true) => self.observe_to(Observation::Up),
            (Observation::Unknown, false) => self.observe_to(Observation::Down),
            (Observation::Up, true) | (Observation::Down, false) => self.row = 0,
            (Observation::Up, false) => {
                self.row += 1;
                if self.row + self.connects_told >= spec.fall {
                    self.observe_to(Observation::Down);
                }
            }
            (Observation::Down, true) => {
                self.row += 1;
                if self.row >= spec.rise {
                    self.observe_to(Observation::Up);
                }
            }
            (Observation::Suspect, _) => unreachable!("probes make no backend suspect"),
        }
    }
}

impl ModelPool {
    pub(crate) fn probed(&self) -> bool {
        self.spec.probe.is_some()
    }

    pub(crate) fn ejected_max(&self) -> usize {
        let percent = self.spec.ejection.map_or(0, |e| e.max_ejected_percent);
        self.backends.len() * usize::from(percent) / 100
    }

    pub(crate) fn ejected(&self) -> usize {
        self.backends.iter().filter(|b| b.ejected_until.is_some()).count()
    }

    pub(crate) fn on_trial(&self) -> usize {
        self.backends.iter().filter(|b| b.trial.is_some()).count()
    }

    pub(crate) fn eligible(&self) -> usize {
        self.backends.iter().filter(|b| b.takes_many(self.probed())).count()
    }

    pub(crate) fn watched(&self) -> bool {
        self.spec.ejection.is_some_and(|e| e.slow_first_byte.is_some()) && self.backends.len() > 1
    }

    /// Checks a trial as the controller does.
    fn check_trial(&mut self, id: BackendId, now: Instant) {
        let allows = self.eligible() > 0 && self.ejected() + self.on_trial() <= self.ejected_max();
        let b = self.backends.iter_mut().find(|b| b.id == id).unwrap();
        match (b.trial.and_then(|trial| trial.told), &self.spec.ejection) {
            (None, _) => {
                b.trial = Some(Trial { look_at: now + TRIAL_CHECK_INTERVAL, told: None });
            }
            (Some(false), Some(spec)) if allows => b.eject(spec, now),
            (Some(_), _) => b.end_trial(now),
        }
    }

    /// Returns the backends in rotation, in file order.
    pub(crate) fn serving(&self) -> Vec<BackendId> {
        let tier = |wanted: &dyn Fn(&&ModelBackend) -> bool| -> Vec<BackendId> {
            self.backends.iter().filter(wanted).map(|b| b.id).collect()
        };
        let probed = self.probed();
        let try_only =
            |id: &BackendId| self.backends.iter().any(|b| b.id == *id && b.trial.is_some());
        let mut serving = Vec::new();
        let spills = self.spec.tiers == Tiers::Spill;
        let mut carried = 0;
        for number in (0..=TIER_MAX).filter(|_| spills) {
            let waits = |b: &ModelBackend| {
                let unknown = b.observation == Observation::Unknown && b.ejected_until.is_none();
                !b.eligible(probed) && unknown && b.intent == Intent::Ready
            };
            let all = tier(&|b| b.spec.tier == number && !waits(b)).len();
            let eligible = tier(&|b| b.spec.tier == number && b.eligible(probed));
            if carried < 100 {
                carried += (140 * eligible.len()).checked_div(all).unwrap_or(0);
                serving.extend(eligible);
            }
        }
        for number in (0..=TIER_MAX).filter(|_| !spills) {
            serving.extend(tier(&|b| b.spec.tier == number && b.eligible(probed)));
            if !serving.iter().all(try_only) {
                break;
            }
        }
        if !serving.is_empty() {
            return serving;
        }
        if let Some((_, stand_ins)) = self.settling.as_ref().filter(|(_, ids)| !ids.is_empty()) {
            return stand_ins.clone();
        }
        if self.spec.when_none_eligible != WhenNoneEligible::TryAll {
            return serving;
        }
        tier(&|b| b.intent == Intent::Ready)
    }

    /// Applies the guard: ends ejections that it does not allow.
    fn settle(&mut self, now: Instant) {
        if self.spec.ejection.is_none() || self.eligible() == 0 {
            self.backends.iter_mut().for_each(|b| b.end_trial(now));
        }
        loop {
            let probed = self.probed();
            let mut out: Vec<(Instant, BackendId)> =
                self.backends.iter().filter_map(|b| Some((b.ejected_until?, b.id))).collect();
            out.sort();
            let surplus = out.len() > self.ejected_max() || self.spec.ejection.is_none();
            let nobody = self.eligible() == 0;
            let give_back = out.into_iter().map(|(_, id)| id).find(|id| {
                let b = self.backends.iter().find(|b| b.id == *id).unwrap();
                surplus || (nobody && b.eligible_but_for_ejection(probed))
            });
            let Some(id) = give_back else { return };
            self.backends.iter_mut().find(|b| b.id == id).unwrap().end_ejection(now);
        }
    }
}

impl Model {
    pub(crate) fn find(&mut self, id: BackendId) -> Option<(&mut ModelPool, usize)> {
        self.pools.iter_mut().find_map(|pool| {
            let index = pool.backends.iter().position(|b| b.id == id)?;
            Some((pool, index))
        })
    }

    /// Applies all changes that depend on time only.
    pub(crate) fn pass(&mut self, now: Instant) {
        for pool in &mut self.pools {
            let grace = pool.spec.startup_grace;
            let mut looks: Vec<(Instant, BackendId)> =
                pool.backends.iter().filter_map(|b| Some((b.trial?.look_at, b.id))).collect();
            looks.retain(|(at, _)| *at <= now);
            looks.sort();
            let mut looks = looks.into_iter().peekable();
            if let Startup::Waiting(at) = pool.startup
                && pool.probed()
                && at + grace <= now
            {
                // The order of trial checks decides which backends are eligible at each.
                while let Some((_, id)) = looks.next_if(|(due, _)| *due <= at + grace) {
                    pool.check_trial(id, now);
                }
                pool.startup = Startup::Open;
                pool.backends.iter_mut().for_each(|b| b.fails_open = true);
            }
            looks.for_each(|(_, id)| pool.check_trial(id, now));
            for b in &mut pool.backends {
                if b.ejected_until.is_some_and(|until| until <= now) {
                    b.begin_trial(now);
                }
                if pool.spec.probe.is_some() {
                    b.probe.take_if(|probe| probe.lost_at <= now);
                }
            }
        }
        let check_at = self.check_at.filter(|at| *at <= now);
        self.end_settling(check_at.unwrap_or(now));
        if check_at.is_some() {
            let stand_ins: Vec<BackendId> =
                self.pools.iter().filter_map(|p| p.settling.clone()).flat_map(|s| s.1).collect();
            let stays = |b: &ModelBackend| b.state.in_flight.get() > 0 || stand_ins.contains(&b.id);
            self.leaving.retain(stays);
            self.check_at = (!self.leaving.is_empty()).then(|| now + LEAVING_CHECK);
        }
        self.end_settling(now);
    }

    pub(crate) fn settle(&mut self, now: Instant) {
        for pool in &mut self.pools {
            pool.settle(now);
            if pool.is_settled() {
                pool.settling = None;
            }
        }
    }

    pub(crate) fn probe_started(
        &mut self,
        id: BackendId,
        token: ProbeToken,
        timeout: Duration,
        now: Instant,
    ) {
        let (pool, index) = self.find(id).expect("only configured backends are probed");
        assert!(pool.probed(), "the pool has no probe");
        let b = &mut pool.backends[index];
        assert!(b.probe.is_none(), "two probes of {id:?} in flight");
        let lost_at = now + timeout + PROBE_LOST_MARGIN;
        b.probe = Some(InFlight { token, lost_at, stale: false });
        b.last_probe = Some(now);
    }

    /// `success` is `None` for a local error.
    pub(crate) fn probed(&mut self, id: BackendId, token: ProbeToken, success: Option<bool>) {
        if let Some(b) = self.leaving.iter_mut().find(|b| b.id == id) {
            b.probe.take_if(|probe| probe.token == token);
            return;
        }
        let Some((pool, index)) = self.find(id) else { return };
        let b = &mut pool.backends[index];
        let Some(probe) = b.probe.take_if(|probe| probe.token == token) else { return };
        if let (false, Some(success), Some(spec)) = (probe.stale, success, &pool.spec.probe) {
            b.probe_result(spec, success);
            pool.startup = Startup::Decided;
        }
    }

    pub(crate) fn connect_failed(&mut self, id: BackendId, now: Instant) {
        let Some((pool, index)) = self.find(id) else {
            for (_, stand_ins) in self.pools.iter_mut().filter_map(|p| p.settling.as_mut()) {
                stand_ins.retain(|one| *one != id);
            }
            return;
        };
        let (probed, eligible) = (pool.probed(), pool.eligible());
        let ejected = pool.ejected() + pool.on_trial();
        let ejected_max = pool.ejected_max();
        let b = &mut pool.backends[index];
        if b.ejected_until.is_some() || b.trial.is_some() {
            return;
        }
        if let Some(spec) = &pool.spec.probe {
            b.connects += 1;
            match b.observation {
                Observation::Up => {
                    b.connects_told = b.connects;
                    if b.row + b.connects >= spec.fall {
                        b.observe_to(Observation::Down);
                    }
                }
                Observation::Down => b.row = 0,
                _ => {}
            }
        }
        let Some(spec) = pool.spec.ejection else { return };
        b.connects_for_ejection += 1;
        if b.connects_for_ejection < spec.failures || !b.eligible(probed) {
            return;
        }
        if ejected < ejected_max && eligible > 1 {
            b.eject(&spec, now);
        }
    }

    /// `ids` are from the controller; they are checked against the identities.
    pub(crate) fn configure(
        &mut self,
        config: &Config,
        states: &HashMap<(String, String), Arc<BackendState>>,
        now: Instant,
    ) {
        let former = self.former();
        let mut old_pools = std::mem::take(&mut self.pools);
        for spec in &config.pools {
            let position = old_pools.iter().position(|p| p.spec.name == spec.name);
            let mut old = position.map(|position| old_pools.remove(position));
            let mut backends = Vec::new();
            for backend in &spec.backends {
                let state = &states[&(spec.name.to_string(), backend.name.to_string())];
                let b = self.claim(old.as_mut(), spec, backend, state, now);
                backends.push(b);
            }
            let judged = backends.iter().any(|b| b.observation != Observation::Unknown);
            let before = old.as_ref().filter(|old| old.probed()).map(|old| old.startup);
            let startup = match before {
                _ if judged || spec.probe.is_none() => Startup::Decided,
                None | Some(Startup::Decided) => Startup::Waiting(now),
                Some(going_on) => going_on,
            };
            if startup == Startup::Open {
                backends.iter_mut().for_each(|b| b.fails_open = true);
            }
            let settling = old.as_ref().and_then(|old| old.settling.clone());
            self.pools.push(ModelPool { spec: Arc::clone(spec), startup, backends, settling });
            if let Some(mut old) = old {
                let rest = std::mem::take(&mut old.backends);
                rest.into_iter().for_each(|b| self.leave(b, spec.on_removal, now));
            }
        }
        for old in old_pools {
            let rule = old.spec.on_removal;
            old.backends.into_iter().for_each(|b| self.leave(b, rule, now));
        }
        self.begin_settling(config, &former, now);
    }

    fn leave(&mut self, mut b: ModelBackend, rule: OnRemoval, now: Instant) {
        b.end_trial(now);
        b.suspect = false;
        match b.intent {
            Intent::Ready => self.kept.remove(&b.owned_identity()),
            wanted => self.kept.insert(b.owned_identity(), (wanted, now)),
        };
        if let Some(probe) = &mut b.probe {
            probe.stale = true;
        }
        b.cut_at = match rule {
            OnRemoval::Keep => None,
            OnRemoval::CloseAfter(grace) => Some(now + grace),
        };
        self.leaving.push(b);
        self.check_at.get_or_insert(now + LEAVING_CHECK);
    }

    /// Returns the old backend with this identity, or a new one.
    fn claim(
        &mut self,
        old: Option<&mut ModelPool>,
        pool: &PoolConfig,
        spec: &BackendConfig,
        state: &Arc<BackendState>,
        now: Instant,
    ) -> ModelBackend {
        let identity = (&*pool.name, &*spec.name, &spec.address);
        let old_probe = old.as_ref().and_then(|old| old.spec.probe.clone());
        let measured = old.as_ref().is_some_and(|old| old.spec.ejection.is_some());
        let stayed = old.and_then(|old| {
            let position = old.backends.iter().position(|b| b.identity() == identity)?;
            Some(old.backends.remove(position))
        });
        let stays = stayed.is_some();
        let known = stayed.or_else(|| {
            let position = self.leaving.iter().position(|b| b.identity() == identity)?;
            let mut b = self.leaving.remove(position);
            if b.ejected_until.is_some_and(|until| until <= now) {
                b.end_ejection(now);
            }
            b.connects_for_ejection = 0;
            Some(b)
        });
        let kept = match stays {
            true => None,
            false => {
                let (pool, name, address) = identity;
                self.kept.remove(&(pool.to_owned(), name.to_owned(), address.clone()))
            }
        };
        let Some(mut b) = known else {
            let in_time = kept.filter(|(_, left)| now - *left < REMOVED_INTENTS_FOR);
            let intent = in_time.map_or(Intent::Ready, |(wanted, _)| wanted);
            return ModelBackend { intent, ..fresh(spec, state) };
        };
        assert!(Arc::ptr_eq(&b.state, state), "{identity:?} lost its state");
        b.spec = spec.clone();
        b.cut_at = None;
        if !measured {
            b.connects_for_ejection = 0;
        }
        match &pool.probe {
            None => {
                b.observation = Observation::Unknown;
                (b.row, b.connects, b.connects_told, b.fails_open) = (0, 0, 0, false);
                b.probe.iter_mut().for_each(|probe| probe.stale = true);
            }
            Some(probe) if stays && old_probe.as_ref() == Some(probe) => {}
            Some(_) => {
                (b.row, b.connects, b.connects_told) = (0, 0, 0);
                b.fails_open |= stays && old_probe.is_none();
                b.probe.iter_mut().for_each(|probe| probe.stale = true);
                b.last_probe = None;
            }
        }
        b
    }
}

fn fresh(spec: &BackendConfig, state: &Arc<BackendState>) -> ModelBackend {
    ModelBackend {
        id: state.id,
        state: Arc::clone(state),
        spec: spec.clone(),
        intent: Intent::Ready,
        observation: Observation::Unknown,
        row: 0,
        connects: 0,
        connects_for_ejection: 0,
        connects_told: 0,
        fails_open: false,
        ejected_until: None,
        trial: None,
        suspect: false,
        back_at: None,
        repeats: 0,
        probe: None,
        shared_row: 0,
        last_probe: None,
        cut_at: None,
    }
}

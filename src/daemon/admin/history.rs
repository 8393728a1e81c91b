//! Renders `/v1/pools/{pool}/backends/{name}/history` and `.../minute`.
//!
//! Called on a blocking thread with the controller's [`Explanation`] and the samples. Pure.

use super::status::millis;
use tidegate_api::history::{EndedProbeDoc, HistoryDoc, MinutesDoc, StateSpanDoc};
use tidegate_core::control::explain::Explanation;
use tidegate_core::control::shown::{StateSpan, state_spans};
use tidegate_core::health::EndedProbe;
use tidegate_core::traffic::{LatencyStep, MinuteSlot, TRAFFIC_SLOTS, TrafficHistory};

/// Returns the last hour of a backend.
pub fn render(explained: &Explanation, traffic: &TrafficHistory) -> String {
    let (backend, now) = (&explained.backend, explained.now);
    let slots = traffic.minutes(&backend.state);
    let ramp = explained.ramp.map(|(_, since)| since);
    let states = state_spans(backend, &explained.history, ramp, now);
    let probe = |probe: &EndedProbe| EndedProbeDoc {
        ok: probe.failure.is_none(),
        ms: probe.took.as_micros() as f64 / 1e3,
        seconds_ago: millis(now.saturating_duration_since(probe.ended)),
        text: probe.failure.as_deref().unwrap_or_default().to_owned(),
    };
    let document = HistoryDoc {
        minutes: minutes(&slots),
        pool_first_p99: traffic.pool_first_byte_p99(&backend.state.pool, true),
        states: states.into_iter().map(span).collect(),
        probes: explained.probes.iter().map(probe).collect(),
    };
    serde_json::to_string(&document).expect("plain data always serialises")
}

/// Returns the new sessions of the last 60 s, oldest first.
pub fn render_minute(explained: &Explanation, traffic: &TrafficHistory) -> String {
    let seconds = traffic.seconds(explained.backend.state.id);
    let new: Vec<u32> =
        seconds.map(|slots| slots.iter().map(|slot| slot.new).collect()).unwrap_or_default();
    serde_json::to_string(&new).expect("plain data always serialises")
}

fn minutes(slots: &[MinuteSlot]) -> MinutesDoc {
    let step = |read: fn(&MinuteSlot) -> LatencyStep| {
        column(slots, |slot| read(slot).seconds()).into_iter().map(Option::flatten).collect()
    };
    MinutesDoc {
        connect_p50: step(|slot| slot.connect[0]),
        connect_p99: step(|slot| slot.connect[1]),
        first_p50: step(|slot| slot.first_byte[0]),
        first_p99: step(|slot| slot.first_byte[1]),
        new: column(slots, |slot| slot.traffic.new),
        active: column(slots, |slot| slot.traffic.active),
        bytes_in: column(slots, |slot| slot.traffic.bytes_in),
        bytes_out: column(slots, |slot| slot.traffic.bytes_out),
    }
}

/// Returns one value per minute. Minutes before the first sample have none.
fn column<T>(slots: &[MinuteSlot], read: impl Fn(&MinuteSlot) -> T) -> Vec<Option<T>> {
    let missing = TRAFFIC_SLOTS.saturating_sub(slots.len());
    let before = (0..missing).map(|_| None);
    before.chain(slots.iter().map(|slot| Some(read(slot)))).collect()
}

fn span(span: StateSpan) -> StateSpanDoc {
    let StateSpan { state, from, to, reason } = span;
    StateSpanDoc { state: state.to_owned(), from: millis(from), to: millis(to), reason }
}

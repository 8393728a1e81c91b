//! The events of this process: a bounded list that operators read.
//!
//! Filled by the control loop and by the panic hook, read by the admin API. Clones share the
//! list. It never blocks on a reader, and it has no effect on traffic.
//!
//! - An upgrade passes the events to the new process. A crash loses them; the log has them too.
//! - An event is kept whatever `[log] level` is, and whether the log line was suppressed or not.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::UNIX_EPOCH;
use tidegate_api::events::{CHANGE_MAX, CHANGES_MAX, EventDoc, EventsDoc, TEXT_MAX};
use tidegate_api::names::{EventKindName, EventLevelName};
use tidegate_core::control::{Notice, NoticeFields, NoticeLevel};
use tidegate_core::health::Transition;
use tidegate_net::clock;
use tokio::sync::watch;

/// Events that are kept. The oldest ones are dropped first.
pub const EVENTS_MAX: usize = 10_000;

/// Limit on the size of all kept events. A usual event has about 250 B.
const BYTES_MAX: usize = 16 * 1024 * 1024;

/// What is counted for an event in addition to its texts.
const EVENT_BYTES: usize = 200;

/// See the module's documentation.
#[derive(Debug, Clone)]
pub struct EventLog(Arc<SharedEvents>);

#[derive(Debug)]
struct SharedEvents {
    kept: Mutex<KeptEvents>,
    /// Number of the newest event.
    last: watch::Sender<u64>,
}

#[derive(Debug, Default)]
struct KeptEvents {
    events: VecDeque<Arc<EventDoc>>,
    bytes: usize,
    last: u64,
}

/// Numbers of events, with those of old processes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct EventCounts {
    /// All events.
    pub recorded: u64,
    /// Events that are no longer kept.
    pub dropped: u64,
}

/// An event that has not been recorded yet.
#[derive(Debug)]
pub(crate) struct NewEvent {
    kind: EventKindName,
    level: EventLevelName,
    subject: String,
    text: String,
    who: String,
    changes: Vec<String>,
}

// === impl EventLog ===

impl EventLog {
    /// Creates an empty list.
    pub fn new() -> EventLog {
        let (last, _) = watch::channel(0);
        EventLog(Arc::new(SharedEvents { kept: Mutex::default(), last }))
    }

    /// Adds an event.
    pub(crate) fn record(&self, event: NewEvent) {
        let since = clock::wall().duration_since(UNIX_EPOCH).unwrap_or_default();
        // Milliseconds since 1970 are exact in an `f64`.
        let at = since.as_millis() as f64 / 1_000.0;
        let mut kept = self.kept();
        kept.add(event.finish(at));
        self.0.last.send_replace(kept.last);
    }

    /// Returns the kept events after number `after`. Later numbers than the newest are of
    /// another process, so all events are returned.
    pub fn after(&self, after: u64) -> EventsDoc {
        let kept = self.kept();
        let after = if after > kept.last { 0 } else { after };
        let first = kept.first();
        let known = usize::try_from((after + 1).saturating_sub(first)).unwrap_or(usize::MAX);
        let events = kept.events.iter().skip(known).cloned().collect();
        EventsDoc { events, last: kept.last, lost: first.saturating_sub(after + 1) }
    }

    /// Returns the newest event of that time that matches.
    pub(crate) fn newest(
        &self,
        from: f64,
        to: f64,
        matches: impl Fn(&EventDoc) -> bool,
    ) -> Option<Arc<EventDoc>> {
        let kept = self.kept();
        let newest_first = kept.events.iter().rev();
        let mut recent = newest_first.take_while(|event| event.at >= from);
        recent.find(|event| event.at <= to && matches(event)).cloned()
    }

    /// Returns how many events were recorded and dropped.
    pub(crate) fn counts(&self) -> EventCounts {
        let kept = self.kept();
        EventCounts { recorded: kept.last, dropped: kept.first() - 1 }
    }

    /// Returns the number of the newest event, and later the number of each newer one.
    pub fn watch(&self) -> watch::Receiver<u64> {
        self.0.last.subscribe()
    }

    /// Puts the events of the old process before those of this process.
    pub(crate) fn continue_from(&self, before: &[Arc<EventDoc>]) {
        let mut kept = self.kept();
        let own = std::mem::take(&mut *kept).events;
        kept.last = before.first().map_or(0, |event| event.seq.saturating_sub(1));
        for event in before.iter().chain(&own) {
            kept.add(EventDoc::clone(event));
        }
        self.0.last.send_replace(kept.last);
    }

    fn kept(&self) -> MutexGuard<'_, KeptEvents> {
        self.0.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Default for EventLog {
    fn default() -> EventLog {
        EventLog::new()
    }
}

// === impl KeptEvents ===

impl KeptEvents {
    /// Numbers an event, adds it and drops the oldest ones beyond the limits.
    fn add(&mut self, mut event: EventDoc) {
        self.last += 1;
        event.seq = self.last;
        self.bytes += size(&event);
        self.events.push_back(Arc::new(event));
        while self.events.len() > EVENTS_MAX || self.bytes > BYTES_MAX {
            let Some(oldest) = self.events.pop_front() else { return };
            self.bytes -= size(&oldest);
        }
    }

    /// Returns the number of the oldest event, or of the next one if none is kept.
    fn first(&self) -> u64 {
        self.events.front().map_or(self.last + 1, |event| event.seq)
    }
}

fn size(event: &EventDoc) -> usize {
    let changes: usize = event.changes.iter().map(|line| line.len() + size_of::<String>()).sum();
    EVENT_BYTES + event.subject.len() + event.text.len() + event.who.len() + changes
}

// === impl NewEvent ===

impl NewEvent {
    pub(crate) fn new(
        kind: EventKindName,
        level: EventLevelName,
        subject: impl Into<String>,
        text: impl Into<String>,
    ) -> NewEvent {
        let (subject, text) = (subject.into(), text.into());
        NewEvent { kind, level, subject, text, who: String::new(), changes: Vec::new() }
    }

    /// An event of the whole process.
    pub(crate) fn of_process(level: EventLevelName, text: impl Into<String>) -> NewEvent {
        NewEvent::new(EventKindName::Process, level, "tidegate", text)
    }

    /// The change of a backend's state.
    pub(crate) fn of_transition(transition: &Transition) -> NewEvent {
        let Transition { pool, backend, from, to, reason, lasted, .. } = transition;
        let level = match *to {
            "up" => EventLevelName::Good,
            "down" | "ejected" => EventLevelName::Bad,
            "suspect" => EventLevelName::Warn,
            _ => EventLevelName::Info,
        };
        let lasted = humantime::format_duration(std::time::Duration::from_secs(lasted.as_secs()));
        let text = format!("{from} -> {to} after {lasted}: {reason}");
        NewEvent::new(EventKindName::State, level, format!("{pool}/{backend}"), text)
    }

    /// A notice of the controller.
    pub(crate) fn of_notice(notice: &Notice) -> NewEvent {
        let Notice { level, pool, backend, message, fields } = notice;
        let subject = match (&**pool, backend) {
            ("", _) => "tidegate".to_owned(),
            (pool, None) => pool.to_owned(),
            (pool, Some(backend)) => format!("{pool}/{backend}"),
        };
        let (kind, level) = match (level, fields.limit) {
            (_, Some(_)) => (EventKindName::Limit, EventLevelName::Warn),
            (NoticeLevel::Warn, None) => (EventKindName::State, EventLevelName::Warn),
            (NoticeLevel::Info, None) => (EventKindName::State, EventLevelName::Info),
        };
        NewEvent::new(kind, level, subject, notice_text(message, fields))
    }

    /// Sets the originator.
    pub(crate) fn by(mut self, who: impl Into<String>) -> NewEvent {
        self.who = who.into();
        self
    }

    /// Sets what a reload changed.
    pub(crate) fn with_changes(mut self, changes: Vec<String>) -> NewEvent {
        self.changes = changes;
        self
    }

    fn finish(self, at: f64) -> EventDoc {
        let NewEvent { kind, level, subject, text, who, mut changes } = self;
        let more = changes.len().saturating_sub(CHANGES_MAX - 1);
        if more > 1 {
            changes.truncate(CHANGES_MAX - 1);
            changes.push(format!("{more} more changes"));
        }
        let changes = changes.into_iter().map(|line| shortened(line, CHANGE_MAX)).collect();
        let [subject, text, who] = [subject, text, who].map(|text| shortened(text, TEXT_MAX));
        EventDoc { seq: 0, at, kind, level, subject, text, who, changes }
    }
}

/// Returns the message with the fields that say why it happened.
fn notice_text(message: &str, fields: &NoticeFields) -> String {
    let mut text = message.to_owned();
    let numbers = [
        ("used", fields.used),
        ("limit", fields.limit),
        ("members", fields.members),
        ("joined", fields.joined),
        ("removed", fields.removed),
        ("registered", fields.registered),
    ];
    let words = [("source", &fields.source), ("address", &fields.address)];
    let words =
        words.into_iter().filter_map(|(name, word)| Some(format!("{name} {}", word.as_ref()?)));
    let numbers =
        numbers.into_iter().filter_map(|(name, number)| Some(format!("{name} {}", number?)));
    let details: Vec<String> = words.chain(numbers).collect();
    if !details.is_empty() {
        text.push_str(&format!(" ({})", details.join(", ")));
    }
    for why in [&fields.reason, &fields.evidence].into_iter().flatten() {
        text.push_str(": ");
        text.push_str(why);
    }
    text
}

/// Truncates a text to `most` characters.
fn shortened(mut text: String, most: usize) -> String {
    if let Some((at, _)) = text.char_indices().nth(most) {
        let last = text.char_indices().nth(most - 1).map_or(at, |(last, _)| last);
        text.truncate(last);
        text.push('…');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn add(log: &EventLog, text: &str) {
        log.record(NewEvent::of_process(EventLevelName::Info, text));
    }

    fn texts(document: &EventsDoc) -> Vec<String> {
        document.events.iter().map(|event| event.text.clone()).collect()
    }

    #[test]
    fn question_gets_the_events_after_a_number_and_how_many_are_lost() {
        let log = EventLog::new();
        for number in 1..=EVENTS_MAX + 5 {
            add(&log, &format!("{number}"));
        }
        let (all, last) = (log.after(0), EVENTS_MAX as u64 + 5);
        assert_eq!((all.events.len(), all.last, all.lost), (EVENTS_MAX, last, 5));
        assert_eq!((all.events[0].seq, &*all.events[0].text), (6, "6"));
        let newest = log.after(last - 2);
        assert_eq!((newest.events.len(), newest.lost), (2, 0));
        assert_eq!((log.after(last).events.len(), log.after(4).lost), (0, 1));
        assert_eq!(log.counts(), EventCounts { recorded: last, dropped: 5 });
        assert_eq!(log.after(last + 1).events.len(), EVENTS_MAX, "a number of another process");
    }

    #[test]
    fn long_texts_are_shortened_and_the_list_is_bounded_in_bytes() {
        let log = EventLog::new();
        let changes: Vec<String> = (0..500).map(|_| "é".repeat(CHANGE_MAX + 50)).collect();
        for _ in 0..2_000 {
            let event = NewEvent::of_process(EventLevelName::Bad, "x".repeat(5_000));
            log.record(event.with_changes(changes.clone()));
        }
        let kept = log.after(0);
        let event = &kept.events[0];
        assert_eq!(event.text.chars().count(), TEXT_MAX);
        assert!(event.text.ends_with('…'));
        assert_eq!(event.changes.len(), CHANGES_MAX);
        assert_eq!(event.changes[0].chars().count(), CHANGE_MAX);
        assert_eq!(event.changes[CHANGES_MAX - 1], "401 more changes");
        let bytes: usize = kept.events.iter().map(|event| size(event)).sum();
        assert!(bytes <= BYTES_MAX && kept.events.len() > 100, "{bytes}");
    }

    #[test]
    fn new_process_continues_the_numbers_of_the_old_one() {
        let (old, new) = (EventLog::new(), EventLog::new());
        ["a", "b", "c"].into_iter().for_each(|text| add(&old, text));
        add(&new, "started");
        new.continue_from(&old.after(1).events);
        let all = new.after(0);
        assert_eq!(texts(&all), ["b", "c", "started"]);
        assert_eq!((all.events[2].seq, all.last, all.lost), (4, 4, 1));
        add(&new, "d");
        assert_eq!(new.after(4).events[0].seq, 5);
    }

    #[test]
    fn reader_learns_of_each_event() {
        let log = EventLog::new();
        let mut newest = log.watch();
        assert!(!newest.has_changed().unwrap());
        add(&log, "a");
        assert!(newest.has_changed().unwrap());
        assert_eq!(*newest.borrow_and_update(), 1);
    }

    #[test]
    fn notice_becomes_a_sentence_with_its_reason() {
        let fields = NoticeFields {
            reason: Some("the answer lacks 5 of 6 backends".to_owned()),
            members: Some(6),
            removed: Some(5),
            source: Some("etcd".to_owned()),
            ..NoticeFields::default()
        };
        let (level, pool, backend) = (NoticeLevel::Warn, "web".into(), None);
        let message = "removals held";
        let event = NewEvent::of_notice(&Notice { level, pool, backend, message, fields });
        let text =
            "removals held (source etcd, members 6, removed 5): the answer lacks 5 of 6 backends";
        assert_eq!((&*event.text, &*event.subject), (text, "web"));
    }

    proptest! {
        #[test]
        fn any_text_is_cut_at_a_character(text in "\\PC*", most in 1usize..40) {
            let short = shortened(text.clone(), most);
            prop_assert!(short.chars().count() <= most);
            prop_assert!(text.chars().count() > most || short == text);
        }
    }
}

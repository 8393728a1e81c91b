//! Latency histograms: one recorder per worker, merged for readers.
//!
//! Each worker records into its own [`Recorder`] and regularly sends a
//! [`HistogramDelta`] to the control thread. The admin API reads [`MergedHistograms`].
//! Nothing is shared while it is written. Recording never blocks, and allocates only
//! while histograms grow.
//!
//! # Precision and memory
//!
//! Values are stored in microseconds with two significant digits (an error below 1 %),
//! as in HdrHistogram by Gil Tene. Sums are exact. A histogram grows to its largest
//! value, up to a clamp: at most 13.5 KB for connect and first byte, 18 KB for
//! sessions. A worker therefore uses at most 45 KB per backend, and [`MergedHistograms`]
//! twice that. If all values are below 50 ms, a series takes 5 KB.

use hdrhistogram::Histogram;
use std::collections::HashMap;
use std::time::Duration;

/// What is measured for a backend.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Series {
    /// From the start of a connect attempt to its success.
    Connect,
    /// From the established backend connection to the backend's first byte.
    FirstByte,
    /// From accept to close.
    Session,
}

/// The recordings of one worker since the last [`Recorder::take`].
#[derive(Debug, Default)]
pub struct Recorder {
    slots: HashMap<u32, BackendHistograms>,
    /// Empty slots that keep their memory; at most [`SPARE_MAX`].
    spare: Vec<BackendHistograms>,
}

/// The recordings of a worker between two takes; never empty.
#[derive(Debug)]
pub struct HistogramDelta(Vec<(u32, BackendHistograms)>);

/// Emptied histograms that return to a worker, which then allocates less. They can also
/// be dropped.
#[derive(Debug)]
pub struct RecycledHistograms(Vec<BackendHistograms>);

/// All recordings of all workers since each backend was first seen.
#[derive(Debug, Default)]
pub struct MergedHistograms {
    backends: HashMap<u32, [Option<SeriesData>; Series::COUNT]>,
}

/// One series of one backend, over all workers.
#[derive(Debug)]
pub struct SeriesData {
    histogram: Histogram<u64>,
    count: u64,
    sum_nanos: u128,
}

/// Form of a [`SeriesData`] in a handover; values in microseconds.
#[derive(Debug, Clone, Default, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(default)]
pub struct SavedSeries {
    /// Pairs of value and count, ascending.
    pub values: Vec<(u64, u64)>,
    /// Whole seconds of the sum.
    pub sum_seconds: u64,
    /// Nanoseconds of the sum, less than one second.
    pub sum_nanos: u32,
}

/// Maximum count that is accepted from another process. Sums of counts must not
/// overflow, now or while they grow in this process.
const SAVED_COUNT_MAX: u64 = u64::MAX / 2;

#[derive(Debug, Default)]
struct BackendHistograms {
    series: [Option<Recording>; Series::COUNT],
}

#[derive(Debug)]
struct Recording {
    histogram: Histogram<u32>,
    count: u64,
    sum_nanos: u128,
}

/// Clamp of connect and first byte. Connect timeouts and useful answer times are
/// shorter. A longer value is counted as this value, and the sum stays exact.
pub const LATENCY_MAX: Duration = Duration::from_secs(3600);

/// Clamp of sessions. Sessions are often longer than an hour; a week distinguishes long
/// from endless sessions.
pub const SESSION_MAX: Duration = Duration::from_secs(7 * 24 * 3600);

/// Maximum number of emptied slots that a worker keeps: 256 slots of typically 15 KB
/// are 4 MB. If more backends are used in an interval, each further backend costs an
/// allocation.
pub const SPARE_MAX: usize = 256;

/// Upper bounds of the exported buckets in seconds, ascending from 50 µs, the time of a
/// local connect, to an hour. The `+Inf` bucket is the count.
pub const BOUNDS_SECONDS: [f64; 22] = [
    0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0,
    2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 900.0, 3600.0,
];

/// Two digits keep every quantile within 1 %. Three digits would take 15 times the
/// memory.
const SIGNIFICANT_DIGITS: u8 = 2;

// === impl Series ===

impl Series {
    /// Number of series.
    pub const COUNT: usize = Series::ALL.len();

    /// Every series, in numeric order.
    pub const ALL: [Series; 3] = [Series::Connect, Series::FirstByte, Series::Session];

    /// Longer values are counted as this value.
    fn clamp(self) -> Duration {
        match self {
            Series::Connect | Series::FirstByte => LATENCY_MAX,
            Series::Session => SESSION_MAX,
        }
    }
}

// === impl Recorder ===

impl Recorder {
    /// Creates an empty recorder.
    pub fn new() -> Recorder {
        Recorder::default()
    }

    /// Records a value for the backend with this number.
    pub fn record(&mut self, backend: u32, series: Series, value: Duration) {
        let spare = &mut self.spare;
        let slot = self.slots.entry(backend).or_insert_with(|| spare.pop().unwrap_or_default());
        slot.series[series as usize].get_or_insert_with(Recording::new).record(series, value);
    }

    /// Returns all recordings and starts again from zero; `None` if there are none.
    /// Costs a few moves per backend that was used.
    pub fn take(&mut self) -> Option<HistogramDelta> {
        if self.slots.is_empty() {
            return None;
        }
        Some(HistogramDelta(self.slots.drain().collect()))
    }

    /// Keeps histograms that [`MergedHistograms::absorb`] emptied, up to [`SPARE_MAX`].
    pub fn give_back(&mut self, spent: RecycledHistograms) {
        let room = SPARE_MAX.saturating_sub(self.spare.len());
        self.spare.extend(spent.0.into_iter().take(room));
    }
}

// === impl Recording ===

impl Recording {
    fn new() -> Recording {
        Recording { histogram: empty(), count: 0, sum_nanos: 0 }
    }

    fn record(&mut self, series: Series, value: Duration) {
        let micros = value.min(series.clamp()).as_micros() as u64;
        // The histogram grows to the value. Growing can fail only in a 32-bit address
        // space.
        if self.histogram.record(micros).is_err() {
            self.histogram.saturating_record(micros);
        }
        self.count += 1;
        self.sum_nanos += value.as_nanos();
    }

    fn clear(&mut self) {
        self.histogram.reset();
        self.count = 0;
        self.sum_nanos = 0;
    }
}

// === impl MergedHistograms ===

impl MergedHistograms {
    /// Creates an empty collection.
    pub fn new() -> MergedHistograms {
        MergedHistograms::default()
    }

    /// Adds the recordings of a worker and returns the emptied histograms.
    pub fn absorb(&mut self, delta: HistogramDelta) -> RecycledHistograms {
        self.absorb_with(delta, |_, _, _, _| ())
    }

    /// Absorbs as [`MergedHistograms::absorb`] does, and passes each recorded value with its
    /// count and the number of its backend to `each`.
    pub fn absorb_with(
        &mut self,
        delta: HistogramDelta,
        mut each: impl FnMut(u32, Series, Duration, u64),
    ) -> RecycledHistograms {
        let mut spent = Vec::with_capacity(delta.0.len());
        for (backend, mut slot) in delta.0 {
            let merged = self.backends.entry(backend).or_default();
            for ((recording, data), series) in slot.series.iter_mut().zip(merged).zip(Series::ALL) {
                let Some(recording) = recording else { continue };
                if recording.count > 0 {
                    let each = |value, count| each(backend, series, value, count);
                    data.get_or_insert_with(SeriesData::new).add(recording, each);
                    recording.clear();
                }
            }
            spent.push(slot);
        }
        RecycledHistograms(spent)
    }

    /// Returns a series of a backend; `None` if nothing was recorded.
    pub fn get(&self, backend: u32, series: Series) -> Option<&SeriesData> {
        self.backends.get(&backend)?[series as usize].as_ref()
    }

    /// Returns the recordings of a backend for another process, in the order of
    /// [`Series::ALL`]. Empty entries have no recordings.
    pub fn save(&self, backend: u32) -> [SavedSeries; Series::COUNT] {
        Series::ALL
            .map(|series| self.get(backend, series).map(SeriesData::save).unwrap_or_default())
    }

    /// Adds the recordings of another process for this backend.
    pub fn add_saved(&mut self, backend: u32, saved: &[SavedSeries; Series::COUNT]) {
        for (series, saved) in Series::ALL.into_iter().zip(saved) {
            if !saved.values.is_empty() {
                let all = self.backends.entry(backend).or_default();
                all[series as usize].get_or_insert_with(SeriesData::new).add_saved(saved);
            }
        }
    }

    /// Removes everything, as after everything was [saved](MergedHistograms::save).
    pub fn clear(&mut self) {
        self.backends.clear();
    }

    /// Removes a backend that no longer exists.
    ///
    /// A delta that still arrives for it creates it again. A regular
    /// [`MergedHistograms::retain`] removes such entries.
    pub fn forget(&mut self, backend: u32) {
        self.backends.remove(&backend);
    }

    /// Removes every backend for which `live` returns false.
    pub fn retain(&mut self, live: impl Fn(u32) -> bool) {
        self.backends.retain(|backend, _| live(*backend));
    }
}

// === impl SeriesData ===

impl SeriesData {
    fn new() -> SeriesData {
        SeriesData { histogram: empty(), count: 0, sum_nanos: 0 }
    }

    fn add(&mut self, recording: &Recording, mut each: impl FnMut(Duration, u64)) {
        for step in recording.histogram.iter_recorded() {
            let (value, count) = (step.value_iterated_to(), step.count_since_last_iteration());
            if self.histogram.record_n(value, count).is_err() {
                self.histogram.saturating_record_n(value, count);
            }
            each(Duration::from_micros(value), count);
        }
        self.count += recording.count;
        self.sum_nanos += recording.sum_nanos;
    }

    fn save(&self) -> SavedSeries {
        let recorded = self.histogram.iter_recorded();
        SavedSeries {
            values: recorded
                .map(|step| (step.value_iterated_to(), step.count_since_last_iteration()))
                .collect(),
            sum_seconds: u64::try_from(self.sum_nanos / 1_000_000_000).unwrap_or(u64::MAX),
            sum_nanos: (self.sum_nanos % 1_000_000_000) as u32,
        }
    }

    fn add_saved(&mut self, saved: &SavedSeries) {
        for (value, count) in &saved.values {
            // The sender clamps values too, but its data is not trusted.
            let value = (*value).min(SESSION_MAX.as_micros() as u64);
            let count = (*count).min(SAVED_COUNT_MAX.saturating_sub(self.count));
            if self.histogram.record_n(value, count).is_err() {
                self.histogram.saturating_record_n(value, count);
            }
            self.count += count;
        }
        let nanos = u128::from(saved.sum_seconds) * 1_000_000_000 + u128::from(saved.sum_nanos);
        self.sum_nanos = self.sum_nanos.saturating_add(nanos);
    }

    /// Returns the number of recorded values.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// Returns the exact sum of all values, in seconds.
    pub fn sum_seconds(&self) -> f64 {
        self.sum_nanos as f64 / 1e9
    }

    /// Returns the value that a share `q` (0..=1) of all values does not exceed, within
    /// 1 %.
    pub fn quantile(&self, q: f64) -> Duration {
        Duration::from_micros(self.histogram.value_at_quantile(q.clamp(0.0, 1.0)))
    }

    /// Returns for each `i` the number of values that are at most
    /// [`BOUNDS_SECONDS`]`[i]`. The numbers never decrease and never exceed
    /// [`SeriesData::count`]. Each is exact for a bound within 1 % of the nominal one.
    pub fn cumulative(&self) -> [u64; BOUNDS_SECONDS.len()] {
        let mut buckets = [0u64; BOUNDS_SECONDS.len()];
        for step in self.histogram.iter_recorded() {
            let lowest = self.histogram.lowest_equivalent(step.value_iterated_to());
            let bucket = BOUNDS_SECONDS.iter().position(|bound| lowest as f64 <= bound * 1e6);
            if let Some(bucket) = bucket {
                buckets[bucket] += step.count_since_last_iteration();
            }
        }
        let mut sum = 0;
        buckets.map(|n| {
            sum += n;
            sum
        })
    }
}

/// Creates a small histogram that grows with its values.
fn empty<C: hdrhistogram::Counter>() -> Histogram<C> {
    Histogram::new(SIGNIFICANT_DIGITS).expect("two significant digits are within 0..=5")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn micros(n: u64) -> Duration {
        Duration::from_micros(n)
    }

    proptest! {
        #[test]
        fn merging_workers_equals_recording_everything_in_one(
            values in prop::collection::vec((0usize..4, 0u64..5_000_000_000), 1..300),
        ) {
            let mut workers: Vec<Recorder> = (0..4).map(|_| Recorder::new()).collect();
            let (mut merged, mut one) = (MergedHistograms::new(), Recorder::new());
            for (i, (worker, value)) in values.iter().enumerate() {
                workers[*worker].record(7, Series::Connect, micros(*value));
                one.record(7, Series::Connect, micros(*value));
                if i % 50 == 0 && let Some(delta) = workers[*worker].take() {
                    let spent = merged.absorb(delta);
                    workers[*worker].give_back(spent);
                }
            }
            for delta in workers.iter_mut().filter_map(Recorder::take) {
                merged.absorb(delta);
            }
            let mut whole = MergedHistograms::new();
            whole.absorb(one.take().unwrap());

            let parts = merged.get(7, Series::Connect).unwrap();
            let whole = whole.get(7, Series::Connect).unwrap();
            prop_assert_eq!(parts.count(), values.len() as u64);
            prop_assert_eq!(parts.sum_nanos, whole.sum_nanos);
            prop_assert_eq!(parts.cumulative(), whole.cumulative());
            for q in [0.0, 0.1, 0.5, 0.9, 0.99, 1.0] {
                prop_assert_eq!(parts.quantile(q), whole.quantile(q));
            }
        }

        #[test]
        fn quantiles_are_within_one_percent(
            mut values in prop::collection::vec(1u64..3_600_000_000, 1..200),
        ) {
            let mut recorder = Recorder::new();
            for value in &values {
                recorder.record(1, Series::FirstByte, micros(*value));
            }
            let mut merged = MergedHistograms::new();
            merged.absorb(recorder.take().unwrap());
            values.sort_unstable();
            for q in [0.01, 0.25, 0.5, 0.75, 0.99, 1.0] {
                let rank = ((q * values.len() as f64).ceil() as usize).max(1);
                let exact = values[rank - 1] as f64;
                let got = merged.get(1, Series::FirstByte).unwrap().quantile(q).as_micros() as f64;
                prop_assert!((got - exact).abs() <= exact * 0.01 + 1.0, "{q}: {got} for {exact}");
            }
        }
    }

    #[test]
    fn cumulative_counts_never_decrease_or_exceed_the_count() {
        let mut recorder = Recorder::new();
        for value in [40, 50, 51, 900, 30_000, 3_000_000] {
            recorder.record(0, Series::Session, micros(value));
        }
        recorder.record(0, Series::Session, Duration::from_secs(86_400));
        let mut merged = MergedHistograms::new();
        merged.absorb(recorder.take().unwrap());
        let data = merged.get(0, Series::Session).unwrap();
        let cumulative = data.cumulative();
        assert!(cumulative.is_sorted());
        assert_eq!((cumulative[0], cumulative[1], cumulative[21]), (2, 3, 6));
        assert_eq!(data.count(), 7, "the day-long session is only in +Inf");
    }

    #[test]
    fn values_beyond_the_clamp_are_clamped_and_summed_exactly() {
        let mut recorder = Recorder::new();
        recorder.record(0, Series::Connect, Duration::from_secs(1_000_000));
        recorder.record(0, Series::Session, Duration::MAX);
        let mut merged = MergedHistograms::new();
        merged.absorb(recorder.take().unwrap());
        let connect = merged.get(0, Series::Connect).unwrap();
        assert_eq!(connect.sum_seconds(), 1_000_000.0);
        let hour = LATENCY_MAX.as_secs_f64();
        assert!((connect.quantile(0.5).as_secs_f64() - hour).abs() < hour * 0.01);
        let week = SESSION_MAX.as_secs_f64();
        let session = merged.get(0, Series::Session).unwrap();
        assert!((session.quantile(0.5).as_secs_f64() - week).abs() < week * 0.01);
    }

    #[test]
    fn memory_stays_within_the_documented_bound() {
        let mut recording = Recording::new();
        recording.record(Series::Session, Duration::MAX);
        assert!(recording.histogram.distinct_values() * 4 <= 18 * 1024);
        let mut recording = Recording::new();
        recording.record(Series::Connect, Duration::MAX);
        assert!(recording.histogram.distinct_values() * 4 <= 13_500);
        let mut recording = Recording::new();
        recording.record(Series::Connect, Duration::from_millis(50));
        assert!(recording.histogram.distinct_values() * 4 <= 5 * 1024 + 512);
    }

    #[test]
    fn returned_histograms_are_reused_and_empty() {
        let (mut recorder, mut merged) = (Recorder::new(), MergedHistograms::new());
        recorder.record(1, Series::Connect, Duration::from_secs(1));
        let grown = {
            let delta = recorder.take().unwrap();
            let spent = merged.absorb(delta);
            let size = spent.0[0].series[0].as_ref().unwrap().histogram.distinct_values();
            recorder.give_back(spent);
            size
        };
        assert!(recorder.take().is_none());
        recorder.record(2, Series::Connect, micros(10));
        let delta = recorder.take().unwrap();
        let reused = delta.0[0].1.series[0].as_ref().unwrap();
        assert_eq!(reused.histogram.distinct_values(), grown);
        merged.absorb(delta);
        assert_eq!(merged.get(2, Series::Connect).unwrap().count(), 1);
        assert!(merged.get(2, Series::Session).is_none());
    }

    #[test]
    fn saved_series_is_added_unchanged() {
        let mut recorder = Recorder::new();
        for value in [40, 900, 3_000_000, 77_000_000_000] {
            recorder.record(3, Series::Session, micros(value));
        }
        let (mut one, mut other) = (MergedHistograms::new(), MergedHistograms::new());
        one.absorb(recorder.take().unwrap());
        let text = serde_json::to_string(&one.save(3)).unwrap();
        other.add_saved(8, &serde_json::from_str(&text).unwrap());
        let (saved, added) = (one.get(3, Series::Session), other.get(8, Series::Session));
        let (saved, added) = (saved.unwrap(), added.unwrap());
        assert_eq!((added.count(), added.sum_nanos), (saved.count(), saved.sum_nanos));
        assert_eq!(added.cumulative(), saved.cumulative());
        assert_eq!(added.quantile(0.5), saved.quantile(0.5));
        assert!(other.get(8, Series::Connect).is_none());
        other.add_saved(8, &one.save(3));
        assert_eq!(other.get(8, Series::Session).unwrap().count(), 8);
    }

    #[test]
    fn forgotten_backends_are_removed() {
        let (mut recorder, mut merged) = (Recorder::new(), MergedHistograms::new());
        for backend in 0..4 {
            recorder.record(backend, Series::Connect, micros(10));
        }
        merged.absorb(recorder.take().unwrap());
        merged.forget(0);
        merged.retain(|backend| backend != 1);
        let left: Vec<bool> = (0..4).map(|b| merged.get(b, Series::Connect).is_some()).collect();
        assert_eq!(left, [false, false, true, true]);
    }
}

//! Readers slower than the queues before them.
//!
//! What the balancer has acknowledged sits in its kernel's queue towards a reader for
//! seconds: no reset and no timer may throw it away as long as the reader takes some,
//! and a stream cut short must not look like a whole one. Each scene is a test; what
//! plays them is elsewhere.

use super::Act::{Acknowledged, Fin, Reads, Receives, Reset, SeesTheEnd, Send, SendUrgent};
use super::Step::{Backend, Client, Connect, Mark, Pause};
use super::{
    Act, Bytes, GONE, IN_ORDER, LIMITS, Limits, Reading, SCENE, Scene, fin, reset, scenes,
};
use crate::common::{ms, secs};

/// Some 130 kB a second.
const SLOWLY: Act = Reads(Reading::Slow(4_000, ms(30)));

/// Takes its reader three seconds, most of it out of our queue.
const ANSWER: u64 = 400_000;

/// Timers that each are over long before such a reader is done.
const SHORT: Limits = Limits { connect: secs(1), idle: secs(1), half_closed: secs(1), ..LIMITS };

scenes! {
    backend_resets_behind_an_answer_that_is_read_slowly: Scene {
        steps: &[
            &[Connect, Client(SLOWLY), Client(Send(1000)), Backend(Send(ANSWER))],
            &[Backend(Acknowledged), Backend(Reset), Client(SeesTheEnd)],
        ],
        client: reset(Bytes::All),
        backend: GONE,
        cause: "backend-reset",
        ..SCENE
    };
    client_resets_behind_an_upload_that_is_read_slowly: Scene {
        steps: &[
            &[Connect, Backend(SLOWLY), Client(Send(ANSWER))],
            &[Client(Acknowledged), Client(Reset), Backend(SeesTheEnd)],
        ],
        client: GONE,
        backend: reset(Bytes::All),
        cause: "client-reset",
        ..SCENE
    };
    /// With little patience, too, as long as some of it moves.
    backend_resets_and_the_client_takes_longer_than_any_timer: Scene {
        limits: SHORT,
        steps: &[
            &[Connect, Client(SLOWLY), Client(Send(1000)), Backend(Send(ANSWER))],
            &[Backend(Acknowledged), Backend(Reset), Client(SeesTheEnd)],
        ],
        client: reset(Bytes::All),
        backend: GONE,
        cause: "backend-reset",
        ..SCENE
    };
    /// A reader that has stopped is waited for no longer than the half-closed time.
    backend_resets_and_the_client_has_stopped_reading: Scene {
        limits: SHORT,
        steps: &[
            &[Connect, Client(Reads(Reading::Never)), Client(Send(1000))],
            &[Backend(Send(ANSWER)), Backend(Acknowledged), Backend(Reset)],
            &[Pause(ms(2500)), Client(Reads(Reading::Eager)), Client(SeesTheEnd)],
        ],
        client: reset(Bytes::Some),
        backend: GONE,
        cause: "backend-reset",
        ..SCENE
    };
    download_behind_the_clients_fin_is_read_slowly: Scene {
        limits: SHORT,
        steps: &[
            &[Connect, Client(SLOWLY), Client(Send(1000)), Client(Fin), Backend(SeesTheEnd)],
            &[Backend(Send(ANSWER)), Client(Receives(ANSWER)), Backend(Fin), Client(SeesTheEnd)],
        ],
        ..SCENE
    };
    /// The answer comes when the backend has read it all.
    upload_with_its_fin_is_read_slowly: Scene {
        limits: SHORT,
        steps: &[
            &[Connect, Backend(SLOWLY), Client(Send(ANSWER)), Client(Fin), Backend(SeesTheEnd)],
            &[Backend(Send(2000)), Backend(Fin), Client(SeesTheEnd)],
        ],
        ..SCENE
    };
    answer_that_is_read_slowly_is_not_idle: Scene {
        limits: SHORT,
        steps: &[
            &[Connect, Client(SLOWLY), Client(Send(1000)), Backend(Send(ANSWER))],
            &[Client(Receives(ANSWER)), Client(Send(1000)), Backend(Receives(2000))], IN_ORDER,
        ],
        ..SCENE
    };
    upload_that_is_read_slowly_is_not_idle: Scene {
        limits: SHORT,
        steps: &[
            &[Connect, Backend(SLOWLY), Client(Send(ANSWER))],
            &[Backend(Receives(ANSWER)), Backend(Send(1000)), Client(Receives(1000))], IN_ORDER,
        ],
        ..SCENE
    };
    /// It ends in time, and with a reset: what the client has is a part.
    client_that_has_stopped_reading_is_reset_by_the_idle_timer: Scene {
        limits: SHORT,
        steps: &[
            &[Connect, Client(Reads(Reading::Never)), Client(Send(1000))],
            &[Backend(Receives(1000)), Backend(Send(4 << 20)), Mark],
            &[Backend(SeesTheEnd), Client(Reads(Reading::Eager)), Client(SeesTheEnd)],
        ],
        client: reset(Bytes::Some),
        backend: reset(Bytes::All),
        when: (ms(900), ms(1900)),
        cause: "idle-timeout",
        ..SCENE
    };
    backend_that_has_stopped_reading_is_reset_by_the_half_closed_timer: Scene {
        limits: SHORT,
        steps: &[
            &[Connect, Backend(Reads(Reading::Never)), Client(Send(ANSWER)), Client(Fin), Mark],
            &[Client(SeesTheEnd), Backend(Reads(Reading::Eager)), Backend(SeesTheEnd)],
        ],
        client: reset(Bytes::None),
        backend: reset(Bytes::Some),
        when: (ms(900), ms(1900)),
        cause: "half-closed-timeout",
        ..SCENE
    };
    /// All was delivered: whoever has it learns that there is no more to come.
    half_closed_session_without_a_word_left_ends_in_order: Scene {
        limits: SHORT,
        steps: &[
            &[Connect, Client(Send(1000)), Client(Fin), Backend(SeesTheEnd), Backend(Send(2000))],
            &[Client(Receives(2000)), Mark, Client(SeesTheEnd)],
        ],
        client: fin(Bytes::All),
        when: (ms(900), ms(1900)),
        cause: "half-closed-timeout",
        ..SCENE
    };
    /// An urgent mark between bulk and an end, both ways.
    bulk_an_urgent_byte_and_a_fin: Scene {
        steps: &[
            &[Connect, Client(Send(300_000)), Client(SendUrgent), Client(Send(100_000))],
            &[Client(Fin), Backend(SeesTheEnd)],
            &[Backend(Send(300_000)), Backend(SendUrgent), Backend(Send(100_000)), Backend(Fin)],
            &[Client(SeesTheEnd)],
        ],
        ..SCENE
    };
    /// The same with what comes behind the mark held back until the bulk is read.
    bulk_an_urgent_byte_and_a_fin_for_a_slow_reader: Scene {
        steps: &[
            &[Connect, Backend(Reads(Reading::Slow(64_000, ms(20)))), Client(Send(1_500_000))],
            &[Client(SendUrgent), Client(Send(1000)), Client(Fin), Backend(SeesTheEnd)],
            &[Client(Reads(Reading::Slow(64_000, ms(20)))), Backend(Send(1_500_000))],
            &[Backend(SendUrgent), Backend(Send(1000)), Backend(Fin), Client(SeesTheEnd)],
        ],
        ..SCENE
    };
    /// Each becomes an ordinary byte, though the next comes at once.
    urgent_bytes_come_in_a_row: Scene {
        steps: &[
            &[Connect, Backend(Send(1000)), Client(Receives(1000))],
            &[Backend(SendUrgent); 20], &[Backend(Send(3)), Client(Receives(1023))],
            &[Client(SendUrgent); 20], &[Client(Send(3)), Backend(Receives(23))], IN_ORDER,
        ],
        ..SCENE
    };
}

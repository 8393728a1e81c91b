//! Readers that are slower than the queues before them.
//!
//! Bytes that Tidegate has acknowledged can wait in its kernel's queue for seconds. No reset
//! and no timer may discard them while the reader reads some, and a truncated stream must not
//! look complete. Each scene is a test, run by `play`.

use super::Act::{Acknowledged, Fin, Reads, Receives, Reset, SeesTheEnd, Send, SendUrgent};
use super::Step::{Backend, Client, Connect, Mark, Pause};
use super::{
    Act, Bytes, GONE, IN_ORDER, LIMITS, Limits, Reading, SCENE, Scene, fin, reset, scenes,
};
use crate::common::{ms, secs};

/// About 130 kB per second.
const SLOWLY: Act = Reads(Reading::Slow(4_000, ms(30)));

/// A slow reader needs 3 s for it, and most of it waits in Tidegate's queue.
const ANSWER: u64 = 400_000;

/// Timers that all expire long before a slow reader has finished.
const SHORT: Limits = Limits { connect: secs(1), idle: secs(1), half_closed: secs(1), ..LIMITS };

scenes! {
    backend_resets_after_an_answer_that_is_read_slowly: Scene {
        steps: &[
            &[Connect, Client(SLOWLY), Client(Send(1000)), Backend(Send(ANSWER))],
            &[Backend(Acknowledged), Backend(Reset), Client(SeesTheEnd)],
        ],
        client: reset(Bytes::All),
        backend: GONE,
        cause: "backend-reset",
        ..SCENE
    };
    client_resets_after_an_upload_that_is_read_slowly: Scene {
        steps: &[
            &[Connect, Backend(SLOWLY), Client(Send(ANSWER))],
            &[Client(Acknowledged), Client(Reset), Backend(SeesTheEnd)],
        ],
        client: GONE,
        backend: reset(Bytes::All),
        cause: "client-reset",
        ..SCENE
    };
    /// Short timers do not end the session while bytes move.
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
    /// After a reset, Tidegate waits for a reader that has stopped at most `half_closed_timeout`.
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
    download_after_the_clients_fin_is_read_slowly: Scene {
        limits: SHORT,
        steps: &[
            &[Connect, Client(SLOWLY), Client(Send(1000)), Client(Fin), Backend(SeesTheEnd)],
            &[Backend(Send(ANSWER)), Client(Receives(ANSWER)), Backend(Fin), Client(SeesTheEnd)],
        ],
        ..SCENE
    };
    /// The backend answers after it has read everything.
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
    /// The session ends in time and with a reset, because the client has only a part.
    client_that_stopped_reading_is_reset_after_idle_timeout: Scene {
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
    backend_that_stopped_reading_is_reset_after_half_closed_timeout: Scene {
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
    /// Everything was delivered, so the client gets a FIN.
    half_closed_session_without_pending_bytes_ends_with_fin: Scene {
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
    /// An urgent byte between bulk data and a FIN, in both directions.
    bulk_data_urgent_byte_and_fin_arrive: Scene {
        steps: &[
            &[Connect, Client(Send(300_000)), Client(SendUrgent), Client(Send(100_000))],
            &[Client(Fin), Backend(SeesTheEnd)],
            &[Backend(Send(300_000)), Backend(SendUrgent), Backend(Send(100_000)), Backend(Fin)],
            &[Client(SeesTheEnd)],
        ],
        ..SCENE
    };
    /// The bytes after the urgent byte wait until the slow reader has read the bulk data.
    bulk_data_urgent_byte_and_fin_arrive_at_a_slow_reader: Scene {
        steps: &[
            &[Connect, Backend(Reads(Reading::Slow(64_000, ms(20)))), Client(Send(1_500_000))],
            &[Client(SendUrgent), Client(Send(1000)), Client(Fin), Backend(SeesTheEnd)],
            &[Client(Reads(Reading::Slow(64_000, ms(20)))), Backend(Send(1_500_000))],
            &[Backend(SendUrgent), Backend(Send(1000)), Backend(Fin), Client(SeesTheEnd)],
        ],
        ..SCENE
    };
    /// Each urgent byte becomes an ordinary byte, even if the next follows immediately.
    urgent_bytes_follow_each_other: Scene {
        steps: &[
            &[Connect, Backend(Send(1000)), Client(Receives(1000))],
            &[Backend(SendUrgent); 20], &[Backend(Send(3)), Client(Receives(1023))],
            &[Client(SendUrgent); 20], &[Client(Send(3)), Backend(Receives(23))], IN_ORDER,
        ],
        ..SCENE
    };
}

//! Faults of the network: cases 1 to 21.
//!
//! Lost handshakes, silence, loss, reordering, small MTUs, unreachable hosts, closed windows and
//! resets in every state. Each scene is a test, run by `play`.

use super::Act::{Acknowledged, Fin, Reads, Receives, Reset, SeesTheEnd, Send};
use super::Step::{Accept, Backend, Client, Connect, Dial, Each, Hosts, Link, Mark, Pause};
use super::{
    Bytes, GONE, IN_ORDER, LIMITS, Leg, Limits, MIDSTREAM, NEVER, Reading, SCENE, STREAM, Scene,
    Step, Way, open, reset, scenes,
};
use crate::common::{ms, secs};
use crate::link::channel::{Impairment, Loss};
use std::time::Duration;

/// Ends a silent connection after 1.5 s.
const SILENCE: Limits = Limits { user_timeout: Some(ms(1500)), ..LIMITS };

/// The kernel checks the timeout only at a retransmission, up to twice as late.
const SILENCE_ENDS: (Duration, Duration) = (ms(700), secs(8));

fn partition(how: &mut Impairment) {
    how.partition = true;
}

fn repair(how: &mut Impairment) {
    *how = Impairment::default();
}

/// Both ends send [`STREAM`] bytes over two links with these settings, and close.
const fn both_ways(link: fn(&mut Impairment)) -> [Step; 9] {
    [
        Link(Leg::Backend, Way::Both, link),
        Link(Leg::Client, Way::Both, link),
        Connect,
        Client(Send(STREAM)),
        Backend(Send(STREAM)),
        Client(Fin),
        Backend(Fin),
        Client(SeesTheEnd),
        Backend(SeesTheEnd),
    ]
}

/// The backend answers after it has accepted the connection.
const LATE_ACCEPT: &[Step] = &[Accept, Backend(Send(1000)), Client(Receives(1000))];

/// Both ends send a stream followed by a FIN.
const STREAMING: &[Step] =
    &[Client(Send(STREAM)), Backend(Send(STREAM)), Client(Fin), Backend(Fin)];

const BOTH_END: &[Step] = &[Client(SeesTheEnd), Backend(SeesTheEnd)];

scenes! {
    /// Case 1.
    syn_to_the_backend_is_lost: Scene {
        steps: &[
            &[Link(Leg::Backend, Way::In, partition), Dial, Client(Send(1000)), Pause(ms(300))],
            &[Link(Leg::Backend, Way::In, repair)], LATE_ACCEPT, IN_ORDER,
        ],
        ..SCENE
    };
    /// Case 1.
    syn_is_never_answered: Scene {
        limits: Limits { connect: secs(1), ..LIMITS },
        steps: &[&[Link(Leg::Backend, Way::In, partition), Mark, Dial, Client(Send(1000))]],
        client: reset(Bytes::None),
        backend: NEVER,
        when: (ms(900), secs(4)),
        cause: "connect-timeout",
        ..SCENE
    };
    /// Case 2.
    syn_ack_of_the_backend_is_lost: Scene {
        steps: &[
            &[Link(Leg::Backend, Way::Out, partition), Dial, Client(Send(1000)), Pause(ms(300))],
            &[Link(Leg::Backend, Way::Out, repair)], LATE_ACCEPT, IN_ORDER,
        ],
        ..SCENE
    };
    /// Case 3: Tidegate's connection is established, the backend's is not yet.
    last_ack_of_the_handshake_is_lost_and_data_follows: Scene {
        steps: &[
            &[Link(Leg::Backend, Way::Out, |how| how.delay = ms(100)), Dial, Pause(ms(40))],
            &[Link(Leg::Backend, Way::In, partition), Client(Send(1000)), Pause(ms(300))],
            &[Link(Leg::Backend, Way::Both, repair)], LATE_ACCEPT, IN_ORDER,
        ],
        ..SCENE
    };
    /// Case 4.
    backend_becomes_silent_midstream: Scene {
        limits: SILENCE,
        steps: &[MIDSTREAM, &[Link(Leg::Backend, Way::Both, partition), Mark, Client(Send(1000))]],
        client: reset(Bytes::All),
        backend: open(Bytes::Some),
        when: SILENCE_ENDS,
        cause: "backend-lost",
        ..SCENE
    };
    /// Case 4, for the client.
    client_becomes_silent_midstream: Scene {
        limits: SILENCE,
        steps: &[MIDSTREAM, &[Link(Leg::Client, Way::Both, partition), Mark, Backend(Send(1000))]],
        client: open(Bytes::Some),
        backend: reset(Bytes::All),
        when: SILENCE_ENDS,
        cause: "client-lost",
        ..SCENE
    };
    /// Case 5: bytes arrive but are not acknowledged.
    acknowledgements_of_the_backend_are_lost: Scene {
        limits: SILENCE,
        steps: &[MIDSTREAM, &[Link(Leg::Backend, Way::Out, partition), Mark, Client(Send(1000))]],
        client: reset(Bytes::All),
        backend: open(Bytes::All),
        when: SILENCE_ENDS,
        cause: "backend-lost",
        ..SCENE
    };
    /// Case 5: each direction in turn is partitioned for a while, and both are in use.
    one_way_partition_heals: Scene {
        steps: &[
            MIDSTREAM, &[Link(Leg::Backend, Way::In, partition)], STREAMING,
            &[Pause(ms(700)), Link(Leg::Backend, Way::In, repair)],
            &[Link(Leg::Client, Way::Out, partition), Pause(ms(500)), Link(Leg::Client, Way::Out, repair)],
            BOTH_END,
        ],
        ..SCENE
    };
    /// Case 6.
    five_percent_of_the_packets_are_lost: Scene {
        steps: &[&both_ways(|how| how.loss = Loss::Independent(0.05))],
        ..SCENE
    };
    /// Case 7.
    all_packets_are_lost_for_two_seconds: Scene {
        steps: &[
            &[Link(Leg::Backend, Way::Both, |how| how.rate = Some(4_000_000)), Connect], STREAMING,
            &[Pause(ms(100)), Link(Leg::Backend, Way::Both, partition), Pause(secs(2))],
            &[Link(Leg::Backend, Way::Both, repair)], BOTH_END,
        ],
        ..SCENE
    };
    /// Case 7: with bursts of losses.
    losses_come_in_bursts: Scene {
        steps: &[&both_ways(|how| {
            how.loss = Loss::Bursts { enter: 0.02, leave: 0.3, lost: 0.9 };
        })],
        ..SCENE
    };
    /// Case 8.
    quarter_of_the_packets_are_reordered: Scene {
        steps: &[&both_ways(|how| (how.reorder, how.delay) = (0.25, ms(2)))],
        ..SCENE
    };
    /// Case 9.
    tenth_of_the_packets_are_duplicated: Scene {
        steps: &[&both_ways(|how| how.duplicate = 0.1)],
        ..SCENE
    };
    /// Case 10.
    bits_are_flipped: Scene {
        steps: &[&both_ways(|how| how.corrupt = 0.01)],
        ..SCENE
    };
    /// Case 11.
    delay_varies_by_200_ms: Scene {
        steps: &[&both_ways(|how| (how.delay, how.jitter) = (ms(100), ms(100)))],
        ..SCENE
    };
    /// Case 12: a fast sender and a slow link.
    bottleneck_of_one_megabit: Scene {
        steps: &[
            &[Link(Leg::Backend, Way::In, |how| (how.rate, how.queue) = (Some(1_000_000), 16_384))],
            &[Connect, Mark, Client(Send(STREAM)), Client(Fin), Backend(SeesTheEnd)],
            &[Backend(Fin), Client(SeesTheEnd)],
        ],
        when: (ms(900), secs(12)),
        ..SCENE
    };
    /// Case 13.
    mtu_is_576: Scene {
        steps: &[
            &[Hosts(|site| {
                site.balancer.ip("link set link1 mtu 576");
                site.backend.ip("link set link1 mtu 576");
            })],
            &[Connect], STREAMING, BOTH_END,
        ],
        ..SCENE
    };
    /// Case 13: large packets are dropped without notification. Hosts that probe the path MTU
    /// (RFC 4821) succeed.
    path_drops_large_packets: Scene {
        steps: &[
            &[Hosts(|site| {
                for host in [&site.balancer, &site.backend] {
                    host.sysctl("ipv4/tcp_mtu_probing", "1");
                }
            })],
            &[Link(Leg::Backend, Way::Both, |how| how.largest = Some(1200))],
            &[Connect], STREAMING, BOTH_END,
        ],
        ..SCENE
    };
    /// Case 13: hosts that do not probe the path MTU end the session in time.
    path_drops_large_packets_until_timeout: Scene {
        limits: SILENCE,
        steps: &[
            MIDSTREAM,
            &[Link(Leg::Backend, Way::Both, |how| how.largest = Some(1200))],
            &[Mark, Client(Send(STREAM))],
        ],
        client: reset(Bytes::All),
        backend: open(Bytes::Some),
        when: SILENCE_ENDS,
        cause: "backend-lost",
        ..SCENE
    };
    /// Case 14: another host answers for the backend's host, which returns later.
    host_is_unreachable_for_a_second: Scene {
        steps: &[
            MIDSTREAM,
            &[Hosts(|site| {
                site.backend.sysctl("ipv4/ip_forward", "1");
                site.backend.ip("address add 10.77.1.3 dev link1\n\
                                 address delete 10.77.1.2 peer 10.77.1.1 dev link1\n\
                                 route add unreachable 10.77.1.2");
            })],
            STREAMING, &[Pause(secs(1))],
            &[Hosts(|site| {
                site.backend.ip("route delete unreachable 10.77.1.2\n\
                                 address add 10.77.1.2 peer 10.77.1.1 dev link1");
            })],
            BOTH_END,
        ],
        ..SCENE
    };
    /// Case 15.
    link_is_down_for_a_moment: Scene {
        steps: &[
            MIDSTREAM, &[Hosts(|site| site.balancer.ip("link set link1 down"))], STREAMING,
            &[Pause(ms(600)), Hosts(|site| site.balancer.ip("link set link1 up"))], BOTH_END,
        ],
        ..SCENE
    };
    /// Case 15.
    link_is_down_longer_than_user_timeout: Scene {
        limits: SILENCE,
        steps: &[
            MIDSTREAM, &[Mark, Hosts(|site| site.balancer.ip("link set link1 down"))],
            &[Client(Send(STREAM)), Client(SeesTheEnd)],
            &[Hosts(|site| site.balancer.ip("link set link1 up"))],
        ],
        client: reset(Bytes::All),
        backend: open(Bytes::Some),
        when: SILENCE_ENDS,
        cause: "backend-lost",
        ..SCENE
    };
    /// Case 16.
    window_of_the_backend_stays_closed: Scene {
        limits: SILENCE,
        receive_buffer: Some(4096),
        steps: &[
            MIDSTREAM, &[Backend(Reads(Reading::Never)), Mark, Client(Send(16 << 20))],
        ],
        client: reset(Bytes::All),
        backend: open(Bytes::Some),
        when: SILENCE_ENDS,
        cause: "backend-lost",
    };
    /// Case 17: a window of at most one segment, and a slow reader.
    window_is_tiny: Scene {
        receive_buffer: Some(1),
        steps: &[
            &[Connect, Backend(Reads(Reading::Slow(100, ms(1)))), Client(Send(12_000))],
            &[Client(Fin), Backend(SeesTheEnd), Backend(Fin), Client(SeesTheEnd)],
        ],
        ..SCENE
    };
    /// Case 18.
    both_sides_close_at_once: Scene {
        steps: &[
            MIDSTREAM, &[Link(Leg::Backend, Way::Both, |how| how.delay = ms(20))],
            &[Link(Leg::Client, Way::Both, |how| how.delay = ms(20))],
            &[Client(Fin), Backend(Fin)], BOTH_END,
        ],
        ..SCENE
    };
    /// Case 19 in SYN_SENT, and case 22.
    connection_is_refused: Scene {
        steps: &[&[Each(|candidate, _| candidate.ends.listener = None), Mark, Dial, Client(Send(1000))]],
        client: reset(Bytes::None),
        backend: NEVER,
        when: (ms(0), secs(4)),
        cause: "connect-refused",
        ..SCENE
    };
    /// Case 19 in ESTABLISHED.
    backend_resets_midstream: Scene {
        steps: &[MIDSTREAM, &[Mark, Backend(Reset)]],
        client: reset(Bytes::All),
        backend: GONE,
        when: (ms(0), secs(4)),
        cause: "backend-reset",
        ..SCENE
    };
    /// Case 19 in FIN_WAIT: the client has closed its sending side and gets no complete answer.
    backend_resets_after_the_clients_fin: Scene {
        steps: &[
            MIDSTREAM, &[Client(Fin), Backend(SeesTheEnd), Backend(Send(STREAM))],
            &[Backend(Acknowledged), Mark, Backend(Reset)],
        ],
        client: reset(Bytes::All),
        backend: GONE,
        when: (ms(0), secs(4)),
        cause: "backend-reset",
        ..SCENE
    };
    /// Case 19 in FIN_WAIT.
    client_resets_after_the_backends_fin: Scene {
        steps: &[
            MIDSTREAM, &[Backend(Fin), Client(SeesTheEnd), Client(Send(STREAM))],
            &[Client(Acknowledged), Client(Reset)],
        ],
        client: GONE,
        backend: reset(Bytes::All),
        cause: "client-reset",
        ..SCENE
    };
    /// Case 20.
    keepalive_detects_a_silent_backend: Scene {
        limits: Limits { keepalive: Some(secs(1)), ..SILENCE },
        steps: &[MIDSTREAM, &[Link(Leg::Backend, Way::Both, partition), Mark]],
        client: reset(Bytes::All),
        backend: open(Bytes::All),
        when: (ms(900), secs(11)),
        cause: "backend-lost",
        ..SCENE
    };
    /// Case 20.
    keepalive_detects_a_silent_client: Scene {
        limits: Limits { keepalive: Some(secs(1)), ..SILENCE },
        steps: &[MIDSTREAM, &[Link(Leg::Client, Way::Both, partition), Mark]],
        client: open(Bytes::All),
        backend: reset(Bytes::All),
        when: (ms(900), secs(11)),
        cause: "client-lost",
        ..SCENE
    };
}

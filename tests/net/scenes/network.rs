//! What the network does: cases 1 to 21.
//!
//! Lost handshakes, silence, loss, reordering, narrow paths, unreachable hosts,
//! closed windows, resets in every state. Each scene is a test; what plays them
//! is elsewhere.

use super::Act::{Acknowledged, Fin, Reads, Receives, Reset, SeesTheEnd, Send};
use super::Step::{Accept, Backend, Client, Connect, Dial, Each, Hosts, Link, Mark, Pause};
use super::{
    Bytes, GONE, IN_ORDER, LIMITS, Leg, Limits, MIDSTREAM, NEVER, Reading, SCENE, STREAM, Scene,
    Step, Way, open, reset, scenes,
};
use crate::common::{ms, secs};
use crate::link::channel::{Impairment, Loss};
use std::time::Duration;

/// Silence for so long is the end.
const SILENCE: Limits = Limits { user_timeout: Some(ms(1500)), ..LIMITS };

/// The kernel looks when it would send again: up to twice as late.
const SILENCE_ENDS: (Duration, Duration) = (ms(700), secs(8));

fn cut(how: &mut Impairment) {
    how.partition = true;
}

fn mend(how: &mut Impairment) {
    *how = Impairment::default();
}

/// Both ends send as much as they can over two cables like that, and close.
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

/// The backend answers once it has the connection.
const LATE_ACCEPT: &[Step] = &[Accept, Backend(Send(1000)), Client(Receives(1000))];

/// Both ends have a stream under way and a FIN behind it.
const STREAMING: &[Step] =
    &[Client(Send(STREAM)), Backend(Send(STREAM)), Client(Fin), Backend(Fin)];

const BOTH_END: &[Step] = &[Client(SeesTheEnd), Backend(SeesTheEnd)];

scenes! {
    /// Case 1.
    syn_to_the_backend_is_lost: Scene {
        steps: &[
            &[Link(Leg::Backend, Way::In, cut), Dial, Client(Send(1000)), Pause(ms(300))],
            &[Link(Leg::Backend, Way::In, mend)], LATE_ACCEPT, IN_ORDER,
        ],
        ..SCENE
    };
    /// Case 1.
    syn_is_never_answered: Scene {
        limits: Limits { connect: secs(1), ..LIMITS },
        steps: &[&[Link(Leg::Backend, Way::In, cut), Mark, Dial, Client(Send(1000))]],
        client: reset(Bytes::None),
        backend: NEVER,
        when: (ms(900), secs(4)),
        cause: "connect-timeout",
        ..SCENE
    };
    /// Case 2.
    syn_ack_of_the_backend_is_lost: Scene {
        steps: &[
            &[Link(Leg::Backend, Way::Out, cut), Dial, Client(Send(1000)), Pause(ms(300))],
            &[Link(Leg::Backend, Way::Out, mend)], LATE_ACCEPT, IN_ORDER,
        ],
        ..SCENE
    };
    /// Case 3: the balancer's connection stands, the backend's does not yet.
    last_ack_of_the_handshake_is_lost_and_data_follows: Scene {
        steps: &[
            &[Link(Leg::Backend, Way::Out, |how| how.delay = ms(100)), Dial, Pause(ms(40))],
            &[Link(Leg::Backend, Way::In, cut), Client(Send(1000)), Pause(ms(300))],
            &[Link(Leg::Backend, Way::Both, mend)], LATE_ACCEPT, IN_ORDER,
        ],
        ..SCENE
    };
    /// Case 4.
    backend_falls_silent_midstream: Scene {
        limits: SILENCE,
        steps: &[MIDSTREAM, &[Link(Leg::Backend, Way::Both, cut), Mark, Client(Send(1000))]],
        client: reset(Bytes::All),
        backend: open(Bytes::Some),
        when: SILENCE_ENDS,
        cause: "backend-lost",
        ..SCENE
    };
    /// Case 4, on the other side.
    client_falls_silent_midstream: Scene {
        limits: SILENCE,
        steps: &[MIDSTREAM, &[Link(Leg::Client, Way::Both, cut), Mark, Backend(Send(1000))]],
        client: open(Bytes::Some),
        backend: reset(Bytes::All),
        when: SILENCE_ENDS,
        cause: "client-lost",
        ..SCENE
    };
    /// Case 5: what is sent arrives, and nobody learns of it.
    acknowledgements_of_the_backend_are_cut: Scene {
        limits: SILENCE,
        steps: &[MIDSTREAM, &[Link(Leg::Backend, Way::Out, cut), Mark, Client(Send(1000))]],
        client: reset(Bytes::All),
        backend: open(Bytes::All),
        when: SILENCE_ENDS,
        cause: "backend-lost",
        ..SCENE
    };
    /// Case 5: one way at a time is cut for a while, both are used.
    one_way_partition_heals: Scene {
        steps: &[
            MIDSTREAM, &[Link(Leg::Backend, Way::In, cut)], STREAMING,
            &[Pause(ms(700)), Link(Leg::Backend, Way::In, mend)],
            &[Link(Leg::Client, Way::Out, cut), Pause(ms(500)), Link(Leg::Client, Way::Out, mend)],
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
    everything_is_lost_for_two_seconds: Scene {
        steps: &[
            &[Link(Leg::Backend, Way::Both, |how| how.rate = Some(4_000_000)), Connect], STREAMING,
            &[Pause(ms(100)), Link(Leg::Backend, Way::Both, cut), Pause(secs(2))],
            &[Link(Leg::Backend, Way::Both, mend)], BOTH_END,
        ],
        ..SCENE
    };
    /// Case 7: losses that come together.
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
    tenth_of_the_packets_come_twice: Scene {
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
    /// Case 12: a fast sender before a narrow path.
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
    /// Case 13: large packets vanish in silence; hosts that probe for the path's
    /// MTU (RFC 4821) get through.
    path_swallows_large_packets: Scene {
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
    /// Case 13: those that do not give up in time, and say so.
    path_swallows_large_packets_for_good: Scene {
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
    /// Case 14: another host answers for the backend's, which is back later.
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
    link_is_down_for_longer_than_silence_may_last: Scene {
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
    /// Case 17: a window of a segment at most, and a reader in no hurry.
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
    /// Case 19, in SYN_SENT; case 22.
    connection_is_refused: Scene {
        steps: &[&[Each(|one, _| one.duet.listener = None), Mark, Dial, Client(Send(1000))]],
        client: reset(Bytes::None),
        backend: NEVER,
        when: (ms(0), secs(4)),
        cause: "connect-refused",
        ..SCENE
    };
    /// Case 19, in ESTABLISHED.
    backend_resets_midstream: Scene {
        steps: &[MIDSTREAM, &[Mark, Backend(Reset)]],
        client: reset(Bytes::All),
        backend: GONE,
        when: (ms(0), secs(4)),
        cause: "backend-reset",
        ..SCENE
    };
    /// Case 19, in FIN_WAIT: the client is done, and gets no answer.
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
    /// Case 19, in FIN_WAIT.
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
    keepalive_finds_a_dead_backend: Scene {
        limits: Limits { keepalive: Some(secs(1)), ..SILENCE },
        steps: &[MIDSTREAM, &[Link(Leg::Backend, Way::Both, cut), Mark]],
        client: reset(Bytes::All),
        backend: open(Bytes::All),
        when: (ms(900), secs(11)),
        cause: "backend-lost",
        ..SCENE
    };
    /// Case 20.
    keepalive_finds_a_dead_client: Scene {
        limits: Limits { keepalive: Some(secs(1)), ..SILENCE },
        steps: &[MIDSTREAM, &[Link(Leg::Client, Way::Both, cut), Mark]],
        client: open(Bytes::All),
        backend: reset(Bytes::All),
        when: (ms(900), secs(11)),
        cause: "client-lost",
        ..SCENE
    };
}

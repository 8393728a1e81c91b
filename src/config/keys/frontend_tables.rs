//! The keys of frontends.

use super::tables::{CONNECTIONS, key};
use super::{Applies, ConfigKey, DefaultValue, Values, words};
use Applies::Reload;
use DefaultValue::{Described, Required, Value};
use Values::{Flag, Form, Integer, Time, WordOrTime, Words};
use tidegate_core::model::OtherPeers;

const BYTE_RATE: Values = Form("`\"off\"`, or `\"1KiB/s\"` to `\"1TiB/s\"`");
const TIME_OR_OFF: Values = WordOrTime("off", "", "1ms", "30d");
const RANGES: Values = Form("a prefix such as `\"10.0.0.0/8\"`, an address, or a list of both");

pub(super) const FRONTEND: &[ConfigKey] = &[
    key(
        "bind",
        Form("an address, a [table](#bind), or a list of both"),
        Required,
        Reload,
        "Addresses to listen on, see [Addresses](#addresses).",
    ),
    key(
        "pool",
        Form("the name of a pool"),
        Required,
        Reload,
        "Pool for clients that match no route.",
    ),
    key(
        "enabled",
        Flag,
        Value("true"),
        Reload,
        "`false`: as if the file did not have this frontend. Its keys are still checked.",
    ),
    key(
        "client_first",
        TIME_OR_OFF,
        Value("\"off\""),
        Reload,
        "Pick a backend when the client has sent its first byte. Reject clients that send none \
         within this time.",
    ),
    key(
        "first_byte_timeout",
        TIME_OR_OFF,
        Value("\"off\""),
        Reload,
        "Close sessions in which neither side has sent data within this time after the connection \
         to the backend was established.",
    ),
    key(
        "idle_timeout",
        TIME_OR_OFF,
        Value("\"10m\""),
        Reload,
        "Close sessions in which no data has moved for this long.",
    ),
    key(
        "half_closed_timeout",
        TIME_OR_OFF,
        Value("\"30s\""),
        Reload,
        "Close sessions in which no data has moved for this long after one side sent FIN. \
         `idle_timeout` does not apply to these sessions.",
    ),
    key(
        "session_max",
        TIME_OR_OFF,
        Value("\"off\""),
        Reload,
        "Close sessions of this age, or up to 19 % younger, see \
         [limits.md](limits.md#the-age-of-sessions). A changed value applies to new sessions.",
    ),
    key(
        "stalled_timeout",
        WordOrTime("off", "", "1s", "32767s"),
        Value("\"45s\""),
        Reload,
        "Minimum of `first_byte_timeout`, `idle_timeout` and `half_closed_timeout` while a peer \
         answers but its receive buffer is full.",
    ),
    key(
        "keepalive",
        WordOrTime("off", "", "1s", "32767s"),
        Value("\"60s\""),
        Reload,
        "Idle time before TCP keepalive probes, on both sides, in whole seconds.",
    ),
    key(
        "user_timeout",
        WordOrTime("off", "", "1ms", "24d"),
        Value("\"2m\""),
        Reload,
        "Time that sent data or keepalive probes can stay unacknowledged before the connection \
         counts as lost (`TCP_USER_TIMEOUT`, both sides). `\"off\"` leaves the kernel's default.",
    ),
    key(
        "download_rate",
        BYTE_RATE,
        Value("\"off\""),
        Reload,
        "Most bytes per second that the kernel sends to the client of each session. A changed \
         value applies to new sessions.",
    ),
    key(
        "upload_rate",
        BYTE_RATE,
        Value("\"off\""),
        Reload,
        "Most bytes per second that the kernel sends to the backend of each session. A changed \
         value applies to new sessions.",
    ),
    key(
        "connections_max",
        CONNECTIONS,
        Value("0"),
        Reload,
        "Cap on open sessions of this frontend over all processes of an upgrade together. \
         `0`: no cap.",
    ),
];

pub(super) const BIND: &[ConfigKey] = &[
    key(
        "address",
        Form("an address"),
        Required,
        Reload,
        "Address to listen on, with one port or a range of ports, or a Unix socket.",
    ),
    key(
        "interface",
        Form("the name of an interface"),
        Described("any interface"),
        Reload,
        "Accept only connections that arrive on this interface. Binds with the same address can \
         differ in their interface.",
    ),
    key(
        "freebind",
        Flag,
        Value("false"),
        Reload,
        "Listen before an interface has the address, for addresses that move between hosts. \
         Wildcard addresses reject `true`.",
    ),
    key(
        "backlog",
        Integer(1, 65_535),
        Value("65_535"),
        Reload,
        "Length of the listen queue of each worker. The kernel lowers it to \
         `net.core.somaxconn`.",
    ),
    key(
        "mark",
        Integer(0, 4_294_967_295),
        Value("0"),
        Reload,
        "Firewall mark of the packets to clients (`SO_MARK`, needs `CAP_NET_ADMIN`). `0`: none.",
    ),
    key(
        "dscp",
        Integer(0, 63),
        Value("0"),
        Reload,
        "Differentiated services code point of the packets to clients.",
    ),
    key(
        "proxy_protocol",
        Flag,
        Value("false"),
        Reload,
        "Peers in `from` of [`proxy_protocol`](#frontendnameproxy_protocol) start each connection \
         with a PROXY header. So do all peers of a Unix socket.",
    ),
    key(
        "mode",
        Form("permissions such as `\"0660\"`"),
        Value("\"0660\""),
        Reload,
        "Permissions of the file of a Unix socket: clients need the right to write. The file belongs \
         to the user and the group of Tidegate.",
    ),
];

pub(super) const ROUTE: &[ConfigKey] = &[
    key(
        "sources",
        RANGES,
        Described("any client"),
        Reload,
        "Condition: ranges of client addresses.",
    ),
    key(
        "ports",
        Form("a port, a range such as `\"8000-8010\"`, or a list of both"),
        Described("any port"),
        Reload,
        "Condition: ports that clients connect to.",
    ),
    key(
        "addresses",
        RANGES,
        Described("any address"),
        Reload,
        "Condition: ranges of addresses that clients connect to.",
    ),
    key(
        "pool",
        Form("the name of a pool"),
        Described("required without `refuse`"),
        Reload,
        "Pool for the clients that match this route.",
    ),
    key("refuse", Flag, Value("false"), Reload, "Reset the clients that match this route."),
];

pub(super) const PROXY_HEADERS: &[ConfigKey] = &[
    key(
        "from",
        RANGES,
        Described("required for IP addresses"),
        Reload,
        "Peers that must send a header; at most 1,024 ranges. The header names the client.",
    ),
    key(
        "others",
        Words(words::<OtherPeers>),
        Value("\"refuse\""),
        Reload,
        "`\"refuse\"`: other peers are reset. `\"direct\"`: they are the clients, and Tidegate relays \
         all their bytes, also a header.",
    ),
    key(
        "timeout",
        Time("10ms", "60s"),
        Value("\"3s\""),
        Reload,
        "Time from the connection to its complete header. After it, the connection is reset.",
    ),
];

pub(super) const SOURCES: &[ConfigKey] = &[
    key(
        "allow",
        RANGES,
        Value("[]"),
        Reload,
        "Clients that can connect. If `allow` or `allow_file` has an entry, all other addresses \
         are denied.",
    ),
    key(
        "deny",
        RANGES,
        Value("[]"),
        Reload,
        "Clients that cannot connect. The longest matching prefix of `allow` and `deny` decides.",
    ),
    key(
        "allow_file",
        Form("a file path"),
        Described("none"),
        Reload,
        "File with more allowed prefixes: one per line, `#` starts a comment. All lists of a \
         frontend together have at most 1,000,000 prefixes.",
    ),
    key(
        "deny_file",
        Form("a file path"),
        Described("none"),
        Reload,
        "File with more denied prefixes.",
    ),
    key(
        "prefix_v4",
        Integer(0, 32),
        Value("32"),
        Reload,
        "IPv4 addresses with this many equal leading bits are one client source. It needs \
         `connections_max` or `rate`.",
    ),
    key(
        "prefix_v6",
        Integer(0, 128),
        Value("64"),
        Reload,
        "IPv6 addresses with this many equal leading bits are one client source.",
    ),
    key(
        "connections_max",
        CONNECTIONS,
        Value("0"),
        Reload,
        "Cap on open sessions per client source. `0`: no cap.",
    ),
    key(
        "rate",
        Form(
            "`\"off\"`, or 1 to 1,000,000 per second, minute or hour: `\"100/s\"`, `\"30/m\"`, `\"500/h\"`",
        ),
        Value("\"off\""),
        Reload,
        "Rate limit on new connections of a client source.",
    ),
    key(
        "burst",
        Integer(1, 1_000_000),
        Described("connections of one second at `rate`"),
        Reload,
        "Connections that are accepted at once after a quiet period. It needs `rate`.",
    ),
];

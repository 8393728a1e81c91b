//! The keys of member sources, registries and name resolution.

use super::tables::{TIME, key};
use super::{ConfigKey, DefaultValue, Values, words};
use crate::keys::Applies::Reload;
use crate::validate::{RecordKey, SourceKindKey};
use DefaultValue::{Derived, Described, Required, Value};
use Values::{Flag, Form, Integer, Share, Time, WordOrTime, Words};
use tidegate_core::model::{
    AnnouncedWeights, CriticalRule, EmptyAnswer, NameFamily, RegistryKind, ZookeeperFormat,
};

const FILE: Values = Form("a file path");
const WAIT: Values = WordOrTime("0s", "", "1ms", "1h");

pub(super) const DISCOVER: &[ConfigKey] = &[
    key(
        "from",
        Form("the name of a registry"),
        Described("required without `kind`"),
        Reload,
        "Registry that is asked.",
    ),
    key(
        "kind",
        Words(words::<SourceKindKey>),
        Described("required without `from`"),
        Reload,
        "`dns`: the addresses of a name; `file`: a JSON file; `http`: the same JSON at a URL.",
    ),
    key(
        "service",
        Form("text of at most 1,024 bytes"),
        Described("required for Consul and Kubernetes"),
        Reload,
        "Name of the service.",
    ),
    key(
        "tags",
        Form("a tag or a list of at most 16"),
        Described("none"),
        Reload,
        "Consul: tags that an instance must have.",
    ),
    key(
        "datacenter",
        Form("text of at most 1,024 bytes"),
        Described("that of the agent"),
        Reload,
        "Consul: datacenter of the service.",
    ),
    key(
        "namespace",
        Form("text of at most 1,024 bytes"),
        Described("that of the token, the service account or the kubeconfig"),
        Reload,
        "Consul, Kubernetes: namespace of the service.",
    ),
    key(
        "filter",
        Form("text of at most 1,024 bytes"),
        Described("none"),
        Reload,
        "Consul: filter expression.",
    ),
    key(
        "max_stale",
        TIME,
        Value("\"10s\""),
        Reload,
        "Consul: an answer can only add backends if its server has not heard from the leader for \
         this long.",
    ),
    key(
        "prefix",
        Form("text of at most 1,024 bytes that ends with `/`"),
        Described("`\"/tidegate/services/NAME/\"`, with the name of the pool"),
        Reload,
        "etcd: prefix of the keys whose values are the backends.",
    ),
    key(
        "path",
        Form("a path"),
        Described("required for `file` and ZooKeeper"),
        Reload,
        "`file`: the JSON file. ZooKeeper: the node whose children are the backends.",
    ),
    key(
        "format",
        Words(words::<ZookeeperFormat>),
        Value("\"json\""),
        Reload,
        "ZooKeeper: form of the data of the children.",
    ),
    key(
        "name",
        Form("a host name"),
        Described("required for `dns`"),
        Reload,
        "`dns`: the name. Search domains apply unless it ends with a dot.",
    ),
    key(
        "record",
        Words(words::<RecordKey>),
        Value("\"auto\""),
        Reload,
        "`dns`: `address` asks for A and AAAA records, `srv` for SRV records. `auto` is `srv` for \
         names that start with `_`.",
    ),
    key(
        "family",
        Words(words::<NameFamily>),
        Value("\"both\""),
        Reload,
        "`dns`: which addresses are backends.",
    ),
    key(
        "port",
        Form("1 to 65,535; Kubernetes: also the name of a port"),
        Described("required for A and AAAA records; Kubernetes: the first port"),
        Reload,
        "Port of the backends. It replaces the port of SRV records.",
    ),
    key(
        "url",
        Form("an `http://` or `https://` URL of at most 2,048 bytes"),
        Described("required for `http`"),
        Reload,
        "`http`: address of the JSON document.",
    ),
    key("interval", Time("1s", "1d"), Value("\"10s\""), Reload, "`http`: time between requests."),
    key(
        "ca_file",
        FILE,
        Described("the certificates of the system"),
        Reload,
        "`http`: PEM file of the certificates that an `https` server can have.",
    ),
    key(
        "token_file",
        FILE,
        Described("none"),
        Reload,
        "`http`: file with a bearer token, mode 0600 or 0640. It needs `https` unless the server is \
         on this host.",
    ),
    key(
        "addresses",
        Form("a prefix, an address, or a list of at most 64"),
        Value(
            "[\"10.0.0.0/8\", \"100.64.0.0/10\", \"172.16.0.0/12\", \"192.168.0.0/16\", \"fc00::/7\"]",
        ),
        Reload,
        "Prefixes in which announced addresses must be. Loopback and link-local addresses are \
         only in prefixes without others, such as `127.0.0.0/8`.",
    ),
    key(
        "backends_max",
        Integer(1, 10_000),
        Value("1000"),
        Reload,
        "Maximum number of backends of the source. Further ones, by sorted address, are refused.",
    ),
    key(
        "weights",
        Words(words::<AnnouncedWeights>),
        Value("\"use\""),
        Reload,
        "`use`: announced weights count. `ignore`: every backend has weight 1.",
    ),
    key(
        "weight_max",
        Integer(1, 1_000),
        Value("100"),
        Reload,
        "Maximum weight of an announced backend.",
    ),
    key(
        "min_backends",
        Integer(0, 10_000),
        Value("1"),
        Reload,
        "An answer with fewer backends is treated as an empty one. `0` needs `empty = \"accept\"`.",
    ),
    key(
        "empty",
        Words(words::<EmptyAnswer>),
        Described("`\"keep\"` for `dns`, `http` and Consul, else `\"confirm\"`"),
        Reload,
        "What an empty answer does. `keep`: nothing; `confirm`: it counts after a second one; \
         `accept`: it counts at once.",
    ),
    key(
        "max_removed",
        Share,
        Value("\"50%\""),
        Reload,
        "An answer counts after a second one if it is smaller than the largest of the last \
         `confirm_after` by more than this share. New backends replace others.",
    ),
    key(
        "confirm_after",
        Time("1s", "1h"),
        Value("\"10s\""),
        Reload,
        "Minimum time between an answer and the second one that confirms it.",
    ),
    key(
        "missing",
        Integer(1, 100),
        Derived("1", "2 for `dns`, else 1"),
        Reload,
        "Complete answers without a backend before it leaves.",
    ),
    key(
        "overlap",
        WAIT,
        Value("\"10s\""),
        Reload,
        "Maximum time that replaced backends stay while the new ones of the same answer are not \
         up yet.",
    ),
    key(
        "stale_for",
        WordOrTime("forever", "", "10s", "30d"),
        Value("\"forever\""),
        Reload,
        "Age of the last answer at which the backends are drained that only this source lists, \
         except the last eligible one of the pool.",
    ),
    key(
        "critical",
        Words(words::<CriticalRule>),
        Value("\"drain\""),
        Reload,
        "What happens to a backend that the source calls critical. `suspect` gives it a tenth of \
         its weight.",
    ),
    key(
        "first_wait",
        WAIT,
        Value("\"10s\""),
        Reload,
        "Maximum time after the start that `/ready` answers 503 while there is no answer.",
    ),
];

pub(super) const REGISTRY: &[ConfigKey] = &[
    key("kind", Words(words::<RegistryKind>), Required, Reload, "Protocol of the servers."),
    key(
        "servers",
        Form("`\"IP:PORT\"`, `\"NAME:PORT\"`, `\"unix:/path\"`, or a list of at most 16"),
        Required,
        Reload,
        "Servers that are asked. Kubernetes does not need the key in a pod or with `kubeconfig`.",
    ),
    key(
        "timeout",
        Time("100ms", "1m"),
        Value("\"5s\""),
        Reload,
        "Timeout of a connect, and of every answer that is not a wait for changes.",
    ),
    key(
        "tls",
        Flag,
        Value("false"),
        Reload,
        "Use TLS and verify the certificate of the server. Kubernetes uses TLS in a pod and with \
         `kubeconfig`.",
    ),
    key(
        "ca_file",
        FILE,
        Described("the certificates of the system"),
        Reload,
        "PEM file of the certificates that the servers can have. It needs `tls = true`.",
    ),
    key(
        "cert_file",
        FILE,
        Described("none"),
        Reload,
        "PEM file of the certificate of this client. It needs `tls = true` and `key_file`.",
    ),
    key(
        "key_file",
        FILE,
        Described("none"),
        Reload,
        "PEM file of its private key, mode 0600 or 0640.",
    ),
    key(
        "server_name",
        Form("a host name or an IP address"),
        Described("the host in `servers`"),
        Reload,
        "Name that the certificate must have. It needs `tls = true`.",
    ),
    key(
        "token_file",
        FILE,
        Described("none; Kubernetes: that of the service account"),
        Reload,
        "Consul, Kubernetes: file with a token, mode 0600 or 0640. It needs `tls` unless the \
         servers are on this host.",
    ),
    key(
        "user",
        Form("text of at most 256 bytes without a colon"),
        Described("none"),
        Reload,
        "etcd, ZooKeeper: user. It needs `password_file`.",
    ),
    key(
        "password_file",
        FILE,
        Described("none"),
        Reload,
        "File with the password of `user`, mode 0600 or 0640. It needs `tls` unless the servers \
         are on this host.",
    ),
    key(
        "kubeconfig",
        FILE,
        Described("none"),
        Reload,
        "Kubernetes: file with server, CA and credentials, mode 0600 or 0640, instead of the other \
         keys.",
    ),
];

pub(super) const DNS: &[ConfigKey] = &[
    key(
        "servers",
        Form("`\"system\"`, `\"IP:PORT\"`, or a list of at most 8"),
        Value("\"system\""),
        Reload,
        "Servers that are asked, in order. `\"system\"`: those of `/etc/resolv.conf`.",
    ),
    key(
        "hold_nxdomain",
        Time("1s", "1d"),
        Value("\"30s\""),
        Reload,
        "Time that the name of a backend must not exist (NXDOMAIN) before its addresses leave. \
         With `kind = \"dns\"`, the least such time if `empty` is not `keep`.",
    ),
    key(
        "ttl_min",
        Time("1s", "1d"),
        Value("\"1s\""),
        Reload,
        "Minimum time between two questions about a name, whatever its TTL.",
    ),
    key(
        "ttl_max",
        Time("1s", "1d"),
        Value("\"5m\""),
        Reload,
        "Maximum time between two questions about a name.",
    ),
];

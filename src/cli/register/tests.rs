//! The arguments of `tidegate register`, and what they become.

use super::*;
use clap::Parser;

#[derive(Debug, Parser)]
struct OnlyRegister {
    #[command(flatten)]
    args: RegisterArgs,
}

/// Parses the arguments, with a service and its address in front.
fn parse(line: &str) -> Result<RegisterArgs, clap::Error> {
    let service = ["register", "--service", "web", "--address", "10.0.0.5:80"];
    OnlyRegister::try_parse_from(service.into_iter().chain(line.split_whitespace()))
        .map(|parsed| parsed.args)
}

fn parsed(line: &str) -> RegisterArgs {
    parse(line).unwrap_or_else(|error| panic!("{line}: {error}"))
}

#[test]
fn each_kind_of_registry_has_its_own_options() {
    let read = |line: &str| registry(&parsed(line));
    let consul = read("--consul agent.internal:8500 --token-file t --tls");
    assert_eq!(consul.kind, RegistryKind::Consul);
    assert_eq!(consul.token_file, Some("t".into()));
    assert_eq!(consul.servers, [ServerAddr::Name { host: "agent.internal".into(), port: 8500 }]);
    assert_eq!(read("--consul 127.0.0.1:1 --consul b:2").servers.len(), 2);
    let etcd = read("--etcd 127.0.0.1:2379 --etcd [::1]:2379 --user u --password-file p");
    assert_eq!((etcd.kind, etcd.servers.len()), (RegistryKind::Etcd, 2));
    let zookeeper = read("--zookeeper 127.0.0.1:2181 --zookeeper b:2181 --path /services/web");
    assert_eq!((zookeeper.kind, zookeeper.servers.len()), (RegistryKind::Zookeeper, 2));
    assert_eq!(zookeeper.token_file, None);
}

#[test]
fn a_request_takes_at_most_a_sixth_of_the_ttl() {
    let timeout = |line: &str| registry(&parsed(line)).timeout;
    assert_eq!(timeout("--consul 127.0.0.1:1 --ttl 12s"), Duration::from_secs(2));
    assert_eq!(timeout("--consul 127.0.0.1:1 --ttl 1h"), Duration::from_secs(5));
}

#[test]
fn invalid_arguments_are_usage_errors() {
    for line in [
        "",
        "--etcd 127.0.0.1",
        "--etcd 127.0.0.1:1 --service a/b",
        "--etcd 127.0.0.1:1 --ttl 1s",
        "--etcd 127.0.0.1:1 --check udp",
        "--etcd 127.0.0.1:1 --user u",
        "--etcd 127.0.0.1:1 --token-file t",
        "--etcd 127.0.0.1:1 --path /a",
        "--etcd 127.0.0.1:1 --prefix /a",
        "--etcd 127.0.0.1:1 --consul 127.0.0.1:2",
        "--etcd 127.0.0.1:1 --zookeeper 127.0.0.1:2",
        "--consul 127.0.0.1:1 --zookeeper 127.0.0.1:2",
        "--consul 127.0.0.1:1 --user u --password-file p",
        "--consul 127.0.0.1:1 --prefix /a/",
        "--consul 127.0.0.1:1 --ca-file c",
        "--zookeeper 127.0.0.1:1 --token-file t",
        "--zookeeper 127.0.0.1:1 --path a",
        "--zookeeper 127.0.0.1:1 --path /",
        "--zookeeper 127.0.0.1:1 --path /a/",
        "--zookeeper 127.0.0.1:1 --path /a/../b",
    ] {
        let error = parse(line).expect_err(line);
        assert!(error.use_stderr() && error.exit_code() == 2, "{line}");
    }
}

#[test]
fn a_secret_goes_unencrypted_only_to_this_host() {
    let secrets = [
        ("consul", "--token-file t", "token"),
        ("etcd", "--user u --password-file p", "password"),
        ("zookeeper", "--user u --password-file p", "password"),
    ];
    for (kind, secret, word) in secrets {
        let check =
            |server: &str, more: &str| check_servers(&parsed(&format!("--{kind} {server} {more}")));
        for local in
            ["127.0.0.9:1", "[::1]:1", "[::ffff:127.0.0.1]:1", "LocalHost:1", "a.localhost:1"]
        {
            assert_eq!(check(local, secret), Ok(()), "{kind} {local}");
        }
        for remote in ["10.0.0.9:1", "agent.internal:1", "localhost.example:1", "[::2]:1"] {
            let why = format!("the {word} would be sent unencrypted to {remote}; add --tls");
            assert_eq!(check(remote, secret), Err(why), "{kind}");
            assert_eq!(check(remote, &format!("{secret} --tls")), Ok(()), "{kind} {remote}");
            assert_eq!(check(remote, ""), Ok(()), "{kind} {remote}");
        }
        assert_eq!(main(&parsed(&format!("--{kind} 10.0.0.9:1 {secret}"))), Exit::Usage);
    }
}

#[test]
fn one_remote_server_of_several_is_enough_to_refuse() {
    let args = parsed("--etcd 127.0.0.1:1 --etcd 10.0.0.9:1 --user u --password-file p");
    assert!(check_servers(&args).unwrap_err().contains("10.0.0.9:1"));
}

#[test]
fn a_unix_socket_is_refused_where_it_cannot_work() {
    let check = |line: &str| check_servers(&parsed(line));
    assert_eq!(check("--consul unix:/run/consul.sock --token-file t"), Ok(()));
    assert!(check("--zookeeper unix:/run/z").unwrap_err().contains("Unix sockets"));
    assert!(check("--consul unix:/run/c --tls").unwrap_err().contains("--server-name"));
    assert_eq!(check("--consul unix:/run/c --tls --server-name agent"), Ok(()));
}

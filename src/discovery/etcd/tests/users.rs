//! Users: password, tokens, roles that are taken away and given back.

use super::*;
use crate::testing::etcd::is_installed;
use crate::testing::is_long;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

fn write_secret(path: &Path, text: &str) {
    use std::io::Write;
    let mut options = std::fs::File::options();
    let file = options.create(true).truncate(true).write(true).mode(0o600).open(path);
    file.unwrap().write_all(text.as_bytes()).unwrap();
}

#[test]
fn users_with_password_file() {
    if !is_installed() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let password = dir.path().join("password");
    write_secret(&password, "wrong\n");
    let mut cluster = EtcdCluster::start_with(3, &["--auth-token-ttl", "3"]);
    cluster.put(&key("a"), &value(80));
    cluster.put("/secret/x", &value(80));
    let user = RegistryConfig {
        user: Some("reader".to_owned()),
        password_file: Some(password.clone()),
        ..registry(&cluster)
    };
    // Without users, a user name does no harm.
    let mut early = AskedEtcd::start_as(&user, WEB);
    early.wait_for(&["a"], secs(5));
    drop(early);
    cluster.enable_users(WEB);

    let mut nameless = AskedEtcd::start(&cluster);
    assert_eq!(nameless.wait_for_failure(secs(5)).0, SourceFailure::Auth);
    assert_eq!(nameless.set, None);

    let mut both = AskedEtcd::start_many(&user, &[WEB, "/secret/"]);
    let mut asked = both.remove(0);
    assert_eq!(asked.wait_for_failure(secs(5)).0, SourceFailure::Auth);
    write_secret(&password, "secret\n");
    asked.wait_for(&["a"], secs(5));
    let secret = &mut both[0];
    secret.wait_until("a forbidden prefix", secs(5), |asked| {
        asked.failures.iter().any(|(_, detail)| detail.contains("permission denied"))
    });
    assert_eq!(secret.set, None);

    // The role goes: a failure, and the set stays. It comes back: recovery.
    cluster.revoke_role();
    asked.failures.clear();
    assert_eq!(asked.wait_for_failure(secs(20)).0, SourceFailure::Auth);
    cluster.grant_role();
    cluster.put(&key("b"), &value(81));
    asked.wait_for(&["a", "b"], secs(5));

    // Tokens expire after 3 s. A restart of a node forgets them.
    let (failures, alive) = (asked.failures.len(), asked.alive);
    let checks = if is_long() { 2 } else { 1 };
    asked.wait_until("checks", secs(40), |asked| asked.alive >= alive + checks);
    assert_eq!(asked.failures.len(), failures, "{:?}", asked.failures);
    for node in 0..3 {
        cluster.kill(node);
        cluster.start_node(node);
        cluster.wait_until_healthy();
    }
    cluster.put(&key("c"), &value(82));
    asked.wait_for(&["a", "b", "c"], secs(8));
    assert_eq!(secret.set, None);
}

#[test]
fn token_from_before_a_restored_backup_is_replaced() {
    if !is_installed() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let password = dir.path().join("password");
    write_secret(&password, "secret\n");
    let mut cluster = EtcdCluster::start(1);
    cluster.enable_users(WEB);
    cluster.put(&key("a"), &value(80));
    cluster.back_up("early");
    // The token names a transaction that the restored server does not reach.
    for _ in 0..100 {
        cluster.put(&key("b"), &value(81));
    }
    let user = RegistryConfig {
        user: Some("reader".to_owned()),
        password_file: Some(password),
        ..registry(&cluster)
    };
    let mut asked = AskedEtcd::start_as(&user, WEB);
    asked.wait_for(&["a", "b"], secs(5));
    cluster.restore("early");
    asked.wait_for(&["a"], secs(10));
}

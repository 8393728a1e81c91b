//! A cluster that was restored from a backup: its revisions go back.

use super::*;
use crate::testing::etcd::is_installed;

#[test]
fn restored_backup_is_listed_and_its_sets_are_not_trusted_at_first() {
    if !is_installed() {
        return;
    }
    let mut cluster = EtcdCluster::start(3);
    cluster.put(&key("a"), &value(80));
    cluster.back_up("early");
    for _ in 0..20 {
        cluster.put(&key("b"), &value(81));
    }
    let mut asked = AskedEtcd::start(&cluster);
    asked.wait_for(&["a", "b"], secs(5));
    let before = asked.set.as_ref().unwrap().version.clone();
    cluster.restore("early");
    asked.wait_until("a set of the restored store", secs(10), |asked| {
        asked.set.as_ref().is_some_and(|set| set.version != before)
    });
    let set = asked.set.clone().unwrap();
    assert_eq!((names(&set), set.trusted), (vec!["a".to_owned()], false));
    // The watch delivers, although its revisions were seen before.
    cluster.put(&key("b"), &value(82));
    asked.wait_for(&["a", "b"], secs(3));
    assert!(!asked.set.as_ref().unwrap().trusted);
    asked.wait_until("trust", secs(35), |asked| asked.set.as_ref().unwrap().trusted);
    asked.wait_for(&["a", "b"], secs(1));
}

//! What changes in the store does: put, delete, lease, compaction, unreadable values.

use super::*;
use crate::testing::etcd::is_installed;

#[test]
fn puts_and_deletions_are_told_as_whole_sets() {
    if !is_installed() {
        return;
    }
    let cluster = EtcdCluster::start(3);
    cluster.put(&key("a"), r#"{"address":"10.0.0.1:80","weight":7,"backup":true}"#);
    let mut asked = AskedEtcd::start(&cluster);
    asked.wait_for(&["a"], secs(5));
    let member = asked.set.as_ref().unwrap().members[0].clone();
    assert_eq!((member.weight, member.tier), (Some(7), 1));
    cluster.put(&key("b"), &value(81));
    asked.wait_for(&["a", "b"], secs(2));
    cluster.delete(&key("a"));
    asked.wait_for(&["b"], secs(2));
    cluster.put("/tidegate/services/web2/x", &value(82));
    cluster.put(&key("b"), &value(83));
    asked.wait_until("the new address", secs(2), |asked| {
        asked.set.as_ref().is_some_and(|set| set.members[0].address.port() == 83)
    });
    cluster.delete(&key("b"));
    asked.wait_for(&[], secs(2));
    assert!(asked.set.as_ref().unwrap().trusted);
    assert_eq!(asked.failures, []);
}

#[test]
fn entry_leaves_with_its_lease() {
    if !is_installed() {
        return;
    }
    let cluster = EtcdCluster::start(1);
    cluster.put(&key("stays"), &value(80));
    cluster.put_with_lease(&key("ends"), &value(81), 2);
    let mut asked = AskedEtcd::start(&cluster);
    asked.wait_for(&["ends", "stays"], secs(2));
    asked.wait_for(&["stays"], secs(8));
}

#[test]
fn unreadable_value_keeps_the_former_announcement() {
    if !is_installed() {
        return;
    }
    let cluster = EtcdCluster::start(1);
    cluster.put(&key("a"), &value(80));
    cluster.put(&key("b"), "no JSON");
    let mut asked = AskedEtcd::start(&cluster);
    asked.wait_for(&["a"], secs(5));
    assert_eq!(asked.set.as_ref().unwrap().unreadable.count(), 1);
    cluster.put(&key("a"), r#"{"address":"nowhere"}"#);
    asked.wait_until("the second unreadable value", secs(2), |asked| {
        asked.set.as_ref().is_some_and(|set| set.unreadable.count() == 2)
    });
    asked.wait_for(&["a"], secs(1));
    cluster.put(&key("b"), &value(81));
    asked.wait_for(&["a", "b"], secs(2));
}

#[test]
fn compaction_during_an_outage_changes_nothing_else() {
    if !is_installed() {
        return;
    }
    let mut cluster = EtcdCluster::start(1);
    for name in ["a", "b", "c"] {
        cluster.put(&key(name), &value(80));
    }
    let mut asked = AskedEtcd::start(&cluster);
    asked.wait_for(&["a", "b", "c"], secs(5));
    // Compaction under an open watch.
    let revision = cluster.put(&key("d"), &value(81));
    cluster.compact(revision);
    asked.wait_for(&["a", "b", "c", "d"], secs(2));
    assert_eq!(asked.failures, []);
    cluster.kill(0);
    asked.wait_for_failure(secs(6));
    cluster.start_node(0);
    cluster.wait_until_healthy();
    cluster.delete(&key("b"));
    let revision = cluster.put("/other", "x");
    cluster.compact(revision);
    asked.wait_for(&["a", "c", "d"], secs(5));
}

#[test]
fn questions_of_one_registry_share_a_follower_and_come_and_go() {
    if !is_installed() {
        return;
    }
    let cluster = EtcdCluster::start(1);
    cluster.put("/a/1", &value(80));
    cluster.put("/b/2", &value(80));
    let mut asked = AskedEtcd::start_many(&registry(&cluster), &["/a/", "/b/", "/a/"]);
    for (asked, name) in asked.iter_mut().zip(["1", "2", "1"]) {
        asked.wait_for(&[name], secs(5));
    }
    cluster.put("/a/3", &value(81));
    asked[0].wait_for(&["1", "3"], secs(2));
    asked[2].wait_for(&["1", "3"], secs(2));
    cluster.delete("/b/2");
    asked[1].wait_for(&[], secs(2));
    assert!(asked.iter().all(|asked| asked.failures.is_empty()));
}

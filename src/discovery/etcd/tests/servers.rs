//! What failing nodes do: killed, stopped, without a quorum, out of space.

use super::*;
use crate::testing::etcd::is_installed;
use crate::testing::is_long;

fn three_members(cluster: &EtcdCluster) -> AskedEtcd {
    for name in ["a", "b", "c"] {
        cluster.put(&key(name), &value(80));
    }
    let mut asked = AskedEtcd::start(cluster);
    asked.wait_for(&["a", "b", "c"], secs(5));
    asked
}

#[test]
fn killed_leader_is_left_and_the_set_stays() {
    if !is_installed() {
        return;
    }
    let mut cluster = EtcdCluster::start(3);
    let mut asked = three_members(&cluster);
    for _ in 0..2 {
        let leader = cluster.leader();
        cluster.kill(leader);
        cluster.put(&key("d"), &value(81));
        asked.wait_for(&["a", "b", "c", "d"], secs(10));
        cluster.start_node(leader);
        cluster.wait_until_healthy();
        cluster.delete(&key("d"));
        asked.wait_for(&["a", "b", "c"], secs(10));
    }
}

/// A busy host delays the pings of the source.
mod quiet {
    use super::*;

    #[test]
    fn lost_quorum_is_a_failure_within_6_s_and_recovers_within_5_s() {
        if !is_installed() {
            return;
        }
        let cluster = EtcdCluster::start(3);
        let mut asked = three_members(&cluster);
        let pairs = [[0, 1], [1, 2], [2, 0]];
        for pair in &pairs[..if is_long() { 3 } else { 1 }] {
            pair.iter().for_each(|node| cluster.pause(*node));
            let (why, took) = asked.wait_for_failure(secs(6));
            eprintln!("quorum lost: {why} after {took:.1?}");
            // Long enough for several attempts.
            let attempts = asked.failures.len() + 3;
            asked.wait_until("attempts", secs(20), |asked| asked.failures.len() >= attempts);
            pair.iter().for_each(|node| cluster.resume(*node));
            let start = now();
            let alive = asked.alive;
            asked.wait_until("recovery", secs(5), |asked| asked.alive > alive);
            eprintln!("recovered after {:.1?}", now().duration_since(start));
            cluster.put(&key("d"), &value(81));
            asked.wait_for(&["a", "b", "c", "d"], secs(5));
            cluster.delete(&key("d"));
            asked.wait_for(&["a", "b", "c"], secs(5));
        }
    }
}

#[test]
fn stopped_member_is_left_for_another() {
    if !is_installed() {
        return;
    }
    let cluster = EtcdCluster::start(3);
    let mut asked = three_members(&cluster);
    // One of the three is the member that the source follows.
    for node in 0..3 {
        cluster.pause(node);
        cluster.put(&key("d"), &value(81));
        asked.wait_for(&["a", "b", "c", "d"], secs(12));
        cluster.resume(node);
        cluster.wait_until_healthy();
        cluster.delete(&key("d"));
        asked.wait_for(&["a", "b", "c"], secs(12));
    }
}

#[test]
fn full_store_is_still_read() {
    if !is_installed() {
        return;
    }
    let cluster = EtcdCluster::start_with(1, &["--quota-backend-bytes", "16777216"]);
    let mut asked = three_members(&cluster);
    let filling = "x".repeat(1 << 20);
    let full = (0..40).any(|at| {
        let body = format!(
            r#"{{"key":"{}","value":"{}"}}"#,
            base64::Engine::encode(&base64::engine::general_purpose::STANDARD, format!("/f{at}")),
            filling
        );
        cluster.try_post(0, "/v3/kv/put", &body).is_err_and(|refusal| refusal.contains("space"))
    });
    assert!(full, "the quota was not reached");
    cluster.delete(&key("a"));
    asked.wait_for(&["b", "c"], secs(3));
    let mut second = AskedEtcd::start(&cluster);
    second.wait_for(&["b", "c"], secs(5));
    assert_eq!(asked.failures, []);
}

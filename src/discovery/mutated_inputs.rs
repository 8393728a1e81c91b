//! Runs the fuzz targets of this member without a fuzzer: their seeds and mutations of them.

use crate::testing::mutations::try_mutations;
use crate::{consul, etcd, kubernetes, listing, resolver, zookeeper};

#[test]
fn mutated_answers_of_etcd_are_read_in_bounds_or_refused() {
    try_mutations(&["tests/fuzz/seeds/etcd"], 4_000, etcd::fuzz::check);
}

#[test]
fn mutated_frames_of_zookeeper_are_read_in_bounds_or_refused() {
    try_mutations(&["tests/fuzz/seeds/zookeeper"], 4_000, zookeeper::fuzz::check);
}

#[test]
fn mutated_answers_of_consul_are_read_in_bounds_or_refused() {
    try_mutations(&["tests/fuzz/seeds/consul"], 4_000, consul::fuzz::check);
}

#[test]
fn mutated_answers_of_kubernetes_are_read_in_bounds_or_refused() {
    try_mutations(&["tests/fuzz/seeds/kubernetes"], 4_000, kubernetes::fuzz::check);
}

#[test]
fn mutated_answers_of_dns_are_read_in_bounds_or_refused() {
    try_mutations(&["tests/fuzz/seeds/dns"], 4_000, resolver::fuzz::check_answers);
}

#[test]
fn mutated_files_of_the_host_give_values_in_bounds() {
    try_mutations(&["tests/fuzz/seeds/host_files"], 4_000, resolver::fuzz::check_files);
}

#[test]
fn mutated_lists_are_read_in_bounds_or_refused() {
    try_mutations(&["tests/fuzz/seeds/listing"], 4_000, listing::fuzz::check);
}

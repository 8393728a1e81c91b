//! Runs the fuzz targets of the daemon without a fuzzer.

use tidegate_discovery::testing::mutations::try_mutations;

#[test]
fn mutated_configurations_are_accepted_or_rejected_with_a_position() {
    let directories = ["config", "tests/config_cases/valid", "tests/config_cases/invalid"];
    try_mutations(&directories, 4_000, super::config::check);
}

#[test]
fn mutated_heartbeats_are_accepted_once_and_only_if_signed() {
    try_mutations(&["tests/fuzz/seeds/heartbeat"], 4_000, super::heartbeat::check);
}

#[test]
fn mutated_admin_requests_are_answered_and_authorized_correctly() {
    try_mutations(&["tests/fuzz/seeds/admin"], 6_000, super::admin::check);
}

#[test]
fn mutated_upgrade_messages_are_accepted_or_rejected() {
    try_mutations(&["tests/fuzz/seeds/handshake"], 6_000, super::handshake::check);
}

#[test]
fn mutated_views_are_rejected_or_restored_with_valid_members() {
    try_mutations(&["tests/fuzz/seeds/views"], 4_000, super::views::check);
}

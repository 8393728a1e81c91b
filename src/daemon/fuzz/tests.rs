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
fn mutated_answers_of_services_end_probes_with_a_short_reason() {
    try_mutations(&["tests/fuzz/seeds/probe"], 4_000, super::probe::check);
}

#[test]
fn endless_answers_of_services_end_probes_at_64_kib() {
    // Notices, parameters, requests for another method, and lines without an end.
    let notice = [b'N', 0, 0, 0, 7, b'a', 0, 0];
    let switch = [23, 0, 0, 2, 0xfe].iter().chain(b"mysql_native_password\0").copied();
    let endless: [(u8, Vec<u8>); 5] = [
        (0, notice.to_vec()),
        (2, switch.collect()),
        (4, b"220-more\r\n".to_vec()),
        (4, b"2".to_vec()),
        (6, b"+".to_vec()),
    ];
    let greeting = include_bytes!("../../../tests/fuzz/seeds/probe/mysql_writes");
    for (kind, piece) in endless {
        let start = if kind == 2 { &greeting[1..] } else { &[] };
        let data = [&[kind], start, &piece.repeat(200_000 / piece.len())].concat();
        super::probe::check(&data);
    }
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

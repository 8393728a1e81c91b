//! Compares the routes and fields in `docs/admin-api.md` with a running balancer.

use crate::balancer::Balancer;
use crate::pages::{column, page, root};
use serde_json::Value;
use std::collections::BTreeSet;
use std::fs;

#[test]
fn admin_api_page_lists_every_route() {
    let routes = fs::read_to_string(root().join("src/daemon/admin/routes.rs")).unwrap();
    let route = |line: &str| {
        let (path, rest) = line.trim().strip_prefix(".route(\"")?.split_once("\", ")?;
        let method = rest.split('(').next()?.to_uppercase();
        Some(format!("{method} {path}"))
    };
    let built: BTreeSet<String> = routes.lines().filter_map(route).collect();
    let listed: BTreeSet<String> =
        column(&page("docs/admin-api.md"), "| request |", 0).into_iter().collect();
    assert_eq!(listed, built);
}

#[test]
fn admin_api_page_lists_every_field_of_status_and_explain() {
    let balancer = Balancer::after_one_session();
    let status = balancer.status();
    let pool = &status["pools"][0];
    assert_listed("| status field |", &status);
    assert_listed("| frontend field |", &status["frontends"][0]);
    assert_listed("| pool field |", pool);
    assert_listed("| backend field |", &pool["backends"][0]);
    assert_listed("| explain field |", &balancer.explanation());
}

fn assert_listed(head: &str, document: &Value) {
    let built: BTreeSet<String> = document.as_object().unwrap().keys().cloned().collect();
    let cells = column(&page("docs/admin-api.md"), head, 0);
    let listed: BTreeSet<String> =
        cells.iter().flat_map(|cell| cell.split(", ")).map(str::to_owned).collect();
    assert_eq!(listed, built, "{head}");
}

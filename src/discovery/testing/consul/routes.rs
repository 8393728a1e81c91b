//! Which request gets which answer: paths, methods, tokens, and the endpoints of the agent.
//!
//! [`super::http`] calls it; [`super::health`] answers the blocking queries. The double is
//! stricter than Consul in one point: it refuses parameters that it does not know, so that
//! a misspelt one fails a test.

use super::catalog::AGENT;
use super::documents::{
    DoubleCheck, DoubleRegistration, DoubleService, DoubleStatus, NodeDeregistration,
    NodeRegistration, ServiceKey,
};
use super::http::{DoubleReply, DoubleRequest};
use super::{DoubleRights, DoubleShared, DoubleState, health};
use std::collections::BTreeMap;

/// Parameters that every endpoint takes.
const COMMON: [&str; 3] = ["token", "pretty", "dc"];

/// What Consul says of a token that does not exist.
const NO_TOKEN: &str = "ACL not found";

/// The token of a request, as far as the double uses it.
#[derive(Debug, Clone, Copy)]
pub(super) struct RequestRights {
    pub(super) rights: DoubleRights,
    pub(super) anonymous: bool,
}

/// Answers a request.
pub(super) async fn answer(shared: &DoubleShared, request: &DoubleRequest) -> DoubleReply {
    shared.note(request);
    let path: Vec<&str> = request.path.iter().map(String::as_str).collect();
    let (method, params): (&str, &[&str]) = match path[..] {
        ["v1", "health", "service", _] => ("GET", &health::PARAMS),
        ["v1", "agent", "services" | "checks"] | ["v1", "status", "leader"] => ("GET", &[]),
        ["v1", "agent", "service", "register"] => ("PUT", &["replace-existing-checks"]),
        ["v1", "agent", "service", "deregister", _] => ("PUT", &[]),
        ["v1", "agent", "service", "maintenance", _] | ["v1", "agent", "maintenance"] => {
            ("PUT", &["enable", "reason"])
        }
        ["v1", "agent", "check", "pass" | "warn" | "fail", _] => ("PUT", &["note"]),
        ["v1", "catalog", "register" | "deregister"] => ("PUT", &[]),
        _ => return DoubleReply::text(404, "Invalid URL path: not a valid HTTP API path"),
    };
    if request.method != method {
        let mut reply = DoubleReply::text(405, format!("method {} not allowed", request.method));
        reply.headers.push(("Allow", method.to_owned()));
        return reply;
    }
    let known = |name: &str| params.contains(&name) || COMMON.contains(&name);
    if let Some((name, _)) = request.query.iter().find(|(name, _)| !known(name)) {
        return DoubleReply::text(400, format!("the double does not know the parameter {name:?}"));
    }
    let Some(rights) = rights(shared, request) else { return DoubleReply::text(403, NO_TOKEN) };
    match path[..] {
        ["v1", "health", "service", name] => health::service(shared, request, name, rights).await,
        ["v1", "status", "leader"] => DoubleReply::json(&"127.0.0.1:8300"),
        ["v1", "agent", "services"] => list(shared, rights, |state| {
            let own = state.catalog.services().filter(|service| service.node == AGENT);
            let by_id: BTreeMap<&str, &DoubleService> =
                own.map(|service| (service.id.as_str(), service)).collect();
            DoubleReply::json(&by_id)
        }),
        ["v1", "agent", "checks"] => list(shared, rights, |state| {
            let own = state.catalog.checks().filter(|check| check.node == AGENT);
            let by_id: BTreeMap<&str, &DoubleCheck> =
                own.map(|check| (check.check_id.as_str(), check)).collect();
            DoubleReply::json(&by_id)
        }),
        _ => shared
            .change(|state| change(state, &path, request, rights))
            .unwrap_or_else(|refused| refused),
    }
}

/// A list, empty for a token without the right to read.
fn list(
    shared: &DoubleShared,
    rights: RequestRights,
    whole: impl FnOnce(&DoubleState) -> DoubleReply,
) -> DoubleReply {
    if rights.rights.read { whole(&shared.lock()) } else { DoubleReply::text(200, "{}") }
}

/// The rights of the request's token; `None` for one that does not exist.
fn rights(shared: &DoubleShared, request: &DoubleRequest) -> Option<RequestRights> {
    let bearer = request.header("authorization").and_then(|value| value.strip_prefix("Bearer "));
    let token = request.param("token").or(request.header("x-consul-token")).or(bearer);
    let token = token.filter(|token| !token.is_empty());
    let all = DoubleRights { read: true, write: true };
    let rights = match (&shared.lock().tokens, token) {
        (None, _) => all,
        (Some(_), None) => DoubleRights::default(),
        (Some(tokens), Some(token)) => *tokens.get(token)?,
    };
    Some(RequestRights { rights, anonymous: token.is_none() })
}

/// The requests that change the catalog.
fn change(
    state: &mut DoubleState,
    path: &[&str],
    request: &DoubleRequest,
    rights: RequestRights,
) -> Result<DoubleReply, DoubleReply> {
    let own = |id: &str| (AGENT.to_owned(), id.to_owned());
    match path[1..] {
        ["agent", "service", "register"] => {
            let registration: DoubleRegistration = decoded(&request.body)?;
            may_write(rights, &registration.name)?;
            register(state, &registration, request.param("replace-existing-checks").is_some())?;
        }
        ["agent", "service", "deregister", id] => {
            let service = known_service(state, &own(id))?;
            may_write(rights, &service.service)?;
            state.catalog.remove_service(&own(id));
        }
        ["agent", "service", "maintenance", id] => {
            let enable = enable(request)?;
            let service = known_service(state, &own(id))?;
            may_write(rights, &service.service)?;
            let check_id = format!("_service_maintenance:{id}");
            let check = DoubleCheck::of_service(&service, check_id, "Service Maintenance Mode");
            maintain(state, check, enable, request);
        }
        ["agent", "maintenance"] => {
            let (id, name) = ("_node_maintenance", "Node Maintenance Mode");
            let enable = enable(request)?;
            maintain(state, DoubleCheck::of_node(AGENT, id, name, "critical"), enable, request);
        }
        ["agent", "check", verb, id] => report(state, verb, id, request, rights)?,
        ["catalog", "register"] => register_node(state, decoded(&request.body)?, rights)?,
        _ => deregister_node(state, &decoded(&request.body)?, rights)?,
    }
    Ok(DoubleReply::done())
}

fn register(
    state: &mut DoubleState,
    registration: &DoubleRegistration,
    replace: bool,
) -> Result<(), DoubleReply> {
    if registration.name.is_empty() {
        return Err(DoubleReply::text(400, "Missing service name"));
    }
    let service = registration.service(AGENT);
    let invalid = |cause| DoubleReply::text(400, format!("Invalid check: {cause}"));
    let mut checks = registration.checks(&service).map_err(invalid)?;
    if replace {
        let ids: Vec<String> = checks.iter().map(|check| check.check_id.clone()).collect();
        state.catalog.keep_checks(&service.key(), &ids);
    }
    state.catalog.put_service(service);
    for mut check in checks.drain(..) {
        // A check that exists keeps its status over a repeated registration.
        if let Some(known) = state.catalog.check(&check.check_id) {
            (check.status, check.output) = (known.status, known.output.clone());
        }
        state.clocks.forget(&check.check_id);
        state.catalog.put_check(check);
    }
    Ok(())
}

/// `pass`, `warn` and `fail` of a TTL check.
fn report(
    state: &mut DoubleState,
    verb: &str,
    id: &str,
    request: &DoubleRequest,
    rights: RequestRights,
) -> Result<(), DoubleReply> {
    let Some(check) = state.catalog.check(id) else {
        let text = format!(
            "Unknown check ID {id:?}. Ensure that the check ID is passed, not the check name."
        );
        return Err(DoubleReply::text(404, text));
    };
    may_write(rights, &check.service_id)?;
    if check.plan.ttl.is_none() {
        let text = format!("CheckID {id:?} does not have associated TTL");
        return Err(DoubleReply::text(500, text));
    }
    let status = match verb {
        "pass" => DoubleStatus::Passing,
        "warn" => DoubleStatus::Warning,
        _ => DoubleStatus::Critical,
    };
    state.clocks.reported(id);
    state.catalog.set_status(id, status, request.param("note").unwrap_or_default());
    Ok(())
}

fn maintain(state: &mut DoubleState, check: DoubleCheck, enable: bool, request: &DoubleRequest) {
    let mut check = check;
    match request.param("reason") {
        Some(reason) => reason.clone_into(&mut check.notes),
        None => {
            "Maintenance mode is enabled, but no reason was provided.".clone_into(&mut check.notes)
        }
    }
    match enable {
        true => state.catalog.put_check(check),
        false => state.catalog.remove_check(&check.service_key(), &check.check_id),
    }
}

fn register_node(
    state: &mut DoubleState,
    registration: NodeRegistration,
    rights: RequestRights,
) -> Result<(), DoubleReply> {
    let node = registration.node.as_str();
    if node.is_empty() || registration.address.is_empty() {
        return Err(DoubleReply::text(400, "Must provide node and address"));
    }
    if !matches!(registration.datacenter.as_str(), "" | "dc1") {
        return Err(DoubleReply::text(500, "No path to datacenter"));
    }
    state.catalog.put_node(node, &registration.address);
    let mut key = (node.to_owned(), String::new());
    if let Some(service) = &registration.service {
        may_write(rights, &service.name)?;
        let service = service.service(node);
        key = service.key();
        state.catalog.put_service(service);
    }
    if let Some(check) = &registration.check {
        if !check.service_id.is_empty() {
            key.1.clone_from(&check.service_id);
        }
        let mut put = DoubleCheck::of_node(node, &check.check_id, &check.name, "passing");
        put.service_id = key.1;
        put.status = check.status.unwrap_or(DoubleStatus::Critical);
        state.catalog.put_check(put);
    }
    Ok(())
}

fn deregister_node(
    state: &mut DoubleState,
    what: &NodeDeregistration,
    rights: RequestRights,
) -> Result<(), DoubleReply> {
    let key: ServiceKey = (what.node.clone(), what.service_id.clone());
    may_write(rights, &key.1)?;
    match what.check_id.as_str() {
        "" => _ = state.catalog.remove_service(&key),
        id => state.catalog.remove_check(&key, id),
    }
    Ok(())
}

fn enable(request: &DoubleRequest) -> Result<bool, DoubleReply> {
    match request.param("enable") {
        Some("true" | "1") => Ok(true),
        Some("false" | "0") => Ok(false),
        None => Err(DoubleReply::text(400, "Missing value for enable")),
        Some(other) => Err(DoubleReply::text(400, format!("Invalid value for enable: {other:?}"))),
    }
}

fn known_service(state: &DoubleState, key: &ServiceKey) -> Result<DoubleService, DoubleReply> {
    state.catalog.service(key).cloned().ok_or_else(|| {
        let text = format!(
            "Unknown service ID {:?}. Ensure that the service ID is passed, not the service name.",
            key.1
        );
        DoubleReply::text(404, text)
    })
}

fn may_write(rights: RequestRights, service: &str) -> Result<(), DoubleReply> {
    if rights.rights.write {
        return Ok(());
    }
    let by = if rights.anonymous { "anonymous token" } else { "token" };
    let text = format!("Permission denied: {by} lacks permission 'service:write' on {service:?}");
    Err(DoubleReply::text(403, text))
}

fn decoded<'b, T: serde::Deserialize<'b>>(body: &'b [u8]) -> Result<T, DoubleReply> {
    let refused = |error| DoubleReply::text(400, format!("Request decode failed: {error}"));
    serde_json::from_slice(body).map_err(refused)
}

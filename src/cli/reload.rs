//! `tidegate reload`: have the running balancer read its configuration again.
//!
//! Called by the command line; the admin API does the work.

use hyper::Method;
use serde_json::Value;
use tidegate_client::command::Exit;
use tidegate_client::http::{ClientArgs, ask, printable, report};

/// Asks and says what came of it. A refused file is [`Exit::Refused`], its
/// problems on standard error.
pub fn main(args: &ClientArgs) -> Exit {
    report(args, ask(args, Method::POST, "/v1/reload"), |answer| printable(&shown(answer)))
}

fn shown(answer: &Value) -> String {
    let generation = &answer["generation"];
    let mut text = match answer["changed"].as_bool() {
        Some(false) => format!("unchanged; generation {generation} stays"),
        _ => format!("reloaded; generation {generation} is in force"),
    };
    for warning in answer["warnings"].as_array().into_iter().flatten() {
        text.push_str("\nwarning: ");
        text.push_str(warning.as_str().unwrap_or_default());
    }
    text
}

#[cfg(test)]
mod tests {
    use super::shown;
    use serde_json::json;

    #[test]
    fn what_waits_for_a_restart_is_named() {
        let answer = json!({"generation": 4, "changed": true, "warnings": ["workers: 2 -> 4"]});
        assert_eq!(shown(&answer), "reloaded; generation 4 is in force\nwarning: workers: 2 -> 4");
        let answer = json!({"generation": 4, "changed": false, "warnings": []});
        assert_eq!(shown(&answer), "unchanged; generation 4 stays");
    }
}

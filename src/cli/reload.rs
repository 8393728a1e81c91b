//! `tidegate reload`: have the running balancer read its configuration again.
//!
//! Called by the command line; the admin API does the work.

use hyper::Method;
use tidegate_api::reload::ReloadDoc;
use tidegate_client::command::Exit;
use tidegate_client::http::{ClientArgs, ask, report};

/// Asks and prints the result. A refused file is [`Exit::Refused`], with its problems on
/// standard error.
pub fn main(args: &ClientArgs) -> Exit {
    report(args, ask(args, Method::POST, "/v1/reload"), shown)
}

fn shown(ReloadDoc { generation, changed, warnings }: &ReloadDoc) -> String {
    let mut text = match changed {
        false => format!("unchanged; generation {generation} stays in effect"),
        true => format!("reloaded; generation {generation} is in effect"),
    };
    for warning in warnings {
        text.push_str("\nwarning: ");
        text.push_str(warning);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_waits_for_a_restart_is_named() {
        let warnings = vec!["workers: 2 -> 4".to_owned()];
        let answer = ReloadDoc { generation: 4, changed: true, warnings };
        assert_eq!(shown(&answer), "reloaded; generation 4 is in effect\nwarning: workers: 2 -> 4");
        let answer = ReloadDoc { generation: 4, changed: false, warnings: Vec::new() };
        assert_eq!(shown(&answer), "unchanged; generation 4 stays in effect");
    }
}

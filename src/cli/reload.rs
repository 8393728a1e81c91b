//! `tidegate reload`: reloads the configuration of the running balancer.
//!
//! Called by the command line. It sends the request to the admin API.

use hyper::Method;
use tidegate_api::reload::ReloadDoc;
use tidegate_client::command::Exit;
use tidegate_client::http::{ClientArgs, ask, report};

/// Requests the reload and prints the result. For a rejected file it prints the problems to
/// standard error and returns [`Exit::Refused`].
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
    fn settings_that_need_a_restart_are_printed() {
        let warnings = vec!["workers: 2 -> 4".to_owned()];
        let answer = ReloadDoc { generation: 4, changed: true, warnings };
        assert_eq!(shown(&answer), "reloaded; generation 4 is in effect\nwarning: workers: 2 -> 4");
        let answer = ReloadDoc { generation: 4, changed: false, warnings: Vec::new() };
        assert_eq!(shown(&answer), "unchanged; generation 4 stays in effect");
    }
}

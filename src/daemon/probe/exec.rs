//! Runs a command that says whether a backend works.
//!
//! Called by probes of kind `exec`. The probe helper runs the command, because the sandbox of this
//! process allows none. A command that does not start or that a signal ends is a local error.

use super::{ProbeError, quote_message};
use crate::probe_helper::{CommandResult, ProbeHelper};
use std::io;
use std::time::Duration;
use tidegate_core::health::ProbeAnswer;
use tidegate_core::metrics::counters::LocalErrorKind;
use tidegate_core::model::{CommandSubject, ExecProbe, ExitMeaning};
use tidegate_dataplane::local_errors::local_kind;

pub(super) async fn run(
    helper: &ProbeHelper,
    probe: &ExecProbe,
    subject: CommandSubject,
    timeout: Duration,
) -> Result<ProbeAnswer, ProbeError> {
    match helper.run(subject, &probe.command, timeout).await {
        CommandResult::Exited(code, line) => {
            let said = said(format!("exit code {code}"), &line);
            match probe.exit_codes.meaning(code) {
                ExitMeaning::Success => Ok(ProbeAnswer::Command(said.into())),
                ExitMeaning::Failure => Err(ProbeError::Backend(said)),
                ExitMeaning::Undecided => Err(ProbeError::Undecided(said)),
            }
        }
        // Nothing that a backend does ends a command with a signal: it is a defect of the command,
        // or this host is out of memory.
        CommandResult::Signalled(signal) => {
            let why = format!("the command was ended by signal {signal}");
            Err(ProbeError::Local(why, LocalErrorKind::Other))
        }
        CommandResult::TimedOut(line) => {
            let timeout = humantime::format_duration(timeout);
            Err(ProbeError::Backend(said(format!("killed after {timeout}"), &line)))
        }
        CommandResult::NotRun(errno, why) => {
            let kind = match errno {
                0 => LocalErrorKind::Other,
                errno => local_kind(&io::Error::from_raw_os_error(errno)),
            };
            Err(ProbeError::Local(why, kind))
        }
    }
}

fn said(how: String, line: &[u8]) -> String {
    match line {
        [] => how,
        line => format!("{how}: {}", quote_message(line)),
    }
}

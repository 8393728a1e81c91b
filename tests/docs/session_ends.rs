//! Generates the matrix of `docs/session-ends.md`: causes, phases and the letters of each cell.

use crate::pages::{column, page};
use std::fmt::Write;
use tidegate_core::outcome::{Cause, Phase, code};

const PAGE: &str = "docs/session-ends.md";

pub(crate) fn text() -> String {
    let phases: Vec<&str> = Phase::ALL.iter().map(|phase| phase.name()).collect();
    let mut out = format!("| cause | `{}` |\n", phases.join("` | `"));
    let _ = writeln!(out, "|---|{}", ":-:|".repeat(Phase::COUNT));
    for cause in Cause::ALL {
        let cell = |phase: Phase| match phases_of(cause).contains(&phase) {
            true => format!("`{}`", String::from_utf8_lossy(&code(cause, phase))),
            false => String::new(),
        };
        let cells: Vec<String> = Phase::ALL.into_iter().map(cell).collect();
        let _ = writeln!(out, "| `{}` | {} |", cause.name(), cells.join(" | "));
    }
    out
}

/// The phases in which a session can end with this cause.
fn phases_of(cause: Cause) -> &'static [Phase] {
    use Phase::{Admit, Closed, Connect, Data, HalfClosed, Preread, Queue};
    match cause {
        Cause::Finished => &[Closed],
        Cause::ClientReset => &[Preread, Queue, Connect, Data, HalfClosed, Closed],
        Cause::ClientLeft => &[Preread, Queue],
        Cause::QueueTimeout => &[Queue],
        Cause::ClientLost => &[Preread, Data, HalfClosed, Closed],
        Cause::BackendReset
        | Cause::BackendLost
        | Cause::BackendRemoved
        | Cause::BackendDown
        | Cause::BackupReleased
        | Cause::ClosedByOperator
        | Cause::Rebalanced => &[Data, HalfClosed, Closed],
        Cause::ConnectRefused | Cause::ConnectTimeout | Cause::ConnectFailed => &[Connect],
        Cause::NoBackend | Cause::Denied | Cause::SourceConnections | Cause::SourceRate => &[Admit],
        Cause::Route => &[Admit, Preread, Queue],
        Cause::ProxyHeaderMissing
        | Cause::ProxyHeaderMalformed
        | Cause::ProxyHeaderTimeout
        | Cause::ProxyHeaderCrc => &[Preread],
        Cause::FirstByteTimeout => &[Preread, Data],
        Cause::IdleTimeout => &[Data],
        Cause::SessionMax => &[Data, HalfClosed],
        Cause::HalfClosedTimeout => &[HalfClosed, Closed],
        Cause::DrainDeadline | Cause::ResetByOperator => {
            &[Preread, Queue, Connect, Data, HalfClosed, Closed]
        }
        Cause::LocalResource => &[Admit, Preread, Connect, Data, HalfClosed, Closed],
        Cause::InternalError => &Phase::ALL,
    }
}

#[test]
fn every_cause_and_phase_is_described() {
    let page = page(PAGE);
    let causes: Vec<&str> = Cause::ALL.iter().map(|cause| cause.name()).collect();
    assert_eq!(column(&page, "| cause | what happened", 0), causes);
    let phases: Vec<&str> = Phase::ALL.iter().map(|phase| phase.name()).collect();
    assert_eq!(column(&page, "| phase |", 0), phases);
}

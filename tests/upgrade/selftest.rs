//! `tidegate selftest`, run as users run it.

mod alone {
    use crate::common::proxy::PROGRAM;
    use crate::common::{exclusive, measured};
    use std::process::Command;

    #[test]
    fn selftest_reports_no_losses() {
        let _share = exclusive::alone();
        let output = Command::new(PROGRAM)
            .args(["selftest", "--for", "4s", "--reloads", "20", "--upgrades", "3", "--kills", "3"])
            .args(["--seed", "7"])
            .output()
            .unwrap();
        let said = String::from_utf8(output.stdout).unwrap();
        let complained = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(0), "{said}\n{complained}");
        assert!(said.starts_with("seed 7: 20 reloads, 3 upgrades, 3 kills in 4s\n"), "{said}");
        assert!(said.ends_with("\n0 refused, 0 reset, 0 bytes wrong\n"), "{said}");
        measured(said.lines().nth(1).unwrap());
    }
}

//! Completion in bash, zsh and fish, and the manual pages.

use crate::common::conf::{Conf, Pool};
use crate::common::proxy::{PROGRAM, TestProxy};
use crate::common::{Engine, exclusive, have};
use std::path::Path;
use std::process::Command;

/// What one shell offers for a command line whose last word is `word`.
struct CompletingShell {
    name: &'static str,
    /// Reads the script on standard input, completes `$WORDS`, and prints one candidate per line.
    script: &'static str,
}

const SHELLS: [CompletingShell; 3] = [
    CompletingShell {
        name: "bash",
        script: "source <(tidegate completions bash)
            read -ra COMP_WORDS <<<\"$WORDS\"; [[ $WORDS != *' ' ]] || COMP_WORDS+=('')
            COMP_CWORD=$((${#COMP_WORDS[@]} - 1)) COMP_TYPE=9
            complete -p tidegate | grep -q _clap_complete_tidegate || exit 1
            _clap_complete_tidegate tidegate \"${COMP_WORDS[COMP_CWORD]}\" 2>/dev/null
            printf '%s\\n' \"${COMPREPLY[@]}\"",
    },
    CompletingShell {
        // The functions of its completion system are doubles that print.
        name: "zsh",
        script: "compdef() { print -r -- \"compdef $*\" >&2 }
            _describe() { local -a all=(\"${(@P)3}\"); print -rl -- \"${(@)all%%:*}\" }
            source <(tidegate completions zsh)
            words=(${(s: :)WORDS}); [[ $WORDS != *' ' ]] || words+=('')
            CURRENT=$#words
            _clap_dynamic_completer_tidegate",
    },
    CompletingShell {
        name: "fish",
        script: "tidegate completions fish | source; complete -C \"$WORDS\" | cut -f1",
    },
];

impl CompletingShell {
    /// Returns the candidates without escapes.
    fn complete(&self, words: &str, admin: &str) -> Vec<String> {
        let programs = Path::new(PROGRAM).parent().unwrap().display();
        let path = format!("{programs}:{}", std::env::var("PATH").unwrap_or_default());
        let home = tempfile::tempdir_in("/tmp").unwrap();
        let output = Command::new(self.name)
            .args(["-c", self.script])
            .env("PATH", path)
            .env("HOME", home.path())
            .env("XDG_CONFIG_HOME", home.path())
            .env("WORDS", words)
            .env("TIDEGATE_ADMIN", admin)
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stdout).replace('\\', "");
        text.lines().map(|line| line.trim().to_owned()).collect()
    }
}

#[test]
fn shells_complete_commands_options_and_names_of_the_running_balancer() {
    let _share = exclusive::shared();
    if !have(&["bash", "zsh", "fish"]) {
        return;
    }
    let pool = Pool::new("web").backend("a1", "127.0.0.1:9").backend("b", "127.0.0.1:10");
    let proxy = TestProxy::start(Conf::simple(Engine::Epoll, pool));
    for shell in SHELLS {
        let complete = |words: &str| shell.complete(words, &proxy.admin());
        let has = |words: &str, wanted: &str| {
            let got = complete(words);
            let found = got.iter().any(|one| one.split_whitespace().next() == Some(wanted));
            assert!(found, "{}: {words:?}: no {wanted} in {got:?}", shell.name);
        };
        has("tidegate dr", "drain");
        has("tidegate run --pid", "--pid-file");
        has("tidegate drain web/", "web/a1");
        has("tidegate drain web/", "web/b");
        has("tidegate explain web/a", "web/a1");
        has("tidegate explain --client 10.0.0.1 --frontend ", "web");
        let got = complete("tidegate drain web/a");
        assert!(!got.iter().any(|one| one.contains("web/b")), "{}: {got:?}", shell.name);
        // Without a balancer there are no names, and no error on the terminal.
        let alone = shell.complete("tidegate drain web/", "unix:/nowhere/admin.sock");
        assert!(!alone.iter().any(|one| one.contains("web/a1")), "{}: {alone:?}", shell.name);
    }
}

#[test]
fn manual_pages_have_no_warnings() {
    let _share = exclusive::shared();
    if !have(&["man", "groff"]) {
        return;
    }
    let dir = tempfile::tempdir_in("/tmp").unwrap();
    let made = Command::new(PROGRAM).arg("man").arg(dir.path()).status().unwrap();
    assert!(made.success());
    let mut pages = 0;
    for section in ["man1", "man5"] {
        for entry in std::fs::read_dir(dir.path().join(section)).unwrap() {
            let page = entry.unwrap().path();
            let output = Command::new("man")
                .args(["--warnings", "-E", "UTF-8", "-l", "-Tutf8"])
                .arg(&page)
                .env("LC_ALL", "C.UTF-8")
                .env("MANWIDTH", "80")
                .output()
                .unwrap();
            let warnings = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success(), "{}: {warnings}", page.display());
            assert_eq!(warnings, "", "{}", page.display());
            let text = String::from_utf8_lossy(&output.stdout).into_owned();
            assert!(text.contains("tidegate") && text.lines().count() > 10, "{text}");
            pages += 1;
        }
    }
    assert!(pages > 15, "{pages}");
}

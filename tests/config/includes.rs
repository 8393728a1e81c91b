//! Files that the main file includes: order, places of problems, and what is refused.

use super::config::{self, Texts};
use std::fs;
use std::path::PathBuf;

/// A directory with a main file that includes `conf.d/*.toml`.
struct Files(tempfile::TempDir);

impl Files {
    fn new(main: &str, others: &[(&str, &str)]) -> Files {
        let files = Files(tempfile::tempdir().unwrap());
        fs::create_dir(files.0.path().join("conf.d")).unwrap();
        files.put("main.toml", main);
        others.iter().for_each(|(name, text)| files.put(name, text));
        files
    }

    fn put(&self, name: &str, text: &str) {
        fs::write(self.0.path().join(name), text).unwrap();
    }

    fn main(&self) -> PathBuf {
        self.0.path().join("main.toml")
    }

    /// Returns the problems, without the directory.
    fn problems(&self) -> String {
        let directory = format!("{}/", self.0.path().display());
        config::load(&self.main()).unwrap_err().to_string().replace(&directory, "")
    }
}

const MAIN: &str = "include = [\"conf.d/*.toml\", \"extra.toml\"]\n[log]\nlevel = \"warn\"\n";
const FRONTEND: &str = "[frontend.web]\nbind = \"127.0.0.1:80\"\npool = \"web\"\n";
const POOL: &str = "# A pool.\n\n[[pool.web.backend]]\naddress = \"10.0.0.1:80\"\n";
const MORE: &str = "[[pool.web.backend]]\naddress = \"10.0.0.2:80\"";

#[test]
fn included_files_are_read_in_sorted_order() {
    let files = Files::new(
        MAIN,
        &[
            ("conf.d/20.toml", MORE),
            ("conf.d/10.toml", POOL),
            ("conf.d/.hidden.toml", "bad"),
            ("conf.d/other.txt", "bad"),
            ("extra.toml", FRONTEND),
        ],
    );
    let loaded = config::load(&files.main()).unwrap();
    let backends = loaded.config.pools[0].backends.iter();
    let addresses: Vec<String> = backends.map(|backend| backend.address.to_string()).collect();
    assert_eq!(addresses, ["10.0.0.1:80", "10.0.0.2:80"]);
    let read: Vec<_> =
        loaded.config.includes.files.iter().map(|path| super::bare_name(path)).collect();
    assert_eq!(read, ["10.toml", "20.toml", "extra.toml"]);
    assert_eq!(loaded.config.named_files(), loaded.config.includes.files);

    let texts = Texts::of(&files.main(), loaded.text.clone(), &loaded.config);
    let (digest, before) = (loaded.digest, loaded.config);
    files.put("conf.d/20.toml", "bad");
    files.put("conf.d/30.toml", "bad");
    let kept = config::load_kept(&texts).unwrap();
    assert_eq!((kept.digest, kept.config), (digest, before), "the kept texts are enough");
}

#[test]
fn problems_are_at_their_places_in_included_files() {
    let wrong = "[frontend.web]\nbind = \"127.0.0.1:80\"\npol = \"web\"\n";
    let files = Files::new(MAIN, &[("conf.d/a.toml", POOL), ("extra.toml", wrong)]);
    let problems = files.problems();
    assert!(problems.contains("extra.toml:3:1: error: unknown key \"pol\""), "{problems}");
    assert!(problems.contains("\n3 | pol = \"web\""), "{problems}");

    files.put("extra.toml", &format!("{FRONTEND}[log]\n"));
    let problems = files.problems();
    assert!(
        problems.starts_with("extra.toml:4:")
            && problems.contains("\"log\" is already defined at main.toml:2:2"),
        "{problems}"
    );
    files.put("extra.toml", &format!("{FRONTEND}[admin\n"));
    assert!(files.problems().starts_with("extra.toml:4:"), "{}", files.problems());
}

#[test]
fn wrong_includes_are_refused() {
    let files = Files::new(MAIN, &[("conf.d/a.toml", POOL)]);
    let refused = |main: &str, extra: Option<&str>, words: &str| {
        files.put("main.toml", main);
        match extra {
            Some(text) => files.put("extra.toml", text),
            None => drop(fs::remove_file(files.0.path().join("extra.toml"))),
        }
        let problems = files.problems();
        assert!(problems.contains(words), "{words}: {problems}");
    };
    refused(MAIN, None, "main.toml:1:29: error: cannot include");
    refused(
        MAIN,
        Some("include = \"x\"\n"),
        "extra.toml:1:1: error: an included file cannot include files",
    );
    refused(
        MAIN,
        Some("# x\nlog.level = \"info\"\n"),
        "extra.toml:2:1: error: an included file must start with a table",
    );
    refused("include = 1\n", None, "include takes file names");
    refused("include = \"*/a.toml\"\n", None, "a directory of include takes no *");
    refused("include = \"absent/*.toml\"\n", None, "cannot read the directory");
    refused("include = [\"conf.d/*\", \"conf.d/a.toml\"]\n", None, "included twice");
    let problems = config::parse(MAIN, "text").unwrap_err().to_string();
    assert!(problems.contains("a text alone cannot include files"), "{problems}");
}

//! Packages: what scripts/package makes of this build, installed and run in a root of its own, as
//! the pages say.
//!
//! Needs root, for mounts and `chroot`. Without root the tests are skipped, except with CI set.

#![allow(clippy::unwrap_used, clippy::disallowed_methods)]

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

const PROGRAM: &str = env!("CARGO_BIN_EXE_tidegate");

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// Whether this host can run the test. In CI a missing part fails the test.
fn can(programs: &[&str]) -> bool {
    let path = std::env::var("PATH").unwrap_or_default() + ":/usr/sbin:/sbin";
    let found = |program: &&&str| path.split(':').any(|dir| Path::new(dir).join(program).exists());
    let missing: Vec<&&str> = programs.iter().filter(|program| !found(program)).collect();
    let is_root = rustix::process::geteuid().is_root();
    if missing.is_empty() && is_root {
        return true;
    }
    let allowed =
        std::env::var_os("CI").is_none() || std::env::var_os("TIDEGATE_NO_NETNS").is_some();
    assert!(allowed, "root: {is_root}; missing: {missing:?}");
    eprintln!("skipped: root: {is_root}; missing: {missing:?}");
    false
}

#[track_caller]
fn done(command: &mut Command) -> String {
    let output: Output = command.output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{command:?}: {}\n{text}\n{errors}", output.status);
    text.into_owned()
}

/// Makes a package of the program of this build, and returns its path.
fn package(kind: &str, out: &Path) -> PathBuf {
    let text = done(
        Command::new(root().join("scripts/package"))
            .args([kind, "--program", PROGRAM, "--out"])
            .arg(out)
            .env("SOURCE_DATE_EPOCH", "1760000000"),
    );
    PathBuf::from(text.trim().lines().last().unwrap())
}

/// A backend that answers each connection with one word.
fn backend() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let _ = stream.unwrap().write_all(b"served");
        }
    });
    address
}

fn configuration(backend: SocketAddr) -> (SocketAddr, String) {
    let frontend = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let text = format!(
        "[process]\nworkers = 1\n[frontend.web]\nbind = \"{frontend}\"\npool = \"web\"\n\
         [[pool.web.backend]]\naddress = \"{backend}\"\n"
    );
    (frontend, text)
}

/// Waits until a client gets the answer of the backend.
#[track_caller]
fn is_served(frontend: SocketAddr) {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let mut answer = String::new();
        if let Ok(mut stream) = TcpStream::connect(frontend) {
            let _ = stream.read_to_string(&mut answer);
        }
        if answer == "served" {
            return;
        }
        assert!(Instant::now() < deadline, "no session within 60 s");
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// A process that is stopped with SIGTERM.
struct Serving(Child);

impl Serving {
    #[track_caller]
    fn stop(mut self) {
        let pid = rustix::process::Pid::from_child(&self.0);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
        assert_eq!(self.0.wait().unwrap().code(), Some(0));
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn container_image_is_reproducible_and_serves_in_a_root_of_its_own() {
    if !can(&["python3", "chroot", "tar", "strip", "unshare"]) {
        return;
    }
    let out = tempfile::tempdir().unwrap();
    let (one, two) = (out.path().join("one"), out.path().join("two"));
    let (image, again) = (package("oci", &one), package("oci", &two));
    let bytes = std::fs::read(&image).unwrap();
    assert!(bytes == std::fs::read(again).unwrap(), "two builds differ");

    // As a container engine does: index, manifest, layer.
    let layout = out.path().join("layout");
    std::fs::create_dir(&layout).unwrap();
    done(Command::new("tar").arg("-xf").arg(&image).arg("-C").arg(&layout));
    let json = |path: PathBuf| -> serde_json::Value {
        serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
    };
    let blob = |of: &serde_json::Value| {
        let digest = of["digest"].as_str().unwrap().strip_prefix("sha256:").unwrap().to_owned();
        let path = layout.join("blobs/sha256").join(&digest);
        let sum = done(Command::new("sha256sum").arg(&path));
        assert!(sum.starts_with(&digest), "{sum}");
        assert_eq!(std::fs::metadata(&path).unwrap().len(), of["size"].as_u64().unwrap());
        path
    };
    assert_eq!(json(layout.join("oci-layout"))["imageLayoutVersion"], "1.0.0");
    let index = json(layout.join("index.json"));
    let manifest = json(blob(&index["manifests"][0]));
    let config = json(blob(&manifest["config"]));
    assert_eq!(config["config"]["User"], "65532:65532");
    assert_eq!(config["created"], "2025-10-09T08:53:20Z");
    let files = out.path().join("root");
    std::fs::create_dir(&files).unwrap();
    done(Command::new("tar").arg("-xpf").arg(blob(&manifest["layers"][0])).arg("-C").arg(&files));

    let (frontend, text) = configuration(backend());
    std::fs::write(files.join("etc/tidegate/tidegate.toml"), text).unwrap();
    let entry = config["config"]["Entrypoint"].as_array().unwrap();
    let command = entry.iter().chain(config["config"]["Cmd"].as_array().unwrap());
    // Container engines mount /proc.
    std::fs::create_dir(files.join("proc")).unwrap();
    let script = "mount --bind /proc \"$0/proc\"; exec chroot --userspec=65532:65532 \"$0\" \"$@\"";
    let inside = |words: &[&str]| {
        let mut command = Command::new("unshare");
        command.args(["--mount", "sh", "-c", script]).arg(&files).args(words);
        command
    };
    let words: Vec<&str> = command.map(|word| word.as_str().unwrap()).collect();
    let serving = Serving(inside(&words).stderr(Stdio::null()).spawn().unwrap());
    is_served(frontend);
    done(&mut inside(&["/usr/bin/tidegate", "ready"]));
    let status = done(&mut inside(&["/usr/bin/tidegate", "status"]));
    assert!(status.contains("POOL web"), "{status}");
    serving.stop();
}

/// The first section of the quickstart: configuration of HAProxy, commands, and report.
fn first_use() -> [String; 3] {
    let page = std::fs::read_to_string(root().join("docs/quickstart.md")).unwrap();
    let (_, section) = page.split_once("\n## First use\n").unwrap();
    let (section, _) = section.split_once("\n## ").unwrap();
    ["haproxy", "sh", "text"].map(|language| {
        let (_, block) = section.split_once(&format!("\n```{language}\n")).unwrap();
        block.split_once("\n```").unwrap().0.to_owned()
    })
}

#[track_caller]
fn is_lintian_clean(package: &Path) {
    let lintian = Command::new("lintian")
        .args(["--fail-on", "error,warning", "--allow-root"])
        .arg(package)
        .output()
        .unwrap();
    let found = String::from_utf8_lossy(&lintian.stdout);
    assert!(lintian.status.success() && found.trim().is_empty(), "{found}");
}

/// Runs the script as root in a system of its own, in which systemd runs, and returns its output
/// and its errors.
fn in_a_root(package: &Path, script: &str) -> (String, String) {
    let work = tempfile::tempdir().unwrap();
    let namespaces = ["--mount", "--pid", "--uts", "--ipc", "--net", "--cgroup"];
    let output = Command::new("timeout")
        .args(["-s", "KILL", "150", "unshare", "--fork", "--kill-child"])
        .args(namespaces)
        .arg("sh")
        .arg(root().join("tests/package/root.sh"))
        .arg(work.path())
        .arg(package)
        .arg(script)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (text(&output.stdout), text(&output.stderr))
}

#[test]
fn debian_package_replaces_haproxy_with_the_five_commands_of_the_quickstart() {
    let programs = ["dpkg", "apt", "unshare", "strip", "ip", "ss", "lintian", "systemd-analyze"];
    if !can(&programs) || !can(&["haproxy", "python3"]) {
        return;
    }
    let [configuration, commands, report] = first_use();
    assert_eq!(commands.lines().count(), 5, "{commands}");
    let out = tempfile::tempdir().unwrap();
    let package = package("deb", out.path());
    let name = package.file_name().unwrap().to_string_lossy().into_owned();
    assert!(name.starts_with("tidegate_") && name.ends_with(".deb"), "{name}");
    is_lintian_clean(&package);

    let script = format!(
        "CONFIGURATION='{configuration}'\nfirst_use() (\nset -e\n{commands}\n)\n{}",
        include_str!("package/first_use.sh")
    );
    let (told, errors) = in_a_root(&package, &script);
    let report: Vec<String> =
        report.lines().map(|line| line.replace("/etc/haproxy/", "")).collect();
    let mut expected = vec!["before: \"haproxy\"", "after: \"tidegate\""];
    expected.push("pools in the status: 1");
    expected.push("status: POOL web: weighted-round-robin, 2 of 2 eligible");
    expected.extend(report.iter().map(String::as_str));
    expected.extend([
        "units: disabled enabled ",
        "user: /var/lib/tidegate:/usr/sbin/nologin",
        "runs as: tidegate",
        "conffiles: 2",
        "stopped: ",
        "kept: 1",
        "package: unknown",
    ]);
    assert_eq!(told.lines().collect::<Vec<_>>(), expected, "{errors}");
}

//! Packages: what scripts/package makes of this build, installed and run in a root of its own.
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

/// Installs, starts and purges the package, in the files of this host under an overlay that
/// takes every change.
const IN_AN_OVERLAY: &str = r#"
set -eu
work=$1 package=$2
mount -t tmpfs tmpfs "$work"
mkdir "$work/changes" "$work/work" "$work/root"
mount -t overlay overlay -o "lowerdir=/,upperdir=$work/changes,workdir=$work/work" "$work/root"
root=$work/root
mount -t proc proc "$root/proc"
mount --bind /dev "$root/dev"
mount -t tmpfs tmpfs "$root/run"
mount -t tmpfs tmpfs "$root/tmp"
mkdir -p "$root/tmp/in"
cp "$package" "$root/tmp/in/tidegate.deb"
cat >"$root/tmp/in/tidegate.toml"
inside() { chroot "$root" "$@"; }

inside dpkg -i /tmp/in/tidegate.deb >&2
echo "user: $(inside getent passwd tidegate | cut -d: -f6,7)"
inside tidegate check /etc/tidegate/tidegate.toml
echo "conffiles: $(inside dpkg-query -W -f '${Conffiles}' tidegate | grep -c /etc/)"
inside systemd-analyze verify --man=no /lib/systemd/system/tidegate.service >&2
for page in /usr/share/man/man1/tidegate-run.1.gz /usr/share/man/man5/tidegate.toml.5.gz \
  /usr/share/bash-completion/completions/tidegate /usr/share/zsh/vendor-completions/_tidegate \
  /usr/share/fish/vendor_completions.d/tidegate.fish; do
  inside test -s "$page" || echo "no $page"
done

cat "$root/tmp/in/tidegate.toml" >"$root/etc/tidegate/tidegate.toml"
inside install -d -o tidegate /run/tidegate /var/lib/tidegate /var/log/tidegate
inside runuser -u tidegate -- tidegate run --config /etc/tidegate/tidegate.toml 2>/dev/null &
serving=$!
until inside runuser -u tidegate -- tidegate ready 2>/dev/null; do
  kill -0 "$serving"
  sleep 0.1
done
echo "served: $(bash -c "exec 3<>/dev/tcp/$3; cat <&3")"
inside runuser -u tidegate -- tidegate shutdown >&2
wait "$serving"

inside dpkg -r tidegate >&2
echo "kept: $(inside cat /etc/tidegate/tidegate.toml | grep -c frontend.web)"
inside dpkg -P tidegate >&2
inside getent passwd tidegate && echo "the user stays"
for path in /etc/tidegate /var/lib/tidegate /var/log/tidegate /usr/bin/tidegate; do
  if inside test -e "$path"; then echo "$path stays"; fi
done
echo "status: $(inside dpkg-query -W -f '${Status}' tidegate 2>/dev/null || echo unknown)"
"#;

#[test]
fn debian_package_installs_starts_and_purges_in_a_root_of_its_own() {
    if !can(&["dpkg", "unshare", "strip", "runuser", "lintian", "systemd-analyze"]) {
        return;
    }
    let out = tempfile::tempdir().unwrap();
    let package = package("deb", out.path());
    let name = package.file_name().unwrap().to_string_lossy().into_owned();
    assert!(name.starts_with("tidegate_") && name.ends_with(".deb"), "{name}");
    let lintian = Command::new("lintian")
        .args(["--fail-on", "error,warning", "--allow-root"])
        .arg(&package)
        .output()
        .unwrap();
    let found = String::from_utf8_lossy(&lintian.stdout);
    assert!(lintian.status.success() && found.trim().is_empty(), "{found}");

    let (frontend, text) = configuration(backend());
    let work = out.path().join("work");
    std::fs::create_dir(&work).unwrap();
    let mut child = Command::new("unshare")
        .args(["--mount", "--pid", "--fork", "sh", "-c", IN_AN_OVERLAY, "sh"])
        .arg(&work)
        .arg(&package)
        .arg(format!("127.0.0.1/{}", frontend.port()))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    let told = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    let told: Vec<&str> = told.lines().collect();
    let expected = [
        "user: /var/lib/tidegate:/usr/sbin/nologin",
        "/etc/tidegate/tidegate.toml: ok: 1 frontend, 1 pool, 2 backends",
        "conffiles: 2",
        "served: served",
        "kept: 1",
        "status: unknown",
    ];
    assert_eq!(told, expected, "{errors}");
}

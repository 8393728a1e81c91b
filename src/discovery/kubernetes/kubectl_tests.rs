//! kubectl against the double: the double answers as an API server does, for a client that
//! knows nothing of Tidegate.

use crate::testing::kubernetes::{EndpointDocument, KubernetesDouble, SliceDocument};
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use tokio::sync::mpsc;

fn kubectl(double: &KubernetesDouble, dir: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new("kubectl");
    command
        .env("HOME", dir)
        .env_remove("KUBECONFIG")
        .args(["--server", &format!("http://{}", double.address()), "-n", "shop"])
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command
}

/// Kills kubectl on drop.
struct KubectlWatch(Child);

impl Drop for KubectlWatch {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

async fn output(mut command: Command) -> String {
    let output = tokio::task::spawn_blocking(move || command.output()).await.unwrap().unwrap();
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}

async fn double() -> Option<KubernetesDouble> {
    let version = Command::new("kubectl").arg("version").arg("--client").output();
    if version.is_err() {
        assert!(std::env::var_os("CI").is_none(), "install kubernetes-client");
        eprintln!("skipped: kubectl is missing");
        return None;
    }
    let double = KubernetesDouble::start(None).await.unwrap();
    double.put(slice("web-a", &[1, 2]));
    double.put(SliceDocument::new("other", "web", "hidden", Vec::new()));
    Some(double)
}

fn slice(name: &str, pods: &[u16]) -> SliceDocument {
    let endpoints = pods.iter().map(|pod| EndpointDocument::ready(*pod)).collect();
    SliceDocument::new("shop", "web", name, endpoints)
}

#[tokio::test]
async fn kubectl_lists_the_slices_and_sees_refusals() {
    let Some(double) = double().await else { return };
    let dir = tempfile::tempdir().unwrap();
    let run = |arguments: &'static [&'static str]| output(kubectl(&double, dir.path(), arguments));
    let listed = run(&["get", "endpointslices", "-o", "name"]).await;
    assert_eq!(listed.trim(), "endpointslice.discovery.k8s.io/web-a");
    double.put(slice("web-b", &[3]));
    double.put(slice("web-c", &[4]));
    // In pages of one.
    let listed = run(&["get", "endpointslices", "--chunk-size=1"]).await;
    assert_eq!(listed.lines().count(), 4, "{listed}");
    let selected = ["get", "endpointslices", "-l", "kubernetes.io/service-name=db", "-o", "name"];
    let selected: &'static [&'static str] = Box::leak(Box::new(selected));
    assert_eq!(run(selected).await.trim(), "");
    let addresses =
        &["get", "endpointslice", "web-a", "-o", "jsonpath={.endpoints[*].addresses[*]}"];
    assert_eq!(run(addresses).await.trim(), "10.1.1.1 10.1.2.1");
    let missing = run(&["get", "endpointslice", "web-z"]).await;
    assert!(missing.contains("\"web-z\" not found"), "{missing}");
    double.script(|faults| faults.forbidden = "shop".into());
    let forbidden = run(&["get", "endpointslices"]).await;
    assert!(forbidden.contains("Error from server (Forbidden)"), "{forbidden}");
    double.script(|faults| faults.token = "rotated".into());
    let unauthorized = run(&["get", "endpointslices"]).await;
    assert!(unauthorized.contains("logged in") || unauthorized.contains("Unauthorized"));
}

#[tokio::test]
async fn kubectl_follows_a_watch() {
    let Some(double) = double().await else { return };
    let dir = tempfile::tempdir().unwrap();
    let form = "jsonpath={.type} {.object.metadata.name}{\"\\n\"}";
    let follow = &["get", "endpointslices", "-w", "--output-watch-events", "-o", form];
    let mut watching = KubectlWatch(kubectl(&double, dir.path(), follow).spawn().unwrap());
    let output = BufReader::new(watching.0.stdout.take().unwrap());
    let (sender, mut lines) = mpsc::unbounded_channel();
    std::thread::spawn(move || {
        output.lines().map_while(Result::ok).all(|line| sender.send(line).is_ok());
    });
    let mut next = async || {
        let line = tokio::time::timeout(std::time::Duration::from_secs(20), lines.recv()).await;
        line.expect("a line in time").expect("a line")
    };
    assert_eq!(next().await, "ADDED web-a");
    while !double.take_requests().iter().any(|request| request.contains("watch=true")) {
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    double.put(slice("web-b", &[3]));
    assert_eq!(next().await, "ADDED web-b");
    double.put(slice("web-a", &[2]));
    assert_eq!(next().await, "MODIFIED web-a");
    double.delete("shop", "web-b");
    assert_eq!(next().await, "DELETED web-b");
}

//! The watcher of kube-rs follows the Kubernetes double through its accidents.
//!
//! `scripts/referee` runs it. It prints one line per accident and exits with 0 if kube-rs saw
//! what an API server would have shown. It uses no code of the Kubernetes source.

use futures::{StreamExt, stream::BoxStream};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::config::AuthInfo;
use kube::runtime::WatchStreamExt;
use kube::runtime::watcher::{self, Event};
use kube::{Api, Client, Config, ResourceExt};
use std::path::Path;
use std::time::Duration;
use tidegate_discovery::testing::kubernetes::{EndpointDocument, KubernetesDouble, SliceDocument};

type Events = BoxStream<'static, Result<Event<EndpointSlice>, watcher::Error>>;

/// Longest wait for an event. The watcher waits up to some seconds after an error, and reads
/// a token again when it is 50 s old.
const WAIT_MAX: Duration = Duration::from_secs(90);

/// What the double refuses while kube-rs still has the former token.
const UNAUTHORIZED: &str = "Unauthorized";

fn slice(name: &str, pods: &[u16]) -> SliceDocument {
    let endpoints = pods.iter().map(|pod| EndpointDocument::ready(*pod)).collect();
    SliceDocument::new("shop", "web", name, endpoints)
}

fn shown(event: &Event<EndpointSlice>) -> String {
    let text = |slice: &EndpointSlice| {
        let endpoints = slice.endpoints.iter().flatten();
        let addresses = endpoints.flat_map(|endpoint| endpoint.addresses.clone());
        format!("{} {}", slice.name_any(), addresses.collect::<Vec<_>>().join(","))
    };
    match event {
        Event::Init => "init".to_owned(),
        Event::InitApply(slice) => format!("listed {}", text(slice)),
        Event::InitDone => "done".to_owned(),
        Event::Apply(slice) => format!("put {}", text(slice)),
        Event::Delete(slice) => format!("delete {}", slice.name_any()),
    }
}

/// Waits for these events. Returns the errors between them.
async fn expect(events: &mut Events, accident: &str, expected: &[&str]) -> Vec<String> {
    let mut errors = Vec::new();
    for wanted in expected {
        loop {
            let next = tokio::time::timeout(WAIT_MAX, events.next()).await;
            match next.expect("an event in time").expect("the watcher never ends") {
                Ok(event) => {
                    assert_eq!(shown(&event), *wanted, "{accident}");
                    break;
                }
                Err(error) => {
                    println!("   error: {error}");
                    errors.push(error.to_string());
                }
            }
        }
    }
    println!("ok {accident}");
    errors
}

/// Waits until a watch is open.
async fn watched(double: &KubernetesDouble) {
    while !double.take_requests().iter().any(|request| request.contains("watch=true")) {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Follows one change: waits for a watch, writes slice `a` and expects its event.
async fn follow(
    double: &KubernetesDouble,
    events: &mut Events,
    accident: &str,
    pods: &[u16],
) -> Vec<String> {
    let addresses: Vec<String> = pods.iter().map(|pod| format!("10.1.{pod}.1")).collect();
    let text = format!("put a {}", addresses.join(","));
    let expected = [&*text];
    let put = async {
        watched(double).await;
        double.put(slice("a", pods));
    };
    tokio::join!(expect(events, accident, &expected), put).0
}

/// Lets the watcher run while no event is expected.
async fn idle(events: &mut Events, time: Duration) {
    if let Ok(event) = tokio::time::timeout(time, events.next()).await {
        panic!("an event that nothing caused: {event:?}");
    }
}

fn events_of(double: &KubernetesDouble, token: &Path) -> Result<Events, kube::Error> {
    let server = format!("http://{}", double.address()).parse().expect("a URL");
    let token_file = Some(token.display().to_string());
    let mut config = Config::new(server);
    config.auth_info = AuthInfo { token_file, ..AuthInfo::default() };
    let client = Client::try_from(config)?;
    let api: Api<EndpointSlice> = Api::namespaced(client, "shop");
    let config = watcher::Config::default().labels("kubernetes.io/service-name=web").page_size(2);
    Ok(watcher::watcher(api, config).default_backoff().boxed())
}

/// Bookmarks move the version of a watch beyond the compacted history.
async fn bookmarks(double: &KubernetesDouble, events: &mut Events) {
    double.put(SliceDocument::new("shop", "db", "other", Vec::new()));
    double.compact();
    idle(events, Duration::from_secs(1)).await;
    double.close_watches();
    let errors = follow(double, events, "a closed watch after bookmarks", &[3]).await;
    assert!(errors.is_empty(), "the watch continued");
    double.script(|faults| faults.bookmark = Duration::from_secs(60));
}

/// A version before the history is an event of the watch with code 410. API servers answer
/// so; the watcher of kube-rs 5.0 repeats a watch forever whose status is 410.
async fn compacted(double: &KubernetesDouble, events: &mut Events) {
    double.put(SliceDocument::new("shop", "db", "other", Vec::new()));
    double.compact();
    double.close_watches();
    let again = ["init", "listed a 10.1.3.1", "listed c 10.1.1.1", "done"];
    let errors = expect(events, "410 is a list again", &again).await;
    assert_eq!(errors.len(), 1, "{errors:?}");
    idle(events, Duration::from_millis(300)).await;
}

/// Each slice of a service is an object of its own: an endpoint that moves is in both.
async fn two_slices(double: &KubernetesDouble, events: &mut Events) {
    double.put(slice("c", &[1, 3]));
    double.put(slice("a", &[]));
    let moved = ["put c 10.1.1.1,10.1.3.1", "put a "];
    expect(events, "an endpoint that moves between two slices", &moved).await;
}

/// The file has another token when the server no longer accepts the former one.
async fn rotated_token(double: &KubernetesDouble, events: &mut Events, token: &Path) {
    std::fs::write(token, "second").expect("the token file");
    double.script(|faults| faults.token = "second".to_owned());
    double.take_requests();
    double.close_watches();
    let accident = "a token that was replaced in its file";
    let next = tokio::time::timeout(WAIT_MAX, follow(double, events, accident, &[4]));
    let errors = next.await.expect("the new token in time");
    assert!(!errors.is_empty() && errors.iter().all(|error| error.contains(UNAUTHORIZED)));
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let dir = tempfile::tempdir()?;
    let token = dir.path().join("token");
    std::fs::write(&token, "first")?;
    let double = KubernetesDouble::start(None).await?;
    double.script(|faults| {
        faults.token = "first".to_owned();
        faults.bookmark = Duration::from_millis(200);
    });
    for name in ["a", "b", "c"] {
        double.put(slice(name, &[1]));
    }
    let mut events = events_of(&double, &token)?;
    let all = ["init", "listed a 10.1.1.1", "listed b 10.1.1.1", "listed c 10.1.1.1", "done"];
    expect(&mut events, "a list in pages", &all).await;
    follow(&double, &mut events, "a change", &[2]).await;
    double.delete("shop", "b");
    expect(&mut events, "a deletion", &["delete b"]).await;
    bookmarks(&double, &mut events).await;
    compacted(&double, &mut events).await;
    two_slices(&double, &mut events).await;
    double.script(|faults| faults.half_event = true);
    double.put(slice("c", &[7]));
    expect(&mut events, "an event that ends in its middle", &["put c 10.1.7.1"]).await;
    rotated_token(&double, &mut events, &token).await;
    println!("kube-rs agrees with the double");
    Ok(())
}

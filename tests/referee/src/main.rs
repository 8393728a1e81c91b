//! The watcher of kube-rs follows the Kubernetes double through its accidents.
//!
//! `scripts/referee` runs it. It prints one line per accident and exits with 0 if kube-rs saw
//! what an API server would have shown. It uses no code of the Kubernetes source.

use futures::{StreamExt, stream::BoxStream};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::runtime::watcher::{self, Event};
use kube::{Api, Client, Config, ResourceExt};
use std::time::Duration;
use tidegate_discovery::testing::kubernetes::{EndpointDocument, KubernetesDouble, SliceDocument};

type Events = BoxStream<'static, Result<Event<EndpointSlice>, watcher::Error>>;

/// Longest wait for an event. The watcher waits up to some seconds after an error.
const WAIT_MAX: Duration = Duration::from_secs(30);

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

/// Waits for these events. Returns how many errors were between them.
async fn expect(events: &mut Events, accident: &str, expected: &[&str]) -> u32 {
    let mut errors = 0;
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
                    errors += 1;
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

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let double = KubernetesDouble::start(None).await?;
    double.script(|faults| faults.bookmark = Duration::from_millis(200));
    for name in ["a", "b", "c"] {
        double.put(slice(name, &[1]));
    }
    let client = Client::try_from(Config::new(format!("http://{}", double.address()).parse()?))?;
    let api: Api<EndpointSlice> = Api::namespaced(client, "shop");
    let config = watcher::Config::default().labels("kubernetes.io/service-name=web").page_size(2);
    let mut events: Events = watcher::watcher(api, config).boxed();
    let all = ["init", "listed a 10.1.1.1", "listed b 10.1.1.1", "listed c 10.1.1.1", "done"];
    expect(&mut events, "a list in pages", &all).await;

    let follow = async |events: &mut Events, accident: &str, pods: &[u16], text: &str| {
        let next = expect(events, accident, &[text]);
        let put = async {
            watched(&double).await;
            double.put(slice("a", pods));
        };
        tokio::join!(next, put).0
    };
    follow(&mut events, "a change", &[2], "put a 10.1.2.1").await;
    double.delete("shop", "b");
    expect(&mut events, "a deletion", &["delete b"]).await;
    // Bookmarks move the version beyond the compacted history.
    double.put(SliceDocument::new("shop", "db", "other", Vec::new()));
    double.compact();
    let _ = tokio::time::timeout(Duration::from_secs(1), events.next()).await;
    double.close_watches();
    let errors =
        follow(&mut events, "a closed watch after bookmarks", &[3], "put a 10.1.3.1").await;
    assert_eq!(errors, 0, "the watch continued");
    double.script(|faults| faults.bookmark = Duration::from_secs(60));
    for by_status in [false, true] {
        double.script(|faults| faults.gone_by_status = by_status);
        double.compact();
        double.close_watches();
        let again = ["init", "listed a 10.1.3.1", "listed c 10.1.1.1", "done"];
        let errors = expect(&mut events, "410 is a list again", &again).await;
        println!("   errors: {errors}, 410 by status: {by_status}");
        let _ = tokio::time::timeout(Duration::from_millis(300), events.next()).await;
    }
    double.script(|faults| faults.half_events = 1);
    double.take_requests();
    double.put(slice("c", &[7]));
    expect(&mut events, "an event that ends in its middle", &["put c 10.1.7.1"]).await;
    println!("kube-rs agrees with the double");
    Ok(())
}

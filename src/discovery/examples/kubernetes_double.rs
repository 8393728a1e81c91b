//! A double of the Kubernetes API server as a program: one service whose endpoints standard
//! input sets.
//!
//! `cargo run -p tidegate-discovery --example kubernetes_double -- PORT`
//! listens on a free port of 127.0.0.1 and prints its address. Each line of standard input
//! has the addresses of all endpoints of the service `web` in the namespace `shop`, with PORT
//! as their port. An address with `-` before it terminates and still serves. Each address is
//! a pod. The double prints the version after each line, and serves until standard input
//! ends. Not for production: it is no API server.

use std::collections::HashMap;
use std::future::pending;
use std::io::{BufRead, Write};
use tidegate_discovery::testing::kubernetes::{EndpointDocument, KubernetesDouble, SliceDocument};
use tokio::runtime::Builder;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let port: u16 = std::env::args().nth(1).ok_or("usage: kubernetes_double PORT")?.parse()?;
    let runtime = Builder::new_current_thread().enable_all().build()?;
    let double = runtime.block_on(KubernetesDouble::start(None))?;
    std::thread::spawn(move || runtime.block_on(pending::<()>()));
    println!("listening at {}", double.address());
    let mut pods = HashMap::new();
    for line in std::io::stdin().lock().lines() {
        let line = line?;
        let endpoints = line.split_whitespace().map(|word| endpoint(word, &mut pods)).collect();
        let slice = SliceDocument::new("shop", "web", "web-1", endpoints);
        double.put(slice.with_port(port));
        println!("version {}", double.version());
        std::io::stdout().flush()?;
    }
    Ok(())
}

fn endpoint(word: &str, pods: &mut HashMap<String, u16>) -> EndpointDocument {
    let address = word.trim_start_matches('-').to_owned();
    let next = pods.len() as u16 + 1;
    let pod = *pods.entry(address.clone()).or_insert(next);
    let mut document = match word.starts_with('-') {
        true => EndpointDocument::terminating(pod),
        false => EndpointDocument::ready(pod),
    };
    document.addresses = vec![address];
    document
}

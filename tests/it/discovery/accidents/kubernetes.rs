//! Accidents of the Kubernetes double on a thread of its own.

use super::{Accident, MemberRegistry, number_of};
use crate::discovery::registries::write_secret;
use std::net::SocketAddr;
use std::path::PathBuf;
use tempfile::TempDir;
use tidegate_discovery::testing::kubernetes::{EndpointDocument, KubernetesThread, SliceDocument};

/// Status of answers while the server fails.
const FAILING: u16 = 500;

pub(super) struct KubernetesRegistry {
    server: KubernetesThread,
    dir: TempDir,
    /// The number of the last token.
    token: u32,
    /// The first announcement and the last one.
    announced: Option<(SliceDocument, SliceDocument)>,
}

// === impl KubernetesRegistry ===

impl KubernetesRegistry {
    pub(super) fn start() -> KubernetesRegistry {
        let dir = tempfile::tempdir().expect("temp dir");
        let mut registry = KubernetesRegistry {
            server: KubernetesThread::start(),
            dir,
            token: 0,
            announced: None,
        };
        registry.replace_token();
        registry.write_token();
        registry
    }

    fn token_file(&self) -> PathBuf {
        self.dir.path().join("token")
    }

    /// Accepts another token only.
    fn replace_token(&mut self) {
        self.token += 1;
        let token = format!("token-{}", self.token);
        self.server.double().script(|faults| faults.token = token);
    }

    fn write_token(&self) {
        write_secret(&self.token_file(), &format!("token-{}", self.token));
    }

    fn slice(members: &[SocketAddr]) -> SliceDocument {
        let port = members.first().map_or(80, SocketAddr::port);
        let endpoint = |member: &SocketAddr| {
            let mut endpoint = EndpointDocument::ready(number_of(*member));
            endpoint.addresses = vec![member.ip().to_string()];
            endpoint
        };
        let endpoints = members.iter().map(endpoint).collect();
        SliceDocument::new("shop", "web", "web-1", endpoints).with_port(port)
    }
}

impl MemberRegistry for KubernetesRegistry {
    fn name(&self) -> &'static str {
        "kubernetes"
    }

    fn tables(&self) -> String {
        format!(
            "[registry.kubernetes]\nkind = \"kubernetes\"\nservers = [\"{}\"]\ntimeout = \"2s\"\n\
             token_file = \"{}\"",
            self.server.double().address(),
            self.token_file().display()
        )
    }

    fn discover(&self, _: u16) -> String {
        "from = \"kubernetes\"\nservice = \"web\"\nnamespace = \"shop\"".to_owned()
    }

    fn accidents(&self) -> &'static [Accident] {
        &[
            Accident::Killed,
            Accident::Hung,
            Accident::SilentWatch,
            Accident::Compacted,
            Accident::HalfAnswer,
            Accident::Rotated,
            Accident::Forbidden,
            Accident::Failing,
            Accident::Missing,
            Accident::Restored,
            Accident::Emptied,
        ]
    }

    fn announce(&mut self, members: &[SocketAddr]) {
        let slice = KubernetesRegistry::slice(members);
        self.server.double().put(slice.clone());
        let first = self.announced.take().map_or(slice.clone(), |(first, _)| first);
        self.announced = Some((first, slice));
    }

    fn begin(&mut self, accident: Accident) {
        let double = self.server.double().clone();
        let (first, last) = self.announced.clone().expect("an announcement");
        match accident {
            Accident::Killed => self.server.kill(),
            Accident::Hung => self.server.pause(),
            Accident::SilentWatch => double.script(|faults| faults.silent = true),
            Accident::Compacted => {
                double.compact();
                double.close_watches();
            }
            // One for each process.
            Accident::HalfAnswer => {
                double.script(|faults| faults.half_events = 2);
                double.put(last);
            }
            Accident::Rotated => self.replace_token(),
            Accident::Forbidden => double.script(|faults| faults.forbidden = "shop".to_owned()),
            Accident::Failing => double.script(|faults| faults.refuse = [FAILING; 1000].into()),
            Accident::Missing => double.delete("shop", "web-1"),
            Accident::Restored => {
                double.restore(50);
                double.put(first);
            }
            Accident::Emptied => double.put(KubernetesRegistry::slice(&[])),
            _ => unreachable!("{accident:?} is not in the list"),
        }
        if matches!(accident, Accident::Rotated | Accident::Forbidden | Accident::Failing) {
            double.close_watches();
        }
    }

    fn end(&mut self, accident: Accident) {
        match accident {
            Accident::Killed => self.server.start_again(),
            Accident::Hung => self.server.resume(),
            Accident::Rotated => self.write_token(),
            _ => {}
        }
        self.server.double().script(|faults| {
            faults.silent = false;
            faults.half_events = 0;
            faults.forbidden.clear();
            faults.refuse.clear();
        });
    }
}

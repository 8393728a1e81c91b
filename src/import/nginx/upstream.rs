//! `upstream` blocks and the address of a `proxy_pass`: pools.
//!
//! Called by `server`.

use super::NginxTranslator;
use super::tree::NginxDirective;
use crate::draft::{DraftBackend, DraftKeys, DraftPool, UsedNames, quoted};
use crate::report::LineVerdict::{Approximated, NotPossible, NotUnderstood, Translated};
use crate::report::SourceLine;
use crate::times::{time, toml_time};

/// Default of `max_fails` and of `fail_timeout`.
const MAX_FAILS: u64 = 1;
const FAIL_TIMEOUT: u64 = 10_000;

/// Most failures that Tidegate counts, and its longest ejection.
const FAILURES_MAX: u64 = 1_000;

/// Settings of a server that are keys of the pool.
#[derive(Debug, Default)]
pub(super) struct PoolSettings {
    pub(super) keys: DraftKeys,
    pub(super) probe: DraftKeys,
}

impl<'t> NginxTranslator<'t> {
    /// Translates the target of a `proxy_pass` and returns the name of its pool. The same target
    /// with the same settings is one pool.
    pub(super) fn pool(
        &mut self,
        target: &str,
        at: SourceLine,
        settings: &PoolSettings,
    ) -> Option<String> {
        let identity =
            format!("{target} {:?} {:?}", values(&settings.keys), values(&settings.probe));
        if let Some(name) = self.pools.get(&identity) {
            return Some(name.clone());
        }
        if target.contains('$') {
            let why = "the backend is computed; write a route per backend";
            self.report.lose(at, NotPossible, why);
            return None;
        }
        let upstream = self.upstreams.get(target).copied();
        let mut pool = DraftPool {
            name: self.pool_names.take(upstream.map_or("backend", |_| target)),
            at: vec![upstream.map_or(at, |upstream| upstream.at)],
            keys: settings.keys.clone(),
            probe: settings.probe.clone(),
            ..Default::default()
        };
        match upstream {
            Some(upstream) => self.upstream(upstream, &mut pool),
            None => match address(target) {
                Ok(address) => pool.backends.push(DraftBackend {
                    name: UsedNames::default().take(target),
                    address,
                    at: vec![at],
                    ..Default::default()
                }),
                Err(why) => {
                    self.report.lose(at, NotPossible, why);
                    return None;
                }
            },
        }
        self.pools.insert(identity, pool.name.clone());
        let name = pool.name.clone();
        self.draft.pools.push(pool);
        Some(name)
    }

    fn upstream(&mut self, upstream: &'t NginxDirective, pool: &mut DraftPool) {
        let header = format!("[pool.{}]", pool.name);
        self.report.note(upstream.at, Translated, header);
        let mut names = UsedNames::default();
        let mut fails = Vec::new();
        for line in upstream.block.iter().flatten() {
            match &*line.words[0] {
                "server" => self.backend(line, pool, &mut names, &mut fails),
                "zone" => self.report.note(line.at, Translated, "all workers share counts"),
                "least_conn" | "hash" | "random" | "least_time" => self.balance(line, pool),
                "resolver" => self.resolver(line),
                _ => self.other(line),
            }
        }
        self.ejection(&fails, pool);
    }

    fn balance(&mut self, line: &NginxDirective, pool: &mut DraftPool) {
        let words: Vec<&str> = line.words.iter().map(String::as_str).collect();
        let (policy, verdict, why) = match words[..] {
            ["least_conn"] => ("least-connections", Translated, ""),
            ["random"] => ("random", Translated, ""),
            ["random", "two", ..] => ("two-choices", Translated, ""),
            ["hash", "$remote_addr" | "$binary_remote_addr", "consistent"] => {
                ("source-hash", Translated, "")
            }
            ["hash", "$remote_addr" | "$binary_remote_addr"] => (
                "source-hash",
                Approximated,
                ": a client can get another backend than before; a change moves few clients",
            ),
            ["least_time", ..] => ("peak-ewma", Approximated, ": by the time of connects"),
            _ => {
                return self.report.lose(
                    line.at,
                    NotPossible,
                    "Tidegate hashes the client's address only",
                );
            }
        };
        self.report.note(line.at, verdict, format!("balance = \"{policy}\"{why}"));
        pool.keys.set("balance", quoted(policy), &[line.at]);
    }

    fn backend(
        &mut self,
        line: &NginxDirective,
        pool: &mut DraftPool,
        names: &mut UsedNames,
        fails: &mut Vec<(u64, u64, SourceLine, bool)>,
    ) {
        let at = line.at;
        let address = match address(line.word(1)) {
            Ok(address) => address,
            Err(why) => return self.report.lose(at, NotPossible, why),
        };
        let name = names.take(line.word(1));
        let mut backend = DraftBackend { name, address, at: vec![at], ..Default::default() };
        let (mut max_fails, mut fail_timeout, mut given) = (MAX_FAILS, FAIL_TIMEOUT, false);
        let mut down = false;
        for word in line.words.get(2..).unwrap_or_default() {
            let (key, value) = word.split_once('=').unwrap_or((word, ""));
            let number = value.parse::<u64>();
            match (key, number) {
                ("weight", Ok(weight)) => {
                    backend.keys.set("weight", weight.clamp(1, 1_000).to_string(), &[at]);
                }
                ("max_conns", Ok(cap)) if cap > 0 => {
                    backend.keys.set("connections_max", cap.to_string(), &[at]);
                }
                ("max_conns", Ok(_)) => {}
                ("max_fails", Ok(number)) => (max_fails, given) = (number, true),
                ("fail_timeout", _) => match time(value, 1_000) {
                    Some(time) => (fail_timeout, given) = (time, true),
                    None => self.report.note(at, NotUnderstood, "fail_timeout is not a time"),
                },
                ("backup", _) => backend.keys.set("backup", "true", &[at]),
                ("down", _) => down = true,
                ("resolve", _) => {}
                ("service", _) => {
                    let host = backend.address.split(':').next().unwrap_or_default();
                    backend.address = format!("srv:_{value}._tcp.{host}");
                    let why = format!("address = \"{}\"", backend.address);
                    self.report.note(at, Approximated, why);
                }
                ("slow_start", _) => match time(value, 1_000).filter(|time| *time > 0) {
                    Some(time) => pool.keys.set("slow_start", toml_time(time), &[at]),
                    None => self.report.note(at, NotUnderstood, "slow_start is not a time"),
                },
                _ => {
                    let why = format!("the parameter {key} is not known");
                    self.report.note(at, NotUnderstood, why);
                }
            }
        }
        fails.push((max_fails, fail_timeout, at, given));
        if down && !self.can.enabled {
            let why = "it is down: left out; add it when it is needed";
            return self.report.note(at, Approximated, why);
        }
        if down {
            backend.keys.set("enabled", "false", &[at]);
        }
        let text = format!("pool.{}.backend {}", pool.name, backend.name);
        match pool.backends.iter_mut().find(|twin| twin.address == backend.address) {
            Some(twin) => {
                let weight = |keys: &DraftKeys| {
                    keys.get("weight").and_then(|w| w.parse::<u64>().ok()).unwrap_or(1)
                };
                let sum = (weight(&twin.keys) + weight(&backend.keys)).min(1_000);
                twin.keys.set("weight", sum.to_string(), &[at]);
                let why = format!("backend {} has the same address and gets its weight", twin.name);
                self.report.note(at, Approximated, why);
            }
            None => {
                self.report.note(at, Translated, text);
                pool.backends.push(backend);
            }
        }
    }

    /// `max_fails` and `fail_timeout` are the passive ejection of the pool.
    fn ejection(&mut self, fails: &[(u64, u64, SourceLine, bool)], pool: &mut DraftPool) {
        let Some((max_fails, fail_timeout, at, _)) =
            fails.iter().find(|one| one.3).or(fails.first())
        else {
            return;
        };
        let same = fails.iter().all(|one| (one.0, one.1) == (*max_fails, *fail_timeout));
        if *max_fails == 0 {
            pool.keys.set("ejection", "\"off\"", &[*at]);
        } else {
            let failures = (*max_fails).min(FAILURES_MAX).to_string();
            pool.ejection.set("failures", failures, &[*at]);
            let time = toml_time((*fail_timeout).clamp(1_000, 300_000));
            pool.ejection.set("time", time, &[*at]);
        }
        for (_, _, at, _) in fails.iter().filter(|one| one.3) {
            let why = match same {
                true => "ejection: failures in a row count, not those within fail_timeout",
                false => "ejection is for all backends of the pool",
            };
            self.report.note(*at, Approximated, why);
        }
    }
}

/// Returns the names and values, without their lines.
fn values(keys: &DraftKeys) -> Vec<(&'static str, &str)> {
    keys.0.iter().map(|key| (key.name, &*key.value)).collect()
}

/// Translates the address of a server.
fn address(text: &str) -> Result<String, String> {
    if text.starts_with("unix:") {
        return Ok(text.to_owned());
    }
    match text.rsplit_once(':') {
        Some((host, port)) if port.parse::<u16>().is_ok() && !host.is_empty() => {
            Ok(text.to_owned())
        }
        _ => Err("the port of the backend is missing".to_owned()),
    }
}

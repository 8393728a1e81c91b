//! The changes of the demo while clients are served: a reload and an upgrade.
//!
//! Run by `show`. Each prints its measurements and records failed checks.

use super::backends::DemoBackend;
use super::screen::OutputClosed;
use super::show::DemoScript;
use super::traffic::{LongLived, RATE};
use std::time::Duration;
use tidegate_net::clock;
use tokio::time::sleep;

/// Time for which requests are sent before and after a change.
const AROUND: Duration = Duration::from_millis(250);

// === impl DemoScript ===

impl DemoScript<'_> {
    /// Raises the weight of the last backend while clients are served.
    pub(crate) async fn reload(&self) -> Result<(), OutputClosed> {
        let mut backends: Vec<DemoBackend> = self.backends.all().to_vec();
        let Some(last) = backends.last_mut() else { return Ok(()) };
        last.weight += 1;
        let (name, weight) = (last.name.clone(), last.weight);
        let title = format!("The configuration changes under load: {name} gets weight {weight}");
        self.line("")?;
        self.line(&title)?;
        self.screen.now(&title);
        let before = self.seen().await;
        let traffic = self.traffic(RATE);
        sleep(AROUND).await;
        let began = clock::now();
        let ports = [self.balancer.frontend, self.balancer.admin];
        let asked = match self.place.write_config(ports, &backends) {
            Ok(()) => self.balancer.reload().await,
            Err(error) => Err(error.to_string()),
        };
        let in_force = self
            .until(|seen| {
                let backend = seen.backend(&name);
                seen.generation > before.generation
                    && backend.is_some_and(|it| it.effective == u64::from(weight))
            })
            .await;
        let took = (clock::now() - began).as_millis();
        sleep(AROUND).await;
        let tally = traffic.finish(1).await;
        let (total, failed) = (tally.total(), tally.failed);
        match (asked, in_force) {
            (Ok(()), Some(seen)) => {
                let generation = seen.generation;
                self.say(&format!("generation {generation} is in effect after {took} ms"))?;
            }
            (Err(why), _) => self.broken(format!("reload failed: {why}")),
            (Ok(()), None) => self.broken("the changed weight did not take effect".to_owned()),
        }
        self.say(&format!("{total} requests before and after, {failed} failed"))?;
        self.sum_up(&format!("reload: {failed} of {total} requests failed"));
        if failed > 0 {
            self.broken(format!("{failed} requests failed around the reload"));
        }
        self.split("With the new weight", self.phase / 2).await
    }

    /// Replaces the process while clients are served.
    pub(crate) async fn upgrade(&self, long: &LongLived) -> Result<(), OutputClosed> {
        let title = "The binary is upgraded in place, to itself";
        self.line("")?;
        self.line(title)?;
        self.screen.now(title);
        let open = || long.connections().iter().filter(|one| one.broken.is_none()).count();
        let (before, traffic) = (open(), self.traffic(RATE));
        sleep(AROUND).await;
        let began = clock::now();
        let upgraded = self.balancer.upgrade().await;
        let took = (clock::now() - began).as_millis();
        // In this time each long-lived connection makes an exchange.
        sleep(AROUND * 2).await;
        let tally = traffic.finish(1).await;
        let (total, failed, left) = (tally.total(), tally.failed, open());
        match upgraded {
            Ok(pid) => self.say(&format!("process {pid} serves after {took} ms"))?,
            Err(why) => self.broken(format!("upgrade failed: {why}")),
        }
        self.say(&format!("{total} requests before and after, {failed} failed"))?;
        self.say(&format!("{left} of {before} long-lived connections are open"))?;
        self.sum_up(&format!(
            "upgrade: {failed} of {total} requests failed, {} of {before} connections ended",
            before - left
        ));
        if failed > 0 {
            self.broken(format!("{failed} requests failed around the upgrade"));
        }
        if left < before {
            self.broken(format!("{} connections ended with the upgrade", before - left));
        }
        Ok(())
    }
}

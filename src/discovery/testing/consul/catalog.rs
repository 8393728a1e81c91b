//! What the double knows: nodes, services, checks and the indexes of each service.
//!
//! [`super::agent`] and [`super::checks`] change it, [`super::health`] reads it. Every
//! change that an answer can show raises the index of its service, and a change that
//! repeats the present state raises none. Nothing here does I/O.

use super::documents::{
    DoubleAnswer, DoubleCheck, DoubleNode, DoubleService, DoubleStatus, ServiceKey,
};
use std::collections::BTreeMap;

/// State of a whole cluster with one agent.
#[derive(Debug)]
pub(super) struct DoubleCatalog {
    nodes: BTreeMap<String, DoubleNode>,
    services: BTreeMap<ServiceKey, DoubleService>,
    /// By service and check id. Checks of a node have an empty service id.
    checks: BTreeMap<(ServiceKey, String), DoubleCheck>,
    /// By name of the service.
    indexes: BTreeMap<String, u64>,
    /// The index at which a service lost its last instance.
    extinction: u64,
    index: u64,
}

/// Name of the agent's node.
pub(super) const AGENT: &str = "double";

// === impl DoubleCatalog ===

impl DoubleCatalog {
    /// An empty catalog whose first change gets an index above `index`.
    pub(super) fn new(index: u64) -> DoubleCatalog {
        let index = index.max(1);
        let node = DoubleNode::new(AGENT, "127.0.0.1", index);
        let mut catalog = DoubleCatalog {
            nodes: BTreeMap::from([(AGENT.to_owned(), node)]),
            services: BTreeMap::new(),
            checks: BTreeMap::new(),
            indexes: BTreeMap::new(),
            extinction: index,
            index,
        };
        let serf = DoubleCheck::of_node(AGENT, "serfHealth", "Serf Health Status", "passing");
        catalog.put_check(serf);
        catalog
    }

    /// Makes all indexes small again, as the restore of an old snapshot does.
    pub(super) fn restart_indexes(&mut self, index: u64) {
        self.index = index.max(1);
        self.extinction = self.index;
        self.indexes.values_mut().for_each(|own| *own = self.index);
    }

    pub(super) fn put_node(&mut self, name: &str, address: &str) {
        let known = self.nodes.get(name);
        if known.is_none_or(|node| !address.is_empty() && node.address != address) {
            let node = DoubleNode::new(name, address, self.index + 1);
            self.nodes.insert(name.to_owned(), node);
            self.touch_node(name);
        }
    }

    pub(super) fn put_service(&mut self, service: DoubleService) {
        let key = service.key();
        let known = self.services.get(&key);
        if known.is_some_and(|known| known.same(&service)) {
            return;
        }
        let old_name = known.map(|known| known.service.clone());
        let name = service.service.clone();
        self.services.insert(key, service);
        self.touch(&name);
        if let Some(old) = old_name.filter(|old| *old != name) {
            self.touch(&old);
        }
    }

    /// A change of the output alone raises no index: agents report it minutes later.
    pub(super) fn put_check(&mut self, check: DoubleCheck) {
        let key = (check.service_key(), check.check_id.clone());
        let same = self.checks.get(&key).is_some_and(|known| known.status == check.status);
        self.checks.insert(key.clone(), check);
        if !same {
            self.touch_key(&key.0);
        }
    }

    pub(super) fn set_status(&mut self, id: &str, status: DoubleStatus, output: &str) -> bool {
        let Some(mut check) = self.check(id).cloned() else { return false };
        check.status = status;
        output.clone_into(&mut check.output);
        self.put_check(check);
        true
    }

    /// A check of the agent.
    pub(super) fn check(&self, id: &str) -> Option<&DoubleCheck> {
        self.checks.values().find(|check| check.check_id == id && check.node == AGENT)
    }

    pub(super) fn checks(&self) -> impl Iterator<Item = &DoubleCheck> {
        self.checks.values()
    }

    pub(super) fn service(&self, key: &ServiceKey) -> Option<&DoubleService> {
        self.services.get(key)
    }

    pub(super) fn services(&self) -> impl Iterator<Item = &DoubleService> {
        self.services.values()
    }

    /// Removes a service and its checks.
    pub(super) fn remove_service(&mut self, key: &ServiceKey) -> bool {
        let Some(service) = self.services.remove(key) else { return false };
        self.checks.retain(|(of, _), _| of != key);
        self.touch(&service.service);
        if !self.services.values().any(|other| other.service == service.service) {
            self.indexes.remove(&service.service);
            self.extinction = self.index;
        }
        true
    }

    pub(super) fn remove_check(&mut self, key: &ServiceKey, id: &str) {
        if self.checks.remove(&(key.clone(), id.to_owned())).is_some() {
            self.touch_key(key);
        }
    }

    /// Removes the checks of a service that are not in `kept`.
    pub(super) fn keep_checks(&mut self, key: &ServiceKey, kept: &[String]) {
        let of_service = self.checks.keys().filter(|(of, _)| of == key);
        let gone: Vec<String> =
            of_service.map(|(_, id)| id.clone()).filter(|id| !kept.contains(id)).collect();
        gone.iter().for_each(|id| self.remove_check(key, id));
    }

    /// The index of a service; never 0.
    pub(super) fn index_of(&self, service: &str) -> u64 {
        self.indexes.get(service).copied().unwrap_or(self.extinction)
    }

    /// Instances with all of these tags, in the order of node and id.
    pub(super) fn instances(
        &self,
        service: &str,
        tags: &[&str],
        passing: bool,
    ) -> Vec<DoubleAnswer<'_>> {
        let has_tags = |found: &&DoubleService| {
            found.service == service && tags.iter().all(|tag| found.has_tag(tag))
        };
        let answers = self.services.values().filter(has_tags).filter_map(|found| {
            let node = self.nodes.get(&found.node)?;
            Some(DoubleAnswer { node, service: found, checks: self.checks_of(found) })
        });
        answers.filter(|answer| !passing || answer.is_passing()).collect()
    }

    /// The checks of a service and of its node.
    fn checks_of(&self, service: &DoubleService) -> Vec<&DoubleCheck> {
        let of = |key: ServiceKey| {
            let range = (key.clone(), String::new())..;
            self.checks.range(range).take_while(move |((of, _), _)| *of == key)
        };
        let node = of((service.node.clone(), String::new()));
        of(service.key()).chain(node).map(|(_, check)| check).collect()
    }

    fn touch_key(&mut self, key: &ServiceKey) {
        match self.services.get(key) {
            Some(service) => self.touch(&service.service.clone()),
            None if key.1.is_empty() => self.touch_node(&key.0.clone()),
            None => {}
        }
    }

    fn touch_node(&mut self, node: &str) {
        self.index += 1;
        for service in self.services.values().filter(|service| service.node == node) {
            self.indexes.insert(service.service.clone(), self.index);
        }
    }

    fn touch(&mut self, service: &str) {
        self.index += 1;
        self.indexes.insert(service.to_owned(), self.index);
    }
}

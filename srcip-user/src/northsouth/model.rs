//! What this node's data plane shall do, given the cluster's objects. A pure function.
//!
//! - `frontends`: which address and port is whose. `endpoints`: what stands behind a port, and where.
//!
//! What it takes for an endpoint and for an address of a Service is what kube-proxy takes: whoever moves a
//! Service from one to the other sees no difference but the client's address.

mod endpoints;
mod frontends;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::Arc,
};

use serde::Serialize;

use super::{
    desired::{Desired, NodeAddress, ReturnPath, ServiceName, ServicePort},
    objects::{ObjectName, Objects, Problem, service::ServiceInfo, slice::SliceInfo},
};
use crate::routing::Device;
use endpoints::Map;
use frontends::Owners;

/// Ports of Services on a node. Kubernetes is tested with 10,000 Services.
pub const MAX_SERVICE_PORTS: usize = 32_768;

/// What a node is to the cluster's objects.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Here {
    /// Its name, as Node objects and slices have it.
    pub node: Arc<str>,
    /// Addresses it has beyond those that its Node object names, the preferred ones first.
    pub addresses: Vec<IpAddr>,
    /// The devices by which traffic enters.
    pub uplinks: Vec<Device>,
    /// The way of the answers of endpoints elsewhere.
    pub return_path: ReturnPath,
}

/// Where a load balancer asks whether to send a Service's traffic to this node.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct HealthCheck {
    /// The Service.
    pub service: ObjectName,
    /// Pods of this node that are ready.
    pub local_endpoints: usize,
}

/// What is to be done.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Plan {
    /// By the data plane.
    pub desired: Desired,
    /// By the health check servers, by port.
    pub health_checks: BTreeMap<u16, HealthCheck>,
    /// What Services ask for that cannot be done, or is done otherwise than somebody may think.
    pub problems: BTreeMap<ObjectName, Vec<Problem>>,
}

impl Plan {
    fn problem(&mut self, service: &ObjectName, problem: Problem) {
        let problems = self.problems.entry(service.clone()).or_default();
        // A port of a node is the same to its owner at each of the node's addresses.
        if !problems.contains(&problem) {
            problems.push(problem);
        }
    }
}

/// What this node is to do.
pub fn plan(objects: &Objects, here: &Here) -> Plan {
    let mut plan = Plan::default();
    let map = Map::new(objects, here);
    plan.desired.uplinks.clone_from(&here.uplinks);
    plan.desired.own = map.own().map(NodeAddress).collect();
    plan.desired.nodes = map.nodes().map(NodeAddress).collect();

    let mut services = Vec::new();
    for (name, service) in &objects.services {
        match service {
            Ok(service) => services.push(service),
            Err(refused) => plan.problem(name, refused.problem.clone()),
        }
    }
    // Of two that want the same, the older one has it: a new Service takes nothing away from others.
    services.sort_by_key(|service| (service.created.is_none(), service.created, &service.name));

    let slices = by_service(objects);
    let mut owners = Owners::new(map.nodes().collect());
    for service in services {
        let slices = slices.get(&service.name).map(Vec::as_slice).unwrap_or_default();
        add(&mut plan, &mut owners, &map, service, slices, here.return_path);
    }
    plan
}

fn by_service(objects: &Objects) -> BTreeMap<&ObjectName, Vec<&SliceInfo>> {
    let mut by_service = BTreeMap::<_, Vec<&SliceInfo>>::new();
    for slice in objects.slices.values() {
        by_service.entry(&slice.service).or_default().push(slice);
    }
    by_service
}

fn add<'a>(
    plan: &mut Plan,
    owners: &mut Owners<'a>,
    map: &Map<'_>,
    service: &'a ServiceInfo,
    slices: &[&SliceInfo],
    return_path: ReturnPath,
) {
    let mut problems = service.warnings.clone();
    let mut names = BTreeSet::new();
    for port in &service.ports {
        let (frontends, taken) = owners.claim(service, port);
        // Of others' Services, only what they occupy matters.
        if !service.is_selected {
            continue;
        }
        problems.extend(taken);
        if frontends.is_empty() {
            continue;
        }
        let endpoints = match map.endpoints(slices, port, service.policy) {
            Ok((endpoints, unreachable)) => {
                problems.extend(unreachable);
                endpoints
            }
            Err(problem) => {
                problems.push(problem);
                continue;
            }
        };
        // Without a name, a port is known by its number.
        let text = match &*port.name {
            "" => format!("{}:{}", service.name, port.port),
            name => format!("{}:{name}", service.name),
        };
        let Some(name) = ServiceName::new(text).filter(|name| names.insert(name.clone())) else {
            problems.push(Problem::new(
                "InvalidService",
                format!("port {} is left to others: its name is too long, or another port has it", port.port),
            ));
            continue;
        };
        if plan.desired.services.len() >= MAX_SERVICE_PORTS {
            let note = format!(
                "port {} is left to others: this node handles {MAX_SERVICE_PORTS} already, those of older Services",
                port.port
            );
            problems.push(Problem::new("TooMany", note));
            continue;
        }
        let wanted = ServicePort {
            name: name.clone(),
            frontends,
            policy: service.policy,
            affinity: service.affinity,
            source_ranges: service.source_ranges.clone(),
            endpoints,
            return_path,
        };
        plan.desired.services.insert(name, wanted);
    }
    if service.is_selected
        && let Some(port) = service.health_check
    {
        problems.extend(add_health_check(plan, map, service, port.get(), slices));
    }
    for problem in problems.into_iter().filter(|_| service.is_selected) {
        plan.problem(&service.name, problem);
    }
}

fn add_health_check(
    plan: &mut Plan,
    map: &Map<'_>,
    service: &ServiceInfo,
    port: u16,
    slices: &[&SliceInfo],
) -> Option<Problem> {
    if let Some(other) = plan.health_checks.get(&port) {
        let note = format!("its healthCheckNodePort {port} is that of {}, which is older", other.service);
        return Some(Problem::new("Conflict", note));
    }
    let local_endpoints = map.local_ready(slices);
    plan.health_checks.insert(port, HealthCheck { service: service.name.clone(), local_endpoints });
    None
}

#[cfg(test)]
mod tests;

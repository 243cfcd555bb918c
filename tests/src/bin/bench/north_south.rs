//! What north-south gains: new connections per second and their 99th percentile by way of a node that has srcip
//! beside kube-proxy's iptables rules, against one that has the rules alone, with as many Services.
//!
//! Two clusters of each kind are there all the time. The three nodes of one have 1, 1,000 and 10,000 Services; the one
//! that is measured is in the middle of them, with its pod on the node that the client comes in by. The nodes of the
//! other have one Service, with its pod on another node than that.

use std::{
    fmt,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use srcip_tests::{
    Family,
    cluster::{
        Cluster, balancer, kube_proxy,
        node::{Node, PodNetwork},
        service::Service,
    },
    peer::{self, APPLICATION_PORT, Hammered},
    process::Process,
};
use srcip_user::{
    northsouth::{
        Programmer as _,
        dataplane::NorthSouth,
        desired::{
            Desired, Endpoint, EndpointAddress, EndpointState, Frontend, FrontendAddress, NodeAddress, Place,
            Protocol, ReturnPath, ServiceName, ServicePort, TrafficPolicy,
        },
    },
    routing,
};

use crate::{Arguments, quantile};

/// How many Services each node has.
const SERVICES: [u16; 3] = [1, 1_000, 10_000];
/// The first of their ports at the load balancer's address.
const FIRST_PORT: u16 = 10_000;
/// The first of their NodePorts.
const FIRST_NODE_PORT: u16 = 30_000;

/// What is measured.
#[derive(Clone, Copy, Debug)]
struct Case {
    family: Family,
    /// By which of the nodes, counted from 0.
    node: usize,
    /// The pod is on another one.
    elsewhere: bool,
}

impl Case {
    fn all() -> impl Iterator<Item = Self> {
        Family::BOTH.into_iter().flat_map(|family| {
            let here = (0..SERVICES.len()).map(move |node| Self { family, node, elsewhere: false });
            here.chain([Self { family, node: 0, elsewhere: true }])
        })
    }

    /// The same with one Service, if this one has more.
    fn with_one(self) -> Option<usize> {
        let is_one = |case: &Self| case.family == self.family && case.node == 0 && !case.elsewhere;
        (self.node > 0).then(|| Self::all().position(|case| is_one(&case))).flatten()
    }
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let family = if self.family == Family::V4 { "IPv4" } else { "IPv6" };
        let place = if self.elsewhere { ", pod on another node" } else { "" };
        write!(f, "{family}, Services: {}{place}", SERVICES[self.node])
    }
}

/// A cluster, with or without srcip. Dropped in this order.
struct Site {
    _applications: Vec<Process>,
    /// The Service that is measured, by node.
    measured: Vec<Service>,
    /// Removes itself with the cluster's file system.
    _programmers: Vec<NorthSouth>,
    cluster: Cluster,
}

impl Site {
    fn new(with_srcip: bool, elsewhere: bool) -> Result<Self> {
        let mut cluster = Cluster::new(PodNetwork::PointToPoint)?;
        let (mut applications, mut all) = (Vec::new(), Vec::<Vec<Service>>::new());
        for (number, count) in (1..).zip(SERVICES) {
            let pod = cluster.pod(number, "echo")?;
            applications.push(peer::echo(&pod, &[&format!("[::]:{APPLICATION_PORT}")])?);
            let service = |i: u16| {
                let service =
                    Service::new(&format!("service-{i}")).ports(FIRST_PORT + i, FIRST_NODE_PORT + i, 0);
                service.endpoint(number, &pod, APPLICATION_PORT)
            };
            all.push((0..count).map(service).collect());
        }
        if elsewhere {
            // That of the second node, for all.
            all = vec![vec![all[1][0].clone()]; SERVICES.len()];
        }
        let (mut measured, mut programmers) = (Vec::new(), Vec::new());
        for (node, services) in cluster.nodes.iter().zip(&all) {
            kube_proxy::install_on(node, &services.iter().collect::<Vec<_>>())?;
            if with_srcip {
                let pins = cluster.world.directory().join(format!("bpf/n{}", node.number));
                let mut programmer = NorthSouth::open(&pins)?;
                let start = Instant::now();
                program(&cluster, node, services, &mut programmer)?;
                let (count, took) = (services.len(), start.elapsed().as_secs_f64());
                eprintln!("srcip: {count} Services of both families are programmed after {took:.2} s");
                programmers.push(programmer);
            }
            measured.push(services[services.len() / 2].clone());
        }
        Ok(Self { _applications: applications, measured, _programmers: programmers, cluster })
    }
}

/// One of the two that are compared.
struct Contestant {
    here: Site,
    elsewhere: Site,
}

impl Contestant {
    fn new(with_srcip: bool) -> Result<Self> {
        Ok(Self { here: Site::new(with_srcip, false)?, elsewhere: Site::new(with_srcip, true)? })
    }

    /// New connections by way of one node, for a while.
    fn measure(&self, case: Case, arguments: &Arguments) -> Result<Hammered> {
        let Site { cluster, measured, .. } = if case.elsewhere { &self.elsewhere } else { &self.here };
        balancer::route(cluster, &[cluster.nodes[case.node].number])?;
        let time = Duration::from_millis(arguments.milliseconds);
        peer::hammer(&cluster.client, measured[case.node].dialled(case.family), arguments.threads, time)
    }
}

/// Has srcip handle the same Services on a node.
fn program(cluster: &Cluster, node: &Node, services: &[Service], programmer: &mut NorthSouth) -> Result<()> {
    let devices = node.host.netns().run(routing::devices)??;
    let addresses = |node: &Node| Family::BOTH.map(|family| NodeAddress(node.host.address(family)));
    let port = |service: &Service| -> Result<ServicePort> {
        let frontend =
            |address, port, restricted| Frontend { address, port, protocol: Protocol::Tcp, restricted };
        let mut frontends = Family::BOTH
            .map(|family| frontend(FrontendAddress(service.dialled(family).ip()), service.port, true))
            .to_vec();
        for any_node in [FrontendAddress::ANY_NODE_V4, FrontendAddress::ANY_NODE_V6] {
            frontends.push(frontend(any_node, service.node_port, false));
        }
        let endpoints = service.endpoints.iter().flat_map(|endpoint| {
            endpoint.addresses.iter().map(|address| {
                let family = if address.is_ipv4() { Family::V4 } else { Family::V6 };
                let place = if endpoint.node == node.number {
                    Place::Local
                } else {
                    Place::Remote(NodeAddress(cluster.node(endpoint.node).host.address(family)))
                };
                let (address, port) = (EndpointAddress(address.ip()), address.port());
                Endpoint { address, port, state: EndpointState::Ready, place }
            })
        });
        Ok(ServicePort {
            name: ServiceName::new(format!("shop/{}:main", service.name)).context("a name that fits")?,
            frontends,
            policy: TrafficPolicy::Cluster,
            affinity: None,
            source_ranges: Vec::new(),
            endpoints: endpoints.collect(),
            return_path: ReturnPath::Direct,
        })
    };
    let services = services.iter().map(|service| port(service).map(|port| (port.name.clone(), port)));
    let desired = Desired {
        services: services.collect::<Result<_>>()?,
        nodes: cluster.nodes.iter().flat_map(addresses).collect(),
        own: addresses(node).to_vec(),
        uplinks: devices.into_iter().filter(|device| device.name == "eth0").collect(),
    };
    let changes = node.host.netns().run(|| programmer.apply(&desired))??;
    ensure!(changes.problems.is_empty(), "srcip has not programmed it all: {:?}", changes.problems);
    Ok(())
}

/// All rounds of one contestant in one case.
#[derive(Clone, Debug, Default)]
struct Results {
    /// New connections per second.
    rates: Vec<f64>,
    /// Microseconds within which 99 of 100 connections had been greeted.
    p99: Vec<f64>,
}

/// Measures all.
pub fn run(arguments: &Arguments) -> Result<()> {
    let contestants = [false, true].map(Contestant::new);
    let contestants = contestants.into_iter().collect::<Result<Vec<_>>>()?;
    let cases: Vec<_> = Case::all().collect();
    let all: Vec<_> = (0..cases.len()).flat_map(|case| [(0, case), (1, case)]).collect();
    for &(contestant, case) in &all {
        contestants[contestant].measure(cases[case], arguments).context("warming up")?;
    }
    let mut results = vec![vec![Results::default(); cases.len()]; contestants.len()];
    for round in 0..arguments.rounds {
        // Another one begins each time: none always has the machine that another has warmed up.
        for i in (0..all.len()).map(|i| (i + round) % all.len()) {
            let (contestant, case) = all[i];
            let hammered = contestants[contestant].measure(cases[case], arguments)?;
            let results = &mut results[contestant][case];
            results.rates.push(hammered.count as f64 * 1000.0 / arguments.milliseconds as f64);
            results.p99.push(hammered.p99.as_secs_f64() * 1e6);
        }
        eprintln!("{}/{}", round + 1, arguments.rounds);
    }
    report(&cases, &results[0], &results[1], arguments.at_least)
}

fn report(cases: &[Case], iptables: &[Results], srcip: &[Results], at_least: Option<f64>) -> Result<()> {
    let median = |values: &[f64]| quantile(&mut values.to_vec(), 0.5);
    let mut too_slow = Vec::new();
    for ((case, iptables), srcip) in cases.iter().zip(iptables).zip(srcip) {
        let rates = compare(&srcip.rates, &iptables.rates);
        println!(
            "{case}: srcip / iptables: {} ({:.0} and {:.0} connections/s); p99 {} ({:.0} and {:.0} us)",
            shown(&rates),
            median(&srcip.rates),
            median(&iptables.rates),
            shown(&compare(&srcip.p99, &iptables.p99)),
            median(&srcip.p99),
            median(&iptables.p99),
        );
        if at_least.is_some_and(|least| median(&rates) < least) {
            too_slow.push(format!("{case}: {:.3}", median(&rates)));
        }
    }
    for (name, results) in [("srcip", srcip), ("iptables", iptables)] {
        for (case, many) in cases.iter().zip(results) {
            if let Some(one) = case.with_one() {
                println!("{case} / 1: {name}: {}", shown(&compare(&many.rates, &results[one].rates)));
            }
        }
    }
    ensure!(too_slow.is_empty(), "slower than --at-least: {}", too_slow.join("; "));
    Ok(())
}

/// One ratio for each round.
fn compare(own: &[f64], other: &[f64]) -> Vec<f64> {
    own.iter().zip(other).map(|(own, other)| own / other).collect()
}

/// Median, and the middle half.
fn shown(ratios: &[f64]) -> String {
    let [low, median, high] = [0.25, 0.5, 0.75].map(|q| quantile(&mut ratios.to_vec(), q));
    format!("{median:.3} [{low:.3}, {high:.3}]")
}

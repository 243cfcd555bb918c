//! Pods move and end, agents die: connections to pods that live go on.

use std::{
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    time::Duration,
};

use srcip_tests::{
    Family, client,
    cluster::{
        Cluster,
        agent::Agents,
        balancer, kube_proxy,
        node::PodNetwork,
        service::{Service, State},
    },
    load::Load,
    peer::{self, APPLICATION_PORT},
};

use super::NorthSouth;

/// A connection to a Service of echoing pods, which is used again and again.
pub(super) struct Conversation {
    pub(super) stream: TcpStream,
    /// Where it ended up.
    pub(super) pod: std::net::IpAddr,
}

impl Conversation {
    pub(super) fn open(cluster: &Cluster, service: &Service, family: Family) -> Self {
        let mut stream = client::connect(&cluster.client, service.dialled(family)).unwrap();
        let mut greeting = Vec::new();
        let mut byte = [0];
        while byte != *b"\n" {
            stream.read_exact(&mut byte).unwrap();
            greeting.push(byte[0]);
        }
        let text = String::from_utf8(greeting).unwrap();
        let mut words = text.split_whitespace().map(|word| word.parse::<SocketAddr>().unwrap());
        let (peer, local) = (words.next().unwrap(), words.next().unwrap());
        assert_eq!(peer.ip().to_canonical(), cluster.client.address(family));
        Self { stream, pod: local.ip().to_canonical() }
    }

    /// Something goes there and comes back.
    pub(super) fn assert_alive(&mut self) {
        self.stream.write_all(b"still there?").unwrap();
        let mut answer = [0; 12];
        self.stream.read_exact(&mut answer).unwrap();
        assert_eq!(&answer, b"still there?");
    }
}

#[test]
fn connections_stay_with_a_pod_that_drains_and_new_ones_go_elsewhere() {
    let mut cluster = Cluster::new(PodNetwork::PointToPoint).unwrap();
    let pods = [(1, "a"), (2, "b")].map(|(node, role)| (node, cluster.pod(node, role).unwrap()));
    let _applications = pods.each_ref().map(|(_, pod)| peer::echo(pod, &["[::]:8000"]).unwrap());
    let mut service = Service::new("web");
    for (node, pod) in &pods {
        service = service.endpoint(*node, pod, APPLICATION_PORT);
    }
    kube_proxy::install(&cluster, &[&service]).unwrap();
    let mut agents = Agents::start(&cluster, &[&service], "").unwrap();
    balancer::route(&cluster, &[3]).unwrap();
    let mut open: Vec<_> = Family::BOTH
        .into_iter()
        // Chance leaves one of two out in one of 2^39 runs.
        .flat_map(|family| (0..20).map(move |_| family))
        .map(|family| Conversation::open(&cluster, &service, family))
        .collect();
    let drained = Family::BOTH.map(|family| pods[0].1.address(family));
    assert!(open.iter().any(|conversation| drained.contains(&conversation.pod)));

    service.endpoints[0].state = State::Draining;
    agents.update(&cluster, &[&service]).unwrap();
    open.iter_mut().for_each(Conversation::assert_alive);
    for family in Family::BOTH {
        for _ in 0..10 {
            assert_eq!(Conversation::open(&cluster, &service, family).pod, pods[1].1.address(family));
        }
    }
    // It is gone from the slices, but still there.
    service.endpoints.remove(0);
    agents.update(&cluster, &[&service]).unwrap();
    open.iter_mut().for_each(Conversation::assert_alive);
}

#[test]
fn an_agent_that_is_killed_and_started_again_is_not_noticed() {
    let mut test = NorthSouth::new(PodNetwork::Bridge, &[1, 2], |service| service);
    balancer::route(&test.cluster, &[3]).unwrap();
    let load = Load::start(&test.cluster.client, test.service.dialled(Family::V4), 2).unwrap();
    for node in [3, 1, 2, 3] {
        load.wait_for(30);
        test.agents.kill_and_restart(&test.cluster, node).unwrap();
    }
    load.wait_for(30);
    let report = load.stop().unwrap();
    assert_eq!((&report.failures[..], report.lost), (&[][..], 0), "{report:?}");
}

#[test]
fn what_is_programmed_stays_without_an_agent() {
    let mut test = NorthSouth::new(PodNetwork::PointToPoint, &[2], |service| service);
    for node in 1..=3 {
        test.agents.stop(node).unwrap();
    }
    for family in Family::BOTH {
        for node in 1..=3 {
            test.assert_kept_by(node, family);
        }
    }
}

#[test]
fn new_connections_follow_a_gateway_that_moves_and_fail_only_while_there_is_none() {
    let mut test = NorthSouth::new(PodNetwork::PointToPoint, &[1, 3], |service| service);
    test.update(|service| service.endpoints[1].state = State::Down);
    assert_eq!(test.assert_kept_by(2, Family::V4), test.pods[0].address(Family::V4));
    balancer::route(&test.cluster, &[2]).unwrap();
    let load = Load::start(&test.cluster.client, test.service.dialled(Family::V4), 2).unwrap();
    load.wait_for(30);
    // The new one is ready before the old one goes.
    test.update(|service| service.endpoints[1].state = State::Ready);
    test.update(|service| service.endpoints[0].state = State::Draining);
    load.wait_for(30);
    test.kill(0);
    load.wait_for(30);
    let report = load.stop().unwrap();
    assert_eq!((&report.failures[..], report.lost), (&[][..], 0), "{report:?}");
    assert_eq!(test.assert_kept_by(2, Family::V4), test.pods[1].address(Family::V4));
}

/// A pod is killed, and a node is gone from one moment to the next: whoever talks to another pod does not notice, and
/// new connections fail only until the cluster knows.
#[test]
fn a_pod_that_is_killed_and_a_node_that_is_lost_take_nobody_along() {
    let mut cluster = Cluster::new(PodNetwork::PointToPoint).unwrap();
    let pods = [1, 2, 3].map(|node| (node, cluster.pod(node, "echo").unwrap()));
    let mut applications = pods.each_ref().map(|(_, pod)| peer::echo(pod, &["[::]:8000"]).unwrap());
    let mut service = Service::new("web");
    for (node, pod) in &pods {
        service = service.endpoint(*node, pod, APPLICATION_PORT);
    }
    let mut agents = Agents::start(&cluster, &[&service], "").unwrap();
    balancer::route(&cluster, &[1]).unwrap();
    let mut open: Vec<_> = Family::BOTH
        .into_iter()
        // Chance leaves one of three out in less than one of 10^9 runs.
        .flat_map(|family| (0..30).map(move |_| family))
        .map(|family| Conversation::open(&cluster, &service, family))
        .collect();
    let is_of = |conversation: &Conversation, index: usize| {
        Family::BOTH.iter().any(|family| pods[index].1.address(*family) == conversation.pod)
    };
    for (index, (node, _)) in pods.iter().enumerate() {
        assert!(open.iter().any(|conversation| is_of(conversation, index)), "none to node {node}");
    }
    let only_living = |open: &mut Vec<Conversation>, dead: usize| {
        open.retain(|conversation| !is_of(conversation, dead));
        open.iter_mut().for_each(Conversation::assert_alive);
    };

    applications[1].kill();
    only_living(&mut open, 1);
    service.endpoints[1].state = State::Down;
    agents.update(&cluster, &[&service]).unwrap();
    let reach_others = |service: &Service| {
        for family in Family::BOTH {
            for _ in 0..10 {
                assert_ne!(Conversation::open(&cluster, service, family).pod, pods[1].1.address(family));
            }
        }
    };
    reach_others(&service);
    only_living(&mut open, 1);

    // Node 3 is unplugged.
    cluster.node(3).host.ip("link set eth0 down").unwrap();
    only_living(&mut open, 2);
    service.endpoints[2].state = State::Down;
    agents.update(&cluster, &[&service]).unwrap();
    reach_others(&service);
    only_living(&mut open, 2);

    // Nobody is left: a new connection fails, and as soon as there is a pod again it does not.
    applications[0].kill();
    service.endpoints[0].state = State::Down;
    agents.update(&cluster, &[&service]).unwrap();
    client::connect_in_vain(&cluster.client, None, service.dialled(Family::V4)).unwrap();
    let _again = peer::echo(&pods[1].1, &["[::]:8000"]).unwrap();
    service.endpoints[1].state = State::Ready;
    agents.update(&cluster, &[&service]).unwrap();
    assert_eq!(Conversation::open(&cluster, &service, Family::V4).pod, pods[1].1.address(Family::V4));
}

/// A Service goes back to kube-proxy, and a client comes again from a port that had a connection to the same pod: the
/// answers are nobody's but kube-proxy's, and so is what follows them.
#[test]
fn what_was_handled_once_is_forgotten_with_the_service() {
    for network in PodNetwork::ALL {
        let mut test = NorthSouth::new(network, &[1], Service::local);
        balancer::route(&test.cluster, &[1]).unwrap();
        let froms = Family::BOTH.map(|family| SocketAddr::new(test.cluster.client.address(family), 22_000));
        let ask_from = |test: &NorthSouth, family: Family, from: SocketAddr| {
            let to = test.service.dialled(family);
            let mut stream = client::connect_from(&test.cluster.client, Some(from), to)?;
            let seen = client::ask(&mut stream)?;
            // By a reset: neither end remembers it.
            socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO))?;
            anyhow::Ok(seen)
        };
        for (family, from) in Family::BOTH.into_iter().zip(froms) {
            assert_eq!(ask_from(&test, family, from).unwrap().peer, from);
        }
        test.update(|service| service.annotated = false);
        for (family, from) in Family::BOTH.into_iter().zip(froms) {
            let seen = ask_from(&test, family, from).unwrap();
            assert_eq!(seen.peer, from, "under Local, kube-proxy keeps it as well");
        }
        // And taken over again.
        test.update(|service| service.annotated = true);
        for (family, from) in Family::BOTH.into_iter().zip(froms) {
            assert_eq!(ask_from(&test, family, from).unwrap().peer, from);
        }
    }
}

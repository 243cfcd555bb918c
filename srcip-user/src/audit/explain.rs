//! One connection as a picture: its hops, the address at each, and where it changes.

use std::{
    fmt::Write as _,
    net::{IpAddr, SocketAddr},
};

use k8s_openapi::{api::core::v1::Service, apimachinery::pkg::util::intstr::IntOrString};
use serde::Serialize;

use super::{
    cause::{Cause, Surroundings, causes},
    cluster::{Cluster, full_name},
    cure::Cure,
    netfilter::Mode,
};
use crate::{
    telemetry::record::{Join, Leg, Record},
    text::printable,
};

/// One end that is asked for: an address, and a port if that matters.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct End {
    /// The address.
    pub ip: IpAddr,
    /// The port; any if not given.
    pub port: Option<u16>,
}

impl End {
    fn is(self, address: SocketAddr) -> bool {
        self.ip == address.ip() && self.port.is_none_or(|port| port == address.port())
    }
}

impl std::str::FromStr for End {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let bare = text.parse().map(|ip| Self { ip, port: None });
        let with_port = || {
            text.parse::<SocketAddr>().map(|address| Self { ip: address.ip(), port: Some(address.port()) })
        };
        bare.or_else(|_| with_port()).map_err(|_| {
            format!("{text:?} is not an address: expected 10.0.0.1, 10.0.0.1:8000, fd00::1 or [fd00::1]:8000")
        })
    }
}

/// A connection, and how far it is known that it is the one asked for.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Match {
    /// It goes where it was asked for, but comes from a node, a load balancer or a gateway, behind which
    /// the client may be.
    Behind,
    /// Both ends fit.
    Exact,
}

/// Whether a record is of a connection between these.
pub fn matches(record: &Record, from: Option<End>, to: Option<End>, cluster: &Cluster) -> Option<Match> {
    if !matches!(record.leg, Leg::Direct | Leg::Downstream | Leg::Upstream) {
        return None;
    }
    let ends = [record.downstream_local_address.map(|a| a.0), record.upstream_host.map(|a| a.0)];
    let goes_there = |to: End| {
        let targets = targets(to, cluster);
        ends.iter().flatten().any(|end| to.is(*end) || targets.iter().any(|target| target.is(*end)))
    };
    if !to.is_none_or(goes_there) {
        return None;
    }
    let origin = record.origin.map(|origin| origin.0);
    let Some(from) = from else { return Some(Match::Exact) };
    if origin.is_some_and(|origin| from.is(origin)) {
        return Some(Match::Exact);
    }
    let hides = |ip: IpAddr| {
        cluster.node(ip).is_some()
            || cluster.is_load_balancer(ip)
            || cluster.pod(|other| other == ip).is_some_and(|pod| cluster.is_gateway(pod))
    };
    origin.is_some_and(|origin| hides(origin.ip())).then_some(Match::Behind)
}

/// Where a Service's address or node port leads: the pods it selects.
fn targets(to: End, cluster: &Cluster) -> Vec<End> {
    let leads = |service: &&Service| {
        let Some(spec) = &service.spec else { return false };
        let of_service = [&spec.cluster_ips, &spec.external_ips]
            .into_iter()
            .flatten()
            .flatten()
            .chain(&spec.cluster_ip)
            .chain(&spec.load_balancer_ip)
            .any(|ip| ip.parse() == Ok(to.ip));
        let balanced = service.status.iter().filter_map(|status| status.load_balancer.as_ref());
        let of_balancer = balanced
            .filter_map(|balancer| balancer.ingress.as_ref())
            .flatten()
            .any(|ingress| ingress.ip.as_ref().is_some_and(|ip| ip.parse() == Ok(to.ip)));
        of_service || of_balancer || cluster.node(to.ip).is_some()
    };
    let mut found = Vec::new();
    for service in cluster.services.iter().filter(leads) {
        let spec = service.spec.as_ref();
        let at_node = cluster.node(to.ip).is_some();
        for port in spec.into_iter().filter_map(|spec| spec.ports.as_ref()).flatten() {
            let number = if at_node { port.node_port } else { Some(port.port) };
            if to.port.is_some_and(|wanted| number != Some(i32::from(wanted))) {
                continue;
            }
            let target = match &port.target_port {
                Some(IntOrString::Int(number)) => u16::try_from(*number).ok(),
                // A name is looked up in the pod, which need not be known: any port will do.
                Some(IntOrString::String(_)) => None,
                None => u16::try_from(port.port).ok(),
            };
            for pod in cluster.selected_by(service) {
                let ips = pod.status.iter().flat_map(|status| status.pod_ips.iter().flatten());
                found.extend(ips.filter_map(|ip| ip.ip.parse().ok()).map(|ip| End { ip, port: target }));
            }
        }
    }
    found
}

/// A place that a connection passes.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Hop {
    /// What it is.
    pub name: String,
    /// The client, as this place sees it.
    pub sees: Option<SocketAddr>,
    /// Where the connection arrives.
    pub at: Option<SocketAddr>,
    /// What it does with the connection.
    pub does: Vec<String>,
    /// Whether the client's address does not get past it.
    pub loses: bool,
}

/// A connection, explained.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Explanation {
    /// The places it passes, in order.
    pub hops: Vec<Hop>,
    /// Why the application sees what it sees, with what to do.
    pub findings: Vec<Explained>,
    /// Whether another connection of the pod may be the one that reached the application.
    pub inferred: bool,
}

/// A reason, with its cure.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Explained {
    /// The reason.
    #[serde(flatten)]
    pub cause: Cause,
    /// What to do.
    #[serde(flatten)]
    pub cure: Cure,
}

/// Explains a connection. `asked` is the client that was asked for, which the pod may not see.
pub fn explain(record: &Record, asked: Option<End>, around: Surroundings<'_>) -> Explanation {
    let causes = causes(record, around);
    let workload = around.workload;
    let origin = record.origin.map(|origin| origin.0);
    let before = causes.iter().find(|cause| cause.is_before_the_pod());
    let mut hops = Vec::new();
    hops.push(Hop {
        name: "client".to_owned(),
        sees: match (before, asked) {
            // Behind somebody else, it is known only if it was asked for.
            (Some(_), Some(end)) => Some(SocketAddr::new(end.ip, end.port.unwrap_or(0))),
            (Some(_), None) => None,
            (None, _) => origin,
        },
        at: None,
        does: Vec::new(),
        loses: false,
    });
    if let Some(cause) = before {
        let (name, does) = match cause {
            Cause::Snat { node, .. } => (format!("node {node}"), "puts its own address there (SNAT)"),
            Cause::Gateway { pod } => (format!("gateway {pod}"), "opens a connection of its own"),
            _ => ("load balancer".to_owned(), "opens a connection of its own"),
        };
        let mut does = vec![does.to_owned()];
        does.extend(origin.map(|origin| format!("sends from {origin}")));
        hops.push(Hop { name, sees: None, at: None, does, loses: true });
    }
    let pod = around.pod.map_or_else(|| workload.name.to_string(), |pod| full_name(&pod.metadata));
    let arrives = record.downstream_local_address.map(|a| a.0);
    if record.leg != Leg::Direct {
        let how = match (workload.attached, around.interception.mode, around.interception.proxy_port) {
            (true, ..) => Some("srcip steers to the proxy, packets unchanged".to_owned()),
            (_, Some(Mode::Redirect), Some(port)) => Some(format!("REDIRECT to port {port}")),
            (_, Some(Mode::Tproxy), Some(port)) => Some(format!("TPROXY to port {port}, packets unchanged")),
            _ => None,
        };
        let mut does: Vec<_> = how.into_iter().collect();
        does.extend(record.upstream_local_address.map(|from| format!("connects from {from}")));
        hops.push(Hop {
            name: format!("proxy in {pod}"),
            sees: origin,
            at: arrives,
            does,
            loses: causes.iter().any(Cause::is_inside_the_pod),
        });
    }
    let (sees, at) = match record.leg {
        Leg::Direct => (record.downstream_remote_address.map(|a| a.0), arrives),
        _ => (record.upstream_local_address.map(|a| a.0), record.upstream_host.map(|a| a.0)),
    };
    hops.push(Hop { name: format!("application in {pod}"), sees, at, does: Vec::new(), loses: false });

    let port = at.map(|at| at.port());
    let findings = causes
        .into_iter()
        .map(|cause| {
            let ports = port.into_iter().collect();
            let cure = cause.cure(super::cure::Patient {
                netns: &workload.netns,
                pod: around.pod,
                interception: around.interception,
                ports: &ports,
            });
            Explained { cause, cure }
        })
        .collect();
    Explanation { hops, findings, inferred: record.join == Some(Join::Inferred) }
}

impl Explanation {
    /// The picture.
    pub fn draw(&self) -> String {
        draw(&self.hops)
    }
}

/// Places that a connection passes, as a picture.
pub fn draw(hops: &[Hop]) -> String {
    let width = hops.iter().map(|hop| hop.name.chars().count()).max().unwrap_or_default();
    let mut text = String::new();
    for (i, hop) in hops.iter().enumerate() {
        if i > 0 {
            text.push_str("  │\n  ▼\n");
        }
        let address = |address: SocketAddr| match address.port() {
            0 => address.ip().to_string(),
            _ => address.to_string(),
        };
        let mut lines: Vec<String> = Vec::new();
        match (i, hop.sees, hop.at) {
            (0, Some(sees), _) => lines.push(address(sees)),
            (0, None, _) if hop.does.is_empty() => lines.push("not known here".to_owned()),
            (_, Some(sees), Some(at)) => lines.push(format!("sees {} at {at}", address(sees))),
            (_, Some(sees), None) => lines.push(format!("sees {}", address(sees))),
            (_, None, _) if hop.does.is_empty() => lines.push("no connection yet".to_owned()),
            _ => {}
        }
        lines.extend(hop.does.iter().cloned());
        if hop.loses {
            lines.push("◀ the client's address is lost here".to_owned());
        }
        for (j, line) in lines.iter().enumerate() {
            let name = if j == 0 { hop.name.as_str() } else { "" };
            let bar = if j == 0 || i + 1 == hops.len() { "  " } else { "  │ " };
            let pad = width + 4 - bar.chars().count();
            // Writing to a String does not fail.
            let _ = writeln!(text, "{bar}{:<pad$}  {}", printable(name), printable(line));
        }
    }
    text
}

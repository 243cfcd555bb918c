//! The way that packets take from a frontend which north-south handles on this node, as its maps have it.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
};

use anyhow::{Result, bail};
use serde::{Serialize, Serializer};
use srcip_common::{
    address::Address,
    northsouth::{
        Affinity, CLOSING, Direction, ENTERED_HERE, Endpoint, Flow, FlowKey, LOCAL_POLICY, TUNNEL_RETURN,
        UDP_IDLE_NS,
        counter::Counter,
        lookup::{self, Candidate, NONE, Table},
        packet::{TCP, UDP},
        takes_new,
    },
};

use super::{
    cluster::Cluster,
    explain::{End, Hop, draw},
};
use crate::{
    northsouth::dataplane::trace::{Handled, Reader},
    telemetry::clock::Clock,
};

/// The way of one frontend. The names in JSON are stable.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Way {
    /// What is dialled.
    pub frontend: SocketAddr,
    /// `tcp` or `udp`.
    pub protocol: &'static str,
    /// `NAMESPACE/NAME:PORT`.
    pub service: String,
    /// `externalTrafficPolicy`: `Cluster` or `Local`.
    pub policy: &'static str,
    /// How long a client stays with its endpoint, in seconds.
    pub affinity_seconds: Option<u64>,
    /// How answers of pods on other nodes reach the client: `direct` or `tunnel`.
    pub return_path: &'static str,
    /// Who may come; nothing: everybody.
    pub source_ranges: Option<Vec<String>>,
    /// Whether the client may, if one was asked for.
    pub allowed: Option<bool>,
    /// Where new connections go.
    pub endpoints: Vec<Share>,
    /// Where the connection that was asked for goes.
    pub chosen: Option<Chosen>,
    /// Whether it goes nowhere because the client has connections from that port, by other frontends, to all the
    /// pods that it could go to.
    pub collides: bool,
    /// The places it passes, in order.
    pub hops: Vec<Hop>,
}

/// An endpoint that takes new connections.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Share {
    /// The pod's address and port.
    pub address: SocketAddr,
    /// By which node's address it is reached; nothing if it is on this one.
    pub node: Option<IpAddr>,
    /// How much of all new connections this node means for it, of 1. Another node chooses among its own pods.
    #[serde(serialize_with = "three_digits")]
    pub share: f64,
}

fn three_digits<S: Serializer>(share: &f64, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_f64((share * 1000.0).round() / 1000.0)
}

/// Where one connection goes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
pub struct Chosen {
    /// The pod's address and port. Nothing if only its node knows.
    pub endpoint: Option<SocketAddr>,
    /// Of its node; nothing: this one.
    pub node: Option<IpAddr>,
    /// What says so.
    pub by: By,
}

/// What says where a connection goes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum By {
    /// It is open.
    Flow,
    /// Its client has been there.
    Affinity,
    /// The Service's table.
    Table,
    /// The table's next place: answers of the pod at the first would be taken for those to another connection of
    /// this client address and port, by another frontend.
    NextPlace,
}

/// What is known of the client that was asked for.
#[derive(Clone, Debug)]
struct Client {
    end: End,
    allowed: bool,
    flow: Option<Flow>,
    affinity: Option<Affinity>,
    /// Connections it has from the same port to pods of this node, by the pod, whatever the frontend.
    others: BTreeMap<SocketAddr, Flow>,
}

/// The ways to what is dialled at `to`, one for each protocol that north-south handles there. Nothing if it handles
/// nothing there; an error if it does, and the client is of the other family.
pub fn ways(reader: &Reader, from: Option<End>, to: SocketAddr, cluster: &Cluster) -> Result<Vec<Way>> {
    let mut ways = Vec::new();
    for protocol in [TCP, UDP] {
        let Some(handled) = reader.handled(to, protocol)? else { continue };
        let client = match from {
            Some(end) if end.ip.is_ipv4() != to.is_ipv4() => {
                bail!("{} and {to} are of different families: no packet goes from one to the other", end.ip)
            }
            Some(end) => Some(look_up(reader, &handled, end, to, protocol)?),
            None => None,
        };
        ways.push(way(&handled, client.as_ref(), to, protocol, cluster, Clock::boot_ns()));
    }
    Ok(ways)
}

fn look_up(reader: &Reader, handled: &Handled, end: End, to: SocketAddr, protocol: u8) -> Result<Client> {
    let allowed = handled.ranges.is_none() || reader.is_in_range(handled.id, end.ip)?;
    let flow = match end.port {
        Some(port) => reader.flow(&request((end.ip, port), to, protocol))?,
        None => None,
    };
    let affinity = match handled.service.affinity_ns {
        0 => None,
        _ => reader.affinity(handled.id, end.ip)?,
    };
    let mut others = BTreeMap::new();
    if let Some(port) = end.port {
        for endpoint in handled.endpoints.values().filter(|endpoint| endpoint.node.is_unspecified()) {
            let key = FlowKey::new(
                Direction::Reply,
                protocol,
                (endpoint.address, endpoint.port),
                (end.ip.into(), port),
            );
            others.extend(reader.flow(&key)?.map(|flow| (address(endpoint), flow)));
        }
    }
    Ok(Client { end, allowed, flow, affinity, others })
}

fn request(from: (IpAddr, u16), to: SocketAddr, protocol: u8) -> FlowKey {
    let to = (to.ip().into(), to.port());
    FlowKey::new(Direction::Request, protocol, (from.0.into(), from.1), to)
}

/// Puts it together, at a time in nanoseconds since boot.
fn way(
    handled: &Handled,
    client: Option<&Client>,
    to: SocketAddr,
    protocol: u8,
    cluster: &Cluster,
    now: u64,
) -> Way {
    let service = &handled.service;
    let choice = client.map_or(Choice::Unknown, |client| choose(handled, client, to, protocol, now));
    let chosen = if let Choice::Made(chosen) = choice { Some(chosen) } else { None };
    // An open connection goes on whoever may open one.
    let is_open = chosen.is_some_and(|chosen| chosen.by == By::Flow);
    let allowed = client.map(|client| client.allowed);
    let mut way = Way {
        frontend: to,
        protocol: if protocol == UDP { "udp" } else { "tcp" },
        service: handled.name.to_string(),
        policy: if service.flags & LOCAL_POLICY != 0 { "Local" } else { "Cluster" },
        affinity_seconds: (service.affinity_ns != 0).then_some(service.affinity_ns / 1_000_000_000),
        return_path: if service.flags & TUNNEL_RETURN != 0 { "tunnel" } else { "direct" },
        source_ranges: handled.ranges.as_ref().map(|nets| nets.iter().map(ToString::to_string).collect()),
        allowed,
        endpoints: shares(handled),
        chosen: chosen.filter(|_| allowed == Some(true) || is_open),
        collides: allowed == Some(true) && matches!(choice, Choice::Collides),
        hops: Vec::new(),
    };
    way.hops = hops(&way, handled.node, client.map(|client| client.end), cluster);
    way
}

/// What is known of where a connection goes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Choice {
    /// That takes the client's port, and it is not known; or nobody takes connections.
    Unknown,
    /// Nowhere: [`Way::collides`].
    Collides,
    /// There.
    Made(Chosen),
}

/// Where a connection goes, as the programs choose.
fn choose(handled: &Handled, client: &Client, to: SocketAddr, protocol: u8, now: u64) -> Choice {
    let service = &handled.service;
    if let Some(flow) = client.flow
        && flow.service == handled.id
        && flow.flags & CLOSING == 0
        && (protocol != UDP || now.saturating_sub(flow.seen_ns) <= UDP_IDLE_NS)
    {
        let node = node(flow.node);
        // Another node remembers itself which of its pods it is.
        let endpoint = node.is_none().then(|| SocketAddr::new(flow.address.into(), flow.port));
        return Choice::Made(Chosen { endpoint, node, by: By::Flow });
    }
    let by_client = service.affinity_ns != 0;
    let Some(port) = client.end.port.or(by_client.then_some(0)) else { return Choice::Unknown };
    let kept = client.affinity.and_then(|affinity| {
        let endpoint = handled.endpoints.get(&u16::try_from(affinity.index).ok()?)?;
        let is_it = endpoint.address == affinity.address && endpoint.flags & takes_new(ENTERED_HERE) != 0;
        (is_it && now.saturating_sub(affinity.seen_ns) <= service.affinity_ns).then_some(endpoint)
    });
    let first = lookup::hash_of(&request((client.end.ip, port), to, protocol), by_client);
    let mut hash = first;
    let mut choice = Choice::Unknown;
    for attempt in 0..lookup::ATTEMPTS {
        let place = lookup::place(hash);
        let (found, by) = match kept.filter(|_| attempt == 0) {
            Some(endpoint) => (Some(endpoint), By::Affinity),
            None => (handled.endpoints.get(&service.tables[ENTERED_HERE][place]), By::Table),
        };
        hash = lookup::next(hash, attempt);
        let Some(endpoint) = found else { continue };
        let by = if choice == Choice::Collides { By::NextPlace } else { by };
        let Some(node) = node(endpoint.node) else {
            let endpoint = address(endpoint);
            let other = client.others.get(&endpoint);
            if other.is_some_and(|other| other.bars((to.ip().into(), to.port()), now)) {
                choice = Choice::Collides;
                continue;
            }
            return Choice::Made(Chosen { endpoint: Some(endpoint), node: None, by });
        };
        // That node looks at the place by the connection's own hash, whichever this one has come to.
        let there = table_of(handled, endpoint.node)[lookup::place(first)];
        let endpoint = handled.endpoints.get(&there).map(address);
        return Choice::Made(Chosen { endpoint, node: Some(node), by });
    }
    choice
}

/// The table by which another node chooses among its own pods. All that take connections from here and are there
/// take them there.
fn table_of(handled: &Handled, node: Address) -> Table {
    let there = |endpoint: &&Endpoint| endpoint.node == node && endpoint.flags & takes_new(ENTERED_HERE) != 0;
    let mut candidates: Vec<_> = handled
        .endpoints
        .iter()
        .filter(|(_, endpoint)| there(endpoint))
        .map(|(&index, endpoint)| Candidate { address: endpoint.address, port: endpoint.port, index })
        .collect();
    let mut table = [NONE; lookup::SIZE];
    lookup::fill(&mut table, &mut candidates);
    table
}

fn shares(handled: &Handled) -> Vec<Share> {
    let mut places: BTreeMap<u16, usize> = BTreeMap::new();
    for &index in &handled.service.tables[ENTERED_HERE] {
        *places.entry(index).or_default() += 1;
    }
    let share = |(index, places)| {
        let endpoint = handled.endpoints.get(&index)?;
        let share = places as f64 / lookup::SIZE as f64;
        Some(Share { address: address(endpoint), node: node(endpoint.node), share })
    };
    let mut shares: Vec<_> = places.into_iter().filter_map(share).collect();
    shares.sort_by_key(|share| share.address);
    shares
}

fn address(endpoint: &Endpoint) -> SocketAddr {
    SocketAddr::new(endpoint.address.into(), endpoint.port)
}

fn node(address: Address) -> Option<IpAddr> {
    (!address.is_unspecified()).then(|| address.into())
}

/// `of_node`: the frontend's address is a node's, and whether this one's.
fn hops(way: &Way, of_node: Option<bool>, from: Option<End>, cluster: &Cluster) -> Vec<Hop> {
    let hop = |name: String, does: Vec<String>| Hop { name, sees: None, at: None, does, loses: false };
    let named = |node: IpAddr| match cluster.node(node) {
        Some(name) if name != node.to_string() => format!("node {name} ({node})"),
        _ => format!("node {node}"),
    };
    let client = from.map(|end| SocketAddr::new(end.ip, end.port.unwrap_or(0)));
    let anybody = if from.is_none() { vec!["anybody".to_owned()] } else { Vec::new() };
    let mut hops = vec![Hop { sees: client, ..hop("client".to_owned(), anybody) }];

    let mut frontend = vec![
        format!("{} ({}) of Service {}", way.frontend, way.protocol, way.service),
        format!("externalTrafficPolicy {}", way.policy),
    ];
    frontend
        .extend(way.affinity_seconds.map(|time| format!("a client stays with its endpoint for {time} s")));
    if of_node == Some(false) {
        frontend.push("it is another node's address: so it would be if packets for it came here".to_owned());
    }
    frontend.extend(way.source_ranges.as_ref().map(|ranges| {
        let ranges = ranges.join(", ");
        match way.allowed {
            None => format!("for clients of {ranges} alone"),
            Some(true) => format!("for clients of {ranges} alone: this one may"),
            Some(false) => format!("for clients of {ranges} alone: this one may not"),
        }
    }));
    hops.push(hop("frontend".to_owned(), frontend));

    let dropped = |why: &str, counter: Counter| vec![format!("drops it: {why} ({})", counter.name())];
    let this_node = "this node".to_owned();
    if way.allowed == Some(false) && way.chosen.is_none() {
        let does = dropped("the client is in none of the source ranges", Counter::SourceRefused);
        hops.push(hop(this_node, does));
        return hops;
    }
    if way.endpoints.is_empty() && way.chosen.is_none() {
        hops.push(hop(this_node, dropped("no endpoint takes connections", Counter::NoEndpoint)));
        return hops;
    }
    if way.collides {
        let why = "the client has connections from that port, by other frontends, to the pods it could go to";
        hops.push(hop(this_node, dropped(why, Counter::Collision)));
        return hops;
    }
    let Some(Chosen { endpoint, node, by }) = way.chosen else {
        let count = way.endpoints.len();
        let one_of =
            if count == 1 { "the one endpoint".to_owned() } else { format!("one of {count} endpoints") };
        hops.push(hop(this_node, vec![format!("chooses by its table: {one_of}, below")]));
        hops.push(hop("application".to_owned(), vec!["sees the client".to_owned(), answer(way, true)]));
        return hops;
    };
    let here = match by {
        By::Flow => "the connection is open and stays where it is",
        By::Affinity => "its client has been there, and stays",
        By::Table => "chooses by its table",
        By::NextPlace => {
            "chooses by its table, the next place: the pod at the first has another connection from that port"
        }
    };
    match node {
        None => {
            let rewrites = "puts the pod's address in place of the frontend's, past netfilter";
            hops.push(hop(this_node, vec![here.to_owned(), rewrites.to_owned()]));
        }
        Some(node) => {
            let on = format!("sends it on to {}, IP in IP", named(node));
            hops.push(hop(this_node, vec![here.to_owned(), on]));
            let there = match (by, way.affinity_seconds) {
                (By::Flow, _) => "unpacks it; it remembers which of its pods it is for",
                (_, Some(_)) => "unpacks it, and chooses one of its own pods, unless it remembers the client",
                (_, None) => "unpacks it, and chooses one of its own pods by its table",
            };
            hops.push(hop(named(node), vec![there.to_owned()]));
        }
    }
    let is_remote = node.is_some();
    let sees = endpoint.and(client);
    let mut does = Vec::new();
    if endpoint.is_none() {
        does.push("sees the client".to_owned());
    }
    does.push(answer(way, is_remote));
    hops.push(Hop { name: "application".to_owned(), sees, at: endpoint, does, loses: false });
    hops
}

/// The way back. `remote`: the pod is, or may be, on another node.
fn answer(way: &Way, remote: bool) -> String {
    let by = match (remote, way.return_path) {
        (true, "tunnel") => "back through this node",
        _ => "straight from its node",
    };
    format!("its answers go {by} to the client, from {}", way.frontend)
}

impl Way {
    /// For people: the picture, and the endpoints unless one is chosen.
    pub fn draw(&self) -> String {
        let mut text = draw(&self.hops);
        if self.chosen.is_none() && self.allowed != Some(false) {
            for Share { address, node, share } in &self.endpoints {
                let place = node.map_or_else(|| "on this node".to_owned(), |node| format!("by node {node}"));
                text.push_str(&format!("\n  {:>5.1} %  {address}  {place}", share * 100.0));
            }
            if !self.endpoints.is_empty() {
                text.push_str("\n\nGive --from ADDRESS:PORT to be told which one a connection goes to.\n");
            }
        }
        text
    }
}

#[cfg(test)]
mod tests;

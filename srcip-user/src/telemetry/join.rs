//! Puts the two legs of a connection together.
//!
//! The kernel tells of ends of connections; which upstream connection a proxy opened for which downstream
//! connection, nobody tells. What decides:
//!
//! - A connection from the pod to itself, from an address that is not the pod's, is an upstream leg with
//!   original source; it serves a downstream connection of that very client.
//! - One from `127.0.0.6` or `::6`, or from the pod's own address to a port that its proxy serves, is an
//!   upstream leg that hides the client; it may serve any downstream connection of the pod.
//!
//! If that leaves one downstream connection, the join is exact; else it is inferred, and says how.
//!
//! [`open`]: one connection, and what there is to tell of it.

mod open;

use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv6Addr, SocketAddr},
    sync::Arc,
};

use rustc_hash::{FxHashMap, FxHashSet};
use srcip_common::telemetry::{ACTIVE, Event, LOCAL, OPEN, REMOTE};

use self::open::{Open, Partner};
use super::{
    clock::Clock,
    record::{ClosedBy, EventKind, Join, Leg, Record, Rule, Totals},
    workload::{ProxyPorts, Workload, Workloads},
};
use crate::netns::NetnsCookie;

/// What Istio's sidecar connects from in its default mode.
const ISTIO_V4: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(127, 0, 0, 6));
/// The same for IPv6.
const ISTIO_V6: IpAddr = IpAddr::V6(Ipv6Addr::new(0, 0, 0, 0, 0, 0, 0, 6));

/// Whether a sidecar that hides its clients connects from here.
pub fn is_sidecar_source(ip: IpAddr) -> bool {
    ip == ISTIO_V4 || ip == ISTIO_V6
}

/// Number of a socket; see `Event::socket`.
type Socket = u64;

/// Open downstream connections, or upstream ones, by time: the first has waited longest.
type ByTime = BTreeSet<(u64, Socket)>;

/// Of how many clients it is known that they went unserved.
const MAX_UNSERVED: usize = 65_536;

/// Of how many connections of one client it is looked at where they go.
const LOOKED_AT: usize = 64;

/// How long a proxy may take to connect for a client that has gone: Envoy's `connect_timeout` is 5 s.
const UNSERVED_NS: u64 = 10_000_000_000;

/// Joins legs; keeps what is open and nothing else.
#[derive(Debug, Default)]
pub struct Joiner {
    open: FxHashMap<Socket, Open>,
    /// Connections into pods, by the client's address.
    of_client: FxHashMap<(NetnsCookie, IpAddr), ByTime>,
    /// Connections into pods that have no upstream leg yet.
    waiting: FxHashMap<NetnsCookie, ByTime>,
    /// The same by the client's address.
    waiting_of_client: FxHashMap<(NetnsCookie, IpAddr), ByTime>,
    /// How many connections into a pod are open.
    into: FxHashMap<NetnsCookie, usize>,
    /// Upstream legs by the client's address.
    upstream_of_client: FxHashMap<(NetnsCookie, IpAddr), ByTime>,
    /// Upstream legs that hide the client.
    hidden_upstream: FxHashMap<NetnsCookie, ByTime>,
    /// Connections inside pods, from the end that connected.
    inside: FxHashMap<(NetnsCookie, SocketAddr, SocketAddr), Socket>,
    /// Connections that were open before anybody watched, by their ends: their sockets' numbers are made up.
    before: FxHashMap<(NetnsCookie, SocketAddr, SocketAddr), Socket>,
    /// When a client's connection last ended without an upstream leg: one may still be on its way.
    unserved: FxHashMap<(NetnsCookie, IpAddr), u64>,
    /// The same for any client of a pod.
    unserved_in: FxHashMap<NetnsCookie, u64>,
    /// Pods whose proxy has connected from where only Istio's does.
    istio: FxHashSet<NetnsCookie>,
    /// Events were lost: a connection may be open that is not known, so nothing is exact any more.
    incomplete: bool,
}

impl Joiner {
    /// How many connections are open, as far as it knows.
    pub fn len(&self) -> usize {
        self.open.len()
    }

    /// Whether none is.
    pub fn is_empty(&self) -> bool {
        self.open.is_empty()
    }

    /// Whether nothing is kept of connections that are not open.
    #[cfg(test)]
    fn is_tidy(&self) -> bool {
        self.of_client.is_empty()
            && self.waiting.is_empty()
            && self.waiting_of_client.is_empty()
            && self.into.is_empty()
            && self.upstream_of_client.is_empty()
            && self.hidden_upstream.is_empty()
            && self.inside.is_empty()
            && self.before.is_empty()
    }

    /// What there is to tell of the connections that are open.
    pub fn open_records(&self, clock: Clock) -> impl Iterator<Item = Record> {
        self.open.values().map(move |open| open.record(EventKind::Open, clock.time(open.opened_ns)))
    }

    /// Takes an event in; what there is to tell of it comes back. The application's end of a connection
    /// inside the pod is not told of: its other end is.
    pub fn event(&mut self, event: &Event, clock: Clock, workloads: &Workloads) -> Option<Record> {
        if event.kind == OPEN { self.opened(event, clock, workloads) } else { self.closed(event, clock) }
    }

    /// Events have been lost.
    pub fn note_loss(&mut self) {
        self.incomplete = true;
    }

    /// Takes in a connection that was open before anybody watched; `event` has a number made up for its
    /// socket, and no time.
    pub fn was_open(&mut self, event: &Event, clock: Clock, workloads: &Workloads) {
        let local = socket_address(event.local, event.local_port);
        let remote = socket_address(event.remote, event.remote_port);
        if self.opened(event, clock, workloads).is_some() {
            self.before.insert((NetnsCookie(event.netns), local, remote), event.socket);
        }
    }

    /// Whether connections are known whose end may not be told of.
    pub fn has_unwatched(&self) -> bool {
        !self.before.is_empty()
    }

    /// Forgets connections whose end was not told of. `exists` is asked for each that was opened before
    /// `listed_ns`, in nanoseconds since boot.
    pub fn retain(
        &mut self,
        listed_ns: u64,
        mut exists: impl FnMut(NetnsCookie, SocketAddr, SocketAddr) -> bool,
    ) {
        let gone: Vec<Socket> = self
            .open
            .iter()
            .filter(|(_, open)| open.opened_ns < listed_ns && !exists(open.netns, open.local, open.remote))
            .map(|(socket, _)| *socket)
            .collect();
        for socket in gone {
            self.forget(socket);
        }
        self.unserved.retain(|_, closed_ns| *closed_ns + UNSERVED_NS > listed_ns);
        self.unserved_in.retain(|_, closed_ns| *closed_ns + UNSERVED_NS > listed_ns);
    }

    fn opened(&mut self, event: &Event, clock: Clock, workloads: &Workloads) -> Option<Record> {
        let netns = NetnsCookie(event.netns);
        let local = socket_address(event.local, event.local_port);
        let remote = socket_address(event.remote, event.remote_port);
        let workload = workloads.get(netns);
        let is_own = |ip: IpAddr| ip.is_loopback() || workload.is_some_and(|w| w.addresses.contains(&ip));
        let mut open = Open {
            netns,
            workload: workload.map_or_else(|| format!("netns-{netns}").into(), |w| Arc::clone(&w.name)),
            leg: Leg::Local,
            local,
            remote,
            opened_ns: event.time_ns,
            mark: event.mark,
            active: event.role == ACTIVE,
            partner: None,
            hidden: false,
        };
        if event.role == ACTIVE {
            if !is_own(remote.ip()) {
                open.leg = Leg::Outbound;
            } else {
                self.inside.insert((netns, local, remote), event.socket);
                self.classify_inside(&mut open, event.socket, workload, is_own(local.ip()));
            }
        } else {
            if self.inside.contains_key(&(netns, remote, local)) {
                return None;
            }
            open.leg = match workload.and_then(|w| w.proxy.as_ref()) {
                // The other end of something inside the pod that was not told of.
                _ if is_own(remote.ip()) => Leg::Local,
                Some(proxy) if proxy.takes(local.port()) => Leg::Downstream,
                _ => Leg::Direct,
            };
            if open.leg != Leg::Local {
                let key = (open.opened_ns, event.socket);
                self.of_client.entry((netns, remote.ip())).or_default().insert(key);
                self.waiting_of_client.entry((netns, remote.ip())).or_default().insert(key);
                self.waiting.entry(netns).or_default().insert(key);
                *self.into.entry(netns).or_default() += 1;
            }
        }
        let record = open.record(EventKind::Open, clock.time(event.time_ns));
        self.open.insert(event.socket, open);
        Some(record)
    }

    /// Tells whether a connection inside the pod is an upstream leg, and of which connection.
    fn classify_inside(
        &mut self,
        open: &mut Open,
        socket: Socket,
        workload: Option<&Workload>,
        own_source: bool,
    ) {
        let source = open.local.ip();
        let netns = open.netns;
        open.hidden = own_source || is_sidecar_source(source);
        if !open.hidden {
            open.leg = Leg::Upstream;
            let candidates = self.of_client.get(&(netns, source));
            let chosen = candidates.and_then(|all| self.choose(all, open));
            self.upstream_of_client.entry((netns, source)).or_default().insert((open.opened_ns, socket));
            self.pair(open, chosen);
            return;
        }
        let is_istio = is_sidecar_source(source);
        if is_istio {
            self.istio.insert(netns);
        } else if !self.may_hide(open, workload) {
            return;
        }
        // The youngest that waits: one that waits for long has been given a connection from before.
        let chosen = self.waiting.get(&netns).and_then(|waiting| waiting.last()).map(|(_, socket)| {
            let only = self.into.get(&netns) == Some(&1);
            (*socket, if only && is_istio { Rule::OnlyConnection } else { Rule::Youngest })
        });
        let fits = |socket: Socket| {
            self.open.get(&socket).is_some_and(|d| d.local.port() == open.remote.port())
                || matches!(workload.and_then(|w| w.proxy.as_ref()), Some(ProxyPorts::Redirected(_)))
        };
        if is_istio || chosen.is_some_and(|(socket, _)| fits(socket)) {
            open.leg = Leg::Upstream;
            self.hidden_upstream.entry(netns).or_default().insert((open.opened_ns, socket));
            self.pair(open, chosen);
        }
    }

    /// Whether a connection from the pod's own address may be its proxy's. The pod also talks to itself: over
    /// loopback, to ports that no client is sent to, and, where the proxy connects from Istio's address, in
    /// any other way.
    fn may_hide(&self, open: &Open, workload: Option<&Workload>) -> bool {
        !self.istio.contains(&open.netns)
            && !open.remote.ip().is_loopback()
            && workload.is_some_and(|w| w.proxy.is_some())
    }

    /// Picks one of a client's connections for an upstream leg. Of very many, only some are looked at.
    fn choose(&self, candidates: &ByTime, upstream: &Open) -> Option<(Socket, Rule)> {
        let get = |(_, socket): &(u64, Socket)| self.open.get(socket).map(|open| (*socket, open));
        // Same port as well: nothing else can be meant.
        let is_same = |d: &Open| d.remote == upstream.local && d.local.port() == upstream.remote.port();
        let mut youngest = candidates.iter().rev().take(LOOKED_AT).filter_map(get);
        if let Some((socket, _)) = youngest.find(|(_, d)| is_same(d)) {
            return Some((socket, Rule::SameTuple));
        }
        if candidates.len() == 1 {
            let (_, socket) = candidates.first()?;
            return Some((*socket, Rule::OnlyConnectionOfClient));
        }
        // To where the upstream leg goes, if there is such a one; a proxy may also go elsewhere.
        let fits = |(_, d): &(Socket, &Open)| d.local == upstream.remote;
        let waiting = self.waiting_of_client.get(&(upstream.netns, upstream.local.ip()));
        if let Some(first) = waiting.and_then(BTreeSet::first) {
            let fitting =
                waiting.iter().flat_map(|all| all.iter().take(LOOKED_AT)).filter_map(get).find(fits);
            return Some((fitting.map_or(first.1, |(socket, _)| socket), Rule::FirstWaiting));
        }
        let mut youngest = candidates.iter().rev().take(LOOKED_AT).filter_map(get);
        let chosen = youngest.find(fits).map(|(socket, _)| socket);
        Some((chosen.or(candidates.last().map(|(_, socket)| *socket))?, Rule::Youngest))
    }

    /// Makes two legs partners.
    fn pair(&mut self, upstream: &mut Open, chosen: Option<(Socket, Rule)>) {
        let Some((downstream_socket, rule)) = chosen else { return };
        let exact = rule.is_exact() && !self.incomplete && !self.has_unserved(upstream);
        let Some(downstream) = self.open.get_mut(&downstream_socket) else { return };
        // Of those from before, not all may have been seen; of a pod whose proxy was not known, nothing of what
        // went before is sure.
        let exact = exact && downstream.opened_ns != 0 && downstream.leg == Leg::Downstream;
        let join = if exact { Join::Exact } else { Join::Inferred };
        // What looked like the application has turned out to be a proxy.
        downstream.leg = Leg::Downstream;
        upstream.partner = Some(Partner { local: downstream.local, remote: downstream.remote, join, rule });
        let (join, rule) =
            if downstream.partner.is_some() { (Join::Inferred, Rule::Several) } else { (join, rule) };
        downstream.partner = Some(Partner { local: upstream.local, remote: upstream.remote, join, rule });
        let key = (downstream.opened_ns, downstream_socket);
        let client = (upstream.netns, downstream.remote.ip());
        remove(&mut self.waiting, &upstream.netns, key);
        remove(&mut self.waiting_of_client, &client, key);
    }

    fn closed(&mut self, event: &Event, clock: Clock) -> Option<Record> {
        let socket = self.known(event);
        self.pool(socket);
        let open = self.forget(socket)?;
        if open.opened_ns == 0 {
            // From before: how long it lasted is not known.
            return None;
        }
        // Served for certain, that is: one that was given another's may still wait for its own.
        let served = open.partner.is_some_and(|partner| partner.join == Join::Exact);
        if open.leg == Leg::Downstream && !served {
            self.note_unserved(&open, event.time_ns);
        }
        let totals = Totals {
            // The SYN counts as a byte, for the side that sent it.
            bytes_sent: event.bytes_sent.saturating_sub(open.active.into()),
            bytes_received: event.bytes_received,
            duration_ms: event.time_ns.saturating_sub(open.opened_ns) as f64 / 1e6,
            rtt_us: event.srtt_us,
            retransmits: event.retransmits,
            closed_by: match event.closed_by {
                LOCAL => ClosedBy::Local,
                REMOTE => ClosedBy::Remote,
                _ => ClosedBy::Aborted,
            },
        };
        let mut record = open.record(EventKind::Close, clock.time(event.time_ns));
        record.totals = Some(totals);
        Some(record)
    }

    /// The number by which an event's connection is known: its socket's, or the one made up for it.
    fn known(&self, event: &Event) -> Socket {
        if self.open.contains_key(&event.socket) {
            return event.socket;
        }
        let local = socket_address(event.local, event.local_port);
        let remote = socket_address(event.remote, event.remote_port);
        *self.before.get(&(NetnsCookie(event.netns), local, remote)).unwrap_or(&event.socket)
    }

    fn note_unserved(&mut self, open: &Open, closed_ns: u64) {
        if self.unserved.len() >= MAX_UNSERVED {
            self.unserved.retain(|_, earlier_ns| *earlier_ns + UNSERVED_NS > closed_ns);
        }
        if self.unserved.len() >= MAX_UNSERVED {
            // So many clients that go unserved within seconds: better not to be sure of anything.
            self.unserved.clear();
            self.incomplete = true;
        }
        self.unserved.insert((open.netns, open.remote.ip()), closed_ns);
        self.unserved_in.insert(open.netns, closed_ns);
    }

    /// Whether a connection that may have caused this upstream leg has ended before it.
    fn has_unserved(&self, upstream: &Open) -> bool {
        let recent = |closed_ns: &u64| closed_ns + UNSERVED_NS > upstream.opened_ns;
        if upstream.hidden {
            self.unserved_in.get(&upstream.netns).is_some_and(recent)
        } else {
            self.unserved.get(&(upstream.netns, upstream.local.ip())).is_some_and(recent)
        }
    }

    /// Gives a downstream connection that ends without an upstream leg of its own the one that it must
    /// have shared.
    fn pool(&mut self, socket: Socket) {
        let Some(open) = self.open.get(&socket) else { return };
        if open.leg != Leg::Downstream || open.partner.is_some() {
            return;
        }
        let of_client = self.upstream_of_client.get(&(open.netns, open.remote.ip()));
        let Some(legs) = of_client.or_else(|| self.hidden_upstream.get(&open.netns)) else { return };
        let get = |(_, socket): &(u64, Socket)| self.open.get(socket);
        // To where the client wanted to go; where NAT has changed that, to wherever it goes.
        let youngest = || legs.iter().rev().take(LOOKED_AT).filter_map(get);
        let fitting = youngest().find(|upstream| upstream.remote == open.local);
        let upstream = fitting.or_else(|| youngest().next()).map(|upstream| Partner {
            local: upstream.local,
            remote: upstream.remote,
            join: Join::Inferred,
            rule: Rule::Pooled,
        });
        if let Some(open) = self.open.get_mut(&socket) {
            open.partner = upstream;
        }
    }

    fn forget(&mut self, socket: Socket) -> Option<Open> {
        let open = self.open.remove(&socket)?;
        let netns = open.netns;
        let key = (open.opened_ns, socket);
        if open.opened_ns == 0 {
            self.before.remove(&(netns, open.local, open.remote));
        }
        match open.leg {
            Leg::Downstream | Leg::Direct => {
                remove(&mut self.of_client, &(netns, open.remote.ip()), key);
                remove(&mut self.waiting, &netns, key);
                remove(&mut self.waiting_of_client, &(netns, open.remote.ip()), key);
                if let Some(count) = self.into.get_mut(&netns) {
                    *count -= 1;
                    if *count == 0 {
                        self.into.remove(&netns);
                    }
                }
            }
            Leg::Upstream | Leg::Local => {
                self.inside.remove(&(netns, open.local, open.remote));
                if open.hidden {
                    remove(&mut self.hidden_upstream, &netns, key);
                } else {
                    remove(&mut self.upstream_of_client, &(netns, open.local.ip()), key);
                }
            }
            Leg::Outbound => {}
        }
        Some(open)
    }
}

fn remove<K: std::hash::Hash + Eq>(map: &mut FxHashMap<K, ByTime>, key: &K, value: (u64, Socket)) {
    if let Some(set) = map.get_mut(key) {
        set.remove(&value);
        if set.is_empty() {
            map.remove(key);
        }
    }
}

fn socket_address(address: srcip_common::address::Address, port: u16) -> SocketAddr {
    SocketAddr::new(address.into(), port)
}

#[cfg(test)]
mod tests;

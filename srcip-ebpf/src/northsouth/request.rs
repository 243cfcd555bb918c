//! From a client to an endpoint.

use srcip_common::{
    address::Address,
    northsouth::{
        Direction, FlowKey,
        counter::{Counter, ServiceCounter},
        packet::Datagram,
    },
};

use crate::{
    Verdict, choose, fragments, maps,
    rewrite::{self, End},
    send, size,
    skb::{Failed, Skb},
    tunnel,
    work::Work,
};

/// A packet that came in by an uplink, or was unpacked there: from the node `from`, unspecified if it entered the
/// cluster here.
#[inline(never)]
pub fn from_client(skb: Skb, work: &mut Work, datagram: &Datagram, from: &Address) -> Verdict {
    let Some(ports) = fragments::ports(skb, datagram) else { return Verdict::pass(Counter::Malformed) };
    let (to, port) = (datagram.destination, ports.destination);
    let Some(frontend) = maps::frontend(datagram.family, to, port, datagram.protocol) else {
        if from.is_unspecified() {
            return Verdict::PASS;
        }
        fragments::follow(datagram, ports);
        return tunnel::onward(skb, work, datagram);
    };
    if !datagram.has_sender() {
        return Verdict::pass(Counter::Malformed);
    }
    if datagram.hop_limit <= 1 {
        return Verdict::pass(Counter::HopLimit);
    }
    work.request.key = FlowKey::new(
        Direction::Request,
        datagram.protocol,
        (datagram.source, ports.source),
        (datagram.destination, ports.destination),
    );
    (work.request.ports, work.request.frontend, work.request.from) = (ports, frontend, *from);
    let chosen = choose::endpoint(work);
    if chosen != Verdict::REDIRECT {
        return chosen;
    }
    if work.target.node.is_unspecified() {
        to_endpoint(skb, work, datagram)
    } else if from.is_unspecified() {
        to_node(skb, work, datagram)
    } else {
        // Only from one node to another, never on to a third.
        Verdict::drop_of(frontend.service, ServiceCounter::NoEndpoint)
    }
}

/// To an endpoint on this node.
#[inline(always)]
fn to_endpoint(skb: Skb, work: &mut Work, datagram: &Datagram) -> Verdict {
    let found = send::find(skb, datagram, &mut work.way, datagram.source, work.target.address);
    if found != Verdict::REDIRECT {
        return found;
    }
    let (from, to) = (work.request.ports.destination, work.target.port);
    let rewritten = rewrite::port(skb, datagram, End::Destination, from, to)
        .and_then(|()| rewrite::address(skb, datagram, End::Destination, &work.target.address))
        .and_then(|()| rewrite::hop(skb, datagram));
    match rewritten {
        Ok(()) => {
            fragments::follow(datagram, work.request.ports);
            maps::count(Counter::ToEndpoint);
            maps::count_of(work.request.frontend.service, ServiceCounter::RequestBytes, skb.len().into());
            send::redirect(&mut work.way)
        }
        Err(Failed) => Verdict::drop(Counter::Failed),
    }
}

/// To the node that has the endpoint.
#[inline(always)]
fn to_node(skb: Skb, work: &mut Work, datagram: &Datagram) -> Verdict {
    let open = tunnel::open(skb, &mut work.way, datagram, &work.target.node);
    if open != Verdict::REDIRECT {
        return open;
    }
    // The answers come back encapsulated.
    if work.target.tunnel_return && work.request.ports.is_syn() {
        size::clamp(skb, datagram, work.way.device);
    }
    fragments::follow(datagram, work.request.ports);
    match rewrite::hop(skb, datagram) {
        Ok(()) => tunnel::send(skb, &mut work.way, datagram, Counter::ToNode),
        Err(Failed) => Verdict::drop(Counter::Failed),
    }
}

//! From an endpoint to its client.

use srcip_common::northsouth::{
    Direction, Flow, FlowKey, TUNNEL_RETURN,
    counter::{Counter, ServiceCounter},
    packet::{Datagram, UDP},
};

use crate::{
    Verdict, fragments, maps,
    rewrite::{self, End},
    send, size,
    skb::{Failed, Skb},
    tunnel,
    work::{Way, Work},
};

/// A packet that a pod sends. Those that belong to no flow of ours pass: the pod's own connections, and
/// answers to what came by another way.
#[inline(never)]
pub fn from_pod(skb: Skb, work: &mut Work, datagram: &Datagram) -> Verdict {
    let Some(ports) = fragments::ports(skb, datagram) else { return Verdict::pass(Counter::Malformed) };
    work.key = FlowKey::new(
        Direction::Reply,
        datagram.protocol,
        (datagram.source, ports.source),
        (datagram.destination, ports.destination),
    );
    let Some(flow) = maps::flow(&work.key) else { return Verdict::PASS };
    // Where something may begin: the client's port may have come again by another way since its flow was noted.
    if (ports.is_syn() || datagram.protocol == UDP) && !is_current(datagram, flow) {
        maps::forget_flow(&work.key);
        return Verdict::PASS;
    }
    maps::touch(flow, ports.closes());
    (work.target.address, work.target.port) = (flow.address, flow.port);
    let found = back(skb, &mut work.way, datagram, flow);
    if found != Verdict::REDIRECT {
        return found;
    }
    // Where one of the two ways is through a tunnel, what goes there must fit as well.
    if !flow.node.is_unspecified() && ports.is_syn() {
        size::clamp(skb, datagram, work.way.device);
    }
    let rewritten = rewrite::port(skb, datagram, End::Source, ports.source, work.target.port)
        .and_then(|()| rewrite::address(skb, datagram, End::Source, &work.target.address))
        .and_then(|()| rewrite::hop(skb, datagram));
    match rewritten {
        Ok(()) => {
            fragments::follow(datagram, ports);
            maps::count_of(flow.service, ServiceCounter::ReplyBytes, skb.len().into());
            send_back(skb, &mut work.way, datagram, Counter::Reply)
        }
        Err(Failed) => Verdict::drop(Counter::Failed),
    }
}

/// Whether the frontend of a flow with this packet's protocol still leads to its service here; else what comes to it is
/// kube-proxy's.
#[inline(always)]
pub fn is_current(datagram: &Datagram, flow: &Flow) -> bool {
    maps::frontend(datagram.family, flow.address, flow.port, datagram.protocol)
        .is_some_and(|frontend| frontend.service == flow.service)
}

/// Finds the way of an answer, which has not been changed yet: to the client, or back to the node it came to.
#[inline(always)]
pub fn back(skb: Skb, way: &mut Way, datagram: &Datagram, flow: &Flow) -> Verdict {
    if datagram.hop_limit <= 1 {
        return Verdict::pass(Counter::HopLimit);
    }
    let through_node = !flow.node.is_unspecified()
        && maps::service(flow.service).is_some_and(|service| service.flags & TUNNEL_RETURN != 0);
    if through_node {
        return tunnel::open(skb, way, datagram, &flow.node);
    }
    send::find(skb, datagram, way, flow.address, datagram.destination)
}

/// Sends it there.
#[inline(always)]
pub fn send_back(skb: Skb, way: &mut Way, datagram: &Datagram, counter: Counter) -> Verdict {
    if way.overhead != 0 {
        return tunnel::send(skb, way, datagram, Counter::ReplyToNode);
    }
    maps::count(counter);
    send::redirect(way)
}

//! ICMP errors of a flow: the packet that they quote is translated like the flow's own, so that who sent it
//! knows it again. Path MTU discovery depends on it.

use srcip_common::{
    address::Address,
    northsouth::{
        Direction, FlowKey,
        counter::Counter,
        packet::{self, Datagram, Family},
    },
};

use crate::{
    Verdict, maps, reply,
    rewrite::{self, End},
    send,
    skb::{Failed, Result, Skb, difference},
    tunnel,
    work::{Header, Work},
};

/// An error about an answer: it quotes frontend to client. It goes to the endpoint, as if about what that sent.
/// `from` is the node that has sent it here, unspecified if none.
#[inline(never)]
pub fn from_outside(skb: Skb, work: &mut Work, datagram: &Datagram, from: &Address) -> Verdict {
    let Some(quoted) = Header::Quoted.place() else { return Verdict::PASS };
    let Some(ports) = packet::quoted(&skb, datagram, quoted) else { return Verdict::PASS };
    let Some(frontend) = maps::frontend(quoted.family, quoted.source, ports.source, quoted.protocol) else {
        return if from.is_unspecified() { Verdict::PASS } else { tunnel::onward(skb, work, datagram) };
    };
    work.key = FlowKey::new(
        Direction::Request,
        quoted.protocol,
        (quoted.destination, ports.destination),
        (quoted.source, ports.source),
    );
    let Some(flow) = maps::flow(&work.key) else { return Verdict::PASS };
    // The frontend may have gone to another Service since the flow was noted.
    if flow.service != frontend.service {
        return Verdict::PASS;
    }
    if datagram.hop_limit <= 1 {
        return Verdict::pass(Counter::HopLimit);
    }
    (work.target.address, work.target.port) = (flow.address, flow.port);
    if !flow.node.is_unspecified() {
        let open = tunnel::open(skb, &mut work.way, datagram, &flow.node);
        if open != Verdict::REDIRECT {
            return open;
        }
        return match rewrite::hop(skb, datagram) {
            Ok(()) => tunnel::send(skb, &mut work.way, datagram, Counter::ToNode),
            Err(Failed) => Verdict::drop(Counter::Failed),
        };
    }
    let found = send::find(skb, datagram, &mut work.way, datagram.source, work.target.address);
    if found != Verdict::REDIRECT {
        return found;
    }
    let translated = translate(skb, work, datagram, quoted, End::Source)
        .and_then(|()| rewrite::address(skb, datagram, End::Destination, &work.target.address))
        .and_then(|()| rewrite::hop(skb, datagram));
    match translated {
        Ok(()) => {
            maps::count(Counter::IcmpTranslated);
            send::redirect(&mut work.way)
        }
        Err(Failed) => Verdict::drop(Counter::Failed),
    }
}

/// An error about a request: it quotes client to endpoint, as the endpoint got it.
#[inline(never)]
pub fn from_pod(skb: Skb, work: &mut Work, datagram: &Datagram) -> Verdict {
    let Some(quoted) = Header::Quoted.place() else { return Verdict::PASS };
    let Some(ports) = packet::quoted(&skb, datagram, quoted) else { return Verdict::PASS };
    work.key = FlowKey::new(
        Direction::Reply,
        quoted.protocol,
        (quoted.destination, ports.destination),
        (quoted.source, ports.source),
    );
    let Some(flow) = maps::flow(&work.key) else { return Verdict::PASS };
    // The request may have come by another way, with the ends of an earlier flow.
    if !reply::is_current(quoted, flow) {
        return Verdict::PASS;
    }
    (work.target.address, work.target.port) = (flow.address, flow.port);
    let found = reply::back(skb, &mut work.way, datagram, flow);
    if found != Verdict::REDIRECT {
        return found;
    }
    let translated = translate(skb, work, datagram, quoted, End::Destination)
        .and_then(|()| rewrite::address(skb, datagram, End::Source, &work.target.address))
        .and_then(|()| rewrite::hop(skb, datagram));
    match translated {
        Ok(()) => reply::send_back(skb, &mut work.way, datagram, Counter::IcmpTranslated),
        Err(Failed) => Verdict::drop(Counter::Failed),
    }
}

/// Gives one end of the quoted packet the target's address and port. Its own transport checksum stays as it was:
/// nobody can check it, half of the packet is missing.
#[inline(never)]
fn translate(skb: Skb, work: &Work, datagram: &Datagram, quoted: &Datagram, end: End) -> Result<()> {
    const SIZE_OF_PORT: u64 = 2;
    let (address, port) = (&work.target.address, work.target.port);
    let checksum = datagram.payload + 2;
    let (from, to) = (end.address(quoted).words(), address.words());
    let offset = end.address_offset(quoted);
    match quoted.family {
        Family::V4 => {
            // For ICMP's checksum, that of the quoted header makes up for the address.
            skb.replace_l3(quoted.start + 10, from[3], to[3], 4)?;
            skb.store(offset, &to[3])?;
        }
        Family::V6 => {
            skb.replace_l4(checksum, 0, difference(&from, &to), 0)?;
            skb.store(offset, &to)?;
        }
    }
    let Some(ports) = packet::quoted_ports(&skb, quoted) else { return Err(Failed) };
    let from = match end {
        End::Source => ports.source,
        End::Destination => ports.destination,
    };
    skb.replace_l4(checksum, from.to_be().into(), port.to_be().into(), SIZE_OF_PORT)?;
    skb.store(end.port_offset(quoted), &port.to_be())
}

//! Between nodes: IPv4 in IPv4, IPv6 in IPv6, as RFC 2003 and RFC 2473 have it.
//!
//! What is inside is the client's packet, frontend and all: the other node looks it up itself.

use aya_ebpf::bindings::{
    BPF_F_ADJ_ROOM_ENCAP_L3_IPV4, BPF_F_ADJ_ROOM_ENCAP_L3_IPV6, BPF_F_ADJ_ROOM_FIXED_GSO,
};
use srcip_common::{
    address::Address,
    northsouth::{
        counter::Counter,
        packet::{self, Datagram, Extent, Family, Ports, TCP, UDP},
    },
};

use crate::{
    Verdict, fragments, maps, rewrite, send as ways, size,
    skb::{Failed, Skb},
    work::{Header, Way, Work},
};

/// Finds the way to another node for a packet. [`Verdict::REDIRECT`] if there is one.
#[inline(always)]
pub fn open(skb: Skb, way: &mut Way, datagram: &Datagram, to: &Address) -> Verdict {
    let Some(from) = maps::own_address(datagram.family) else { return Verdict::pass(Counter::NoRoute) };
    (way.from, way.to) = (from, *to);
    way.overhead = datagram.family.header_len();
    // A TCP packet that will be cut into parts is cut into smaller ones.
    let is_cut = skb.gso_size() != 0 && datagram.protocol == TCP;
    way.size = size::wire(skb, datagram) + if is_cut { 0 } else { way.overhead };
    ways::route(skb, way)
}

/// Encapsulates the packet and sends it.
#[inline(always)]
pub fn send(skb: Skb, way: &mut Way, datagram: &Datagram, counter: Counter) -> Verdict {
    match encapsulate(skb, datagram, &way.from, &way.to) {
        Ok(()) => {
            maps::count(counter);
            ways::redirect(way)
        }
        Err(Failed) => Verdict::drop(Counter::Failed),
    }
}

#[inline(never)]
fn encapsulate(skb: Skb, datagram: &Datagram, from: &Address, to: &Address) -> Result<(), Failed> {
    let length = datagram.family.header_len();
    let room = match datagram.family {
        Family::V4 => BPF_F_ADJ_ROOM_ENCAP_L3_IPV4,
        Family::V6 => BPF_F_ADJ_ROOM_ENCAP_L3_IPV6,
    };
    skb.adjust_room(length as i32, u64::from(room) | fixed(skb, datagram))?;
    match datagram.family {
        Family::V4 => {
            let length = skb.len();
            // Too long for its field, it will be cut into parts, which get their own lengths.
            let length = if length > 0xffff { 0 } else { length as u16 };
            skb.store_counted(0, &size::header_v4(from, to, datagram.family.encapsulated(), length))
        }
        Family::V6 => {
            let length = skb.len() - length;
            let length = if length > 0xffff { 0 } else { length as u16 };
            skb.store_counted(0, &size::header_v6(from, to, datagram.family.encapsulated(), length))
        }
    }
}

/// A packet of many datagrams is cut where they were put together, whatever comes around them.
#[inline(always)]
fn fixed(skb: Skb, datagram: &Datagram) -> u64 {
    if skb.gso_size() != 0 && datagram.protocol == UDP { u64::from(BPF_F_ADJ_ROOM_FIXED_GSO) } else { 0 }
}

/// Unpacks what another node has sent for a frontend, or from one; [`Verdict::REDIRECT`] if it did. What has
/// nothing to do with a frontend is somebody else's tunnel and passes.
#[inline(never)]
pub fn receive(skb: Skb, outer: &Datagram) -> Verdict {
    if maps::node(outer.destination) != Some(true) {
        return Verdict::PASS;
    }
    let Some(inner) = Header::Inner.place() else { return Verdict::PASS };
    if !packet::read(&skb, outer.payload, outer.family, Extent::Whole, inner)
        || !fragments::known(inner)
        || !is_ours(skb, inner)
    {
        return Verdict::PASS;
    }
    if maps::node(outer.source) != Some(false) {
        return Verdict::drop(Counter::Spoofed);
    }
    if skb.adjust_room(-(outer.payload as i32), fixed(skb, inner)).is_err() {
        return Verdict::drop(Counter::Failed);
    }
    maps::count(Counter::FromNode);
    Verdict::REDIRECT
}

/// Whether one end of a packet is a frontend, or one end of the packet it quotes.
#[inline(always)]
fn is_ours(skb: Skb, inner: &Datagram) -> bool {
    if matches!(inner.protocol, TCP | UDP) {
        return fragments::ports(skb, inner).is_some_and(|ports| has_frontend(inner, ports));
    }
    let Some(quoted) = Header::Quoted.place() else { return false };
    packet::quoted(&skb, inner, quoted).is_some_and(|ports| has_frontend(quoted, ports))
}

#[inline(never)]
fn has_frontend(datagram: &Datagram, ports: Ports) -> bool {
    let Datagram { family, source, destination, protocol, .. } = *datagram;
    maps::frontend(family, destination, ports.destination, protocol).is_some()
        || maps::frontend(family, source, ports.source, protocol).is_some()
}

/// An answer that has been unpacked, on its last way.
#[inline(always)]
pub fn onward(skb: Skb, work: &mut Work, datagram: &Datagram) -> Verdict {
    if datagram.hop_limit <= 1 {
        return Verdict::pass(Counter::HopLimit);
    }
    let found = ways::find(skb, datagram, &mut work.way, datagram.source, datagram.destination);
    if found != Verdict::REDIRECT {
        return found;
    }
    match rewrite::hop(skb, datagram) {
        Ok(()) => {
            maps::count(Counter::Reply);
            ways::redirect(&mut work.way)
        }
        Err(Failed) => Verdict::drop(Counter::Failed),
    }
}

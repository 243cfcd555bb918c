//! Reads what the north-south programs must know out of an IP packet: where its parts are, which flow it
//! belongs to.

use network_types::ip::{Ipv4Hdr, Ipv6Hdr};

use crate::{
    address::Address,
    packet::{Packet, words},
};

/// IPv4 in IP.
pub const IPIP: u8 = 4;
/// TCP.
pub const TCP: u8 = 6;
/// UDP.
pub const UDP: u8 = 17;
/// IPv6 in IP.
pub const IP6IP: u8 = 41;
/// ICMP for IPv4.
pub const ICMP: u8 = 1;
/// ICMP for IPv6.
pub const ICMPV6: u8 = 58;

/// TCP flags, as the header's 14th octet has them.
pub mod tcp_flag {
    /// No more data.
    pub const FIN: u8 = 1;
    /// Opens a connection.
    pub const SYN: u8 = 1 << 1;
    /// Ends it at once.
    pub const RST: u8 = 1 << 2;
    /// Acknowledges.
    pub const ACK: u8 = 1 << 4;
}

/// The fragment header of IPv6.
const FRAGMENT: u8 = 44;
/// "More fragments" in the word that has the offset.
const MORE_V4: u16 = 0x2000;
const MORE_V6: u16 = 1;

/// More extension headers than any real packet has; a bound that the verifier can count.
const MAX_EXTENSIONS: usize = 6;

/// An IP family.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Family {
    /// Octets of a header without options.
    #[inline]
    pub const fn header_len(self) -> u32 {
        match self {
            Self::V4 => Ipv4Hdr::LEN as u32,
            Self::V6 => Ipv6Hdr::LEN as u32,
        }
    }

    /// The protocol number of a packet of this family within another.
    #[inline]
    pub const fn encapsulated(self) -> u8 {
        match self {
            Self::V4 => IPIP,
            Self::V6 => IP6IP,
        }
    }
}

/// An IP header, with its options and extension headers.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Datagram {
    /// Its family.
    pub family: Family,
    /// Who sent it.
    pub source: Address,
    /// Whom it is for.
    pub destination: Address,
    /// Offset of the header from the packet's network header, in octets.
    pub start: u32,
    /// Offset of what follows, in octets.
    pub payload: u32,
    /// Offset of the end that the header says, in octets; what lies behind it is padding.
    pub end: u32,
    /// What follows.
    pub protocol: u8,
    /// Time to live, or hop limit.
    pub hop_limit: u8,
    /// Only part of a datagram.
    pub is_fragment: bool,
    /// Where this part begins in it, in octets; 0 for the first one, which has the ports, and for a whole datagram.
    pub fragment_offset: u16,
    /// What the parts of a datagram have in common; of a whole one, it means nothing.
    pub fragment_id: u32,
    /// Routers must not fragment it; always so with IPv6.
    pub dont_fragment: bool,
}

impl Datagram {
    /// Whether its source is one that a host can have: no router sends on what comes from another one (RFC 1812, 5.3.7;
    /// RFC 4291, 2.5.2, 2.5.3, 2.7), and nor does the kernel (`ip_route_input_slow`, `ip6_rcv`).
    #[inline(always)]
    pub fn has_sender(&self) -> bool {
        let [a, b, c, d] = self.source.words().map(u32::from_be);
        match self.family {
            // "This network", loopback, multicast and beyond.
            Family::V4 => !matches!(d >> 24, 0 | 127 | 224..),
            // Multicast; unspecified, loopback.
            Family::V6 => a >> 24 != 0xff && !(a == 0 && b == 0 && c == 0 && d <= 1),
        }
    }
}

/// How much of a packet is expected to be there.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Extent {
    /// All that the header says.
    Whole,
    /// Its beginning: what an ICMP error quotes.
    Beginning,
}

/// Reads the header at `start`. `false` if it makes no sense: not of that family, longer than the packet, with too
/// many extension headers, IPv6 with an address that is IPv4's; what is in `datagram` then means nothing.
///
/// A function of its own also in a program, where the stack is short, and the verifier has less to remember of what
/// lies in a map.
#[inline(never)]
pub fn read<P: Packet + ?Sized>(
    packet: &P,
    start: u32,
    family: Family,
    extent: Extent,
    datagram: &mut Datagram,
) -> bool {
    (datagram.family, datagram.start) = (family, start);
    let read = match family {
        Family::V4 => read_v4(packet, extent, datagram),
        Family::V6 => read_v6(packet, extent, datagram),
    };
    read.is_some()
}

#[inline(always)]
fn read_v4<P: Packet + ?Sized>(packet: &P, extent: Extent, datagram: &mut Datagram) -> Option<()> {
    let start = datagram.start;
    let header: Ipv4Hdr = packet.load(start)?;
    let length = u32::from(header.vihl & 0xf) * 4;
    if header.vihl >> 4 != 4 || length < Ipv4Hdr::LEN as u32 {
        return None;
    }
    let total = u32::from(u16::from_be_bytes(header.tot_len));
    if extent == Extent::Whole && (total < length || !reaches(packet, start + total)) {
        return None;
    }
    let fragment = u16::from_be_bytes(header.frags);
    (datagram.is_fragment, datagram.fragment_offset) = part(fragment << 3, fragment & MORE_V4 != 0);
    datagram.fragment_id = u16::from_be_bytes(header.id).into();
    datagram.source = Address::from_v4_be(u32::from_ne_bytes(header.src_addr));
    datagram.destination = Address::from_v4_be(u32::from_ne_bytes(header.dst_addr));
    (datagram.payload, datagram.end) = (start + length, start + total);
    datagram.protocol = header.proto;
    datagram.hop_limit = header.ttl;
    datagram.dont_fragment = fragment & 0x4000 != 0;
    Some(())
}

#[inline(always)]
fn read_v6<P: Packet + ?Sized>(packet: &P, extent: Extent, datagram: &mut Datagram) -> Option<()> {
    let start = datagram.start;
    let [version, _, _, _, high, low, next, hop_limit]: [u8; 8] = packet.load(start)?;
    if version >> 4 != 6 {
        return None;
    }
    datagram.source = Address::from_v6_be(words(packet.load(start + 8)?));
    datagram.destination = Address::from_v6_be(words(packet.load(start + 24)?));
    // Never on the wire (`ip6_rcv`); here, such an address is an IPv4 packet's.
    if datagram.source.v4_be().is_some() || datagram.destination.v4_be().is_some() {
        return None;
    }
    datagram.hop_limit = hop_limit;
    datagram.dont_fragment = true;
    (datagram.is_fragment, datagram.fragment_offset) = (false, 0);
    let mut payload = start + Ipv6Hdr::LEN as u32;
    let length = u32::from(u16::from_be_bytes([high, low]));
    if extent == Extent::Whole && !reaches(packet, payload + length) {
        return None;
    }
    // One of segments that add up to more than the field can say has none there (`ipv6_gro_complete`).
    datagram.end = if length == 0 { u32::MAX } else { payload + length };
    let mut protocol = next;
    for _ in 0..MAX_EXTENSIONS {
        // What follows the header of a later fragment is in the middle of something.
        if !is_extension(protocol) || datagram.fragment_offset != 0 {
            break;
        }
        let [next, length, high, low]: [u8; 4] = packet.load(payload)?;
        payload += match protocol {
            51 => (u32::from(length) + 2) * 4,
            FRAGMENT if datagram.is_fragment => return None,
            FRAGMENT => {
                let word = u16::from_be_bytes([high, low]);
                (datagram.is_fragment, datagram.fragment_offset) = part(word & !7, word & MORE_V6 != 0);
                datagram.fragment_id = u32::from_be_bytes(packet.load(payload + 4)?);
                8
            }
            _ => (u32::from(length) + 1) * 8,
        };
        protocol = next;
    }
    (datagram.payload, datagram.protocol) = (payload, protocol);
    (datagram.fragment_offset != 0 || !is_extension(protocol)).then_some(())
}

/// Whether it is only part of a datagram, by its offset in octets and "more fragments", and the offset. A datagram
/// that has a fragment header but neither is whole (RFC 6946).
#[inline(always)]
const fn part(offset: u16, more: bool) -> (bool, u16) {
    (more || offset != 0, offset)
}

/// Hop-by-hop, routing, destination options; authentication; fragment.
#[inline(always)]
const fn is_extension(protocol: u8) -> bool {
    matches!(protocol, 0 | 43 | 60 | 51 | FRAGMENT)
}

/// Whether the packet has `end` octets from its network header on.
#[inline(always)]
fn reaches<P: Packet + ?Sized>(packet: &P, end: u32) -> bool {
    packet.load::<[u8; 1]>(end - 1).is_some()
}

/// Ports, host byte order, and a TCP segment's flags.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Ports {
    /// Of who sent it.
    pub source: u16,
    /// Of whom it is for.
    pub destination: u16,
    /// [`tcp_flag`]; 0 for UDP.
    pub flags: u8,
}

impl Ports {
    /// Whether it opens a connection: SYN without ACK.
    #[inline]
    pub const fn opens(&self) -> bool {
        self.flags & (tcp_flag::SYN | tcp_flag::ACK) == tcp_flag::SYN
    }

    /// Whether it has the SYN of either side, and so says how large a segment it takes.
    #[inline]
    pub const fn is_syn(&self) -> bool {
        self.flags & tcp_flag::SYN != 0
    }

    /// Whether it ends one.
    #[inline]
    pub const fn closes(&self) -> bool {
        self.flags & (tcp_flag::FIN | tcp_flag::RST) != 0
    }
}

/// Reads the ports of TCP and UDP, `None` if their header does not fit. Not of a later fragment, which has none.
#[inline(always)]
pub fn ports<P: Packet + ?Sized>(packet: &P, datagram: &Datagram) -> Option<Ports> {
    let room = datagram.end.saturating_sub(datagram.payload);
    // The whole header: what is rewritten lies in it.
    let flags = if datagram.protocol == TCP && room >= 20 {
        packet.load::<[u8; 20]>(datagram.payload)?[13]
    } else if datagram.protocol == UDP && room >= 8 {
        packet.load::<[u8; 8]>(datagram.payload)?;
        0
    } else {
        return None;
    };
    let quoted = quoted_ports(packet, datagram)?;
    Some(Ports { flags, ..quoted })
}

/// The same for a quoted packet, of which only eight octets need be there; without flags.
#[inline(always)]
pub fn quoted_ports<P: Packet + ?Sized>(packet: &P, datagram: &Datagram) -> Option<Ports> {
    let [a, b, c, d]: [u8; 4] = packet.load(datagram.payload)?;
    Some(Ports { source: u16::from_be_bytes([a, b]), destination: u16::from_be_bytes([c, d]), flags: 0 })
}

/// Reads the packet that an ICMP error quotes into `inside`, and its ports, if this is one and quotes TCP or UDP.
#[inline(always)]
pub fn quoted<P: Packet + ?Sized>(packet: &P, datagram: &Datagram, inside: &mut Datagram) -> Option<Ports> {
    let [kind]: [u8; 1] = packet.load(datagram.payload)?;
    let is_error = match (datagram.family, datagram.protocol) {
        // Destination unreachable, time exceeded, parameter problem.
        (Family::V4, ICMP) => matches!(kind, 3 | 11 | 12),
        (Family::V6, ICMPV6) => matches!(kind, 1..=4),
        _ => false,
    };
    if !is_error
        || !read(packet, datagram.payload + 8, datagram.family, Extent::Beginning, inside)
        || inside.fragment_offset != 0
        || !matches!(inside.protocol, TCP | UDP)
    {
        return None;
    }
    quoted_ports(packet, inside)
}

#[cfg(test)]
mod tests;

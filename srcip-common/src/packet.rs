//! Reads a TCP segment's addresses, ports and flags out of an IP packet.
//!
//! Written against a trait, so that the same code runs in the kernel over an `skb`, which may not be
//! linear, and in tests over a slice.

use network_types::{
    ip::{Ipv4Hdr, Ipv6Hdr},
    tcp::TcpHdr,
};

use crate::address::Address;

/// `ETH_P_IP`, host byte order.
pub const ETH_P_IP: u16 = 0x0800;
/// `ETH_P_IPV6`, host byte order.
pub const ETH_P_IPV6: u16 = 0x86dd;

const TCP: u8 = 6;

/// IPv6 extension headers by number: <https://www.iana.org/assignments/ipv6-parameters>.
mod extension {
    pub(super) const HOP_BY_HOP: u8 = 0;
    pub(super) const ROUTING: u8 = 43;
    pub(super) const FRAGMENT: u8 = 44;
    pub(super) const AUTHENTICATION: u8 = 51;
    pub(super) const DESTINATION: u8 = 60;
}

/// More extension headers than any real packet has; a bound that the verifier can count.
const MAX_EXTENSIONS: usize = 6;

const FIN: u8 = 1;
const SYN: u8 = 1 << 1;
const RST: u8 = 1 << 2;
const ACK: u8 = 1 << 4;

/// A header that any bytes of its size are a valid value of.
///
/// # Safety
///
/// The type must consist of integers and arrays of them only, with alignment 1.
pub unsafe trait Header: Copy {}
// SAFETY: network-types declares these `repr(C)` out of `u8` and arrays of `u8`.
unsafe impl Header for Ipv4Hdr {}
// SAFETY: as above.
unsafe impl Header for Ipv6Hdr {}
// SAFETY: as above; its bit field wraps an array of `u8`.
unsafe impl Header for TcpHdr {}
// SAFETY: an array of bytes.
unsafe impl<const N: usize> Header for [u8; N] {}

/// An IP packet from its network header on.
pub trait Packet {
    /// Copies a header out at `offset` bytes from the network header, `None` if the packet ends before.
    fn load<H: Header>(&self, offset: u32) -> Option<H>;
}

impl Packet for [u8] {
    fn load<H: Header>(&self, offset: u32) -> Option<H> {
        let start = offset as usize;
        let bytes = self.get(start..start.checked_add(size_of::<H>())?)?;
        // SAFETY: `bytes` is exactly as long as `H`, which takes any bytes and has no alignment.
        Some(unsafe { bytes.as_ptr().cast::<H>().read_unaligned() })
    }
}

/// One end of a connection; the port in host byte order.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Endpoint {
    /// Its address.
    pub address: Address,
    /// Its port, host byte order.
    pub port: u16,
}

/// A TCP segment that can be told from its packet.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Segment {
    /// Who sent it.
    pub source: Endpoint,
    /// Whom it is for.
    pub destination: Endpoint,
    /// Only the first fragment of it; the rest comes without ports.
    pub is_fragment: bool,
    flags: u8,
}

impl Segment {
    /// A connection attempt: SYN without ACK, RST or FIN, as `tcp_rcv_state_process` in LISTEN wants.
    #[inline]
    pub const fn is_syn(&self) -> bool {
        self.flags & (SYN | ACK | RST | FIN) == SYN
    }
}

/// What a packet turned out to be.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Parsed {
    /// A TCP segment, or the first fragment of one.
    Segment(Segment),
    /// Not TCP, a later fragment, or nothing that was understood: the kernel's business.
    Other,
    /// Perhaps a segment, made so that it cannot be told: the first fragment ends inside the TCP header
    /// (RFC 1858, "tiny fragment attack"), or there are more extension headers than this looks at. No
    /// stack sends these; let through, a SYN would reach the application past the proxy.
    Disguised,
}

/// Parses an IP packet of `ethertype` (host byte order).
#[inline]
pub fn parse<P: Packet + ?Sized>(packet: &P, ethertype: u16) -> Parsed {
    let parsed = match ethertype {
        ETH_P_IP => parse_v4(packet),
        ETH_P_IPV6 => parse_v6(packet),
        _ => None,
    };
    parsed.unwrap_or(Parsed::Other)
}

#[inline]
fn parse_v4<P: Packet + ?Sized>(packet: &P) -> Option<Parsed> {
    let header: Ipv4Hdr = packet.load(0)?;
    if header.vihl >> 4 != 4 || header.proto != TCP {
        return None;
    }
    let ihl = u32::from(header.vihl & 0xf) * 4;
    if ihl < Ipv4Hdr::LEN as u32 {
        return None;
    }
    let fragment = u16::from_be_bytes(header.frags);
    let fragment = Fragment { offset: fragment & 0x1fff, more: fragment & 0x2000 != 0 };
    let source = Address::from_v4_be(u32::from_ne_bytes(header.src_addr));
    let destination = Address::from_v4_be(u32::from_ne_bytes(header.dst_addr));
    parse_tcp(packet, ihl, fragment, source, destination)
}

#[inline]
fn parse_v6<P: Packet + ?Sized>(packet: &P) -> Option<Parsed> {
    let header: Ipv6Hdr = packet.load(0)?;
    if header.vcf[0] >> 4 != 6 {
        return None;
    }
    let mut next = header.next_hdr;
    let mut offset = Ipv6Hdr::LEN as u32;
    let mut fragment = Fragment { offset: 0, more: false };
    // One round more, to find TCP behind the last one.
    for _ in 0..=MAX_EXTENSIONS {
        if next == TCP {
            let source = Address::from_v6_be(words(header.src_addr));
            let destination = Address::from_v6_be(words(header.dst_addr));
            return parse_tcp(packet, offset, fragment, source, destination);
        }
        if ![
            extension::HOP_BY_HOP,
            extension::ROUTING,
            extension::DESTINATION,
            extension::AUTHENTICATION,
            extension::FRAGMENT,
        ]
        .contains(&next)
        {
            return None;
        }
        let Some([following, length, high, low]) = packet.load::<[u8; 4]>(offset) else {
            // The rest of the chain comes in another fragment, and with it, perhaps, a SYN.
            return fragment.more.then_some(Parsed::Disguised);
        };
        // The second octet is the length: in 8 octets without the first 8 for options and routing, in 4
        // octets without the first 8 for the authentication header, reserved for the fragment header.
        offset += match next {
            extension::AUTHENTICATION => (u32::from(length) + 2) * 4,
            extension::FRAGMENT => {
                let bits = u16::from_be_bytes([high, low]);
                fragment = Fragment { offset: bits >> 3, more: bits & 1 != 0 };
                if fragment.offset != 0 {
                    // What follows is the middle of some payload, not a header.
                    return None;
                }
                8
            }
            _ => (u32::from(length) + 1) * 8,
        };
        next = following;
    }
    Some(Parsed::Disguised)
}

/// The address as the maps have it: its octets in the order of the wire.
#[inline(always)]
pub(crate) fn words(octets: [u8; 16]) -> [u32; 4] {
    let [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p] = octets;
    [
        u32::from_ne_bytes([a, b, c, d]),
        u32::from_ne_bytes([e, f, g, h]),
        u32::from_ne_bytes([i, j, k, l]),
        u32::from_ne_bytes([m, n, o, p]),
    ]
}

/// A packet's place in a fragmented datagram; `offset` in units of 8 octets.
struct Fragment {
    offset: u16,
    more: bool,
}

#[inline]
fn parse_tcp<P: Packet + ?Sized>(
    packet: &P,
    offset: u32,
    fragment: Fragment,
    source: Address,
    destination: Address,
) -> Option<Parsed> {
    if fragment.offset != 0 {
        return None;
    }
    let Some(header) = packet.load::<TcpHdr>(offset) else {
        return fragment.more.then_some(Parsed::Disguised);
    };
    // network-types numbers the flag bits for big-endian bit fields; the 14th octet is plainer.
    let [flags] = packet.load::<[u8; 1]>(offset + 13)?;
    Some(Parsed::Segment(Segment {
        source: Endpoint { address: source, port: u16::from_be_bytes(header.source) },
        destination: Endpoint { address: destination, port: u16::from_be_bytes(header.dest) },
        is_fragment: fragment.more,
        flags,
    }))
}

#[cfg(test)]
mod tests;

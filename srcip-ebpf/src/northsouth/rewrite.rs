//! Gives a packet another source or destination, checksums included.
//!
//! What the hardware has computed over a packet (`CHECKSUM_COMPLETE`) stays right: in IPv4, the header's own
//! checksum makes up for a change of address, and the helper for that of the transport's checksum; in IPv6 there
//! is no header checksum, so the address is written in a way that counts. A checksum that the hardware is still
//! to compute (`CHECKSUM_PARTIAL`) is the helper's business.

use aya_ebpf::bindings::{BPF_F_MARK_MANGLED_0, BPF_F_PSEUDO_HDR};
use srcip_common::{
    address::Address,
    northsouth::packet::{Datagram, Family, ICMPV6, TCP, UDP},
};

use crate::skb::{Result, Skb, difference};

const SIZE_OF_ADDRESS: u64 = 4;
const SIZE_OF_PORT: u64 = 2;
const V4_CHECKSUM: u32 = 10;

/// Which end of a packet.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum End {
    Source,
    Destination,
}

impl End {
    #[inline(always)]
    pub fn address(self, datagram: &Datagram) -> Address {
        match self {
            Self::Source => datagram.source,
            Self::Destination => datagram.destination,
        }
    }

    #[inline(always)]
    pub fn address_offset(self, datagram: &Datagram) -> u32 {
        datagram.start
            + match (datagram.family, self) {
                (Family::V4, Self::Source) => 12,
                (Family::V4, Self::Destination) => 16,
                (Family::V6, Self::Source) => 8,
                (Family::V6, Self::Destination) => 24,
            }
    }

    #[inline(always)]
    pub fn port_offset(self, datagram: &Datagram) -> u32 {
        datagram.payload
            + match self {
                Self::Source => 0,
                Self::Destination => 2,
            }
    }
}

/// Where the checksum lies that covers the addresses, and the flags of its helper. In a datagram's first fragment,
/// for all of them.
#[inline(always)]
fn checksum(datagram: &Datagram) -> Option<(u32, u64)> {
    if datagram.fragment_offset != 0 {
        return None;
    }
    let pseudo = u64::from(BPF_F_PSEUDO_HDR);
    match datagram.protocol {
        TCP => Some((datagram.payload + 16, pseudo)),
        // 0 means "none", and stays so.
        UDP => Some((datagram.payload + 6, pseudo | u64::from(BPF_F_MARK_MANGLED_0))),
        ICMPV6 => Some((datagram.payload + 2, pseudo)),
        // ICMP's covers no address.
        _ => None,
    }
}

/// Writes an address.
#[inline(never)]
pub fn address(skb: Skb, datagram: &Datagram, end: End, to: &Address) -> Result<()> {
    let from = end.address(datagram).words();
    let to = to.words();
    let offset = end.address_offset(datagram);
    match datagram.family {
        Family::V4 => {
            if let Some((at, flags)) = checksum(datagram) {
                skb.replace_l4(at, from[3], to[3], flags | SIZE_OF_ADDRESS)?;
            }
            skb.replace_l3(datagram.start + V4_CHECKSUM, from[3], to[3], SIZE_OF_ADDRESS)?;
            skb.store(offset, &to[3])
        }
        Family::V6 => {
            if let Some((at, flags)) = checksum(datagram) {
                skb.replace_l4(at, 0, difference(&from, &to), flags)?;
            }
            skb.store_counted(offset, &to)
        }
    }
}

/// Writes a port of TCP or UDP, host byte order, where there is one.
#[inline(always)]
pub fn port(skb: Skb, datagram: &Datagram, end: End, from: u16, to: u16) -> Result<()> {
    if from == to || datagram.fragment_offset != 0 {
        return Ok(());
    }
    let (from, to) = (from.to_be(), to.to_be());
    if let Some((at, flags)) = checksum(datagram) {
        let flags = (flags & !u64::from(BPF_F_PSEUDO_HDR)) | SIZE_OF_PORT;
        skb.replace_l4(at, from.into(), to.into(), flags)?;
    }
    skb.store(end.port_offset(datagram), &to)
}

/// Takes one from the hop limit, as every router does. It is above 1.
#[inline(always)]
pub fn hop(skb: Skb, datagram: &Datagram) -> Result<()> {
    let hops = datagram.hop_limit.wrapping_sub(1);
    match datagram.family {
        Family::V4 => {
            let word = |ttl| u32::from(u16::from_ne_bytes([ttl, datagram.protocol]));
            skb.replace_l3(
                datagram.start + V4_CHECKSUM,
                word(datagram.hop_limit),
                word(hops),
                size_of::<u16>() as u64,
            )?;
            skb.store(datagram.start + 8, &hops)
        }
        Family::V6 => skb.store_counted(datagram.start + 7, &hops),
    }
}

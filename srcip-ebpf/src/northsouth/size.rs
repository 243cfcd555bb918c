//! What does not fit: segments are made smaller from the start, the senders of other packets are told.

use aya_ebpf::{
    EbpfContext as _,
    bindings::TC_ACT_REDIRECT,
    helpers::generated::{bpf_check_mtu, bpf_csum_diff, bpf_redirect, bpf_skb_change_tail},
};
use srcip_common::{
    address::Address,
    northsouth::{
        counter::Counter,
        packet::{Datagram, Family, ICMP, ICMPV6, TCP},
    },
    packet::Packet as _,
};

use crate::{
    Verdict, maps,
    skb::{ETHERNET, Failed, Result, Skb, done},
};

/// Of IPv6.
const FRAGMENT_HEADER: u32 = 8;
const TCP_HEADER: u32 = 20;
const UDP_HEADER: u32 = 8;
const ICMP_HEADER: u32 = 8;

/// More TCP options than a SYN has; a bound that the verifier can count.
const MAX_OPTIONS: u32 = 10;

/// Octets of IP that the packet is on the wire; of one that will be cut into parts, those of a part.
#[inline(always)]
pub fn wire(skb: Skb, datagram: &Datagram) -> u32 {
    let part = skb.gso_size();
    if part == 0 {
        return skb.len();
    }
    let transport = if datagram.protocol == TCP {
        skb.load::<[u8; 1]>(datagram.payload + 12).map_or(TCP_HEADER, |[word]| u32::from(word >> 4) * 4)
    } else {
        UDP_HEADER
    };
    datagram.payload - datagram.start + transport + part
}

/// Lowers the maximum segment size that a SYN announces to what `device` takes once it is encapsulated. One
/// without the option announces 536 octets, which fits anyway.
#[inline(never)]
pub fn clamp(skb: Skb, datagram: &Datagram, device: u32) {
    let mut mtu = 0_u32;
    // SAFETY: verified: four bytes on the stack.
    unsafe { bpf_check_mtu(skb.ctx().as_ptr().cast(), device, &raw mut mtu, 0, 0) };
    let header = datagram.family.header_len();
    let most = mtu.saturating_sub(2 * header + TCP_HEADER);
    let Some((offset, announced)) = segment_size(skb, datagram) else { return };
    if most == 0 || u32::from(announced) <= most {
        return;
    }
    let (mut from, mut to) = (announced.to_be(), (most as u16).to_be());
    if skb.store(offset, &to).is_err() {
        return;
    }
    // A checksum adds up words; this one lies across two.
    if (offset - datagram.payload) & 1 != 0 {
        (from, to) = (from.swap_bytes(), to.swap_bytes());
    }
    const SIZE: u64 = 2;
    if skb.replace_l4(datagram.payload + 16, from.into(), to.into(), SIZE).is_ok() {
        maps::count(Counter::MssClamped);
    }
}

/// Where a SYN says its maximum segment size, and what it says.
#[inline(always)]
fn segment_size(skb: Skb, datagram: &Datagram) -> Option<(u32, u16)> {
    const END: u8 = 0;
    const NOTHING: u8 = 1;
    const SEGMENT_SIZE: u8 = 2;
    let [word]: [u8; 1] = skb.load(datagram.payload + 12)?;
    let end = datagram.payload + u32::from(word >> 4) * 4;
    let mut at = datagram.payload + TCP_HEADER;
    for _ in 0..MAX_OPTIONS {
        if at + 4 > end {
            return None;
        }
        let [kind, length, high, low]: [u8; 4] = skb.load(at)?;
        match kind {
            END => return None,
            NOTHING => at += 1,
            SEGMENT_SIZE if length == 4 => return Some((at + 2, u16::from_be_bytes([high, low]))),
            _ if length < 2 => return None,
            _ => at += u32::from(length),
        }
    }
    None
}

/// Who is told that a packet is too big.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Sender {
    Client,
    /// On this host: the stack would send its fragments on with the pod's address, so it has to make smaller ones, also
    /// where routers might.
    Pod,
}

/// Tells the sender that its packet, still as it came, must have at most `mtu` octets. One that may be
/// fragmented is left to the stack, and so is one with options, which could not be quoted in a fixed size, and a
/// fragment without ports, by which nobody would know it.
#[inline(always)]
pub fn tell(skb: Skb, datagram: &Datagram, mtu: u32, sender: Sender) -> Verdict {
    let is_fragment_v6 = datagram.is_fragment && datagram.family == Family::V6;
    let header = datagram.family.header_len() + if is_fragment_v6 { FRAGMENT_HEADER } else { 0 };
    let may_be_cut = !datagram.dont_fragment && sender == Sender::Client;
    if may_be_cut || datagram.fragment_offset != 0 || datagram.start != 0 || datagram.payload != header {
        return Verdict::pass(Counter::TooBig);
    }
    let answered = match (datagram.family, datagram.protocol) {
        (Family::V6, _) if is_fragment_v6 => answer_v6::<14>(skb, datagram, mtu),
        (Family::V4, TCP) => answer_v4::<10>(skb, datagram, mtu),
        (Family::V4, _) => answer_v4::<7>(skb, datagram, mtu),
        (Family::V6, TCP) => answer_v6::<15>(skb, datagram, mtu),
        (Family::V6, _) => answer_v6::<12>(skb, datagram, mtu),
    };
    match answered {
        Ok(()) => {
            maps::count(Counter::TooBigTold);
            // SAFETY: takes a device's number, of one that is there: the packet came in by it.
            let code = unsafe { bpf_redirect(skb.device(), 0) };
            if code == i64::from(TC_ACT_REDIRECT) {
                Verdict::REDIRECT
            } else {
                Verdict::drop(Counter::Failed)
            }
        }
        Err(Failed) => Verdict::drop(Counter::Failed),
    }
}

/// Turns the packet into an ICMP error that quotes its first `QUOTE` words.
#[inline(never)]
fn answer_v4<const QUOTE: usize>(skb: Skb, datagram: &Datagram, mtu: u32) -> Result<()> {
    let quote = cut::<QUOTE>(skb, datagram)?;
    // Destination unreachable, fragmentation needed.
    let kind = u32::from_be_bytes([3, 4, 0, 0]);
    let sum = add(&quote, add(&[kind.to_be(), mtu.to_be()], 0));
    let length = Family::V4.header_len() + ICMP_HEADER + 4 * QUOTE as u32;
    let header = header_v4(&datagram.destination, &datagram.source, ICMP, length as u16);
    skb.store_counted(0, &header)?;
    skb.store_counted(Family::V4.header_len(), &[(kind | u32::from(checksum(sum))).to_be(), mtu.to_be()])
}

#[inline(never)]
fn answer_v6<const QUOTE: usize>(skb: Skb, datagram: &Datagram, mtu: u32) -> Result<()> {
    let quote = cut::<QUOTE>(skb, datagram)?;
    // Packet too big.
    let kind = u32::from_be_bytes([2, 0, 0, 0]);
    let length = ICMP_HEADER + 4 * QUOTE as u32;
    let pseudo = [length.to_be(), u32::from(ICMPV6).to_be(), kind.to_be(), mtu.to_be()];
    let sum = add(&quote, add(&pseudo, 0));
    let sum = add(&datagram.destination.words(), add(&datagram.source.words(), sum));
    let header = header_v6(&datagram.destination, &datagram.source, ICMPV6, length as u16);
    skb.store_counted(0, &header)?;
    skb.store_counted(Family::V6.header_len(), &[(kind | u32::from(checksum(sum))).to_be(), mtu.to_be()])
}

/// Cuts the packet to its first words, which are returned, makes room for the error in front, and turns the
/// Ethernet header around.
#[inline(always)]
fn cut<const QUOTE: usize>(skb: Skb, datagram: &Datagram) -> Result<[u32; QUOTE]> {
    let length = ETHERNET + 4 * QUOTE as u32;
    // SAFETY: verified: the packet as the program got it.
    done(match unsafe { bpf_skb_change_tail(skb.ctx().as_ptr().cast(), length, 0) } {
        0 => Ok(()),
        error => Err(error),
    })?;
    let quote = done(skb.ctx().load(ETHERNET as usize))?;
    let [to, from]: [[u8; 6]; 2] = done(skb.ctx().load(0))?;
    done(skb.ctx().store(0, &[from, to], 0))?;
    skb.adjust_room((datagram.family.header_len() + ICMP_HEADER) as i32, 0)?;
    Ok(quote)
}

/// An IPv4 header of a packet that is not to be fragmented.
#[inline(always)]
pub fn header_v4(from: &Address, to: &Address, protocol: u8, length: u16) -> [u32; 5] {
    const DONT_FRAGMENT: u32 = 0x4000;
    let (from, to) = (from.words()[3], to.words()[3]);
    let ttl = u32::from_be_bytes([64, protocol, 0, 0]);
    let mut header =
        [(0x4500_0000 | u32::from(length)).to_be(), DONT_FRAGMENT.to_be(), ttl.to_be(), from, to];
    header[2] = (ttl | u32::from(checksum(add(&header, 0)))).to_be();
    header
}

/// An IPv6 header.
#[inline(always)]
pub fn header_v6(from: &Address, to: &Address, protocol: u8, length: u16) -> [u32; 10] {
    let ([a, b, c, d], [e, f, g, h]) = (from.words(), to.words());
    let second = (u32::from(length) << 16) | (u32::from(protocol) << 8) | 64;
    [0x6000_0000_u32.to_be(), second.to_be(), a, b, c, d, e, f, g, h]
}

/// Adds up the words of a checksum.
#[inline(always)]
fn add<const N: usize>(words: &[u32; N], sum: u32) -> u32 {
    let size = 4 * N as u32;
    // SAFETY: verified: that long, and only read; nothing is taken away.
    unsafe { bpf_csum_diff(core::ptr::null_mut(), 0, words.as_ptr().cast_mut(), size, sum) as u32 }
}

/// The checksum of what has been added up, host byte order.
#[inline(always)]
fn checksum(sum: u32) -> u16 {
    let sum = (sum & 0xffff) + (sum >> 16);
    let sum = (sum & 0xffff) + (sum >> 16);
    u16::from_be(!(sum as u16))
}

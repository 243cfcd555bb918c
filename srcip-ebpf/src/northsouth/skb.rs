//! The packet: all helper calls of the north-south programs are here, in [`crate::send`] and [`crate::size`].
//!
//! Offsets are in octets from the IP header, as [`packet`](srcip_common::northsouth::packet) gives them. The
//! devices have Ethernet headers: user space attaches to no others.

use core::ffi::{c_long, c_void};

use aya_ebpf::{
    bindings::{__sk_buff, BPF_F_RECOMPUTE_CSUM, bpf_adj_room_mode::BPF_ADJ_ROOM_MAC},
    helpers::generated::{bpf_csum_diff, bpf_skb_load_bytes},
    programs::TcContext,
};
use srcip_common::{
    northsouth::packet::Family,
    packet::{ETH_P_IP, ETH_P_IPV6, Header, Packet},
};
use srcip_ebpf::sys::field;

/// Octets of an Ethernet header.
pub const ETHERNET: u32 = 14;

/// A packet on its way through a device, linear or not.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub struct Skb(*mut __sk_buff);

/// A helper did not do what it was asked: out of memory, or a packet that it cannot change.
pub struct Failed;

pub type Result<T> = core::result::Result<T, Failed>;

#[inline(always)]
pub fn done<T>(result: core::result::Result<T, c_long>) -> Result<T> {
    result.map_err(|_| Failed)
}

impl Skb {
    #[inline(always)]
    pub fn new(ctx: &TcContext) -> Self {
        Self(ctx.skb.skb)
    }

    /// The program's context, for helpers.
    #[inline(always)]
    pub fn ctx(self) -> TcContext {
        TcContext::new(self.0)
    }

    /// Its family, `None` if it is no IP packet, or one of another VLAN.
    #[inline(always)]
    pub fn family(self) -> Option<Family> {
        if field!(self.0, vlan_present) != 0 {
            return None;
        }
        // The kernel keeps this in network byte order.
        match u16::from_be(field!(self.0, protocol) as u16) {
            ETH_P_IP => Some(Family::V4),
            ETH_P_IPV6 => Some(Family::V6),
            _ => None,
        }
    }

    /// Octets from the IP header on.
    #[inline(always)]
    pub fn len(self) -> u32 {
        field!(self.0, len).wrapping_sub(ETHERNET)
    }

    /// Octets of each part that a packet made of many will be cut into; 0 if it is just one.
    #[inline(always)]
    pub fn gso_size(self) -> u32 {
        field!(self.0, gso_size)
    }

    /// The device it came in by.
    #[inline(always)]
    pub fn device(self) -> u32 {
        field!(self.0, ifindex)
    }

    /// Writes, and leaves the packet's checksum, as the hardware may have computed it, as it is: something else
    /// makes up for the change.
    #[inline(always)]
    pub fn store<T>(self, offset: u32, value: &T) -> Result<()> {
        done(self.ctx().store((ETHERNET + offset) as usize, value, 0))
    }

    /// Writes, and has the packet's checksum follow.
    #[inline(always)]
    pub fn store_counted<T>(self, offset: u32, value: &T) -> Result<()> {
        done(self.ctx().store((ETHERNET + offset) as usize, value, BPF_F_RECOMPUTE_CSUM.into()))
    }

    /// Updates the checksum of an IPv4 header, at `offset`, for a change of `size` octets.
    #[inline(always)]
    pub fn replace_l3(self, offset: u32, from: u32, to: u32, size: u64) -> Result<()> {
        done(self.ctx().l3_csum_replace((ETHERNET + offset) as usize, from.into(), to.into(), size))
    }

    /// Updates the checksum of what follows the IP header.
    #[inline(always)]
    pub fn replace_l4(self, offset: u32, from: u32, to: u32, flags: u64) -> Result<()> {
        done(self.ctx().l4_csum_replace((ETHERNET + offset) as usize, from.into(), to.into(), flags))
    }

    /// Makes room between the Ethernet and the IP header, or takes it away.
    #[inline(always)]
    pub fn adjust_room(self, difference: i32, flags: u64) -> Result<()> {
        done(self.ctx().skb.adjust_room(difference, BPF_ADJ_ROOM_MAC, flags))
    }
}

/// The difference of the checksums of two lists of words.
#[inline(always)]
pub fn difference<const N: usize>(from: &[u32; N], to: &[u32; N]) -> u32 {
    let size = 4 * N as u32;
    // SAFETY: verified: both are that long, and only read.
    unsafe { bpf_csum_diff(from.as_ptr().cast_mut(), size, to.as_ptr().cast_mut(), size, 0) as u32 }
}

impl Packet for Skb {
    /// Not by `bpf_skb_load_bytes_relative`, which sees no further than the linear part.
    #[inline(always)]
    fn load<H: Header>(&self, offset: u32) -> Option<H> {
        let mut header = core::mem::MaybeUninit::<H>::uninit();
        let to = header.as_mut_ptr().cast::<c_void>();
        // SAFETY: verified: the destination is on the stack and as long as said.
        let error =
            unsafe { bpf_skb_load_bytes(self.0.cast(), ETHERNET + offset, to, size_of::<H>() as u32) };
        // SAFETY: the helper filled all of it, and any bytes are a valid header.
        (error == 0).then(|| unsafe { header.assume_init() })
    }
}

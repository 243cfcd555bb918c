//! What the programs have in hand for one packet: it lies in a map of each processor's own, because the stack of
//! a program has room for little of it.

use aya_ebpf::{
    bindings::{bpf_fib_lookup, bpf_redir_neigh},
    macros::map,
    maps::PerCpuArray,
};
use srcip_common::{
    address::Address,
    northsouth::{
        Affinity, AffinityKey, Flow, FlowKey, Frontend,
        packet::{Datagram, Ports},
    },
};

/// One packet's things.
#[repr(C)]
pub struct Work {
    pub request: Request,
    pub target: Target,
    pub way: Way,
    pub key: FlowKey,
    pub flow: Flow,
    pub affinity_key: AffinityKey,
    pub affinity: Affinity,
}

/// A packet for a frontend.
#[repr(C)]
pub struct Request {
    pub key: FlowKey,
    pub ports: Ports,
    pub frontend: Frontend,
    /// The node that sent it here; unspecified: it entered the cluster here.
    pub from: Address,
}

/// Where a packet goes.
#[repr(C)]
pub struct Target {
    pub address: Address,
    pub port: u16,
    /// The node it is on; unspecified: this one.
    pub node: Address,
    /// Answers come back through this node.
    pub tunnel_return: bool,
}

/// A way from somewhere to somewhere: first what is asked, then what was found.
#[repr(C)]
pub struct Way {
    pub from: Address,
    pub to: Address,
    /// Octets that must fit.
    pub size: u32,
    /// How many of them the sender does not know of.
    pub overhead: u32,
    pub device: u32,
    pub neighbour: bpf_redir_neigh,
    pub fib: bpf_fib_lookup,
}

/// The packet itself, what it encapsulates, what it quotes.
#[map]
static NS_DATAGRAMS: PerCpuArray<Datagram> = PerCpuArray::with_max_entries(3, 0);

/// A place for an IP header that has been read.
#[derive(Clone, Copy)]
pub enum Header {
    Outer,
    Inner,
    Quoted,
}

impl Header {
    /// This processor's. Each is asked for by one function at a time.
    #[inline(always)]
    pub fn place(self) -> Option<&'static mut Datagram> {
        // SAFETY: as in `get`.
        NS_DATAGRAMS.get_ptr_mut(self as u32).map(|datagram| unsafe { &mut *datagram })
    }
}

#[map]
static NS_WORK: PerCpuArray<Work> = PerCpuArray::with_max_entries(1, 0);

/// This processor's. Nothing else uses it until the program ends: both programs run in softirq.
#[inline(always)]
pub fn get() -> Option<&'static mut Work> {
    // SAFETY: verified: inside the map's value. It starts as zeroes, a value of all its types, and then holds what
    // was written last.
    NS_WORK.get_ptr_mut(0).map(|work| unsafe { &mut *work })
}

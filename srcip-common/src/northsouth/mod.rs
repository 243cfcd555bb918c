//! North-south: what the node's programs and user space share.
//!
//! A *service* here is one port of a Service in one family: frontends of a family are answered by endpoints
//! of the same one. Addresses are [`Address`]: IPv4 in its mapped form, unspecified for "none".

pub mod counter;
pub mod lookup;
pub mod packet;

use crate::address::Address;
use packet::{Datagram, Family};

/// Layout of the pinned maps; see [`crate::LAYOUT_VERSION`].
pub const LAYOUT_VERSION: u32 = 1;

/// Number of a service, given by user space.
pub type ServiceId = u32;

/// What clients dial.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct FrontendKey {
    /// The address; unspecified: every address of every node.
    pub address: Address,
    /// Host byte order.
    pub port: u16,
    /// IP protocol.
    pub protocol: u8,
    padding: u8,
}

impl FrontendKey {
    /// `port` in host byte order.
    #[inline]
    pub const fn new(address: Address, port: u16, protocol: u8) -> Self {
        Self { address, port, protocol, padding: 0 }
    }
}

/// The service's source ranges hold for this frontend.
pub const RESTRICTED: u32 = 1;

/// What answers a frontend.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Frontend {
    /// Its service.
    pub service: ServiceId,
    /// [`RESTRICTED`].
    pub flags: u32,
}

/// Answers go back through the node that the client came to.
pub const TUNNEL_RETURN: u32 = 1;
/// `externalTrafficPolicy: Local`. The tables say what follows from it; this is for who reads the maps.
pub const LOCAL_POLICY: u32 = 1 << 1;

/// For connections that enter the cluster here.
pub const ENTERED_HERE: usize = 0;
/// For connections that another node has sent here: endpoints on this node alone.
pub const SENT_HERE: usize = 1;

/// A service. Replaced as a whole, so a program sees one state or the other.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Service {
    /// How long a client stays with an endpoint, in nanoseconds; 0: no affinity.
    pub affinity_ns: u64,
    /// [`TUNNEL_RETURN`], [`LOCAL_POLICY`].
    pub flags: u32,
    /// Which endpoint a connection goes to: [`ENTERED_HERE`] and [`SENT_HERE`].
    pub tables: [lookup::Table; 2],
    /// Zero. The verifier counts octets, and allows for one beyond the last place.
    pub padding: u64,
}

/// An endpoint of a service.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct EndpointKey {
    /// Its service.
    pub service: ServiceId,
    /// Its number there, below [`lookup::NONE`]; the tables name it by that.
    pub index: u32,
}

/// A pod's port, and where it is.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Endpoint {
    /// The pod's address.
    pub address: Address,
    /// The node it is on; unspecified: this one.
    pub node: Address,
    /// Host byte order.
    pub port: u16,
    /// [`takes_new`], [`TERMINATING`].
    pub flags: u16,
}

/// Flag of an endpoint that new connections of a kind may go to: [`ENTERED_HERE`], [`SENT_HERE`].
#[inline]
pub const fn takes_new(kind: usize) -> u16 {
    1 << kind
}

/// It is on its way out. [`takes_new`] says what follows from it; this is for who reads the maps.
pub const TERMINATING: u16 = 1 << 2;

/// Which way a packet of a flow goes.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[repr(u8)]
pub enum Direction {
    /// Client to frontend.
    Request = 0,
    /// Endpoint to client.
    Reply = 1,
}

/// A packet's ends, as they are before it is rewritten.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct FlowKey {
    /// Who sent it.
    pub source: Address,
    /// Whom it is for.
    pub destination: Address,
    /// Host byte order.
    pub source_port: u16,
    /// Host byte order.
    pub destination_port: u16,
    /// IP protocol.
    pub protocol: u8,
    direction: u8,
    padding: u16,
}

impl FlowKey {
    /// Ports in host byte order.
    #[inline]
    pub const fn new(
        direction: Direction,
        protocol: u8,
        source: (Address, u16),
        destination: (Address, u16),
    ) -> Self {
        Self {
            source: source.0,
            destination: destination.0,
            source_port: source.1,
            destination_port: destination.1,
            protocol,
            direction: direction as u8,
            padding: 0,
        }
    }
}

/// A FIN or a reset has been seen: a new connection with these ends need not be taken for this one.
pub const CLOSING: u16 = 1;

/// A datagram after such a pause begins a new flow; what conntrack allows a stream.
pub const UDP_IDLE_NS: u64 = 180_000_000_000;

/// A flow idle for so long makes way for another one with the same ends.
const GIVES_WAY_NS: u64 = 300_000_000_000;

/// What becomes of a flow's packets in one direction.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Flow {
    /// When its last packet came, in nanoseconds since boot.
    pub seen_ns: u64,
    /// Request: the endpoint's address. Reply: the frontend's.
    pub address: Address,
    /// Request: the node the endpoint is on, unspecified for this one. Reply: the node the client came to,
    /// unspecified for this one.
    pub node: Address,
    /// Its service.
    pub service: ServiceId,
    /// The endpoint's number.
    pub index: u32,
    /// Of the address. Host byte order.
    pub port: u16,
    /// [`CLOSING`].
    pub flags: u16,
    /// Zero.
    pub padding: u32,
}

impl Flow {
    /// Whether the endpoint's answers still belong to this flow, as opposed to one from the same client address and
    /// port by the frontend `to`: that would need another endpoint. `now` in nanoseconds since boot.
    #[inline(always)]
    pub fn bars(&self, to: (Address, u16), now: u64) -> bool {
        (self.address != to.0 || self.port != to.1)
            && self.flags & CLOSING == 0
            && now.wrapping_sub(self.seen_ns) <= GIVES_WAY_NS
    }
}

/// A datagram that is on its way in fragments.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct FragmentKey {
    /// Who sent it.
    pub source: Address,
    /// Whom it is for.
    pub destination: Address,
    /// Its identification.
    pub id: u32,
    /// IP protocol. With IPv6 0: a later fragment need not say the same as the first one (RFC 8200, 4.5).
    pub protocol: u8,
    padding: [u8; 3],
}

impl FragmentKey {
    /// The datagram that this fragment is of.
    #[inline]
    pub const fn of(fragment: &Datagram) -> Self {
        let protocol = match fragment.family {
            Family::V4 => fragment.protocol,
            Family::V6 => 0,
        };
        let Datagram { source, destination, fragment_id: id, .. } = *fragment;
        Self { source, destination, id, protocol, padding: [0; 3] }
    }
}

/// What the first fragment of a datagram says, and the later ones do not.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Fragments {
    /// Host byte order.
    pub source_port: u16,
    /// Host byte order.
    pub destination_port: u16,
    /// IP protocol.
    pub protocol: u8,
    /// Zero.
    pub padding: [u8; 3],
}

/// A client of a service with affinity.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct AffinityKey {
    /// The service.
    pub service: ServiceId,
    /// Its client.
    pub client: Address,
}

/// Where such a client goes.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Affinity {
    /// When it last opened a connection, in nanoseconds since boot.
    pub seen_ns: u64,
    /// The endpoint's address: its number may be another one's by now.
    pub address: Address,
    /// The endpoint's number.
    pub index: u32,
    /// Zero.
    pub padding: u32,
}

/// A range of clients that may use a service's restricted frontends. The key of a trie.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct RangeKey {
    /// The service. Matched whole.
    pub service: ServiceId,
    /// The client, or the range's first address.
    pub client: Address,
}

impl RangeKey {
    /// Bits of a key that is matched whole.
    pub const BITS: u32 = 8 * size_of::<Self>() as u32;
}

/// One of this node's own addresses.
pub const OWN: u32 = 1;

/// What holds for all services: the sources of what this node encapsulates.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Config {
    /// Unspecified: none, nothing can be encapsulated.
    pub own_v4: Address,
    /// Unspecified: none, nothing can be encapsulated.
    pub own_v6: Address,
}

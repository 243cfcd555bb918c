//! Keys of the maps. Every key starts with the netns cookie: one set of maps serves a whole node.

use crate::address::Address;

/// A socket family, as the kernel numbers it.
pub const AF_INET: u16 = 2;
/// A socket family, as the kernel numbers it.
pub const AF_INET6: u16 = 10;

/// An address that belongs to a pod.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct AddressKey {
    /// Cookie of the pod's network namespace.
    pub netns: u64,
    /// The pod's address.
    pub address: Address,
}

/// A connection inside a pod, named from the side that opened it.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct ConnectionKey {
    /// Cookie of the pod's network namespace.
    pub netns: u64,
    /// Address of the side that sent the SYN.
    pub source: Address,
    /// Address of the side that listens.
    pub destination: Address,
    /// Host byte order.
    pub source_port: u16,
    /// Host byte order.
    pub destination_port: u16,
    padding: u32,
}

impl ConnectionKey {
    /// Ports in host byte order.
    #[inline]
    pub const fn new(netns: u64, source: (Address, u16), destination: (Address, u16)) -> Self {
        Self {
            netns,
            source: source.0,
            destination: destination.0,
            source_port: source.1,
            destination_port: destination.1,
            padding: 0,
        }
    }
}

/// How many listeners of one family and pod are kept.
///
/// A reuseport group answers as long as one registered member lives, so there have to be enough slots
/// for the members of an old and a new proxy during its restart.
pub const LISTENER_SLOTS: u32 = 256;

/// A slot for one listener of a pod's proxy.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct ListenerKey {
    /// Cookie of the pod's network namespace.
    pub netns: u64,
    /// The proxy's port, host byte order.
    pub port: u16,
    /// [`AF_INET`] or [`AF_INET6`].
    pub family: u16,
    /// Below [`LISTENER_SLOTS`].
    pub slot: u32,
}

/// Marks a listener that has a slot, so that it never takes a second one.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct RegisteredKey {
    /// Cookie of the pod's network namespace.
    pub netns: u64,
    /// The socket's cookie, which the kernel never uses twice.
    pub socket: u64,
}

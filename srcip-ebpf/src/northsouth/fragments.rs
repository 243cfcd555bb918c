//! Datagrams in fragments: only the first has ports, so the others go where it went.
//!
//! A fragment that comes before its first passes to the stack, as one does of a datagram that is none of ours.

use srcip_common::northsouth::{
    FragmentKey, Fragments,
    packet::{self, Datagram, Ports, TCP},
};

use crate::{maps::NS_FRAGMENTS, skb::Skb};

/// Where a later fragment of TCP may begin: one before would write over the header that the first one was judged by
/// (RFC 3128).
const BEHIND_TCP: u16 = 24;

/// Whether the packet can be told the ports of: it is whole, or the first fragment, or one whose first is known, of
/// which it then has the protocol.
#[inline(never)]
pub fn known(datagram: &mut Datagram) -> bool {
    if !datagram.is_fragment {
        return true;
    }
    let key = FragmentKey::of(datagram);
    if datagram.fragment_offset == 0 {
        // An earlier datagram's, if any: identifications come again.
        let _ = NS_FRAGMENTS.remove(key);
        return true;
    }
    let Some(first) = first(&key) else { return false };
    datagram.protocol = first.protocol;
    first.protocol != TCP || datagram.fragment_offset >= BEHIND_TCP
}

/// Reads the ports of TCP and UDP, a later fragment's where its first had them; `None` if they are not there.
#[inline(always)]
pub fn ports(skb: Skb, datagram: &Datagram) -> Option<Ports> {
    if datagram.fragment_offset == 0 {
        return packet::ports(&skb, datagram);
    }
    let first = first(&FragmentKey::of(datagram))?;
    Some(Ports { source: first.source_port, destination: first.destination_port, flags: 0 })
}

/// The other fragments are to follow this packet, if it is a datagram's first one.
#[inline(always)]
pub fn follow(datagram: &Datagram, ports: Ports) {
    if datagram.is_fragment && datagram.fragment_offset == 0 {
        note(datagram, ports);
    }
}

#[inline(never)]
fn note(datagram: &Datagram, ports: Ports) {
    let Ports { source: source_port, destination: destination_port, .. } = ports;
    let first = Fragments { source_port, destination_port, protocol: datagram.protocol, padding: [0; 3] };
    let _ = NS_FRAGMENTS.insert(FragmentKey::of(datagram), first, 0);
}

#[inline(always)]
fn first(key: &FragmentKey) -> Option<Fragments> {
    let first = NS_FRAGMENTS.get_ptr(key)?;
    // SAFETY: verified: inside the map's value. An LRU map may hand the element to another datagram while it is
    // read; then a fragment goes astray, and its datagram is never whole.
    Some(unsafe { first.read_volatile() })
}

//! An IP address as maps and programs carry it.

use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// `::ffff:0:0/96`, the third word of an IPv4-mapped IPv6 address.
const MAPPED: u32 = 0xffff_u32.to_be();

/// An IPv4 or IPv6 address: four words in network byte order, IPv4 as `::ffff:a.b.c.d`.
///
/// One form for both families, because a dual-stack socket names an IPv4 peer by its mapped address
/// and the two must be the same key.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct Address([u32; 4]);

impl Address {
    /// From an IPv4 address in network byte order, as `bpf_sk_lookup.remote_ip4` delivers it.
    #[inline]
    pub const fn from_v4_be(word: u32) -> Self {
        Self([0, 0, MAPPED, word])
    }

    /// From an IPv6 address in network byte order, which may be an IPv4-mapped one.
    #[inline]
    pub const fn from_v6_be(words: [u32; 4]) -> Self {
        Self(words)
    }

    /// The four words in network byte order.
    #[inline]
    pub const fn words(&self) -> [u32; 4] {
        self.0
    }

    /// The IPv4 address in network byte order, if this is one.
    #[inline]
    pub const fn v4_be(&self) -> Option<u32> {
        match self.0 {
            [0, 0, MAPPED, word] => Some(word),
            _ => None,
        }
    }

    /// `127.0.0.0/8` or `::1`.
    #[inline]
    pub const fn is_loopback(&self) -> bool {
        match self.v4_be() {
            Some(word) => word.to_ne_bytes()[0] == 127,
            None => matches!(self.0, [0, 0, 0, last] if last == 1_u32.to_be()),
        }
    }

    /// `0.0.0.0` or `::`: what an unbound socket has for a source.
    #[inline]
    pub const fn is_unspecified(&self) -> bool {
        matches!(self.0, [0, 0, 0 | MAPPED, 0])
    }
}

impl From<IpAddr> for Address {
    fn from(ip: IpAddr) -> Self {
        match ip {
            IpAddr::V4(ip) => Self::from_v4_be(u32::from_ne_bytes(ip.octets())),
            IpAddr::V6(ip) => {
                let octets = ip.octets();
                let mut words = [0; 4];
                for (word, bytes) in words.iter_mut().zip(octets.as_chunks::<4>().0) {
                    *word = u32::from_ne_bytes(*bytes);
                }
                Self(words)
            }
        }
    }
}

impl From<Address> for IpAddr {
    fn from(address: Address) -> Self {
        if let Some(word) = address.v4_be() {
            return Self::V4(Ipv4Addr::from(word.to_ne_bytes()));
        }
        let mut octets = [0; 16];
        for (bytes, word) in octets.chunks_exact_mut(4).zip(address.0) {
            bytes.copy_from_slice(&word.to_ne_bytes());
        }
        Self::V6(Ipv6Addr::from(octets))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn address(text: &str) -> Address {
        Address::from(text.parse::<IpAddr>().unwrap())
    }

    #[test]
    fn loopback_and_unspecified_in_every_form() {
        for text in ["127.0.0.1", "127.0.0.6", "127.255.255.255", "::1", "::ffff:127.0.0.6"] {
            assert!(address(text).is_loopback(), "{text}");
        }
        for text in ["128.0.0.1", "126.255.255.255", "::2", "1::1", "0.0.0.0", "::"] {
            assert!(!address(text).is_loopback(), "{text}");
        }
        for text in ["0.0.0.0", "::", "::ffff:0.0.0.0"] {
            assert!(address(text).is_unspecified(), "{text}");
        }
        for text in ["0.0.0.1", "::1", "1::"] {
            assert!(!address(text).is_unspecified(), "{text}");
        }
    }

    proptest! {
        #[test]
        fn v4_and_its_mapped_form_are_one_key(bits: u32) {
            let ip = Ipv4Addr::from(bits);
            prop_assert_eq!(Address::from(IpAddr::V4(ip)), Address::from(IpAddr::V6(ip.to_ipv6_mapped())));
            prop_assert_eq!(IpAddr::from(Address::from(IpAddr::V4(ip))), IpAddr::V4(ip));
            prop_assert_eq!(Address::from(IpAddr::V4(ip)).is_loopback(), ip.is_loopback());
        }

        #[test]
        fn v6_round_trips_unless_mapped(bits: u128) {
            let ip = Ipv6Addr::from(bits);
            prop_assert_eq!(IpAddr::from(Address::from(IpAddr::V6(ip))), IpAddr::V6(ip).to_canonical());
        }
    }
}

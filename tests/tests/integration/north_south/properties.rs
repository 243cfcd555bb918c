//! Whatever octets arrive: the verdict is the one that the RFCs and `docs/NORTH_SOUTH.md` give them, what passes is
//! untouched, and what is redirected has changed in one end alone (`BPF_PROG_TEST_RUN`).
//!
//! What is specified is written here a second time, plainly, from the headers' RFCs: not with the programs' own reader.

use std::{cell::Cell, net::IpAddr};

use proptest::{
    collection::vec,
    prelude::*,
    test_runner::{Config, TestRunner},
};
use srcip_tests::Family;
use srcip_user::northsouth::desired::Protocol;

use super::{
    bench::{Bench, DROP, PASS, REDIRECT, client, encapsulated, frame, header_len, packet, services, sum},
    topology::{PORT, Site, vip},
};

const CASES: u32 = 3000;

const TCP: u8 = 6;
const UDP: u8 = 17;

/// Octets of IP, mostly for a frontend, and mostly not quite right.
#[derive(Clone, Debug)]
struct Recipe {
    family: Family,
    protocol: Protocol,
    port: u16,
    data: usize,
    /// IPv4 options in words, or an IPv6 header of options for the destination in units of eight octets.
    options: usize,
    /// In units of eight octets, and whether more follow.
    fragment: Option<(u16, bool)>,
    /// Where to write what, in parts of the whole.
    lies: Vec<(prop::sample::Index, u8)>,
    /// How much is there, likewise.
    cut: Option<prop::sample::Index>,
    padding: usize,
}

fn recipe() -> impl Strategy<Value = Recipe> {
    let fragment = prop_oneof![
        3 => Just(None),
        1 => (prop_oneof![Just(0), 0_u16..0x2000], any::<bool>()).prop_map(Some),
    ];
    // The header's octets are small numbers and bits.
    let lie =
        (any::<prop::sample::Index>(), prop_oneof![any::<u8>(), 0_u8..8, Just(44), Just(60), Just(0x45)]);
    let shape = (0_usize..40, 0_usize..4, fragment);
    let faults = (vec(lie, 0..3), prop::option::weighted(0.1, any::<prop::sample::Index>()), 0_usize..8);
    let port = prop_oneof![4 => Just(PORT), 1 => any::<u16>()];
    (any::<bool>(), any::<bool>(), port, shape, faults).prop_map(
        |(v4, tcp, port, (data, options, fragment), (lies, cut, padding))| Recipe {
            family: if v4 { Family::V4 } else { Family::V6 },
            protocol: if tcp { Protocol::Tcp } else { Protocol::Udp },
            port,
            data,
            options,
            fragment,
            lies,
            cut,
            padding,
        },
    )
}

impl Recipe {
    /// `id` names the datagram, if it is a fragment. What names it is no lie.
    fn cook(&self, id: u16) -> Vec<u8> {
        let to = (vip(self.family), self.port);
        let plain = packet(self.protocol, (client(self.family), 3000), to, &vec![7; self.data]);
        let (header, rest) = plain.split_at(header_len(to.0));
        let (units, more) = self.fragment.unwrap_or_default();
        let (mut packet, names) = match self.family {
            Family::V4 => {
                let mut header = [header, &vec![1; 4 * self.options]].concat();
                header[0] = 0x45 + self.options as u8;
                let length = header.len() + rest.len();
                header[2..4].copy_from_slice(&(length as u16).to_be_bytes());
                header[4..6].copy_from_slice(&id.to_be_bytes());
                header[6..8].copy_from_slice(&(u16::from(more) << 13 | units).to_be_bytes());
                ([&header, rest].concat(), 4..6)
            }
            Family::V6 => {
                let mut headers = header.to_vec();
                let mut names = 0..0;
                let mut next = 6;
                if self.fragment.is_some() {
                    let [high, low] = (units << 3 | u16::from(more)).to_be_bytes();
                    let was = std::mem::replace(&mut headers[next], 44);
                    headers.extend_from_slice(&[was, 0, high, low]);
                    // No two lies make a TCP header, taken for a fragment's, that says the same.
                    headers.extend_from_slice(&(0xa5a5_0000 | u32::from(id)).to_be_bytes());
                    (next, names) = (40, 44..48);
                }
                if self.options > 0 {
                    let was = std::mem::replace(&mut headers[next], 60);
                    headers.extend_from_slice(&[was, self.options as u8 - 1]);
                    headers.extend_from_slice(&vec![0; 8 * self.options - 2]);
                }
                let length = headers.len() - 40 + rest.len();
                headers[4..6].copy_from_slice(&(length as u16).to_be_bytes());
                ([&headers, rest].concat(), names)
            }
        };
        for (at, value) in &self.lies {
            let at = at.index(packet.len());
            if !names.contains(&at) {
                packet[at] = *value;
            }
        }
        packet.extend_from_slice(&vec![9; self.padding]);
        if let Some(length) = &self.cut {
            // The kernel's own test takes no frame without an IP header.
            let least = header_len(to.0);
            packet.truncate(least + length.index(packet.len() - least + 1));
        }
        packet
    }
}

/// A frame that says it has a packet of this family, whatever the packet says.
fn framed(packet: &[u8], family: Family) -> Vec<u8> {
    let mut frame = frame(packet);
    frame[12..14].copy_from_slice(if family == Family::V4 { &[8, 0] } else { &[0x86, 0xdd] });
    frame
}

fn be(octets: &[u8], at: usize) -> usize {
    usize::from(u16::from_be_bytes([octets[at], octets[at + 1]]))
}

/// What a packet of this family says, if it makes sense and has ports.
struct Read {
    source: IpAddr,
    destination: IpAddr,
    protocol: u8,
    transport: usize,
    hops: u8,
}

fn read(packet: &[u8], family: Family) -> Option<Read> {
    let (transport, protocol, end, hops, is_later) = match family {
        Family::V4 => {
            let (header, total) = (4 * usize::from(packet[0] & 0xf), be(packet, 2));
            if packet[0] >> 4 != 4 || header < 20 || total < header || total > packet.len() {
                return None;
            }
            (header, packet[9], total, packet[8], be(packet, 6) & 0x1fff != 0)
        }
        Family::V6 => {
            let length = be(packet, 4);
            if packet[0] >> 4 != 6 || 40 + length > packet.len() {
                return None;
            }
            let (mut at, mut next, mut fragment) = (40, packet[6], None);
            for _ in 0..6 {
                if !matches!(next, 0 | 43 | 44 | 51 | 60) || fragment.is_some_and(|offset| offset != 0) {
                    break;
                }
                let header = packet.get(at..at + 4)?;
                match next {
                    44 => {
                        let word = be(header, 2);
                        if fragment.is_some() || packet.len() < at + 8 {
                            return None;
                        }
                        fragment = (word & 0xfff9 != 0).then_some(word & 0xfff8);
                        at += 8;
                    }
                    51 => at += 4 * (usize::from(header[1]) + 2),
                    _ => at += 8 * (usize::from(header[1]) + 1),
                }
                next = header[0];
            }
            // Without a length it is one of very many segments.
            let end = if length == 0 { packet.len() } else { 40 + length };
            (at, next, end, packet[7], fragment.is_some_and(|offset| offset != 0))
        }
    };
    let least = match protocol {
        TCP => 20,
        UDP => 8,
        _ => return None,
    };
    let [source, destination] = match family {
        Family::V4 => [12, 16].map(|at| IpAddr::from(<[u8; 4]>::try_from(&packet[at..at + 4]).unwrap())),
        Family::V6 => [8, 24].map(|at| IpAddr::from(<[u8; 16]>::try_from(&packet[at..at + 16]).unwrap())),
    };
    let is_mapped = |ip| matches!(ip, IpAddr::V6(ip) if ip.to_ipv4_mapped().is_some());
    if is_later || transport + least > end || is_mapped(source) || is_mapped(destination) {
        return None;
    }
    Some(Read { source, destination, protocol, transport, hops })
}

impl Read {
    fn port(&self, packet: &[u8], end: usize) -> u16 {
        be(packet, self.transport + 2 * end) as u16
    }

    /// No router sends on what comes from elsewhere.
    fn is_from_a_host(&self) -> bool {
        let nobodys = match self.source {
            IpAddr::V4(ip) => ip.octets()[0] == 0 || ip.octets()[0] >= 224,
            IpAddr::V6(ip) => ip.is_unspecified() || ip.is_multicast(),
        };
        !nobodys && !self.source.is_loopback()
    }

    /// Whether it goes on if it is for somebody.
    fn may_travel(&self) -> bool {
        self.hops > 1 && self.is_from_a_host()
    }

    fn is_for_frontend(&self, packet: &[u8], family: Family) -> bool {
        self.destination == vip(family) && self.port(packet, 1) == PORT
    }
}

/// What a checksum covers, added up, where zero has one form instead of two.
fn residue(octets: &[u8]) -> u16 {
    sum(octets) % 0xffff
}

/// The packet has another destination, one hop less, checksums that went along with it, and nothing else.
fn only_the_destination_changed(before: &[u8], after: &[u8], family: Family, to: (IpAddr, u16)) {
    let (old, new) = (read(before, family).unwrap(), read(after, family).unwrap());
    assert_eq!((new.destination, new.port(after, 1)), to);
    assert_eq!(
        (new.source, new.port(after, 0), new.protocol),
        (old.source, old.port(before, 0), old.protocol)
    );
    assert_eq!(new.hops + 1, old.hops);
    let (destination, hops) = match family {
        Family::V4 => (16..20, 8),
        Family::V6 => (24..40, 7),
    };
    let checksum = old.transport + if old.protocol == TCP { 16 } else { 6 };
    let mut expected = before.to_vec();
    expected[destination.clone()].copy_from_slice(&after[destination.clone()]);
    expected[old.transport + 2..old.transport + 4].copy_from_slice(&to.1.to_be_bytes());
    expected[hops] -= 1;
    expected[checksum..checksum + 2].copy_from_slice(&after[checksum..checksum + 2]);
    if family == Family::V4 {
        expected[10..12].copy_from_slice(&after[10..12]);
        // Right or wrong, it is so by as much as before.
        assert_eq!(residue(&before[..20]), residue(&after[..20]), "the header's checksum");
    }
    assert_eq!(after, expected);
    // UDP's may be missing, and then nobody adds it.
    if old.protocol == UDP && be(before, checksum) == 0 {
        assert_eq!(be(after, checksum), 0);
        return;
    }
    let covered = |packet: &[u8]| {
        let port = old.transport + 2;
        residue(
            &[&packet[destination.clone()], &packet[port..port + 2], &packet[checksum..checksum + 2]]
                .concat(),
        )
    };
    assert_eq!(covered(before), covered(after), "the transport's checksum");
}

/// A site with a pod on its first node, and two nodes.
fn site() -> (Bench, [(IpAddr, u16); 2]) {
    let mut site = Site::new(2);
    let pod = site.pod(0);
    let services = services(&site, &pod);
    site.apply(0, services);
    let endpoints = Family::BOTH.map(|family| (pod.address(family), 8000));
    (Bench::new(site), endpoints)
}

fn endpoint(endpoints: &[(IpAddr, u16); 2], family: Family) -> (IpAddr, u16) {
    *endpoints.iter().find(|(ip, _)| ip.is_ipv4() == (family == Family::V4)).unwrap()
}

fn for_each_case(mut check: impl FnMut(&Recipe, u16)) {
    let ids = Cell::new(0);
    let check = std::cell::RefCell::new(&mut check);
    let config = Config { failure_persistence: None, ..Config::with_cases(CASES) };
    let run = TestRunner::new(config).run(&recipe(), |recipe| {
        ids.set(ids.get() + 1);
        (check.borrow_mut())(&recipe, ids.get());
        Ok(())
    });
    run.unwrap();
}

#[test]
fn what_comes_plain_is_redirected_or_untouched() {
    let (bench, endpoints) = site();
    let mut counts = [0, 0];
    for_each_case(|recipe, id| {
        let packet = recipe.cook(id);
        let family = recipe.family;
        let is_good = read(&packet, family)
            .is_some_and(|read| read.may_travel() && read.is_for_frontend(&packet, family));
        let (verdict, out) = bench.uplink(&framed(&packet, family));
        if is_good {
            assert_eq!(verdict, REDIRECT);
            only_the_destination_changed(&packet, &out[14..], family, endpoint(&endpoints, family));
        } else {
            assert_eq!(verdict, PASS);
            assert!(out == framed(&packet, family), "changed");
        }
        counts[usize::from(is_good)] += 1;
    });
    assert!(counts.iter().all(|&count| count > CASES / 10), "{counts:?} of the bad and the good");
}

/// From a node it is as if it had come plain; from anybody else it is dropped if it is for a frontend.
#[test]
fn what_comes_encapsulated_is_from_a_node_or_dropped() {
    let (bench, endpoints) = site();
    let mut counts = [0, 0];
    for_each_case(|recipe, id| {
        let inside = recipe.cook(id);
        let family = recipe.family;
        let [own, node] = [0, 1].map(|n| bench.site.node_address(n, family).0);
        let is_ours = read(&inside, family).is_some_and(|read| read.is_for_frontend(&inside, family));
        let may_travel = read(&inside, family).is_some_and(|read| read.may_travel());
        let stranger = frame(&encapsulated(client(family), own, &inside));
        let (verdict, out) = bench.uplink(&stranger);
        if is_ours {
            assert_eq!(verdict, DROP);
        } else {
            assert_eq!((verdict, out == stranger), (PASS, true));
        }
        let known = frame(&encapsulated(node, own, &inside));
        let (verdict, out) = bench.uplink(&known);
        if !is_ours {
            assert_eq!((verdict, out == known), (PASS, true));
        } else if may_travel {
            assert_eq!(verdict, REDIRECT);
            only_the_destination_changed(&inside, &out[14..], family, endpoint(&endpoints, family));
        } else {
            // Unpacked, for the stack to say what is wrong.
            assert_eq!((verdict, &out[14..]), (PASS, &inside[..]));
        }
        counts[usize::from(is_ours)] += 1;
    });
    assert!(counts.iter().all(|&count| count > CASES / 10), "{counts:?} of the others' and ours");
    assert_eq!(bench.counter("dropped_spoofed_encapsulation"), u64::from(counts[1]));
}

use std::{net::IpAddr, vec::Vec};

use etherparse::{
    IpFragOffset, IpNumber, Ipv4Extensions, Ipv4Header, Ipv4Options, Ipv6Extensions, Ipv6Header,
    Ipv6RawExtHeader, PacketBuilder,
};
use proptest::{collection::vec, prelude::*};

use super::*;

const BLANK: Datagram = Datagram {
    family: Family::V4,
    source: Address::from_v4_be(0),
    destination: Address::from_v4_be(0),
    start: 0,
    payload: 0,
    end: 0,
    protocol: 0,
    hop_limit: 0,
    is_fragment: false,
    fragment_offset: 0,
    fragment_id: 0,
    dont_fragment: false,
};

/// What a packet says, for comparing with what went in.
fn read(packet: &[u8], family: Family) -> Option<(Datagram, Option<Ports>)> {
    let mut datagram = BLANK;
    super::read(packet, 0, family, Extent::Whole, &mut datagram).then(|| (datagram, ports(packet, &datagram)))
}

fn v4_with_options(options: &[u8], payload: &[u8], protocol: IpNumber) -> Vec<u8> {
    let mut header =
        Ipv4Header::new(payload.len() as u16, 7, protocol, [10, 0, 0, 1], [10, 0, 0, 2]).unwrap();
    header.options = Ipv4Options::try_from(options).unwrap();
    header.set_payload_len(payload.len()).unwrap();
    let mut packet = Vec::new();
    header.write(&mut packet).unwrap();
    packet.extend_from_slice(payload);
    packet
}

fn v6_with_extensions(extensions: &Ipv6Extensions, first: IpNumber, payload: &[u8]) -> Vec<u8> {
    let header = Ipv6Header {
        payload_length: (extensions.header_len() + payload.len()) as u16,
        next_header: first,
        hop_limit: 7,
        source: [1; 16],
        destination: [2; 16],
        ..Default::default()
    };
    let mut packet = Vec::new();
    header.write(&mut packet).unwrap();
    extensions.write(&mut packet, first).unwrap();
    packet.extend_from_slice(payload);
    packet
}

fn udp(from: u16, to: u16, data: &[u8]) -> Vec<u8> {
    let mut packet = Vec::new();
    etherparse::UdpHeader {
        source_port: from,
        destination_port: to,
        length: 8 + data.len() as u16,
        checksum: 0,
    }
    .write(&mut packet)
    .unwrap();
    packet.extend_from_slice(data);
    packet
}

proptest! {
    #[test]
    fn no_octets_make_it_panic(packet in vec(any::<u8>(), 0..200), v4: bool, start in 0_u32..300) {
        let family = if v4 { Family::V4 } else { Family::V6 };
        for extent in [Extent::Whole, Extent::Beginning] {
            let mut found = BLANK;
            if super::read(&packet[..], start, family, extent, &mut found) {
                ports(&packet[..], &found);
                quoted(&packet[..], &found, &mut BLANK.clone());
            }
        }
    }

    #[test]
    fn tcp_is_read_as_it_was_written(
        (v4, from_port, to_port) in any::<(bool, u16, u16)>(),
        (syn, ack, fin, rst) in any::<(bool, bool, bool, bool)>(),
        (source, destination) in any::<([u8; 16], [u8; 16])>(),
        data in vec(any::<u8>(), 0..50),
    ) {
        let (a, b): ([u8; 4], [u8; 4]) = (source[..4].try_into().unwrap(), destination[..4].try_into().unwrap());
        let builder =
            if v4 { PacketBuilder::ipv4(a, b, 9) } else { PacketBuilder::ipv6(source, destination, 9) };
        let mut builder = builder.tcp(from_port, to_port, 1, 2);
        if syn { builder = builder.syn(); }
        if ack { builder = builder.ack(3); }
        if fin { builder = builder.fin(); }
        if rst { builder = builder.rst(); }
        let mut packet = Vec::new();
        builder.write(&mut packet, &data).unwrap();
        let family = if v4 { Family::V4 } else { Family::V6 };
        let (datagram, ports) = read(&packet, family).unwrap();
        let ports = ports.unwrap();
        let ends = if v4 { (IpAddr::from(a), IpAddr::from(b)) } else { (source.into(), destination.into()) };
        prop_assert_eq!((datagram.source, datagram.destination), (ends.0.into(), ends.1.into()));
        prop_assert_eq!((ports.source, ports.destination), (from_port, to_port));
        prop_assert_eq!(ports.opens(), syn && !ack);
        prop_assert_eq!(ports.closes(), fin || rst);
        prop_assert!(datagram.hop_limit == 9 && !datagram.is_fragment);
        // The other family does not take it, and no beginning of it is the whole.
        let other = if v4 { Family::V6 } else { Family::V4 };
        prop_assert_eq!(read(&packet, other), None);
        for length in 0..packet.len() {
            prop_assert_eq!(read(&packet[..length], family), None);
        }
    }

    #[test]
    fn options_move_the_payload(words in 0_usize..=10, from: u16, to: u16) {
        let packet = v4_with_options(&std::vec![1; 4 * words], &udp(from, to, b"data"), IpNumber::UDP);
        let (datagram, ports) = read(&packet, Family::V4).unwrap();
        prop_assert_eq!(datagram.payload, 20 + 4 * words as u32);
        prop_assert_eq!(ports, Some(Ports { source: from, destination: to, flags: 0 }));
    }

    #[test]
    fn extension_headers_move_the_payload(size in 0_usize..20, from: u16, to: u16) {
        let options = Ipv6RawExtHeader::new_raw(IpNumber::UDP, &std::vec![0; 6 + 8 * size]).unwrap();
        let mut extensions = Ipv6Extensions { destination_options: Some(options), ..Default::default() };
        let first = extensions.set_next_headers(IpNumber::UDP);
        let packet = v6_with_extensions(&extensions, first, &udp(from, to, b"data"));
        let (datagram, ports) = read(&packet, Family::V6).unwrap();
        prop_assert_eq!(datagram.payload, 48 + 8 * size as u32);
        prop_assert_eq!(ports, Some(Ports { source: from, destination: to, flags: 0 }));
    }

    #[test]
    fn fragments_are_told(offset in 0_u16..=0x1fff, more: bool, id: u32) {
        let told = |packet: &[u8], family| {
            let (datagram, ports) = read(packet, family).unwrap();
            (datagram.is_fragment, datagram.fragment_offset, datagram.fragment_id, ports)
        };
        let is_fragment = more || offset != 0;
        let offset = IpFragOffset::try_new(offset).unwrap();
        let data = udp(1, 2, b"data");
        let header = Ipv4Header {
            identification: id as u16,
            fragment_offset: offset,
            more_fragments: more,
            ..Ipv4Header::new(data.len() as u16, 7, IpNumber::UDP, [1; 4], [2; 4]).unwrap()
        };
        let mut packet = Vec::new();
        header.write(&mut packet).unwrap();
        Ipv4Extensions::default().write(&mut packet, IpNumber::UDP).unwrap();
        packet.extend_from_slice(&data);
        let ports = Some(Ports { source: 1, destination: 2, flags: 0 });
        prop_assert_eq!(
            told(&packet, Family::V4),
            (is_fragment, 8 * offset.value(), u32::from(id as u16), ports)
        );

        let packet = fragment_v6(offset, more, id, &data);
        prop_assert_eq!(told(&packet, Family::V6), (is_fragment, 8 * offset.value(), id, ports));
    }
}

/// RFC 8200, 4.5, by hand: etherparse 0.19 shifts the low half of the offset wrongly.
fn fragment_v6(offset: IpFragOffset, more: bool, id: u32, data: &[u8]) -> Vec<u8> {
    let [high, low] = (offset.value() << 3 | u16::from(more)).to_be_bytes();
    let fragment = [&[IpNumber::UDP.0, 0, high, low], &id.to_be_bytes()[..], data].concat();
    v6_with_extensions(&Ipv6Extensions::default(), IpNumber::IPV6_FRAGMENTATION_HEADER, &fragment)
}

#[test]
fn senders_are_hosts() {
    let has_sender = |source: &str| {
        let source: IpAddr = source.parse().unwrap();
        let family = if source.is_ipv4() { Family::V4 } else { Family::V6 };
        Datagram { family, source: source.into(), ..BLANK }.has_sender()
    };
    for good in [
        "1.0.0.1",
        "10.0.0.1",
        "126.255.255.255",
        "128.0.0.1",
        "223.255.255.255",
        "::2",
        "2001:db8::1",
        "fe80::1",
    ] {
        assert!(has_sender(good), "{good}");
    }
    for bad in [
        "0.0.0.0",
        "0.1.2.3",
        "127.0.0.1",
        "127.255.0.1",
        "224.0.0.1",
        "240.0.0.1",
        "255.255.255.255",
        "::",
        "::1",
        "ff02::1",
    ] {
        assert!(!has_sender(bad), "{bad}");
    }
}

#[test]
fn an_address_of_ipv4_makes_no_sense_in_ipv6() {
    let packet = v6_with_extensions(&Ipv6Extensions::default(), IpNumber::UDP, &udp(1, 2, b"data"));
    let mapped = [&[0; 10][..], &[0xff, 0xff, 10, 0, 0, 1]].concat();
    for at in [8, 24] {
        let mut packet = packet.clone();
        packet[at..at + 16].copy_from_slice(&mapped);
        assert_eq!(read(&packet, Family::V6), None);
    }
}

#[test]
fn a_fragment_of_a_fragment_makes_no_sense() {
    let mut inner = fragment_v6(IpFragOffset::ZERO, false, 2, &udp(1, 2, b"data")).split_off(40);
    inner[3] |= 1;
    let mut packet = fragment_v6(IpFragOffset::ZERO, true, 1, &inner);
    packet[40] = IpNumber::IPV6_FRAGMENTATION_HEADER.0;
    assert_eq!(read(&packet, Family::V6), None);
    // Of a later one nothing is read that follows: it is the middle of something.
    packet[43] = 8 | 1;
    assert_eq!(read(&packet, Family::V6).unwrap().0.fragment_offset, 8);
}

#[test]
fn endless_extension_headers_make_no_sense() {
    // Each says that another one follows.
    let mut packet = v6_with_extensions(&Ipv6Extensions::default(), IpNumber::IPV6_DESTINATION_OPTIONS, &[]);
    for _ in 0..7 {
        packet.extend_from_slice(&[60, 0, 1, 4, 0, 0, 0, 0]);
    }
    packet[5] = 56;
    assert_eq!(read(&packet, Family::V6), None);
}

#[test]
fn an_error_quotes_a_flow() {
    let mut inside = Vec::new();
    PacketBuilder::ipv4([10, 0, 0, 2], [10, 0, 0, 1], 5)
        .tcp(443, 5555, 1, 2)
        .write(&mut inside, &[])
        .unwrap();
    inside.truncate(28);
    let error = etherparse::Icmpv4Type::DestinationUnreachable(
        etherparse::icmpv4::DestUnreachableHeader::FragmentationNeeded { next_hop_mtu: 1400 },
    );
    let mut packet = Vec::new();
    PacketBuilder::ipv4([9, 9, 9, 9], [10, 0, 0, 2], 5).icmpv4(error).write(&mut packet, &inside).unwrap();
    let (outer, _) = read(&packet, Family::V4).unwrap();
    let mut inner = BLANK;
    let ports = quoted(&packet[..], &outer, &mut inner).unwrap();
    assert_eq!((inner.start, inner.payload), (28, 48));
    assert_eq!((ports.source, ports.destination), (443, 5555));

    // An echo quotes nothing.
    packet[20] = 8;
    assert_eq!(quoted(&packet[..], &outer, &mut inner), None);
}

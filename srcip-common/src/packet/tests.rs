use core::net::IpAddr;
use std::vec::Vec;

use etherparse::{IpFragOffset, IpNumber, Ipv4Options, PacketBuilder};
use proptest::prelude::*;

use super::*;

fn segment_of(parsed: Parsed) -> Segment {
    match parsed {
        Parsed::Segment(segment) => segment,
        other => panic!("expected a segment, got {other:?}"),
    }
}

fn tcp_header(source: u16, destination: u16, flags: u8) -> [u8; 20] {
    let mut header = [0; 20];
    header[0..2].copy_from_slice(&source.to_be_bytes());
    header[2..4].copy_from_slice(&destination.to_be_bytes());
    header[12] = 5 << 4;
    header[13] = flags;
    header
}

/// An IPv6 packet with `extensions` given as (number, bytes); each one's first byte is filled in.
fn v6_packet(extensions: &[(u8, Vec<u8>)], payload: &[u8]) -> Vec<u8> {
    let mut packet = std::vec![0_u8; 40];
    packet[0] = 0x60;
    packet[23] = 1;
    packet[39] = 2;
    packet[6] = extensions.first().map_or(TCP, |(number, _)| *number);
    for (i, (_, bytes)) in extensions.iter().enumerate() {
        let start = packet.len();
        packet.extend_from_slice(bytes);
        packet[start] = extensions.get(i + 1).map_or(TCP, |(number, _)| *number);
    }
    packet.extend_from_slice(payload);
    packet
}

proptest! {
    #[test]
    fn agrees_with_etherparse_on_v4(
        source in any::<[u8; 4]>(), destination in any::<[u8; 4]>(), ports in any::<(u16, u16)>(), options in 0_usize..=10,
        (syn, ack, rst, fin) in any::<(bool, bool, bool, bool)>(), payload in prop::collection::vec(any::<u8>(), 0..32),
    ) {
        let mut ip = etherparse::Ipv4Header::new(20, 64, IpNumber::TCP, source, destination).unwrap();
        ip.options = Ipv4Options::try_from(&std::vec![1_u8; options * 4][..]).unwrap();
        let mut tcp = etherparse::TcpHeader::new(ports.0, ports.1, 7, 1024);
        (tcp.syn, tcp.ack, tcp.rst, tcp.fin) = (syn, ack, rst, fin);
        let mut bytes = Vec::new();
        PacketBuilder::ip(etherparse::IpHeaders::Ipv4(ip, Default::default()))
            .tcp_header(tcp).write(&mut bytes, &payload).unwrap();
        let segment = segment_of(parse(&bytes[..], ETH_P_IP));
        prop_assert_eq!(segment.source.address, Address::from(IpAddr::from(source)));
        prop_assert_eq!(segment.destination.address, Address::from(IpAddr::from(destination)));
        prop_assert_eq!((segment.source.port, segment.destination.port), ports);
        prop_assert_eq!(segment.is_syn(), syn && !ack && !rst && !fin);
    }

    #[test]
    fn walks_v6_extension_headers(
        kinds in prop::collection::vec((0_usize..4, 0_u8..4), 0..=MAX_EXTENSIONS), ports in any::<(u16, u16)>(),
    ) {
        let extensions: Vec<_> = kinds.iter().map(|&(kind, length)| match kind {
            3 => {
                let mut bytes = std::vec![0; (usize::from(length) + 2) * 4];
                bytes[1] = length;
                (extension::AUTHENTICATION, bytes)
            }
            kind => {
                let mut bytes = std::vec![0; (usize::from(length) + 1) * 8];
                bytes[1] = length;
                ([extension::HOP_BY_HOP, extension::ROUTING, extension::DESTINATION][kind], bytes)
            }
        }).collect();
        let packet = v6_packet(&extensions, &tcp_header(ports.0, ports.1, SYN));
        let segment = segment_of(parse(&packet[..], ETH_P_IPV6));
        prop_assert_eq!((segment.source.port, segment.destination.port), ports);
        prop_assert!(segment.is_syn());
    }

    #[test]
    fn never_panics_and_never_reads_past_the_end(bytes in prop::collection::vec(any::<u8>(), 0..120), v6 in any::<bool>()) {
        let mut bytes = bytes;
        if let Some(first) = bytes.first_mut() {
            *first = if v6 { 0x60 } else { 0x40 | (*first & 0xf) };
        }
        parse(&bytes[..], if v6 { ETH_P_IPV6 } else { ETH_P_IP });
    }

    #[test]
    fn later_fragments_are_not_read_as_headers(offset in 1_u16..=0x1fff, more in any::<bool>(), flags in any::<u8>()) {
        let mut ip = etherparse::Ipv4Header::new(20, 64, IpNumber::TCP, [10, 0, 0, 1], [10, 0, 0, 2]).unwrap();
        ip.fragment_offset = IpFragOffset::try_new(offset).unwrap();
        ip.more_fragments = more;
        let mut bytes = Vec::new();
        ip.write(&mut bytes).unwrap();
        bytes.extend_from_slice(&tcp_header(1, 2, flags));
        prop_assert_eq!(parse(&bytes[..], ETH_P_IP), Parsed::Other);
        let fragment = std::vec![0, 0, (offset >> 5) as u8, (offset << 3) as u8 | u8::from(more)];
        let mut fragment = fragment;
        fragment.resize(8, 0);
        let packet = v6_packet(&[(extension::FRAGMENT, fragment)], &tcp_header(1, 2, flags));
        prop_assert_eq!(parse(&packet[..], ETH_P_IPV6), Parsed::Other);
    }
}

#[test]
fn first_fragments_are_told_apart() {
    let first = std::vec![0, 0, 0, 1, 0, 0, 0, 0];
    for (flags, length) in [(SYN, 20), (SYN, 19), (SYN, 8), (ACK, 20), (SYN | ACK, 20)] {
        let tcp = &tcp_header(1, 2, flags)[..length];
        let v6 = v6_packet(&[(extension::FRAGMENT, first.clone())], tcp);
        let mut ip = etherparse::Ipv4Header::new(20, 64, IpNumber::TCP, [1, 1, 1, 1], [2; 4]).unwrap();
        ip.more_fragments = true;
        let mut v4 = Vec::new();
        ip.write(&mut v4).unwrap();
        v4.extend_from_slice(tcp);
        for parsed in [parse(&v4[..], ETH_P_IP), parse(&v6[..], ETH_P_IPV6)] {
            if length < 20 {
                assert_eq!(parsed, Parsed::Disguised, "flags {flags} length {length}");
            } else {
                let segment = segment_of(parsed);
                assert!(segment.is_fragment);
                assert_eq!(segment.is_syn(), flags == SYN);
            }
        }
    }
}

#[test]
fn a_first_fragment_that_ends_inside_the_chain_could_hide_anything() {
    let first = std::vec![0, 0, 0, 1, 0, 0, 0, 0];
    let options = std::vec![0_u8; 8];
    let whole = v6_packet(
        &[
            (extension::FRAGMENT, first),
            (extension::DESTINATION, options.clone()),
            (extension::DESTINATION, options),
        ],
        &tcp_header(1, 2, SYN),
    );
    for length in [48, 50, 56, 58, 64, 70] {
        assert_eq!(parse(&whole[..length], ETH_P_IPV6), Parsed::Disguised, "{length} octets");
    }
    assert!(segment_of(parse(&whole[..], ETH_P_IPV6)).is_fragment);
}

#[test]
fn tcp_behind_too_many_extension_headers_is_not_just_anything() {
    for (count, expected) in [(MAX_EXTENSIONS, true), (MAX_EXTENSIONS + 1, false), (40, false)] {
        let extensions = std::vec![(extension::DESTINATION, std::vec![0; 8]); count];
        let parsed = parse(&v6_packet(&extensions, &tcp_header(5, 6, SYN))[..], ETH_P_IPV6);
        match expected {
            true => assert!(segment_of(parsed).is_syn()),
            false => assert_eq!(parsed, Parsed::Disguised, "{count} headers"),
        }
    }
}

#[test]
fn an_atomic_fragment_is_a_whole_segment() {
    let atomic = std::vec![0; 8];
    let packet = v6_packet(&[(extension::FRAGMENT, atomic)], &tcp_header(5, 6, SYN));
    assert!(segment_of(parse(&packet[..], ETH_P_IPV6)).is_syn());
}

#[test]
fn what_is_not_tcp_over_ip_is_left_alone() {
    let mut udp = v6_packet(&[], &tcp_header(1, 2, SYN));
    udp[6] = 17;
    assert_eq!(parse(&udp[..], ETH_P_IPV6), Parsed::Other);
    let tcp = v6_packet(&[], &tcp_header(1, 2, SYN));
    assert_eq!(parse(&tcp[..], 0x0806), Parsed::Other);
    assert_eq!(parse(&tcp[..], ETH_P_IP), Parsed::Other);
    assert_eq!(parse(&tcp[..45], ETH_P_IPV6), Parsed::Other);
}

//! Single packets, also such as nobody should send, and what the programs make of them (`BPF_PROG_TEST_RUN`).

use std::net::IpAddr;

use etherparse::{IpNumber, Ipv4Header, Ipv4Options, Ipv6Extensions, Ipv6Header, Ipv6RawExtHeader};
use srcip_tests::Family;
use srcip_user::northsouth::desired::Protocol;

use super::{
    bench::{
        Bench, DROP, PASS, REDIRECT, client, encapsulated, ends, frame, octets4, octets6, one_pod, packet,
        request, services,
    },
    topology::{PORT, Site, vip},
};

#[test]
fn a_request_and_its_answer_are_rewritten_at_one_end_each() {
    let (bench, pod) = one_pod();
    for family in Family::BOTH {
        for protocol in [Protocol::Tcp, Protocol::Udp] {
            for (from, data) in (1024..1044).zip(["", "x", "xy", "odd", "even"].iter().cycle()) {
                let caller = (client(family), from);
                let there = (pod.address(family), 8000);
                let sent = request(family, protocol, caller.0, from, data.as_bytes());
                let (verdict, out) = bench.uplink(&frame(&sent));
                assert_eq!((verdict, ends(&out[14..])), (REDIRECT, (caller, there)));
                let hops = if family == Family::V4 { 8 } else { 7 };
                assert_eq!((sent[hops], out[14 + hops]), (9, 8));
                assert!(out.ends_with(data.as_bytes()) && out.len() == sent.len() + 14);

                let answer = packet(protocol, there, caller, data.as_bytes());
                let (verdict, out) = bench.run("srcip_pod", &frame(&answer));
                assert_eq!((verdict, ends(&out[14..])), (REDIRECT, ((vip(family), PORT), caller)));
                // What the pod itself does is its own affair.
                let own = frame(&packet(protocol, there, (caller.0, 9), b""));
                assert_eq!(bench.run("srcip_pod", &own), (PASS, own));
            }
        }
    }
    assert_eq!(bench.counter("new_flows"), 80);
}

#[test]
fn options_and_extension_headers_are_stepped_over() {
    let (bench, pod) = one_pod();
    let udp = |family, from| {
        let whole = request(family, Protocol::Udp, client(family), from, b"data");
        whole[if family == Family::V4 { 20 } else { 40 }..].to_vec()
    };
    for words in 1..=10 {
        let payload = udp(Family::V4, 2000 + words);
        let (from, to) = (octets4(client(Family::V4)), octets4(vip(Family::V4)));
        let mut header = Ipv4Header::new(payload.len() as u16, 9, IpNumber::UDP, from, to).unwrap();
        header.options = Ipv4Options::try_from(&vec![1; 4 * usize::from(words)][..]).unwrap();
        header.set_payload_len(payload.len()).unwrap();
        header.header_checksum = header.calc_header_checksum();
        let mut packet = Vec::new();
        header.write(&mut packet).unwrap();
        packet.extend_from_slice(&payload);
        let (verdict, out) = bench.uplink(&frame(&packet));
        assert_eq!((verdict, ends(&out[14..]).1), (REDIRECT, (pod.address(Family::V4), 8000)));
    }
    for blocks in 0..8 {
        let payload = udp(Family::V6, 2000 + blocks);
        let raw = Ipv6RawExtHeader::new_raw(IpNumber::UDP, &vec![0; 6 + 8 * usize::from(blocks)]).unwrap();
        let mut extensions = Ipv6Extensions { destination_options: Some(raw), ..Default::default() };
        let first = extensions.set_next_headers(IpNumber::UDP);
        let header = Ipv6Header {
            payload_length: (extensions.header_len() + payload.len()) as u16,
            next_header: first,
            hop_limit: 9,
            source: octets6(client(Family::V6)),
            destination: octets6(vip(Family::V6)),
            ..Default::default()
        };
        let mut packet = Vec::new();
        header.write(&mut packet).unwrap();
        extensions.write(&mut packet, first).unwrap();
        packet.extend_from_slice(&payload);
        let (verdict, out) = bench.uplink(&frame(&packet));
        assert_eq!((verdict, ends(&out[14..]).1), (REDIRECT, (pod.address(Family::V6), 8000)));
    }
}

#[test]
fn what_makes_no_sense_passes_untouched() {
    let (bench, _pod) = one_pod();
    for family in Family::BOTH {
        for protocol in [Protocol::Tcp, Protocol::Udp] {
            let whole = frame(&request(family, protocol, client(family), 3000, b"some data"));
            let least = if family == Family::V4 { 34 } else { 54 };
            for length in least..whole.len() {
                bench.passes_untouched(&whole[..length], &format!("{length} octets of {}", whole.len()));
            }
            let lie = |at: usize, value: u8| {
                let mut packet = whole.clone();
                packet[at] = value;
                packet
            };
            let lies = match family {
                // The header's length, the packet's, a hop limit that is used up.
                Family::V4 => {
                    vec![lie(14, 0x41), lie(14, 0x4f), lie(14, 0x55), lie(16, 9), lie(17, 3), lie(22, 1)]
                }
                Family::V6 => vec![lie(14, 0x50), lie(18, 9), lie(21, 1)],
            };
            for packet in lies {
                bench.passes_untouched(&packet, "a lie");
            }
            // Neither frontend nor node.
            let elsewhere = packet(protocol, (client(family), 5), (vip(family), PORT + 1), b"");
            bench.passes_untouched(&frame(&elsewhere), "another port");
        }
    }
    assert!(bench.counter("passed_malformed") > 0 && bench.counter("passed_hop_limit") == 4);
    assert_eq!(bench.counter("new_flows"), 0);
}

/// One that says it is a fragment, and is all of its datagram (RFC 6946).
#[test]
fn an_atomic_fragment_is_a_packet_as_any_other() {
    let (bench, pod) = one_pod();
    let whole = request(Family::V6, Protocol::Udp, client(Family::V6), 3000, b"some data");
    let (header, rest) = whole.split_at(40);
    let mut packet = [header, &[17, 0, 0, 0, 0, 0, 0, 7], rest].concat();
    (packet[5], packet[6]) = (packet[5] + 8, 44);
    let (verdict, out) = bench.uplink(&frame(&packet));
    assert_eq!(
        (verdict, ends(&out[14..])),
        (REDIRECT, ((client(Family::V6), 3000), (pod.address(Family::V6), 8000)))
    );
}

#[test]
fn only_nodes_may_send_encapsulated_packets() {
    let mut site = Site::new(2);
    let pod = site.pod(0);
    let services = services(&site, &pod);
    site.apply(0, services);
    let bench = Bench::new(site);
    let mut spoofed = 0;
    for family in Family::BOTH {
        let [own, node] = [0, 1].map(|n| bench.site.node_address(n, family).0);
        for protocol in [Protocol::Tcp, Protocol::Udp] {
            let inside = request(family, protocol, client(family), 4000, b"data");
            let (verdict, out) = bench.uplink(&frame(&encapsulated(node, own, &inside)));
            let there = (pod.address(family), 8000);
            assert_eq!((verdict, ends(&out[14..])), (REDIRECT, ((client(family), 4000), there)));

            // Neither a stranger nor somebody who says that he is this node.
            for stranger in [client(family), own] {
                let (verdict, _) = bench.uplink(&frame(&encapsulated(stranger, own, &inside)));
                spoofed += 1;
                assert_eq!((verdict, bench.counter("dropped_spoofed_encapsulation")), (DROP, spoofed));
            }
            // Somebody else's tunnels.
            let other = packet(protocol, (client(family), 1), (pod.address(family), 2), b"");
            bench.passes_untouched(&frame(&encapsulated(client(family), own, &other)), "not for a frontend");
            bench.passes_untouched(&frame(&encapsulated(node, vip(family), &inside)), "not for this node");
            let whole = frame(&encapsulated(client(family), own, &inside));
            for length in [whole.len() - 1, whole.len() - 5, 60] {
                bench.passes_untouched(&whole[..length], "cut short");
            }
        }
    }
}

#[test]
fn source_ranges_are_about_the_client() {
    let mut site = Site::new(2);
    let pod = site.pod(0);
    let mut services = services(&site, &pod);
    for service in &mut services {
        service.source_ranges = vec!["10.133.1.0/24".parse().unwrap(), "fd13:37::1:0/112".parse().unwrap()];
    }
    site.apply(0, services);
    let bench = Bench::new(site);
    for family in Family::BOTH {
        let [own, node] = [0, 1].map(|n| bench.site.node_address(n, family).0);
        let other: IpAddr = match family {
            Family::V4 => "10.133.9.1".parse().unwrap(),
            Family::V6 => "fd13:37::9:1".parse().unwrap(),
        };
        for (address, expected) in [(client(family), REDIRECT), (other, DROP)] {
            let inside = request(family, Protocol::Udp, address, 5000, b"");
            assert_eq!(bench.uplink(&frame(&encapsulated(node, own, &inside))).0, expected, "{address}");
            let plain = request(family, Protocol::Udp, address, 5001, b"");
            assert_eq!(bench.uplink(&frame(&plain)).0, expected, "{address}");
        }
    }
    assert_eq!(bench.counter("dropped_source_range"), 4);
}

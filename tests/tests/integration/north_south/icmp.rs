//! ICMP errors of a flow (`BPF_PROG_TEST_RUN`): both families, both directions, through nodes.

use std::net::IpAddr;

use etherparse::{NetHeaders, PacketHeaders};
use srcip_tests::Family;
use srcip_user::northsouth::desired::{EndpointState, Place, Protocol, ReturnPath, ServiceName};

use super::{
    bench::{
        Bench, PASS, REDIRECT, client, correct, encapsulated, frame, header_len, one_pod, packet, request,
        services, sum,
    },
    topology::{PORT, Site, vip},
};

const PROTOCOLS: [Protocol; 2] = [Protocol::Tcp, Protocol::Udp];

/// Kind and code of an error, and its second word.
type Kind = (u8, u8, u32);

/// All errors that tell of a packet.
fn kinds(family: Family) -> Vec<Kind> {
    match family {
        // Unreachable: host, port, fragmentation needed; time exceeded; parameter problem.
        Family::V4 => vec![(3, 1, 0), (3, 3, 0), (3, 4, 1400), (11, 0, 0), (12, 0, 5 << 24)],
        // Unreachable: route, port; packet too big; hop limit exceeded; parameter problem.
        Family::V6 => vec![(1, 0, 0), (1, 4, 0), (2, 0, 1400), (3, 0, 0), (4, 1, 6)],
    }
}

fn router(family: Family) -> IpAddr {
    match family {
        Family::V4 => "10.133.7.7".parse().unwrap(),
        Family::V6 => "fd13:37::7:7".parse().unwrap(),
    }
}

/// What an ICMP message's checksum is computed from.
fn summed(from: IpAddr, to: IpAddr, message: &[u8]) -> Vec<u8> {
    match (from, to) {
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            let length = (message.len() as u32).to_be_bytes();
            [&from.octets()[..], &to.octets(), &length, &[0, 0, 0, 58], message].concat()
        }
        _ => message.to_vec(),
    }
}

/// An ICMP message.
fn icmp(from: IpAddr, to: IpAddr, (kind, code, word): Kind, quote: &[u8]) -> Vec<u8> {
    let mut message = [&[kind, code, 0, 0], &word.to_be_bytes()[..], quote].concat();
    let checksum = !sum(&summed(from, to, &message));
    message[2..4].copy_from_slice(&checksum.to_be_bytes());
    let mut packet = encapsulated(from, to, &message);
    if from.is_ipv4() {
        packet[9] = 1;
        correct(&mut packet);
    } else {
        packet[6] = 58;
    }
    packet
}

/// The ends of an ICMP message whose checksums are right, and the message.
fn read(packet: &[u8]) -> (IpAddr, IpAddr, Vec<u8>) {
    let (from, to): (IpAddr, IpAddr) = match PacketHeaders::from_ip_slice(packet).unwrap().net.unwrap() {
        NetHeaders::Ipv4(ip, _) => {
            assert_eq!(ip.header_checksum, ip.calc_header_checksum());
            (ip.source.into(), ip.destination.into())
        }
        NetHeaders::Ipv6(ip, _) => (ip.source.into(), ip.destination.into()),
        other => panic!("{other:?}"),
    };
    let message = packet[header_len(from)..].to_vec();
    assert_eq!(sum(&summed(from, to, &message)), 0xffff, "the checksum of {packet:?}");
    (from, to, message)
}

/// The same packet with eight octets of options, or a destination options header of that length.
fn with_options(packet: &[u8]) -> Vec<u8> {
    let (header, rest) = packet.split_at(if packet[0] >> 4 == 4 { 20 } else { 40 });
    let options = if header.len() == 20 { [1; 8] } else { [header[6], 0, 1, 4, 0, 0, 0, 0] };
    let mut packet = [header, &options, rest].concat();
    if header.len() == 20 {
        packet[0] = 0x47;
        packet[3] += 8;
        correct(&mut packet);
    } else {
        packet[6] = 60;
        packet[5] += 8;
    }
    packet
}

/// What becomes of `quoted` when it gets the ends of `other`: its transport's checksum stays.
fn translated(other: Vec<u8>, quoted: &[u8], protocol: Protocol, has_options: bool) -> Vec<u8> {
    let mut other = if has_options { with_options(&other) } else { other };
    other.truncate(quoted.len());
    let start = if quoted[0] >> 4 == 4 { 20 } else { 40 } + if has_options { 8 } else { 0 };
    let checksum = start + if protocol == Protocol::Tcp { 16 } else { 6 };
    if let Some(place) = other.get_mut(checksum..checksum + 2) {
        place.copy_from_slice(&quoted[checksum..checksum + 2]);
    }
    other
}

/// All that a router may quote of a packet: with options or without, whole or its first octets.
fn quotes(whole: &[u8]) -> Vec<(Vec<u8>, bool)> {
    let of = |packet: Vec<u8>, has_options: bool| {
        let least = packet.len() - (whole.len() - if whole[0] >> 4 == 4 { 28 } else { 48 });
        let short = packet[..least].to_vec();
        [(packet, has_options), (short, has_options)]
    };
    [of(whole.to_vec(), false), of(with_options(whole), true)].concat()
}

#[test]
fn what_routers_say_about_answers_reaches_the_endpoint() {
    let (bench, pod) = one_pod();
    let mut count = 0;
    for family in Family::BOTH {
        for (protocol, from) in PROTOCOLS.into_iter().zip(6000..) {
            let (caller, there) = ((client(family), from), (pod.address(family), 8000));
            let sent = request(family, protocol, caller.0, from, b"hello");
            assert_eq!(bench.uplink(&frame(&sent)).0, REDIRECT);
            let answer = packet(protocol, (vip(family), PORT), caller, b"there");
            let own = packet(protocol, there, caller, b"there");
            for kind in kinds(family) {
                for (quote, has_options) in quotes(&answer) {
                    let error = icmp(router(family), vip(family), kind, &quote);
                    let (verdict, out) = bench.uplink(&frame(&error));
                    assert_eq!(verdict, REDIRECT, "{family:?} {protocol:?} {kind:?}");
                    let (source, destination, message) = read(&out[14..]);
                    assert_eq!((source, destination), (router(family), there.0));
                    // Kind, code, and what else it says: the same.
                    let start = header_len(source);
                    assert_eq!(
                        (&message[..2], &message[4..8]),
                        (&error[start..start + 2], &error[start + 4..start + 8])
                    );
                    assert_eq!(message[8..], translated(own.clone(), &quote, protocol, has_options));
                    let hops = if family == Family::V4 { 8 } else { 7 };
                    assert_eq!(out[14 + hops], error[hops] - 1);
                    count += 1;
                }
            }
        }
    }
    assert_eq!(bench.counter("icmp_translated"), count);
}

#[test]
fn what_the_endpoint_says_about_requests_comes_from_the_frontend() {
    let (bench, pod) = one_pod();
    for family in Family::BOTH {
        for (protocol, from) in PROTOCOLS.into_iter().zip(6000..) {
            let (caller, there) = ((client(family), from), (pod.address(family), 8000));
            let sent = request(family, protocol, caller.0, from, b"hello");
            assert_eq!(bench.uplink(&frame(&sent)).0, REDIRECT);
            let got = packet(protocol, caller, there, b"hello");
            for kind in kinds(family) {
                for (quote, has_options) in quotes(&got) {
                    let error = icmp(there.0, caller.0, kind, &quote);
                    let (verdict, out) = bench.run("srcip_pod", &frame(&error));
                    assert_eq!(verdict, REDIRECT, "{family:?} {protocol:?} {kind:?}");
                    let (source, destination, message) = read(&out[14..]);
                    assert_eq!((source, destination), (vip(family), caller.0));
                    assert_eq!(message[8..], translated(sent.clone(), &quote, protocol, has_options));
                }
            }
            // About a connection of the pod's own.
            let own = packet(protocol, (caller.0, 9), there, b"");
            let error = frame(&icmp(there.0, caller.0, kinds(family)[1], &own));
            assert_eq!(bench.run("srcip_pod", &error), (PASS, error));
        }
    }
}

/// Whoever has the frontend or the pod's port by then: the flow is remembered longer than the Service that it belonged to.
#[test]
fn errors_about_a_flow_of_a_service_that_has_gone_pass_untouched() {
    let (mut bench, pod) = one_pod();
    let mut errors = Vec::new();
    for family in Family::BOTH {
        for (protocol, from) in PROTOCOLS.into_iter().zip(6000..) {
            let (caller, there) = ((client(family), from), (pod.address(family), 8000));
            let sent = request(family, protocol, caller.0, from, b"hello");
            assert_eq!(bench.uplink(&frame(&sent)).0, REDIRECT);
            let answer = packet(protocol, (vip(family), PORT), caller, b"there");
            let got = packet(protocol, caller, there, b"hello");
            let kind = kinds(family)[1];
            errors.push(("srcip_uplink", frame(&icmp(router(family), vip(family), kind, &answer))));
            errors.push(("srcip_pod", frame(&icmp(there.0, caller.0, kind, &got))));
        }
    }
    for (program, error) in &errors {
        assert_eq!(bench.run(program, error).0, REDIRECT, "{program}");
    }
    // Others, with the same frontends and the same pod.
    let mut others = services(&bench.site, &pod);
    for other in &mut others {
        other.name = ServiceName::new(other.name.as_str().replace("gateway", "other")).unwrap();
    }
    for services in [Vec::new(), others] {
        bench.site.apply(0, services);
        for (program, error) in &errors {
            assert_eq!(bench.run(program, error), (PASS, error.clone()), "{program}");
        }
    }
}

/// To the node of the endpoint as it came; from a node as if it had come here.
#[test]
fn errors_go_where_the_flow_goes() {
    let mut site = Site::new(2);
    let pod = site.pod(0);
    let mut services = Vec::new();
    for family in Family::BOTH {
        let mut here = site.service(Protocol::Udp, family);
        here.return_path = ReturnPath::Tunnel;
        here.endpoints.push(pod.endpoint(family, Place::Local, EndpointState::Ready));
        let mut there = site.service(Protocol::Tcp, family);
        let node = Place::Remote(site.node_address(1, family));
        there.endpoints.push(pod.endpoint(family, node, EndpointState::Ready));
        services.extend([here, there]);
    }
    site.apply(0, services);
    let bench = Bench::new(site);
    for family in Family::BOTH {
        let [own, node] = [0, 1].map(|n| bench.site.node_address(n, family).0);
        let (caller, there) = ((client(family), 6000), (pod.address(family), 8000));
        let (start, hops) = (header_len(own), if family == Family::V4 { 8 } else { 7 });
        // Both addresses are the last of a header.
        let ends = |packet: &[u8]| packet[hops + if start == 20 { 4 } else { 1 }..start].to_vec();
        for kind in kinds(family) {
            // An endpoint on another node: the error follows the requests.
            let sent = request(family, Protocol::Tcp, caller.0, caller.1, b"");
            assert_eq!(bench.uplink(&frame(&sent)).0, REDIRECT);
            let answer = packet(Protocol::Tcp, (vip(family), PORT), caller, b"");
            let error = icmp(router(family), vip(family), kind, &answer);
            let (verdict, out) = bench.uplink(&frame(&error));
            assert_eq!(verdict, REDIRECT);
            assert_eq!(ends(&out[14..]), ends(&encapsulated(own, node, &[])));
            let inside = &out[14 + start..];
            assert_eq!((read(inside), inside[hops]), (read(&error), error[hops] - 1));

            // An endpoint here, of a flow that another node has sent, and the error too.
            let sent = request(family, Protocol::Udp, caller.0, caller.1, b"");
            assert_eq!(bench.uplink(&frame(&encapsulated(node, own, &sent))).0, REDIRECT);
            let answer = packet(Protocol::Udp, (vip(family), PORT), caller, b"");
            let error = icmp(router(family), vip(family), kind, &answer);
            let (verdict, out) = bench.uplink(&frame(&encapsulated(node, own, &error)));
            assert_eq!(verdict, REDIRECT);
            let (_, destination, message) = read(&out[14..]);
            let own_answer = packet(Protocol::Udp, there, caller, b"");
            assert_eq!(destination, there.0);
            assert_eq!(message[8..], translated(own_answer, &answer, Protocol::Udp, false));

            // What the endpoint says goes back through that node.
            let got = packet(Protocol::Udp, caller, there, b"");
            let (verdict, out) = bench.run("srcip_pod", &frame(&icmp(there.0, caller.0, kind, &got)));
            assert_eq!(verdict, REDIRECT);
            assert_eq!(ends(&out[14..]), ends(&encapsulated(own, node, &[])));
            let (source, destination, message) = read(&out[14 + start..]);
            assert_eq!((source, destination), (vip(family), caller.0));
            assert_eq!(message[8..], translated(sent, &got, Protocol::Udp, false));
        }
    }
}

#[test]
fn other_messages_pass_untouched() {
    let (bench, pod) = one_pod();
    for family in Family::BOTH {
        let caller = (client(family), 6000);
        let sent = request(family, Protocol::Udp, caller.0, caller.1, b"");
        assert_eq!(bench.uplink(&frame(&sent)).0, REDIRECT);
        let answer = packet(Protocol::Udp, (vip(family), PORT), caller, b"there");
        let (kind, start) = (kinds(family)[0], header_len(caller.0));
        let error = |quote: &[u8]| frame(&icmp(router(family), vip(family), kind, quote));
        bench.passes_untouched(&error(&answer[..start + 3]), "no ports are quoted");
        bench.passes_untouched(&error(&answer[..start - 1]), "half a header is quoted");
        bench.passes_untouched(&error(b""), "nothing is quoted");
        let stranger = packet(Protocol::Udp, (vip(family), PORT), (caller.0, 6001), b"");
        bench.passes_untouched(&error(&stranger), "no such flow");
        let own = packet(Protocol::Udp, (pod.address(family), 8000), caller, b"");
        bench.passes_untouched(&error(&own), "no frontend is quoted");
        let inner = icmp(vip(family), caller.0, kind, &answer);
        bench.passes_untouched(&error(&inner), "an error about an error");
        let echo = if family == Family::V4 { (8, 0, 0) } else { (128, 0, 0) };
        bench.passes_untouched(&frame(&icmp(caller.0, vip(family), echo, &answer)), "an echo request");
    }
    assert_eq!(bench.counter("icmp_translated"), 0);
}

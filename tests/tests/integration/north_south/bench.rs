//! Runs the programs over single packets (`BPF_PROG_TEST_RUN`), and makes such packets.

use std::{net::IpAddr, time::Duration};

use aya::{
    Ebpf, EbpfLoader,
    programs::{SchedClassifier, TestRun as _, TestRunOptions},
};
use etherparse::{
    EtherType, Ethernet2Header, IpNumber, Ipv4Header, Ipv6Header, NetHeaders, PacketBuilder, PacketHeaders,
    TransportHeader,
};
use srcip_tests::Family;
use srcip_user::{
    NORTH_SOUTH_OBJECT,
    northsouth::{
        Programmer as _,
        desired::{EndpointState, Place, Protocol, ServicePort},
    },
    routing,
};

use super::topology::{PORT, Pod, Site, vip};

/// Verdicts of the programs.
pub const PASS: i32 = -1;
pub const DROP: i32 = 2;
pub const REDIRECT: i32 = 7;

/// Copies of the programs over the maps of a site's first node.
pub struct Bench {
    pub site: Site,
    object: Ebpf,
    device: u32,
}

impl Bench {
    pub fn new(site: Site) -> Self {
        let maps = site.nodes[0].pins.join("northsouth/maps");
        let object = EbpfLoader::new().default_map_pin_directory(maps).load(NORTH_SOUTH_OBJECT);
        let mut object = object.unwrap();
        for (_, program) in object.programs_mut() {
            let program: &mut SchedClassifier = program.try_into().unwrap();
            program.load().unwrap();
        }
        let devices = site.nodes[0].host.netns().run(routing::devices).unwrap().unwrap();
        let device = devices.iter().find(|device| device.name == "eth0").unwrap().index;
        Self { site, object, device }
    }

    /// Runs a program over an Ethernet frame. Returns its verdict and the frame as it left it.
    pub fn run(&self, program: &str, frame: &[u8]) -> (i32, Vec<u8>) {
        let (verdict, out, _) = self.run_often(program, frame, 1);
        (verdict, out)
    }

    /// Runs a program several times over one frame, which it should leave as it is. Returns the last verdict, the
    /// frame, and how long it took on average.
    pub fn run_often(&self, program: &str, frame: &[u8], repeat: u32) -> (i32, Vec<u8>, Duration) {
        let program: &SchedClassifier = self.object.program(program).unwrap().try_into().unwrap();
        // `struct __sk_buff` up to `ifindex`.
        let mut context = [0; 44];
        context[40..].copy_from_slice(&self.device.to_ne_bytes());
        let mut out = vec![0; frame.len() + 256];
        let result = self.site.nodes[0].host.netns().run(|| {
            let mut options = TestRunOptions::new();
            options.data_in = Some(frame);
            options.data_out = Some(&mut out);
            options.ctx_in = Some(&context);
            options.repeat = repeat;
            program.test_run(options).unwrap()
        });
        let result = result.unwrap();
        out.truncate(result.data_size_out as usize);
        (result.return_value as i32, out, result.duration)
    }

    pub fn uplink(&self, frame: &[u8]) -> (i32, Vec<u8>) {
        self.run("srcip_uplink", frame)
    }

    pub fn passes_untouched(&self, frame: &[u8], why: &str) {
        let (verdict, out) = self.uplink(frame);
        assert_eq!(verdict, PASS, "{why}");
        assert!(out == frame, "{why}: changed");
    }

    pub fn counter(&self, name: &str) -> u64 {
        self.site.nodes[0].programmer.counters().unwrap()[name]
    }
}

/// A site with one node and one pod, and a Service for it of each protocol and family.
pub fn one_pod() -> (Bench, Pod) {
    let mut site = Site::new(1);
    let pod = site.pod(0);
    let services = services(&site, &pod);
    site.apply(0, services);
    (Bench::new(site), pod)
}

pub fn services(site: &Site, pod: &Pod) -> Vec<ServicePort> {
    let mut services = Vec::new();
    for family in Family::BOTH {
        for protocol in [Protocol::Tcp, Protocol::Udp] {
            let mut service = site.service(protocol, family);
            service.endpoints.push(pod.endpoint(family, Place::Local, EndpointState::Ready));
            services.push(service);
        }
    }
    services
}

pub fn octets4(ip: IpAddr) -> [u8; 4] {
    match ip {
        IpAddr::V4(ip) => ip.octets(),
        IpAddr::V6(ip) => panic!("{ip} is no IPv4 address"),
    }
}

pub fn octets6(ip: IpAddr) -> [u8; 16] {
    match ip {
        IpAddr::V6(ip) => ip.octets(),
        IpAddr::V4(ip) => panic!("{ip} is no IPv6 address"),
    }
}

/// Octets of a header without options.
pub fn header_len(of: IpAddr) -> usize {
    if of.is_ipv4() { 20 } else { 40 }
}

/// An Ethernet frame with this packet.
pub fn frame(packet: &[u8]) -> Vec<u8> {
    let ether_type = if packet[0] >> 4 == 4 { EtherType::IPV4 } else { EtherType::IPV6 };
    let header = Ethernet2Header { source: [2; 6], destination: [4; 6], ether_type };
    [&header.to_bytes()[..], packet].concat()
}

/// A packet to the VIP, from a client's port.
pub fn request(family: Family, protocol: Protocol, client: IpAddr, from: u16, data: &[u8]) -> Vec<u8> {
    packet(protocol, (client, from), (vip(family), PORT), data)
}

pub fn packet(protocol: Protocol, from: (IpAddr, u16), to: (IpAddr, u16), data: &[u8]) -> Vec<u8> {
    let builder = match from.0 {
        IpAddr::V4(ip) => PacketBuilder::ipv4(ip.octets(), octets4(to.0), 9),
        IpAddr::V6(ip) => PacketBuilder::ipv6(ip.octets(), octets6(to.0), 9),
    };
    let mut packet = Vec::new();
    match protocol {
        Protocol::Tcp => builder.tcp(from.1, to.1, 1, 2).syn().write(&mut packet, data).unwrap(),
        Protocol::Udp => builder.udp(from.1, to.1).write(&mut packet, data).unwrap(),
    }
    packet
}

pub fn client(family: Family) -> IpAddr {
    match family {
        Family::V4 => "10.133.1.1".parse().unwrap(),
        Family::V6 => "fd13:37::1:1".parse().unwrap(),
    }
}

/// The ends of a packet whose checksums are right.
pub fn ends(packet: &[u8]) -> ((IpAddr, u16), (IpAddr, u16)) {
    let headers = PacketHeaders::from_ip_slice(packet).unwrap();
    let payload = headers.payload.slice();
    let transport = headers.transport.unwrap();
    let (from, to) = match &transport {
        TransportHeader::Tcp(tcp) => (tcp.source_port, tcp.destination_port),
        TransportHeader::Udp(udp) => (udp.source_port, udp.destination_port),
        other => panic!("{other:?}"),
    };
    match headers.net.unwrap() {
        NetHeaders::Ipv4(ip, _) => {
            assert_eq!(ip.header_checksum, ip.calc_header_checksum());
            match transport {
                TransportHeader::Tcp(tcp) => {
                    assert_eq!(tcp.checksum, tcp.calc_checksum_ipv4(&ip, payload).unwrap());
                }
                TransportHeader::Udp(udp) if udp.checksum != 0 => {
                    assert_eq!(udp.checksum, udp.calc_checksum_ipv4(&ip, payload).unwrap());
                }
                _ => {}
            }
            ((IpAddr::from(ip.source), from), (IpAddr::from(ip.destination), to))
        }
        NetHeaders::Ipv6(ip, _) => {
            let expected = match &transport {
                TransportHeader::Tcp(tcp) => (tcp.checksum, tcp.calc_checksum_ipv6(&ip, payload).unwrap()),
                TransportHeader::Udp(udp) => (udp.checksum, udp.calc_checksum_ipv6(&ip, payload).unwrap()),
                other => panic!("{other:?}"),
            };
            assert_eq!(expected.0, expected.1);
            ((IpAddr::from(ip.source), from), (IpAddr::from(ip.destination), to))
        }
        other => panic!("{other:?}"),
    }
}

/// The packet inside another one of its family.
pub fn encapsulated(from: IpAddr, to: IpAddr, inside: &[u8]) -> Vec<u8> {
    let mut packet = Vec::new();
    match from {
        IpAddr::V4(ip) => {
            let mut header =
                Ipv4Header::new(inside.len() as u16, 9, IpNumber::IPV4, ip.octets(), octets4(to)).unwrap();
            header.header_checksum = header.calc_header_checksum();
            header.write(&mut packet).unwrap();
        }
        IpAddr::V6(ip) => Ipv6Header {
            payload_length: inside.len() as u16,
            next_header: IpNumber::IPV6,
            hop_limit: 9,
            source: ip.octets(),
            destination: octets6(to),
            ..Default::default()
        }
        .write(&mut packet)
        .unwrap(),
    }
    packet.extend_from_slice(inside);
    packet
}

/// What a checksum is computed from, added up: all ones if there is a right one in it.
pub fn sum(octets: &[u8]) -> u16 {
    let word = |pair: &[u8]| u32::from(u16::from_be_bytes([pair[0], *pair.get(1).unwrap_or(&0)]));
    let mut sum: u32 = octets.chunks(2).map(word).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

/// Computes the checksum of an IPv4 header.
pub fn correct(packet: &mut [u8]) {
    let (header, _) = Ipv4Header::from_slice(packet).unwrap();
    packet[10..12].copy_from_slice(&header.calc_header_checksum().to_be_bytes());
}

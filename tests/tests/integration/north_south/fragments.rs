//! Datagrams in fragments, one by one (`BPF_PROG_TEST_RUN`): what follows its first fragment, and what does not.

use std::net::IpAddr;

use srcip_tests::Family;
use srcip_user::northsouth::desired::Protocol;

use super::{
    bench::{Bench, PASS, REDIRECT, client, correct, ends, frame, header_len, one_pod, packet, request},
    topology::{PORT, vip},
};

/// Octets of a fragment, without its headers.
const PART: usize = 1400;

/// The fragments of a packet, first to last, as Ethernet frames.
fn cut(whole: &[u8], part: usize, id: u16) -> Vec<Vec<u8>> {
    let is_v4 = whole[0] >> 4 == 4;
    let (header, rest) = whole.split_at(if is_v4 { 20 } else { 40 });
    let parts: Vec<_> = rest.chunks(part).collect();
    let of = |(number, data): (usize, &&[u8])| {
        let (units, more) = ((number * part / 8) as u16, u16::from(number + 1 < parts.len()));
        let mut header = header.to_vec();
        if is_v4 {
            header[2..4].copy_from_slice(&(20 + data.len() as u16).to_be_bytes());
            header[4..6].copy_from_slice(&id.to_be_bytes());
            header[6..8].copy_from_slice(&(more << 13 | units).to_be_bytes());
            correct(&mut header);
        } else {
            header[4..6].copy_from_slice(&(8 + data.len() as u16).to_be_bytes());
            let next = std::mem::replace(&mut header[6], 44);
            header.extend_from_slice(&[next, 0]);
            header.extend_from_slice(&(units << 3 | more).to_be_bytes());
            header.extend_from_slice(&u32::from(id).to_be_bytes());
        }
        frame(&[&header[..], data].concat())
    };
    parts.iter().enumerate().map(of).collect()
}

/// The datagram of these fragments, whose headers are right.
fn join(frames: &[Vec<u8>]) -> Vec<u8> {
    let first = &frames[0][14..];
    let is_v4 = first[0] >> 4 == 4;
    let headers = if is_v4 { 20 } else { 48 };
    let mut whole = first[..headers - if is_v4 { 0 } else { 8 }].to_vec();
    for frame in frames {
        let packet = &frame[14..];
        if is_v4 {
            let mut again = packet[..20].to_vec();
            correct(&mut again);
            assert_eq!(packet[..20], again, "the header's checksum");
            assert_eq!(packet[12..20], first[12..20], "the addresses");
        } else {
            assert_eq!(packet[8..40], first[8..40], "the addresses");
        }
        whole.extend_from_slice(&packet[headers..]);
    }
    let length = whole.len() as u16;
    if is_v4 {
        whole[2..4].copy_from_slice(&length.to_be_bytes());
        whole[6..8].fill(0);
        correct(&mut whole[..20]);
    } else {
        whole[4..6].copy_from_slice(&(length - 40).to_be_bytes());
        whole[6] = first[40];
    }
    whole
}

fn data() -> Vec<u8> {
    (0..4000_u32).map(|i| ((i * i) >> 5) as u8).collect()
}

/// Runs a program over these frames, each of which it redirects.
fn redirected(bench: &Bench, program: &str, frames: &[Vec<u8>]) -> Vec<Vec<u8>> {
    let run = |frame: &Vec<u8>| {
        let (verdict, out) = bench.run(program, frame);
        assert_eq!(verdict, REDIRECT);
        out
    };
    frames.iter().map(run).collect()
}

fn pass(bench: &Bench, program: &str, frames: &[Vec<u8>]) {
    for frame in frames {
        assert_eq!(bench.run(program, frame), (PASS, frame.clone()));
    }
}

#[test]
fn both_directions_are_translated_whole() {
    let (bench, pod) = one_pod();
    for family in Family::BOTH {
        let (caller, there) = ((client(family), 3000), (pod.address(family), 8000));
        let frontend: (IpAddr, u16) = (vip(family), PORT);
        let asked = cut(&packet(Protocol::Udp, caller, frontend, &data()), PART, 7);
        let whole = join(&redirected(&bench, "srcip_uplink", &asked));
        // Its checksum too is right.
        assert_eq!((ends(&whole), whole.len()), ((caller, there), header_len(caller.0) + 8 + 4000));
        assert!(whole.ends_with(&data()));
        let answered = cut(&packet(Protocol::Udp, there, caller, &data()), PART, 7);
        let whole = join(&redirected(&bench, "srcip_pod", &answered));
        assert_eq!(ends(&whole), (frontend, caller));
        assert!(whole.ends_with(&data()));
    }
    assert_eq!(bench.counter("passed_fragments"), 0);
    assert_eq!((bench.counter("to_endpoint"), bench.counter("replies")), (6, 6));
}

#[test]
fn what_has_no_first_fragment_passes_untouched_and_is_counted() {
    let (bench, pod) = one_pod();
    for family in Family::BOTH {
        let (caller, frontend) = ((client(family), 3000), (vip(family), PORT));
        let whole = packet(Protocol::Udp, caller, frontend, &data());
        // Too early, of another datagram, of one that was none of ours and came by the same identification.
        pass(&bench, "srcip_uplink", &cut(&whole, PART, 1)[1..]);
        redirected(&bench, "srcip_uplink", &cut(&whole, PART, 1)[..1]);
        pass(&bench, "srcip_uplink", &cut(&whole, PART, 2)[1..]);
        let other = packet(Protocol::Udp, caller, (frontend.0, PORT + 1), &data());
        pass(&bench, "srcip_uplink", &cut(&other, PART, 1));
        // The same of answers.
        let there = (pod.address(family), 8000);
        let whole = packet(Protocol::Udp, there, caller, &data());
        pass(&bench, "srcip_pod", &cut(&whole, PART, 1)[1..]);
        redirected(&bench, "srcip_pod", &cut(&whole, PART, 1)[..1]);
        let own = packet(Protocol::Udp, (there.0, 9), caller, &data());
        pass(&bench, "srcip_pod", &cut(&own, PART, 1));
    }
    assert_eq!(bench.counter("passed_fragments"), 2 * 10);
}

#[test]
fn no_fragment_writes_over_the_header_of_the_first() {
    let (bench, _pod) = one_pod();
    for family in Family::BOTH {
        let whole = request(family, Protocol::Tcp, client(family), 3000, &data());
        let frames = cut(&whole, 24, 7);
        redirected(&bench, "srcip_uplink", &frames[..2]);
        // At 8 and 16 octets there is still the header of TCP.
        pass(&bench, "srcip_uplink", &cut(&whole, 8, 7)[1..3]);
        redirected(&bench, "srcip_uplink", &frames[1..]);
        // A first one without all of it says too little.
        pass(&bench, "srcip_uplink", &cut(&whole, 16, 8));
        // Where they overlap otherwise is for the pod to judge, which gets them as they are.
        let udp = request(family, Protocol::Udp, client(family), 3000, &data());
        redirected(&bench, "srcip_uplink", &cut(&udp, 64, 9));
        redirected(&bench, "srcip_uplink", &cut(&udp, 8, 9)[1..]);
    }
    assert_eq!(bench.counter("passed_malformed"), 2);
}

//! Ten thousand Services: how long they take to program, and what they cost a packet.

use std::time::{Duration, Instant};

use srcip_tests::Family;
use srcip_user::northsouth::desired::{Endpoint, EndpointState, Place, Protocol, ServiceName, ServicePort};

use super::{
    bench::{Bench, DROP, REDIRECT, client, frame, packet, request},
    topology::{PORT, Pod, Site, vip},
};

const COUNT: u16 = 10_000;

/// Services at one address, each with a port of its own.
fn services(site: &Site, endpoints: &[Endpoint]) -> Vec<ServicePort> {
    let service = |n: u16| {
        let mut service = site.service(Protocol::Tcp, Family::V4);
        service.name = ServiceName::new(format!("scale/s{n}:http")).unwrap();
        service.frontends[0].port = 10_000 + n;
        service.endpoints = endpoints.to_vec();
        service.endpoints.iter_mut().for_each(|endpoint| endpoint.port = 8000 + n % 7);
        service
    };
    (0..COUNT).map(service).collect()
}

#[test]
fn a_change_of_one_endpoint_writes_nothing_of_other_services() {
    let mut site = Site::new(1);
    let pods: Vec<_> = (0..10).map(|_| site.pod(0)).collect();
    let endpoints: Vec<_> =
        pods.iter().map(|pod| pod.endpoint(Family::V4, Place::Local, EndpointState::Ready)).collect();
    let mut all = services(&site, &endpoints);
    let start = Instant::now();
    let changes = site.apply(0, all.clone());
    let programmed = start.elapsed();
    assert_eq!(changes.changed.len(), usize::from(COUNT));
    // A name, counters, a service, a frontend and ten endpoints each; two addresses of the node, and which are its own.
    assert_eq!(changes.writes, u64::from(COUNT) * 14 + 3);
    all[5000].endpoints.pop();
    let name = all[5000].name.clone();
    let start = Instant::now();
    let changes = site.apply(0, all);
    let changed = start.elapsed();
    assert_eq!((changes.changed, changes.removed), (vec![name], Vec::new()));
    // Its tables in one piece, and the endpoint's removal.
    assert_eq!(changes.writes, 2);
    eprintln!("10,000 Services with 10 endpoints: {programmed:?}; one endpoint gone: {changed:?}");
}

/// The first node of a site with one Service of ten endpoints, or with ten thousand beside it.
fn bench(many: bool, with_endpoints: bool) -> Bench {
    let mut site = Site::new(1);
    let pods: Vec<Pod> = (0..if with_endpoints { 10 } else { 0 }).map(|_| site.pod(0)).collect();
    let endpoints: Vec<_> =
        pods.iter().map(|pod| pod.endpoint(Family::V4, Place::Local, EndpointState::Ready)).collect();
    let mut one = site.service(Protocol::Tcp, Family::V4);
    one.endpoints = endpoints.clone();
    let others = if many { services(&site, &endpoints) } else { Vec::new() };
    site.apply(0, others.into_iter().chain([one]));
    Bench::new(site)
}

fn median(mut took: Vec<Duration>) -> Duration {
    took.sort();
    took[took.len() / 2]
}

fn tell(what: &str, [one, many]: [Duration; 2]) {
    let ratio = many.as_secs_f64() / one.as_secs_f64();
    eprintln!("{what} among 1 Service: {one:?}; among 10,001: {many:?}; ratio {ratio:.3}");
}

/// A packet for a Service without endpoints is looked up everywhere, and left as it is; so the program can run over it
/// again and again.
#[test]
fn what_ten_thousand_services_cost_a_packet() {
    const REPEAT: u32 = 10_000;
    let benches = [false, true].map(|many| bench(many, false));
    let frame = frame(&request(Family::V4, Protocol::Tcp, client(Family::V4), 5000, b""));
    let mut took = [const { Vec::<Duration>::new() }; 2];
    for _ in 0..41 {
        for (bench, took) in benches.iter().zip(&mut took) {
            let (verdict, out, duration) = bench.run_often("srcip_uplink", &frame, REPEAT);
            assert_eq!((verdict, out == frame), (DROP, true));
            took.push(duration);
        }
    }
    tell("a packet that is dropped", took.map(median));
}

/// The whole way: an endpoint is chosen and noted, or known, and the packet rewritten. That can be done once to a
/// frame, so each run is timed by itself, with what it costs the kernel to begin.
#[test]
fn what_ten_thousand_services_cost_a_connection() {
    let benches = [false, true].map(|many| bench(many, true));
    let client = client(Family::V4);
    let to =
        |from: u16, port: u16| frame(&packet(Protocol::Tcp, (client, from), (vip(Family::V4), port), b""));
    let run = |bench: &Bench, frame: &[u8]| {
        let (verdict, out, duration) = bench.run_often("srcip_uplink", frame, 1);
        assert_eq!((verdict, out == frame), (REDIRECT, false));
        duration
    };
    let [mut new, mut known] = [const { [const { Vec::<Duration>::new() }; 2] }; 2];
    let mut elsewhere = Vec::new();
    for from in 10_000..15_000 {
        let frame = to(from, PORT);
        for (i, bench) in benches.iter().enumerate() {
            new[i].push(run(bench, &frame));
            known[i].push(run(bench, &frame));
        }
        // One that has not been asked for before: nothing of it is in the processor's caches.
        elsewhere.push(run(&benches[1], &to(from, from)));
    }
    let one = median(new[0].clone());
    tell("a packet that opens a connection", new.map(median));
    tell("one of an established connection", known.map(median));
    tell("one that opens the first connection to its Service", [one, median(elsewhere)]);
}

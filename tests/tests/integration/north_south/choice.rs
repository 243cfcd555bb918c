//! Which endpoint a connection goes to, and how long it stays there.

use std::{net::IpAddr, time::Duration};

use srcip_tests::Family;
use srcip_user::northsouth::desired::{EndpointState, Place, Protocol};

use super::{
    bench::{Bench, REDIRECT, client, ends, frame, request},
    topology::{Pod, Site},
};

/// Which of the pods each client port goes to.
fn choices(bench: &Bench, ports: std::ops::Range<u16>) -> Vec<IpAddr> {
    let family = Family::V4;
    ports
        .map(|port| {
            let (verdict, out) =
                bench.uplink(&frame(&request(family, Protocol::Tcp, client(family), port, b"")));
            assert_eq!(verdict, REDIRECT);
            ends(&out[14..]).1.0
        })
        .collect()
}

#[test]
fn flows_stay_and_few_new_ones_move_when_an_endpoint_goes() {
    const COUNT: usize = 10;
    let mut site = Site::new(1);
    let pods: Vec<Pod> = (0..COUNT).map(|_| site.pod(0)).collect();
    let mut service = site.service(Protocol::Tcp, Family::V4);
    service.endpoints =
        pods.iter().map(|pod| pod.endpoint(Family::V4, Place::Local, EndpointState::Ready)).collect();
    site.apply(0, [service.clone()]);
    let mut bench = Bench::new(site);
    let before = choices(&bench, 10_000..14_000);
    for pod in &pods {
        let share = before.iter().filter(|ip| **ip == pod.address(Family::V4)).count();
        assert!((300..500).contains(&share), "{share} of 4000 to one of ten");
    }

    // It drains: its flows stay, new ones go elsewhere.
    service.endpoints[3].state = EndpointState::ServingTerminating;
    let changes = bench.site.apply(0, [service.clone()]);
    assert_eq!(changes.changed, [service.name.clone()]);
    let leaving = pods[3].address(Family::V4);
    // Packets of established connections, not new ones.
    assert_eq!(choices(&bench, 10_000..14_000), before);
    let fresh = choices(&bench, 20_000..24_000);
    assert!(!fresh.contains(&leaving));

    // It vanishes: the other flows stay, and of new ones little more than its share moves.
    service.endpoints.remove(3);
    bench.site.apply(0, [service.clone()]);
    assert_eq!(choices(&bench, 20_000..24_000), fresh);
    let again = choices(&bench, 10_000..14_000);
    assert!(!again.contains(&leaving));
    let kept = before.iter().zip(&again).filter(|(a, b)| a == b).count();
    let lost = before.iter().filter(|ip| **ip == leaving).count();
    assert_eq!(kept, before.len() - lost);

    // Nothing to do is nothing done; also for who comes anew and finds all of it there.
    assert!(bench.site.apply(0, [service.clone()]).is_empty());
    bench.site.reopen(0);
    assert!(bench.site.apply(0, [service]).is_empty());
    assert_eq!(choices(&bench, 20_000..24_000), fresh);
}

#[test]
fn a_client_with_affinity_stays_with_its_endpoint() {
    let mut site = Site::new(1);
    let pods: Vec<Pod> = (0..5).map(|_| site.pod(0)).collect();
    let mut service = site.service(Protocol::Tcp, Family::V4);
    service.affinity = Some(Duration::from_secs(600));
    service.endpoints =
        pods[..4].iter().map(|pod| pod.endpoint(Family::V4, Place::Local, EndpointState::Ready)).collect();
    site.apply(0, [service.clone()]);
    let mut bench = Bench::new(site);
    let first = choices(&bench, 1000..1050);
    assert!(first.iter().all(|ip| *ip == first[0]));
    // Another endpoint comes: the client does not move. Its own goes: it moves, all of it.
    service.endpoints.push(pods[4].endpoint(Family::V4, Place::Local, EndpointState::Ready));
    bench.site.apply(0, [service.clone()]);
    assert_eq!(choices(&bench, 2000..2050), first);
    service.endpoints.retain(|endpoint| endpoint.address.0 != first[0]);
    bench.site.apply(0, [service]);
    let moved = choices(&bench, 3000..3050);
    assert!(moved.iter().all(|ip| *ip == moved[0] && *ip != first[0]));
}

#[test]
fn affinity_ends_with_its_timeout() {
    let mut site = Site::new(1);
    let pods: Vec<Pod> = (0..5).map(|_| site.pod(0)).collect();
    let mut service = site.service(Protocol::Tcp, Family::V4);
    service.affinity = Some(Duration::from_secs(600));
    let endpoints = pods
        .iter()
        .map(|pod| pod.endpoint(Family::V4, Place::Local, EndpointState::Ready))
        .collect::<Vec<_>>();
    service.endpoints = endpoints[..1].to_vec();
    site.apply(0, [service.clone()]);
    let mut bench = Bench::new(site);
    let chosen = |bench: &Bench, port: u16| -> Vec<IpAddr> {
        let ask = |n: u8| {
            let client = IpAddr::from([10, 133, 1, n]);
            let (verdict, out) = bench.uplink(&frame(&request(Family::V4, Protocol::Tcp, client, port, b"")));
            assert_eq!(verdict, REDIRECT);
            ends(&out[14..]).1.0
        };
        (1..=20).map(ask).collect()
    };
    let only = pods[0].address(Family::V4);
    assert!(chosen(&bench, 1000).iter().all(|ip| *ip == only));
    // Others come: the clients stay where they are, until they have not been seen for as long as is agreed by then.
    service.endpoints = endpoints;
    bench.site.apply(0, [service.clone()]);
    assert!(chosen(&bench, 1001).iter().all(|ip| *ip == only));
    let timeout = Duration::from_millis(100);
    service.affinity = Some(timeout);
    bench.site.apply(0, [service]);
    std::thread::sleep(timeout * 2);
    let moved = chosen(&bench, 1002).iter().filter(|ip| **ip != only).count();
    assert!(moved >= 10, "{moved} of 20 moved to the other four of five");
}

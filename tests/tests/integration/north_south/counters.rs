//! What is counted of each Service.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
};

use aya::maps::{HashMap, Map, MapData};
use srcip_common::northsouth::{ServiceId, counter::ServiceCounters, packet::UDP};
use srcip_tests::{Family, process::sh, srcip::binary};
use srcip_user::northsouth::{
    dataplane::{read, trace::Reader},
    desired::{EndpointState, Place, Protocol, ServiceName, ServicePort},
    status::Status,
};

use super::{
    bench::{Bench, client, encapsulated, frame, packet},
    topology::{PORT, Site, vip},
};

/// What is counted of a Service, but zeroes.
type Counts = BTreeMap<&'static str, u64>;

/// All that is counted, by Service.
fn counts(bench: &Bench) -> BTreeMap<String, Counts> {
    let status = Status::read(&bench.site.nodes[0].pins).unwrap().unwrap();
    let counted = status.services.into_iter().map(|service| {
        let counts = service.counters.into_iter().filter(|(_, count)| *count > 0);
        (service.name, counts.collect())
    });
    counted.collect()
}

#[test]
fn every_service_has_its_own() {
    const FAMILY: Family = Family::V4;
    let mut site = Site::new(2);
    let pod = site.pod(0);
    let mut port = PORT;
    let mut service = |name: &str, place: Option<Place>| -> ServicePort {
        let mut service = site.service(Protocol::Udp, FAMILY);
        service.name = ServiceName::new(format!("test/{name}:main")).unwrap();
        service.frontends[0].port = port;
        port += 1;
        service.endpoints.extend(place.map(|place| pod.endpoint(FAMILY, place, EndpointState::Ready)));
        service
    };
    let here = service("here", Some(Place::Local));
    let elsewhere = service("elsewhere", Some(Place::Remote(site.node_address(1, FAMILY))));
    let nowhere = service("nowhere", None);
    let mut refused = service("refused", Some(Place::Local));
    refused.source_ranges = vec!["192.0.2.0/24".parse().unwrap()];
    let all = [&here, &elsewhere, &nowhere, &refused].map(Clone::clone);
    site.apply(0, all.clone());
    let mut bench = Bench::new(site);
    let [own, node] = [0, 1].map(|n| bench.site.node_address(n, FAMILY).0);
    let request = |service: &ServicePort, from: u16| {
        packet(Protocol::Udp, (client(FAMILY), from), (vip(FAMILY), service.frontends[0].port), b"data")
    };
    let send = |bench: &Bench, packet: &[u8]| drop(bench.uplink(&frame(packet)));
    // IP, UDP, data.
    const SIZE: u64 = 20 + 8 + 4;

    for (service, times) in [(&here, 3), (&elsewhere, 4), (&nowhere, 5), (&refused, 6)] {
        for from in 0..times {
            // The second one of a flow is no new flow.
            send(&bench, &request(service, 1000 + from));
            send(&bench, &request(service, 1000 + from));
        }
    }
    for from in 0..2 {
        send(&bench, &encapsulated(node, own, &request(&here, 2000 + from)));
        // Only to an endpoint on this node, never on.
        send(&bench, &encapsulated(node, own, &request(&elsewhere, 2000 + from)));
    }
    let there: (IpAddr, u16) = (pod.address(FAMILY), 8000);
    let answer = packet(Protocol::Udp, there, (client(FAMILY), 1000), b"a longer answer");
    bench.run("srcip_pod", &frame(&answer));

    let name = |service: &ServicePort| service.name.to_string();
    let wanted = BTreeMap::from([
        (
            name(&here),
            Counts::from([
                ("new_flows", 3),
                ("new_flows_received", 2),
                ("request_bytes", (3 * 2 + 2) * SIZE),
                ("reply_bytes", answer.len() as u64),
            ]),
        ),
        (name(&elsewhere), Counts::from([("new_flows_handed_on", 4), ("dropped_no_endpoint", 2)])),
        (name(&nowhere), Counts::from([("dropped_no_endpoint", 10)])),
        (name(&refused), Counts::from([("dropped_source_range", 12)])),
    ]);
    assert_eq!(counts(&bench), wanted);
    // Each is in those of all Services as well.
    for (counter, of_all) in
        [("new_flows", 3), ("new_flows_handed_on", 4), ("new_flows_received", 2), ("dropped_no_endpoint", 12)]
    {
        assert_eq!(bench.counter(counter), of_all, "{counter}");
    }

    // An agent that starts again finds them; a change of the Service leaves them.
    bench.site.reopen(0);
    let mut changed = all.clone();
    changed[0].endpoints.clear();
    bench.site.apply(0, changed);
    assert_eq!(counts(&bench), wanted);
    // They go with the Service.
    bench.site.apply(0, all[1..].to_vec());
    assert_eq!(
        counts(&bench).into_keys().collect::<Vec<_>>(),
        [name(&elsewhere), name(&nowhere), name(&refused)]
    );
    bench.site.apply(0, all.clone());
    assert_eq!(counts(&bench)[&name(&here)], Counts::new());
    // What an earlier version has made has no place for them yet. Who only looks goes on without.
    let pins = bench.site.nodes[0].pins.clone();
    std::fs::remove_file(pins.join("northsouth/maps/NS_SERVICE_COUNTERS")).unwrap();
    let status = Status::read(&pins).unwrap().unwrap();
    assert_eq!(status.services.len(), all.len());
    assert!(status.services.iter().all(|service| service.counters.is_empty()));
    let reader = Reader::open(&pins).unwrap().unwrap();
    let frontend = SocketAddr::new(vip(FAMILY), here.frontends[0].port);
    assert_eq!(reader.handled(frontend, UDP).unwrap().unwrap().name, here.name);
    assert_eq!(read::counts(&pins).unwrap(), Some(BTreeMap::new()));
    let srcip = binary("srcip");
    let shown = sh(&format!("{} status -o wide --pin-path {}", srcip.display(), pins.display())).unwrap();
    assert_eq!(
        shown.lines().filter(|line| line.matches(" unknown ").count() == 6).count(),
        all.len(),
        "{shown}"
    );
    bench.site.reopen(0);
    let changes = bench.site.apply(0, all.clone());
    assert!(changes.is_empty() && changes.writes == all.len() as u64, "{changes:?}");
    assert!(counts(&bench).into_values().all(|counts| counts.is_empty()));
}

/// A version that counts nothing by Service has taken one away, and left what was counted of it.
#[test]
fn what_was_counted_of_a_service_that_went_unnoticed_is_forgotten() {
    let mut site = Site::new(1);
    let service = site.service(Protocol::Udp, Family::V4);
    site.apply(0, [service]);
    let pin = site.nodes[0].pins.join("northsouth/maps/NS_SERVICE_COUNTERS");
    let counters = Map::HashMap(MapData::from_pin(&pin).unwrap());
    let mut counters: HashMap<_, ServiceId, ServiceCounters> = counters.try_into().unwrap();
    let counted = |counters: &HashMap<_, _, _>| counters.keys().map(Result::unwrap).collect::<Vec<_>>();
    let before = counted(&counters);
    assert_eq!(before.len(), 1);
    counters.insert(before[0] + 1, ServiceCounters::ZERO, 0).unwrap();
    site.reopen(0);
    assert_eq!(counted(&counters), before);
}

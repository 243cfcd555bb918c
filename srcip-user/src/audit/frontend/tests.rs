use serde_json::json;
use srcip_common::northsouth::{SENT_HERE, Service};

use super::*;
use crate::northsouth::desired::ServiceName;

const TO: &str = "203.0.113.1:80";
const NOW: u64 = 1_000_000_000_000;

/// Two endpoints on this node and two on another one, all of which take new connections, as the data plane has it.
fn handled() -> Handled {
    let node = Address::from("172.18.0.2".parse::<IpAddr>().unwrap());
    let nobody = Address::from_v4_be(0);
    let endpoint = |last: u8, node| Endpoint {
        address: IpAddr::from([10, 244, 1, last]).into(),
        node,
        port: 8000,
        flags: takes_new(ENTERED_HERE),
    };
    let endpoints: BTreeMap<u16, Endpoint> =
        [(3, endpoint(1, nobody)), (4, endpoint(2, nobody)), (7, endpoint(3, node)), (9, endpoint(4, node))]
            .into();
    let mut tables = [[NONE; lookup::SIZE]; 2];
    for (kind, here_alone) in [(ENTERED_HERE, false), (SENT_HERE, true)] {
        let takes = endpoints.iter().filter(|(_, endpoint)| !here_alone || endpoint.node == nobody);
        fill(&mut tables[kind], takes);
    }
    Handled {
        name: ServiceName::new("shop/web:main").unwrap(),
        id: 5,
        node: None,
        ranges: None,
        service: Box::new(Service { affinity_ns: 0, flags: 0, tables, padding: 0 }),
        endpoints,
    }
}

fn fill<'a>(table: &mut Table, endpoints: impl Iterator<Item = (&'a u16, &'a Endpoint)>) {
    let candidate = |(&index, e): (&u16, &Endpoint)| Candidate { address: e.address, port: e.port, index };
    lookup::fill(table, &mut endpoints.map(candidate).collect::<Vec<_>>());
}

/// An open one of the Service.
fn flow(address: [u8; 4], port: u16, index: u32) -> Flow {
    Flow {
        seen_ns: NOW,
        address: IpAddr::from(address).into(),
        node: Address::from_v4_be(0),
        service: 5,
        index,
        port,
        flags: 0,
        padding: 0,
    }
}

fn client(from: &str) -> Client {
    Client { end: from.parse().unwrap(), allowed: true, flow: None, affinity: None, others: BTreeMap::new() }
}

fn told(handled: &Handled, client: Option<Client>) -> Way {
    way(handled, client.as_ref(), TO.parse().unwrap(), TCP, &Cluster::default(), NOW)
}

#[test]
fn without_a_client_the_shares_are_told() {
    let way = told(&handled(), None);
    assert_eq!((way.endpoints.len(), way.chosen, way.allowed), (4, None, None));
    assert!((way.endpoints.iter().map(|share| share.share).sum::<f64>() - 1.0).abs() < 1e-9);
    assert!(way.endpoints.iter().all(|share| (0.22..0.28).contains(&share.share)), "{way:?}");
    let text = way.draw();
    assert!(
        text.contains("anybody") && text.contains("one of 4 endpoints") && text.contains("--from"),
        "{text}"
    );
    assert!(text.contains("10.244.1.3:8000  by node 172.18.0.2"), "{text}");
    assert!(text.contains("10.244.1.1:8000  on this node"), "{text}");
    // A client whose port is not known could go to any.
    assert_eq!(told(&handled(), Some(client("198.51.100.10"))).chosen, None);
}

#[test]
fn a_client_with_a_port_goes_where_the_tables_say() {
    let handled = handled();
    let (mut here, mut there) = (0, 0);
    for port in 1000..1100 {
        let way = told(&handled, Some(client(&format!("198.51.100.10:{port}"))));
        let chosen = way.chosen.unwrap();
        assert_eq!(chosen.by, By::Table);
        let key = request(("198.51.100.10".parse().unwrap(), port), TO.parse().unwrap(), TCP);
        let place = lookup::place(lookup::hash_of(&key, false));
        let first = handled.endpoints[&handled.service.tables[ENTERED_HERE][place]];
        let last = handled.endpoints.values().find(|e| Some(address(e)) == chosen.endpoint).unwrap();
        assert_eq!(first.node, last.node, "the other node chooses among its own");
        match chosen.node {
            None => {
                here += 1;
                assert_eq!(first, *last);
            }
            Some(node) => {
                there += 1;
                let text = way.draw();
                assert!(text.contains(&format!("sends it on to node {node}, IP in IP")), "{text}");
                assert!(text.contains(&format!("sees 198.51.100.10:{port} at {}", address(last))), "{text}");
                assert!(text.contains("straight from its node"), "{text}");
            }
        }
    }
    assert!(here > 20 && there > 20, "{here} {there}");
}

#[test]
fn an_open_connection_stays_and_one_that_ends_is_chosen_anew() {
    let handled = handled();
    let flow = flow([10, 244, 1, 99], 8000, 99);
    let with = |flow| told(&handled, Some(Client { flow: Some(flow), ..client("198.51.100.10:1000") }));
    let chosen = with(flow).chosen.unwrap();
    assert_eq!((chosen.endpoint, chosen.by), (Some("10.244.1.99:8000".parse().unwrap()), By::Flow));
    for other in [Flow { flags: CLOSING, ..flow }, Flow { service: 6, ..flow }] {
        assert_eq!(with(other).chosen.unwrap().by, By::Table);
    }
    let node = IpAddr::from([172, 18, 0, 2]);
    let chosen = with(Flow { node: node.into(), ..flow }).chosen.unwrap();
    assert_eq!((chosen.endpoint, chosen.node), (None, Some(node)));
}

#[test]
fn affinity_needs_no_port_and_ends() {
    let mut handled = handled();
    handled.service.affinity_ns = 60_000_000_000;
    let by_table = told(&handled, Some(client("198.51.100.10"))).chosen.unwrap();
    assert_eq!((by_table.by, by_table.endpoint.is_some()), (By::Table, true));
    let other = handled.endpoints.iter().find(|(_, e)| Some(address(e)) != by_table.endpoint).unwrap();
    let affinity =
        |seen_ns| Affinity { seen_ns, address: other.1.address, index: (*other.0).into(), padding: 0 };
    let with =
        |affinity| told(&handled, Some(Client { affinity: Some(affinity), ..client("198.51.100.10") }));
    assert_eq!(with(affinity(NOW - 59_000_000_000)).chosen.unwrap().by, By::Affinity);
    assert_eq!(with(affinity(NOW - 61_000_000_000)).chosen, Some(by_table));
    // Its number is another endpoint's by now.
    let moved = Affinity { address: IpAddr::from([10, 244, 1, 50]).into(), ..affinity(NOW) };
    assert_eq!(with(moved).chosen, Some(by_table));
}

#[test]
fn who_is_not_let_in_and_who_finds_nobody_is_told_why() {
    let mut handled = handled();
    handled.ranges = Some(vec!["10.0.0.0/8".parse().unwrap()]);
    let way = told(&handled, Some(Client { allowed: false, ..client("198.51.100.10:1000") }));
    assert_eq!((way.allowed, way.chosen), (Some(false), None));
    let text = way.draw();
    assert!(
        text.contains("10.0.0.0/8 alone: this one may not") && text.contains("dropped_source_range"),
        "{text}"
    );
    assert!(told(&handled, Some(client("10.1.1.1:1000"))).chosen.is_some());

    handled.endpoints.clear();
    handled.service.tables = [[NONE; lookup::SIZE]; 2];
    let text = told(&handled, None).draw();
    assert!(text.contains("dropped_no_endpoint"), "{text}");
}

#[test]
fn names_in_json_are_stable() {
    let mut handled = handled();
    handled.service.flags = LOCAL_POLICY | TUNNEL_RETURN;
    handled.endpoints.retain(|index, _| *index == 3);
    handled.service.tables = [[3; lookup::SIZE]; 2];
    let mut value = serde_json::to_value(told(&handled, Some(client("198.51.100.10:1000")))).unwrap();
    let hops = value.as_object_mut().unwrap().remove("hops").unwrap();
    assert_eq!(
        value,
        json!({
            "frontend": TO, "protocol": "tcp", "service": "shop/web:main", "policy": "Local",
            "affinity_seconds": null, "return_path": "tunnel", "source_ranges": null, "allowed": true,
            "endpoints": [{"address": "10.244.1.1:8000", "node": null, "share": 1.0}],
            "chosen": {"endpoint": "10.244.1.1:8000", "node": null, "by": "table"},
            "collides": false,
        })
    );
    let names: Vec<_> = hops.as_array().unwrap().iter().map(|hop| hop["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["client", "frontend", "this node", "application"]);
}

#[test]
fn a_pod_whose_answers_could_not_be_told_apart_is_passed_over() {
    let mut handled = handled();
    handled.endpoints.retain(|_, endpoint| endpoint.node.is_unspecified());
    fill(&mut handled.service.tables[ENTERED_HERE], handled.endpoints.iter());
    // From the same port to the same pod, by a NodePort.
    let other = flow([172, 18, 0, 1], 30080, 3);
    for port in 1000..1050 {
        let from = format!("198.51.100.10:{port}");
        let first = told(&handled, Some(client(&from))).chosen.unwrap();
        let with = |others: &[(Option<SocketAddr>, Flow)]| {
            let others = others.iter().map(|(pod, flow)| (pod.unwrap(), *flow)).collect();
            told(&handled, Some(Client { others, ..client(&from) }))
        };
        let way = with(&[(first.endpoint, other)]);
        match way.chosen {
            Some(chosen) => {
                assert_eq!(chosen.by, By::NextPlace);
                assert_ne!(chosen.endpoint, first.endpoint);
                assert!(way.draw().contains("another connection from that port"), "{}", way.draw());
            }
            // Each of the places that are tried is that pod's.
            None => assert!(way.collides),
        }
        // The same frontend's, one that is over, and one that nobody has heard of for long are in nobody's way.
        let to: SocketAddr = TO.parse().unwrap();
        let same = Flow { address: to.ip().into(), port: to.port(), ..other };
        for flow in [same, Flow { flags: CLOSING, ..other }, Flow { seen_ns: NOW - 301_000_000_000, ..other }]
        {
            assert_eq!(with(&[(first.endpoint, flow)]).chosen, Some(first));
        }
        let all: Vec<_> = handled.endpoints.values().map(|e| (Some(address(e)), other)).collect();
        let way = with(&all);
        assert_eq!((way.chosen, way.collides), (None, true));
        assert!(way.draw().contains("dropped_collision"), "{}", way.draw());
    }
}

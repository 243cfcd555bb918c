//! What an operator sees: `srcip status`, `/readyz`; and an agent that is kept from its work.

use serde_json::{Value, json};
use srcip_tests::{
    Family,
    cluster::{
        Cluster,
        agent::Agents,
        kube_proxy,
        node::PodNetwork,
        service::{Service, State},
        vip,
    },
};

use super::NorthSouth;

#[test]
fn status_shows_frontends_endpoints_policy_and_counters() {
    let mut test = NorthSouth::new(PodNetwork::PointToPoint, &[1, 2], |service| Service {
        more: json!({
            "sessionAffinity": "ClientIP", "loadBalancerSourceRanges": ["198.51.100.0/24", "2001:db8:100::/48"],
        }),
        ..service
    });
    for family in Family::BOTH {
        test.assert_kept_by(1, family);
        test.assert_kept_by(2, family);
    }
    test.update(|service| service.endpoints[1].state = State::Draining);
    let srcip = Agents::srcip(&test.cluster, 1);
    let socket = Agents::socket(&test.cluster, 1);
    let read = || -> Value {
        let text = srcip.run(&format!("status -o json --socket {}", socket.display())).unwrap();
        serde_json::from_str(&text).unwrap()
    };
    let mut status = read();
    let counted = status["north_south"]["services"][0]["counters"].take();
    let [v4, v6] = Family::BOTH.map(|family| {
        let here = json!({
            "address": test.pods[0].socket(family, 8000).to_string(), "takes_new": true, "state": "ready",
            "node": null,
        });
        let there = json!({
            "address": test.pods[1].socket(family, 8000).to_string(), "takes_new": false,
            "state": "terminating", "node": test.cluster.node(2).host.address(family).to_string(),
        });
        [here, there]
    });
    let endpoints = [v4, v6].concat();
    let expected = json!([{
        "name": "shop/web:main", "protocol": "tcp", "policy": "Cluster", "affinity_seconds": 10800,
        "frontends": ["node:30080", format!("{}:80", vip(Family::V4)), format!("[{}]:80", vip(Family::V6))],
        "source_ranges": ["198.51.100.0/24", "2001:db8:100::/48"], "return_path": "direct",
        "endpoints": endpoints, "counters": null,
    }]);
    assert_eq!(status["north_south"]["services"], expected);
    let counters = &status["north_south"]["counters"];
    assert_eq!(counters["dropped_no_endpoint"], 0);
    // The only Service's are the same; two connections have come in here, wherever they went.
    let flows = |name: &str| {
        assert_eq!(counted[name], counters[name], "{name}");
        counted[name].as_u64().unwrap()
    };
    let (here, handed_on, received) =
        (flows("new_flows"), flows("new_flows_handed_on"), flows("new_flows_received"));
    assert_eq!(here + handed_on, 2, "{counted}");
    // As many octets as a request and its answer have, for each that reached the pod of this node.
    let bytes = |name: &str| counted[name].as_u64().unwrap();
    let least = 200 * (here + received);
    assert!(bytes("request_bytes") >= least && bytes("reply_bytes") >= least, "{counted}");
    let other = Agents::srcip(&test.cluster, 2).run("status -o json").unwrap();
    let other: Value = serde_json::from_str(&other).unwrap();
    let other = &other["north_south"]["services"][0]["counters"];
    assert_eq!(
        (&other["new_flows_received"], other["new_flows_handed_on"].as_u64()),
        (&counted["new_flows_handed_on"], Some(received))
    );
    assert_eq!(status["agent"]["north_south"]["trouble"], json!([]));

    let table = srcip.run("status").unwrap();
    assert!(table.contains("SERVICE") && table.contains("shop/web:main   Cluster"), "{table}");
    let row: Vec<_> = table.lines().nth(1).unwrap().split_whitespace().skip(4).collect();
    let expected = ["4".to_owned(), "2".to_owned(), here.to_string(), handed_on.to_string()];
    assert_eq!(row, [&expected[..], &[received.to_string(), "0".to_owned()]].concat(), "{table}");
    assert!(table.contains("new_flows"), "{table}");
    let wide = srcip.run("status -o wide").unwrap();
    assert!(wide.contains("10.244.2.11:8000@172.18.0.2(terminating)"), "{wide}");

    // It needs no agent.
    test.agents.stop(1).unwrap();
    let without = read();
    status["north_south"]["services"][0]["counters"] = counted;
    assert_eq!(without["north_south"]["services"], status["north_south"]["services"]);
    assert!(without["agent"].is_null());

    // And nothing of it is left after a cleanup.
    srcip.run("cleanup").unwrap();
    let without = read();
    assert!(without["north_south"].is_null(), "{without}");
    assert!(!srcip.pin_path().exists());
}

/// The pods of such a node are to be steered all the same.
#[test]
fn an_agent_that_cannot_do_it_says_so_and_goes_on() {
    let mut cluster = Cluster::new(PodNetwork::PointToPoint).unwrap();
    let pod = cluster.pod(1, "web").unwrap();
    let service = Service::new("web").endpoint(1, &pod, 8000);
    kube_proxy::install(&cluster, &[&service]).unwrap();
    let agents = Agents::begin(&cluster, &[&service], "eth9", "").unwrap();
    let wait_for = |text: &str| agents.wait_for(&cluster, 1, "readyz", text).unwrap();
    let page = wait_for("[-]north-south failed: there is no device eth9 to be an uplink");
    assert!(page.contains("[+]attached ok") && page.contains("[+]loop ok"), "{page}");
    assert!(agents.probe(&cluster, 1, "livez").unwrap().contains("livez check passed"));
    // The device comes, and it begins.
    cluster.node(1).host.ip("link add eth9 type veth peer name eth8").unwrap();
    wait_for("[+]north-south ok");
}

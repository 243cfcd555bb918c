//! `srcip explain --to` tells before a connection where it will go.

use std::net::SocketAddr;

use serde_json::{Value, json};
use srcip_tests::{
    Family,
    client::{ask, connect_from, connect_in_vain},
    cluster::{agent::Agents, balancer, node::PodNetwork},
};

use super::NorthSouth;

fn explain(test: &NorthSouth, node: u8, options: &str) -> Value {
    let srcip = Agents::srcip(&test.cluster, node);
    let told: Value =
        serde_json::from_str(&srcip.run(&format!("explain -o json {options}")).unwrap()).unwrap();
    let ways = told["north_south"].as_array().unwrap();
    assert_eq!(ways.len(), 1, "{told:#}");
    ways[0].clone()
}

#[test]
fn explain_tells_where_a_connection_will_go() {
    let test = NorthSouth::new(PodNetwork::PointToPoint, &[1, 1, 2, 2], |service| service);
    let mut ports = 20_000..;
    for family in Family::BOTH {
        for entry in [1, 3] {
            balancer::route(&test.cluster, &[entry]).unwrap();
            let client = test.cluster.client.address(family);
            let node_port = test.cluster.node(entry).host.socket(family, test.service.node_port);
            for to in [test.service.dialled(family), node_port] {
                for _ in 0..6 {
                    let from = SocketAddr::new(client, ports.next().unwrap());
                    let told = explain(&test, entry, &format!("--from {from} --to {to}"));
                    assert_eq!(
                        (&told["chosen"]["by"], &told["policy"]),
                        (&json!("table"), &json!("Cluster"))
                    );
                    let mut stream = connect_from(&test.cluster.client, Some(from), to).unwrap();
                    let seen = ask(&mut stream).unwrap();
                    assert_eq!(seen.peer, from);
                    assert_eq!(told["chosen"]["endpoint"], json!(seen.local), "{told:#}");
                    let last = told["hops"].as_array().unwrap().last().unwrap();
                    assert_eq!((&last["sees"], &last["at"]), (&json!(seen.peer), &json!(seen.local)));
                    let pod =
                        test.pods.iter().position(|pod| pod.address(family) == seen.local.ip()).unwrap();
                    let place = [1, 1, 2, 2][pod];
                    let node = (place != entry).then(|| test.cluster.node(place).host.address(family));
                    assert_eq!(told["chosen"]["node"], json!(node), "{told:#}");
                    // It is open now.
                    let again = explain(&test, entry, &format!("--from {from} --to {to}"));
                    assert_eq!(again["chosen"]["by"], "flow", "{again:#}");
                    assert_eq!(again["chosen"]["node"], json!(node), "{again:#}");
                }
            }
        }
    }
}

/// From one port of its own, a client connects to a pod by the load balancer's address; by the NodePort it would reach
/// the same pod, whose answers would then be taken for those to the first connection.
#[test]
fn explain_tells_of_a_pod_that_has_to_be_passed_over() {
    let test = NorthSouth::new(PodNetwork::PointToPoint, &[1, 1], |service| service);
    balancer::route(&test.cluster, &[1]).unwrap();
    let mut passed_over = 0;
    for family in Family::BOTH {
        let client = test.cluster.client.address(family);
        let by_node = test.cluster.node(1).host.socket(family, test.service.node_port);
        for port in 21_000..21_012 {
            let from = SocketAddr::new(client, port);
            let alone = explain(&test, 1, &format!("--from {from} --to {by_node}"));
            let mut first =
                connect_from(&test.cluster.client, Some(from), test.service.dialled(family)).unwrap();
            let first_pod = ask(&mut first).unwrap().local;
            let told = explain(&test, 1, &format!("--from {from} --to {by_node}"));
            if alone["chosen"]["endpoint"] == json!(first_pod) {
                if told["collides"] == true {
                    // All the places that are tried are that pod's, as in the next test.
                    continue;
                }
                assert_eq!(told["chosen"]["by"], "next-place", "{told:#}");
                passed_over += 1;
            } else {
                assert_eq!(told["chosen"], alone["chosen"]);
            }
            let mut second = connect_from(&test.cluster.client, Some(from), by_node).unwrap();
            let seen = ask(&mut second).unwrap();
            assert_eq!(
                (told["chosen"]["endpoint"].clone(), seen.peer),
                (json!(seen.local), from),
                "{told:#}"
            );
            assert_ne!(seen.local, first_pod);
        }
    }
    assert!(passed_over > 0, "chance has it that none of 24 went to the same pod");
}

/// The only pod has a connection of the client's port already: the second one is dropped, as was told.
#[test]
fn explain_tells_of_a_connection_that_no_pod_can_take() {
    let test = NorthSouth::new(PodNetwork::PointToPoint, &[1], |service| service);
    let family = Family::V4;
    balancer::route(&test.cluster, &[1]).unwrap();
    let from = SocketAddr::new(test.cluster.client.address(family), 21_000);
    let mut first = connect_from(&test.cluster.client, Some(from), test.service.dialled(family)).unwrap();
    ask(&mut first).unwrap();
    let by_node = test.cluster.node(1).host.socket(family, test.service.node_port);
    let told = explain(&test, 1, &format!("--from {from} --to {by_node}"));
    assert_eq!((&told["chosen"], &told["collides"]), (&json!(null), &json!(true)), "{told:#}");
    let picture =
        Agents::srcip(&test.cluster, 1).run(&format!("explain --from {from} --to {by_node}")).unwrap();
    assert!(picture.contains("dropped_collision"), "{picture}");
    connect_in_vain(&test.cluster.client, Some(from), by_node).unwrap();
}

#[test]
fn explain_tells_who_may_come_and_what_is_not_handled() {
    let mut test = NorthSouth::new(PodNetwork::PointToPoint, &[1], |service| {
        let service = service.local();
        let more = json!({"loadBalancerSourceRanges": ["192.0.2.0/24", "2001:db8:100::/48"]});
        super::Service { more, ..service }
    });
    let to = Family::BOTH.map(|family| test.service.dialled(family));
    let client = Family::BOTH.map(|family| test.cluster.client.address(family));
    let refused = explain(&test, 1, &format!("--from {}:1000 --to {}", client[0], to[0]));
    assert_eq!((&refused["allowed"], &refused["chosen"]), (&json!(false), &Value::Null), "{refused:#}");
    assert_eq!(refused["source_ranges"], json!(["192.0.2.0/24"]));
    let allowed = explain(&test, 1, &format!("--from [{}]:1000 --to {}", client[1], to[1]));
    assert_eq!((&allowed["allowed"], &allowed["policy"]), (&json!(true), &json!("Local")), "{allowed:#}");

    let srcip = [1, 2].map(|node| Agents::srcip(&test.cluster, node));
    let text = srcip[0].run(&format!("explain --to {}", to[0])).unwrap();
    assert!(text.contains("100.0 %") && text.contains("on this node"), "{text}");
    assert!(text.contains("of Service shop/web:main") && text.contains("192.0.2.0/24 alone"), "{text}");
    let text = srcip[1].run(&format!("explain --to {}", to[0])).unwrap();
    assert!(text.contains("dropped_no_endpoint"), "{text}");
    let error = srcip[0].fail(&format!("explain --from [{}]:1000 --to {}", client[1], to[0])).unwrap();
    assert!(error.contains("different families"), "{error}");

    test.update(|service| service.annotated = false);
    let cgroup = test.cluster.world.cgroup().display();
    let error = srcip[0].fail(&format!("explain --cgroup {cgroup} --wait 1s --to {}", to[0])).unwrap();
    assert!(error.contains(&format!("north-south handles nothing at {} on this node", to[0])), "{error}");
    // Without any agent, as on a node where it was never started.
    let error =
        test.cluster.world.srcip().fail(&format!("explain --cgroup {cgroup} --wait 1s --to {}", to[0]));
    assert!(error.unwrap().contains("North-south is not set up on this node"));
}

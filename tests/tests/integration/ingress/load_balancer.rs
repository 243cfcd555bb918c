//! A load balancer that asks the nodes' health check ports.

use srcip_tests::{
    Family,
    cluster::{
        balancer,
        node::PodNetwork,
        service::{Service, State},
    },
    wait_for,
};

use super::NorthSouth;

/// As kube-proxy answers, so that every load balancer that works with it works here.
#[test]
fn it_finds_the_nodes_that_have_a_pod_and_follows_them() {
    let mut test = NorthSouth::new(PodNetwork::Bridge, &[1, 1, 2], Service::local);
    // The ports follow the data plane, a moment later.
    let health = |test: &NorthSouth, node: u8, status: u16| {
        let at = test.cluster.node(node).host.socket(Family::V4, test.service.health_port);
        wait_for(&format!("node {node} says {status}"), || {
            Some(balancer::ask(test.cluster.router(), at)).filter(|answer| answer.status == status)
        })
    };
    for (node, pods) in [(1, 2), (2, 1), (3, 0)] {
        let answer = health(&test, node, if pods == 0 { 503 } else { 200 });
        assert!(answer.head.contains(&format!("x-load-balancing-endpoint-weight: {pods}")), "{answer:?}");
        let body: serde_json::Value = serde_json::from_str(&answer.body).unwrap();
        let expected = serde_json::json!({
            "service": {"namespace": "shop", "name": "web"}, "localEndpoints": pods, "serviceProxyHealthy": true,
        });
        assert_eq!(body, expected);
    }
    assert_eq!(balancer::balance(&test.cluster, &test.service).unwrap(), [1, 2]);

    // The one on node 2 is about to end: no new client comes, and those who do are still served.
    test.update(|service| service.endpoints[2].state = State::Draining);
    health(&test, 2, 503);
    test.assert_kept_by(2, Family::V4);
    assert_eq!(balancer::balance(&test.cluster, &test.service).unwrap(), [1]);

    test.update(|service| service.local = false);
    // Under Cluster there is no such port.
    health(&test, 1, 0);
    assert_eq!(balancer::balance(&test.cluster, &test.service).unwrap(), [1, 2, 3]);
}

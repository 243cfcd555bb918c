use serde_json::{Value, json};

use super::*;

fn read(spec: Value, status: Value) -> Result<Option<ServiceInfo>, Problem> {
    let annotations = json!({"srcip.io/north-south": "true"});
    let metadata = json!({"namespace": "shop", "name": "web", "annotations": annotations});
    let object = json!({"metadata": metadata, "spec": spec, "status": status});
    ServiceInfo::from_object(&serde_json::from_value(object).unwrap(), &Selection::default())
}

fn good(spec: Value) -> ServiceInfo {
    read(spec, json!({})).unwrap().unwrap()
}

fn refused(spec: Value) -> String {
    read(spec, json!({})).unwrap_err().note
}

/// A Service of type NodePort, and more.
fn with(more: Value) -> Value {
    let mut spec = json!({"type": "NodePort", "ports": [{"port": 80, "nodePort": 30080}]});
    spec.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    spec
}

#[test]
fn what_the_api_server_would_fill_in_is_filled_in() {
    let service = good(with(json!({})));
    assert_eq!(service.name.to_string(), "shop/web");
    assert_eq!(service.policy, TrafficPolicy::Cluster);
    assert_eq!((service.affinity, service.health_check), (None, None));
    let [port] = &service.ports[..] else { panic!("{service:?}") };
    assert_eq!((&*port.name, port.protocol, port.port), ("", Protocol::Tcp, 80));
    assert_eq!(port.node_port.map(NonZeroU16::get), Some(30080));
}

#[test]
fn affinity_has_kubernetes_default_and_bounds() {
    let affinity = |config: Value| {
        with(json!({"sessionAffinity": "ClientIP", "sessionAffinityConfig": {"clientIP": config}}))
    };
    assert_eq!(good(affinity(json!({}))).affinity, Some(Duration::from_secs(10_800)));
    assert_eq!(
        good(with(json!({"sessionAffinity": "ClientIP"}))).affinity,
        Some(Duration::from_secs(10_800))
    );
    assert_eq!(good(affinity(json!({"timeoutSeconds": 5}))).affinity, Some(Duration::from_secs(5)));
    assert_eq!(good(with(json!({"sessionAffinity": "None"}))).affinity, None);
    for bad in [0, -1, 86_401] {
        assert!(refused(affinity(json!({"timeoutSeconds": bad}))).contains("86400"), "{bad}");
    }
    assert!(refused(with(json!({"sessionAffinity": "Cookie"}))).contains("ClientIP"));
}

#[test]
fn only_vips_of_a_load_balancer_are_taken() {
    let ingress = json!({"loadBalancer": {"ingress": [
        {"ip": "203.0.113.1"}, {"ip": "203.0.113.2", "ipMode": "VIP"}, {"ip": "203.0.113.3", "ipMode": "Proxy"},
        {"ip": "2001:db8::1", "ipMode": "VIP"}, {"hostname": "lb.example"}, {"ip": ""},
    ]}});
    let spec = json!({"type": "LoadBalancer", "ports": [{"port": 80}], "externalIPs": ["198.51.100.1"]});
    let service = read(spec, ingress).unwrap().unwrap();
    let texts = |addresses: &BTreeSet<IpAddr>| addresses.iter().map(ToString::to_string).collect::<Vec<_>>();
    assert_eq!(texts(&service.load_balancer), ["203.0.113.1", "203.0.113.2", "2001:db8::1"]);
    assert_eq!(texts(&service.external), ["198.51.100.1"]);
}

#[test]
fn health_checks_are_for_load_balancers_under_local() {
    let service = |kind: &str, policy: &str| {
        good(with(json!({"type": kind, "externalTrafficPolicy": policy, "healthCheckNodePort": 31000})))
    };
    assert_eq!(service("LoadBalancer", "Local").health_check, NonZeroU16::new(31000));
    assert_eq!(service("LoadBalancer", "Cluster").health_check, None);
    assert_eq!(service("NodePort", "Local").health_check, None);
}

#[test]
fn source_ranges_may_have_blanks_around_them() {
    let ranges = |ranges: Value| with(json!({"loadBalancerSourceRanges": ranges}));
    let service = good(ranges(json!([" 10.1.2.3/8 ", "fd00::/8", "10.0.0.0/8"])));
    assert_eq!(service.source_ranges, ["10.0.0.0/8".parse().unwrap(), "fd00::/8".parse::<IpNet>().unwrap()]);
    assert!(refused(ranges(json!(["everybody"]))).contains("\"everybody\""));
    assert!(refused(ranges(json!(vec!["10.0.0.0/8"; MAX_RANGES + 1]))).contains("257 entries"));
}

#[test]
fn a_port_of_another_protocol_is_left_to_others_and_the_rest_taken() {
    let ports = json!([{"port": 1, "nodePort": 30001, "protocol": "SCTP"}, {"port": 2, "nodePort": 30002}]);
    let service = good(with(json!({ "ports": ports })));
    assert_eq!(service.ports.len(), 1);
    assert!(service.warnings[0].note.contains("SCTP"));
}

#[test]
fn mistakes_are_named() {
    for (spec, expected) in [
        (json!({"externalTrafficPolicy": "Near"}), "Cluster or Local"),
        (json!({"externalIPs": ["127.0.0.1"]}), "127.0.0.1"),
        (json!({"externalIPs": ["224.0.0.1"]}), "224.0.0.1"),
        (json!({"externalIPs": ["a\u{1b}[2J"]}), "a\u{fffd}[2J"),
        (json!({"ports": [{"port": 0, "nodePort": 1}]}), "1 to 65535"),
        (json!({"ports": [{"port": 1, "nodePort": 70000}]}), "70000"),
        (json!({"ports": vec![json!({"port": 1, "nodePort": 1}); MAX_PORTS + 1]}), "257 entries"),
        (json!({"type": "ClusterIP", "ports": [{"port": 1}]}), "no nodePort"),
        (json!({"type": "ExternalName"}), "no nodePort"),
        (json!({"clusterIP": "None"}), "no nodePort"),
    ] {
        let note = refused(with(spec.clone()));
        assert!(note.contains(expected), "{spec}: {note}");
        assert!(note.len() <= 1024);
    }
}

#[test]
fn what_was_not_asked_for_is_no_problem() {
    let read = |spec: Value| {
        let object = json!({"metadata": {"name": "web"}, "spec": spec});
        ServiceInfo::from_object(&serde_json::from_value(object).unwrap(), &Selection::default())
    };
    assert_eq!(read(json!({"externalIPs": ["rubbish"], "ports": []})), Ok(None));
    assert_eq!(read(json!({"ports": [{"port": 1}]})), Ok(None));
    assert!(!read(with(json!({}))).unwrap().unwrap().is_selected);
}

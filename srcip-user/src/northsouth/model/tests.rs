use std::time::Duration;

use k8s_openapi::api::{core::v1::Service, discovery::v1::EndpointSlice};
use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::northsouth::{
    desired::{Endpoint, Frontend, FrontendAddress, Place, Protocol, TrafficPolicy},
    objects::{Listed, node::NodeInfo},
    select::Selection,
};

/// A cluster of three nodes, n1 to n3, seen from n1.
#[derive(Debug, Default)]
struct World {
    services: Vec<Value>,
    slices: Vec<Value>,
}

impl World {
    fn plan(&self) -> Plan {
        plan(&self.objects(), &here("n1"))
    }

    fn objects(&self) -> Objects {
        let mut objects = Objects { listed: Listed::ALL, ..Objects::default() };
        for value in &self.services {
            let service: Service = serde_json::from_value(value.clone()).unwrap();
            let name = name_of(value);
            match ServiceInfo::from_object(&service, &Selection::default()) {
                Ok(None) => {}
                Ok(Some(info)) => drop(objects.services.insert(name, Ok(Arc::new(info)))),
                Err(problem) => {
                    drop(
                        objects
                            .services
                            .insert(name, Err(crate::northsouth::objects::Refused { uid: None, problem })),
                    );
                }
            }
        }
        for value in &self.slices {
            let slice: EndpointSlice = serde_json::from_value(value.clone()).unwrap();
            let slice = SliceInfo::from_object(&slice).unwrap().unwrap();
            objects.slices.insert(slice.name.clone(), Arc::new(slice));
        }
        for n in 1..=3 {
            let name: Arc<str> = format!("n{n}").into();
            let internal = vec![address(&format!("10.0.0.{n}")), address(&format!("fd00::{n}"))];
            let node = NodeInfo { name: Arc::clone(&name), internal, external: vec![] };
            objects.nodes.insert(name, Arc::new(node));
        }
        objects
    }

    /// With a Service that asks to be handled.
    fn service(mut self, name: &str, spec: Value, status: Value) -> Self {
        let annotations = json!({"srcip.io/north-south": "true"});
        let metadata = json!({"namespace": "shop", "name": name, "annotations": annotations});
        self.services.push(json!({"metadata": metadata, "spec": spec, "status": status}));
        self
    }

    /// The same, of type NodePort, with something on top.
    fn node_port(self, more: Value) -> Self {
        let mut spec =
            json!({"type": "NodePort", "ports": [{"port": 80, "nodePort": 30080, "name": "http"}]});
        spec.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        self.service("web", spec, json!({}))
    }

    /// With a slice of `web` with port 8080, or several of one family.
    fn slice(mut self, endpoints: Value) -> Self {
        let number = self.slices.len();
        let v6 = endpoints[0]["addresses"][0].as_str().is_some_and(|address| address.contains(':'));
        self.slices.push(json!({
            "metadata": {
                "namespace": "shop", "name": format!("web-{number}"),
                "labels": {"kubernetes.io/service-name": "web"},
            },
            "addressType": if v6 { "IPv6" } else { "IPv4" },
            "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}],
            "endpoints": endpoints,
        }));
        self
    }
}

fn name_of(object: &Value) -> ObjectName {
    let text = |field: &str| object["metadata"][field].as_str().unwrap();
    ObjectName::new(text("namespace"), text("name")).unwrap()
}

fn here(node: &str) -> Here {
    Here { node: node.into(), addresses: vec![], uplinks: vec![], return_path: ReturnPath::Direct }
}

fn address(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn ready(address: &str, node: &str) -> Value {
    json!({"addresses": [address], "nodeName": node, "conditions": {"ready": true}})
}

fn draining(address: &str, node: &str) -> Value {
    let conditions = json!({"ready": false, "serving": true, "terminating": true});
    json!({"addresses": [address], "nodeName": node, "conditions": conditions})
}

fn down(address: &str, node: &str) -> Value {
    json!({"addresses": [address], "nodeName": node, "conditions": {"ready": false, "serving": false}})
}

fn port<'a>(plan: &'a Plan, name: &str) -> &'a ServicePort {
    plan.desired
        .services
        .get(&ServiceName::new(name).unwrap())
        .unwrap_or_else(|| panic!("no {name}: {plan:?}"))
}

/// The endpoints that take new connections, as text.
fn taking(service: &ServicePort) -> Vec<String> {
    let takes = service.takes_new();
    let endpoints = service.endpoints.iter().filter(|endpoint| takes(endpoint));
    endpoints.map(|endpoint| format!("{}:{}", endpoint.address.0, endpoint.port)).collect()
}

fn notes(plan: &Plan, service: &str) -> String {
    let name = ObjectName::new("shop", service).unwrap();
    let problems = plan.problems.get(&name).into_iter().flatten();
    problems.map(|problem| format!("{}: {}\n", problem.reason, problem.note)).collect()
}

#[test]
fn a_node_port_of_both_families_with_endpoints_here_and_elsewhere() {
    let plan = World::default()
        .node_port(json!({}))
        .slice(json!([ready("10.1.1.1", "n1"), ready("10.1.2.1", "n2")]))
        .slice(json!([ready("fd01::2:1", "n2")]))
        .plan();
    let service = port(&plan, "shop/web:http");
    let at = |address: FrontendAddress| Frontend {
        address,
        port: 30080,
        protocol: Protocol::Tcp,
        restricted: false,
    };
    assert_eq!(service.frontends, [at(FrontendAddress::ANY_NODE_V4), at(FrontendAddress::ANY_NODE_V6)]);
    assert_eq!(service.policy, TrafficPolicy::Cluster);
    let places: Vec<_> = service.endpoints.iter().map(|endpoint| endpoint.place).collect();
    let remote = |text: &str| Place::Remote(NodeAddress(address(text)));
    assert_eq!(places, [Place::Local, remote("10.0.0.2"), remote("fd00::2")]);
    assert_eq!(plan.desired.own, [NodeAddress(address("10.0.0.1")), NodeAddress(address("fd00::1"))]);
    assert_eq!(plan.desired.nodes.len(), 6);
    assert_eq!(plan.problems, BTreeMap::new());
}

#[test]
fn local_and_cluster_choose_as_kube_proxy_does() {
    let choose = |policy: &str, endpoints: Value| {
        let plan =
            World::default().node_port(json!({"externalTrafficPolicy": policy})).slice(endpoints).plan();
        taking(port(&plan, "shop/web:http"))
    };
    let all = json!([
        ready("10.1.1.1", "n1"),
        ready("10.1.2.1", "n2"),
        draining("10.1.1.2", "n1"),
        down("10.1.1.3", "n1"),
    ]);
    assert_eq!(choose("Cluster", all.clone()), ["10.1.1.1:8080", "10.1.2.1:8080"]);
    assert_eq!(choose("Local", all), ["10.1.1.1:8080"]);
    let terminating = json!([draining("10.1.1.2", "n1"), draining("10.1.2.2", "n2"), down("10.1.1.3", "n1")]);
    assert_eq!(choose("Cluster", terminating.clone()), ["10.1.1.2:8080", "10.1.2.2:8080"]);
    assert_eq!(choose("Local", terminating), ["10.1.1.2:8080"]);
    let elsewhere = json!([ready("10.1.2.1", "n2"), draining("10.1.1.2", "n1")]);
    assert_eq!(choose("Local", elsewhere.clone()), ["10.1.1.2:8080"]);
    assert_eq!(choose("Cluster", elsewhere), ["10.1.2.1:8080"]);
    assert_eq!(choose("Local", json!([ready("10.1.2.1", "n2")])), Vec::<String>::new());
    // publishNotReadyAddresses: the slice says ready, whatever the pod is.
    let conditions = json!({"ready": true, "serving": false, "terminating": true});
    let published = json!([{"addresses": ["10.1.1.4"], "nodeName": "n1", "conditions": conditions}]);
    assert_eq!(choose("Local", published), ["10.1.1.4:8080"]);
}

#[test]
fn target_ports_are_those_of_the_slices_and_slices_add_up() {
    // A named targetPort can have another number in each pod, so in each slice.
    let mut world = World::default()
        .node_port(json!({}))
        .slice(json!([ready("10.1.1.1", "n1")]))
        .slice(json!([ready("10.1.1.2", "n1"), ready("10.1.1.1", "n1")]));
    world.slices[1]["ports"] = json!([
        {"name": "http", "port": 9090}, {"name": "http", "port": 53, "protocol": "UDP"}, {"name": "b", "port": 1},
    ]);
    let plan = world.plan();
    let expected = ["10.1.1.1:8080", "10.1.1.1:9090", "10.1.1.2:9090"];
    assert_eq!(taking(port(&plan, "shop/web:http")), expected);
}

#[test]
fn load_balancers_and_external_addresses_with_ranges_affinity_and_health_checks() {
    let spec = json!({
        "type": "LoadBalancer", "externalTrafficPolicy": "Local", "healthCheckNodePort": 31000,
        "ports": [
            {"port": 80, "nodePort": 30080, "name": "http"}, {"port": 53, "protocol": "UDP", "name": "dns"},
        ],
        "externalIPs": ["198.51.100.1"], "loadBalancerSourceRanges": ["192.0.2.0/24"],
        "sessionAffinity": "ClientIP",
    });
    let ingress = json!({"loadBalancer": {"ingress": [{"ip": "203.0.113.1"}, {"ip": "2001:db8::1"}]}});
    let plan = World::default()
        .service("web", spec, ingress)
        .slice(json!([ready("10.1.1.1", "n1"), ready("10.1.1.2", "n1"), draining("10.1.1.3", "n1")]))
        .slice(json!([ready("fd01::1:1", "n1")]))
        .plan();
    let service = port(&plan, "shop/web:http");
    let restricted: Vec<_> = service.frontends.iter().filter(|frontend| frontend.restricted).collect();
    assert_eq!((service.frontends.len(), restricted.len()), (5, 2), "{service:?}");
    assert!(restricted.iter().all(|frontend| frontend.port == 80));
    assert_eq!(service.source_ranges, ["192.0.2.0/24".parse().unwrap()]);
    assert_eq!(service.affinity, Some(Duration::from_secs(10_800)));
    let dns = port(&plan, "shop/web:dns");
    assert_eq!(dns.frontends.len(), 3, "no NodePort was asked for: {dns:?}");
    assert!(dns.frontends.iter().all(|frontend| frontend.protocol == Protocol::Udp));
    let check = &plan.health_checks[&31000];
    assert_eq!((check.service.to_string().as_str(), check.local_endpoints), ("shop/web", 2));
}

#[test]
fn of_two_services_with_one_address_the_older_has_it_and_the_other_is_told() {
    let spec = json!({"ports": [{"port": 80}], "externalIPs": ["198.51.100.1", "198.51.100.2"]});
    let other = json!({"ports": [{"port": 80}], "externalIPs": ["198.51.100.2", "198.51.100.3"]});
    let mut world = World::default().service("a", spec, json!({})).service("b", other, json!({}));
    world.services[0]["metadata"]["creationTimestamp"] = "2026-01-02T00:00:00Z".into();
    world.services[1]["metadata"]["creationTimestamp"] = "2026-01-01T00:00:00Z".into();
    let plan = world.plan();
    assert_eq!(port(&plan, "shop/b:80").frontends.len(), 2);
    assert_eq!(port(&plan, "shop/a:80").frontends.len(), 1);
    assert!(notes(&plan, "a").contains("port 80 of 198.51.100.2 leads to shop/b"), "{plan:?}");
    assert_eq!(notes(&plan, "b"), "");

    // One that others handle has what it has as well.
    world.services[1]["metadata"]["annotations"] = json!({});
    let plan = world.plan();
    assert_eq!(plan.desired.services.len(), 1);
    assert!(notes(&plan, "a").contains("shop/b"));
}

#[test]
fn an_external_address_that_is_a_nodes_does_not_take_a_node_port() {
    let thief = json!({"ports": [{"port": 30080}, {"port": 81}], "externalIPs": ["10.0.0.2"]});
    let mut world = World::default().node_port(json!({})).service("a", thief, json!({}));
    world.services[0]["metadata"]["creationTimestamp"] = "2026-01-01T00:00:00Z".into();
    let plan = world.plan();
    assert_eq!(port(&plan, "shop/a:81").frontends.len(), 1);
    assert!(notes(&plan, "a").contains("port 30080 of 10.0.0.2 leads to shop/web"), "{plan:?}");
    assert!(!plan.desired.services.contains_key(&ServiceName::new("shop/a:30080").unwrap()));
}

#[test]
fn two_services_cannot_have_one_health_check_port() {
    let spec = |node_port: u16| {
        json!({
            "type": "LoadBalancer", "externalTrafficPolicy": "Local", "healthCheckNodePort": 31000,
            "ports": [{"port": 80, "nodePort": node_port}],
        })
    };
    let plan =
        World::default().service("a", spec(30001), json!({})).service("b", spec(30002), json!({})).plan();
    assert_eq!(plan.health_checks[&31000].service.to_string(), "shop/a");
    assert!(notes(&plan, "b").contains("healthCheckNodePort 31000 is that of shop/a"));
    assert_eq!(plan.desired.services.len(), 2);
}

#[test]
fn endpoints_that_no_packet_reaches_are_told_and_a_port_with_no_others_is_left_alone() {
    let mut world = World::default().node_port(json!({})).slice(json!([
        ready("10.1.1.1", "n1"), ready("10.0.0.2", "n2"), ready("10.1.9.1", "n9"), {"addresses": ["10.1.2.3"]},
    ]));
    let plan = world.plan();
    assert_eq!(taking(port(&plan, "shop/web:http")), ["10.1.1.1:8080"]);
    assert!(notes(&plan, "web").contains("left out: 10.0.0.2 is a node's own address"), "{plan:?}");
    assert!(notes(&plan, "web").contains("3 in all"));

    world.slices[0]["endpoints"] = json!([ready("10.1.9.1", "n9")]);
    let plan = world.plan();
    assert!(plan.desired.services.is_empty());
    assert!(notes(&plan, "web").contains("left to others: its endpoint 10.1.9.1 is on node n9"), "{plan:?}");

    // Under Local it is nobody's business here.
    world.services[0]["spec"]["externalTrafficPolicy"] = "Local".into();
    let plan = world.plan();
    assert_eq!(port(&plan, "shop/web:http").endpoints, []);
    assert_eq!(notes(&plan, "web"), "");
}

#[test]
fn what_is_wrong_with_one_service_is_not_felt_by_others() {
    let plan = World::default()
        .service("bad", json!({"ports": [{"port": 80}], "externalIPs": ["everywhere"]}), json!({}))
        .node_port(json!({}))
        .plan();
    assert!(notes(&plan, "bad").contains("\"everywhere\""));
    assert_eq!(plan.desired.services.len(), 1);
}

#[test]
fn more_endpoints_than_can_be_used() {
    let mut world = World::default().node_port(json!({}));
    for block in 0..11 {
        let endpoints: Vec<_> = (1..=100).map(|i| ready(&format!("10.1.{block}.{i}"), "n1")).collect();
        world = world.slice(json!(endpoints));
    }
    let plan = world.plan();
    assert_eq!(port(&plan, "shop/web:http").endpoints.len(), endpoints::MAX_ENDPOINTS);
    assert!(notes(&plan, "web").contains("has 1100 endpoints"));
}

fn any_endpoint() -> impl Strategy<Value = Value> {
    (0..6_u8, 0..5_u8, any::<(bool, bool, bool)>()).prop_map(|(host, node, (ready, serving, terminating))| {
        let conditions = json!({"ready": ready, "serving": serving, "terminating": terminating});
        let address = format!("10.1.1.{host}");
        // Of these, one is none, and one is not in the cluster.
        let node = if node == 0 { Value::Null } else { format!("n{node}").into() };
        json!({"addresses": [address], "nodeName": node, "conditions": conditions})
    })
}

fn any_world() -> impl Strategy<Value = World> {
    let service = (0..6_u8, 0..4_u16, 0..3_u8, any::<bool>(), any::<bool>());
    let endpoints = prop::collection::vec(any_endpoint(), 0..8);
    let services = prop::collection::vec(service, 0..8);
    (services, prop::collection::vec(endpoints, 0..3)).prop_map(|(services, slices)| {
        let mut world = World::default();
        for (age, node_port, external, local, selected) in services {
            let spec = json!({
                "externalTrafficPolicy": if local { "Local" } else { "Cluster" },
                "ports": [{"port": 80, "name": "http", "nodePort": if node_port == 0 { 0 } else { 30000 + node_port }}],
                "externalIPs": (0..external).map(|i| format!("198.51.100.{i}")).collect::<Vec<_>>(),
            });
            let name = if age == 0 { "web".to_owned() } else { format!("s{age}") };
            world = world.service(&name, spec, json!({}));
            let metadata = &mut world.services.last_mut().unwrap()["metadata"];
            metadata["creationTimestamp"] = format!("2026-01-0{}T00:00:00Z", age + 1).into();
            if !selected {
                metadata["annotations"] = json!({});
            }
        }
        slices.into_iter().fold(world, |world, endpoints| world.slice(json!(endpoints)))
    })
}

fn is_unambiguous(objects: &Objects) -> bool {
    let mut seen = BTreeSet::new();
    let endpoints = objects.slices.values().flat_map(|slice| &slice.endpoints);
    endpoints.into_iter().all(|endpoint| seen.insert(endpoint.address))
}

proptest! {
    #[test]
    fn nothing_is_handed_out_twice_and_every_endpoint_can_be_reached(world in any_world()) {
        let objects = world.objects();
        let plan = plan(&objects, &here("n1"));
        let mut seen = BTreeSet::new();
        for (name, service) in &plan.desired.services {
            prop_assert_eq!(name, &service.name);
            prop_assert!(!service.frontends.is_empty());
            for frontend in &service.frontends {
                prop_assert!(seen.insert((frontend.address, frontend.port, frontend.protocol)));
            }
            for endpoint in &service.endpoints {
                if let Place::Remote(node) = endpoint.place {
                    prop_assert!(plan.desired.nodes.contains(&node) && !plan.desired.own.contains(&node));
                    prop_assert_eq!(node.0.is_ipv4(), endpoint.address.0.is_ipv4());
                }
            }
        }
        for problem in plan.problems.values().flatten() {
            prop_assert!(problem.note.len() <= 1024, "{problem:?}");
        }
        // No one's Service is handled unasked.
        for name in plan.desired.services.keys() {
            let selected = objects.services.values().flatten().any(|service| {
                service.is_selected && name.as_str().starts_with(&format!("{}:", service.name))
            });
            prop_assert!(selected);
        }
    }

    /// Ready ones, or else terminating ones that serve; the local ones of those under Local.
    #[test]
    fn new_connections_go_where_kube_proxy_sends_them(
        endpoints in prop::collection::vec(any_endpoint(), 0..10), local: bool,
    ) {
        let policy = if local { "Local" } else { "Cluster" };
        let world = World::default().node_port(json!({"externalTrafficPolicy": policy})).slice(json!(endpoints));
        let plan = world.plan();
        let Some(service) = plan.desired.services.values().next() else {
            // Only if none could be reached.
            prop_assert!(notes(&plan, "web").contains("left to others"));
            return Ok(());
        };
        // The last one here counts of several with one address, else the first.
        let mut known = BTreeMap::<String, &Value>::new();
        for endpoint in &endpoints {
            let address = endpoint["addresses"][0].as_str().unwrap().to_owned();
            if !known.contains_key(&address) || endpoint["nodeName"] == "n1" {
                known.insert(address, endpoint);
            }
        }
        known.retain(|_, endpoint| matches!(endpoint["nodeName"].as_str(), Some("n1" | "n2" | "n3")));
        let is = |endpoint: &Value, condition: &str| endpoint["conditions"][condition] == true;
        known.retain(|_, endpoint| !local || endpoint["nodeName"] == "n1");
        let ready: Vec<_> = known.iter().filter(|(_, e)| is(e, "ready")).map(|(a, _)| a.clone()).collect();
        let draining = known.iter().filter(|(_, e)| is(e, "serving") && is(e, "terminating"));
        let draining: Vec<_> = draining.map(|(address, _)| address.clone()).collect();
        let expected = if ready.is_empty() { draining } else { ready };
        let expected: Vec<_> = expected.iter().map(|address| format!("{address}:8080")).collect();
        prop_assert_eq!(taking(service), expected);
    }

    /// A node that is asked again says the same, and the nodes agree on what is where.
    #[test]
    fn nodes_agree(world in any_world()) {
        let objects = world.objects();
        let first = plan(&objects, &here("n1"));
        prop_assert_eq!(&first, &plan(&objects, &here("n1")));
        let second = plan(&objects, &here("n2"));
        prop_assert_eq!(&first.desired.nodes, &second.desired.nodes);
        for (name, service) in &first.desired.services {
            let Some(other) = second.desired.services.get(name) else { continue };
            prop_assert_eq!(&service.frontends, &other.frontends);
            let states = |endpoints: &[Endpoint]| {
                endpoints.iter().map(|e| (e.address, e.port, e.state)).collect::<Vec<_>>()
            };
            // Of an endpoint that is named twice, a node believes what is said of itself.
            if service.policy == TrafficPolicy::Cluster && is_unambiguous(&objects) {
                prop_assert_eq!(states(&service.endpoints), states(&other.endpoints));
            }
        }
    }
}

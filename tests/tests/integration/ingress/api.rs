//! The agent as it runs in a cluster: it learns of Services from the API, and tells their owners there what is
//! wrong with them.

use std::{
    thread,
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use srcip_tests::{
    Family, PATIENCE,
    apiserver::{Faults, store::Resource},
    client,
    cluster::{Cluster, agent::Agents, agent::OfApi, balancer, node::PodNetwork, service::Service},
    peer::{self, APPLICATION_PORT},
};

/// The Events about a Service, as type, reason and note.
fn told(api: &OfApi, service: &str) -> Vec<[String; 3]> {
    let is_it = |event: &Value| {
        let about = &event["regarding"];
        about["kind"] == "Service" && about["namespace"] == "shop" && about["name"] == service
    };
    let text = |event: &Value, field: &str| event[field].as_str().unwrap_or_default().to_owned();
    let words = |event: &Value| ["type", "reason", "note"].map(|field| text(event, field));
    api.server.events().iter().filter(|event| is_it(event)).map(words).collect()
}

/// What keeps Services from being handled, as the agent tells it.
fn problems(cluster: &Cluster) -> Value {
    let socket = Agents::socket(cluster, 1);
    let text = Agents::srcip(cluster, 1).run(&format!("status -o json --socket {}", socket.display()));
    let status: Value = serde_json::from_str(&text.unwrap()).unwrap();
    status["agent"]["north_south"]["problems"].clone()
}

fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !is_so() {
        assert!(Instant::now() < deadline, "never: {what}");
        thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn a_bad_service_is_told_to_its_owner_and_stops_no_other() {
    let mut cluster = Cluster::new(PodNetwork::PointToPoint).unwrap();
    let pod = cluster.pod(1, "web").unwrap();
    let _application = peer::application(&pod, &["[::]:8000"]).unwrap();
    let web = Service::new("web").endpoint(1, &pod, APPLICATION_PORT);
    let with = |name: &str, port: u16, more: Value| Service {
        more,
        ..Service::new(name).ports(port, 30000 + port, 31000 + port).endpoint(1, &pod, APPLICATION_PORT)
    };
    let ranges = with("ranges", 81, json!({"loadBalancerSourceRanges": ["198.51.100.0/33"]}));
    let inside = json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": {"namespace": "shop", "name": "inside", "annotations": {"srcip.io/north-south": "true"}},
        "spec": {"type": "ClusterIP", "ports": [{"port": 82}]},
    });
    // Younger by its name, as neither tells when it was made.
    let second = with("zweites", 80, json!({}));
    balancer::route(&cluster, &[1]).unwrap();
    let mut api = OfApi::start(&cluster, 1, &[&web, &ranges, &second]).unwrap();

    let web_at = |port: u16, family: Family| std::net::SocketAddr::new(web.dialled(family).ip(), port);
    let ask = |port: u16, family: Family| client::ask_once(&cluster.client, web_at(port, family));
    let assert_kept = |port: u16| {
        for family in Family::BOTH {
            let seen = ask(port, family).unwrap();
            assert_eq!(seen.peer.ip(), cluster.client.address(family), "{family:?} port {port}");
        }
    };
    assert_kept(80);
    let nobody_has_it = || client::connect_in_vain(&cluster.client, None, web_at(81, Family::V4));
    nobody_has_it().unwrap();

    let expected = [
        ("ranges", "InvalidService", "loadBalancerSourceRanges has \"198.51.100.0/33\""),
        ("zweites", "Conflict", "leads to shop/web, which is older"),
    ];
    for (name, reason, words) in expected {
        until(reason, || !told(&api, name).is_empty());
        let events = told(&api, name);
        let [[kind, told, note]] = &events[..] else { panic!("{name}: {events:?}") };
        assert_eq!((&**kind, &**told), ("Warning", reason), "{note}");
        assert!(note.contains(words), "{note}");
    }
    let listed = problems(&cluster);
    let of = |name: &str| {
        let is_it = |problem: &&Value| problem["service"] == format!("shop/{name}");
        listed.as_array().unwrap().iter().filter(is_it).count()
    };
    assert!(of("ranges") == 1 && of("zweites") > 0 && of("web") == 0, "{listed:#}");

    // One that goes bad while it runs; the one that was bad is put right, and handled without a restart.
    let mut ranges = ranges;
    ranges.more = json!({"loadBalancerSourceRanges": ["198.51.100.0/24", "2001:db8:100::/48"]});
    api.put(&ranges);
    api.server.put(Resource::Services, inside);
    until("the mended one is handled", || ask(81, Family::V4).is_ok());
    assert_kept(81);
    until("NothingFromOutside", || {
        told(&api, "inside").iter().any(|[_, reason, _]| reason == "NothingFromOutside")
    });
    assert_eq!(told(&api, "ranges").len(), 1, "it is told once");
    assert!(!problems(&cluster).to_string().contains("shop/ranges"));
    assert_kept(80);

    // Without the API, what is handled is handled.
    let node = &cluster.node(1).host;
    node.netns().run(|| api.server.set(Faults { refuse: true, ..Faults::default() })).unwrap();
    api.server.cut();
    assert_kept(80);
    assert_kept(81);
    node.netns().run(|| api.server.set(Faults::default())).unwrap();
    api.put(&Service { annotated: false, ..ranges });
    until("the change of mind is heard of", || nobody_has_it().is_ok());
    assert_kept(80);
    assert!(api.process.is_running());
}

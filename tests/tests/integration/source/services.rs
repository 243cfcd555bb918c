//! Services, EndpointSlices and nodes, from both places.

use std::{fs, sync::Arc};

use serde_json::{Value, json};
use srcip_tests::{
    apiserver::{ApiServer, faults::Faults, store::Resource},
    scratch::Scratch,
};
use srcip_user::{
    agent::source::{
        kube::{connect, services::ClusterSource},
        manifests::{ManifestSource, cluster::ClusterFiles},
    },
    northsouth::{
        objects::{ObjectName, Objects},
        select::Selection,
    },
};
use tokio::sync::watch;

use super::{Background, SOON, eventually, kube_timing, manifest_timing};

fn service(node_port: u16) -> Value {
    json!({
        "kind": "Service",
        "metadata": {"namespace": "shop", "name": "web", "annotations": {"srcip.io/north-south": "true"}},
        "spec": {"type": "NodePort", "ports": [{"port": 80, "nodePort": node_port}]},
    })
}

fn slice(address: &str) -> Value {
    json!({
        "kind": "EndpointSlice",
        "metadata": {"namespace": "shop", "name": "web-1", "labels": {"kubernetes.io/service-name": "web"}},
        "addressType": "IPv4", "ports": [{"port": 8080}], "endpoints": [{"addresses": [address]}],
    })
}

fn node(name: &str) -> Value {
    let addresses = json!([{"type": "InternalIP", "address": "10.0.0.1"}]);
    json!({"kind": "Node", "metadata": {"name": name}, "status": {"addresses": addresses}})
}

fn until(
    background: &Background,
    seen: &mut watch::Receiver<Arc<Objects>>,
    what: &str,
    right: impl Fn(&Objects) -> bool,
) {
    let found = background
        .wait(async { tokio::time::timeout(SOON, seen.wait_for(|objects| right(objects))).await.is_ok() });
    assert!(found, "not within {SOON:?}: {what}\n{:#?}", seen.borrow());
}

/// The NodePort of the Service, if it is known and right.
fn node_port(objects: &Objects) -> Option<u16> {
    let service = objects.services.get(&ObjectName::new("shop", "web").unwrap())?.as_ref().ok()?;
    service.ports[0].node_port.map(Into::into)
}

fn endpoint(objects: &Objects) -> Option<String> {
    let slice = objects.slices.values().next()?;
    Some(slice.endpoints.first()?.address.to_string())
}

#[test]
fn the_api_is_followed_through_everything_that_goes_wrong() {
    let (scratch, server, background) =
        (Scratch::new().unwrap(), ApiServer::start().unwrap(), Background::start());
    // More than a page of them.
    for i in 0..60 {
        server.put(Resource::Nodes, node(&format!("n{i}")));
    }
    server.put(Resource::Services, service(30080));
    server.put(Resource::EndpointSlices, slice("10.1.0.1"));
    let config = server.kubeconfig(scratch.path()).unwrap();
    let source = background.wait(async {
        let client = connect(Some(&config)).await.unwrap();
        ClusterSource::start(&client, Selection::default(), kube_timing())
    });
    let mut seen = source.watch();
    until(&background, &mut seen, "all of it", |objects| {
        objects.is_synced() && objects.nodes.len() == 60 && node_port(objects) == Some(30080)
    });

    server.put(Resource::EndpointSlices, slice("10.1.0.2"));
    until(&background, &mut seen, "the change", |objects| endpoint(objects).as_deref() == Some("10.1.0.2"));
    server.put(Resource::Services, json!({"metadata": service(1)["metadata"], "spec": {"ports": 3}}));
    until(&background, &mut seen, "the mistake", |objects| objects.services.values().any(Result::is_err));

    // What happens meanwhile is learned from a new list.
    server.set(Faults { status: Some(500), ..Faults::default() });
    server.cut();
    server.expire();
    server.put(Resource::Services, service(30081));
    server.delete(Resource::EndpointSlices, "shop", "web-1");
    server.set(Faults::default());
    until(&background, &mut seen, "what was missed", |objects| {
        node_port(objects) == Some(30081) && objects.slices.is_empty() && objects.is_synced()
    });
    for resource in ["services", "endpointslices.discovery.k8s.io", "nodes"] {
        eventually(&format!("{resource} are listed again"), || server.asked("list", resource).len() >= 2);
        assert!(!server.asked("watch", resource).is_empty());
    }
}

#[test]
fn manifests_are_followed() {
    let (scratch, background) = (Scratch::new().unwrap(), Background::start());
    let directory = scratch.path().join("manifests");
    fs::create_dir(&directory).unwrap();
    let write = |objects: &[Value]| {
        let text: String = objects.iter().map(|object| format!("---\n{object}\n")).collect();
        fs::write(directory.join("new"), text).unwrap();
        fs::rename(directory.join("new"), directory.join("all.yaml")).unwrap();
    };
    write(&[service(30080), slice("10.1.0.1"), node("n1")]);
    let (_source, files) = background.wait(async {
        let source = ManifestSource::start(&directory, None, manifest_timing());
        let files = ClusterFiles::start(&source, Selection::default());
        (source, files)
    });
    let mut seen = files.watch();
    until(&background, &mut seen, "all of it", |objects| {
        objects.is_synced()
            && node_port(objects) == Some(30080)
            && endpoint(objects).as_deref() == Some("10.1.0.1")
            && objects.nodes.contains_key("n1")
    });
    write(&[service(30081), node("n1")]);
    until(&background, &mut seen, "the change", |objects| {
        node_port(objects) == Some(30081) && objects.slices.is_empty()
    });
}

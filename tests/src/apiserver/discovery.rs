//! What this server says of itself.

use serde_json::{Value, json};

use super::event::GROUP;

/// The answer to a path that is not about objects.
pub(super) fn answer(path: &str) -> Option<Value> {
    Some(match path.trim_end_matches('/') {
        "/version" => {
            json!({ "major": "1", "minor": "37", "gitVersion": "v1.37.0", "platform": "linux/amd64" })
        }
        "/api" => json!({ "kind": "APIVersions", "versions": ["v1"], "serverAddressByClientCIDRs": [] }),
        "/apis" => json!({ "kind": "APIGroupList", "apiVersion": "v1", "groups": [group()] }),
        "/apis/events.k8s.io" => group(),
        "/api/v1" => resources("v1", &[("pods", "Pod", "po"), ("events", "Event", "ev")]),
        "/apis/events.k8s.io/v1" => resources("events.k8s.io/v1", &[("events", "Event", "ev")]),
        _ => return None,
    })
}

fn group() -> Value {
    let version = json!({ "groupVersion": format!("{GROUP}/v1"), "version": "v1" });
    json!({ "kind": "APIGroup", "name": GROUP, "versions": [version], "preferredVersion": version })
}

fn resources(group_version: &str, resources: &[(&str, &str, &str)]) -> Value {
    let resource = |(name, kind, short): &(&str, &str, &str)| {
        json!({
            "name": name, "singularName": kind.to_lowercase(), "kind": kind, "namespaced": true,
            "shortNames": [short], "verbs": ["get", "list", "watch", "create"],
        })
    };
    let resources: Vec<Value> = resources.iter().map(resource).collect();
    json!({ "kind": "APIResourceList", "apiVersion": "v1", "groupVersion": group_version, "resources": resources })
}

//! Tables, as `kubectl get` prints them.

use serde_json::{Value, json};

/// A column: its name, whether only `-o wide` has it, and what is in it.
type Column = (&'static str, bool, fn(&Value) -> String);

const POD: [Column; 6] = [
    ("Name", false, |pod| text(&pod["metadata"]["name"])),
    ("Ready", false, |pod| {
        let containers = pod["status"]["containerStatuses"].as_array();
        let ready = containers.into_iter().flatten().filter(|status| status["ready"] == true).count();
        format!("{ready}/{}", pod["spec"]["containers"].as_array().map_or(0, Vec::len))
    }),
    ("Status", false, |pod| text(&pod["status"]["phase"])),
    ("Restarts", false, |_| "0".to_owned()),
    ("IP", true, |pod| text(&pod["status"]["podIP"])),
    ("Node", true, |pod| text(&pod["spec"]["nodeName"])),
];

const EVENT: [Column; 4] = [
    ("Type", false, |event| text(&event["type"])),
    ("Reason", false, |event| text(&event["reason"])),
    ("Object", false, |event| {
        let object = &event["involvedObject"];
        format!("{}/{}", text(&object["kind"]).to_lowercase(), text(&object["name"]))
    }),
    ("Message", false, |event| text(&event["message"])),
];

fn text(value: &Value) -> String {
    value.as_str().unwrap_or("<none>").to_owned()
}

/// The table of some objects of a kind.
pub(super) fn of(kind: &str, objects: &[Value], metadata: Value) -> Value {
    let columns: &[Column] = if kind == "Pod" { &POD } else { &EVENT };
    let definitions = columns.iter().map(|(name, wide, _)| {
        json!({ "name": name, "type": "string", "format": "", "description": "", "priority": i32::from(*wide) })
    });
    let rows = objects.iter().map(|object| {
        let cells: Vec<String> = columns.iter().map(|(.., cell)| cell(object)).collect();
        json!({
            "cells": cells,
            "object": {
                "kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1", "metadata": object["metadata"],
            },
        })
    });
    json!({
        "kind": "Table", "apiVersion": "meta.k8s.io/v1", "metadata": metadata,
        "columnDefinitions": definitions.collect::<Vec<_>>(), "rows": rows.collect::<Vec<_>>(),
    })
}

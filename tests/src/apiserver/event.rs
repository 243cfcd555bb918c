//! What an Event has to be like, and how it looks to those that ask for the older kind.

use serde_json::{Value, json};

/// The group of Events.
pub(super) const GROUP: &str = "events.k8s.io";

/// Checks what a real server checks: `ValidateEventCreate` in Kubernetes'
/// pkg/apis/core/validation/events.go.
pub(super) fn check(event: &Value, namespace: Option<&str>) -> Result<(), String> {
    let text = |path: &str| {
        let value = path.split('.').fold(event, |value, name| &value[name]);
        value.as_str().unwrap_or_default()
    };
    for (path, most) in [
        ("metadata.name", 253),
        ("metadata.namespace", 63),
        ("reason", 128),
        ("action", 128),
        ("reportingController", 128),
        ("reportingInstance", 128),
        ("eventTime", 64),
    ] {
        let length = text(path).len();
        if !(1..=most).contains(&length) {
            return Err(format!("{path} has {length} bytes: it has to have one to {most}"));
        }
    }
    if text("note").len() > 1024 {
        return Err("note: can have at most 1024 characters".to_owned());
    }
    if !matches!(text("type"), "Normal" | "Warning") {
        return Err("type: has to be Normal or Warning".to_owned());
    }
    if Some(text("metadata.namespace")) != namespace
        || text("regarding.namespace") != text("metadata.namespace")
    {
        return Err("an Event is in the namespace of what it is about".to_owned());
    }
    let is_valid = |label: &str| {
        let ends = [label.chars().next(), label.chars().last()];
        ends.iter().all(|c| c.is_some_and(|c| c.is_ascii_lowercase() || c.is_ascii_digit()))
            && label.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-')
    };
    if !text("metadata.name").split('.').all(is_valid) {
        return Err(format!("metadata.name: {:?} is not an RFC 1123 subdomain", text("metadata.name")));
    }
    Ok(())
}

/// The Event as core/v1 has it.
pub(super) fn as_core(event: &Value) -> Value {
    json!({
        "metadata": event["metadata"],
        "involvedObject": event["regarding"],
        "reason": event["reason"],
        "message": event["note"],
        "type": event["type"],
        "action": event["action"],
        "eventTime": event["eventTime"],
        "reportingComponent": event["reportingController"],
        "reportingInstance": event["reportingInstance"],
        "source": {}, "firstTimestamp": null, "lastTimestamp": null,
    })
}

//! A pod as it comes: anything may be in it, and a bad one must not hide the good ones.

use k8s_openapi::api::core::v1::Pod;
use serde_json::Value;

use crate::{
    agent::pod::{PodInfo, PodUid},
    text::beginning,
};

/// How much is said about what is wrong, in characters: an error may quote all of a field.
pub(super) const MAX_REASON: usize = 300;

/// A pod that cannot be read.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Refused {
    /// Its UID, if that much can be read.
    pub(super) uid: Option<PodUid>,
    /// Which pod it is, and what is wrong with it.
    pub(super) reason: String,
}

/// Takes what matters out of an object that should be a pod.
pub(super) fn read(value: Value) -> Result<PodInfo, Refused> {
    let text = |field: &str| value["metadata"][field].as_str().map(ToOwned::to_owned);
    let (namespace, name, uid) = (text("namespace"), text("name"), text("uid"));
    let info = serde_json::from_value::<Pod>(value)
        .map_err(|error| format!("it is not as Kubernetes would have it: {error}"))
        .and_then(|pod| PodInfo::from_object(&pod).map_err(|error| error.to_string()));
    info.map_err(|error| {
        let namespace = namespace.as_deref().unwrap_or("default");
        let name = name.as_deref().unwrap_or("(without a name)");
        Refused {
            uid: uid.and_then(|uid| PodUid::new(&uid)),
            reason: beginning(&format!("pod {namespace}/{name} is left alone: {error}"), MAX_REASON),
        }
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_pod_that_cannot_be_read_still_says_which_it_is() {
        let refused = read(json!({
            "metadata": {"namespace": "a", "name": "b\u{1b}[2J", "uid": "u-1"},
            "spec": {"hostNetwork": "perhaps"},
        }))
        .unwrap_err();
        assert_eq!(refused.uid, PodUid::new("u-1"));
        assert!(refused.reason.starts_with("pod a/b\u{fffd}[2J is left alone: "), "{}", refused.reason);

        for value in [json!(null), json!(7), json!([]), json!({"metadata": "x"}), json!({"metadata": {}})] {
            let refused = read(value).unwrap_err();
            assert_eq!(refused.uid, None);
            assert!(refused.reason.starts_with("pod default/(without a name)"), "{}", refused.reason);
        }
        let long = read(json!({"metadata": {"name": "x".repeat(10_000), "uid": "1"}})).unwrap_err();
        assert!(long.reason.chars().count() <= MAX_REASON + 1);
    }
}

//! What is kept of a Kubernetes pod.

use std::{collections::BTreeMap, fmt, sync::Arc};

use k8s_openapi::api::core::v1::Pod;
use serde::{Deserialize, Serialize};

/// A UID is a UUID, or, for a static pod, a hash; nothing longer is one.
const MAX_UID: usize = 64;
/// The longest namespace (an RFC 1123 label) and the longest name (an RFC 1123 subdomain).
const MAX_NAMESPACE: usize = 63;
const MAX_NAME: usize = 253;

/// The kubelet's annotations on the mirror of a static pod: the UID that this pod has in cgroups, twice.
pub(crate) const CONFIG_HASH: &str = "kubernetes.io/config.hash";
const CONFIG_MIRROR: &str = "kubernetes.io/config.mirror";

/// No annotation that is accepted is longer; so much is kept of one that is, to tell that it is too long.
const MAX_VALUE: usize = 2048;
/// A pod has a few labels; nobody selects by the hundredth.
const MAX_LABELS: usize = 256;

/// Annotations with these prefixes are kept; a pod can have 256 KiB of others.
const KEPT_ANNOTATIONS: [&str; 3] = ["srcip.io/", "sidecar.istio.io/", "traffic.sidecar.istio.io/"];

/// Tells a pod from every other, also from a later one with the same name.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct PodUid(Arc<str>);

impl PodUid {
    /// Checks that `text` can be a UID.
    pub fn new(text: &str) -> Option<Self> {
        let valid = |c: char| c.is_ascii_alphanumeric() || c == '-';
        ((1..=MAX_UID).contains(&text.len()) && text.chars().all(valid)).then(|| Self(text.into()))
    }

    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for PodUid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl TryFrom<String> for PodUid {
    type Error = InvalidPod;

    fn try_from(text: String) -> Result<Self, InvalidPod> {
        Self::new(&text).ok_or(InvalidPod("its UID is none"))
    }
}

impl From<PodUid> for String {
    fn from(uid: PodUid) -> Self {
        uid.0.as_ref().to_owned()
    }
}

/// The name people know a pod by; it may be given to another pod later.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
pub struct PodName {
    /// Its namespace.
    pub namespace: Arc<str>,
    /// Its name within that.
    pub name: Arc<str>,
}

impl PodName {
    /// Checks that these can be a namespace and a name.
    pub fn new(namespace: &str, name: &str) -> Option<Self> {
        let valid = |text: &str, max: usize, dots: bool| {
            let is_valid =
                |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-' || dots && c == '.';
            (1..=max).contains(&text.len()) && text.chars().all(is_valid)
        };
        (valid(namespace, MAX_NAMESPACE, false) && valid(name, MAX_NAME, true))
            .then(|| Self { namespace: namespace.into(), name: name.into() })
    }
}

/// `NAMESPACE/NAME`, as kubectl has it.
impl fmt::Display for PodName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// Why an object is no pod that can be steered.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("it is not as Kubernetes would have it: {0}")]
pub struct InvalidPod(&'static str);

/// A pod, as far as the agent needs it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PodInfo {
    /// Its name.
    pub name: PodName,
    /// Its UID.
    pub uid: PodUid,
    /// The UID by which the node knows it, in cgroups and in what the runtime tells the CNI plugin: another one
    /// for static pods.
    pub node_uid: PodUid,
    /// The node it is bound to; `None` if the object does not say.
    pub node: Option<String>,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
    /// Those of its annotations that can matter.
    pub annotations: BTreeMap<String, String>,
    /// Whether it shares the host's network namespace.
    pub host_network: bool,
    /// Whether all of its containers have ended for good (`Succeeded`, `Failed`).
    pub completed: bool,
}

impl PodInfo {
    /// Takes what matters out of a pod.
    pub fn from_object(pod: &Pod) -> Result<Self, InvalidPod> {
        let metadata = &pod.metadata;
        let name = metadata.name.as_deref().ok_or(InvalidPod("it has no name"))?;
        // As kubectl does with a manifest that does not say.
        let namespace = metadata.namespace.as_deref().unwrap_or("default");
        let uid = metadata.uid.as_deref().ok_or(InvalidPod("it has no UID"))?;
        let uid = PodUid::new(uid).ok_or(InvalidPod("its UID is none"))?;
        let annotations = metadata.annotations.iter().flatten();
        let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
        Ok(Self {
            name: PodName::new(namespace, name).ok_or(InvalidPod("its name is none"))?,
            node_uid: mirrored(metadata.annotations.as_ref()).unwrap_or_else(|| uid.clone()),
            uid,
            node: pod.spec.as_ref().and_then(|spec| spec.node_name.clone()),
            labels: metadata.labels.iter().flatten().take(MAX_LABELS).map(owned).collect(),
            annotations: annotations.filter(|(key, _)| is_kept(key)).take(MAX_LABELS).map(owned).collect(),
            host_network: pod.spec.as_ref().is_some_and(|spec| spec.host_network == Some(true)),
            completed: matches!(phase, Some("Succeeded" | "Failed")),
        })
    }
}

/// A label or an annotation of its own, without the end of a value that is too long.
fn owned((key, value): (&String, &String)) -> (String, String) {
    let end = (0..=MAX_VALUE.min(value.len())).rev().find(|end| value.is_char_boundary(*end));
    (key.clone(), value[..end.unwrap_or_default()].to_owned())
}

/// The UID of the static pod that this one mirrors.
///
/// Who may make pods can write these annotations, so only what the kubelet would write counts: an MD5 sum,
/// which is no UID that the API gives to a pod.
fn mirrored(annotations: Option<&BTreeMap<String, String>>) -> Option<PodUid> {
    let hash = annotations?.get(CONFIG_HASH)?;
    let is_sum = hash.len() == 32 && hash.chars().all(|c| matches!(c, '0'..='9' | 'a'..='f'));
    (is_sum && annotations?.get(CONFIG_MIRROR) == Some(hash)).then(|| PodUid::new(hash))?
}

/// Whether an annotation can matter.
pub fn is_kept(annotation: &str) -> bool {
    KEPT_ANNOTATIONS.iter().any(|prefix| annotation.starts_with(prefix))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(object: serde_json::Value) -> Result<PodInfo, InvalidPod> {
        PodInfo::from_object(&serde_json::from_value(object).unwrap())
    }

    const HASH: &str = "0cc175b9c0f1b6a831c399e269772661";

    #[test]
    fn nobody_takes_the_uid_of_another_pod() {
        let other = "8e2f3a52-4a5e-4d8e-9c77-6b1f7a1b9d10";
        for (hash, mirror) in [(other, other), (HASH, other), ("abc", "abc")] {
            let annotations = serde_json::json!({
                "kubernetes.io/config.hash": hash, "kubernetes.io/config.mirror": mirror,
            });
            let metadata = serde_json::json!({"name": "a", "uid": "1", "annotations": annotations});
            let info = pod(serde_json::json!({ "metadata": metadata })).unwrap();
            assert_eq!(info.node_uid, info.uid, "{hash} {mirror}");
        }
    }

    #[test]
    fn what_matters_is_kept() {
        let info = pod(serde_json::json!({
            "metadata": {
                "name": "web-0", "uid": "4b1c", "labels": {"app": "web"},
                "annotations": {"srcip.io/steer": "true", "kubernetes.io/config.hash": HASH,
                                "kubernetes.io/config.mirror": HASH, "other": "x"},
            },
            "spec": {"hostNetwork": true, "nodeName": "n1", "containers": []},
            "status": {"phase": "Failed"},
        }))
        .unwrap();
        assert_eq!(info.name.to_string(), "default/web-0");
        assert_eq!((info.uid.as_str(), info.node_uid.as_str()), ("4b1c", HASH));
        assert_eq!(info.annotations.keys().collect::<Vec<_>>(), ["srcip.io/steer"]);
        assert!(info.host_network && info.completed);
        assert_eq!(info.node.as_deref(), Some("n1"));
    }

    #[test]
    fn what_is_too_long_is_cut() {
        let metadata = serde_json::json!({
            "name": "a", "uid": "1", "annotations": {"srcip.io/steer": "ä".repeat(100_000)},
        });
        let info = pod(serde_json::json!({ "metadata": metadata })).unwrap();
        assert_eq!(info.annotations["srcip.io/steer"].len(), MAX_VALUE);
    }

    #[test]
    fn hostile_names_are_refused() {
        for metadata in [
            serde_json::json!({"name": "../x", "uid": "1"}),
            serde_json::json!({"name": "a", "uid": "1/../2"}),
            serde_json::json!({"name": "a", "uid": "x".repeat(65)}),
            serde_json::json!({"name": "a", "namespace": "b.c", "uid": "1"}),
            serde_json::json!({"name": "a"}),
        ] {
            assert!(pod(serde_json::json!({"metadata": metadata})).is_err(), "{metadata}");
        }
    }
}

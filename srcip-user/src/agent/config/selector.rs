//! Pods that are steered by what the configuration says of their labels.

use std::{collections::BTreeMap, num::NonZeroU16};

use serde::{Deserialize, Serialize};

use super::EngineChoice;
use crate::{agent::pod::PodInfo, dataplane::record::OnProxyDown, ports::PortList};

/// Pods by namespace and labels, and how they are steered unless their annotations say otherwise.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Selector {
    /// The namespace; all if not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub namespace: Option<String>,
    /// Labels that the pods have.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub match_labels: BTreeMap<String, String>,
    /// More that their labels have to be like.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub match_expressions: Vec<Requirement>,
    /// Port of the proxy's listener.
    pub proxy_port: NonZeroU16,
    /// Ports to steer; all if not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub include_inbound_ports: Option<PortList>,
    /// Ports not to steer, if all others are.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exclude_inbound_ports: Option<PortList>,
    /// What happens to connections while the proxy does not listen.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub on_proxy_down: Option<OnProxyDown>,
    /// How to hand connections to the proxy.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub engine: Option<EngineChoice>,
}

impl Selector {
    /// Whether it means this pod.
    pub fn matches(&self, pod: &PodInfo) -> bool {
        self.namespace.as_ref().is_none_or(|namespace| **namespace == *pod.name.namespace)
            && self.match_labels.iter().all(|(key, value)| pod.labels.get(key) == Some(value))
            && self.match_expressions.iter().all(|requirement| requirement.holds(&pod.labels))
    }

    pub(super) fn check(&self) -> Result<(), String> {
        if self.namespace.is_none() && self.match_labels.is_empty() && self.match_expressions.is_empty() {
            return Err("this selector means every pod of the node, kube-system's included; give it a \
                        namespace, matchLabels or matchExpressions"
                .to_owned());
        }
        if self.exclude_inbound_ports.is_some()
            && self.include_inbound_ports.as_ref().is_some_and(|include| !include.is_all())
        {
            return Err(
                "excludeInboundPorts counts only if includeInboundPorts is \"*\"; leave those ports \
                        out of includeInboundPorts instead"
                    .to_owned(),
            );
        }
        self.match_expressions.iter().try_for_each(Requirement::check)
    }
}

/// What a label has to be like: Kubernetes' `LabelSelectorRequirement`, which lets misspelt fields pass.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Requirement {
    /// The label.
    pub key: String,
    /// How it relates to the values.
    pub operator: Operator,
    /// The values.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub values: Vec<String>,
}

/// How a label relates to values.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Operator {
    /// It has one of them.
    In,
    /// It has none of them, or the pod does not have the label.
    NotIn,
    /// The pod has the label.
    Exists,
    /// The pod does not have it.
    DoesNotExist,
}

impl Requirement {
    fn holds(&self, labels: &BTreeMap<String, String>) -> bool {
        let value = labels.get(&self.key);
        match self.operator {
            Operator::In => value.is_some_and(|value| self.values.contains(value)),
            Operator::NotIn => value.is_none_or(|value| !self.values.contains(value)),
            Operator::Exists => value.is_some(),
            Operator::DoesNotExist => value.is_none(),
        }
    }

    fn check(&self) -> Result<(), String> {
        let wants_values = matches!(self.operator, Operator::In | Operator::NotIn);
        match (wants_values, self.values.is_empty()) {
            (true, true) => Err(format!("the operator {:?} needs values", self.operator)),
            (false, false) => Err(format!("the operator {:?} takes no values", self.operator)),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(namespace: &str, labels: &[(&str, &str)]) -> PodInfo {
        let labels: BTreeMap<_, _> = labels.iter().copied().collect();
        let object = serde_json::json!({
            "metadata": {"namespace": namespace, "name": "a", "uid": "1", "labels": labels},
        });
        PodInfo::from_object(&serde_json::from_value(object).unwrap()).unwrap()
    }

    #[test]
    fn selectors_mean_what_they_mean_to_kubernetes() {
        let selector: Selector = serde_json::from_value(serde_json::json!({
            "namespace": "shop", "matchLabels": {"app": "web"}, "proxyPort": 15006,
            "matchExpressions": [
                {"key": "tier", "operator": "In", "values": ["front", "edge"]},
                {"key": "canary", "operator": "DoesNotExist"},
            ],
        }))
        .unwrap();
        assert!(selector.matches(&pod("shop", &[("app", "web"), ("tier", "edge"), ("more", "x")])));
        for (namespace, labels) in [
            ("other", &[("app", "web"), ("tier", "edge")][..]),
            ("shop", &[("app", "db"), ("tier", "edge")]),
            ("shop", &[("app", "web"), ("tier", "back")]),
            ("shop", &[("app", "web")]),
            ("shop", &[("app", "web"), ("tier", "edge"), ("canary", "")]),
        ] {
            assert!(!selector.matches(&pod(namespace, labels)), "{namespace} {labels:?}");
        }
        let not_in = Requirement { key: "a".into(), operator: Operator::NotIn, values: vec!["x".into()] };
        assert!(not_in.holds(&pod("n", &[]).labels), "a pod without the label is not in");
        assert!(!not_in.holds(&pod("n", &[("a", "x")]).labels));
        let exists = Requirement { key: "a".into(), operator: Operator::Exists, values: vec![] };
        assert!(exists.holds(&pod("n", &[("a", "")]).labels) && !exists.holds(&pod("n", &[]).labels));
    }
}

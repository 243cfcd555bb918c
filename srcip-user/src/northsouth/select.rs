//! Which Services are srcip's to handle: those that ask for it, and those that the configuration means.

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde::{Deserialize, Deserializer, Serialize, de::Error as _};

use super::objects::{Problem, shown};

/// Whether a Service is to be handled.
pub const NORTH_SOUTH: &str = "srcip.io/north-south";

/// Selectors are tried one after the other, for every Service.
const MAX_SELECTORS: usize = 100;

/// The Services that are handled without asking for it.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Selection(#[serde(deserialize_with = "selectors")] Vec<Selector>);

/// Services by namespace and labels. With neither, all that can be reached from outside.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Selector {
    /// The namespace; all if not given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub namespace: Option<String>,
    /// Labels that the Services have.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub match_labels: BTreeMap<String, String>,
}

/// What is to be done with a Service.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Choice {
    /// Handle it: it asks for that.
    Asked,
    /// Handle it: the configuration means it.
    Matched,
    /// Leave it to others.
    Not,
    /// Leave it to others, for it says what is not understood.
    Invalid(Problem),
}

impl Selection {
    /// Those that one of these means. Fails if there are more than 100.
    pub fn new(selectors: Vec<Selector>) -> Result<Self, String> {
        if selectors.len() > MAX_SELECTORS {
            return Err(format!("there are {} selectors; {MAX_SELECTORS} are the most", selectors.len()));
        }
        Ok(Self(selectors))
    }

    /// What is to be done with the Service of this metadata. Its own word counts first.
    pub fn choose(&self, metadata: &ObjectMeta) -> Choice {
        let annotations = metadata.annotations.as_ref();
        match annotations.and_then(|annotations| annotations.get(NORTH_SOUTH)).map(String::as_str) {
            Some("true") => Choice::Asked,
            Some("false") => Choice::Not,
            Some(other) => Choice::Invalid(Problem::new(
                "InvalidAnnotation",
                format!("{NORTH_SOUTH} is \"{}\"; expected \"true\" or \"false\"", shown(other)),
            )),
            None if self.0.iter().any(|selector| selector.matches(metadata)) => Choice::Matched,
            None => Choice::Not,
        }
    }
}

impl Selector {
    fn matches(&self, metadata: &ObjectMeta) -> bool {
        let namespace = metadata.namespace.as_deref().unwrap_or("default");
        let label = |key: &String| metadata.labels.as_ref().and_then(|labels| labels.get(key));
        self.namespace.as_deref().is_none_or(|wanted| wanted == namespace)
            && self.match_labels.iter().all(|(key, value)| label(key) == Some(value))
    }
}

fn selectors<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<Selector>, D::Error> {
    Selection::new(Vec::deserialize(deserializer)?).map(|selection| selection.0).map_err(D::Error::custom)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn choose(selection: &str, metadata: Value) -> Choice {
        let selection: Selection = serde_saphyr::from_str(selection).unwrap();
        selection.choose(&serde_json::from_value(metadata).unwrap())
    }

    #[test]
    fn the_annotation_counts_before_the_configuration() {
        let annotated = |value: &str| json!({"name": "a", "annotations": {NORTH_SOUTH: value}});
        assert_eq!(choose("[]", annotated("true")), Choice::Asked);
        assert_eq!(choose("[{}]", annotated("false")), Choice::Not);
        assert_eq!(choose("[]", json!({"name": "a"})), Choice::Not);
        assert_eq!(choose("[{}]", json!({"name": "a"})), Choice::Matched);
        let Choice::Invalid(problem) = choose("[{}]", annotated("yes\u{7}")) else { panic!("taken") };
        assert!(problem.note.contains("\"yes\u{fffd}\""), "{problem:?}");
    }

    #[test]
    fn selectors_mean_namespace_and_labels() {
        let selection = "[{namespace: shop, matchLabels: {app: web}}, {namespace: edge}]";
        let metadata = |namespace: &str, app: &str| json!({"namespace": namespace, "labels": {"app": app}});
        assert_eq!(choose(selection, metadata("shop", "web")), Choice::Matched);
        assert_eq!(choose(selection, metadata("shop", "db")), Choice::Not);
        assert_eq!(choose(selection, metadata("edge", "db")), Choice::Matched);
        assert_eq!(choose(selection, json!({"labels": {"app": "web"}})), Choice::Not);
    }

    #[test]
    fn mistakes_in_the_configuration_are_named() {
        for (text, expected) in [("[{nameSpace: a}]", "nameSpace"), ("[{matchLabels: 3}]", "line 1")] {
            let error = serde_saphyr::from_str::<Selection>(text).unwrap_err().to_string();
            assert!(error.contains(expected), "{text}: {error}");
        }
        let many = format!("[{}]", "{},".repeat(MAX_SELECTORS + 1));
        assert!(
            serde_saphyr::from_str::<Selection>(&many).unwrap_err().to_string().contains("101 selectors")
        );
    }
}

//! Networks' configurations as text: chains the plugin into one and takes it out again, and changes nothing
//! else, so that what others wrote comes back byte by byte.

use std::ops::Range;

use serde::{Deserialize, Serialize};
use serde_json::{Value, value::RawValue};

use super::{
    config::{PLUGIN, POD_ANNOTATIONS, Settings},
    spec::VERSIONS,
};

/// The plugin's entry.
#[derive(Debug, Serialize)]
struct Entry<'a> {
    r#type: &'a str,
    capabilities: std::collections::BTreeMap<&'a str, bool>,
    #[serde(flatten)]
    settings: &'a Settings,
}

/// The plugin's entry with these settings.
pub fn entry(settings: &Settings) -> Value {
    let capabilities = [(POD_ANNOTATIONS, true)].into();
    serde_json::to_value(Entry { r#type: PLUGIN, capabilities, settings }).expect("plain data is always JSON")
}

/// What every configuration may have, as the runtime reads it.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Header {
    name: Option<String>,
    cni_version: Option<String>,
    #[serde(default)]
    cni_versions: Vec<String>,
    r#type: Option<String>,
}

#[derive(Debug, Deserialize)]
struct Plugins<'a> {
    #[serde(borrow)]
    plugins: Vec<&'a RawValue>,
}

#[derive(Debug, Deserialize)]
struct Plugin {
    r#type: String,
}

/// A list of plugins, in a `.conflist`.
#[derive(Debug)]
pub struct List<'a> {
    text: &'a str,
    header: Header,
    /// Where each entry stands in the text, and its type.
    entries: Vec<(Range<usize>, String)>,
}

impl<'a> List<'a> {
    /// Reads one that a runtime would take.
    pub fn parse(text: &'a str) -> Result<Self, String> {
        let header: Header = serde_json::from_str(text).map_err(|error| error.to_string())?;
        let list: Plugins<'a> = serde_json::from_str(text).map_err(|error| error.to_string())?;
        let entries = list.plugins.into_iter().map(|raw| {
            let plugin: Plugin = serde_json::from_str(raw.get()).map_err(|error| error.to_string())?;
            let start = raw.get().as_ptr().addr() - text.as_ptr().addr();
            Ok((start..start + raw.get().len(), plugin.r#type))
        });
        let entries: Vec<_> = entries.collect::<Result<_, String>>()?;
        if entries.is_empty() {
            return Err("it has no plugins".to_owned());
        }
        Ok(Self { text, header, entries })
    }

    /// Whether the plugin is in it.
    pub fn has_plugin(&self) -> bool {
        self.places().next().is_some()
    }

    fn places(&self) -> impl Iterator<Item = usize> + '_ {
        self.entries.iter().enumerate().filter(|(_, (_, kind))| kind == PLUGIN).map(|(i, _)| i)
    }

    /// The text with the plugin in it, once, behind another; `None` if that is how it is.
    pub fn with_plugin(&self, entry: &Value) -> Result<Option<String>, String> {
        self.header.check_versions()?;
        let places: Vec<_> = self.places().collect();
        match places[..] {
            [] => Ok(Some(self.appended(entry))),
            // Somebody else may have gone behind us; that is no reason to change anything.
            [place] if place > 0 => {
                let (range, _) = &self.entries[place];
                let there: Value =
                    serde_json::from_str(&self.text[range.clone()]).map_err(|error| error.to_string())?;
                Ok((there != *entry).then(|| {
                    let rendered = render(entry, self.space_before(range.start));
                    [&self.text[..range.start], &rendered, &self.text[range.end..]].concat()
                }))
            }
            _ => {
                let without = self.without_plugin().ok_or("it has no plugin but srcip-cni")?;
                Ok(Some(List::parse(&without)?.appended(entry)))
            }
        }
    }

    /// The text without the plugin; `None` if nothing would be left.
    pub fn without_plugin(&self) -> Option<String> {
        let ours: Vec<_> = self.places().collect();
        let first = (0..self.entries.len()).find(|i| !ours.contains(i))?;
        let mut cuts = Vec::new();
        // Those in front of the first that stays go with what is behind them, the rest with what is before.
        if first > 0 {
            cuts.push(self.entries[0].0.start..self.entries[first].0.start);
        }
        for i in ours.into_iter().filter(|i| *i > first) {
            cuts.push(self.entries[i - 1].0.end..self.entries[i].0.end);
        }
        let mut text = String::with_capacity(self.text.len());
        let mut at = 0;
        for cut in cuts {
            text.push_str(&self.text[at..cut.start]);
            at = cut.end;
        }
        text.push_str(&self.text[at..]);
        Some(text)
    }

    fn appended(&self, entry: &Value) -> String {
        let (last, _) = &self.entries[self.entries.len() - 1];
        let space = self.space_before(last.start);
        let (before, after) = self.text.split_at(last.end);
        [before, ",", space, &render(entry, space), after].concat()
    }

    /// The white space between a place and what is before it.
    fn space_before(&self, place: usize) -> &'a str {
        let before = &self.text[..place];
        &before[before.trim_end_matches([' ', '\t', '\n', '\r']).len()..]
    }
}

/// The entry, indented like its neighbour, before which is `space`.
fn render(entry: &Value, space: &str) -> String {
    match space.rsplit_once('\n') {
        Some((_, indentation)) => format!("{entry:#}").replace('\n', &format!("\n{indentation}")),
        None => entry.to_string(),
    }
}

/// A list around the single plugin of a `.conf`, with the plugin behind it.
pub fn wrap(text: &str, entry: &Value) -> Result<String, String> {
    let header = single(text)?;
    header.check_versions()?;
    let line = |key: &str, value: &Option<String>| match value {
        Some(value) => format!("  \"{key}\": {},\n", Value::from(value.as_str())),
        None => String::new(),
    };
    let wrapped = format!(
        "{{\n{}{}  \"plugins\": [\n{},\n{entry:#}\n  ]\n}}\n",
        line("cniVersion", &header.cni_version),
        line("name", &header.name),
        text.trim_ascii(),
    );
    // Nothing is written that a runtime could not read.
    List::parse(&wrapped)?;
    Ok(wrapped)
}

/// Checks a `.conf` that a runtime would take.
pub fn check_single(text: &str) -> Result<(), String> {
    single(text).map(|_| ())
}

fn single(text: &str) -> Result<Header, String> {
    let header: Header = serde_json::from_str(text).map_err(|error| error.to_string())?;
    match header.r#type.as_deref() {
        None | Some("") => Err("it has no type".to_owned()),
        Some(_) => Ok(header),
    }
}

impl Header {
    /// Fails if the plugin would be called in a version that it does not know.
    fn check_versions(&self) -> Result<(), String> {
        let versions = self.cni_version.iter().filter(|version| !version.is_empty());
        match versions.chain(&self.cni_versions).find(|version| !VERSIONS.contains(&version.as_str())) {
            Some(version) => Err(format!(
                "it is of version {version:?} of the CNI specification, and this release of srcip knows {}",
                VERSIONS.join(", ")
            )),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const FLANNEL: &str = r#"{
  "name": "cbr0",
  "cniVersion": "0.3.1",
  "plugins": [
    {
      "type": "flannel",
      "delegate": { "hairpinMode": true, "isDefaultGateway": true }
    },
    {"type": "portmap", "capabilities": {"portMappings": true}}
  ],
  "zz": 1.10, "aa": "ü\u00fc"
}
"#;

    fn chained(text: &str) -> String {
        let entry = entry(&Settings::default());
        List::parse(text).unwrap().with_plugin(&entry).unwrap().unwrap()
    }

    #[test]
    fn only_the_entry_is_added_and_only_it_is_removed() {
        let text = chained(FLANNEL);
        let entry = entry(&Settings::default());
        let value: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(value["plugins"][2], entry);
        assert!(text.contains("}},\n    {\n      \"capabilities\": {"), "{text}");
        assert_eq!(List::parse(&text).unwrap().with_plugin(&entry), Ok(None));
        assert_eq!(List::parse(&text).unwrap().without_plugin().unwrap(), FLANNEL);
        let line = r#"{"plugins":[{"type":"a"}]}"#;
        assert_eq!(chained(line).lines().count(), 1);
        assert_eq!(List::parse(&chained(line)).unwrap().without_plugin().unwrap(), line);
    }

    #[test]
    fn other_settings_are_changed_in_place() {
        let later = FLANNEL
            .replace("\n  ],", ",\n    {\"type\":\"srcip-cni\"},\n    {\"type\": \"istio-cni\"}\n  ],");
        let text = chained(&later);
        let value: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(value["plugins"][2], entry(&Settings::default()));
        assert_eq!(value["plugins"][3]["type"], "istio-cni");
    }

    #[test]
    fn once_and_behind_another() {
        for plugins in [
            r#"[{"type":"srcip-cni"},{"type":"a"}]"#,
            r#"[{"type":"srcip-cni"}, {"type":"srcip-cni"}, {"type":"a"}, {"type":"srcip-cni"}]"#,
            r#"[{"type":"a"},{"type":"srcip-cni"},{"type":"srcip-cni"}]"#,
        ] {
            let text = chained(&format!("{{\"plugins\":{plugins}}}"));
            let value: Value = serde_json::from_str(&text).unwrap();
            let types: Vec<_> = value["plugins"].as_array().unwrap().iter().map(|p| &p["type"]).collect();
            assert_eq!(types, ["a", PLUGIN], "{text}");
        }
        let alone = r#"{"plugins":[{"type":"srcip-cni"}]}"#;
        assert_eq!(List::parse(alone).unwrap().without_plugin(), None);
    }

    #[test]
    fn what_a_runtime_would_not_take_is_no_list() {
        for text in [
            "",
            "[]",
            "{}",
            r#"{"plugins":[]}"#,
            r#"{"plugins":{}}"#,
            r#"{"plugins":[1]}"#,
            r#"{"plugins":[{"type":1}]}"#,
            r#"{"plugins":[{"type":"a"}],"plugins":[{"type":"b"}]}"#,
            r#"{"plugins":[{"type":"a"}]"#,
        ] {
            assert!(List::parse(text).is_err(), "{text}");
        }
        let later = r#"{"cniVersion":"2.0.0","plugins":[{"type":"a"}]}"#;
        let error = List::parse(later).unwrap().with_plugin(&Value::Null).unwrap_err();
        assert!(error.contains("\"2.0.0\""), "{error}");
    }

    #[test]
    fn a_single_plugin_is_wrapped() {
        let text = "\n{ \"name\": \"n\\\"\", \"cniVersion\": \"0.4.0\", \"type\": \"bridge\", \"x\": 1.0 }\n";
        let wrapped = wrap(text, &entry(&Settings::default())).unwrap();
        let value: Value = serde_json::from_str(&wrapped).unwrap();
        assert_eq!((&value["name"], &value["cniVersion"]), (&"n\"".into(), &"0.4.0".into()));
        assert_eq!(value["plugins"][0], serde_json::from_str::<Value>(text).unwrap());
        assert_eq!(value["plugins"][1]["type"], PLUGIN);
        assert!(wrap(r#"{"name":"n"}"#, &Value::Null).is_err());
    }

    fn space() -> impl Strategy<Value = String> {
        "[ \t\n]{0,4}"
    }

    proptest! {
        /// However others have written it: chained it is the same with us in it, and without us the same.
        #[test]
        fn any_list_comes_back(
            plugins in proptest::collection::vec(("[a-z]{1,6}", space(), space(), "[ -~]{0,6}"), 1..5),
            before in space(), after in space(), other in "[ -~]{0,6}",
        ) {
            let plugins: Vec<_> = plugins.iter().map(|(kind, a, b, text)| {
                format!("{a}{{\"type\":{b}\"{kind}\",\"x\":[{}]}}{b}", Value::from(text.as_str()))
            }).collect();
            let text = format!(
                "{before}{{\"plugins\"{after}:[{}],\"o\":{}}}{after}",
                plugins.join(","), Value::from(other.as_str()),
            );
            let text_with = chained(&text);
            let mut value: Value = serde_json::from_str(&text_with).unwrap();
            prop_assert_eq!(value["plugins"].as_array_mut().unwrap().pop(), Some(entry(&Settings::default())));
            prop_assert_eq!(value, serde_json::from_str::<Value>(&text).unwrap());
            prop_assert_eq!(List::parse(&text_with).unwrap().without_plugin().unwrap(), text);
        }
    }
}

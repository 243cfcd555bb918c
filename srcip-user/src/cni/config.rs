//! What the plugin is told: its entry in the network's configuration, and what the runtime adds to it.

use std::{collections::BTreeMap, path::PathBuf, time::Duration};

use serde::{Deserialize, Serialize, de::IgnoredAny};
use serde_json::value::RawValue;

use super::spec::{CniError, Code, VERSION_IF_NONE};
use crate::{
    agent::{
        pod::is_kept,
        protocol::{DEFAULT_SOCKET, MAX_TIMEOUT},
    },
    dataplane::pins::DEFAULT_PIN_PATH,
};

/// The plugin's name: the `type` of its entry, and its file in the directory of plugins.
pub const PLUGIN: &str = "srcip-cni";

/// The runtime's capability that brings a pod's annotations.
pub const POD_ANNOTATIONS: &str = "io.kubernetes.cri.pod-annotations";

/// The longest configuration, in bytes: a pod may have 256 KiB of annotations, escaped on their way.
pub const MAX_CONFIGURATION: u64 = 4 << 20;

/// What to do if no agent answers.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnAgentAbsent {
    /// Pods that are to be steered do not start; others do.
    #[default]
    FailSteered,
    /// All pods start, and are not steered until there is an agent.
    Pass,
    /// No pod starts.
    Fail,
}

/// What to do if no agent answers, and nobody else tells whether a pod is to be steered.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnUnknown {
    /// It does not start, but for those in `kube-system`.
    #[default]
    Fail,
    /// It starts.
    Pass,
}

/// The plugin's own settings, as they stand in its entry.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Settings {
    /// The agent's socket.
    pub socket: PathBuf,
    /// How long a pod may wait to be steered, in seconds.
    pub timeout_seconds: u64,
    /// What to do if no agent answers.
    pub on_agent_absent: OnAgentAbsent,
    /// The same for a pod of which nobody tells whether it is to be steered.
    pub on_unknown: OnUnknown,
    /// Whether the agent's configuration has selectors: then a pod without annotations may be one that is
    /// to be steered.
    pub selectors: bool,
    /// Where the agent's instance is pinned.
    pub pin_path: PathBuf,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            socket: DEFAULT_SOCKET.into(),
            timeout_seconds: 15,
            on_agent_absent: OnAgentAbsent::default(),
            on_unknown: OnUnknown::default(),
            selectors: false,
            pin_path: DEFAULT_PIN_PATH.into(),
        }
    }
}

impl Settings {
    /// Reads and checks them.
    pub fn parse(configuration: &[u8]) -> Result<Self, CniError> {
        let parsed: Self =
            serde_json::from_slice(configuration).map_err(|error| wrong(&error.to_string()))?;
        let longest = MAX_TIMEOUT.as_secs();
        if !(1..=longest).contains(&parsed.timeout_seconds) {
            return Err(wrong(&format!("timeoutSeconds is not from 1 to {longest}")));
        }
        Ok(parsed)
    }

    /// How long a pod may wait to be steered.
    pub fn timeout(&self) -> Duration {
        Duration::from_secs(self.timeout_seconds)
    }
}

/// What every command's configuration has.
#[derive(Debug, Deserialize)]
pub struct Header {
    #[serde(rename = "cniVersion")]
    cni_version: Option<String>,
}

impl Header {
    /// Reads it; whatever else is wrong, the answer is then in the right version.
    pub fn parse(configuration: &[u8]) -> Result<Self, CniError> {
        serde_json::from_slice(configuration).map_err(|error| {
            CniError::new(Code::Decode, "the network's configuration on stdin is not JSON", error.to_string())
        })
    }

    /// The version it is in.
    pub fn version(&self) -> &str {
        self.cni_version.as_deref().filter(|version| !version.is_empty()).unwrap_or(VERSION_IF_NONE)
    }
}

/// What the runtime adds to the entry.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Additions {
    prev_result: Option<Box<RawValue>>,
    #[serde(default)]
    runtime_config: RuntimeConfiguration,
}

#[derive(Debug, Default, Deserialize)]
struct RuntimeConfiguration {
    #[serde(rename = "io.kubernetes.cri.pod-annotations")]
    annotations: Option<BTreeMap<String, String>>,
}

fn wrong(why: &str) -> CniError {
    CniError::new(
        Code::InvalidConfiguration,
        format!("the entry {PLUGIN} of the network's configuration is wrong"),
        why,
    )
}

fn additions(configuration: &[u8]) -> Result<Additions, CniError> {
    serde_json::from_slice(configuration).map_err(|error| {
        CniError::new(
            Code::InvalidConfiguration,
            "what the runtime adds to the configuration is wrong",
            error.to_string(),
        )
    })
}

/// Those of the pod's annotations that can matter, `None` if the runtime does not tell any.
pub fn annotations(configuration: &[u8]) -> Result<Option<BTreeMap<String, String>>, CniError> {
    let annotations = additions(configuration)?.runtime_config.annotations;
    Ok(annotations.map(|all| all.into_iter().filter(|(key, _)| is_kept(key)).collect()))
}

/// The result of the plugins before this one, letter by letter.
pub fn previous_result(configuration: &[u8], version: &str) -> Result<String, CniError> {
    let not_chained = || {
        CniError::new(
            Code::InvalidConfiguration,
            "there is no prevResult",
            format!("{PLUGIN} goes behind the plugin that makes the interface, in a .conflist"),
        )
    };
    let result = additions(configuration)?.prev_result.ok_or_else(not_chained)?;
    let fields: BTreeMap<String, IgnoredAny> =
        serde_json::from_str(result.get()).map_err(|_| wrong("prevResult is not an object"))?;
    if fields.contains_key("cniVersion") {
        return Ok(result.get().to_owned());
    }
    // A result is to have one; the runtime may leave it to the configuration around it.
    let rest = result.get().trim_start().trim_start_matches('{');
    let comma = if fields.is_empty() { "" } else { "," };
    Ok(format!("{{\"cniVersion\":\"{version}\"{comma}{rest}"))
}

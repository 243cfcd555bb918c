//! The agent's configuration: a YAML file, usually a ConfigMap's. What it does not say has a default.

use std::{
    fs::File,
    io::Read as _,
    num::NonZeroU32,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, Result, anyhow, bail};
use serde::{Deserialize, Deserializer, Serialize, de::Error as _};

use super::protocol::MAX_TIMEOUT;
use crate::{
    cni::config::{OnAgentAbsent, OnUnknown},
    dataplane::record::{CgroupChoice, EngineKind, OnProxyDown, UpstreamPortAt},
    northsouth::select::Selection,
    ports::{DEFAULT_UPSTREAM_PORTS, UpstreamPortList},
    routing::ReturnRoute,
};

mod selector;

pub use selector::{Operator, Requirement, Selector};

/// What a ConfigMap can hold.
const MAX_FILE: u64 = 1 << 20;
/// Selectors are tried one after the other, for every pod.
const MAX_SELECTORS: usize = 100;
/// The longest that anything may be made to wait, in seconds.
const MAX_SECONDS: u32 = 86_400;
/// The tables `default`, `main` and `local`.
const SYSTEM_TABLES: std::ops::RangeInclusive<u32> = 253..=255;

/// What the agent is to do.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Config {
    /// Which pods to steer beyond those whose annotations ask for it, and how.
    pub steer: Steer,
    /// Which Services to handle beyond those whose annotations ask for it.
    pub north_south: NorthSouthConfig,
    /// How long the upstream connections of a pod that is no longer steered may take to end, in seconds.
    #[serde(deserialize_with = "seconds")]
    pub drain_seconds: u32,
    /// How often everything is looked at again, whether or not something is known to have changed, in
    /// seconds.
    #[serde(deserialize_with = "positive_seconds")]
    pub resync_seconds: u32,
    /// The cgroup for the node-wide hooks: `root`, `none`, or the path of a cgroup v2 directory.
    #[serde(with = "cgroup")]
    pub cgroup: CgroupChoice,
    /// What the CNI plugin does, if the agent installs it.
    pub cni: CniConfig,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            steer: Steer::default(),
            north_south: NorthSouthConfig::default(),
            drain_seconds: 30,
            resync_seconds: 30,
            cgroup: CgroupChoice::Root,
            cni: CniConfig::default(),
        }
    }
}

/// What the CNI plugin does; it finds this in the runtime's configuration, where the agent writes it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct CniConfig {
    /// How long a pod may wait to be steered, in seconds: as long as the plugin may at most.
    #[serde(deserialize_with = "timeout_seconds")]
    pub timeout_seconds: u32,
    /// What happens to pods while no agent answers.
    pub on_agent_absent: OnAgentAbsent,
    /// What happens then to those of which the runtime does not tell whether they ask to be steered.
    pub on_unknown: OnUnknown,
}

impl Default for CniConfig {
    fn default() -> Self {
        Self {
            timeout_seconds: 15,
            on_agent_absent: OnAgentAbsent::default(),
            on_unknown: OnUnknown::default(),
        }
    }
}

/// What is handled of traffic from outside the cluster.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct NorthSouthConfig {
    /// Services that are handled without asking for it.
    pub services: Selection,
}

/// How to steer: what annotations and selectors do not say.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Steer {
    /// Pods that are steered without asking for it; of several that match, the first counts.
    #[serde(deserialize_with = "selectors")]
    pub selectors: Vec<Selector>,
    /// Routing mark of the proxies' connections to their applications.
    pub mark: NonZeroU32,
    /// Routing table that brings the applications' answers back to the proxies.
    #[serde(deserialize_with = "table")]
    pub route_table: u32,
    /// Source ports for the proxies' connections to their applications.
    pub upstream_ports: UpstreamPortList,
    /// When those are chosen.
    pub upstream_port_at: UpstreamPortAt,
    /// What happens to connections while a proxy does not listen.
    pub on_proxy_down: OnProxyDown,
    /// How to hand connections to a proxy.
    pub engine: EngineChoice,
}

impl Default for Steer {
    fn default() -> Self {
        Self {
            selectors: Vec::new(),
            mark: const { NonZeroU32::new(1337).expect("not 0") },
            route_table: 133,
            upstream_ports: DEFAULT_UPSTREAM_PORTS.parse().expect("the default is valid"),
            upstream_port_at: UpstreamPortAt::Connect,
            on_proxy_down: OnProxyDown::Drop,
            engine: EngineChoice::Auto,
        }
    }
}

/// An engine, or whichever runs here.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum EngineChoice {
    /// `sk-lookup` if this node can, else `tc`.
    Auto,
    /// A program that runs once per connection.
    SkLookup,
    /// A program on the pod's devices.
    Tc,
}

impl EngineChoice {
    /// The engine, `None` to pick one.
    pub fn kind(self) -> Option<EngineKind> {
        match self {
            Self::Auto => None,
            Self::SkLookup => Some(EngineKind::SkLookup),
            Self::Tc => Some(EngineKind::Tc),
        }
    }
}

impl Config {
    /// Reads a file; an empty one leaves everything at its default.
    pub fn read(path: &Path) -> Result<Self> {
        let read = || -> std::io::Result<String> {
            let mut text = String::new();
            File::open(path)?.take(MAX_FILE + 1).read_to_string(&mut text)?;
            Ok(text)
        };
        let text = read().with_context(|| format!("cannot read the configuration {}", path.display()))?;
        if text.len() as u64 > MAX_FILE {
            bail!("the configuration {} is larger than 1 MiB", path.display());
        }
        Self::parse(&text).with_context(|| format!("the configuration {} is not valid", path.display()))
    }

    fn parse(text: &str) -> Result<Self> {
        serde_saphyr::from_str::<Option<Self>>(text)
            .map(Option::unwrap_or_default)
            .map_err(|error| anyhow!("{error}"))
    }

    /// How long upstream connections may take to end.
    pub fn drain(&self) -> Duration {
        Duration::from_secs(self.drain_seconds.into())
    }

    /// How often everything is looked at again.
    pub fn resync(&self) -> Duration {
        Duration::from_secs(self.resync_seconds.into())
    }
}

impl Steer {
    /// The return route.
    pub fn route(&self) -> ReturnRoute {
        ReturnRoute { mark: self.mark.get(), table: self.route_table }
    }
}

fn seconds<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u32, D::Error> {
    match u32::deserialize(deserializer)? {
        seconds @ 0..=MAX_SECONDS => Ok(seconds),
        seconds => Err(D::Error::custom(format!("{seconds} s is more than a day ({MAX_SECONDS} s)"))),
    }
}

fn positive_seconds<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u32, D::Error> {
    match seconds(deserializer)? {
        0 => Err(D::Error::custom("it takes at least 1 s")),
        seconds => Ok(seconds),
    }
}

fn timeout_seconds<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u32, D::Error> {
    let longest = MAX_TIMEOUT.as_secs();
    match positive_seconds(deserializer)? {
        seconds if u64::from(seconds) <= longest => Ok(seconds),
        seconds => Err(D::Error::custom(format!("{seconds} s is more than {longest} s"))),
    }
}

fn table<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u32, D::Error> {
    let table = u32::deserialize(deserializer)?;
    if table == 0 || SYSTEM_TABLES.contains(&table) {
        return Err(D::Error::custom(format!(
            "table {table} is one of the system's own (default, main, local); take another such as 133"
        )));
    }
    Ok(table)
}

fn selectors<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<Selector>, D::Error> {
    let selectors = Vec::<Selector>::deserialize(deserializer)?;
    if selectors.len() > MAX_SELECTORS {
        return Err(D::Error::custom(format!(
            "there are {} selectors; {MAX_SELECTORS} are the most",
            selectors.len()
        )));
    }
    for (index, selector) in selectors.iter().enumerate() {
        let failed = |problem| D::Error::custom(format!("selector {}: {problem}", index + 1));
        selector.check().map_err(failed)?;
    }
    Ok(selectors)
}

/// A cgroup as text.
mod cgroup {
    use serde::Serializer;

    use super::*;

    pub(super) fn serialize<S: Serializer>(choice: &CgroupChoice, to: S) -> Result<S::Ok, S::Error> {
        match choice {
            CgroupChoice::Root => to.serialize_str("root"),
            CgroupChoice::None => to.serialize_str("none"),
            CgroupChoice::Path(path) => path.serialize(to),
        }
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<CgroupChoice, D::Error> {
        match String::deserialize(from)?.as_str() {
            "root" => Ok(CgroupChoice::Root),
            "none" => Ok(CgroupChoice::None),
            path if path.starts_with('/') => Ok(CgroupChoice::Path(PathBuf::from(path))),
            other => Err(D::Error::custom(format!(
                "{other:?} is no cgroup; expected root, none, or a path such as /sys/fs/cgroup/kubepods"
            ))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A complete file.
    const FULL: &str = r#"
steer:
  selectors:
    - namespace: shop
      matchLabels: {app: web}
      matchExpressions:
        - {key: tier, operator: In, values: [front, edge]}
        - {key: canary, operator: DoesNotExist}
      proxyPort: 15006
      includeInboundPorts: "*"
      excludeInboundPorts: 9100
      onProxyDown: pass
      engine: tc
  mark: 0x539
  routeTable: 133
  upstreamPorts: 61000-65535
  upstreamPortAt: bind
  onProxyDown: drop
  engine: sk-lookup
northSouth:
  services:
    - {namespace: edge, matchLabels: {app: gateway}}
drainSeconds: 5
resyncSeconds: 60
cgroup: /sys/fs/cgroup/kubepods
"#;

    fn error(text: &str) -> String {
        format!("{:#}", Config::parse(text).unwrap_err())
    }

    #[test]
    fn all_fields_are_understood_and_shown() {
        let config = Config::parse(FULL).unwrap();
        assert_eq!(config.steer.route(), ReturnRoute { mark: 1337, table: 133 });
        assert_eq!((config.drain().as_secs(), config.resync().as_secs()), (5, 60));
        assert_eq!(config.cgroup, CgroupChoice::Path("/sys/fs/cgroup/kubepods".into()));
        let selector = &config.steer.selectors[0];
        assert_eq!(selector.exclude_inbound_ports.as_ref().unwrap().to_string(), "9100");
        assert_eq!(selector.engine.and_then(EngineChoice::kind), Some(EngineKind::Tc));
        // What is shown is a configuration again.
        assert_eq!(Config::parse(&serde_json::to_string(&config).unwrap()).unwrap(), config);
    }

    #[test]
    fn everything_has_a_default() {
        for text in ["", "# nothing\n", "{}", "steer: {}"] {
            assert_eq!(Config::parse(text).unwrap(), Config::default(), "{text:?}");
        }
        let shown = serde_json::to_string(&Config::default()).unwrap();
        assert_eq!(Config::parse(&shown).unwrap(), Config::default());
    }

    #[test]
    fn the_documentation_shows_the_defaults() {
        let text = include_str!("../../../docs/CONFIGURATION.md");
        let blocks: Vec<&str> =
            text.split("```yaml\n").skip(1).filter_map(|rest| rest.split("```").next()).collect();
        assert_eq!(Config::parse(blocks[0]).unwrap(), Config::default());
        assert_eq!(Config::parse(blocks[1]).unwrap().steer.selectors.len(), 1);
        for field in serde_json::to_value(Config::default()).unwrap().as_object().unwrap().keys() {
            assert!(blocks[0].contains(field), "no {field}");
        }
    }

    #[test]
    fn mistakes_are_named_with_line_field_and_cure() {
        for (text, expected) in [
            ("drainSecond: 3", &["line 1", "drainSecond", "drainSeconds"][..]),
            ("drainSeconds: 90000", &["line 1", "90000", "more than a day"]),
            ("drainSeconds: soon", &["line 1"]),
            ("resyncSeconds: 0", &["line 1", "at least 1 s"]),
            ("steer:\n  routeTable: 254", &["line 2", "254", "such as 133"]),
            ("steer:\n  mark: 0", &["line 2", "nonzero"]),
            ("steer:\n  engine: xdp", &["line 2", "xdp", "sk-lookup"]),
            ("steer:\n  upstreamPorts: 7-3", &["line 2", "7-3", "3-7"]),
            ("cgroup: kubepods", &["line 1", "kubepods", "/sys/fs/cgroup"]),
            ("steer:\n  selectors:\n  - proxyPort: 1", &["line", "selector 1", "matchLabels"]),
            ("steer:\n  selectors:\n  - namespace: a", &["line", "proxyPort"]),
            ("steer:\n  selectors:\n  - {namespace: a, proxyPort: 0}", &["line 3", "nonzero"]),
            (
                "steer:\n  selectors:\n  - {namespace: a, proxyPort: 1, includeInboundPorts: 80, \
                 excludeInboundPorts: 81}",
                &["line", "excludeInboundPorts", "\"*\""],
            ),
            (
                "steer:\n  selectors:\n  - {proxyPort: 1, matchExpressions: [{key: a, operator: In}]}",
                &["line", "selector 1", "In needs values"],
            ),
            (
                "steer:\n  selectors:\n  - {proxyPort: 1, matchExpressions: [{key: a, operator: Near}]}",
                &["line 3", "Near", "DoesNotExist"],
            ),
            ("a: b\n---\nc: d", &[]),
        ] {
            let error = error(text);
            for part in expected {
                assert!(error.contains(part), "no {part:?} in the error for {text:?}: {error}");
            }
        }
    }

    #[test]
    fn files_are_named_and_bounded() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("agent.yaml");
        let error = format!("{:#}", Config::read(&path).unwrap_err());
        assert!(error.contains("agent.yaml") && error.contains("No such file"), "{error}");
        std::fs::write(&path, "x: 1").unwrap();
        let error = format!("{:#}", Config::read(&path).unwrap_err());
        assert!(error.contains("agent.yaml is not valid"), "{error}");
        std::fs::write(&path, "#".repeat(MAX_FILE as usize + 1)).unwrap();
        assert!(Config::read(&path).unwrap_err().to_string().contains("larger than 1 MiB"));
    }
}

//! Whether a pod is to be steered, and how: by its annotations, and the selectors of the configuration.
//!
//! Annotations are written by whoever may make pods, and mistrusted: a bad value steers nothing.

use std::collections::BTreeMap;

use serde::{
    Deserialize,
    de::{IntoDeserializer as _, value},
};

use super::{
    config::{Config, EngineChoice, Selector},
    pod::PodInfo,
};
use crate::{
    dataplane::record::{EngineKind, Settings, never_steered},
    ports::{PortList, parse_port},
    text::beginning,
};

/// Istio's choice of how connections get to the sidecar.
pub const INTERCEPTION_MODE: &str = "sidecar.istio.io/interceptionMode";
/// Ports whose connections go to the proxy, as Istio has it.
pub const INCLUDE_INBOUND_PORTS: &str = "traffic.sidecar.istio.io/includeInboundPorts";
/// Ports whose connections do not, as Istio has it: it counts only if all others do.
pub const EXCLUDE_INBOUND_PORTS: &str = "traffic.sidecar.istio.io/excludeInboundPorts";
/// Whether to steer.
pub const STEER: &str = "srcip.io/steer";
/// The port of the proxy's listener.
pub const PROXY_PORT: &str = "srcip.io/proxy-port";
/// What happens while the proxy does not listen.
pub const ON_PROXY_DOWN: &str = "srcip.io/on-proxy-down";
/// How to steer.
pub const ENGINE: &str = "srcip.io/engine";

/// The annotations that are srcip's own.
const OWN_PREFIX: &str = "srcip.io/";
const OWN: [&str; 4] = [STEER, PROXY_PORT, ON_PROXY_DOWN, ENGINE];

/// Where Istio's sidecar takes inbound connections.
const ISTIO_PROXY_PORT: u16 = 15006;

/// The longest list of ports; the record of an attachment, 4 KiB, has two.
const MAX_LIST: usize = 1024;
/// How much of somebody's text is shown, in characters.
const SHOWN: usize = 64;
/// How many unknown annotations are named.
const MAX_NAMED: usize = 3;

/// What to do with a pod.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Decision {
    /// Steer it.
    Steer(Wanted),
    /// Leave it alone, because of this.
    Leave(&'static str),
    /// It asks for what cannot be done: leave it alone, and tell whoever looks after it.
    Refuse(Problem),
}

/// How a pod is to be steered.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Wanted {
    /// The settings.
    pub settings: Settings,
    /// The engine, or `None` to pick one.
    pub engine: Option<EngineKind>,
}

/// What is wrong with a pod, as an Event tells it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Problem {
    /// In one CamelCase word; there are few.
    pub reason: &'static str,
    /// In a sentence: which annotation, its value, what is accepted. Printable, and no longer than an
    /// Event's note may be.
    pub note: String,
}

/// What a pod's annotations say by themselves of whether to steer it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Ask {
    /// It is to be steered.
    Yes,
    /// It is not, because of this.
    No(&'static str),
    /// They contradict themselves or are not understood: it is not steered.
    Invalid(Problem),
    /// Nothing: only the selectors of the configuration can tell.
    Unknown,
}

/// What annotations say of whether to steer their pod. `srcip.io/steer` counts before Istio's.
pub fn asks_for_steering(annotations: &BTreeMap<String, String>) -> Ask {
    let steer = annotations.get(STEER).map(String::as_str);
    let mode = annotations.get(INTERCEPTION_MODE).map(String::as_str);
    match (steer, mode) {
        (Some("false"), _) => Ask::No("srcip.io/steer is \"false\""),
        (Some("true"), Some("REDIRECT")) => Ask::Invalid(Problem {
            reason: "ConflictingAnnotations",
            note: format!(
                "{STEER} is \"true\", but with {INTERCEPTION_MODE} \"REDIRECT\" iptables takes the pod's \
                 connections first; make that \"TPROXY\", or leave {STEER} out"
            ),
        }),
        (None | Some("true"), Some("TPROXY")) | (Some("true"), None | Some("NONE")) => Ask::Yes,
        (None, Some("REDIRECT")) => Ask::No("sidecar.istio.io/interceptionMode is REDIRECT"),
        (None, Some("NONE")) => Ask::No("sidecar.istio.io/interceptionMode is NONE"),
        (None, None) => Ask::Unknown,
        (None | Some("true"), Some(mode)) => {
            Ask::Invalid(invalid(INTERCEPTION_MODE, mode, "TPROXY, REDIRECT or NONE"))
        }
        (Some(steer), _) => Ask::Invalid(invalid(STEER, steer, "\"true\" or \"false\"")),
    }
}

/// What to do with a pod.
pub fn decide(pod: &PodInfo, config: &Config) -> Decision {
    judge(pod, config).unwrap_or_else(Decision::Refuse)
}

fn judge(pod: &PodInfo, config: &Config) -> Result<Decision, Problem> {
    if pod.completed {
        return Ok(Decision::Leave("all of its containers have ended"));
    }
    let selector = config.steer.selectors.iter().find(|selector| selector.matches(pod));
    match asks_for_steering(&pod.annotations) {
        Ask::No(why) => return Ok(Decision::Leave(why)),
        Ask::Invalid(problem) => return Err(problem),
        Ask::Unknown if selector.is_none() => {
            return Ok(Decision::Leave("it does not ask to be steered, and no selector means it"));
        }
        Ask::Yes | Ask::Unknown => {}
    }
    if pod.host_network {
        return Err(Problem {
            reason: "HostNetwork",
            note: "a pod with hostNetwork cannot be steered: its connections are the node's; set \
                   hostNetwork to false, or srcip.io/steer to \"false\""
                .to_owned(),
        });
    }
    let wanted = wanted(&pod.annotations, selector, config)?;
    let Settings { include, proxy_port, .. } = &wanted.settings;
    let own = never_steered(*proxy_port);
    // Attached, it would have programs and a route for connections that cannot come.
    if include.ranges().iter().cloned().flatten().all(|port| own.contains(&port)) {
        return Ok(Decision::Leave("includeInboundPorts has no port that could be steered"));
    }
    Ok(Decision::Steer(wanted))
}

/// Each setting is the annotation's, else the selector's, else the configuration's.
fn wanted(
    annotations: &BTreeMap<String, String>,
    selector: Option<&Selector>,
    config: &Config,
) -> Result<Wanted, Problem> {
    let steer = &config.steer;
    let is_istio = annotations.get(INTERCEPTION_MODE).is_some_and(|mode| mode == "TPROXY");
    let proxy_port = match annotations.get(PROXY_PORT) {
        Some(port) => parse_port(port).map_err(|_| invalid(PROXY_PORT, port, "a number from 1 to 65535"))?,
        None if is_istio => ISTIO_PROXY_PORT,
        None => selector.map(|selector| selector.proxy_port.get()).ok_or_else(|| Problem {
            reason: "MissingAnnotation",
            note: format!(
                "{STEER} is \"true\", but {PROXY_PORT} is missing: the port of the proxy's listener"
            ),
        })?,
    };
    let include = port_list(annotations, INCLUDE_INBOUND_PORTS)?
        .or_else(|| selector?.include_inbound_ports.clone())
        .unwrap_or_else(PortList::all);
    let exclude = port_list(annotations, EXCLUDE_INBOUND_PORTS)?;
    if let Some(value) = annotations.get(EXCLUDE_INBOUND_PORTS)
        && exclude.as_ref().is_some_and(PortList::is_all)
    {
        let expected = format!("a list such as 8080,9090 (to steer nothing, set {STEER} to \"false\")");
        return Err(invalid(EXCLUDE_INBOUND_PORTS, value, &expected));
    }
    let exclude = exclude
        .or_else(|| selector?.exclude_inbound_ports.clone())
        .filter(|_| include.is_all())
        .unwrap_or_else(PortList::none);
    let on_proxy_down = word(annotations, ON_PROXY_DOWN, "drop or pass")?
        .or_else(|| selector?.on_proxy_down)
        .unwrap_or(steer.on_proxy_down);
    let engine: EngineChoice = word(annotations, ENGINE, "auto, sk-lookup or tc")?
        .or_else(|| selector?.engine)
        .unwrap_or(steer.engine);
    let settings = Settings {
        proxy_port,
        include,
        exclude,
        on_proxy_down,
        route: steer.route(),
        upstream_ports: steer.upstream_ports.clone(),
        upstream_port_at: steer.upstream_port_at,
    };
    Ok(Wanted { settings, engine: engine.kind() })
}

/// As Istio reads it, spaces around ports included; an empty list has no port. Ranges are srcip's addition.
fn port_list(annotations: &BTreeMap<String, String>, name: &str) -> Result<Option<PortList>, Problem> {
    let Some(value) = annotations.get(name) else { return Ok(None) };
    if value.trim().is_empty() {
        return Ok(Some(PortList::none()));
    }
    if value.len() > MAX_LIST {
        let expected = format!("at most {MAX_LIST} bytes; write ranges such as 9000-9010");
        return Err(invalid(name, value, &expected));
    }
    value.parse().map(Some).map_err(|_| {
        let star = if name == INCLUDE_INBOUND_PORTS { ", or * for all" } else { "" };
        invalid(name, value, &format!("ports and ranges such as 8080,9000-9010{star}"))
    })
}

/// One of a few words.
fn word<'a, T: Deserialize<'a>>(
    annotations: &'a BTreeMap<String, String>,
    name: &str,
    expected: &str,
) -> Result<Option<T>, Problem> {
    let Some(value) = annotations.get(name) else { return Ok(None) };
    let parsed: Result<T, value::Error> = T::deserialize(value.as_str().into_deserializer());
    parsed.map(Some).map_err(|_| invalid(name, value, expected))
}

fn invalid(name: &str, value: &str, expected: &str) -> Problem {
    Problem {
        reason: "InvalidAnnotation",
        note: format!("{name} is \"{}\"; expected {expected}", beginning(value, SHOWN)),
    }
}

/// What does not keep a pod from being treated as decided, but is not as whoever wrote it can have meant.
pub fn warnings(pod: &PodInfo, decision: &Decision) -> Vec<Problem> {
    let annotations = &pod.annotations;
    let mut warnings = Vec::new();
    let unknown: Vec<_> = annotations
        .keys()
        .filter(|name| name.starts_with(OWN_PREFIX) && !OWN.contains(&name.as_str()))
        .take(MAX_NAMED)
        .map(|name| beginning(name, SHOWN))
        .collect();
    if !unknown.is_empty() {
        warnings.push(Problem {
            reason: "UnknownAnnotation",
            note: format!("no effect has {}; known are {}", unknown.join(", "), OWN.join(", ")),
        });
    }
    match decision {
        Decision::Leave(_) if asks_for_steering(annotations) == Ask::Unknown && !pod.completed => {
            if let Some(name) = OWN.iter().find(|name| annotations.contains_key(**name)) {
                warnings.push(Problem {
                    reason: "NoEffect",
                    note: format!("{name} has no effect without {STEER}: \"true\""),
                });
            }
        }
        Decision::Steer(wanted)
            if !wanted.settings.include.is_all() && annotations.contains_key(EXCLUDE_INBOUND_PORTS) =>
        {
            warnings.push(Problem {
                reason: "NoEffect",
                note: format!(
                    "{EXCLUDE_INBOUND_PORTS} has no effect if includeInboundPorts is a list; leave the ports \
                     out of that"
                ),
            });
        }
        _ => {}
    }
    warnings
}

#[cfg(test)]
mod tests;

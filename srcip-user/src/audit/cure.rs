//! From a cause to what to do about it: a sentence, and commands or patches to paste.

use std::{collections::BTreeSet, path::Path};

use k8s_openapi::api::core::v1::Pod;
use serde::Serialize;

use super::{
    cause::{Cause, Keeper, ServiceName},
    netfilter::Interception,
};
use crate::{northsouth::select::NORTH_SOUTH, text::shell_quoted};

/// What to do.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Cure {
    /// Where the address is lost, in a sentence.
    pub explanation: String,
    /// What brings it back, step by step. Empty if nothing needs doing.
    pub steps: Vec<Step>,
}

/// One step of a cure.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Step {
    /// What it does.
    pub what: String,
    /// Commands to paste, if it can be done by command.
    pub commands: Vec<String>,
}

fn step(what: impl Into<String>, commands: Vec<String>) -> Step {
    Step { what: what.into(), commands }
}

/// Where the cure is to be applied.
#[derive(Clone, Copy, Debug)]
pub struct Patient<'a> {
    /// The pod's network namespace.
    pub netns: &'a Path,
    /// The pod, as Kubernetes knows it.
    pub pod: Option<&'a Pod>,
    /// The rules in its network namespace.
    pub interception: &'a Interception,
    /// The ports of the application that were seen.
    pub ports: &'a BTreeSet<u16>,
}

impl Cause {
    /// What to do about it.
    pub fn cure(&self, patient: Patient<'_>) -> Cure {
        let (explanation, steps) = match self {
            Self::Preserved { by } => (preserved(*by).to_owned(), Vec::new()),
            Self::SidecarRedirect { proxy_port } => (
                format!(
                    "the sidecar takes connections by REDIRECT to port {proxy_port} and dials the \
                     application from loopback"
                ),
                redirect(*proxy_port, patient),
            ),
            Self::SidecarLoopback => (
                "a proxy in the pod takes the connections on a port of its own and dials the application \
                 from loopback"
                    .to_owned(),
                vec![
                    original_source(),
                    step(
                        "Let srcip steer, so that clients reach the proxy at the application's port",
                        vec![attach(patient, None)],
                    ),
                ],
            ),
            Self::ProxyNotTransparent => (
                "connections reach the proxy with the client's address, but it dials the application from \
                 another one"
                    .to_owned(),
                vec![original_source()],
            ),
            Self::ProxyOwnAddress => (
                "a proxy in the pod dials the application from the pod's own address".to_owned(),
                vec![
                    original_source(),
                    step(
                        "Let srcip steer, which also brings the application's answers back to the proxy",
                        vec![attach(patient, patient.interception.proxy_port)],
                    ),
                ],
            ),
            Self::Snat { node, services, north_south } => (
                format!(
                    "node {node} puts its own address in place of the client's: kube-proxy does that under \
                     externalTrafficPolicy: Cluster"
                ),
                snat(node, services, north_south, patient.pod.is_some()),
            ),
            Self::NodeItself { node } => (
                format!(
                    "node {node} itself is the client: a kubelet's probe, or a process on the host's network"
                ),
                Vec::new(),
            ),
            Self::LoadBalancer { proxy_protocol } => (
                "a load balancer ends the client's connection and opens one of its own".to_owned(),
                load_balancer(proxy_protocol.as_ref()),
            ),
            Self::Gateway { pod } => (
                format!("the gateway {pod} ends the client's connection and opens one of its own"),
                vec![step(
                    "Take the client from X-Forwarded-For, which the gateway sets, and trust that header from \
                     the gateway's address alone",
                    Vec::new(),
                )],
            ),
        };
        Cure { explanation, steps }
    }
}

fn preserved(by: Keeper) -> &'static str {
    match by {
        Keeper::DirectRouting => "nothing on the way changes the client's address: nothing needs doing",
        Keeper::LocalPolicy => "externalTrafficPolicy: Local keeps the client's address: nothing needs doing",
        Keeper::NorthSouth => "srcip's north-south keeps the client's address: nothing needs doing",
        Keeper::Srcip => "srcip and the proxy keep the client's address: nothing needs doing",
        Keeper::Tproxy => "TPROXY and the proxy keep the client's address: nothing needs doing",
        Keeper::OriginalSource => "the proxy keeps the client's address: nothing needs doing",
    }
}

fn original_source() -> Step {
    step(
        "Let the proxy connect with the client's address: original_src in Envoy (deploy/examples/envoy.yaml), \
         `usesrc clientip` in HAProxy, `proxy_bind $remote_addr transparent` in nginx",
        Vec::new(),
    )
}

fn redirect(proxy_port: u16, patient: Patient<'_>) -> Vec<Step> {
    let Patient { netns, pod, interception, .. } = patient;
    // With a controller, the mesh does the rest: it configures the proxy and the rules of new pods.
    if let Some(target) = pod.filter(|pod| is_istio(pod)).and_then(controller) {
        let patch = r#"{"spec":{"template":{"metadata":{"annotations":{"sidecar.istio.io/interceptionMode":"TPROXY"}}}}}"#;
        return vec![step(
            "Let the mesh configure the sidecar with original source. Its pods are made anew",
            vec![format!("kubectl {target} --type merge -p '{patch}'")],
        )];
    }
    let netns = shell_quoted(&netns.to_string_lossy());
    let inside = |command: &String| format!("nsenter --net={netns} {command}");
    vec![
        original_source(),
        step("Take the REDIRECT away", interception.removal.iter().map(inside).collect()),
        step("Let srcip steer instead", vec![attach(patient, Some(proxy_port))]),
    ]
}

/// `srcip attach …` for this pod and its ports.
fn attach(patient: Patient<'_>, proxy_port: Option<u16>) -> String {
    let ports: Vec<_> = patient.ports.iter().map(u16::to_string).collect();
    let proxy_port = proxy_port.map_or_else(|| "PROXY_PORT".to_owned(), |port| port.to_string());
    let netns = patient.netns.display();
    format!(
        "srcip attach --netns {netns} --proxy-port {proxy_port} --include-inbound-ports {}",
        ports.join(",")
    )
}

/// Whether the sidecar is Istio's, which heeds the annotation.
fn is_istio(pod: &Pod) -> bool {
    let annotated =
        pod.metadata.annotations.iter().flatten().any(|(key, _)| key == "sidecar.istio.io/status");
    let spec = pod.spec.as_ref();
    let containers =
        spec.into_iter().flat_map(|s| s.containers.iter().chain(s.init_containers.iter().flatten()));
    annotated || containers.into_iter().any(|container| container.name == "istio-proxy")
}

/// `-n NAMESPACE patch KIND NAME` for what makes the pod.
fn controller(pod: &Pod) -> Option<String> {
    let owner =
        pod.metadata.owner_references.as_ref()?.iter().find(|owner| owner.controller == Some(true))?;
    let namespace = pod.metadata.namespace.as_deref().unwrap_or("default");
    let (kind, name) = match owner.kind.as_str() {
        // A Deployment's ReplicaSet is called after it, with a hash of the pod's template.
        "ReplicaSet" => {
            let labels = pod.metadata.labels.as_ref();
            let hash = labels.and_then(|labels| labels.get("pod-template-hash"))?;
            ("deployment", owner.name.strip_suffix(&format!("-{hash}"))?)
        }
        "StatefulSet" => ("statefulset", owner.name.as_str()),
        "DaemonSet" => ("daemonset", owner.name.as_str()),
        _ => return None,
    };
    Some(format!("-n {} patch {kind} {}", shell_quoted(namespace), shell_quoted(name)))
}

/// The two cures of what kube-proxy does under `Cluster`: the other policy, or srcip's north-south, which some of
/// the Services ask for already.
fn snat(node: &str, services: &[ServiceName], asking: &[ServiceName], pod_is_known: bool) -> Vec<Step> {
    if services.is_empty() {
        let unnamed = ServiceName { namespace: "NAMESPACE".to_owned(), name: "NAME".to_owned() };
        let hint = "Name the Service with --service or --manifests to have it filled in";
        return vec![local_policy(&[&unnamed], hint), north_south(&[&unnamed])];
    }
    let hint =
        if pod_is_known { "" } else { "The pod is not in the manifests, so it may be any of these Services" };
    let others: Vec<_> = services.iter().filter(|service| !asking.contains(service)).collect();
    let all: Vec<_> = services.iter().collect();
    let mut steps = Vec::new();
    if !asking.is_empty() {
        steps.push(unanswered(node, asking));
    }
    steps.push(local_policy(&all, hint));
    if !others.is_empty() {
        steps.push(north_south(&others));
    }
    steps
}

fn local_policy(services: &[&ServiceName], hint: &str) -> Step {
    let patch = |service: &&ServiceName| {
        let (namespace, name) = (shell_quoted(&service.namespace), shell_quoted(&service.name));
        let patch = r#"{"spec":{"externalTrafficPolicy":"Local"}}"#;
        format!("kubectl -n {namespace} patch service {name} --type merge -p '{patch}'")
    };
    let what = "Let only nodes with a ready pod of the Service answer, with the client's address. It costs even \
                shares, as each node gets as much as the next, however many pods it has; and the load balancer \
                has to follow the Service's health check port";
    let what = if hint.is_empty() { what.to_owned() } else { format!("{what}. {hint}") };
    step(what, services.iter().map(patch).collect())
}

fn north_south(services: &[&ServiceName]) -> Step {
    let annotate = |service: &&ServiceName| {
        let (namespace, name) = (shell_quoted(&service.namespace), shell_quoted(&service.name));
        format!("kubectl -n {namespace} annotate service {name} --overwrite {NORTH_SOUTH}=true")
    };
    step(
        "Or keep the policy and let srcip bring the packets to the pods, with `srcip agent --uplink DEV` on every \
         node, DEV being the device by which traffic enters. It costs 20 octets (IPv6: 40) in each packet that \
         goes on to another node, and needs Linux 5.14",
        services.iter().map(annotate).collect(),
    )
}

/// For Services that ask for north-south in vain.
fn unanswered(node: &str, asking: &[ServiceName]) -> Step {
    let names: Vec<_> = asking.iter().map(ToString::to_string).collect();
    let (names, ask) = (names.join(", "), if asking.len() == 1 { "asks" } else { "ask" });
    step(
        format!(
            "{names} {ask} for srcip's north-south ({NORTH_SOUTH}) already, but node {node} did not handle this \
             connection: look there whether `srcip agent` runs with --uplink and the device by which it came, and \
             what `srcip explain --to` says of the address and port that the client dials. What comes from pods \
             and nodes themselves is kube-proxy's still"
        ),
        Vec::new(),
    )
}

fn load_balancer(proxy_protocol: Option<&ServiceName>) -> Vec<Step> {
    let first = match proxy_protocol {
        Some(service) => format!(
            "The Service {service} turns PROXY protocol on: let the listener read it (Envoy's \
             envoy.filters.listener.proxy_protocol, HAProxy's `accept-proxy`, nginx' `proxy_protocol`)"
        ),
        None => "Turn PROXY protocol on, at the load balancer and the listener, if it offers that".to_owned(),
    };
    vec![
        step(first, Vec::new()),
        step(
            "Or take the client from X-Forwarded-For if it speaks HTTP, and trust that header from the load \
             balancer's addresses alone",
            Vec::new(),
        ),
    ]
}

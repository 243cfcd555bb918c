//! What is known of the cluster: its nodes, Services and pods, from manifests and flags.

use std::{net::IpAddr, path::Path};

use anyhow::{Context as _, Result, bail};
use ipnet::IpNet;
use k8s_openapi::api::core::v1::{Node, Pod, Service};

use crate::manifests::{self, Object};

/// How large a file may be, in bytes: whole clusters are dumped into one.
const MAX_FILE: u64 = 64 << 20;

/// A cluster, as far as it was told.
#[derive(Clone, Debug, Default)]
pub struct Cluster {
    /// Addresses of nodes, with the node's name if it is known.
    pub nodes: Vec<(IpNet, Option<String>)>,
    /// Addresses that load balancers connect from.
    pub load_balancers: Vec<IpNet>,
    /// Services.
    pub services: Vec<Service>,
    /// Pods.
    pub pods: Vec<Pod>,
}

impl Cluster {
    /// Reads all `.yaml`, `.yml` and `.json` files of a directory. Objects of other kinds are left alone.
    pub fn from_manifests(directory: &Path) -> Result<Self> {
        let mut cluster = Self::default();
        for path in manifests::files(directory)? {
            for object in manifests::read(&path, MAX_FILE)? {
                cluster.add(object).with_context(|| format!("in {}", path.display()))?;
            }
        }
        Ok(cluster)
    }

    fn add(&mut self, object: Object) -> Result<()> {
        match object.kind.as_str() {
            "Node" => {
                let node: Node = object.into_typed()?;
                let addresses = node.status.and_then(|status| status.addresses).unwrap_or_default();
                let ips = addresses.iter().filter_map(|address| address.address.parse::<IpAddr>().ok());
                self.nodes.extend(ips.map(|ip| (ip.into(), node.metadata.name.clone())));
            }
            "Service" => self.services.push(object.into_typed()?),
            "Pod" => self.pods.push(object.into_typed()?),
            _ => {}
        }
        Ok(())
    }

    /// Adds what `--service NAMESPACE/NAME[:POLICY]` says: a Service that selects every pod.
    pub fn add_service(&mut self, text: &str) -> Result<()> {
        let (name, policy) = text.rsplit_once(':').unwrap_or((text, "Cluster"));
        let Some((namespace, name)) = name.split_once('/') else {
            bail!("{text:?} is not a Service: expected NAMESPACE/NAME or NAMESPACE/NAME:Local");
        };
        if !matches!(policy, "Cluster" | "Local") {
            bail!("{policy:?} is not an externalTrafficPolicy: expected Cluster or Local");
        }
        let object = serde_json::json!({
            "metadata": { "namespace": namespace, "name": name },
            "spec": { "type": "NodePort", "externalTrafficPolicy": policy },
        });
        self.services.push(serde_json::from_value(object)?);
        Ok(())
    }

    /// The node with this address: its name, or the address itself.
    pub fn node(&self, ip: IpAddr) -> Option<String> {
        let (_, name) = self.nodes.iter().find(|(network, _)| network.contains(&ip))?;
        Some(name.clone().unwrap_or_else(|| ip.to_string()))
    }

    /// Whether a load balancer connects from here.
    pub fn is_load_balancer(&self, ip: IpAddr) -> bool {
        self.load_balancers.iter().any(|network| network.contains(&ip))
    }

    /// The pod with one of these addresses.
    pub fn pod(&self, mut has: impl FnMut(IpAddr) -> bool) -> Option<&Pod> {
        self.pods.iter().find(|pod| {
            let Some(status) = &pod.status else { return false };
            let ips = status.pod_ips.iter().flatten().map(|ip| ip.ip.as_str());
            let mut all = ips.chain(status.pod_ip.as_deref()).filter_map(|ip| ip.parse::<IpAddr>().ok());
            // A pod on the host's network has the node's address, and is not this one.
            pod.spec.as_ref().is_none_or(|spec| spec.host_network != Some(true)) && all.any(&mut has)
        })
    }

    /// The Services that let traffic from outside in, to a pod. Without a pod, those that may.
    pub fn external_services<'a>(&'a self, pod: Option<&'a Pod>) -> impl Iterator<Item = &'a Service> {
        self.services.iter().filter(move |service| {
            let Some(spec) = &service.spec else { return false };
            let external = matches!(spec.type_.as_deref(), Some("NodePort" | "LoadBalancer"))
                || spec.external_ips.as_ref().is_some_and(|ips| !ips.is_empty());
            external && selects(service, pod)
        })
    }

    /// The pods that a Service leads to.
    pub fn selected_by<'a>(&'a self, service: &'a Service) -> impl Iterator<Item = &'a Pod> {
        self.pods.iter().filter(move |pod| selects(service, Some(pod)))
    }

    /// Whether a pod takes traffic from outside: a gateway.
    pub fn is_gateway(&self, pod: &Pod) -> bool {
        self.external_services(Some(pod)).next().is_some()
    }
}

/// `Local` or `Cluster`, which is the default.
pub fn policy(service: &Service) -> &str {
    let spec = service.spec.as_ref();
    spec.and_then(|spec| spec.external_traffic_policy.as_deref()).unwrap_or("Cluster")
}

/// `NAMESPACE/NAME`.
pub fn full_name(metadata: &k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta) -> String {
    let namespace = metadata.namespace.as_deref().unwrap_or("default");
    format!("{namespace}/{}", metadata.name.as_deref().unwrap_or_default())
}

fn selects(service: &Service, pod: Option<&Pod>) -> bool {
    let Some(selector) = service.spec.as_ref().and_then(|spec| spec.selector.as_ref()) else {
        // One that was named on the command line.
        return service.metadata.uid.is_none() && service.spec.as_ref().is_none_or(|s| s.ports.is_none());
    };
    // Any may select a pod that is not known.
    let Some(pod) = pod else { return true };
    let labels = pod.metadata.labels.as_ref();
    let same_namespace = service.metadata.namespace.as_deref().unwrap_or("default")
        == pod.metadata.namespace.as_deref().unwrap_or("default");
    same_namespace
        && !selector.is_empty()
        && selector.iter().all(|(key, value)| labels.and_then(|labels| labels.get(key)) == Some(value))
}

//! An EndpointSlice: what stands behind the ports of a Service.

use std::{net::IpAddr, sync::Arc};

use k8s_openapi::api::discovery::v1::EndpointSlice;

use super::{ObjectName, Problem, service::protocol, shown, unicast};
use crate::northsouth::desired::Protocol;

/// The Service that a slice belongs to.
const SERVICE_NAME: &str = "kubernetes.io/service-name";

/// What the API server takes at most: `maxEndpoints` and `maxPorts` in Kubernetes'
/// pkg/apis/discovery/validation/validation.go.
const MAX_ENDPOINTS: usize = 1000;
const MAX_PORTS: usize = 20_000;
/// What is kept of those ports: a Service has no more.
const MAX_KEPT_PORTS: usize = super::service::MAX_PORTS;

/// The longest name that a node can have.
const MAX_NODE_NAME: usize = 253;

/// An EndpointSlice, as far as north-south needs it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SliceInfo {
    /// Its name.
    pub name: ObjectName,
    /// The Service's.
    pub service: ObjectName,
    /// The ports of its endpoints. A Service's `targetPort`, a name or a number, is resolved in here.
    pub ports: Vec<SlicePort>,
    /// The endpoints, all of one family.
    pub endpoints: Vec<SliceEndpoint>,
}

/// A port of all endpoints of a slice.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SlicePort {
    /// The name of the Service's port that leads here; empty if that has none.
    pub name: Arc<str>,
    /// The protocol.
    pub protocol: Protocol,
    /// The port.
    pub port: u16,
}

/// An endpoint of a slice.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SliceEndpoint {
    /// Its address.
    pub address: IpAddr,
    /// The node it is on, if the slice says.
    pub node: Option<Arc<str>>,
    /// Whether it takes new connections. Also true of one that is not ready if the Service has
    /// `publishNotReadyAddresses`: that is already in here.
    pub ready: bool,
    /// Whether it can serve, terminating or not.
    pub serving: bool,
    /// Whether it is about to end.
    pub terminating: bool,
}

impl SliceInfo {
    /// Takes what matters out of a slice; `Ok(None)` if it belongs to no Service, or is one of domain names.
    /// Ports and endpoints that cannot be used are left out.
    pub fn from_object(slice: &EndpointSlice) -> Result<Option<Self>, Problem> {
        let metadata = &slice.metadata;
        let Some(service) = metadata.labels.as_ref().and_then(|labels| labels.get(SERVICE_NAME)) else {
            return Ok(None);
        };
        if !matches!(slice.address_type.as_str(), "IPv4" | "IPv6") {
            return Ok(None);
        }
        let is_ipv4 = slice.address_type == "IPv4";
        let namespace = metadata.namespace.as_deref().unwrap_or("default");
        let name = metadata.name.as_deref().unwrap_or_default();
        let invalid = |note: String| Problem::new("InvalidEndpointSlice", note);
        let name = ObjectName::new(namespace, name)
            .ok_or_else(|| invalid(format!("{:?} is no name of an EndpointSlice", shown(name))))?;
        let service = ObjectName::new(namespace, service).ok_or_else(|| {
            invalid(format!("{name} belongs to {:?}, which is no name of a Service", shown(service)))
        })?;
        let ports = slice.ports.as_deref().unwrap_or_default();
        if slice.endpoints.len() > MAX_ENDPOINTS || ports.len() > MAX_PORTS {
            return Err(invalid(format!(
                "{name} has {} endpoints and {} ports; {MAX_ENDPOINTS} and {MAX_PORTS} are the most",
                slice.endpoints.len(),
                ports.len()
            )));
        }
        let ports = ports.iter().filter_map(|port| {
            Some(SlicePort {
                name: port.name.as_deref().unwrap_or_default().into(),
                protocol: protocol(port.protocol.as_deref())?,
                // Without one it would be any port, which no Service asks for.
                port: port.port.and_then(|port| u16::try_from(port).ok()).filter(|port| *port != 0)?,
            })
        });
        let endpoints = slice.endpoints.iter().filter_map(|endpoint| {
            let conditions = endpoint.conditions.as_ref();
            let ready = conditions.and_then(|conditions| conditions.ready);
            let serving = conditions.and_then(|conditions| conditions.serving);
            Some(SliceEndpoint {
                // Several of one endpoint are not meant to be told apart: the first stands for it.
                address: unicast(endpoint.addresses.first()?).filter(|ip| ip.is_ipv4() == is_ipv4)?,
                node: endpoint
                    .node_name
                    .as_deref()
                    .filter(|name| name.len() <= MAX_NODE_NAME)
                    .map(Into::into),
                // What is not known counts as true.
                ready: ready.unwrap_or(true),
                serving: serving.unwrap_or(true),
                terminating: conditions.and_then(|conditions| conditions.terminating).unwrap_or(false),
            })
        });
        Ok(Some(Self {
            name,
            service,
            ports: ports.take(MAX_KEPT_PORTS).collect(),
            endpoints: endpoints.collect(),
        }))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn slice(object: Value) -> Result<Option<SliceInfo>, Problem> {
        SliceInfo::from_object(&serde_json::from_value(object).unwrap())
    }

    fn of_web(rest: Value) -> Value {
        let labels = json!({"kubernetes.io/service-name": "web"});
        let mut object = json!({
            "metadata": {"namespace": "shop", "name": "web-1", "labels": labels},
            "addressType": "IPv4", "endpoints": [],
        });
        object.as_object_mut().unwrap().extend(rest.as_object().unwrap().clone());
        object
    }

    #[test]
    fn what_is_not_said_counts_as_ready_tcp_and_unnamed() {
        let slice = slice(of_web(json!({
            "ports": [{"port": 8080}, {"port": 53, "protocol": "UDP", "name": "dns"}, {"name": "any"}],
            "endpoints": [
                {"addresses": ["10.1.0.1", "10.1.0.2"]},
                {"addresses": ["10.1.0.3"], "nodeName": "n1",
                 "conditions": {"ready": false, "serving": true, "terminating": true}},
            ],
        })));
        let slice = slice.unwrap().unwrap();
        assert_eq!(slice.service.to_string(), "shop/web");
        assert_eq!(slice.ports.len(), 2, "a port without a number is left out");
        assert_eq!((&*slice.ports[0].name, slice.ports[0].protocol), ("", Protocol::Tcp));
        assert_eq!((&*slice.ports[1].name, slice.ports[1].protocol), ("dns", Protocol::Udp));
        let [first, second] = &slice.endpoints[..] else { panic!("{slice:?}") };
        assert_eq!(first.address, "10.1.0.1".parse::<IpAddr>().unwrap());
        assert!(first.ready && first.serving && !first.terminating && first.node.is_none());
        assert!(!second.ready && second.serving && second.terminating);
    }

    #[test]
    fn what_cannot_be_an_endpoint_is_left_out() {
        let slice = slice(of_web(json!({
            "ports": [{"port": 0}, {"port": 70000}, {"port": 1, "protocol": "SCTP"}],
            "endpoints": [
                {"addresses": []}, {"addresses": ["127.0.0.1"]}, {"addresses": ["fd00::1"]},
                {"addresses": ["169.254.169.254"]}, {"addresses": ["not an address"]},
            ],
        })));
        let slice = slice.unwrap().unwrap();
        assert_eq!((slice.ports, slice.endpoints), (vec![], vec![]));
    }

    #[test]
    fn slices_of_nobody_are_of_no_interest_and_hostile_ones_refused() {
        let bare = json!({"metadata": {"name": "x"}, "addressType": "IPv4", "endpoints": []});
        assert_eq!(slice(bare), Ok(None));
        assert_eq!(slice(of_web(json!({"addressType": "FQDN"}))), Ok(None));
        let many = vec![json!({"addresses": ["10.0.0.1"]}); MAX_ENDPOINTS + 1];
        assert!(slice(of_web(json!({ "endpoints": many }))).unwrap_err().note.contains("1001 endpoints"));
        let labels = json!({"kubernetes.io/service-name": "../etc"});
        let metadata = json!({"name": "x", "labels": labels});
        assert!(slice(of_web(json!({ "metadata": metadata }))).unwrap_err().note.contains("../etc"));
    }
}

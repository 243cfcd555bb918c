//! The node agent: pods that ask for it are steered, and nobody else.

use serde_json::{Value, json};
use srcip_tests::{
    Family, PATIENCE,
    agent::{Agent, NODE, Setup, Source, pod, uid},
    apiserver::{ApiServer, Faults},
    client,
    host::Host,
    load::Load,
    peer,
    process::Process,
    proxy::{Kind, Proxy},
    wait_until,
    world::World,
};

use crate::{detach::traces, scenario::PORT};

mod cni;
mod lifecycle;
mod pods;

/// What pods write to be steered.
pub const TPROXY: &[(&str, &str)] = &[("sidecar.istio.io/interceptionMode", "TPROXY")];

/// Where the agent of a test learns of pods.
enum Cluster {
    Manifests,
    Api(ApiServer),
}

/// An agent on a node, with a client and pods.
pub struct Rig {
    pub agent: Option<Agent>,
    pub setup: Setup,
    cluster: Cluster,
    pub client: Host,
    /// Last, so that it goes last.
    pub world: World,
}

impl Drop for Rig {
    fn drop(&mut self) {
        if std::thread::panicking() {
            if let Some(agent) = &self.agent {
                eprintln!("--- the agent's log ---\n{}", agent.process.log());
            }
            self.world.diagnose();
        }
    }
}

impl Rig {
    fn new(api: bool) -> Self {
        let mut world = World::new().unwrap();
        let client = world.host("client").unwrap();
        let (cluster, source) = if api {
            let server = ApiServer::start().unwrap();
            let kubeconfig = server.kubeconfig(world.directory()).unwrap();
            (Cluster::Api(server), Source::Kubeconfig(kubeconfig))
        } else {
            (Cluster::Manifests, Source::Manifests)
        };
        let setup = Setup::new(&world, source).unwrap();
        Self { agent: None, setup, cluster, client, world }
    }

    pub fn with_manifests() -> Self {
        Self::new(false)
    }

    pub fn start(&mut self) {
        self.agent = Some(self.setup.start().unwrap());
    }

    pub fn agent(&mut self) -> &mut Agent {
        self.agent.as_mut().unwrap()
    }

    /// Makes a pod known, or changes it.
    pub fn put(&self, object: &Value) {
        match &self.cluster {
            Cluster::Manifests => {
                let name = object["metadata"]["name"].as_str().unwrap();
                self.setup.put(name, object).unwrap();
            }
            Cluster::Api(server) => drop(server.put_pod(object.clone())),
        }
    }

    /// Deletes a pod's object; the pod itself stays.
    pub fn delete(&self, name: &str) {
        match &self.cluster {
            Cluster::Manifests => self.setup.put(name, &Value::Null).unwrap(),
            Cluster::Api(server) => server.delete_pod("shop", name),
        }
    }

    /// A pod with an application and a proxy, of which nobody has been told.
    pub fn running(&mut self, name: &str, annotations: &[(&str, &str)]) -> Running {
        let uid = uid();
        let host = self.world.pod(name, &uid).unwrap();
        let application = peer::application(&host, &["[::]:8000"]).unwrap();
        let proxy = Proxy::start(&host, Kind::Haproxy).unwrap();
        let object = pod("shop", name, &uid, annotations);
        Running { object, proxy: Some(proxy), _application: application, host }
    }

    /// The application sees the client, through the proxy.
    pub fn assert_kept(&self, pod: &Host) {
        for family in Family::BOTH {
            let seen = client::ask_once(&self.client, pod.socket(family, PORT)).unwrap();
            assert_eq!(seen.peer.ip(), self.client.address(family));
            assert!(seen.proxied, "{family:?}: {seen:?}");
        }
    }

    /// The application is reached directly.
    pub fn assert_direct(&self, pod: &Host) {
        let seen = client::ask_once(&self.client, pod.socket(Family::V4, PORT)).unwrap();
        assert!(!seen.proxied, "{seen:?}");
    }
}

/// A pod that runs.
pub struct Running {
    pub object: Value,
    pub proxy: Option<Proxy>,
    _application: Process,
    pub host: Host,
}

impl Running {
    /// Sets an annotation, or removes it.
    pub fn annotate(&mut self, name: &str, value: Option<&str>) -> &Value {
        let annotations = self.object["metadata"]["annotations"].as_object_mut().unwrap();
        match value {
            Some(value) => drop(annotations.insert(name.to_owned(), value.into())),
            None => drop(annotations.remove(name)),
        }
        &self.object
    }
}

/// Makes a test of each function for each source; the function takes whether that is the API.
macro_rules! sources {
    ($($name:ident),+ $(,)?) => {
        mod manifests { $(#[test] fn $name() { super::$name($crate::agent::Rig::new(false)) })+ }
        mod api { $(#[test] fn $name() { super::$name($crate::agent::Rig::new(true)) })+ }
    };
}
use sources;

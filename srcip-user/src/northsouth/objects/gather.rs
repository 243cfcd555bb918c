//! Where a source puts the objects it learns of, and whoever follows them finds them.

use std::{collections::BTreeMap, fmt, sync::Arc};

use k8s_openapi::api::{
    core::v1::{Node, Service},
    discovery::v1::EndpointSlice,
};
use serde_json::Value;
use tokio::sync::watch;

use super::{
    Listed, ObjectName, Objects, Problem, Refused, node::NodeInfo, service::ServiceInfo, shown,
    slice::SliceInfo,
};
use crate::{
    agent::pod::PodUid,
    northsouth::select::{NORTH_SOUTH, Selection},
};

/// A kind of objects: how one is read, and where it is kept.
pub trait Kind: Clone + fmt::Debug + Send + Sync + 'static {
    /// By what it is known.
    type Key: Ord + Clone + fmt::Debug + Send + 'static;
    /// What is kept of it.
    type Kept: PartialEq + Clone + fmt::Debug + Send + 'static;
    /// What is taken out of it at once, before it is known whether it matters.
    type Object: Clone + fmt::Debug + Send + 'static;

    /// As RBAC has it.
    const RESOURCE: &'static str;
    /// Where all of them are, in the Kubernetes API.
    const PATH: &'static str;
    /// More than this no cluster has.
    const MOST: usize;

    /// Takes what matters out of anything that comes in an object's place.
    fn read(value: Value) -> Read<Self>;
    /// What is to be kept of it, if anything. Nothing at all if it has no name.
    fn keep(object: Self::Object, selection: &Selection) -> Option<(Self::Key, Option<Self::Kept>)>;
    /// Where it is kept.
    fn among(objects: &mut Objects) -> (&mut BTreeMap<Self::Key, Self::Kept>, &mut bool);
}

/// An object as it was read.
#[derive(Clone, Debug)]
pub struct Read<K: Kind>(K::Object);

/// Services.
#[derive(Clone, Debug)]
pub struct Services;

/// EndpointSlices.
#[derive(Clone, Debug)]
pub struct Slices;

/// Nodes.
#[derive(Clone, Debug)]
pub struct Nodes;

/// An object that is as its kind should be, or its name, whether it asks to be handled, and what is wrong.
#[derive(Clone, Debug)]
pub enum ServiceObject {
    /// It is.
    Good(Box<Service>),
    /// It is not.
    Bad(Option<ObjectName>, Option<PodUid>, bool, String),
}

impl Kind for Services {
    type Key = ObjectName;
    type Kept = Result<Arc<ServiceInfo>, Refused>;
    type Object = ServiceObject;

    const RESOURCE: &'static str = "services";
    const PATH: &'static str = "/api/v1/services";
    const MOST: usize = 32_768;

    fn read(value: Value) -> Read<Self> {
        let metadata = &value["metadata"];
        let text = |field: &str| metadata[field].as_str().unwrap_or_default();
        let name = ObjectName::new(text("namespace"), text("name"));
        let uid = PodUid::new(text("uid"));
        let asks = metadata["annotations"][NORTH_SOUTH] == "true";
        Read(match serde_json::from_value::<Service>(value) {
            Ok(service) => Self::strip(service),
            Err(error) => ServiceObject::Bad(name, uid, asks, shown(&error.to_string())),
        })
    }

    fn keep(object: ServiceObject, selection: &Selection) -> Option<(ObjectName, Option<Self::Kept>)> {
        match object {
            ServiceObject::Good(service) => {
                let info = ServiceInfo::from_object(&service, selection).transpose();
                let namespace = service.metadata.namespace.as_deref().unwrap_or("default");
                let name = ObjectName::new(namespace, service.metadata.name.as_deref()?)?;
                let uid = service.metadata.uid.as_deref().and_then(PodUid::new);
                Some((name, info.map(|info| info.map(Arc::new).map_err(|problem| Refused { uid, problem }))))
            }
            ServiceObject::Bad(name, uid, asks, why) => {
                let note = format!("it is not as Kubernetes would have it: {why}");
                Some((
                    name?,
                    asks.then(|| Err(Refused { uid, problem: Problem::new("InvalidService", note) })),
                ))
            }
        }
    }

    fn among(objects: &mut Objects) -> (&mut BTreeMap<ObjectName, Self::Kept>, &mut bool) {
        (&mut objects.services, &mut objects.listed.services)
    }
}

impl Services {
    /// Without what is large and of no interest.
    fn strip(mut service: Service) -> ServiceObject {
        service.metadata.managed_fields = None;
        ServiceObject::Good(Box::new(service))
    }
}

impl Kind for Slices {
    type Key = ObjectName;
    type Kept = Arc<SliceInfo>;
    type Object = Option<(ObjectName, Option<Arc<SliceInfo>>)>;

    const RESOURCE: &'static str = "endpointslices.discovery.k8s.io";
    const PATH: &'static str = "/apis/discovery.k8s.io/v1/endpointslices";
    const MOST: usize = 65_536;

    fn read(value: Value) -> Read<Self> {
        let text = |field: &str| value["metadata"][field].as_str();
        let name = ObjectName::new(text("namespace").unwrap_or("default"), text("name").unwrap_or_default());
        let Some(name) = name else { return Read(None) };
        let info = serde_json::from_value::<EndpointSlice>(value)
            .map_err(|error| shown(&error.to_string()))
            .and_then(|slice| SliceInfo::from_object(&slice).map_err(|problem| problem.note));
        let info = info.unwrap_or_else(|why| {
            tracing::warn!("the EndpointSlice {name} is left out: {why}");
            None
        });
        Read(Some((name, info.map(Arc::new))))
    }

    fn keep(object: Self::Object, _: &Selection) -> Option<(ObjectName, Option<Arc<SliceInfo>>)> {
        object
    }

    fn among(objects: &mut Objects) -> (&mut BTreeMap<ObjectName, Self::Kept>, &mut bool) {
        (&mut objects.slices, &mut objects.listed.slices)
    }
}

impl Kind for Nodes {
    type Key = Arc<str>;
    type Kept = Arc<NodeInfo>;
    type Object = Option<Arc<NodeInfo>>;

    const RESOURCE: &'static str = "nodes";
    const PATH: &'static str = "/api/v1/nodes";
    const MOST: usize = 16_384;

    fn read(value: Value) -> Read<Self> {
        let node = serde_json::from_value::<Node>(value);
        let node =
            node.inspect_err(|error| tracing::warn!("a node is left out: {}", shown(&error.to_string())));
        Read(node.ok().and_then(|node| NodeInfo::from_object(&node)).map(Arc::new))
    }

    fn keep(object: Self::Object, _: &Selection) -> Option<(Arc<str>, Option<Arc<NodeInfo>>)> {
        object.map(|node| (Arc::clone(&node.name), Some(node)))
    }

    fn among(objects: &mut Objects) -> (&mut BTreeMap<Arc<str>, Self::Kept>, &mut bool) {
        (&mut objects.nodes, &mut objects.listed.nodes)
    }
}

/// The objects, changed in place. Who watches is woken only by a difference.
#[derive(Clone, Debug)]
pub struct Gathered {
    selection: Arc<Selection>,
    objects: Arc<watch::Sender<Arc<Objects>>>,
}

impl Gathered {
    /// None yet.
    pub fn new(selection: Selection) -> Self {
        Self { selection: Arc::new(selection), objects: Arc::default() }
    }

    /// The objects, now and from now on.
    pub fn watch(&self) -> watch::Receiver<Arc<Objects>> {
        self.objects.subscribe()
    }

    /// What is to be kept of an object.
    pub fn keep<K: Kind>(&self, object: Read<K>) -> Option<(K::Key, Option<K::Kept>)> {
        K::keep(object.0, &self.selection)
    }

    /// All objects of a kind.
    pub fn replace<K: Kind>(&self, all: BTreeMap<K::Key, K::Kept>) {
        self.objects.send_if_modified(|objects| {
            let (known, listed) = K::among(Arc::make_mut(objects));
            let changed = *known != all || !*listed;
            (*known, *listed) = (all, true);
            changed
        });
    }

    /// One that is new or has changed.
    pub fn put<K: Kind>(&self, key: K::Key, kept: K::Kept) {
        self.objects.send_if_modified(|objects| {
            let (known, _) = K::among(Arc::make_mut(objects));
            if known.get(&key) == Some(&kept) || known.len() >= K::MOST && !known.contains_key(&key) {
                return false;
            }
            known.insert(key, kept);
            true
        });
    }

    /// One that is gone.
    pub fn remove<K: Kind>(&self, key: &K::Key) {
        self.objects.send_if_modified(|objects| {
            let (known, _) = K::among(Arc::make_mut(objects));
            known.remove(key).is_some()
        });
    }

    /// Everything at once, all of it read already.
    pub fn replace_all(&self, services: Vec<Service>, slices: Vec<EndpointSlice>, nodes: Vec<Node>) {
        let services =
            services.into_iter().filter_map(|service| self.keep(Read::<Services>(Services::strip(service))));
        let services = services.filter_map(|(name, kept)| Some((name, kept?))).collect();
        let slices = slices.iter().filter_map(|slice| match SliceInfo::from_object(slice) {
            Ok(slice) => slice.map(|slice| (slice.name.clone(), Arc::new(slice))),
            Err(problem) => {
                tracing::warn!("an EndpointSlice is left out: {}", problem.note);
                None
            }
        });
        let slices = slices.collect();
        let nodes = nodes.iter().filter_map(NodeInfo::from_object);
        let nodes = nodes.map(|node| (Arc::clone(&node.name), Arc::new(node))).collect();
        let all = Objects { listed: Listed::ALL, services, slices, nodes };
        self.objects.send_if_modified(|objects| {
            let changed = **objects != all;
            *objects = Arc::new(all);
            changed
        });
    }

    /// Why a kind cannot be learned just now; `None` if it can be again. What is known stays.
    pub fn trouble<K: Kind>(&self, why: Option<&str>) {
        if let Some(why) = why {
            tracing::warn!("{} cannot be learned just now: {}", K::RESOURCE, shown(why));
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn put<K: Kind>(gathered: &Gathered, object: Value) {
        match gathered.keep(K::read(object)) {
            Some((key, Some(kept))) => gathered.put::<K>(key, kept),
            Some((key, None)) => gathered.remove::<K>(&key),
            None => {}
        }
    }

    fn service(node_port: Value) -> Value {
        json!({
            "metadata": {"namespace": "shop", "name": "web", "annotations": {NORTH_SOUTH: "true"}},
            "spec": {"ports": [{"port": 80, "nodePort": node_port}]},
        })
    }

    #[test]
    fn who_watches_is_woken_only_by_a_difference() {
        let gathered = Gathered::new(Selection::default());
        let mut watch = gathered.watch();
        put::<Services>(&gathered, service(json!(30080)));
        assert!(watch.has_changed().unwrap());
        watch.mark_unchanged();
        put::<Services>(&gathered, service(json!(30080)));
        assert!(!watch.has_changed().unwrap());
        // Nothing leads to it from outside any more, and it says so.
        put::<Services>(&gathered, service(json!(0)));
        assert_eq!(watch.borrow_and_update().services.values().filter(|service| service.is_err()).count(), 1);
        put::<Services>(&gathered, json!({"metadata": {"namespace": "shop", "name": "web"}, "spec": {}}));
        assert!(watch.borrow_and_update().services.is_empty());
    }

    #[test]
    fn all_kinds_have_to_be_listed_once() {
        let gathered = Gathered::new(Selection::default());
        gathered.replace::<Services>(BTreeMap::new());
        gathered.replace::<Slices>(BTreeMap::new());
        assert!(!gathered.watch().borrow().is_synced());
        gathered.replace::<Nodes>(BTreeMap::new());
        assert!(gathered.watch().borrow().is_synced());
    }

    #[test]
    fn what_is_no_object_is_told_if_it_asks_and_does_no_harm() {
        let gathered = Gathered::new(Selection::default());
        put::<Services>(&gathered, service(json!("soon")));
        let objects = gathered.watch().borrow().clone();
        let problem = &objects.services.values().next().unwrap().as_ref().unwrap_err().problem;
        assert!(problem.note.contains("not as Kubernetes would have it"), "{problem:?}");
        for value in [json!(null), json!(7), json!({"metadata": []}), json!({"metadata": {"name": "../x"}})] {
            put::<Services>(&gathered, value.clone());
            put::<Slices>(&gathered, value.clone());
            put::<Nodes>(&gathered, value);
        }
        let labels = json!({"kubernetes.io/service-name": "web"});
        put::<Slices>(
            &gathered,
            json!({"metadata": {"name": "x", "labels": labels}, "addressType": "IPv4", "endpoints": 3}),
        );
        assert_eq!(gathered.watch().borrow().slices.len(), 0);
        put::<Nodes>(&gathered, json!({"metadata": {"name": "n1"}}));
        assert_eq!(gathered.watch().borrow().nodes.len(), 1);
    }

    #[test]
    fn files_come_all_at_once() {
        let gathered = Gathered::new(Selection::default());
        let service: Service = serde_json::from_value(service(json!(30080))).unwrap();
        let node: Node = serde_json::from_value(json!({"metadata": {"name": "n1"}})).unwrap();
        gathered.replace_all(vec![service], vec![], vec![node]);
        let objects = gathered.watch().borrow().clone();
        assert!(objects.is_synced());
        assert_eq!((objects.services.len(), objects.nodes.len()), (1, 1));
    }
}

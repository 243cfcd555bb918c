//! The objects, their versions, and what has happened to them.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
};

use serde_json::{Value, json};

/// Changes that a watch can still be told.
const MAX_HISTORY: usize = 20_000;
/// Lists that are not at their end.
const MAX_LISTS: usize = 64;

/// The kinds of objects there are.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Resource {
    /// Pods.
    Pods,
    /// Events, as events.k8s.io has them.
    Events,
    /// Services.
    Services,
    /// EndpointSlices.
    EndpointSlices,
    /// Nodes, which are in no namespace.
    Nodes,
}

impl Resource {
    /// As RBAC has it, without the group.
    pub(super) fn plural(self) -> &'static str {
        match self {
            Self::Pods => "pods",
            Self::Events => "events",
            Self::Services => "services",
            Self::EndpointSlices => "endpointslices",
            Self::Nodes => "nodes",
        }
    }

    /// The `kind` of one.
    pub(super) fn kind(self) -> &'static str {
        match self {
            Self::Pods => "Pod",
            Self::Events => "Event",
            Self::Services => "Service",
            Self::EndpointSlices => "EndpointSlice",
            Self::Nodes => "Node",
        }
    }

    /// The API group; empty for the core's.
    pub(super) fn group(self) -> &'static str {
        match self {
            Self::Pods | Self::Services | Self::Nodes => "",
            Self::Events => super::event::GROUP,
            Self::EndpointSlices => "discovery.k8s.io",
        }
    }

    /// All that are in a group; Events are also in the core's.
    pub(super) fn in_group(group: &str) -> impl Iterator<Item = Self> {
        let all = [Self::Pods, Self::Events, Self::Services, Self::EndpointSlices, Self::Nodes];
        all.into_iter().filter(move |one| one.group() == group || group.is_empty() && *one == Self::Events)
    }
}

/// An object's version, or zero.
pub fn version_of(object: &Value) -> u64 {
    object["metadata"]["resourceVersion"]
        .as_str()
        .and_then(|version| version.parse().ok())
        .unwrap_or_default()
}

/// Conditions on an object's fields.
#[derive(Clone, Debug, Default)]
pub struct Selector {
    namespace: Option<String>,
    /// A path, whether it is to be equal, and to what.
    fields: Vec<(String, bool, String)>,
}

impl Selector {
    /// Those in a namespace, or in all, that are as a `fieldSelector` says; `None` if it makes no sense.
    pub fn new(namespace: Option<&str>, fields: &str) -> Option<Self> {
        let parse = |field: &str| {
            let (path, value) = field.split_once('=')?;
            let equal = !path.ends_with('!');
            Some((path.trim_end_matches('!').to_owned(), equal, value.trim_start_matches('=').to_owned()))
        };
        let fields = fields.split(',').filter(|field| !field.is_empty()).map(parse).collect::<Option<_>>()?;
        Some(Self { namespace: namespace.map(ToOwned::to_owned), fields })
    }

    /// Whether an object is one of them.
    pub fn has(&self, object: &Value) -> bool {
        let field = |path: &str| path.split('.').fold(object, |value, name| &value[name]);
        let text = |path: &str| field(path).as_str().unwrap_or_default().to_owned();
        self.namespace.as_ref().is_none_or(|namespace| text("metadata.namespace") == *namespace)
            && self.fields.iter().all(|(path, equal, value)| (text(path) == *value) == *equal)
    }
}

/// A part of a list.
#[derive(Clone, Debug)]
pub struct Page {
    /// The objects.
    pub items: Vec<Arc<Value>>,
    /// As of which version the whole list is.
    pub version: u64,
    /// Where the next page begins; empty if there is none.
    pub next: String,
}

/// Something that has happened to an object.
#[derive(Clone, Debug)]
struct Change {
    version: u64,
    resource: Resource,
    before: Option<Arc<Value>>,
    after: Option<Arc<Value>>,
}

/// The version asked for is not known any more.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Gone;

/// The objects.
#[derive(Debug, Default)]
pub struct Store {
    version: u64,
    objects: BTreeMap<(Resource, String, String), Arc<Value>>,
    history: VecDeque<Change>,
    /// Changes up to this version are forgotten.
    forgotten: u64,
    lists: BTreeMap<u64, (u64, Vec<Arc<Value>>)>,
}

impl Store {
    /// Makes or changes an object, whatever is in it. Returns its version.
    pub fn put(&mut self, resource: Resource, mut object: Value) -> u64 {
        let metadata = &mut object["metadata"];
        if metadata["namespace"].is_null() && resource != Resource::Nodes {
            metadata["namespace"] = "default".into();
        }
        metadata["resourceVersion"] = (self.version + 1).to_string().into();
        let text = |field: &str| metadata[field].as_str().unwrap_or_default().to_owned();
        let key = (resource, text("namespace"), text("name"));
        // As a real one does. Tests say themselves what pods are, and what is wrong with them.
        if metadata["uid"].is_null() && resource != Resource::Pods {
            let known = self.objects.get(&key).map(|before| before["metadata"]["uid"].clone());
            let new = || format!("00000000-0000-4000-8000-{:012x}", self.version + 1).into();
            metadata["uid"] = known.unwrap_or_else(new);
        }
        let after = Arc::new(object);
        let before = self.objects.insert(key, Arc::clone(&after));
        self.happened(resource, before, Some(after))
    }

    /// Removes an object, if it is there.
    pub fn delete(&mut self, resource: Resource, namespace: &str, name: &str) {
        let before = self.objects.remove(&(resource, namespace.to_owned(), name.to_owned()));
        if before.is_some() {
            self.happened(resource, before, None);
        }
    }

    fn happened(&mut self, resource: Resource, before: Option<Arc<Value>>, after: Option<Arc<Value>>) -> u64 {
        self.version += 1;
        self.history.push_back(Change { version: self.version, resource, before, after });
        if self.history.len() > MAX_HISTORY {
            self.forgotten = self.history.pop_front().map_or(self.forgotten, |change| change.version);
        }
        self.version
    }

    /// Forgets what has happened, and lists that are not at their end.
    pub fn expire(&mut self) {
        // A change that concerns nobody, so that who is up to date is behind as well.
        self.version += 1;
        self.forgotten = self.version;
        self.history.clear();
        self.lists.clear();
    }

    /// The version as of now.
    pub fn version(&self) -> u64 {
        self.version
    }

    /// An object.
    pub fn get(&self, resource: Resource, namespace: &str, name: &str) -> Option<Arc<Value>> {
        self.objects.get(&(resource, namespace.to_owned(), name.to_owned())).cloned()
    }

    /// All objects of a kind.
    pub fn all(&self, resource: Resource) -> Vec<Arc<Value>> {
        let of_kind = self.objects.iter().filter(|((kind, ..), _)| *kind == resource);
        of_kind.map(|(_, object)| Arc::clone(object)).collect()
    }

    /// A list, or its first `limit` objects.
    pub fn list(&mut self, resource: Resource, selector: &Selector, limit: usize) -> Page {
        let mut items = self.all(resource);
        items.retain(|object| selector.has(object));
        self.page(self.version, items, limit)
    }

    /// The next objects of a list.
    pub fn list_on(&mut self, token: &str, limit: usize) -> Result<Page, Gone> {
        let id: u64 = token.parse().map_err(|_| Gone)?;
        let (version, items) = self.lists.remove(&id).ok_or(Gone)?;
        Ok(self.page(version, items, limit))
    }

    fn page(&mut self, version: u64, mut items: Vec<Arc<Value>>, limit: usize) -> Page {
        let rest = if limit == 0 { Vec::new() } else { items.split_off(limit.min(items.len())) };
        let mut next = String::new();
        if !rest.is_empty() {
            let id = self.lists.last_key_value().map_or(1, |(id, _)| id + 1);
            self.lists.insert(id, (version, rest));
            if self.lists.len() > MAX_LISTS {
                self.lists.pop_first();
            }
            next = id.to_string();
        }
        Page { items, version, next }
    }

    /// What a watch is told that knows all until `version`: types and objects.
    pub fn since(
        &self,
        version: u64,
        resource: Resource,
        selector: &Selector,
    ) -> Result<Vec<(&'static str, Value)>, Gone> {
        if version < self.forgotten {
            return Err(Gone);
        }
        let changes =
            self.history.iter().filter(|change| change.version > version && change.resource == resource);
        let seen = |object: &Option<Arc<Value>>| object.clone().filter(|object| selector.has(object));
        Ok(changes
            .filter_map(|change| match (seen(&change.before), seen(&change.after)) {
                (None, None) => None,
                (None, Some(after)) => Some(("ADDED", (*after).clone())),
                (Some(_), Some(after)) => Some(("MODIFIED", (*after).clone())),
                // As it was, but with the version at which it went.
                (Some(before), None) => {
                    let mut object = (*before).clone();
                    object["metadata"]["resourceVersion"] = json!(change.version.to_string());
                    Some(("DELETED", object))
                }
            })
            .collect())
    }
}

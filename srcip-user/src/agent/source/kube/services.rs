//! The cluster's Services, EndpointSlices and nodes, from the Kubernetes API.

use std::{collections::BTreeMap, marker::PhantomData, sync::Arc};

use kube::{Client, core::Request};
use serde_json::Value;
use tokio::{sync::watch, task::JoinHandle};

use super::{
    Timing,
    follow::{Collection, FromValue, follow},
};
use crate::northsouth::{
    objects::{
        Objects,
        gather::{Gathered, Kind, Nodes, Read, Services, Slices},
    },
    select::Selection,
};

/// What north-south needs to know, from the Kubernetes API. Its tasks end with it.
pub struct ClusterSource {
    gathered: Gathered,
    followers: Vec<JoinHandle<()>>,
}

impl ClusterSource {
    /// Begins to learn. Inside a tokio runtime. Needs no answer: the API server may come up later.
    pub fn start(client: &Client, selection: Selection, timing: Timing) -> Self {
        let gathered = Gathered::new(selection);
        let followers = vec![
            tokio::spawn(follow(client.clone(), timing, All::<Services>::new(&gathered))),
            tokio::spawn(follow(client.clone(), timing, All::<Slices>::new(&gathered))),
            tokio::spawn(follow(client.clone(), timing, All::<Nodes>::new(&gathered))),
        ];
        Self { gathered, followers }
    }

    /// What is known, now and from now on.
    pub fn watch(&self) -> watch::Receiver<Arc<Objects>> {
        self.gathered.watch()
    }
}

impl Drop for ClusterSource {
    fn drop(&mut self) {
        self.followers.iter().for_each(JoinHandle::abort);
    }
}

/// All objects of a kind in the cluster.
struct All<K> {
    gathered: Gathered,
    kind: PhantomData<K>,
}

impl<K: Kind> All<K> {
    fn new(gathered: &Gathered) -> Self {
        Self { gathered: gathered.clone(), kind: PhantomData }
    }
}

impl<K: Kind> FromValue for Read<K> {
    fn from_value(value: Value) -> Self {
        K::read(value)
    }
}

impl<K: Kind> Collection for All<K> {
    type Object = Read<K>;
    type Listed = BTreeMap<K::Key, K::Kept>;

    fn resource(&self) -> &'static str {
        K::RESOURCE
    }

    fn all(&self) -> Request {
        Request::new(K::PATH)
    }

    fn field_selector(&self) -> Option<String> {
        None
    }

    fn add(&self, listed: &mut Self::Listed, object: Read<K>) -> Result<(), String> {
        if let Some((key, Some(kept))) = self.gathered.keep::<K>(object) {
            listed.insert(key, kept);
        }
        if listed.len() > K::MOST {
            return Err(format!("the API server lists more than {} {}", K::MOST, K::RESOURCE));
        }
        Ok(())
    }

    fn replace(&self, listed: Self::Listed) {
        self.gathered.replace::<K>(listed);
    }

    fn put(&self, object: Read<K>) {
        match self.gathered.keep::<K>(object) {
            Some((key, Some(kept))) => self.gathered.put::<K>(key, kept),
            Some((key, None)) => self.gathered.remove::<K>(&key),
            None => {}
        }
    }

    fn remove(&self, object: Read<K>) {
        if let Some((key, _)) = self.gathered.keep::<K>(object) {
            self.gathered.remove::<K>(&key);
        }
    }

    fn trouble(&self, why: Option<&str>) {
        self.gathered.trouble::<K>(why);
    }
}

//! This node's pods in answers of the API server, and where they are kept.

use std::sync::Arc;

use kube::core::Request;
use serde_json::Value;

use super::{
    PodApi,
    follow::{Collection, FromValue},
};
use crate::agent::{
    pod::PodInfo,
    source::{
        MAX_PODS, Pods,
        object::{self, Refused},
        published::Published,
    },
};

/// A pod, or what is wrong with it.
pub(super) type SeenPod = Result<PodInfo, Refused>;

impl FromValue for SeenPod {
    fn from_value(value: Value) -> Self {
        object::read(value)
    }
}

/// The pods of a node.
pub(super) struct NodePods {
    pub(super) api: PodApi,
    pub(super) published: Arc<Published>,
}

impl Collection for NodePods {
    type Object = SeenPod;
    type Listed = Pods;

    fn resource(&self) -> &'static str {
        "pods"
    }

    fn all(&self) -> Request {
        Request::new("/api/v1/pods")
    }

    fn field_selector(&self) -> Option<String> {
        Some(format!("spec.nodeName={}", self.api.node))
    }

    fn add(&self, listed: &mut Pods, pod: SeenPod) -> Result<(), String> {
        match pod {
            Ok(pod) if self.api.is_here(&pod) => {
                listed.insert(pod.uid.clone(), Arc::new(pod));
            }
            Ok(_) => {}
            Err(refused) => {
                tracing::warn!("{}", refused.reason);
                // It has been read before: it is still there.
                let known = self.published.pods();
                let before = refused.uid.and_then(|uid| known.get(&uid).cloned());
                listed.extend(before.map(|pod| (pod.uid.clone(), pod)));
            }
        }
        if listed.len() > MAX_PODS {
            return Err(format!("the API server lists more than {MAX_PODS} pods on this node"));
        }
        Ok(())
    }

    fn replace(&self, listed: Pods) {
        self.published.replace(listed, true);
    }

    fn put(&self, pod: SeenPod) {
        match pod {
            Ok(pod) if !self.api.is_here(&pod) => {}
            Ok(pod) => {
                let known = self.published.pods();
                if known.len() >= MAX_PODS && !known.contains_key(&pod.uid) {
                    tracing::warn!("pod {} is left alone: this node has {MAX_PODS} already", pod.name);
                    return;
                }
                drop(known);
                self.published.put(pod);
            }
            // If it has been read before, that still holds.
            Err(refused) => tracing::warn!("{}", refused.reason),
        }
    }

    fn remove(&self, pod: SeenPod) {
        let uid = pod.map_or_else(|refused| refused.uid, |pod| Some(pod.uid));
        if let Some(uid) = uid {
            self.published.remove(&uid);
        }
    }

    fn trouble(&self, why: Option<&str>) {
        self.published.trouble(why);
    }
}

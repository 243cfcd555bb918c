//! Where the pods of this node are learned from.
//!
//! - [`kube`]: the Kubernetes API. [`manifests`]: a directory of files.
//! - `object`: a pod as it comes, which may be anything. `published`: what a source tells those that watch
//!   it. `told`: what need not be said again.

pub mod kube;
pub mod manifests;
mod object;
mod published;
mod told;

use std::{collections::BTreeMap, sync::Arc};

use futures_util::future::BoxFuture;
use tokio::sync::watch;

use super::pod::{PodInfo, PodName, PodUid};

/// No node has this many pods: what is beyond is left out.
const MAX_PODS: usize = 4096;

/// This node's pods.
pub type Pods = BTreeMap<PodUid, Arc<PodInfo>>;

/// What a source knows of this node's pods.
#[derive(Clone, Debug, Default)]
pub struct Snapshot {
    /// Whether all pods have been seen once. Until then nobody may conclude that a pod is gone.
    pub synced: bool,
    /// The pods, those on the host's network and completed ones included.
    pub pods: Arc<Pods>,
    /// Why the source cannot be read just now; the pods are then those it had before.
    pub trouble: Option<Arc<str>>,
}

/// A place that knows this node's pods: the Kubernetes API, or a directory of manifests.
pub trait Source: Send + Sync {
    /// What it knows, now and from now on.
    fn watch(&self) -> watch::Receiver<Snapshot>;

    /// Asks for one pod, past everything that may lag behind; `None` if there is none.
    fn fetch<'a>(&'a self, name: &'a PodName) -> BoxFuture<'a, anyhow::Result<Option<PodInfo>>>;

    /// Tells whoever owns a pod what is wrong with it: a Warning Event. Never waits; the same thing is
    /// told once as long as it stays so.
    fn warn(&self, pod: &PodInfo, reason: &'static str, note: &str);

    /// The same about a Service. Where there is nobody to tell, nothing: it has been logged.
    fn warn_service(&self, _service: &PodName, _uid: &PodUid, _reason: &'static str, _note: &str) {}
}

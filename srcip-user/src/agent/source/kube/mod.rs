//! The Kubernetes API as the source of pods, and of what north-south needs to know.
//!
//! - [`connect`]: how the API server is found. `explain`: what its errors mean, and the cure.
//! - `follow`: the list and the watch that keep what is known. `events`: the Warning Events.
//! - `pods`: this node's pods. [`services`]: the cluster's Services, EndpointSlices and nodes.
//!
//! `GET`, `LIST` and `WATCH` of pods, and `CREATE` of Events, is all that is ever asked for; with north-south
//! on, also `LIST` and `WATCH` of Services, EndpointSlices and nodes.

mod connect;
mod events;
mod explain;
mod follow;
mod pods;
pub mod services;

use std::{sync::Arc, time::Duration};

use anyhow::{Context as _, Result, bail};
use futures_util::future::BoxFuture;
use kube::{
    Client,
    core::{Request, params::GetParams},
};
use prometheus_client::metrics::counter::Counter;
use tokio::{sync::watch, task::JoinHandle, time::timeout};

pub use connect::connect;

use super::{Snapshot, Source, published::Published};
use crate::agent::pod::{PodInfo, PodName, PodUid};
use events::{Events, Subject};
use explain::{Asked, explain};
use follow::Seen;
use pods::{NodePods, SeenPod};

/// How long things may take.
#[derive(Clone, Copy, Debug)]
pub struct Timing {
    /// Any request, until its answer has come; for a watch, until it has begun.
    pub request: Duration,
    /// The request of [`Source::fetch`]: the start of a pod waits for it.
    pub fetch: Duration,
    /// A watch, in whole seconds. A connection that has died without a word is noticed when it is over.
    pub watch: Duration,
    /// Before the first further attempt; each further one waits twice as long, and up to as much again at
    /// random, so that the nodes of a cluster do not come all at once.
    pub first_delay: Duration,
    /// No attempt waits longer, but for what is added at random.
    pub longest_delay: Duration,
}

impl Default for Timing {
    fn default() -> Self {
        Self {
            request: Duration::from_secs(30),
            fetch: Duration::from_secs(5),
            watch: Duration::from_secs(180),
            first_delay: Duration::from_millis(500),
            longest_delay: Duration::from_secs(30),
        }
    }
}

impl Timing {
    /// How long to wait, before one attempt after the other.
    fn delays(&self) -> backon::ExponentialBackoff {
        let builder = backon::ExponentialBuilder::new()
            .with_min_delay(self.first_delay)
            .with_max_delay(self.longest_delay)
            .with_factor(2.0)
            .without_max_times()
            .with_jitter();
        backon::BackoffBuilder::build(builder)
    }
}

/// This node's pods, from the Kubernetes API. Its tasks end with it.
pub struct KubeSource {
    api: PodApi,
    published: Arc<Published>,
    events: Events,
    follower: JoinHandle<()>,
}

impl KubeSource {
    /// Begins to learn the pods of a node. Inside a tokio runtime. Needs no answer: the API server may come
    /// up later. `lost` counts the Warning Events that do not arrive.
    pub fn start(client: Client, node: &str, timing: Timing, lost: Counter) -> Result<Self> {
        let valid = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, '-' | '.');
        if !(1..=253).contains(&node.len()) || !node.chars().all(valid) {
            bail!("{node:?} is not the name of a node; the names are those of `kubectl get nodes`");
        }
        let api = PodApi { client: client.clone(), node: node.into(), timing };
        let published = Arc::new(Published::default());
        let pods = NodePods { api: api.clone(), published: Arc::clone(&published) };
        let follower = tokio::spawn(follow::follow(client.clone(), timing, pods));
        Ok(Self { events: Events::start(client, node, timing, lost), api, published, follower })
    }
}

impl Drop for KubeSource {
    fn drop(&mut self) {
        self.follower.abort();
    }
}

impl Source for KubeSource {
    fn watch(&self) -> watch::Receiver<Snapshot> {
        self.published.subscribe()
    }

    fn fetch<'a>(&'a self, name: &'a PodName) -> BoxFuture<'a, Result<Option<PodInfo>>> {
        Box::pin(self.api.get(name))
    }

    fn warn(&self, pod: &PodInfo, reason: &'static str, note: &str) {
        self.events.warn(Subject::pod(pod), reason, note);
    }

    fn warn_service(&self, service: &PodName, uid: &PodUid, reason: &'static str, note: &str) {
        self.events.warn(Subject::service(service, uid), reason, note);
    }
}

/// What is asked of the API server about pods.
#[derive(Clone)]
struct PodApi {
    client: Client,
    node: Arc<str>,
    timing: Timing,
}

impl PodApi {
    /// The pod with this name, if it is on this node.
    async fn get(&self, name: &PodName) -> Result<Option<PodInfo>> {
        let url = format!("/api/v1/namespaces/{}/pods", name.namespace);
        let request = Request::new(url).get(&name.name, &GetParams::default()).context("no such name")?;
        let answer = timeout(self.timing.fetch, self.client.request::<Seen<SeenPod>>(request)).await;
        let answer = answer.with_context(|| {
            format!("the API server has not told of pod {name} within {:?}", self.timing.fetch)
        })?;
        match answer {
            Ok(Seen { object: Ok(pod), .. }) => Ok(Some(pod).filter(|pod| self.is_here(pod))),
            Ok(Seen { object: Err(refused), .. }) => bail!(refused.reason),
            Err(kube::Error::Api(status)) if status.code == 404 => Ok(None),
            Err(error) => bail!("{}", explain(&error, Asked { verb: "get", resource: "pods" })),
        }
    }

    /// Whether a pod is on this node. Asked for are no others, but a name may be of another node's pod by now.
    fn is_here(&self, pod: &PodInfo) -> bool {
        pod.node.as_deref() == Some(&*self.node)
    }
}

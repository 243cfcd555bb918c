//! North-south as a part of the agent: where it learns of Services, and on which devices it acts.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::{Context as _, Result};
use tokio::sync::watch;

use super::{
    health::Health,
    pod::PodName,
    protocol::{NorthSouthStatus, Note, ServiceProblem},
    source::{Source, kube::services::ClusterSource, manifests::cluster::ClusterFiles},
};
use crate::dataplane::record::TcHook;
use crate::northsouth::{
    controller::{Node, Standing},
    dataplane::NorthSouth as Dataplane,
    desired::ReturnPath,
    model::Here,
    objects::{Objects, Problem},
    run::{NorthSouth, View},
};

/// What of the node takes part.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Options {
    /// The node's name, as its Node object and EndpointSlices have it.
    pub node: String,
    /// The devices by which traffic enters.
    pub uplinks: Vec<String>,
    /// The way of the answers of endpoints on other nodes.
    pub return_path: ReturnPath,
    /// How programs are attached, if not by the newest hook that the kernel has.
    pub hook: Option<TcHook>,
}

/// Where it learns of Services: the same place as of pods.
pub enum Cluster {
    /// The Kubernetes API.
    Api(ClusterSource),
    /// Manifests.
    Files(ClusterFiles),
}

impl Cluster {
    fn watch(&self) -> watch::Receiver<Arc<Objects>> {
        match self {
            Self::Api(source) => source.watch(),
            Self::Files(files) => files.watch(),
        }
    }
}

/// How much of each list is told.
const MAX_TOLD: usize = 32;

/// What is told of it: the beginnings of lists that may be long.
pub fn status(view: &View) -> NorthSouthStatus {
    let Standing { plan, trouble, left_out, .. } = view.standing();
    let problems = plan.problems.iter().flat_map(|(service, problems)| {
        problems.iter().map(|Problem { reason, note }| ServiceProblem {
            service: service.to_string(),
            note: Note { reason: (*reason).to_owned(), note: note.clone() },
        })
    });
    let left_out = left_out.into_iter().map(|note| ServiceProblem {
        service: String::new(),
        note: Note { reason: "LeftOut".to_owned(), note },
    });
    let (mut problems, mut trouble) = (problems.chain(left_out).collect::<Vec<_>>(), trouble);
    let blocked = view.blocked_health_checks();
    let all = problems.len() + trouble.len() + blocked.len();
    problems.truncate(MAX_TOLD);
    trouble.truncate(MAX_TOLD);
    let blocked_health_checks: BTreeMap<_, _> = blocked.into_iter().take(MAX_TOLD).collect();
    let more = all - problems.len() - trouble.len() - blocked_health_checks.len();
    NorthSouthStatus { trouble, problems, blocked_health_checks, more }
}

/// Tells the owners of Services what is wrong with these: the first of them, where there are many.
pub fn warn(view: &View, standing: &Standing, source: &dyn Source) {
    const MOST: usize = 256;
    for (service, problems) in standing.plan.problems.iter().take(MOST) {
        let Some(uid) = view.uid(service) else { continue };
        let name = PodName { namespace: Arc::clone(&service.namespace), name: Arc::clone(&service.name) };
        // One Event for each reason, whatever it is about.
        let mut by_reason = BTreeMap::<_, Vec<&str>>::new();
        for Problem { reason, note } in problems {
            by_reason.entry(*reason).or_default().push(note);
        }
        for (reason, notes) in by_reason {
            source.warn_service(&name, &uid, reason, &notes.join("; "));
        }
    }
}

/// The node that the agent is on.
struct ThisNode {
    pin_path: PathBuf,
    options: Options,
}

impl Node for ThisNode {
    type Programmer = Dataplane;

    fn open(&self) -> Result<Dataplane> {
        let dataplane = Dataplane::open(&self.pin_path).context("it cannot be set up")?;
        Ok(match self.options.hook {
            Some(hook) => dataplane.by(hook),
            None => dataplane,
        })
    }

    fn here(&self) -> Result<Here> {
        let Options { node, uplinks, return_path, .. } = &self.options;
        let here = Here::find(node, uplinks, *return_path)?;
        let names: Vec<_> = here.uplinks.iter().map(|device| device.name.as_str()).collect();
        tracing::info!("north-south: traffic enters by {}", names.join(", "));
        Ok(here)
    }
}

/// Starts it, for the instance at `pin_path`. Inside a tokio runtime, in the node's network namespace.
pub fn start(options: Options, cluster: &Cluster, pin_path: &Path) -> Result<NorthSouth> {
    let node = ThisNode { pin_path: pin_path.to_owned(), options };
    NorthSouth::start(node, cluster.watch()).context("cannot start north-south")
}

/// Takes away what an earlier agent set up at `pin_path`: nobody would keep it true any more, and it would go on
/// sending to pods that are gone.
pub async fn leave(pin_path: &Path, health: &Health) {
    let path = pin_path.to_owned();
    // It waits for the kernel by itself, outside of the runtime.
    let removed = tokio::task::spawn_blocking(move || Dataplane::remove(&path)).await;
    match removed.map_err(anyhow::Error::from).and_then(|removed| Ok(removed?)) {
        Ok(false) => {}
        Ok(true) => tracing::warn!(
            "no --uplink is given: north-south, which an earlier agent had set up, has been removed; its Services are \
             kube-proxy's"
        ),
        Err(error) => {
            let problem = format!(
                "no --uplink is given, but what an earlier agent had set up cannot be removed: {error:#}; run `srcip \
                 cleanup`, or start the agent again"
            );
            tracing::error!("north-south: {problem}");
            health.set_north_south(vec![problem]);
        }
    }
}

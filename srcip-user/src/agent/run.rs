//! Puts the parts together, and takes them apart in the right order.

use std::{
    path::PathBuf,
    sync::{
        Arc, OnceLock,
        mpsc::{Sender, channel},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use prometheus_client::metrics::counter::Counter;
use tokio::{
    runtime::Handle,
    sync::{oneshot, watch},
};

use super::{
    admin::Server,
    backend::NodeBackend,
    board::Board,
    config::Config,
    handler::AgentHandler,
    health::Health,
    metrics::AgentMetrics,
    north_south::{self, Cluster},
    report::Reporter,
    serve::{Addresses, Servers, Shown},
    source::{
        Snapshot, Source,
        kube::{self, KubeSource, services::ClusterSource},
        manifests::{self, ManifestSource, cluster::ClusterFiles},
    },
    worker::{Job, MAX_SILENCE, Worker},
};
use crate::{
    cni::{
        install::Installer,
        keep::{Installation, Keeper},
    },
    dataplane::Dataplane,
    logging::LogControl,
    northsouth::{run::View, select::Selection},
    signals::Ending,
};

/// The loop counts as stalled after this long without a sign of life: an attach takes far less, and a sleep
/// is shorter.
const PATIENCE: Duration = Duration::from_secs(60);
const _: () = assert!(PATIENCE.as_secs() > 2 * MAX_SILENCE.as_secs());
/// How often the CNI plugin's installation and north-south are asked after.
const STANDING_POLL: Duration = Duration::from_secs(1);

/// Where pods are learned from.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum SourceChoice {
    /// The Kubernetes API: the pods of this node.
    Kubernetes {
        /// The node's name.
        node: String,
        /// How to reach the API, if it is not as usual.
        kubeconfig: Option<PathBuf>,
    },
    /// A directory of manifests.
    Manifests {
        /// The directory.
        directory: PathBuf,
        /// Pods that are bound to another node are left out.
        node: Option<String>,
    },
}

/// What an agent is made of.
#[derive(Debug)]
pub struct Options {
    /// What it acts on.
    pub dataplane: Dataplane,
    /// What it is to do.
    pub config: Config,
    /// Where it learns of pods.
    pub source: SourceChoice,
    /// Where it looks for their processes.
    pub proc: PathBuf,
    /// Where it is asked.
    pub socket: PathBuf,
    /// Where it shows itself.
    pub addresses: Addresses,
    /// How many pods have metrics of their own.
    pub max_workloads: usize,
    /// The CNI plugin, if the agent is to install it.
    pub cni: Option<Installer>,
    /// What of the node takes part in north-south, if anything.
    pub north_south: Option<north_south::Options>,
    /// What is logged.
    pub log: LogControl,
}

/// Runs an agent until a signal ends it. What is attached stays attached.
pub fn run(options: Options) -> Result<()> {
    // Before anything is started: a signal that comes now ends it properly, too.
    let ending = Ending::watch()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let result = runtime.block_on(run_until(options, &ending));
    // What is still being read for a scrape is nobody's any more.
    runtime.shutdown_background();
    result
}

async fn run_until(options: Options, ending: &Ending) -> Result<()> {
    let come = ending.come()?;
    let Options { dataplane, config, source, proc, socket, addresses, max_workloads, cni, north_south, log } =
        options;
    let (config, log) = (Arc::new(config), Arc::new(log));
    let health = Arc::new(Health::new(PATIENCE));
    let metrics = Arc::new(AgentMetrics::new(max_workloads));
    let board = Arc::new(Board::default());
    let servers = Servers::bind(&addresses)?;
    let services = north_south.is_some().then(|| config.north_south.services.clone());
    let (source, cluster) = start_source(source, services, metrics.lost_events()).await?;
    // From here on: nothing that it learns meanwhile is missed.
    let snapshot = source.watch();
    let (jobs, asked) = channel();
    let keeper = Arc::new(OnceLock::new());
    let view = Arc::new(OnceLock::new());
    let handler = AgentHandler {
        jobs: jobs.clone(),
        source: Arc::clone(&source),
        snapshot: source.watch(),
        runtime: Handle::current(),
        config: Arc::clone(&config),
        board: Arc::clone(&board),
        health: Arc::clone(&health),
        metrics: Arc::clone(&metrics),
        log: Arc::clone(&log),
        started: Instant::now(),
        keeper: Arc::clone(&keeper),
        north_south: Arc::clone(&view),
    };
    // Before the loop begins: it fails if there is an agent already, and two would work against each other.
    let server = Server::start(&socket, Arc::new(handler))?;
    if let Some(cni) = cni {
        let started = Keeper::start(cni).context("cannot watch the CNI configuration")?;
        let _ = keeper.set(started);
    }

    let reporter = Reporter { health: Arc::clone(&health), metrics: Arc::clone(&metrics) };
    let backend = NodeBackend::new(dataplane.clone(), proc);
    let worker = Worker::new(backend, Arc::clone(&config), Arc::clone(&source), board, Box::new(reporter));
    let (ends, ended) = oneshot::channel::<()>();
    let worker = thread::Builder::new().name("srcip-worker".to_owned()).spawn(move || {
        // Dropped however it ends.
        let _ends = ends;
        worker.run(&asked);
    })?;

    let north_south = match (north_south, &cluster) {
        (Some(options), Some(cluster)) => {
            let north_south = north_south::start(options, cluster, dataplane.pin_path())?;
            let _ = view.set(north_south.view());
            Some(north_south)
        }
        _ => {
            north_south::leave(dataplane.pin_path(), &health).await;
            None
        }
    };

    for url in servers.urls()? {
        tracing::info!("serving {url}");
    }
    tracing::info!(socket = %socket.display(), "running");
    let shown = Shown { health: Arc::clone(&health), metrics: Arc::clone(&metrics), config, log, dataplane };
    tokio::select! {
        () = servers.run(shown) => {}
        () = forward(snapshot, &jobs) => {}
        () = watch_keeper(keeper.get(), &health, &metrics) => {}
        () = watch_north_south(view.get(), source.as_ref(), &health, &metrics) => {}
        () = come => {}
        _ = ended => {}
    }
    // Nobody is to be told that a pod is steered by an agent that is about to end. On a thread of its own: requests
    // under way may wait for this one.
    let _ = tokio::task::spawn_blocking(move || drop(server)).await;
    let _ = jobs.send(Job::End);
    if let Some(north_south) = north_south {
        north_south
            .end()
            .context("the loop that programs north-south has failed; what is programmed stays")?;
    }
    let is_meant = ending.has_come();
    if worker.join().is_err() {
        bail!("the loop that attaches pods has failed; what is attached stays attached");
    }
    if !is_meant {
        bail!("the loop that attaches pods has ended by itself; what is attached stays attached");
    }
    tracing::info!("ended; what is attached stays attached");
    Ok(())
}

/// Starts to learn of pods, and of these Services if there are any to handle.
async fn start_source(
    choice: SourceChoice,
    services: Option<Selection>,
    lost_events: Counter,
) -> Result<(Arc<dyn Source>, Option<Cluster>)> {
    Ok(match choice {
        SourceChoice::Kubernetes { node, kubeconfig } => {
            let client = kube::connect(kubeconfig.as_deref()).await?;
            let timing = kube::Timing::default();
            let cluster = services.map(|services| ClusterSource::start(&client, services, timing));
            let source = KubeSource::start(client, &node, timing, lost_events)?;
            (Arc::new(source), cluster.map(Cluster::Api))
        }
        SourceChoice::Manifests { directory, node } => {
            let timing = manifests::Timing::default();
            let source = ManifestSource::start(&directory, node.as_deref(), timing);
            let cluster = services.map(|services| ClusterFiles::start(&source, services));
            (Arc::new(source), cluster.map(Cluster::Files))
        }
    })
}

/// Wakes the loop when the source has something to tell.
async fn forward(mut snapshot: watch::Receiver<Snapshot>, jobs: &Sender<Job>) {
    while snapshot.changed().await.is_ok() {
        if jobs.send(Job::Changed).is_err() {
            break;
        }
    }
    // Whoever else has an end to tell is to tell it.
    std::future::pending().await
}

/// Tells how the CNI plugin is installed, if that is the agent's to do.
async fn watch_keeper(keeper: Option<&Keeper>, health: &Health, metrics: &AgentMetrics) {
    let Some(keeper) = keeper else { return std::future::pending().await };
    let mut counted = 0;
    loop {
        let Installation { is_chained, words, repairs } = keeper.installation();
        health.set_cni((!is_chained).then_some(words));
        metrics.set_chained(is_chained);
        (counted..repairs).for_each(|_| metrics.repaired());
        counted = repairs;
        tokio::time::sleep(STANDING_POLL).await;
    }
}

/// Tells what keeps north-south from its work, and whose wishes it cannot fulfil, if that is the agent's to do.
async fn watch_north_south(
    view: Option<&View>,
    source: &dyn Source,
    health: &Health,
    metrics: &AgentMetrics,
) {
    let Some(view) = view else { return std::future::pending().await };
    loop {
        let standing = view.standing();
        metrics.set_north_south(&standing);
        north_south::warn(view, &standing, source);
        health.set_north_south(standing.trouble);
        tokio::time::sleep(STANDING_POLL).await;
    }
}

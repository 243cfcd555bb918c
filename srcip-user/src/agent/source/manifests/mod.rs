//! A directory of manifests as the source of pods, and of what north-south needs to know.
//!
//! - `directory`: what the files say, read again when they change. `changes`: when to look.
//! - [`cluster`]: the Services, EndpointSlices and nodes in them.
//!
//! Meant for nodes without a cluster, for tests, and for pods that another tool describes. The pods have to
//! have their UID: by that their cgroups are found.

mod changes;
pub mod cluster;
mod directory;

use std::{
    path::Path,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use anyhow::{Context as _, Result};
use futures_util::future::BoxFuture;
use tokio::{
    sync::watch,
    task::{JoinHandle, spawn_blocking},
};

pub use directory::Services;

use super::{Snapshot, Source, object::MAX_REASON, published::Published, told::Told};
use crate::{
    agent::pod::{PodInfo, PodName},
    text::beginning,
};
use changes::Changes;
use directory::Directory;

/// How often the directory is looked at, whatever changes are noticed.
#[derive(Clone, Copy, Debug)]
pub struct Timing {
    /// Without any sign of a change: there is none from behind a link, or on some file systems.
    pub rescan: Duration,
    /// How long a file has to be left alone before it is read: who writes it may not have finished.
    pub settle: Duration,
}

impl Default for Timing {
    fn default() -> Self {
        Self { rescan: Duration::from_secs(15), settle: Duration::from_millis(100) }
    }
}

/// This node's pods, from files. Its task ends with it.
#[derive(Debug)]
pub struct ManifestSource {
    shared: Arc<Shared>,
    follower: JoinHandle<()>,
}

#[derive(Debug)]
struct Shared {
    directory: Mutex<Directory>,
    published: Published,
    services: watch::Sender<Arc<Services>>,
    told: Told,
}

impl ManifestSource {
    /// Begins to learn the pods of a node from the files of a directory, which may be made later. Inside a
    /// tokio runtime. Without the name of a node, all pods are this one's.
    pub fn start(path: &Path, node: Option<&str>, timing: Timing) -> Self {
        let shared = Arc::new(Shared {
            directory: Mutex::new(Directory::new(path, node, timing.settle)),
            published: Published::default(),
            services: watch::Sender::default(),
            told: Told::default(),
        });
        let follower = tokio::spawn(follow(Arc::clone(&shared), path.into(), timing));
        Self { shared, follower }
    }

    /// The Services, EndpointSlices and nodes in the same files.
    pub fn services(&self) -> watch::Receiver<Arc<Services>> {
        self.shared.services.subscribe()
    }
}

impl Drop for ManifestSource {
    fn drop(&mut self) {
        self.follower.abort();
    }
}

impl Source for ManifestSource {
    fn watch(&self) -> watch::Receiver<Snapshot> {
        self.shared.published.subscribe()
    }

    fn fetch<'a>(&'a self, name: &'a PodName) -> BoxFuture<'a, Result<Option<PodInfo>>> {
        let (shared, name) = (Arc::clone(&self.shared), name.clone());
        Box::pin(async move {
            let found = spawn_blocking(move || {
                let directory = shared.directory.lock().unwrap_or_else(PoisonError::into_inner);
                directory.find(&name)
            });
            found.await.context("the manifests could not be read")?
        })
    }

    fn warn(&self, pod: &PodInfo, reason: &'static str, note: &str) {
        if self.shared.told.is_news(&pod.uid, reason, note) {
            tracing::warn!("pod {}: {reason}: {}", pod.name, beginning(note, MAX_REASON));
        }
    }
}

/// Keeps the snapshot for ever.
async fn follow(shared: Arc<Shared>, path: Arc<Path>, timing: Timing) {
    let mut changes = Changes::new();
    loop {
        // First, so that no change falls between.
        changes.look_at(&path);
        let reading = Arc::clone(&shared);
        let settled = spawn_blocking(move || reading.scan()).await.unwrap_or(true);
        if settled {
            changes.wait(timing.rescan).await;
        }
        tokio::time::sleep(timing.settle).await;
    }
}

impl Shared {
    /// Reads what has changed. Returns false if a file was too young.
    fn scan(&self) -> bool {
        let mut directory = self.directory.lock().unwrap_or_else(PoisonError::into_inner);
        match directory.scan() {
            Ok(scan) => {
                self.published.trouble(scan.trouble.as_deref());
                self.published.replace(scan.pods, scan.complete);
                self.services.send_if_modified(|services| {
                    let changed = **services != scan.services;
                    if changed {
                        *services = Arc::new(scan.services);
                    }
                    changed
                });
                scan.settled
            }
            Err(error) => {
                self.published.trouble(Some(&format!("{error:#}")));
                true
            }
        }
    }
}

//! What north-south needs to know, from the same files.

use std::sync::Arc;

use tokio::{sync::watch, task::JoinHandle};

use super::{ManifestSource, Services};
use crate::northsouth::{
    objects::{Objects, gather::Gathered},
    select::Selection,
};

/// The Services, EndpointSlices and nodes of a directory. Its task ends with it.
pub struct ClusterFiles {
    gathered: Gathered,
    follower: JoinHandle<()>,
}

impl ClusterFiles {
    /// Begins to learn what a source reads. Inside a tokio runtime.
    pub fn start(source: &ManifestSource, selection: Selection) -> Self {
        let gathered = Gathered::new(selection);
        let follower = tokio::spawn(follow(source.services(), gathered.clone()));
        Self { gathered, follower }
    }

    /// What is known, now and from now on.
    pub fn watch(&self) -> watch::Receiver<Arc<Objects>> {
        self.gathered.watch()
    }
}

impl Drop for ClusterFiles {
    fn drop(&mut self) {
        self.follower.abort();
    }
}

async fn follow(mut files: watch::Receiver<Arc<Services>>, gathered: Gathered) {
    let mut was_complete = false;
    loop {
        let Services { complete, services, endpoint_slices, nodes } = (**files.borrow_and_update()).clone();
        // Until each file has been read once, an object may be in one that has not.
        was_complete |= complete;
        if was_complete {
            gathered.replace_all(services, endpoint_slices, nodes);
        }
        if files.changed().await.is_err() {
            return;
        }
    }
}

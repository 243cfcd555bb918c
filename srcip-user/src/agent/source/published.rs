//! What a source tells those that watch it.

use std::sync::Arc;

use tokio::sync::watch;

use super::{Pods, Snapshot, object::MAX_REASON};
use crate::{
    agent::pod::{PodInfo, PodUid},
    text::beginning,
};

/// The snapshot, changed in place. Who watches is woken only by a difference.
#[derive(Debug, Default)]
pub(super) struct Published(watch::Sender<Snapshot>);

impl Published {
    /// The snapshot, now and from now on.
    pub(super) fn subscribe(&self) -> watch::Receiver<Snapshot> {
        self.0.subscribe()
    }

    /// The pods as they are known now.
    pub(super) fn pods(&self) -> Arc<Pods> {
        Arc::clone(&self.0.borrow().pods)
    }

    /// All pods there are, or, if not `complete`, those that are known so far. What was complete once stays so.
    pub(super) fn replace(&self, pods: Pods, complete: bool) {
        self.0.send_if_modified(|snapshot| {
            let synced = snapshot.synced || complete;
            let changed = *snapshot.pods != pods || snapshot.synced != synced;
            if changed {
                snapshot.pods = Arc::new(pods);
                snapshot.synced = synced;
            }
            changed
        });
    }

    /// A pod that is new or has changed.
    pub(super) fn put(&self, pod: PodInfo) {
        self.0.send_if_modified(|snapshot| {
            let changed = snapshot.pods.get(&pod.uid).is_none_or(|known| **known != pod);
            if changed {
                Arc::make_mut(&mut snapshot.pods).insert(pod.uid.clone(), Arc::new(pod));
            }
            changed
        });
    }

    /// A pod that is gone.
    pub(super) fn remove(&self, uid: &PodUid) {
        self.0.send_if_modified(|snapshot| {
            let known = snapshot.pods.contains_key(uid);
            if known {
                Arc::make_mut(&mut snapshot.pods).remove(uid);
            }
            known
        });
    }

    /// Why the source cannot be read; `None` if it can be again.
    pub(super) fn trouble(&self, why: Option<&str>) {
        let why: Option<Arc<str>> = why.map(|why| beginning(why, MAX_REASON).into());
        self.0.send_if_modified(|snapshot| {
            let changed = snapshot.trouble != why;
            if changed {
                match &why {
                    Some(why) => tracing::warn!("pods cannot be learned just now: {why}"),
                    None => tracing::info!("pods can be learned again"),
                }
                snapshot.trouble = why;
            }
            changed
        });
    }
}

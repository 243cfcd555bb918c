//! When a directory has changed.

use std::{path::Path, time::Duration};

use nix::sys::inotify::WatchDescriptor;
use tokio::{
    io::{Interest, unix::AsyncFd},
    time::{sleep, timeout},
};

use crate::inotify::DirectoryWatch;

/// Notices changes in one directory. Where the kernel has no instance of inotify left, nothing is noticed,
/// and only time passes.
#[derive(Debug)]
pub(super) struct Changes {
    watch: Option<AsyncFd<DirectoryWatch>>,
    watched: Option<WatchDescriptor>,
}

impl Changes {
    /// Inside a tokio runtime.
    pub(super) fn new() -> Self {
        let register = |watch| {
            // SAFETY: the watch owns its descriptor, which is neither closed nor replaced before it is dropped.
            unsafe { AsyncFd::register_with_interest(watch, Interest::READABLE) }
        };
        let watch = DirectoryWatch::new().and_then(|watch| Ok(register(watch)?));
        let watch = watch.inspect_err(|error| {
            tracing::warn!("manifests are only looked at from time to time: no inotify: {error}");
        });
        Self { watch: watch.ok(), watched: None }
    }

    /// Watches the directory that is at `path` now: it may be another one than before.
    pub(super) fn look_at(&mut self, path: &Path) {
        let Some(watch) = &self.watch else { return };
        let watched = watch.get_ref().add(path);
        if let Some(before) = self.watched.filter(|before| watched != Some(*before)) {
            watch.get_ref().remove(before);
        }
        self.watched = watched;
    }

    /// Waits for a change, at most so long.
    pub(super) async fn wait(&self, limit: Duration) {
        let Some(watch) = &self.watch else {
            sleep(limit).await;
            return;
        };
        let Ok(Ok(mut ready)) = timeout(limit, watch.readable()).await else { return };
        if watch.get_ref().drain() {
            ready.clear_ready();
        }
    }
}

//! The loop that plans and acts, on a thread of its own: nothing else changes the data plane.
//!
//! Each round looks at everything again. Requests of the CNI plugin do not wait for the end of a round: they
//! are served between two actions.

mod round;
#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{
        Arc,
        mpsc::{Receiver, RecvTimeoutError, SyncSender},
    },
    time::{Duration, Instant},
};

use tokio::sync::watch;

use super::{
    backend::{Backend, Target},
    board::Board,
    config::Config,
    decide::Wanted,
    pod::{PodName, PodUid},
    reconcile::Condition,
    source::{Snapshot, Source},
};
use crate::{
    cni::attachment::ContainerId,
    dataplane::error::{Error, chain},
    netns::{Netns, NetnsCookie},
};

/// The longest that the loop is silent while nothing happens.
pub const MAX_SILENCE: Duration = Duration::from_secs(5);
/// How soon a pod that has no network namespace yet is looked for again; it doubles up to the longest.
const FIRST_LOOK: Duration = Duration::from_millis(250);
const LAST_LOOK: Duration = Duration::from_secs(8);
/// How soon what failed is tried again; it doubles up to the longest.
const FIRST_RETRY: Duration = Duration::from_secs(1);
const LAST_RETRY: Duration = Duration::from_secs(60);
/// How often a pod that drains is looked at.
const DRAIN_LOOK: Duration = Duration::from_millis(500);
/// A round is not begun sooner after the one before it, whatever is asked.
const PAUSE: Duration = Duration::from_millis(100);
/// A sandbox that the plugin was told to take down is gone by then.
const TEARDOWN: Duration = Duration::from_secs(2);

/// What others ask of the loop.
#[derive(Debug)]
pub enum Job {
    /// The source has something to tell.
    Changed,
    /// The plugin wants a pod steered before it starts.
    Add(Box<Add>),
    /// The plugin wants to know whether a pod is steered.
    Check {
        /// Its network namespace.
        netns: Netns,
        /// Takes what is wrong with it; nothing if it is steered.
        reply: SyncSender<Option<String>>,
    },
    /// A sandbox is about to go.
    Del(ContainerId),
    /// The end.
    End,
}

/// See [`Job::Add`].
#[derive(Debug)]
pub struct Add {
    /// The sandbox.
    pub container: ContainerId,
    /// Its network namespace.
    pub netns: Netns,
    /// The pod, by the UID that the node knows it by.
    pub uid: PodUid,
    /// Its name.
    pub name: PodName,
    /// How to steer it.
    pub wanted: Wanted,
    /// After this nobody waits for it any more.
    pub deadline: Instant,
    /// Takes the result.
    pub reply: SyncSender<Result<(), String>>,
}

/// What can fail: something with a pod's network namespace, or finding that.
type Subject = (PodUid, Option<NetnsCookie>);

/// Something that has failed, and when to try it again.
#[derive(Debug)]
struct Failure {
    retry: Instant,
    pause: Duration,
    message: String,
}

/// What the loop tells of itself.
pub trait Observer: Send {
    /// It is alive, and about to do this.
    fn beat(&self, doing: &'static str);
    /// An action has been taken.
    fn acted(&self, kind: &'static str, took: Duration, succeeded: bool);
    /// A round is over.
    fn round(&self, board: &Board, snapshot: &Snapshot);
}

/// The loop.
pub struct Worker<B> {
    backend: B,
    config: Arc<Config>,
    source: Arc<dyn Source>,
    snapshot: watch::Receiver<Snapshot>,
    board: Arc<Board>,
    observer: Box<dyn Observer>,
    /// Pods that the plugin has announced and the source has not told of. However long that takes: they are there as
    /// long as their network namespaces are.
    announced: BTreeSet<PodUid>,
    /// Sandboxes that the plugin has told of.
    sandboxes: BTreeMap<ContainerId, NetnsCookie>,
    failures: BTreeMap<Subject, Failure>,
    /// Whose attachments there are: nobody else is believed to be that pod.
    owners: BTreeMap<PodUid, PodName>,
    /// Pods that requests were about since the round began: what was planned for them no longer holds.
    touched: BTreeSet<PodUid>,
    /// Until when pods may drain.
    draining: BTreeMap<NetnsCookie, Instant>,
    /// How long to wait before looking for network namespaces again.
    look_pause: Duration,
    next_look: Instant,
    next_resync: Instant,
    next_round: Instant,
    last_round: Instant,
    upgraded: bool,
}

impl<B> std::fmt::Debug for Worker<B> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Worker").finish_non_exhaustive()
    }
}

impl<B: Backend> Worker<B> {
    /// Makes it ready to run.
    pub fn new(
        backend: B,
        config: Arc<Config>,
        source: Arc<dyn Source>,
        board: Arc<Board>,
        observer: Box<dyn Observer>,
    ) -> Self {
        let now = Instant::now();
        Self {
            backend,
            config,
            snapshot: source.watch(),
            source,
            board,
            observer,
            announced: BTreeSet::new(),
            sandboxes: BTreeMap::new(),
            failures: BTreeMap::new(),
            owners: BTreeMap::new(),
            touched: BTreeSet::new(),
            draining: BTreeMap::new(),
            look_pause: FIRST_LOOK,
            next_look: now,
            next_resync: now,
            next_round: now,
            last_round: now,
            upgraded: false,
        }
    }

    /// Runs until it is told to end, or nobody is left who could tell it anything. What is attached stays.
    pub fn run(mut self, jobs: &Receiver<Job>) {
        loop {
            self.observer.beat("waiting");
            let wait = self.next_round.saturating_duration_since(Instant::now()).min(MAX_SILENCE);
            match jobs.recv_timeout(wait) {
                Ok(job) => {
                    if !self.serve(job) {
                        return;
                    }
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
            if !self.serve_waiting(jobs) {
                return;
            }
            if Instant::now() >= self.next_round && !self.round(jobs) {
                return;
            }
        }
    }

    /// Serves all requests that wait; tells whether to go on.
    fn serve_waiting(&mut self, jobs: &Receiver<Job>) -> bool {
        while let Ok(job) = jobs.try_recv() {
            if !self.serve(job) {
                return false;
            }
        }
        true
    }

    /// Serves one request; tells whether to go on.
    fn serve(&mut self, job: Job) -> bool {
        self.observer.beat("a request");
        match job {
            Job::Changed => self.next_round = self.next_round.min(self.last_round + PAUSE),
            Job::Add(add) => {
                let Add { container, netns, uid, name, wanted, deadline, reply } = *add;
                let result = if Instant::now() < deadline {
                    self.add(container, netns, uid, name, wanted)
                } else {
                    Err("the agent was busy for too long".to_owned())
                };
                // The plugin may have gone meanwhile; the next round takes back what nobody wants.
                let _ = reply.try_send(result);
            }
            Job::Check { netns, reply } => {
                let _ = reply.try_send(self.check(&netns));
            }
            Job::Del(container) => self.del(&container),
            Job::End => return false,
        }
        true
    }

    fn add(
        &mut self,
        container: ContainerId,
        netns: Netns,
        uid: PodUid,
        name: PodName,
        wanted: Wanted,
    ) -> Result<(), String> {
        let path = netns.path().display().to_string();
        let netns = self.backend.offer(netns).map_err(|error| chain(&error))?;
        if !self.snapshot.borrow().pods.values().any(|pod| pod.node_uid == uid) {
            self.announced.insert(uid.clone());
        }
        // Its name may be that of a pod before it, whose attachment would be in the way.
        self.make_room(&name, netns);
        let target = Target { uid, name, netns, wanted };
        let result = self.attach(&target, "attach");
        match &result {
            Ok(()) => {
                tracing::info!(pod = %target.name, netns = path, "steered before it starts");
                self.sandboxes.insert(container, netns);
                self.owners.insert(target.uid.clone(), target.name.clone());
            }
            Err(error) => {
                tracing::error!(pod = %target.name, netns = path, "not steered: {error}");
            }
        }
        self.touched.insert(target.uid);
        self.next_round = self.next_round.min(self.last_round + PAUSE);
        result
    }

    fn make_room(&mut self, name: &PodName, netns: NetnsCookie) {
        let attachments = match self.backend.attachments() {
            Ok(attachments) => attachments,
            // The attach that follows will say it.
            Err(error) => return tracing::debug!("{}", chain(&error)),
        };
        for (other, attachment) in attachments {
            if attachment.name == *name
                && other != netns
                && let Err(error) = self.backend.forget(other)
            {
                tracing::warn!(pod = %name, "what an earlier pod by this name left stays: {}", chain(&error));
            }
        }
    }

    fn attach(&mut self, target: &Target, kind: &'static str) -> Result<(), String> {
        let started = Instant::now();
        let result = self.backend.attach(target, &self.config);
        self.observer.acted(kind, started.elapsed(), result.is_ok());
        let warnings = result.map_err(|error| chain(&error))?;
        for warning in warnings {
            tracing::warn!(pod = %target.name, "{warning}");
        }
        Ok(())
    }

    fn check(&mut self, netns: &Netns) -> Option<String> {
        let looked = netns.cookie().map_err(Error::from).and_then(|cookie| {
            let attachments = self.backend.attachments()?;
            Ok(attachments.get(&cookie).map(|attachment| attachment.condition))
        });
        if !matches!(looked, Ok(Some(Condition::Steering))) {
            // Not left for the next resync.
            self.next_round = self.next_round.min(self.last_round + PAUSE);
        }
        match looked {
            Ok(Some(Condition::Steering)) => None,
            Ok(Some(Condition::Draining)) => Some("it is being detached".to_owned()),
            Ok(Some(_)) => Some("its programs are not all in place".to_owned()),
            Ok(None) => Some("it is not attached".to_owned()),
            Err(error) => Some(chain(&error)),
        }
    }

    fn del(&mut self, container: &ContainerId) {
        let Some(netns) = self.sandboxes.remove(container) else {
            // Of an earlier agent's time, or none of ours: the namespace is about to go, and will be missed.
            self.next_round = self.next_round.min(Instant::now() + TEARDOWN);
            return;
        };
        // Connections end with the sandbox; there is nothing to wait for.
        let forgotten = self.backend.attachments().and_then(|attachments| match attachments.get(&netns) {
            Some(attachment) => {
                self.touched.insert(attachment.uid.clone());
                self.backend.forget(netns)
            }
            None => Ok(()),
        });
        if let Err(error) = forgotten {
            tracing::warn!("{}", chain(&error));
            self.next_round = self.next_round.min(Instant::now() + TEARDOWN);
        }
    }
}

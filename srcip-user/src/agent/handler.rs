//! Answers what the CNI plugin and the command line ask.
//!
//! Whether a pod is to be steered is decided here, without waiting for the loop: a pod that is not costs
//! nothing but the question.

use std::{
    sync::{
        Arc, OnceLock,
        mpsc::{Sender, sync_channel},
    },
    time::{Duration, Instant},
};

use tokio::{runtime::Handle, sync::watch, time::timeout};

use super::{
    admin::Handler,
    board::{Board, PodState},
    config::Config,
    decide::{Ask, Decision, Problem, asks_for_steering, decide},
    health::Health,
    metrics::AgentMetrics,
    north_south,
    pod::{PodInfo, PodName, is_kept},
    protocol::{
        AddAnswer, AddRequest, AgentStatus, CheckAnswer, CheckRequest, DelRequest, Note, PodProblem, PodRef,
    },
    source::{Snapshot, Source},
    worker::{Add, Job},
};
use crate::{cni::keep::Keeper, logging::LogControl, netns::Netns, northsouth::run::View};

/// What an answer takes to get back to the plugin; by then it must be there.
const ANSWER: Duration = Duration::from_millis(200);
/// How long looking over a pod may take.
const CHECK: Duration = Duration::from_secs(10);

/// See the module.
pub struct AgentHandler {
    /// The loop's requests.
    pub jobs: Sender<Job>,
    /// Where pods are learned from.
    pub source: Arc<dyn Source>,
    /// What it knows.
    pub snapshot: watch::Receiver<Snapshot>,
    /// Where it is asked.
    pub runtime: Handle,
    /// What the agent is to do.
    pub config: Arc<Config>,
    /// How the pods stand.
    pub board: Arc<Board>,
    /// How the agent is.
    pub health: Arc<Health>,
    /// What is logged.
    pub log: Arc<LogControl>,
    /// Since when it runs.
    pub started: Instant,
    /// What is counted.
    pub metrics: Arc<AgentMetrics>,
    /// Who keeps the plugin installed, if the agent does that.
    pub keeper: Arc<OnceLock<Keeper>>,
    /// How north-south stands, if the agent does that.
    pub north_south: Arc<OnceLock<View>>,
}

impl std::fmt::Debug for AgentHandler {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("AgentHandler").finish_non_exhaustive()
    }
}

impl AgentHandler {
    /// The pod that the plugin means.
    ///
    /// The source's snapshot lags behind the kubelet, which acts upon a pod the moment it is bound to the
    /// node. The runtime tells the annotations, if it can, and only what depends on labels has to be asked for.
    fn resolve(&self, request: &AddRequest, deadline: Instant) -> Result<PodInfo, String> {
        if let Some(pod) = self.known(&request.pod) {
            return Ok(pod);
        }
        let told = self.told_by_runtime(request);
        if let Some(pod) = told.as_ref().filter(|pod| self.needs_no_labels(pod)) {
            return Ok(pod.clone());
        }
        let wait = deadline.saturating_duration_since(Instant::now());
        let name = &request.pod.name;
        let fetched = self.runtime.block_on(async { timeout(wait, self.source.fetch(name)).await });
        let fetched = fetched.map_err(|_| "the source of pods has not answered in time".to_owned());
        match (fetched?, told) {
            (Ok(Some(pod)), _) if request.pod.uid.as_ref().is_none_or(|uid| *uid == pod.node_uid) => Ok(pod),
            // A static pod, whose mirror is made after it has started.
            (Ok(_), Some(told)) => Ok(told),
            (Ok(_), None) => Err(format!("the source of pods does not know the pod {name}")),
            (Err(error), _) => Err(format!("{error:#}")),
        }
    }

    fn known(&self, wanted: &PodRef) -> Option<PodInfo> {
        // By its name alone, it may be the one before it.
        let uid = wanted.uid.as_ref()?;
        let snapshot = self.snapshot.borrow();
        snapshot.pods.values().find(|pod| pod.node_uid == *uid).map(|pod| PodInfo::clone(pod))
    }

    fn told_by_runtime(&self, request: &AddRequest) -> Option<PodInfo> {
        let uid = request.pod.uid.clone()?;
        let annotations = request.annotations.clone()?;
        Some(PodInfo {
            name: request.pod.name.clone(),
            node_uid: uid.clone(),
            uid,
            node: None,
            labels: Default::default(),
            annotations: annotations.into_iter().filter(|(key, _)| is_kept(key)).collect(),
            // No plugin is called for such a pod.
            host_network: false,
            completed: false,
        })
    }

    fn needs_no_labels(&self, pod: &PodInfo) -> bool {
        self.config.steer.selectors.is_empty() || matches!(asks_for_steering(&pod.annotations), Ask::No(_))
    }

    fn waits_for(&self) -> Option<String> {
        let problems: Vec<String> =
            self.health.ready().checks.into_iter().filter_map(|check| check.problem).collect();
        (!problems.is_empty()).then(|| problems.join("; "))
    }

    fn steer(&self, request: AddRequest, netns: Netns) -> AddAnswer {
        let deadline = Instant::now() + request.timeout().saturating_sub(ANSWER);
        let pod = match self.resolve(&request, deadline) {
            Ok(pod) => pod,
            Err(error) => return AddAnswer::NotReady(error),
        };
        let wanted = match decide(&pod, &self.config) {
            Decision::Steer(wanted) => wanted,
            Decision::Leave(_) => return AddAnswer::NotSteered,
            Decision::Refuse(Problem { reason, note }) => {
                self.source.warn(&pod, reason, &note);
                return AddAnswer::Refused(Note { reason: reason.to_owned(), note });
            }
        };
        let (reply, answer) = sync_channel(1);
        let add = Add {
            container: request.attachment.container_id,
            netns,
            uid: pod.node_uid,
            name: pod.name,
            wanted,
            deadline,
            reply,
        };
        if self.jobs.send(Job::Add(Box::new(add))).is_err() {
            return AddAnswer::NotReady("the agent is about to end".to_owned());
        }
        match answer.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(Ok(())) => AddAnswer::Steered,
            Ok(Err(error)) => AddAnswer::Failed(error),
            Err(_) => AddAnswer::NotReady("the agent is busy with other pods".to_owned()),
        }
    }

    fn look_over(&self, request: CheckRequest, netns: Netns) -> CheckAnswer {
        // A pod that is not known is not to be steered, as far as anybody can tell.
        let Some(pod) = self.known(&request.pod) else {
            return match self.snapshot.borrow().synced {
                true => CheckAnswer::Good,
                false => CheckAnswer::NotReady("the pods of this node are not known yet".to_owned()),
            };
        };
        if !matches!(decide(&pod, &self.config), Decision::Steer(_)) {
            return CheckAnswer::Good;
        }
        let (reply, answer) = sync_channel(1);
        let asked = self.jobs.send(Job::Check { netns, reply });
        match asked.ok().and_then(|()| answer.recv_timeout(CHECK).ok()) {
            Some(None) => CheckAnswer::Good,
            Some(Some(problem)) => CheckAnswer::NotSteered(problem),
            None => CheckAnswer::NotReady("the agent is busy with other pods".to_owned()),
        }
    }
}

impl Handler for AgentHandler {
    fn add(&self, request: AddRequest, netns: Netns) -> AddAnswer {
        let started = Instant::now();
        let pod = request.pod.name.clone();
        let answer = self.steer(request, netns);
        let result = match &answer {
            AddAnswer::Steered => "steered",
            AddAnswer::NotSteered => "not-steered",
            AddAnswer::Refused(_) => "refused",
            AddAnswer::NotReady(why) => {
                tracing::warn!(%pod, "the CNI plugin has to come again: {why}");
                "not-ready"
            }
            AddAnswer::Failed(_) => "failed",
        };
        self.metrics.requested("add", result, started.elapsed());
        answer
    }

    fn check(&self, request: CheckRequest, netns: Netns) -> CheckAnswer {
        let started = Instant::now();
        let answer = self.look_over(request, netns);
        let result = match &answer {
            CheckAnswer::Good => "good",
            CheckAnswer::NotReady(_) => "not-ready",
            CheckAnswer::NotSteered(_) => "not-steered",
        };
        self.metrics.requested("check", result, started.elapsed());
        answer
    }

    fn del(&self, request: DelRequest) {
        // If the loop has ended, so has the agent, and the next one looks for itself.
        let _ = self.jobs.send(Job::Del(request.container_id));
    }

    fn gc(&self) {
        // A round finds the network namespaces that have gone.
        let _ = self.jobs.send(Job::Changed);
    }

    fn status(&self) -> AgentStatus {
        let waits_for = self.waits_for();
        let standing = self.board.read();
        let problem = |(pod, state): &(_, PodState)| {
            let note = match state {
                PodState::Steered | PodState::Pending => return None,
                PodState::Refused(Problem { reason, note }) => {
                    Note { reason: (*reason).to_owned(), note: note.clone() }
                }
                PodState::Failed(message) => {
                    Note { reason: "AttachFailed".to_owned(), note: message.clone() }
                }
            };
            Some(PodProblem { pod: PodName::clone(pod), note })
        };
        AgentStatus {
            release: env!("CARGO_PKG_VERSION").to_owned(),
            uptime_seconds: self.started.elapsed().as_secs(),
            ready: waits_for.is_none(),
            waits_for,
            pods: standing.known,
            steered: standing.count(|state| *state == PodState::Steered),
            north_south: self.north_south.get().map(north_south::status),
            cni: self.keeper.get().map(|keeper| keeper.installation().words),
            problems: standing.pods.values().filter_map(problem).collect(),
            more_problems: 0,
        }
    }

    fn log_level(&self, filter: Option<String>) -> Result<String, String> {
        match filter {
            Some(filter) => self.log.set_filter(&filter).map_err(|error| error.to_string()),
            None => Ok(self.log.filter()),
        }
    }
}

//! One round: what should be, what is, and the steps between.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, mpsc::Receiver},
    time::{Duration, Instant},
};

use super::{
    DRAIN_LOOK, FIRST_LOOK, FIRST_RETRY, Failure, Job, LAST_LOOK, LAST_RETRY, PAUSE, Subject, Worker,
};
use crate::{
    agent::{
        backend::{Backend, Target},
        board::{PodState, PodStates, Standing},
        decide::{Decision, Problem, Wanted, decide, warnings},
        pod::{PodInfo, PodName, PodUid},
        reconcile::{Action, Attachment, Condition, Desired, Why, World, plan},
        source::Snapshot,
    },
    dataplane::error::{Error, chain},
    netns::NetnsCookie,
};

/// The pods to steer, by the UIDs that the node knows them by, and how.
type Wants = BTreeMap<PodUid, (Arc<PodInfo>, Wanted)>;
/// What is attached.
type Attachments = BTreeMap<NetnsCookie, Attachment<Option<Wanted>>>;

/// Whom an action is about, what it is called in metrics, and what it takes.
struct Step {
    uid: PodUid,
    name: PodName,
    kind: &'static str,
    action: Action<Wanted>,
}

impl Step {
    /// What fails if it fails.
    fn subject(&self) -> Subject {
        let (Action::Forget(netns)
        | Action::Remove(netns)
        | Action::Stop(netns)
        | Action::Finish(netns)
        | Action::Attach { netns, .. }) = self.action;
        (self.uid.clone(), Some(netns))
    }
}

impl<B: Backend> Worker<B> {
    /// One round; tells whether to go on.
    pub(super) fn round(&mut self, jobs: &Receiver<Job>) -> bool {
        self.observer.beat("looking at all pods");
        let started = Instant::now();
        self.last_round = started;
        self.touched.clear();
        let resync = started >= self.next_resync;
        if resync {
            self.next_resync = started + self.config.resync();
        }
        let snapshot = self.snapshot.borrow_and_update().clone();
        let mut standing = Standing { known: snapshot.pods.len(), ..Standing::default() };
        standing.troubles.extend(snapshot.trouble.as_deref().map(ToOwned::to_owned));
        if !snapshot.synced && standing.troubles.is_empty() {
            standing.troubles.push("the pods of this node are not known yet".to_owned());
        }
        let (wants, refused) = self.judge(&snapshot);
        let go_on = match self.act(&snapshot, &wants, resync, jobs) {
            Ok(Some(pods)) => {
                standing.pods = pods;
                true
            }
            Ok(None) => false,
            Err(error) => {
                let error = chain(&error);
                tracing::error!("{error}");
                standing.troubles.push(error);
                true
            }
        };
        let refused =
            refused.into_iter().map(|(uid, (name, problem))| (uid, (name, PodState::Refused(problem))));
        standing.pods.extend(refused);
        self.schedule(&standing);
        self.board.publish(standing);
        self.observer.round(&self.board, &snapshot);
        go_on
    }

    /// Which pods are to be steered, and which ask for it in vain; the latter are told.
    fn judge(&self, snapshot: &Snapshot) -> (Wants, BTreeMap<PodUid, (PodName, Problem)>) {
        let mut claims: BTreeMap<&PodUid, usize> = BTreeMap::new();
        snapshot.pods.values().for_each(|pod| *claims.entry(&pod.node_uid).or_default() += 1);
        let mut wants = Wants::new();
        let mut refused = BTreeMap::new();
        for (uid, pod) in snapshot.pods.iter() {
            let decision = decide(pod, &self.config);
            for Problem { reason, note } in warnings(pod, &decision) {
                self.source.warn(pod, reason, &note);
            }
            let problem = match decision {
                Decision::Leave(_) => continue,
                Decision::Refuse(problem) => problem,
                Decision::Steer(how) => {
                    // Two claim to be the same static pod: one of them has written the kubelet's annotations
                    // himself. Whoever was there before is believed.
                    let is_owner = self.owners.get(&pod.node_uid) == Some(&pod.name);
                    if claims[&pod.node_uid] == 1 || is_owner {
                        wants.insert(pod.node_uid.clone(), (Arc::clone(pod), how));
                        continue;
                    }
                    Problem {
                        reason: "DuplicateUid",
                        note: format!(
                            "it claims to be the static pod {}, and so does another pod; only one can be",
                            pod.node_uid
                        ),
                    }
                }
            };
            self.source.warn(pod, problem.reason, &problem.note);
            refused.insert(uid.clone(), (pod.name.clone(), problem));
        }
        (wants, refused)
    }

    /// Takes the steps; returns how the pods stand, nothing if the end has come.
    fn act(
        &mut self,
        snapshot: &Snapshot,
        wants: &Wants,
        resync: bool,
        jobs: &Receiver<Job>,
    ) -> Result<Option<PodStates>, Error> {
        if !self.upgraded {
            self.observer.beat("replacing programs of another build");
            self.upgraded = match self.backend.upgrade() {
                Ok(complete) => complete,
                // The maps are not ours to touch.
                Err(error @ (Error::OtherVersion { .. } | Error::OtherShape { .. })) => return Err(error),
                // What is attached works on, by the programs that are there.
                Err(error) => {
                    tracing::error!("the programs of another build stay for now: {}", chain(&error));
                    false
                }
            };
        }
        let actual = self.backend.attachments()?;
        let told: BTreeSet<&PodUid> = snapshot.pods.values().map(|pod| &pod.node_uid).collect();
        let alive = |uid: &PodUid| actual.values().any(|a| a.uid == *uid && a.condition != Condition::Gone);
        self.announced.retain(|uid| !told.contains(uid) && alive(uid));
        self.owners = actual.values().map(|a| (a.uid.clone(), a.name.clone())).collect();
        self.draining.retain(|netns, _| actual.contains_key(netns));
        self.sandboxes.retain(|_, netns| actual.contains_key(netns));

        let found = self.look(wants, &actual, resync);
        let steps = steps(&self.world(snapshot, wants, &actual, &found), &actual);
        // What is not to be done any more cannot fail any more.
        self.failures
            .retain(|subject, _| subject.1.is_none() || steps.iter().any(|step| step.subject() == *subject));
        let mut steered: BTreeSet<PodUid> = actual
            .values()
            .filter(|attachment| attachment.condition == Condition::Steering)
            .map(|attachment| attachment.uid.clone())
            .collect();
        for step in steps {
            self.observer.beat(step.kind);
            if !self.serve_waiting(jobs) {
                self.backend.close();
                return Ok(None);
            }
            let waits = |failure: &Failure| failure.retry > Instant::now();
            if self.touched.contains(&step.uid) || self.failures.get(&step.subject()).is_some_and(waits) {
                continue;
            }
            if self.take(&step) && matches!(step.action, Action::Attach { .. }) {
                steered.insert(step.uid);
            }
        }
        self.backend.close();
        let stand = |(uid, (pod, _)): (&PodUid, &(Arc<PodInfo>, Wanted))| {
            let failure = self.failures.iter().find(|((of, _), _)| of == uid);
            let state = match failure {
                _ if steered.contains(uid) => PodState::Steered,
                Some((_, failure)) => PodState::Failed(failure.message.clone()),
                None => PodState::Pending,
            };
            (uid.clone(), (pod.name.clone(), state))
        };
        Ok(Some(wants.iter().map(stand).collect()))
    }

    /// Looks for the network namespaces of pods that have no attachment, in a resync of all: one may have
    /// got another.
    fn look(&mut self, wants: &Wants, actual: &Attachments, resync: bool) -> BTreeMap<PodUid, NetnsCookie> {
        let alive = actual.values().filter(|attachment| attachment.condition != Condition::Gone);
        let attached: BTreeSet<&PodUid> = alive.map(|attachment| &attachment.uid).collect();
        let is_pending = wants.keys().any(|uid| !attached.contains(uid));
        if !is_pending {
            self.look_pause = FIRST_LOOK;
        }
        let now = Instant::now();
        if !resync && (!is_pending || now < self.next_look) {
            return BTreeMap::new();
        }
        let uids: BTreeSet<PodUid> =
            wants.keys().filter(|uid| resync || !attached.contains(uid)).cloned().collect();
        // Whether they can be found is about to be known.
        self.failures.retain(|(uid, netns), _| netns.is_some() || !uids.contains(uid));
        let looked = self.backend.find(uids);
        self.next_look = now + self.look_pause;
        self.look_pause = (self.look_pause * 2).min(LAST_LOOK);
        let looked = looked.unwrap_or_else(|error| {
            tracing::error!("cannot look for the pods' processes: {error}; is /proc the host's?");
            BTreeMap::new()
        });
        let mut found = BTreeMap::new();
        for (uid, result) in looked {
            match result {
                Ok(netns) => drop(found.insert(uid, netns)),
                Err(error) => {
                    let message = chain(&error);
                    let pause = self.fail((uid.clone(), None), &message).as_secs();
                    if let Some((pod, _)) = wants.get(&uid) {
                        tracing::error!(pod = %pod.name, "find failed, next try in {pause} s: {message}");
                    }
                }
            }
        }
        found
    }

    fn world(
        &self,
        snapshot: &Snapshot,
        wants: &Wants,
        actual: &Attachments,
        found: &BTreeMap<PodUid, NetnsCookie>,
    ) -> World<Wanted> {
        let desired = wants.iter().map(|(uid, (pod, wanted))| {
            let netns = found.get(uid).copied();
            (uid.clone(), Desired { name: pod.name.clone(), netns, wanted: wanted.clone() })
        });
        World {
            synced: snapshot.synced,
            desired: desired.collect(),
            announced: self.announced.clone(),
            actual: actual.clone(),
        }
    }

    /// Takes a step; tells whether it succeeded.
    fn take(&mut self, step: &Step) -> bool {
        let Step { uid, name, kind, action } = step;
        let started = Instant::now();
        let result = match action.clone() {
            Action::Attach { netns, wanted, .. } => {
                let target = Target { uid: uid.clone(), name: name.clone(), netns, wanted };
                let attached = self.attach(&target, kind);
                if attached.is_ok() {
                    self.draining.remove(&netns);
                }
                attached
            }
            action => {
                let done = match action {
                    Action::Forget(netns) | Action::Remove(netns) => self.backend.forget(netns),
                    Action::Stop(netns) => {
                        self.draining.insert(netns, started + self.config.drain());
                        self.backend.stop(netns)
                    }
                    Action::Finish(netns) => {
                        // Begun by an agent before this one: its time starts now.
                        let until = *self.draining.entry(netns).or_insert(started + self.config.drain());
                        match self.backend.finish(netns, until) {
                            // Looked at, not done.
                            Ok(false) => return true,
                            done => done.map(drop),
                        }
                    }
                    Action::Attach { .. } => unreachable!("handled above"),
                };
                self.observer.acted(kind, started.elapsed(), done.is_ok());
                done.map_err(|error| chain(&error))
            }
        };
        match result {
            Ok(()) => {
                tracing::info!(pod = %name, "{kind}");
                self.failures.remove(&step.subject());
                true
            }
            Err(message) => {
                let pause = self.fail(step.subject(), &message);
                tracing::error!(pod = %name, "{kind} failed, next try in {} s: {message}", pause.as_secs());
                false
            }
        }
    }

    /// Notes a failure; returns how long until the next try.
    fn fail(&mut self, subject: Subject, message: &str) -> Duration {
        let again = self.failures.get(&subject).map(|failure| (failure.pause * 2).min(LAST_RETRY));
        let pause = again.unwrap_or(FIRST_RETRY);
        let failure = Failure { retry: Instant::now() + pause, pause, message: message.to_owned() };
        self.failures.insert(subject, failure);
        pause
    }

    /// When to look again, if nobody asks before.
    fn schedule(&mut self, standing: &Standing) {
        let now = Instant::now();
        let mut next = self.next_resync;
        let is_open = |state: &PodState| matches!(state, PodState::Pending | PodState::Failed(_));
        // In the past, if nobody had to be looked for.
        if standing.count(is_open) > 0 && self.next_look > now {
            next = next.min(self.next_look);
        }
        if !self.draining.is_empty() {
            next = next.min(now + DRAIN_LOOK);
        }
        if !self.touched.is_empty() {
            next = now;
        }
        let retries = self.failures.values().map(|failure| failure.retry).filter(|retry| *retry > now);
        self.next_round = retries.fold(next, Instant::min).max(now + PAUSE);
    }
}

/// The steps, with whom each is about.
fn steps(world: &World<Wanted>, actual: &Attachments) -> Vec<Step> {
    let owner = |netns: &NetnsCookie| {
        let attachment = &actual[netns];
        (attachment.uid.clone(), attachment.name.clone())
    };
    let step = |action: Action<Wanted>| {
        let ((uid, name), kind) = match &action {
            Action::Forget(netns) => (owner(netns), "forget"),
            Action::Remove(netns) => (owner(netns), "remove"),
            Action::Stop(netns) => (owner(netns), "stop"),
            Action::Finish(netns) => (owner(netns), "detach"),
            Action::Attach { uid, name, why, .. } => {
                let kind = match why {
                    Why::New => "attach",
                    Why::Changed => "change",
                    Why::Repair => "repair",
                    Why::WantedAgain => "resume",
                };
                ((uid.clone(), name.clone()), kind)
            }
        };
        Step { uid, name, kind, action }
    };
    plan(world).into_iter().map(step).collect()
}

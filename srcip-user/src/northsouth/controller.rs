//! Brings the data plane and the health checks to what the cluster's objects want: when that changes, and
//! again, ever later, while it fails. Nothing that fails ends it: who steers pods as well goes on doing so.

use std::{
    io,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use anyhow::Result;
use tokio::{
    runtime,
    sync::{oneshot, watch},
    time::{sleep, timeout},
};

use crate::dataplane::error::Error;

use super::{
    Changes, Programmer,
    desired::Desired,
    health_check::Checks,
    model::{Here, Plan, plan},
    objects::Objects,
};

/// How long to wait after a change for those that come with it: a rollout changes many objects at once.
const GATHER: Duration = Duration::from_millis(20);
/// How soon what failed is tried again; it doubles up to the longest.
const FIRST_RETRY: Duration = Duration::from_secs(1);
const LAST_RETRY: Duration = Duration::from_secs(60);
/// Longer than anything lasts, and short enough for a clock.
const FOREVER: Duration = Duration::from_secs(1 << 32);

/// What is to be done, and how far it is.
#[derive(Clone, Debug, Default)]
pub struct Board(Arc<Mutex<Standing>>);

/// How things stand.
#[derive(Clone, Debug, Default)]
pub struct Standing {
    /// What was found to be done last.
    pub plan: Arc<Plan>,
    /// What keeps this node from its work, whatever the Services want; it is tried again.
    pub trouble: Vec<String>,
    /// What of the Services' wishes could not be done, and is tried again.
    pub left_out: Vec<String>,
    /// How often the data plane has been brought to something new.
    pub applied: u64,
}

impl Board {
    /// How things stand now.
    pub fn standing(&self) -> Standing {
        self.lock().clone()
    }

    fn lock(&self) -> MutexGuard<'_, Standing> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What there is on a node to work with. Either may fail, now or later, and is asked for again.
pub trait Node {
    /// Who programs it.
    type Programmer: Programmer;

    /// Sets the data plane up.
    fn open(&self) -> Result<Self::Programmer>;

    /// Finds what of the node takes part.
    fn here(&self) -> Result<Here>;
}

/// The loop, and what it acts on.
#[derive(Debug)]
pub struct Controller<N: Node> {
    node: N,
    programmer: Option<N::Programmer>,
    here: Option<Here>,
    checks: watch::Sender<Checks>,
    board: Board,
    /// What the data plane has been brought to, all of it.
    done: Option<Desired>,
    pause: Duration,
}

impl<N: Node> Controller<N> {
    /// Does nothing yet.
    pub fn new(node: N, checks: watch::Sender<Checks>, board: Board) -> Self {
        Self { node, programmer: None, here: None, checks, board, done: None, pause: FIRST_RETRY }
    }

    /// Follows the objects until there is nobody to change them, or nobody to `stop` it. On a thread of its own,
    /// in the node's network namespace: programming takes its time, acts on the calling thread's, and waits for
    /// the kernel by itself, so outside a runtime.
    pub fn run(
        mut self,
        mut objects: watch::Receiver<Arc<Objects>>,
        mut stop: oneshot::Receiver<()>,
    ) -> io::Result<()> {
        let runtime = runtime::Builder::new_current_thread().enable_time().build()?;
        loop {
            let current = Arc::clone(&objects.borrow_and_update());
            let pause = self.step(&current).unwrap_or(FOREVER);
            let goes_on = runtime.block_on(async {
                tokio::select! {
                    changed = timeout(pause, objects.changed()) => match changed {
                        Ok(Ok(())) => {
                            sleep(GATHER).await;
                            true
                        }
                        Ok(Err(_)) => false,
                        Err(_) => true,
                    },
                    _ = &mut stop => false,
                }
            });
            if !goes_on {
                return Ok(());
            }
        }
    }

    /// Does what these objects want. Returns when to try again what failed; nothing if all is done.
    fn step(&mut self, objects: &Objects) -> Option<Duration> {
        match self.attempt(objects) {
            Ok(true) => {
                self.pause = FIRST_RETRY;
                return None;
            }
            Ok(false) => {}
            Err(error) => {
                let trouble = vec![brief(&error)];
                let known = std::mem::replace(&mut self.board.lock().trouble, trouble.clone());
                // What the verifier says may be long: once is enough.
                let why = if known == trouble { trouble.concat() } else { format!("{error:#}") };
                tracing::error!("north-south stays as it is: {why}; trying again in {:?}", self.pause);
                self.checks.send_if_modified(|checks| std::mem::replace(&mut checks.healthy, false));
            }
        }
        let pause = self.pause;
        self.pause = (pause * 2).min(LAST_RETRY);
        Some(pause)
    }

    /// Returns whether all is done.
    fn attempt(&mut self, objects: &Objects) -> Result<bool> {
        let programmer = match &mut self.programmer {
            Some(programmer) => programmer,
            none => none.insert(self.node.open()?),
        };
        let here = match &mut self.here {
            Some(here) => here,
            none => none.insert(self.node.here()?),
        };
        // What is not known yet may still be there: what runs goes on.
        if !objects.is_synced() {
            self.board.lock().trouble.clear();
            return Ok(true);
        }
        let plan = Arc::new(plan(objects, here));
        tell_problems(&self.board, &plan);
        let mut changes = Changes::default();
        let is_done = self.done.as_ref() == Some(&plan.desired);
        if !is_done {
            self.done = None;
            changes = programmer.apply(&plan.desired)?;
            tell_changes(&changes);
        }
        let Changes { problems, missing_uplinks, .. } = changes;
        let all = problems.is_empty() && missing_uplinks.is_empty();
        if !is_done && all {
            self.done = Some(plan.desired.clone());
        }
        if !missing_uplinks.is_empty() {
            // They may come back with other numbers.
            self.here = None;
        }
        let checks = Checks { ports: plan.health_checks.clone(), healthy: missing_uplinks.is_empty() };
        self.checks.send_if_modified(|known| {
            let changed = *known != checks;
            *known = checks;
            changed
        });
        let mut standing = self.board.lock();
        standing.applied += u64::from(!is_done);
        standing.plan = plan;
        standing.trouble = missing_uplinks;
        standing.left_out = problems;
        Ok(all)
    }
}

/// An error for people who look at many things.
fn brief(error: &anyhow::Error) -> String {
    let causes = error.chain().map(|cause| match cause.downcast_ref() {
        Some(Error::Rejected { program, source, .. }) => format!(
            "the kernel refused to load the program {program}: {source}; the log has the verifier's words, and `srcip \
             doctor` tells what this kernel lacks"
        ),
        _ => cause.to_string(),
    });
    causes.collect::<Vec<_>>().join(": ")
}

fn tell_changes(changes: &Changes) {
    let (changed, removed) = (changes.changed.len(), changes.removed.len());
    tracing::debug!("the data plane: {changed} ports of Services changed, {removed} removed");
    for problem in changes.missing_uplinks.iter().chain(&changes.problems) {
        tracing::warn!("the data plane is not all that it should be: {problem}");
    }
}

/// Each problem is told once, as long as it stays.
fn tell_problems(board: &Board, plan: &Plan) {
    let before = Arc::clone(&board.lock().plan);
    for (service, problems) in &plan.problems {
        let known = before.problems.get(service);
        for problem in problems.iter().filter(|p| !known.is_some_and(|known| known.contains(p))) {
            tracing::warn!("service {service}: {}: {}", problem.reason, problem.note);
        }
    }
}

#[cfg(test)]
mod tests;

//! Where each pod stands, for those who ask: `srcip status`, `/readyz`, the CNI plugin.

use std::{
    collections::BTreeMap,
    sync::{PoisonError, RwLock, RwLockReadGuard},
};

use super::{
    decide::Problem,
    pod::{PodName, PodUid},
};

/// How far a pod has come that somebody wants to be steered.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum PodState {
    /// Its connections go to its proxy.
    Steered,
    /// Its network namespace is not known: it may not have started.
    Pending,
    /// It asks for what cannot be done.
    Refused(Problem),
    /// It could not be attached; it is tried again.
    Failed(String),
}

/// The pods that are to be steered, or ask for it in vain, by the UIDs that the node knows them by.
pub type PodStates = BTreeMap<PodUid, (PodName, PodState)>;

/// What is known at the end of each round.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Standing {
    /// How many pods of this node the source knows.
    pub known: usize,
    /// How those stand that want something.
    pub pods: PodStates,
    /// What keeps the agent from its work, in words for people; empty if nothing does.
    pub troubles: Vec<String>,
}

impl Standing {
    /// How many pods are in a state.
    pub fn count(&self, is_it: impl Fn(&PodState) -> bool) -> usize {
        self.pods.values().filter(|(_, state)| is_it(state)).count()
    }
}

/// The standing as of now. One writes, many read.
#[derive(Debug, Default)]
pub struct Board(RwLock<Standing>);

impl Board {
    /// Tells how things stand.
    pub fn publish(&self, standing: Standing) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = standing;
    }

    /// How things stand.
    pub fn read(&self) -> RwLockReadGuard<'_, Standing> {
        self.0.read().unwrap_or_else(PoisonError::into_inner)
    }
}

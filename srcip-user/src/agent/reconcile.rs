//! What to do, from what should be and what is: a pure function.
//!
//! It is told everything every time, and remembers nothing: an event that was lost or came in another order
//! makes no difference once the next look at the world is right.

use std::collections::{BTreeMap, BTreeSet};

use super::pod::{PodName, PodUid};
use crate::netns::NetnsCookie;

/// A pod that is to be steered, `W` being how.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Desired<W> {
    /// Its name.
    pub name: PodName,
    /// Its network namespace; `None` while it is not known.
    pub netns: Option<NetnsCookie>,
    /// How.
    pub wanted: W,
}

/// How far an attachment is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Condition {
    /// Steers, with all its programs in place.
    Steering,
    /// Something is missing: an attach was interrupted, or somebody removed a program.
    Broken,
    /// Steers no longer; its established connections have their return route.
    Draining,
    /// Its network namespace is gone.
    Gone,
}

/// An attachment that is the agent's; `W` is how it was asked for, as far as that can be told.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Attachment<W> {
    /// The pod it was made for.
    pub uid: PodUid,
    /// Its name.
    pub name: PodName,
    /// How it was asked for.
    pub wanted: W,
    /// How far it is.
    pub condition: Condition,
}

/// What is known, all of it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct World<W> {
    /// Whether all pods are known. If not, none is gone just because it is not there.
    pub synced: bool,
    /// The pods to steer.
    pub desired: BTreeMap<PodUid, Desired<W>>,
    /// Pods that were attached before the source told of them; they are not gone, but new.
    pub announced: BTreeSet<PodUid>,
    /// The attachments.
    pub actual: BTreeMap<NetnsCookie, Attachment<Option<W>>>,
}

/// Why a pod is attached.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Why {
    /// It was not.
    New,
    /// Other settings are wanted.
    Changed,
    /// Something was missing.
    Repair,
    /// It was about to be detached.
    WantedAgain,
}

/// A step.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Action<W> {
    /// Remove what is left of an attachment whose network namespace is gone.
    Forget(NetnsCookie),
    /// Remove an attachment at once: another one takes its place.
    Remove(NetnsCookie),
    /// Steer no longer, and begin to drain.
    Stop(NetnsCookie),
    /// See whether it has drained, and if so, remove it.
    Finish(NetnsCookie),
    /// Steer, as wanted now; on one that is there, in place.
    Attach {
        /// The pod.
        uid: PodUid,
        /// Its name.
        name: PodName,
        /// Its network namespace.
        netns: NetnsCookie,
        /// How.
        wanted: W,
        /// Why.
        why: Why,
    },
}

/// The steps that lead from what is to what should be, in the order in which they are to be taken: what goes
/// makes room, and frees names, for what comes.
pub fn plan<W: Clone + PartialEq>(world: &World<W>) -> Vec<Action<W>> {
    let mut away = Vec::new();
    let mut attach = Vec::new();
    let mut served = BTreeSet::new();
    for (&netns, attachment) in &world.actual {
        if attachment.condition == Condition::Gone {
            away.push(Action::Forget(netns));
            continue;
        }
        match world.desired.get(&attachment.uid) {
            // The pod has another sandbox now; what is left of this one is in the way.
            Some(desired) if desired.netns.is_some_and(|current| current != netns) => {
                away.push(Action::Remove(netns));
            }
            Some(desired) => {
                served.insert(&attachment.uid);
                if let Some(why) = reattach(attachment, desired) {
                    attach.push(attach_action(&attachment.uid, desired, netns, why));
                }
            }
            None if world.announced.contains(&attachment.uid) || !world.synced => {}
            None if is_replaced(world, attachment) => away.push(Action::Remove(netns)),
            None => away.push(match attachment.condition {
                Condition::Draining => Action::Finish(netns),
                _ => Action::Stop(netns),
            }),
        }
    }
    for (uid, desired) in &world.desired {
        if let Some(netns) = desired.netns.filter(|_| !served.contains(uid)) {
            attach.push(attach_action(uid, desired, netns, Why::New));
        }
    }
    away.extend(attach);
    away
}

fn attach_action<W: Clone>(uid: &PodUid, desired: &Desired<W>, netns: NetnsCookie, why: Why) -> Action<W> {
    let Desired { name, wanted, .. } = desired;
    Action::Attach { uid: uid.clone(), name: name.clone(), netns, wanted: wanted.clone(), why }
}

fn reattach<W: PartialEq>(attachment: &Attachment<Option<W>>, desired: &Desired<W>) -> Option<Why> {
    match attachment.condition {
        Condition::Broken => Some(Why::Repair),
        Condition::Draining => Some(Why::WantedAgain),
        _ if attachment.wanted.as_ref() != Some(&desired.wanted) => Some(Why::Changed),
        _ => None,
    }
}

/// Whether another pod by the same name is to be steered: a StatefulSet's, after a restart. Attachments go by
/// their pods' names, so this one cannot take its time.
fn is_replaced<W>(world: &World<W>, attachment: &Attachment<Option<W>>) -> bool {
    world.desired.values().any(|desired| desired.name == attachment.name)
}

#[cfg(test)]
mod tests;

//! Questions that somebody who looks after many pods asks of each of them, again and again: none of them
//! visits all processes, or all pods.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
};

use super::{
    Dataplane,
    error::Result,
    hooks,
    link::Link,
    record::{Record, State},
    sk_lookup, tc,
};
use crate::{netns::Netns, sysctl::Sysctls};

/// What the attachments of a node have in common, as it was at one moment: who asks after many, looks once.
#[derive(Debug)]
pub struct Common {
    hooks_are_attached: bool,
    cgroups: HashMap<PathBuf, Option<u64>>,
}

impl Common {
    fn cgroup_id(&mut self, cgroup: &Path) -> Option<u64> {
        if let Some(known) = self.cgroups.get(cgroup) {
            return *known;
        }
        *self.cgroups.entry(cgroup.to_owned()).or_insert(hooks::cgroup_id(cgroup))
    }
}

impl Dataplane {
    /// Looks at what all attachments need.
    pub fn common(&self) -> Common {
        Common { hooks_are_attached: hooks::are_attached(&self.pins), cgroups: HashMap::new() }
    }

    /// Whether an attachment's network namespace has gone.
    ///
    /// Its links know. Without any, after [`Self::stop`] or with the `tc` engine on a kernel before 5.9,
    /// the namespace is looked for.
    pub fn is_gone(&self, record: &Record) -> Result<bool> {
        let directory = self.pins.pod(record.netns_cookie);
        for name in [sk_lookup::PROGRAM, tc::COMPANION] {
            if let Some(link) = Link::open(&directory.join(name))? {
                return Ok(link.info()?.netns_inode == Some(0));
            }
        }
        Ok(self.find_netns(record).is_none())
    }

    /// What is missing of an attachment that should be complete, in words for people; all of it is put
    /// right by attaching again. Nothing is said of a pod's own programs while it drains.
    pub fn health(&self, record: &Record, common: &mut Common) -> Vec<String> {
        let looks_inside = record.engine.engine().looks_inside();
        self.missing(record, looks_inside.then(|| self.find_netns(record)).flatten().as_ref(), common)
    }

    /// The same for who has found the namespace already.
    pub(super) fn missing(&self, record: &Record, netns: Option<&Netns>, common: &mut Common) -> Vec<String> {
        let mut missing = Vec::new();
        if let Some(cgroup) = &record.cgroup
            && common.cgroup_id(cgroup) != record.cgroup_id
        {
            missing.push(format!(
                "the cgroup {} has been removed, and the hooks with it: attach again",
                cgroup.display()
            ));
        }
        if record.cgroup.is_some() && !common.hooks_are_attached {
            missing.push("hooks are missing: attach again".to_owned());
        }
        match record.state {
            State::Attaching => {
                missing.push("the attach was interrupted: attach again, or detach".to_owned());
            }
            State::Attached => missing.extend(record.engine.engine().problems(&self.pins, netns, record)),
            State::Draining => {}
        }
        missing
    }

    /// Says so if a pod's sysctls are not what they should be: somebody has changed them, or Istio's rules have
    /// come since the attach. Attaching again puts it right. Enters the namespace, which [`Self::health`] does not.
    pub fn wrong_sysctls(&self, netns: &Netns, record: &Record) -> Option<String> {
        let looked = netns.run(|| {
            let beside_istio = record.route().has_twin()?;
            Ok((Sysctls::read()?, Sysctls::needed(&record.previous_sysctls, beside_istio)))
        });
        let looked: crate::routing::Result<_> = looked.ok()?;
        let (is, should_be) = looked.ok()?;
        let wrong = is.differing(&should_be);
        (!wrong.is_empty()).then(|| format!("{} is not as it should be: attach again", wrong.join(", ")))
    }
}

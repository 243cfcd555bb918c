//! What the agent acts on: the data plane, and, in tests, something that fails when it is told to.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    io,
    path::PathBuf,
    time::Instant,
};

use super::{
    config::Config,
    decide::Wanted,
    discovery::{self, Scan},
    pod::{PodName, PodUid},
    reconcile::{Attachment, Condition},
};
use crate::{
    dataplane::{
        Dataplane,
        detach::Drain,
        error::{Error, Result, chain},
        health::Common,
        record::{AttachSpec, PodRef, Record, State},
        upgrade::Upgraded,
    },
    netns::{Netns, NetnsCookie},
};

/// A pod to attach.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Target {
    /// Its UID.
    pub uid: PodUid,
    /// Its name.
    pub name: PodName,
    /// Its network namespace.
    pub netns: NetnsCookie,
    /// How to steer it.
    pub wanted: Wanted,
}

/// What can be done with pods' network namespaces. One thread does it all.
pub trait Backend: Send {
    /// Replaces the programs that an agent of another build has left; each connection finds the old one or the new
    /// one. Tells whether all are replaced.
    fn upgrade(&mut self) -> Result<bool>;

    /// All attachments that are an agent's.
    fn attachments(&mut self) -> Result<BTreeMap<NetnsCookie, Attachment<Option<Wanted>>>>;

    /// Looks for the network namespaces of running pods; keys are the UIDs by which their cgroups go. What is
    /// found stays open until [`Self::close`]. Pods that do not run are left out.
    fn find(&mut self, uids: BTreeSet<PodUid>) -> io::Result<BTreeMap<PodUid, Result<NetnsCookie>>>;

    /// Takes a network namespace that somebody has opened; open until [`Self::close`].
    fn offer(&mut self, netns: Netns) -> Result<NetnsCookie>;

    /// Closes what [`Self::find`] and [`Self::offer`] have opened: an open namespace does not go.
    fn close(&mut self);

    /// Attaches a pod that was found or offered or is attached already, or changes it in place. Returns warnings.
    fn attach(&mut self, target: &Target, config: &Config) -> Result<Vec<String>>;

    /// Steers no longer, and begins to drain.
    fn stop(&mut self, netns: NetnsCookie) -> Result<()>;

    /// Removes a pod that drains if it has drained or `deadline` has passed; tells whether it is gone.
    fn finish(&mut self, netns: NetnsCookie, deadline: Instant) -> Result<bool>;

    /// Removes an attachment at once.
    fn forget(&mut self, netns: NetnsCookie) -> Result<()>;
}

/// The data plane of this node.
#[derive(Debug)]
pub struct NodeBackend {
    dataplane: Dataplane,
    /// Where processes are looked for: `/proc`.
    proc: PathBuf,
    open: HashMap<NetnsCookie, Netns>,
    /// As last read.
    records: BTreeMap<NetnsCookie, Record>,
    /// How often pods have been looked at for rules of others that come after their attach.
    looked_at: BTreeMap<NetnsCookie, u32>,
    /// How many may be looked at until the next resync.
    looks_left: u32,
    /// Those where such rules have come.
    disturbed: BTreeSet<NetnsCookie>,
}

/// istio-init brings its rules when a pod starts: later than after so many resyncs, there are none to come.
const LOOKS: u32 = 10;
/// How many pods are looked at in one resync: each look takes a thread inside the pod, and a full node has hundreds.
const LOOKS_AT_ONCE: u32 = 4;

impl NodeBackend {
    /// For the pods whose processes are below `proc`.
    pub fn new(dataplane: Dataplane, proc: PathBuf) -> Self {
        Self {
            dataplane,
            proc,
            open: HashMap::new(),
            records: BTreeMap::new(),
            looked_at: BTreeMap::new(),
            looks_left: 0,
            disturbed: BTreeSet::new(),
        }
    }

    /// Notes whether rules of others have come that an attach has to know of.
    fn look_at(&mut self, cookie: NetnsCookie, netns: &Netns) {
        let looks = self.looked_at.entry(cookie).or_default();
        let may_look = self.looks_left > 0 && *looks < LOOKS;
        let Some(record) = self.records.get(&cookie).filter(|_| may_look) else { return };
        *looks += 1;
        self.looks_left -= 1;
        if record.state == State::Attached && self.dataplane.wrong_sysctls(netns, record).is_some() {
            self.disturbed.insert(cookie);
        }
    }

    /// The cookie of a pod's network namespace if it is the one that is attached: asking the kernel takes a thread.
    fn known(&self, uid: &PodUid, netns: &Netns) -> Option<NetnsCookie> {
        let inode = Some(netns.id().inode());
        let is_it = |record: &&Record| {
            record.netns_inode == inode && record.pod.as_ref().is_some_and(|pod| pod.uid == uid.as_str())
        };
        let record = self.records.values().find(is_it)?;
        // The number of one that has gone may have been given again.
        (!self.dataplane.is_gone(record).ok()?).then_some(record.netns_cookie)
    }

    fn record(&self, netns: NetnsCookie) -> Result<&Record> {
        self.records.get(&netns).ok_or_else(|| Error::NotAttached(format!("network namespace {netns}")))
    }

    fn condition(&self, record: &Record, common: &mut Common) -> Condition {
        match self.dataplane.is_gone(record) {
            Ok(true) => Condition::Gone,
            _ if record.state == State::Draining => Condition::Draining,
            Ok(false)
                if !self.disturbed.contains(&record.netns_cookie)
                    && self.dataplane.health(record, common).is_empty() =>
            {
                Condition::Steering
            }
            // Attaching again finds out.
            _ => Condition::Broken,
        }
    }
}

impl Backend for NodeBackend {
    fn upgrade(&mut self) -> Result<bool> {
        let Upgraded { replaced, failed } = self.dataplane.upgrade()?;
        if !replaced.is_empty() {
            tracing::info!("{} programs of another build replaced", replaced.len());
        }
        for (name, error) in &failed {
            tracing::error!("{name} keeps a program of another build, which works on: {}", chain(error));
        }
        Ok(failed.is_empty())
    }

    fn attachments(&mut self) -> Result<BTreeMap<NetnsCookie, Attachment<Option<Wanted>>>> {
        let records = self.dataplane.records()?;
        self.records = records.into_iter().map(|record| (record.netns_cookie, record)).collect();
        self.looked_at.retain(|netns, _| self.records.contains_key(netns));
        self.disturbed.retain(|netns| self.records.contains_key(netns));
        let mut common = self.dataplane.common();
        let attachment = |(netns, record): (&NetnsCookie, &Record)| {
            let pod = record.pod.as_ref()?;
            let attachment = Attachment {
                uid: PodUid::new(&pod.uid)?,
                name: PodName::new(&pod.namespace, &pod.name)?,
                wanted: wanted(record),
                condition: self.condition(record, &mut common),
            };
            Some((*netns, attachment))
        };
        Ok(self.records.iter().filter_map(attachment).collect())
    }

    fn find(&mut self, uids: BTreeSet<PodUid>) -> io::Result<BTreeMap<PodUid, Result<NetnsCookie>>> {
        self.looks_left = LOOKS_AT_ONCE;
        let Scan { found, failed } = discovery::scan(&self.proc, &uids)?;
        let found = found.into_iter().map(|(uid, netns)| {
            let cookie = match self.known(&uid, &netns) {
                Some(cookie) => {
                    self.look_at(cookie, &netns);
                    Ok(cookie)
                }
                None => self.offer(netns),
            };
            (uid, cookie)
        });
        let found: BTreeMap<_, _> = found.collect();
        Ok(failed.into_iter().map(|(uid, error)| (uid, Err(error.into()))).chain(found).collect())
    }

    fn offer(&mut self, netns: Netns) -> Result<NetnsCookie> {
        let cookie = netns.cookie()?;
        self.open.insert(cookie, netns);
        Ok(cookie)
    }

    fn close(&mut self) {
        self.open.clear();
    }

    fn attach(&mut self, target: &Target, config: &Config) -> Result<Vec<String>> {
        let netns = match self.open.remove(&target.netns) {
            Some(netns) => netns,
            None => {
                let record = self.record(target.netns)?;
                let gone =
                    || Error::NotAttached(format!("{}, whose network namespace has gone,", record.name));
                self.dataplane.find_netns(record).ok_or_else(gone)?
            }
        };
        let Target { uid, name, wanted, .. } = target;
        let attached = self.dataplane.attach(AttachSpec {
            netns,
            name: Some(name.to_string()),
            pod: Some(PodRef {
                namespace: name.namespace.to_string(),
                name: name.name.to_string(),
                uid: uid.to_string(),
            }),
            settings: wanted.settings.clone(),
            engine: wanted.engine,
            tc_hook: None,
            cgroup: config.cgroup.clone(),
            host_netns: false,
        })?;
        self.disturbed.remove(&target.netns);
        Ok(attached.warnings)
    }

    fn stop(&mut self, netns: NetnsCookie) -> Result<()> {
        self.dataplane.stop(self.record(netns)?)
    }

    fn finish(&mut self, netns: NetnsCookie, deadline: Instant) -> Result<bool> {
        Ok(matches!(self.dataplane.try_finish(self.record(netns)?, deadline)?, Drain::Done(_)))
    }

    fn forget(&mut self, netns: NetnsCookie) -> Result<()> {
        self.dataplane.forget(self.record(netns)?)
    }
}

/// How an attachment was asked for.
fn wanted(record: &Record) -> Option<Wanted> {
    Some(Wanted { settings: record.settings()?, engine: record.engine_wanted })
}

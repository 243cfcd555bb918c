//! The network namespaces of pods that are running already, from `/proc` and cgroups: no container runtime
//! is asked.
//!
//! A process belongs to the pod whose cgroup it is in. Within a pod, processes may be in namespaces of their
//! own making; the pod's is that of its sandbox, the oldest process that was started from outside.

mod cgroup;
mod process;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fs, io,
    path::Path,
};

use self::process::{Process, Reader};
use super::pod::PodUid;
use crate::netns::{Netns, NetnsError, NetnsId};

/// How many of a pod's processes are tried: the sandbox and its containers' first ones.
const MAX_CANDIDATES: usize = 16;

/// What a look around has brought.
#[derive(Debug, Default)]
pub struct Scan {
    /// The network namespaces of the pods that run, by the UID that their cgroups have.
    pub found: BTreeMap<PodUid, Netns>,
    /// Pods that run, but whose namespace could not be opened.
    pub failed: BTreeMap<PodUid, NetnsError>,
}

/// Looks for the pods with these UIDs, which are those of cgroups
/// ([`PodInfo::node_uid`](super::pod::PodInfo::node_uid)).
///
/// `proc` is the host's `/proc`. Needs `CAP_SYS_PTRACE` to open the namespaces of other users' processes.
/// Fails if `proc` cannot be read; processes that end meanwhile are no error.
pub fn scan(proc: &Path, wanted: &BTreeSet<PodUid>) -> io::Result<Scan> {
    if wanted.is_empty() {
        return Ok(Scan::default());
    }
    let hosts = ["1", "self"].map(|process| Netns::open(&proc.join(process).join("ns/net")));
    let hosts: Vec<NetnsId> = hosts.iter().flatten().map(Netns::id).collect();
    let mut reader = Reader::new(proc);
    let mut scan = Scan::default();
    for (uid, candidates) in candidates(&mut reader, wanted)? {
        for candidate in candidates.into_iter().take(MAX_CANDIDATES) {
            match open(&mut reader, uid, &candidate, &hosts) {
                Ok(Some(netns)) => {
                    scan.found.insert(uid.clone(), netns);
                    scan.failed.remove(uid);
                    break;
                }
                Ok(None) => {}
                Err(error) => {
                    scan.failed.entry(uid.clone()).or_insert(error);
                }
            }
        }
    }
    Ok(scan)
}

/// The namespace of a process, if that is still there, still the same one, and not on the host's network.
fn open(
    reader: &mut Reader,
    uid: &PodUid,
    process: &Process,
    hosts: &[NetnsId],
) -> Result<Option<Netns>, NetnsError> {
    let netns = match Netns::open(&reader.path(process.pid, "ns/net")) {
        Ok(netns) => netns,
        Err(NetnsError::NotFound(_)) => return Ok(None),
        Err(error) => return Err(error),
    };
    // Once more, now that the namespace is held: another process may have got the number meanwhile.
    let is_same = reader.process(process.pid).as_ref() == Some(process)
        && reader.pod(process.pid).is_some_and(|pod| pod == cgroup::normal(uid.as_str()));
    Ok((is_same && !hosts.contains(&netns.id())).then_some(netns))
}

/// The processes of each pod that were started from outside of it, the oldest first.
fn candidates<'a>(
    reader: &mut Reader,
    wanted: &'a BTreeSet<PodUid>,
) -> io::Result<BTreeMap<&'a PodUid, Vec<Process>>> {
    let by_text: HashMap<String, &PodUid> =
        wanted.iter().map(|uid| (cgroup::normal(uid.as_str()), uid)).collect();
    let mut members: HashMap<u32, &PodUid> = HashMap::new();
    for entry in fs::read_dir(reader.root())? {
        let Some(pid) = entry?.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        if let Some(uid) = reader.pod(pid).and_then(|text| by_text.get(&text)) {
            members.insert(pid, uid);
        }
    }
    let mut candidates: BTreeMap<&PodUid, Vec<Process>> = BTreeMap::new();
    for (pid, uid) in &members {
        let Some(process) = reader.process(*pid) else { continue };
        if members.get(&process.parent) != Some(uid) {
            candidates.entry(uid).or_default().push(process);
        }
    }
    for processes in candidates.values_mut() {
        processes.sort_unstable_by_key(|process| (process.started, process.pid));
    }
    Ok(candidates)
}

#[cfg(test)]
mod tests;

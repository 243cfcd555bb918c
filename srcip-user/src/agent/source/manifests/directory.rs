//! What the files of a directory say. A file is read when it is new or has changed; what it said before holds
//! as long as it cannot be read.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, Metadata},
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::{Result, bail};
use k8s_openapi::api::{
    core::v1::{Node, Service},
    discovery::v1::EndpointSlice,
};
use serde::de::DeserializeOwned;

use crate::{
    agent::{
        pod::{CONFIG_HASH, PodInfo, PodName, PodUid},
        source::{
            MAX_PODS, Pods,
            object::{self, MAX_REASON, Refused},
        },
    },
    manifests::{self, Object},
    text::beginning,
};

/// How large a file may be, in bytes.
const MAX_FILE: u64 = 16 << 20;

/// What all files say of the cluster.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Services {
    /// Whether each file has been read once.
    pub complete: bool,
    /// The Services.
    pub services: Vec<Service>,
    /// The EndpointSlices.
    pub endpoint_slices: Vec<EndpointSlice>,
    /// The nodes.
    pub nodes: Vec<Node>,
}

/// The files, as they were last read.
#[derive(Debug)]
pub(super) struct Directory {
    path: PathBuf,
    node: Option<String>,
    settle: Duration,
    files: BTreeMap<PathBuf, File>,
}

/// One file.
#[derive(Debug, Default)]
struct File {
    /// What it was when it was read; `None` if it could not be read.
    version: Option<Version>,
    /// What it said when it could last be read.
    content: Option<Content>,
    /// Why it could not be read.
    broken: Option<String>,
}

#[derive(Debug, Default)]
struct Content {
    pods: Vec<Arc<PodInfo>>,
    services: Services,
}

/// Tells a file from what it was: device, inode, size, times of change in nanoseconds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Version(u64, u64, u64, i128, i128);

impl Version {
    fn of(file: &Metadata) -> Self {
        let time =
            |seconds: i64, nanoseconds: i64| i128::from(seconds) * 1_000_000_000 + i128::from(nanoseconds);
        let modified = time(file.mtime(), file.mtime_nsec());
        Self(file.dev(), file.ino(), file.size(), modified, time(file.ctime(), file.ctime_nsec()))
    }

    /// Whether nobody has touched it for so long. A time that is yet to come says nothing.
    fn is_settled(&self, settle: Duration) -> bool {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos() as i128;
        let age = now - self.4;
        age < 0 || age >= settle.as_nanos() as i128
    }
}

/// All that the files say.
#[derive(Debug)]
pub(super) struct Scan {
    pub(super) pods: Pods,
    pub(super) services: Services,
    /// Whether each file has been read once.
    pub(super) complete: bool,
    /// Whether no file was too young to be read.
    pub(super) settled: bool,
    /// Why some file cannot be read.
    pub(super) trouble: Option<String>,
}

impl Directory {
    /// Reads nothing yet.
    pub(super) fn new(path: &Path, node: Option<&str>, settle: Duration) -> Self {
        Self { path: path.into(), node: node.map(ToOwned::to_owned), settle, files: BTreeMap::new() }
    }

    /// Reads what has changed.
    pub(super) fn scan(&mut self) -> Result<Scan> {
        let paths: BTreeSet<PathBuf> = manifests::files(&self.path)?.into_iter().collect();
        let count = self.files.len();
        self.files.retain(|path, _| paths.contains(path));
        let mut changed = self.files.len() != count;
        let mut settled = true;
        for path in paths {
            // A link that leads nowhere is a file that cannot be read.
            let version = fs::metadata(&path).ok().map(|file| Version::of(&file));
            let file = self.files.entry(path.clone()).or_default();
            if version.is_some() && file.version == version {
                continue;
            }
            if version.is_some_and(|version| !version.is_settled(self.settle)) {
                settled = false;
                continue;
            }
            changed = true;
            match manifests::read(&path, MAX_FILE) {
                // Who writes it has truncated it, and got no further.
                Ok(objects)
                    if objects.is_empty() && file.content.as_ref().is_some_and(|c| !c.pods.is_empty()) =>
                {
                    file.version = None;
                    let path = path.display();
                    file.broken =
                        Some(format!("{path} has nothing in it any more; remove it if that is meant"));
                }
                Ok(objects) => {
                    let before = file.content.take().unwrap_or_default();
                    let content = Content::new(objects, &before, &path, self.node.as_deref());
                    *file = File { version, content: Some(content), broken: None };
                }
                Err(error) => {
                    file.version = None;
                    file.broken = Some(format!("{error:#}"));
                }
            }
        }
        Ok(self.all(settled, changed))
    }

    /// Puts together what the files say. Of pods with the same UID the first one is taken.
    fn all(&self, settled: bool, say: bool) -> Scan {
        let mut pods = Pods::new();
        let mut services = Services::default();
        for (path, content) in
            self.files.iter().filter_map(|(path, file)| Some((path, file.content.as_ref()?)))
        {
            services.services.extend(content.services.services.iter().cloned());
            services.endpoint_slices.extend(content.services.endpoint_slices.iter().cloned());
            services.nodes.extend(content.services.nodes.iter().cloned());
            for pod in &content.pods {
                let why = match pods.get(&pod.uid) {
                    Some(first) => format!("pod {} has the same UID", first.name),
                    None if pods.len() >= MAX_PODS => format!("there are {MAX_PODS} pods already"),
                    None => {
                        pods.insert(pod.uid.clone(), Arc::clone(pod));
                        continue;
                    }
                };
                if say {
                    tracing::warn!("{}: pod {} is left alone: {why}", path.display(), pod.name);
                }
            }
        }
        let mut broken = self.files.values().filter_map(|file| file.broken.as_deref());
        let trouble = broken.next().map(|first| match broken.count() {
            0 => format!("{first}; what that file said before still holds"),
            more => format!("{first}; so it is with {more} more files; what they said before still holds"),
        });
        let complete = self.files.values().all(|file| file.content.is_some());
        services.complete = complete;
        Scan { pods, services, complete, settled, trouble }
    }

    /// The pod with this name, as the files have it this moment.
    pub(super) fn find(&self, name: &PodName) -> Result<Option<PodInfo>> {
        let mut unreadable = None;
        for path in manifests::files(&self.path)? {
            match manifests::read(&path, MAX_FILE) {
                Ok(objects) => {
                    let content = Content::new(objects, &Content::default(), &path, self.node.as_deref());
                    if let Some(pod) = content.pods.into_iter().find(|pod| pod.name == *name) {
                        return Ok(Some(Arc::unwrap_or_clone(pod)));
                    }
                }
                Err(error) => unreadable = Some(error),
            }
        }
        match unreadable {
            Some(error) => bail!("pod {name} is in no file that can be read: {error:#}"),
            None => Ok(None),
        }
    }
}

impl Content {
    /// Takes out of a file's objects what is of interest. A pod that cannot be read is what it was `before`.
    fn new(objects: Vec<Object>, before: &Self, path: &Path, node: Option<&str>) -> Self {
        let mut content = Self::default();
        for object in objects {
            match object.kind.as_str() {
                "Pod" => match pod(object) {
                    Ok(pod) if pod.node.as_deref().is_none_or(|on| node.is_none_or(|node| node == on)) => {
                        content.pods.push(Arc::new(pod));
                    }
                    Ok(_) => {}
                    Err(refused) => {
                        tracing::warn!("{}: {}", path.display(), refused.reason);
                        let same = before.pods.iter().find(|pod| refused.uid.as_ref() == Some(&pod.uid));
                        content.pods.extend(same.cloned());
                    }
                },
                "Service" => content.services.services.extend(typed(object, path)),
                "EndpointSlice" => content.services.endpoint_slices.extend(typed(object, path)),
                "Node" => content.services.nodes.extend(typed(object, path)),
                _ => {}
            }
        }
        content
    }
}

/// An object that is as its kind should be, or nothing.
fn typed<T: DeserializeOwned>(object: Object, path: &Path) -> Option<T> {
    let typed = object.into_typed();
    typed
        .inspect_err(|error| {
            tracing::warn!("{}: {}", path.display(), beginning(&format!("{error:#}"), MAX_REASON))
        })
        .ok()
}

fn pod(mut object: Object) -> Result<PodInfo, Refused> {
    let metadata = &mut object.value["metadata"];
    if metadata["uid"].is_null() {
        let Some(hash) = metadata["annotations"][CONFIG_HASH].as_str().and_then(PodUid::new) else {
            let reason = format!(
                "pod {} is left alone: it has no metadata.uid, by which its cgroups could be found; \
                 `kubectl get pod -o yaml` shows it",
                object.name
            );
            return Err(Refused { uid: None, reason: beginning(&reason, MAX_REASON) });
        };
        metadata["uid"] = hash.as_str().into();
    }
    object::read(object.value)
}

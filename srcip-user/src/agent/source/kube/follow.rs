//! The list and the watch that keep what is known of a collection of objects.
//!
//! Not kube-runtime's `watcher`: it asks for ever for a version that is gone if the answer to that is an HTTP
//! status, tries again without any delay where connections are cut, and does not say when a watch that had
//! failed has begun again.

use std::{fmt::Debug, pin::pin, time::Duration};

use futures_util::StreamExt as _;
use kube::{
    Client, Error,
    api::WatchEvent,
    core::{
        ObjectList, Request,
        params::{ListParams, WatchParams},
    },
};
use serde::{Deserialize, Deserializer};
use serde_json::Value;
use tokio::time::{Instant, sleep, timeout};

use super::{
    Timing,
    explain::{Asked, explain},
};

/// Objects in one answer to a list. One can have 1.5 MiB; an answer is in memory several times while it is read.
const PAGE: u32 = 25;

/// A watch that lasted this long was no failure, however it ended.
const HEALTHY: Duration = Duration::from_secs(10);

/// How much later than agreed the end of a watch may come.
const LATE: Duration = Duration::from_secs(5);

/// Objects of one kind: how they are asked for, and where they are kept.
pub(super) trait Collection: Send + Sync + 'static {
    /// What is kept of an object, from the moment it is read: a page of whole ones takes megabytes. One that
    /// is not right is one, too: it does not fail the answer it is in.
    type Object: FromValue;
    /// Objects of a list that is not at its end.
    type Listed: Default + Send;

    /// As RBAC has it: `pods`.
    fn resource(&self) -> &'static str;
    /// Requests for all of them.
    fn all(&self) -> Request;
    /// Which of them are of interest.
    fn field_selector(&self) -> Option<String>;

    /// One of a list. Fails if there are too many.
    fn add(&self, listed: &mut Self::Listed, object: Self::Object) -> Result<(), String>;
    /// The list is at its end: there are no others.
    fn replace(&self, listed: Self::Listed);
    /// One is new, or has changed.
    fn put(&self, object: Self::Object);
    /// One is gone.
    fn remove(&self, object: Self::Object);
    /// Why they cannot be learned; `None` if they can be again.
    fn trouble(&self, why: Option<&str>);
}

/// What can be made of anything that an answer has in an object's place.
pub(super) trait FromValue: Clone + Debug + Send + 'static {
    /// Takes what matters out of it.
    fn from_value(value: Value) -> Self;
}

/// An object in an answer.
#[derive(Clone, Debug)]
pub(super) struct Seen<T> {
    /// Its `resourceVersion`, from which a watch can go on.
    version: Option<String>,
    /// The object.
    pub(super) object: T,
}

impl<'de, T: FromValue> Deserialize<'de> for Seen<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let value = Value::deserialize(deserializer)?;
        let version = value["metadata"]["resourceVersion"].as_str().map(ToOwned::to_owned);
        Ok(Self { version, object: T::from_value(value) })
    }
}

/// Why there is no watch any more.
struct Lost {
    /// What is wrong; nothing if that is how watches end at times.
    trouble: Option<String>,
    /// Whether the version reached is worth nothing: all has to be listed again.
    outdated: bool,
}

impl Lost {
    /// A failure after which to go on from where it was.
    fn trouble(why: String) -> Self {
        Self { trouble: Some(why), outdated: false }
    }
}

/// Follows a collection for ever.
pub(super) async fn follow<C: Collection>(client: Client, timing: Timing, collection: C) {
    let follower = Follower { client, timing, collection };
    let mut version = None;
    let mut delays = timing.delays();
    loop {
        let began = Instant::now();
        let ended = follower.list_and_watch(&mut version).await;
        if began.elapsed() >= HEALTHY {
            delays = timing.delays();
            // It was over, as every watch is after a while.
            if ended.is_ok() {
                continue;
            }
        }
        if let Err(Lost { trouble, outdated }) = ended {
            if let Some(why) = trouble {
                follower.collection.trouble(Some(&why));
            }
            if outdated {
                version = None;
            }
        }
        sleep(delays.next().unwrap_or(timing.longest_delay)).await;
    }
}

struct Follower<C> {
    client: Client,
    timing: Timing,
    collection: C,
}

impl<C: Collection> Follower<C> {
    /// Watches from `version` on, or from a new list if there is none, until the watch ends.
    async fn list_and_watch(&self, version: &mut Option<String>) -> Result<(), Lost> {
        let version = match version {
            Some(version) => version,
            None => version.insert(self.list().await?),
        };
        self.watch(version).await
    }

    /// Keeps all objects; returns the version as of which they are all.
    async fn list(&self) -> Result<String, Lost> {
        let asked = self.asked("list");
        let mut listed = C::Listed::default();
        let mut next = None;
        loop {
            let mut params = ListParams::default().limit(PAGE);
            params.field_selector = self.collection.field_selector();
            params.continue_token = next;
            let request = self.collection.all().list(&params);
            let request = request.map_err(|error| Lost::trouble(error.to_string()))?;
            let answer = self.client.request::<ObjectList<Seen<C::Object>>>(request);
            let answer = timeout(self.timing.request, answer).await;
            let page = answer.map_err(|_| self.late(asked))?.map_err(|error| lost(&error, asked))?;
            for Seen { object, .. } in page.items {
                self.collection.add(&mut listed, object).map_err(Lost::trouble)?;
            }
            next = page.metadata.continue_.filter(|token| !token.is_empty());
            if next.is_none() {
                let version = page.metadata.resource_version.filter(|version| !version.is_empty());
                let without =
                    || Lost::trouble(format!("a list of {} has no resourceVersion", asked.resource));
                let version = version.ok_or_else(without)?;
                self.collection.replace(listed);
                return Ok(version);
            }
        }
    }

    /// Applies what happens from `version` on, and moves that along.
    async fn watch(&self, version: &mut String) -> Result<(), Lost> {
        let asked = self.asked("watch");
        let seconds = u32::try_from(self.timing.watch.as_secs()).unwrap_or(u32::MAX);
        let mut params = WatchParams::default().timeout(seconds);
        params.field_selector = self.collection.field_selector();
        let request = self.collection.all().watch(&params, version);
        let request = request.map_err(|error| Lost::trouble(error.to_string()))?;
        let begun =
            timeout(self.timing.request, self.client.request_events::<Seen<C::Object>>(request)).await;
        let events = begun.map_err(|_| self.late(asked))?.map_err(|error| lost(&error, asked))?;
        self.collection.trouble(None);

        let mut events = pin!(events);
        // Silence longer than that is of a connection that has died.
        while let Ok(Some(event)) = timeout(self.timing.watch + LATE, events.next()).await {
            match event.map_err(|error| lost(&error, asked))? {
                WatchEvent::Added(seen) | WatchEvent::Modified(seen) => {
                    self.collection.put(seen.object);
                    advance(version, seen.version);
                }
                WatchEvent::Deleted(seen) => {
                    self.collection.remove(seen.object);
                    advance(version, seen.version);
                }
                WatchEvent::Bookmark(bookmark) => *version = bookmark.metadata.resource_version,
                WatchEvent::Error(status) => return Err(lost(&Error::Api(status), asked)),
            }
        }
        Ok(())
    }

    fn asked(&self, verb: &'static str) -> Asked {
        Asked { verb, resource: self.collection.resource() }
    }

    fn late(&self, asked: Asked) -> Lost {
        let (Asked { verb, resource }, limit) = (asked, self.timing.request);
        Lost::trouble(format!("the API server has not answered to {verb} {resource} in {limit:?}"))
    }
}

fn advance(version: &mut String, to: Option<String>) {
    if let Some(to) = to {
        *version = to;
    }
}

/// What an error means for where to go on.
fn lost(error: &Error, asked: Asked) -> Lost {
    let outdated = match error {
        // Overload passes. Any other answer may be about the version: it is gone, or, of a cluster that was
        // restored from a backup, yet to come.
        Error::Api(status) => !matches!(status.code, 429 | 500 | 502 | 503),
        // The same line would come again.
        Error::SerdeError(_) => true,
        _ => false,
    };
    let gone = matches!(error, Error::Api(status) if status.code == 410);
    Lost { trouble: (!gone).then(|| explain(error, asked)), outdated }
}

//! Warning Events on pods and Services, sent by a task of their own.

use std::{
    hash::{DefaultHasher, Hash as _, Hasher as _},
    sync::Arc,
    time::Duration,
};

use k8s_openapi::{
    api::{core::v1::ObjectReference, events::v1::Event},
    apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta},
    jiff::Timestamp,
};
use kube::{Api, Client, Error, api::PostParams};
use prometheus_client::metrics::counter::Counter;
use tokio::{
    sync::mpsc,
    task::JoinHandle,
    time::{sleep, timeout},
};

use super::{
    Timing,
    explain::{Asked, explain},
};
use crate::{
    agent::{
        pod::{PodInfo, PodName, PodUid},
        source::told::{FORGOTTEN, Told},
    },
    text::printable,
};

/// Events that wait to be sent; more are lost.
const QUEUE: usize = 256;

/// Between two Events: a node is not to be a burden, whatever its pods are up to.
const SPACING: Duration = Duration::from_millis(100);

/// How often one is tried.
const ATTEMPTS: usize = 5;

/// What the API server takes at most, in bytes: `legacyValidateEvent` and `ValidateEventCreate` in Kubernetes'
/// pkg/apis/core/validation/events.go.
const MAX_NOTE: usize = 1024;
const MAX_INSTANCE: usize = 128;
/// The longest name of an object, less a dot and a number of 16 digits.
const MAX_PREFIX: usize = 253 - 17;

const CREATE: Asked = Asked { verb: "create", resource: "events.events.k8s.io" };

/// Who reports, in the Event.
const REPORTER: &str = "srcip";

/// The queue of Events. Its task ends with it.
#[derive(Debug)]
pub(super) struct Events {
    queue: mpsc::Sender<Warning>,
    told: Arc<Told>,
    lost: Counter,
    sender: JoinHandle<()>,
}

/// Whom an Event is about.
#[derive(Clone, Debug)]
pub(super) struct Subject {
    kind: &'static str,
    /// What srcip was about to do for it.
    action: &'static str,
    name: PodName,
    uid: PodUid,
    /// Whether every node tells the same of it: once is enough.
    is_everybodys: bool,
}

impl Subject {
    /// A pod, which is on this node alone.
    pub(super) fn pod(pod: &PodInfo) -> Self {
        let (name, uid) = (pod.name.clone(), pod.uid.clone());
        Self { kind: "Pod", action: "Steer", name, uid, is_everybodys: false }
    }

    /// A Service.
    pub(super) fn service(name: &PodName, uid: &PodUid) -> Self {
        let (name, uid) = (name.clone(), uid.clone());
        Self { kind: "Service", action: "Handle", name, uid, is_everybodys: true }
    }
}

#[derive(Debug)]
struct Warning {
    subject: Subject,
    reason: &'static str,
    note: String,
}

impl Warning {
    /// What makes this Event's name one of its own; the same on all nodes where that is wanted, so that the API
    /// server refuses all but the first, until it has forgotten that.
    fn suffix(&self, now: Timestamp) -> i128 {
        let now = now.as_nanosecond();
        if !self.subject.is_everybodys {
            return now;
        }
        let mut hasher = DefaultHasher::new();
        (self.subject.uid.as_str(), self.reason, &self.note).hash(&mut hasher);
        (now / FORGOTTEN.as_nanos() as i128, hasher.finish()).hash(&mut hasher);
        hasher.finish().into()
    }
}

impl Events {
    /// Begins to send; `lost` counts those that do not arrive.
    pub(super) fn start(client: Client, node: &str, timing: Timing, lost: Counter) -> Self {
        let (queue, receiver) = mpsc::channel(QUEUE);
        let told = Arc::<Told>::default();
        let sender = Sender {
            client,
            instance: head(node, MAX_INSTANCE).to_owned(),
            timing,
            told: Arc::clone(&told),
            lost: lost.clone(),
        };
        Self { queue, told, lost, sender: tokio::spawn(sender.run(receiver)) }
    }

    /// Sends it soon, if it is news.
    pub(super) fn warn(&self, subject: Subject, reason: &'static str, note: &str) {
        let note = printable(head(note, MAX_NOTE));
        // What is not printed is replaced by something longer.
        let note = head(&note, MAX_NOTE).to_owned();
        if !self.told.is_news(&subject.uid, reason, &note) {
            return;
        }
        let warning = Warning { subject, reason, note };
        if let Err(error) = self.queue.try_send(warning) {
            let (mpsc::error::TrySendError::Full(warning) | mpsc::error::TrySendError::Closed(warning)) =
                error;
            lose(&self.lost, &self.told, &warning, "too many are waiting");
        }
    }
}

impl Drop for Events {
    fn drop(&mut self) {
        self.sender.abort();
    }
}

/// Counts one; the first is logged as well.
fn lose(lost: &Counter, told: &Told, warning: &Warning, why: &str) {
    let Subject { kind, name, uid, .. } = &warning.subject;
    told.forget(uid, warning.reason);
    if lost.inc() == 0 {
        tracing::warn!(
            "the Warning Event {} for {} {name} is lost, and further ones are only counted: {why}",
            warning.reason,
            kind.to_lowercase()
        );
    }
}

struct Sender {
    client: Client,
    instance: String,
    timing: Timing,
    told: Arc<Told>,
    lost: Counter,
}

impl Sender {
    async fn run(self, mut queue: mpsc::Receiver<Warning>) {
        while let Some(warning) = queue.recv().await {
            if let Err(why) = self.send(&warning).await {
                lose(&self.lost, &self.told, &warning, &why);
            }
            sleep(SPACING).await;
        }
    }

    async fn send(&self, warning: &Warning) -> Result<(), String> {
        let api = Api::<Event>::namespaced(self.client.clone(), &warning.subject.name.namespace);
        let event = self.event(warning, Timestamp::now());
        let mut delays = self.timing.delays().take(ATTEMPTS - 1);
        loop {
            let answer = timeout(self.timing.request, api.create(&PostParams::default(), &event)).await;
            let why = match answer {
                Ok(Ok(_)) => return Ok(()),
                // An attempt whose answer was lost had arrived.
                Ok(Err(Error::Api(status))) if status.code == 409 => return Ok(()),
                Ok(Err(error)) if is_final(&error) => return Err(explain(&error, CREATE)),
                Ok(Err(error)) => explain(&error, CREATE),
                Err(_) => "the API server does not answer".to_owned(),
            };
            let Some(delay) = delays.next() else { return Err(why) };
            sleep(delay).await;
        }
    }

    fn event(&self, warning: &Warning, now: Timestamp) -> Event {
        let Warning { subject: Subject { kind, action, name, uid, .. }, reason, note } = warning;
        let prefix = head(&name.name, MAX_PREFIX).trim_end_matches(['-', '.']);
        Event {
            metadata: ObjectMeta {
                name: Some(format!("{prefix}.{:x}", warning.suffix(now))),
                namespace: Some(name.namespace.to_string()),
                ..ObjectMeta::default()
            },
            type_: Some("Warning".to_owned()),
            reason: Some((*reason).to_owned()),
            action: Some((*action).to_owned()),
            note: Some(note.clone()),
            event_time: Some(MicroTime(now)),
            reporting_controller: Some(REPORTER.to_owned()),
            reporting_instance: Some(self.instance.clone()),
            regarding: Some(ObjectReference {
                api_version: Some("v1".to_owned()),
                kind: Some((*kind).to_owned()),
                name: Some(name.name.to_string()),
                namespace: Some(name.namespace.to_string()),
                uid: Some(uid.to_string()),
                ..ObjectReference::default()
            }),
            ..Event::default()
        }
    }
}

/// Whether trying again is of no use.
fn is_final(error: &Error) -> bool {
    matches!(error, Error::Api(status) if (400..500).contains(&status.code) && status.code != 429)
}

/// The start of a text, in at most `limit` bytes.
fn head(text: &str, limit: usize) -> &str {
    &text[..text.floor_char_boundary(limit)]
}

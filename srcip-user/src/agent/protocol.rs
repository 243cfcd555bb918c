//! What the CNI plugin and the command line ask the agent, and what it answers.
//!
//! One request and one answer per connection, each one message of a SOCK_SEQPACKET socket: JSON of at most
//! [`MAX_MESSAGE`] bytes. With `add` and `check` comes the pod's network namespace as a descriptor, so that
//! the agent needs no access to the place where the runtime keeps it.
//!
//! Plugin and agent may be of different releases. Fields that one does not know are ignored; whoever changes
//! the meaning of one raises [`VERSION`].

use std::{collections::BTreeMap, path::PathBuf, time::Duration};

use serde::{Deserialize, Serialize};

use super::pod::{PodName, PodUid};
use crate::cni::attachment::{Attachment, ContainerId};

/// The version of these messages.
pub const VERSION: u32 = 1;

/// The longest message, in bytes. A socket's default buffer takes it in one piece.
pub const MAX_MESSAGE: usize = 128 * 1024;

/// Where the agent listens unless told otherwise.
pub const DEFAULT_SOCKET: &str = "/run/srcip/agent.sock";

/// The longest that a request may ask the agent to try.
pub const MAX_TIMEOUT: Duration = Duration::from_secs(120);

/// A request or an answer, with the version of who sends it.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Message<T> {
    pub version: u32,
    pub body: T,
}

/// A message without what it says: enough to refuse it.
#[derive(Debug, Deserialize)]
pub(super) struct Envelope {
    pub version: u32,
}

/// What can be asked.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Request {
    /// Steer a pod if it is to be steered. With the network namespace's descriptor.
    Add(AddRequest),
    /// Tell whether a pod is steered if it is to be. With the network namespace's descriptor.
    Check(CheckRequest),
    /// A sandbox is about to go.
    Del(DelRequest),
    /// Sandboxes may have gone without a word. Which ones are there still is not asked: what is attached goes by
    /// network namespaces, and a list that a pod is just being added to would take it for one that has gone.
    Gc {},
    /// Tell how the agent is.
    Status,
    /// Change what is logged, or tell what is.
    LogLevel {
        /// A filter such as `info,srcip_user=debug`; none to ask.
        filter: Option<String>,
    },
}

/// A pod as the runtime knows it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct PodRef {
    /// Its name.
    #[serde(flatten)]
    pub name: PodName,
    /// Its UID, if the runtime tells it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uid: Option<PodUid>,
}

/// A sandbox has got an interface.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct AddRequest {
    /// Which.
    #[serde(flatten)]
    pub attachment: Attachment,
    /// Where the runtime has the network namespace, for the record and for people.
    pub netns: PathBuf,
    /// Whose.
    pub pod: PodRef,
    /// Those of the pod's annotations that can matter, if the runtime tells them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub annotations: Option<BTreeMap<String, String>>,
    /// How long the plugin waits for the answer.
    pub timeout_ms: u64,
}

impl AddRequest {
    /// How long the plugin waits for the answer; the agent says [`AddAnswer::NotReady`] before that.
    pub fn timeout(&self) -> Duration {
        Duration::from_millis(self.timeout_ms).min(MAX_TIMEOUT)
    }
}

/// A sandbox is looked over.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct CheckRequest {
    /// Which interface.
    #[serde(flatten)]
    pub attachment: Attachment,
    /// Where the runtime has the network namespace.
    pub netns: PathBuf,
    /// Whose.
    pub pod: PodRef,
}

/// A sandbox is about to go, or has gone. Comes any number of times, and not for every sandbox.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct DelRequest {
    /// Which.
    #[serde(rename = "containerID")]
    pub container_id: ContainerId,
    /// Whose, if the runtime tells.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pod: Option<PodRef>,
}

/// What the agent says.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Answer {
    /// To [`Request::Add`].
    Add(AddAnswer),
    /// To [`Request::Check`].
    Check(CheckAnswer),
    /// To [`Request::Del`] and [`Request::Gc`].
    Done,
    /// To [`Request::Status`].
    Status(AgentStatus),
    /// To [`Request::LogLevel`]: the filter as it is now.
    LogLevel(String),
    /// To anything: the agent does not do this, and why.
    Rejected(String),
}

/// What has become of a pod.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AddAnswer {
    /// It is steered.
    Steered,
    /// It is not to be steered.
    NotSteered,
    /// It asks for what cannot be: it starts without being steered, and is told so by an Event.
    Refused(Note),
    /// The agent cannot tell yet, or not in time.
    NotReady(String),
    /// It is to be steered, and that failed.
    Failed(String),
}

/// Whether a pod is as it should be.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CheckAnswer {
    /// It is.
    Good,
    /// The agent cannot tell yet.
    NotReady(String),
    /// It is to be steered, and is not: why.
    NotSteered(String),
}

/// A reason, for programs and for people.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Note {
    /// A word in CamelCase, as Events have it.
    pub reason: String,
    /// A sentence.
    pub note: String,
}

/// How the agent is.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
pub struct AgentStatus {
    /// Its release.
    pub release: String,
    /// How long it has been running.
    pub uptime_seconds: u64,
    /// Whether `/readyz` says so.
    pub ready: bool,
    /// What it waits for if not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub waits_for: Option<String>,
    /// How many pods it knows on this node.
    pub pods: usize,
    /// How many of them it steers.
    pub steered: usize,
    /// How the CNI plugin is installed, if the agent is to do that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cni: Option<String>,
    /// What keeps north-south from its work, and what of it is left undone, if the agent does that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub north_south: Option<NorthSouthStatus>,
    /// Pods that ask for steering and are not steered.
    pub problems: Vec<PodProblem>,
    /// How many of these did not fit into the message.
    #[serde(default)]
    pub more_problems: usize,
}

/// What the agent says of north-south. What is programmed is in the kernel, and read there.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct NorthSouthStatus {
    /// What keeps it from its work; it is tried again.
    pub trouble: Vec<String>,
    /// What Services ask for and do not get.
    pub problems: Vec<ServiceProblem>,
    /// Health check ports that another program has, and what that means.
    pub blocked_health_checks: BTreeMap<u16, String>,
    /// How many entries of these lists were too many.
    #[serde(default)]
    pub more: usize,
}

/// What a Service asks for and does not get.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ServiceProblem {
    /// Which, as NAMESPACE/NAME.
    pub service: String,
    /// Why.
    #[serde(flatten)]
    pub note: Note,
}

/// A pod that asks for steering and is not steered.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct PodProblem {
    /// Which.
    pub pod: PodName,
    /// Why.
    #[serde(flatten)]
    pub note: Note,
}

impl Request {
    /// Checks what the types do not.
    pub fn validate(&self) -> Result<(), &'static str> {
        let pod = match self {
            Self::Add(AddRequest { pod, .. }) | Self::Check(CheckRequest { pod, .. }) => Some(pod),
            Self::Del(DelRequest { pod, .. }) => pod.as_ref(),
            Self::Gc {} | Self::Status | Self::LogLevel { .. } => None,
        };
        let is_named = |pod: &PodRef| PodName::new(&pod.name.namespace, &pod.name.name).is_some();
        if pod.is_none_or(is_named) {
            Ok(())
        } else {
            Err("the pod's name is none that Kubernetes would give")
        }
    }
}

/// A message as it is sent.
pub(super) fn encode<T: Serialize>(body: T) -> Result<Vec<u8>, String> {
    let bytes = serde_json::to_vec(&Message { version: VERSION, body }).map_err(|error| error.to_string())?;
    if bytes.len() > MAX_MESSAGE {
        return Err(format!("a message of {} bytes, and the longest is {MAX_MESSAGE}", bytes.len()));
    }
    Ok(bytes)
}

/// What a message says; `who` is who sent it.
pub(super) fn decode<T: for<'a> Deserialize<'a>>(bytes: &[u8], who: &str) -> Result<T, String> {
    // The version first: a later one's messages need not read like ours.
    let Envelope { version } =
        serde_json::from_slice(bytes).map_err(|error| format!("{who} sent no message: {error}"))?;
    if version != VERSION {
        return Err(format!(
            "{who} is of another release: it speaks version {version} of the agent's protocol, and this \
             is version {VERSION}; the agent installs the plugin that belongs to it when it starts"
        ));
    }
    let message: Message<T> = serde_json::from_slice(bytes)
        .map_err(|error| format!("{who} sent a message that cannot be read: {error}"))?;
    Ok(message.body)
}

/// The answer as it is sent: a long list of problems is cut.
pub(super) fn encode_answer(mut answer: Answer) -> Result<Vec<u8>, String> {
    loop {
        let encoded = encode(&answer);
        match &mut answer {
            Answer::Status(status) if encoded.is_err() && !status.problems.is_empty() => {
                let kept = status.problems.len() / 2;
                status.more_problems += status.problems.len() - kept;
                status.problems.truncate(kept);
            }
            _ => return encoded,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cni::attachment::IfName;

    fn add() -> AddRequest {
        AddRequest {
            attachment: Attachment {
                container_id: ContainerId::new("0f3c").unwrap(),
                ifname: IfName::new("eth0").unwrap(),
            },
            netns: "/run/netns/x".into(),
            pod: PodRef { name: PodName::new("shop", "web-0").unwrap(), uid: PodUid::new("4b1c") },
            annotations: Some([("srcip.io/steer".to_owned(), "true".to_owned())].into()),
            timeout_ms: 10_000,
        }
    }

    #[test]
    fn the_messages_are_stable() {
        let bytes = encode(Request::Add(add())).unwrap();
        let text = r#"{"version":1,"body":{"add":{"containerID":"0f3c","ifname":"eth0","netns":"/run/netns/x","pod":{"namespace":"shop","name":"web-0","uid":"4b1c"},"annotations":{"srcip.io/steer":"true"},"timeout_ms":10000}}}"#;
        assert_eq!(std::str::from_utf8(&bytes).unwrap(), text);
        assert_eq!(decode::<Request>(&bytes, "x"), Ok(Request::Add(add())));
        let later = text.replace(r#""timeout_ms""#, r#""later":[1],"timeout_ms""#);
        assert_eq!(decode::<Request>(later.as_bytes(), "x"), Ok(Request::Add(add())));
    }

    #[test]
    fn another_version_is_refused_whatever_it_says() {
        let error = decode::<Request>(br#"{"version":2,"body":{"swim":{}}}"#, "the plugin").unwrap_err();
        assert!(error.contains("the plugin is of another release: it speaks version 2"), "{error}");
    }

    #[test]
    fn hostile_requests_are_refused() {
        for text in [
            &b""[..],
            b"null",
            b"{}",
            br#"{"version":1}"#,
            br#"{"version":-1,"body":"status"}"#,
            br#"{"version":1,"body":"swim"}"#,
            br#"{"version":1,"body":{"del":{"containerID":"../x"}}}"#,
            b"\xff\xfe",
        ] {
            assert!(decode::<Request>(text, "x").is_err(), "{}", String::from_utf8_lossy(text));
        }
        let mut request = add();
        request.pod.name.namespace = "../x".into();
        assert!(Request::Add(request).validate().is_err());
        assert_eq!(Request::Add(add()).validate(), Ok(()));
    }

    #[test]
    fn a_status_too_long_is_cut_and_says_so() {
        let problem = PodProblem {
            pod: PodName::new("shop", "web").unwrap(),
            note: Note { reason: "BadAnnotation".to_owned(), note: "x".repeat(1000) },
        };
        let status = AgentStatus { problems: vec![problem; 1000], ..AgentStatus::default() };
        let bytes = encode_answer(Answer::Status(status)).unwrap();
        assert!(bytes.len() <= MAX_MESSAGE);
        let Answer::Status(status) = decode(&bytes, "x").unwrap() else { panic!("a status") };
        assert!(status.problems.len() > 50 && status.problems.len() + status.more_problems == 1000);
    }
}

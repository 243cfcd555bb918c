//! The plugin: asks the agent to steer a pod, and hands on the result of the plugins before it.

use std::{
    collections::BTreeMap,
    env,
    io::{self, Read as _, Write as _},
    os::fd::AsFd as _,
    path::Path,
    process::ExitCode,
    thread,
    time::{Duration, Instant},
};

use serde::Serialize;

use super::{
    attachment::Attachment,
    config::{Header, MAX_CONFIGURATION, OnAgentAbsent, OnUnknown, Settings, annotations, previous_result},
    spec::{CniError, Code, Command, Environment, VERSIONS},
};
use crate::{
    agent::{
        client::{CallError, Client},
        decide::{Ask, asks_for_steering},
        protocol::{AddAnswer, AddRequest, CheckAnswer, CheckRequest, DelRequest, PodRef, Request},
    },
    dataplane::{Dataplane, record::State},
    netns::{Netns, NetnsError},
};

/// An agent that is just starting is asked again after this time, and after twice that, and so on.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// Telling the agent of an end takes no longer: it finds out by itself.
const TELL_TIMEOUT: Duration = Duration::from_secs(1);

/// Its pods start even if nobody can tell whether they are to be steered: without its DNS, a cluster may not
/// be able to start an agent either.
const SYSTEM_NAMESPACE: &str = "kube-system";

/// Runs as the runtime has called it.
pub fn main() -> ExitCode {
    let mut configuration = Vec::new();
    let read = io::stdin().lock().take(MAX_CONFIGURATION + 1).read_to_end(&mut configuration);
    let variable = |name: &str| env::var_os(name).map(|value| value.to_string_lossy().into_owned());
    let (output, code) = match read {
        Err(error) => {
            let error =
                CniError::new(Code::Io, "failed to read the configuration on stdin", error.to_string());
            (error.to_json(latest()), ExitCode::FAILURE)
        }
        Ok(_) => match run(variable, &configuration) {
            Ok(output) => (output, ExitCode::SUCCESS),
            Err(error) => (error, ExitCode::FAILURE),
        },
    };
    let mut stdout = io::stdout().lock();
    if output.is_empty() || writeln!(stdout, "{output}").and_then(|()| stdout.flush()).is_ok() {
        code
    } else {
        ExitCode::FAILURE
    }
}

/// Does what is wanted; returns what goes to stdout, be it a result or an error.
fn run(variable: impl Fn(&str) -> Option<String>, configuration: &[u8]) -> Result<String, String> {
    let header = Header::parse(configuration);
    let version = header.as_ref().map_or(latest(), Header::version);
    let done = || -> Result<String, CniError> {
        let environment = Environment::read(variable)?;
        if configuration.len() as u64 > MAX_CONFIGURATION {
            let details = format!("{MAX_CONFIGURATION} bytes are the most");
            return Err(CniError::new(Code::Decode, "the configuration on stdin is too long", details));
        }
        if environment.command == Command::Version {
            return Ok(versions(version));
        }
        header.as_ref().map_err(Clone::clone)?;
        environment.command.check_version(version)?;
        match environment {
            Environment { command: Command::Add, attachment: Some(attachment), netns: Some(netns), pod } => {
                let result = previous_result(configuration, version)?;
                if let Some(pod) = pod {
                    Sandbox::new(attachment, &netns, pod, configuration)?.add()?;
                }
                Ok(result)
            }
            Environment {
                command: Command::Check,
                attachment: Some(attachment),
                netns: Some(netns),
                pod,
            } => {
                if let Some(pod) = pod {
                    Sandbox::new(attachment, &netns, pod, configuration)?.check()?;
                }
                Ok(String::new())
            }
            Environment { command: Command::Del, attachment: Some(attachment), pod, .. } => {
                let request = DelRequest { container_id: attachment.container_id, pod };
                tell(configuration, Request::Del(request));
                Ok(String::new())
            }
            Environment { command: Command::Gc, .. } => {
                tell(configuration, Request::Gc {});
                Ok(String::new())
            }
            Environment { command: Command::Status, .. } => status(configuration).map(|()| String::new()),
            _ => unreachable!("the environment has what its command needs"),
        }
    };
    done().map_err(|error| error.to_json(version))
}

/// What can be told without the agent of whether a pod is to be steered.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Wanted {
    Yes,
    No,
    Unknown,
}

/// A pod's sandbox, and what is to be done about it.
#[derive(Debug)]
struct Sandbox<'a> {
    attachment: Attachment,
    netns: Netns,
    pod: PodRef,
    annotations: Option<BTreeMap<String, String>>,
    settings: Settings,
    path: &'a Path,
}

impl<'a> Sandbox<'a> {
    fn new(
        attachment: Attachment,
        path: &'a Path,
        pod: PodRef,
        configuration: &[u8],
    ) -> Result<Self, CniError> {
        let settings = Settings::parse(configuration)?;
        let annotations = annotations(configuration)?;
        let netns = Netns::open(path).map_err(|error| {
            let code = match error {
                NetnsError::NotFound(_) | NetnsError::NotANetns(_) => Code::InvalidEnvironment,
                NetnsError::Denied(_) | NetnsError::Io { .. } => Code::Io,
            };
            CniError::new(code, "CNI_NETNS leads to no network namespace", error.to_string())
        })?;
        Ok(Self { attachment, netns, pod, annotations, settings, path })
    }

    /// Whether the pod is to be steered, as far as its annotations tell.
    fn wanted(&self) -> Wanted {
        match self.annotations.as_ref().map(asks_for_steering) {
            Some(Ask::Yes) => Wanted::Yes,
            // What is not understood steers nothing; the agent tells its owner.
            Some(Ask::No(_) | Ask::Invalid(_)) => Wanted::No,
            Some(Ask::Unknown) if !self.settings.selectors => Wanted::No,
            Some(Ask::Unknown) | None => Wanted::Unknown,
        }
    }

    /// Whether the pod starts if nobody steers it.
    fn may_start_unsteered(&self) -> bool {
        let Settings { on_agent_absent, on_unknown, .. } = &self.settings;
        match (on_agent_absent, self.wanted()) {
            (OnAgentAbsent::Pass, _) | (OnAgentAbsent::FailSteered, Wanted::No) => true,
            (OnAgentAbsent::Fail, _) | (OnAgentAbsent::FailSteered, Wanted::Yes) => false,
            (OnAgentAbsent::FailSteered, Wanted::Unknown) => {
                *on_unknown == OnUnknown::Pass || &*self.pod.name.namespace == SYSTEM_NAMESPACE
            }
        }
    }

    /// Returns when the pod is steered, or is known not to be steered.
    fn add(&self) -> Result<(), CniError> {
        let deadline = Instant::now() + self.settings.timeout();
        let mut pause = FIRST_PAUSE;
        let mut said = None;
        let why = loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let request = AddRequest {
                attachment: self.attachment.clone(),
                netns: self.path.to_owned(),
                pod: self.pod.clone(),
                annotations: self.annotations.clone(),
                timeout_ms: u64::try_from(left.as_millis()).unwrap_or(u64::MAX),
            };
            // What may pass is tried again; the rest stays as it is, however long we wait.
            let (why, may_pass) =
                match Client::new(&self.settings.socket, left).add(request, self.netns.as_fd()) {
                    Ok(AddAnswer::Steered | AddAnswer::NotSteered) => return Ok(()),
                    Ok(AddAnswer::Refused(note)) => {
                        eprintln!("srcip-cni: pod {} is not steered: {}", self.pod.name, note.note);
                        return Ok(());
                    }
                    Ok(AddAnswer::Failed(why)) => {
                        let message = format!("failed to steer pod {}", self.pod.name);
                        return Err(CniError::new(Code::SteeringFailed, message, why));
                    }
                    Ok(AddAnswer::NotReady(why)) => {
                        said = Some(why.clone());
                        (why, true)
                    }
                    // The last attempt has hardly any time left: what came of one before tells more.
                    Err(error @ CallError::TimedOut(..)) => {
                        (said.clone().unwrap_or_else(|| error.to_string()), false)
                    }
                    Err(error @ CallError::Absent(_)) => {
                        said = Some(error.to_string());
                        (error.to_string(), true)
                    }
                    Err(error) => (error.to_string(), false),
                };
            let is_wanted = self.wanted() == Wanted::Yes || !self.may_start_unsteered();
            if !may_pass || !is_wanted || Instant::now() + pause >= deadline {
                break why;
            }
            thread::sleep(pause);
            pause = (pause * 2).min(LONGEST_PAUSE);
        };
        if self.may_start_unsteered() {
            eprintln!("srcip-cni: pod {} starts without being steered: {why}", self.pod.name);
            return Ok(());
        }
        let message = match self.wanted() {
            Wanted::Yes => format!("pod {} is to be steered, and is not", self.pod.name),
            Wanted::Unknown => format!("nobody tells whether pod {} is to be steered", self.pod.name),
            Wanted::No => format!("pod {} is not to start without the agent", self.pod.name),
        };
        Err(CniError::new(Code::TryAgainLater, message, why))
    }

    /// Fails if the pod is to be steered and is not.
    fn check(&self) -> Result<(), CniError> {
        let request = CheckRequest {
            attachment: self.attachment.clone(),
            netns: self.path.to_owned(),
            pod: self.pod.clone(),
        };
        let client = Client::new(&self.settings.socket, self.settings.timeout());
        let not_steered = |why: String| {
            let message = format!("pod {} is to be steered, and is not", self.pod.name);
            Err(CniError::new(Code::NotSteered, message, why))
        };
        match client.check(request, self.netns.as_fd()) {
            Ok(CheckAnswer::Good) => Ok(()),
            Ok(CheckAnswer::NotSteered(why)) => not_steered(why),
            // What is attached works without the agent, and can be seen without it.
            Ok(CheckAnswer::NotReady(_)) | Err(_) if self.wanted() == Wanted::Yes => {
                if self.is_attached() == Some(false) {
                    return not_steered(format!(
                        "there is no attachment below {}",
                        self.settings.pin_path.display()
                    ));
                }
                Ok(())
            }
            Ok(CheckAnswer::NotReady(_)) | Err(_) => Ok(()),
        }
    }

    /// Whether the namespace is attached, `None` if that cannot be seen.
    fn is_attached(&self) -> Option<bool> {
        let cookie = self.netns.cookie().ok()?;
        let records = Dataplane::new(self.settings.pin_path.clone()).peek_records().ok()?;
        let attached = |record: &crate::dataplane::record::Record| {
            record.netns_cookie == cookie && record.state == State::Attached
        };
        Some(records.iter().any(attached))
    }
}

/// Tells the agent of an end. If there is none, there is nothing to be done: what is attached to a network
/// namespace goes with it, and the agent forgets the rest when it is back.
fn tell(configuration: &[u8], request: Request) {
    if let Ok(settings) = Settings::parse(configuration)
        && let Err(error) = Client::new(&settings.socket, TELL_TIMEOUT).tell(request)
    {
        eprintln!("srcip-cni: {error}");
    }
}

/// Fails if no pod could start. A node whose agent is away is ready for those that need none, and what is
/// steered stays so; a node that is not ready would lose its pods.
fn status(configuration: &[u8]) -> Result<(), CniError> {
    let settings = Settings::parse(configuration)?;
    if settings.on_agent_absent != OnAgentAbsent::Fail {
        return Ok(());
    }
    Client::new(&settings.socket, settings.timeout()).status().map(|_| ()).map_err(|error| {
        CniError::new(Code::NotAvailable, "no pod could start: there is no agent", error.to_string())
    })
}

fn latest() -> &'static str {
    VERSIONS[VERSIONS.len() - 1]
}

fn versions(version: &str) -> String {
    #[derive(Serialize)]
    #[serde(rename_all = "camelCase")]
    struct Answer<'a> {
        cni_version: &'a str,
        supported_versions: [&'a str; VERSIONS.len()],
    }
    let answer = Answer { cni_version: version, supported_versions: VERSIONS };
    serde_json::to_string(&answer).expect("texts are always JSON")
}

#[cfg(test)]
mod tests;

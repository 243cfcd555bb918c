//! The CNI specification, as far as a chained plugin needs it: how it is called, and how it fails.

use std::{collections::BTreeMap, path::PathBuf};

use serde::Serialize;

use super::{
    attachment::{Attachment, ContainerId, IfName},
    config::PLUGIN,
};
use crate::{
    agent::{
        pod::{PodName, PodUid},
        protocol::PodRef,
    },
    text::beginning,
};

/// The versions of the specification, oldest first. Earlier ones than 0.4.0 are there because networks are
/// configured with them: to a plugin that hands on what it gets, they are all alike.
pub const VERSIONS: [&str; 7] = ["0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"];

/// What a configuration without a version means.
pub const VERSION_IF_NONE: &str = "0.1.0";

/// How much of somebody's text is shown, in characters.
const SHOWN: usize = 64;

/// What the runtime wants done.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Command {
    /// A sandbox has got an interface.
    Add,
    /// A sandbox goes, or its interface.
    Del,
    /// Whether all is as ADD left it.
    Check,
    /// Which versions there are.
    Version,
    /// Whether ADD would work.
    Status,
    /// Only these attachments exist.
    Gc,
}

impl Command {
    /// The first version that has it.
    fn since(self) -> &'static str {
        match self {
            Self::Add | Self::Del | Self::Version => "0.1.0",
            Self::Check => "0.4.0",
            Self::Status | Self::Gc => "1.1.0",
        }
    }

    /// Fails if a configuration's version is none, or does not have this command.
    pub fn check_version(self, version: &str) -> Result<(), CniError> {
        let place = |wanted: &str| VERSIONS.iter().position(|known| *known == wanted);
        match place(version) {
            None => Err(CniError::new(
                Code::IncompatibleVersion,
                format!(
                    "version {:?} of the CNI specification is not known to srcip-cni",
                    beginning(version, SHOWN)
                ),
                format!("it knows {}", VERSIONS.join(", ")),
            )),
            Some(found) if Some(found) < place(self.since()) => Err(CniError::new(
                Code::IncompatibleVersion,
                format!("version {version} of the CNI specification has no such command"),
                format!("it came with {}", self.since()),
            )),
            Some(_) => Ok(()),
        }
    }
}

/// Why a command has failed, as the specification numbers it; from 100 on it is the plugin's own.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Code {
    /// The configuration's version is not known.
    IncompatibleVersion = 1,
    /// A CNI_… variable is missing or wrong.
    InvalidEnvironment = 4,
    /// Something could not be read.
    Io = 5,
    /// The configuration is no JSON.
    Decode = 6,
    /// The configuration is wrong.
    InvalidConfiguration = 7,
    /// What is missing may come; the runtime tries again.
    TryAgainLater = 11,
    /// ADD would not work.
    NotAvailable = 50,
    /// The pod is to be steered, and that failed.
    SteeringFailed = 100,
    /// The pod is to be steered, and is not.
    NotSteered = 101,
}

/// Why a command has failed.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct CniError {
    /// By number.
    pub code: Code,
    /// In a sentence.
    pub message: String,
    /// What else there is to say: the cause, the cure.
    pub details: String,
}

/// An error as it goes to stdout.
#[derive(Debug, Serialize)]
struct ErrorObject<'a> {
    #[serde(rename = "cniVersion")]
    cni_version: &'a str,
    code: u32,
    msg: String,
    #[serde(skip_serializing_if = "str::is_empty")]
    details: &'a str,
}

impl CniError {
    /// An error with what there is to say.
    pub fn new(code: Code, message: impl Into<String>, details: impl Into<String>) -> Self {
        Self { code, message: message.into(), details: details.into() }
    }

    /// What goes to stdout, in a version's format. Runtimes show both texts, one behind the other.
    pub fn to_json(&self, version: &str) -> String {
        let msg = format!("{PLUGIN}: {}", self.message);
        let object =
            ErrorObject { cni_version: version, code: self.code as u32, msg, details: &self.details };
        serde_json::to_string(&object).expect("texts and a number are always JSON")
    }
}

/// How the plugin has been called: the `CNI_…` variables.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Environment {
    /// What is wanted.
    pub command: Command,
    /// For which interface; not for all commands.
    pub attachment: Option<Attachment>,
    /// Where the sandbox's network namespace is; may be gone at DEL.
    pub netns: Option<PathBuf>,
    /// Whose sandbox it is; none if Kubernetes did not make it.
    pub pod: Option<PodRef>,
}

impl Environment {
    /// Reads and checks the variables, which `variable` has.
    pub fn read(variable: impl Fn(&str) -> Option<String>) -> Result<Self, CniError> {
        let given = |name: &str| variable(name).filter(|value| !value.is_empty());
        let required = |name: &'static str| given(name).ok_or_else(|| missing(name));
        let command = match required("CNI_COMMAND")?.as_str() {
            "ADD" => Command::Add,
            "DEL" => Command::Del,
            "CHECK" => Command::Check,
            "VERSION" => Command::Version,
            "STATUS" => Command::Status,
            "GC" => Command::Gc,
            other => return Err(invalid("CNI_COMMAND", other, "ADD, DEL, CHECK, VERSION, STATUS or GC")),
        };
        let (attachment, netns, pod) = match command {
            Command::Add | Command::Check | Command::Del => {
                let (id, name) = (required("CNI_CONTAINERID")?, required("CNI_IFNAME")?);
                let attachment = Attachment {
                    container_id: ContainerId::new(&id)
                        .map_err(|error| invalid("CNI_CONTAINERID", &id, &error.to_string()))?,
                    ifname: IfName::new(&name)
                        .map_err(|error| invalid("CNI_IFNAME", &name, &error.to_string()))?,
                };
                let netns = match command {
                    Command::Del => given("CNI_NETNS"),
                    _ => Some(required("CNI_NETNS")?),
                };
                let pod = parse_pod(&variable("CNI_ARGS").unwrap_or_default())?;
                (Some(attachment), netns.map(PathBuf::from), pod)
            }
            Command::Version | Command::Status | Command::Gc => (None, None, None),
        };
        Ok(Self { command, attachment, netns, pod })
    }
}

/// The pod that `CNI_ARGS` tells of: pairs such as `IgnoreUnknown=1;K8S_POD_NAMESPACE=shop`.
fn parse_pod(arguments: &str) -> Result<Option<PodRef>, CniError> {
    let mut pairs = BTreeMap::new();
    for pair in arguments.split(';').filter(|pair| !pair.is_empty()) {
        let Some((key, value)) = pair.split_once('=') else {
            return Err(invalid("CNI_ARGS", arguments, "pairs such as KEY=VALUE;KEY=VALUE"));
        };
        pairs.insert(key, value);
    }
    let (Some(namespace), Some(name)) = (pairs.get("K8S_POD_NAMESPACE"), pairs.get("K8S_POD_NAME")) else {
        return Ok(None);
    };
    let Some(name) = PodName::new(namespace, name) else {
        return Err(invalid("CNI_ARGS", arguments, "names that Kubernetes would give"));
    };
    // Not all runtimes tell it, and none is worse than a wrong one.
    let uid = pairs.get("K8S_POD_UID").and_then(|uid| PodUid::new(uid));
    Ok(Some(PodRef { name, uid }))
}

fn missing(name: &str) -> CniError {
    CniError::new(
        Code::InvalidEnvironment,
        format!("{name} is missing"),
        "srcip-cni is a CNI plugin: the container runtime calls it, with its orders in CNI_… variables",
    )
}

fn invalid(name: &str, value: &str, expected: &str) -> CniError {
    CniError::new(
        Code::InvalidEnvironment,
        format!("{name} is {:?}", beginning(value, SHOWN)),
        format!("expected {expected}"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(variables: &[(&str, &str)]) -> Result<Environment, CniError> {
        Environment::read(|name| {
            variables.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned())
        })
    }

    const ADD: [(&str, &str); 4] = [
        ("CNI_CONTAINERID", "0f3c"),
        ("CNI_IFNAME", "eth0"),
        ("CNI_NETNS", "/run/netns/x"),
        (
            "CNI_ARGS",
            "K8S_POD_INFRA_CONTAINER_ID=0f3c;K8S_POD_UID=4b1c;IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web-0",
        ),
    ];

    #[test]
    fn as_a_runtime_calls_it() {
        let environment = read(&[&[("CNI_COMMAND", "ADD")][..], &ADD].concat()).unwrap();
        let pod = environment.pod.unwrap();
        assert_eq!((pod.name.to_string(), pod.uid), ("shop/web-0".to_owned(), PodUid::new("4b1c")));
        // Another runtime's sandbox, or a tool's.
        let tool = [("CNI_COMMAND", "DEL"), ADD[0], ADD[1], ("CNI_ARGS", "IgnoreUnknown=1;")];
        let environment = read(&tool).unwrap();
        assert_eq!((environment.pod, environment.netns), (None, None));
        assert_eq!(read(&[("CNI_COMMAND", "GC")]).unwrap().attachment, None);
    }

    #[test]
    fn what_is_missing_or_wrong_is_named() {
        for (change, expected) in [
            (("CNI_COMMAND", ""), "CNI_COMMAND is missing"),
            (("CNI_COMMAND", "add"), "CNI_COMMAND is \"add\""),
            (("CNI_CONTAINERID", ""), "CNI_CONTAINERID is missing"),
            (("CNI_CONTAINERID", "../x"), "CNI_CONTAINERID is"),
            (("CNI_IFNAME", "a/b"), "CNI_IFNAME is"),
            (("CNI_NETNS", ""), "CNI_NETNS is missing"),
            (("CNI_ARGS", "x"), "CNI_ARGS is"),
            (("CNI_ARGS", "K8S_POD_NAMESPACE=a/b;K8S_POD_NAME=x"), "CNI_ARGS is"),
        ] {
            let error = read(&[&[change][..], &[("CNI_COMMAND", "ADD")], &ADD].concat()).unwrap_err();
            assert_eq!(error.code, Code::InvalidEnvironment);
            assert!(error.message.starts_with(expected), "{error:?}");
        }
    }

    #[test]
    fn commands_and_versions() {
        for (command, version, works) in [
            (Command::Add, "0.1.0", true),
            (Command::Add, "0.3.1", true),
            (Command::Check, "0.3.1", false),
            (Command::Check, "0.4.0", true),
            (Command::Gc, "1.0.0", false),
            (Command::Status, "1.1.0", true),
            (Command::Add, "1.2.0", false),
            (Command::Add, "", false),
        ] {
            let code = command.check_version(version).map_err(|error| error.code);
            let expected = if works { Ok(()) } else { Err(Code::IncompatibleVersion) };
            assert_eq!(code, expected, "{command:?} {version}");
        }
    }
}

//! The trait both engines implement, and which one a node gets.

use std::sync::OnceLock;

use aya::{
    programs::ProgramType,
    sys::{BpfHelper, is_helper_supported, is_program_supported},
};

use super::{
    error::{Error, Result},
    listeners,
    object::Programs,
    pins::Pins,
    record::{EngineKind, Record},
    sk_lookup::SkLookupEngine,
    tc::TcEngine,
};
use crate::netns::Netns;

/// Hands connections for the steered ports of one pod to its proxy's listener.
///
/// The settings are in the maps; an engine only puts its program in place and takes it away.
pub(super) trait Engine {
    /// Gets ready for the proxy's listeners on another port, before the settings say so.
    fn prepare(&self, _programs: &mut Programs<'_>, _netns: &Netns, _record: &Record) -> Result<()> {
        Ok(())
    }

    /// Puts this build's program in place, or finds that it is. What has to be remembered to take it away again
    /// goes to `record`, and by `remember` into the kernel before it is needed.
    fn attach(
        &self,
        programs: &mut Programs<'_>,
        netns: &Netns,
        record: &mut Record,
        remember: &mut dyn FnMut(&Record) -> Result<()>,
    ) -> Result<()>;

    /// Puts this build's program in the place of another's, wherever one is, in one step. `netns` is `None`
    /// if it is gone.
    fn upgrade(&self, programs: &mut Programs<'_>, netns: Option<&Netns>, record: &Record) -> Result<()>;

    /// Takes the program away; steering stops at once. `netns` is `None` if it is gone.
    fn detach(&self, pins: &Pins, netns: Option<&Netns>, record: &Record) -> Result<()>;

    /// Whether [`Self::problems`] looks into the network namespace.
    fn looks_inside(&self) -> bool;

    /// What is wrong with a pod that should be attached, in words for people. `netns` is `None` if it is gone,
    /// or was not looked for.
    fn problems(&self, pins: &Pins, netns: Option<&Netns>, record: &Record) -> Vec<String>;
}

impl EngineKind {
    /// All there are.
    pub const ALL: [Self; 2] = [Self::SkLookup, Self::Tc];

    /// The engine itself.
    pub(super) fn engine(self) -> &'static dyn Engine {
        match self {
            Self::SkLookup => &SkLookupEngine,
            Self::Tc => &TcEngine,
        }
    }
}

/// What the default engine needs of a kernel.
#[derive(Debug, Clone)]
pub struct Requirement {
    /// What it is.
    pub name: &'static str,
    /// The Linux version that brought it.
    pub since: &'static str,
    /// Whether it is there, as tried out just now.
    pub available: bool,
}

/// Tries what `sk-lookup` needs of the kernel.
pub fn sk_lookup_requirements() -> Vec<Requirement> {
    let program = |name, since, kind| Requirement {
        name,
        since,
        available: is_program_supported(kind).unwrap_or(false),
    };
    let helper = |name, since, kind, helper| Requirement {
        name,
        since,
        available: is_helper_supported(kind, helper).unwrap_or(false),
    };
    vec![
        program("sk_lookup programs", "5.9", ProgramType::SkLookup),
        program("sock_ops programs", "4.13", ProgramType::SockOps),
        helper(
            "bpf_get_netns_cookie in sock_ops",
            "5.15",
            ProgramType::SockOps,
            BpfHelper::BPF_FUNC_get_netns_cookie,
        ),
        Requirement {
            name: "iter/tcp (kernel BTF with bpf_iter_tcp)",
            since: "5.8",
            available: listeners::are_supported(),
        },
    ]
}

/// What `tc` needs of the kernel.
pub fn tc_requirements() -> Vec<Requirement> {
    vec![
        Requirement {
            name: "bpf_sk_assign in tc programs",
            since: "5.7",
            available: is_helper_supported(ProgramType::SchedClassifier, BpfHelper::BPF_FUNC_sk_assign)
                .unwrap_or(false),
        },
        Requirement {
            name: "network namespace cookies",
            since: "5.14",
            available: Netns::of_process(std::process::id()).is_ok_and(|own| own.cookie().is_ok()),
        },
    ]
}

/// A kernel that has all of it keeps it; one that seems not to is asked again.
static SK_LOOKUP_WORKS: OnceLock<()> = OnceLock::new();

/// Picks an engine and says why. `hooks` tells whether the node-wide hooks can be attached.
pub fn choose(wanted: Option<EngineKind>, hooks: bool) -> Result<(EngineKind, String)> {
    let missing = |requirements: Vec<Requirement>| {
        let missing: Vec<_> = requirements
            .into_iter()
            .filter(|requirement| !requirement.available)
            .map(|requirement| format!("{} (Linux {})", requirement.name, requirement.since))
            .collect();
        (!missing.is_empty()).then(|| format!("this kernel lacks {}", missing.join(", ")))
    };
    if wanted == Some(EngineKind::Tc) {
        return Ok((EngineKind::Tc, "asked for".to_owned()));
    }
    let sk_lookup = if !hooks {
        Some("it needs the hooks on a cgroup to learn of listeners".to_owned())
    } else if SK_LOOKUP_WORKS.get().is_some() {
        None
    } else {
        let missing = missing(sk_lookup_requirements());
        if missing.is_none() {
            let _ = SK_LOOKUP_WORKS.set(());
        }
        missing
    };
    match (wanted, sk_lookup) {
        (Some(_), None) => Ok((EngineKind::SkLookup, "asked for".to_owned())),
        (Some(_), Some(reason)) => {
            Err(Error::EngineUnavailable { engine: "sk-lookup", reason, cure: "use --engine tc, or auto" })
        }
        (None, None) => Ok((
            EngineKind::SkLookup,
            "the kernel has all it needs, and no program runs per packet".to_owned(),
        )),
        (None, Some(reason)) => match missing(tc_requirements()) {
            None => Ok((EngineKind::Tc, format!("sk-lookup cannot run: {reason}"))),
            Some(tc) => Err(Error::EngineUnavailable {
                engine: "tc",
                reason: tc,
                cure: "run Linux 5.14 or newer; `srcip doctor` lists what is missing",
            }),
        },
    }
}

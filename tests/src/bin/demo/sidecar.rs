//! The sidecar: Envoy, or HAProxy where there is none.

use std::process::Command;

use anyhow::{Context as _, Result, bail};
use srcip_tests::{
    Family,
    host::Host,
    process::run,
    proxy::{Kind, Proxy, envoy},
};

/// Which sidecar to use.
#[derive(Clone, Copy, PartialEq, Eq, Debug, clap::ValueEnum)]
pub enum Choice {
    /// Envoy if there is one, else HAProxy.
    Auto,
    /// The proxy of most meshes.
    Envoy,
    /// Its stand-in.
    Haproxy,
}

/// A sidecar.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Sidecar {
    Envoy,
    Haproxy,
}

/// The fields of Envoy's access log, so that HAProxy's says the same.
const HAPROXY_LOG: &str = r#"    log-format '{"downstream_remote_address":"%ci:%cp","downstream_local_address":"%fi:%fp","upstream_local_address":"%bi:%bp","upstream_host":"%si:%sp","response_code":"%ST","path":"%HP"}'
"#;

impl Sidecar {
    /// Picks one that is there.
    pub fn choose(choice: Choice) -> Result<Self> {
        match (choice, envoy()) {
            (Choice::Haproxy, _) | (Choice::Auto, None) => Ok(Self::Haproxy),
            (_, Some(_)) => Ok(Self::Envoy),
            (Choice::Envoy, None) => {
                bail!("no Envoy: `cargo xtask setup` installs it, or name one in SRCIP_ENVOY")
            }
        }
    }

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Envoy => "Envoy",
            Self::Haproxy => "HAProxy",
        }
    }

    /// Its name with its version, as it tells it itself.
    pub fn version(self) -> Result<String> {
        let (program, argument) = match self {
            Self::Envoy => (envoy().context("no Envoy")?, "--version"),
            Self::Haproxy => ("/usr/sbin/haproxy".into(), "-v"),
        };
        let output = run(Command::new(program).arg(argument))?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        // `HAProxy version 2.6.12-1 …`, `envoy  version: COMMIT/1.35.0/Clean/RELEASE/BoringSSL`
        let word = text.split_whitespace().nth(2).unwrap_or_default();
        let version = match self {
            Self::Envoy => word.split('/').nth(1).unwrap_or_default(),
            Self::Haproxy => word,
        };
        Ok(format!("{} {version}", self.name()))
    }

    /// The families that it takes by REDIRECT: HAProxy asks for an original destination only of IPv4.
    pub fn redirect_families(self) -> &'static [Family] {
        match self {
            Self::Envoy => &Family::BOTH,
            Self::Haproxy => &[Family::V4],
        }
    }

    /// Starts it as a mesh does by default, dialling from 127.0.0.6 and ::6.
    pub fn start_redirect(self, pod: &Host) -> Result<Proxy> {
        match self {
            Self::Envoy => Proxy::start(pod, Kind::EnvoyRedirect),
            Self::Haproxy => Proxy::start_with(pod, Kind::HaproxyRedirect, log_like_envoy),
        }
    }

    /// Starts it so that it connects with the client's address.
    pub fn start_transparent(self, pod: &Host) -> Result<Proxy> {
        match self {
            Self::Envoy => Proxy::start(pod, Kind::Envoy),
            Self::Haproxy => Proxy::start_with(pod, Kind::Haproxy, log_like_envoy),
        }
    }

    /// The lines of its access log.
    pub fn access_log(self, proxy: &Proxy) -> String {
        match self {
            Self::Envoy => proxy.access_log(),
            Self::Haproxy => proxy.process().log(),
        }
    }
}

fn log_like_envoy(config: String) -> String {
    config
        .replace("global\n", "global\n    log stdout format raw daemon\n")
        .replace("defaults\n", "defaults\n    log global\n")
        .replace("frontend inbound\n", &format!("frontend inbound\n{HAPROXY_LOG}"))
}

//! `srcip attach`

use std::path::PathBuf;

use anyhow::Result;
use clap::{Args, ValueEnum};

use super::{NetnsArg, TcHookArg, output};
use crate::{
    audit::netfilter::{Interception, Mode},
    dataplane::{
        Dataplane,
        record::{AttachSpec, CgroupChoice, EngineKind, OnProxyDown, Settings, UpstreamPortAt},
    },
    ports::{DEFAULT_UPSTREAM_PORTS, PortList, UpstreamPortList, parse_port},
    routing::ReturnRoute,
};

/// Steer a pod's inbound connections to its proxy, or change how that is done.
///
/// What is attached works on without any srcip process. Attaching again changes the settings in place,
/// without a gap. Ports 15020, 15021 and 15090 (Istio's telemetry, readiness and Prometheus) and the
/// proxy's own port are never steered.
#[derive(Debug, Args)]
pub(super) struct Attach {
    #[command(flatten)]
    netns: NetnsArg,
    /// The port the proxy takes inbound connections on (15006 for Istio's sidecar).
    #[arg(long, value_name = "PORT", value_parser = parse_port)]
    proxy_port: u16,
    /// A name for the attachment [default: the last part of the path, or pid-PID].
    #[arg(long, value_parser = parse_name)]
    name: Option<String>,
    /// Ports to steer: a list such as 8080,9000-9010, or * for all.
    #[arg(long, value_name = "LIST", default_value = "*")]
    include_inbound_ports: PortList,
    /// Ports not to steer.
    #[arg(long, value_name = "LIST")]
    exclude_inbound_ports: Option<PortList>,
    /// What to do with connections while the proxy does not listen.
    #[arg(long, value_enum, default_value = "drop")]
    on_proxy_down: OnProxyDown,
    /// How to steer.
    #[arg(long, value_enum, default_value = "auto")]
    engine: EngineArg,
    /// How the tc engine attaches.
    #[arg(long, value_enum, default_value = "auto")]
    tc_hook: TcHookArg,
    /// Routing mark for the proxy's connections to the application.
    #[arg(long, value_name = "N", default_value = "1337", value_parser = parse_mark)]
    mark: u32,
    /// Routing table that brings the application's answers back to the proxy.
    #[arg(long, value_name = "N", default_value = "133", value_parser = parse_table)]
    route_table: u32,
    /// Source ports for the proxy's connections to the application. Ports that clients do not use: a
    /// client whose own port is mirrored inside the pod hangs.
    #[arg(long, value_name = "A-B,C-D", default_value = DEFAULT_UPSTREAM_PORTS)]
    upstream_ports: UpstreamPortList,
    /// When to choose them: at bind for a proxy that binds without IP_BIND_ADDRESS_NO_PORT.
    #[arg(long, value_enum, default_value = "connect")]
    upstream_port_at: UpstreamPortAt,
    /// The cgroup v2 directory whose processes the hooks see, or `none` to do without: the proxy must
    /// then set the mark itself, and only the tc engine can steer [default: the root].
    #[arg(long, value_name = "PATH")]
    cgroup: Option<PathBuf>,
    /// Allow the host's own network namespace.
    #[arg(long)]
    host_netns: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
enum EngineArg {
    /// sk-lookup if this node can, else tc.
    Auto,
    /// A program that runs once per connection.
    SkLookup,
    /// A program on the pod's devices.
    Tc,
}

impl Attach {
    pub(super) fn run(self, dataplane: &Dataplane) -> Result<()> {
        crate::privileges::require("attach")?;
        let spec = AttachSpec {
            netns: self.netns.open()?,
            name: self.name,
            pod: None,
            settings: Settings {
                proxy_port: self.proxy_port,
                include: self.include_inbound_ports,
                exclude: self.exclude_inbound_ports.unwrap_or_else(PortList::none),
                on_proxy_down: self.on_proxy_down,
                route: ReturnRoute { mark: self.mark, table: self.route_table },
                upstream_ports: self.upstream_ports,
                upstream_port_at: self.upstream_port_at,
            },
            engine: match self.engine {
                EngineArg::Auto => None,
                EngineArg::SkLookup => Some(EngineKind::SkLookup),
                EngineArg::Tc => Some(EngineKind::Tc),
            },
            tc_hook: self.tc_hook.hook(),
            cgroup: match self.cgroup {
                None => CgroupChoice::Root,
                Some(path) if path.as_os_str() == "none" => CgroupChoice::None,
                Some(path) => CgroupChoice::Path(path),
            },
            host_netns: self.host_netns,
        };
        let attached = dataplane.attach(spec)?;
        for warning in &attached.warnings {
            eprintln!("warning: {warning}");
        }
        if !attached.replaced.is_empty() {
            eprintln!("{} programs of another build were replaced", attached.replaced.len());
        }
        let record = &attached.record;
        if let Some(warning) = redirected(&self.netns) {
            eprintln!("warning: {warning}");
        }
        for guarantee in record.missing_guarantees() {
            eprintln!("warning: {guarantee}");
        }
        let line = format!(
            "{} {}: inbound ports {}{} -> proxy port {}, engine {} ({})\n",
            record.name,
            if attached.was_attached { "changed" } else { "attached" },
            record.include_inbound_ports,
            match record.exclude_inbound_ports.as_str() {
                "" => String::new(),
                ports => format!(" except {ports}"),
            },
            record.proxy_port,
            record.engine,
            record.engine_reason,
        );
        Ok(output::print(line.as_bytes())?)
    }
}

/// Says so if rules of others take connections away before the pod's sockets are looked up. A matter of the
/// command line: it runs the programs that print rules, which takes longer than the attach.
fn redirected(netns: &NetnsArg) -> Option<String> {
    let found = Interception::read(&netns.open().ok()?);
    let (Some(Mode::Redirect), Some(port)) = (found.mode, found.proxy_port) else { return None };
    Some(format!(
        "rules in the pod take connections to port {port} by REDIRECT, where the client's address is lost; with \
         Istio, annotate the pod with sidecar.istio.io/interceptionMode: TPROXY; else `srcip audit` prints the \
         commands that take the rules away"
    ))
}

fn parse_number(text: &str) -> Option<u32> {
    match text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        Some(digits) => u32::from_str_radix(digits, 16).ok(),
        None => text.parse().ok(),
    }
}

pub(super) fn parse_mark(text: &str) -> Result<u32, String> {
    match parse_number(text) {
        Some(0) => Err("0 means no mark".to_owned()),
        Some(mark) => Ok(mark),
        None => Err(format!("{text:?} is not a mark: expected a number such as 1337 or 0x539")),
    }
}

pub(super) fn parse_table(text: &str) -> Result<u32, String> {
    match parse_number(text) {
        Some(0 | 253..=255) => Err(format!("table {text} is one of the system's own (default, main, local)")),
        Some(table) => Ok(table),
        None => Err(format!("{text:?} is not a routing table: expected a number such as 133")),
    }
}

/// Names end up in tables, JSON and, later, in labels: no control characters, no endless ones.
fn parse_name(text: &str) -> Result<String, String> {
    let valid = |c: char| c.is_ascii_alphanumeric() || "-_./:".contains(c);
    if (1..=128).contains(&text.len()) && text.chars().all(valid) {
        Ok(text.to_owned())
    } else {
        Err("a name has 1 to 128 letters, digits or any of - _ . / :".to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_tables_and_names() {
        assert_eq!(parse_mark("0x539"), Ok(1337));
        assert!(parse_mark("0").is_err());
        assert!(parse_mark("-1").is_err());
        assert_eq!(parse_table("133"), Ok(133));
        assert!(parse_table("254").unwrap_err().contains("system's own"));
        assert_eq!(parse_name("ns/pod"), Ok("ns/pod".to_owned()));
        for bad in ["", "a b", "a\n", &"x".repeat(129)] {
            assert!(parse_name(bad).is_err(), "{bad:?}");
        }
    }
}

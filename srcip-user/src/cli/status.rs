//! `srcip status`

use std::time::Duration;

use anyhow::Result;
use clap::Args;
use serde::Serialize;

use super::{
    SocketArg,
    output::{Format, or_none, print, print_data, print_table},
};
use crate::{
    agent::{
        client::{CallError, Client},
        protocol::{AgentStatus, NorthSouthStatus, PodProblem, ServiceProblem},
    },
    dataplane::{
        Dataplane,
        record::{OnProxyDown, State},
        status::{AttachmentStatus, Status},
    },
    northsouth::status::{self as north_south, EndpointStatus, ServiceStatus},
    text::printable,
};

/// An agent that is busy answers all the same; one that does not is told of as such.
const TIMEOUT: Duration = Duration::from_secs(3);

/// Show what is attached, its listeners and counters, and what the agent of this node says.
#[derive(Debug, Args)]
pub(super) struct StatusArgs {
    /// How to print it.
    #[arg(short, long, value_enum, default_value = "table")]
    output: Format,
    /// Leave the header of the table out.
    #[arg(long)]
    no_headers: bool,
    #[command(flatten)]
    socket: SocketArg,
}

/// All of it, as JSON.
#[derive(Debug, Serialize)]
struct Whole {
    #[serde(flatten)]
    status: Status,
    /// Services whose traffic from outside is handled; none if that is not set up.
    #[serde(skip_serializing_if = "Option::is_none")]
    north_south: Option<north_south::Status>,
    /// What the agent says; none if none runs.
    #[serde(skip_serializing_if = "Option::is_none")]
    agent: Option<AgentStatus>,
}

const HEADER: [&str; 8] = ["NAME", "ENGINE", "STATE", "PROXY", "LISTENERS", "STEERED", "PASSED", "REFUSED"];
const WIDE: [&str; 10] = [
    "UPSTREAM",
    "OVERLAP",
    "INCLUDE",
    "EXCLUDE",
    "ON-PROXY-DOWN",
    "MARK",
    "TABLE",
    "UPSTREAM-PORTS",
    "NETNS",
    "WHY-ENGINE",
];

const SERVICE_HEADER: [&str; 10] = [
    "SERVICE",
    "POLICY",
    "PROTOCOL",
    "FRONTENDS",
    "ENDPOINTS",
    "HERE",
    "FLOWS",
    "HANDED-ON",
    "RECEIVED",
    "DROPPED",
];
const SERVICE_WIDE: [&str; 6] =
    ["BYTES-IN", "BYTES-OUT", "AFFINITY", "SOURCE-RANGES", "RETURN", "ENDPOINT-ADDRESSES"];

impl StatusArgs {
    pub(super) fn run(self, dataplane: &Dataplane) -> Result<()> {
        crate::privileges::require("status")?;
        let status = dataplane.status()?;
        let north_south = north_south::Status::read(dataplane.pin_path())?;
        let agent = match Client::new(&self.socket.socket, TIMEOUT).status() {
            Ok(agent) => Some(agent),
            // Without an agent there is nothing to say about it.
            Err(CallError::Absent(_)) => None,
            Err(error) => {
                eprintln!("agent: {error}");
                None
            }
        };
        match self.output {
            Format::Json | Format::Yaml => {
                return print_data(&Whole { status, north_south, agent }, self.output);
            }
            Format::Table | Format::Wide => {}
        }
        let wide = self.output == Format::Wide;
        let Status { attachments } = status;
        if !attachments.is_empty() {
            self.print(&attachments, wide)?;
        } else if north_south.is_none() {
            eprintln!("nothing is attached");
        }
        if let Some(north_south) = north_south {
            if !attachments.is_empty() {
                print(b"\n")?;
            }
            self.print_north_south(&north_south, wide)?;
        }
        if let Some(agent) = agent {
            tell(&agent);
        }
        Ok(())
    }

    fn print(&self, attachments: &[AttachmentStatus], wide: bool) -> Result<()> {
        let rows: Vec<_> = attachments.iter().map(|attachment| row(attachment, wide)).collect();
        let header = if wide { [&HEADER[..], &WIDE[..]].concat() } else { HEADER.to_vec() };
        print_table(&header, &rows, !self.no_headers)?;
        for attachment in attachments {
            let name = &attachment.record.name;
            for problem in &attachment.problems {
                eprintln!("{name}: {problem}");
            }
            for guarantee in &attachment.missing_guarantees {
                eprintln!("{name}: not guaranteed: {guarantee}");
            }
        }
        Ok(())
    }

    fn print_north_south(&self, status: &north_south::Status, wide: bool) -> Result<()> {
        let rows: Vec<_> = status.services.iter().map(|service| service_row(service, wide)).collect();
        let header =
            if wide { [&SERVICE_HEADER[..], &SERVICE_WIDE[..]].concat() } else { SERVICE_HEADER.to_vec() };
        if rows.is_empty() {
            eprintln!("north-south handles no Service");
        } else {
            print_table(&header, &rows, !self.no_headers)?;
        }
        let counted = status.counters.iter().filter(|(_, count)| wide || **count > 0);
        let rows: Vec<_> = counted.map(|(name, count)| vec![(*name).to_owned(), count.to_string()]).collect();
        if !rows.is_empty() {
            print(b"\n")?;
            print_table(&["COUNTER", "PACKETS"], &rows, !self.no_headers)?;
        }
        Ok(())
    }
}

fn service_row(service: &ServiceStatus, wide: bool) -> Vec<String> {
    let ServiceStatus { name, protocol, frontends, policy, affinity_seconds, .. } = service;
    let here = service.endpoints.iter().filter(|endpoint| endpoint.node.is_none()).count();
    // An earlier version that handles it counts nothing.
    let shown = |count: Option<u64>| count.map_or_else(|| "unknown".to_owned(), |count| count.to_string());
    let count = |name: &str| shown(service.counters.get(name).copied());
    let dropped = service.counters.iter().filter(|(name, _)| name.starts_with("dropped_"));
    let dropped = shown(dropped.map(|(_, count)| *count).reduce(u64::wrapping_add));
    let mut row = vec![
        name.clone(),
        (*policy).to_owned(),
        (*protocol).to_owned(),
        or_none(&frontends.join(",")),
        service.endpoints.len().to_string(),
        here.to_string(),
        count("new_flows"),
        count("new_flows_handed_on"),
        count("new_flows_received"),
        dropped,
    ];
    if wide {
        let affinity = affinity_seconds.map(|seconds| format!("{seconds}s"));
        let endpoints: Vec<_> = service.endpoints.iter().map(endpoint).collect();
        row.extend([
            count("request_bytes"),
            count("reply_bytes"),
            or_none(&affinity.unwrap_or_default()),
            or_none(&service.source_ranges.join(",")),
            service.return_path.to_owned(),
            or_none(&endpoints.join(",")),
        ]);
    }
    row
}

/// `ADDRESS:PORT@NODE(terminating)`
fn endpoint(endpoint: &EndpointStatus) -> String {
    let node = endpoint.node.as_ref().map(|node| format!("@{node}")).unwrap_or_default();
    let state = if endpoint.state == "ready" { "" } else { "(terminating)" };
    format!("{}{node}{state}", endpoint.address)
}

/// What the agent says: beside the data, as everything that is for people only.
fn tell(agent: &AgentStatus) {
    let AgentStatus { pods, steered, waits_for, cni, north_south, problems, more_problems, .. } = agent;
    let pods = match pods {
        1 => "1 pod".to_owned(),
        pods => format!("{pods} pods"),
    };
    match waits_for {
        None => eprintln!("agent: ready, {pods} on this node, {steered} steered"),
        Some(why) => {
            eprintln!("agent: not ready, {pods} on this node, {steered} steered: {}", printable(why))
        }
    }
    if let Some(cni) = cni {
        eprintln!("agent: CNI plugin: {}", printable(cni));
    }
    if let Some(NorthSouthStatus { trouble, problems, blocked_health_checks, more }) = north_south {
        for trouble in trouble {
            eprintln!("north-south: {}", printable(trouble));
        }
        for ServiceProblem { service, note } in problems {
            let service = if service.is_empty() { "north-south" } else { service };
            eprintln!("{service}: {}: {}", note.reason, printable(&note.note));
        }
        for note in blocked_health_checks.values() {
            eprintln!("north-south: {}", printable(note));
        }
        if *more > 0 {
            eprintln!("and {more} more about north-south, which the agent's log has");
        }
    }
    for PodProblem { pod, note } in problems {
        eprintln!("{pod}: not steered: {}: {}", note.reason, printable(&note.note));
    }
    if *more_problems > 0 {
        eprintln!("and {more_problems} more pods that are not steered");
    }
}

fn row(attachment: &AttachmentStatus, wide: bool) -> Vec<String> {
    let AttachmentStatus { record, listeners, upstream_connections, counters, .. } = attachment;
    // A proxy with several workers has several listeners with one address; once is enough for people.
    let mut listeners: Vec<_> = listeners.iter().map(ToString::to_string).collect();
    listeners.sort();
    listeners.dedup();
    let mut row = vec![
        record.name.clone(),
        record.engine.to_string(),
        match record.state {
            State::Attaching => "Attaching".to_owned(),
            State::Attached => "Attached".to_owned(),
            State::Draining => format!("Draining({upstream_connections})"),
        },
        record.proxy_port.to_string(),
        or_none(&listeners.join(",")),
        counters.steered.to_string(),
        counters.passed.to_string(),
        counters.refused.to_string(),
    ];
    if wide {
        row.extend([
            format!("{upstream_connections}/{}", counters.upstream),
            counters.client_port_in_upstream_range.to_string(),
            record.include_inbound_ports.clone(),
            or_none(&record.exclude_inbound_ports),
            match record.on_proxy_down {
                OnProxyDown::Drop => "drop".to_owned(),
                OnProxyDown::Pass => "pass".to_owned(),
            },
            record.mark.to_string(),
            record.route_table.to_string(),
            record.upstream_ports.clone(),
            record.netns.display().to_string(),
            record.engine_reason.clone(),
        ]);
    }
    row
}

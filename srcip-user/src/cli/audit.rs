//! `srcip audit`

use std::{
    fmt::Write as _,
    path::PathBuf,
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::Result;
use clap::Args;
use ipnet::IpNet;

use super::{
    observe::{TargetArgs, parse_duration},
    output::{Format, print, print_data},
};
use crate::{
    audit::{
        cause::Cause,
        cluster::Cluster,
        cure::Step,
        netfilter::Mode,
        report::{Audit, Finding, Report, WorkloadReport},
    },
    dataplane::Dataplane,
    signals::Ending,
    telemetry::{
        filter::parse_network,
        observer::{Observer, POLL_INTERVAL},
    },
    text::printable,
};

/// Tell which workloads do not see their clients' addresses, where the address is lost, and what brings it
/// back.
///
/// It looks on for a while and changes nothing: no connection is steered, nothing is left behind. Run it
/// first, on a node as it is. Exit code 0: it ran, whatever it found; with --fail-on-loss 3 if a client's
/// address is lost somewhere.
#[derive(Debug, Args)]
pub(super) struct AuditArgs {
    /// How long to look on, such as 30s or 5m; Ctrl-C ends it earlier.
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = parse_duration)]
    duration: Duration,
    #[command(flatten)]
    target: TargetArgs,
    #[command(flatten)]
    cluster: ClusterArgs,
    /// How to print it.
    #[arg(short, long, value_enum, default_value = "table")]
    output: Format,
    /// Exit with code 3 if a client's address is lost somewhere.
    #[arg(long)]
    fail_on_loss: bool,
}

/// What is known of the cluster.
#[derive(Debug, Args)]
pub(super) struct ClusterArgs {
    /// A directory of manifests (YAML or JSON): Nodes, Services, Pods.
    #[arg(long, value_name = "DIR")]
    manifests: Option<PathBuf>,
    /// The address of a node, or a network of them.
    #[arg(long, value_name = "CIDR", value_parser = parse_network)]
    node_address: Vec<IpNet>,
    /// Where load balancers that end connections connect from.
    #[arg(long, value_name = "CIDR", value_parser = parse_network)]
    load_balancer: Vec<IpNet>,
    /// A Service that lets traffic in to the pods looked at, with its externalTrafficPolicy.
    #[arg(long, value_name = "NAMESPACE/NAME[:POLICY]")]
    service: Vec<String>,
}

impl ClusterArgs {
    pub(super) fn cluster(&self) -> Result<Cluster> {
        let mut cluster = match &self.manifests {
            Some(directory) => Cluster::from_manifests(directory)?,
            None => Cluster::default(),
        };
        cluster.nodes.extend(self.node_address.iter().map(|network| (*network, None)));
        cluster.load_balancers.extend(&self.load_balancer);
        self.service.iter().try_for_each(|service| cluster.add_service(service))?;
        Ok(cluster)
    }
}

/// Exit code for `--fail-on-loss`.
const LOST: u8 = 3;

impl AuditArgs {
    pub(super) fn run(self, dataplane: &Dataplane) -> Result<std::process::ExitCode> {
        crate::privileges::require("audit")?;
        let cluster = self.cluster.cluster()?;
        let options = self.target.options()?;
        let mut observer = Observer::start(dataplane, &options)?;
        let mut audit = Audit::new(cluster);
        let ending = Ending::watch()?;
        eprintln!("looking on for {} s (Ctrl-C ends it earlier)", self.duration.as_secs());
        let end = Instant::now() + self.duration;
        while Instant::now() < end && !ending.has_come() {
            sleep(POLL_INTERVAL);
            look(&mut observer, &mut audit)?;
        }
        // Once more: what came before the end is told.
        look(&mut observer, &mut audit)?;
        for record in observer.open_records() {
            audit.still_open(&record, observer.workloads());
        }
        let lost = observer.accounting()?.lost();
        if lost > 0 {
            eprintln!("warning: {lost} events were lost: the counts are too low");
        }
        let report = audit.report();
        match self.output {
            Format::Json | Format::Yaml => print_data(&report, self.output)?,
            Format::Table | Format::Wide => print(text(&report, self.output == Format::Wide).as_bytes())?,
        }
        if report.workloads.is_empty() {
            eprintln!("no connection reached a pod in this time; try a longer --duration");
        }
        Ok(if self.fail_on_loss && !report.is_clean() {
            LOST.into()
        } else {
            std::process::ExitCode::SUCCESS
        })
    }
}

fn look(observer: &mut Observer, audit: &mut Audit) -> Result<()> {
    let mut records = Vec::new();
    observer.poll(|record| records.push(record))?;
    for record in &records {
        audit.record(record, observer.workloads());
    }
    Ok(())
}

/// The report for people: a table, then what to do.
fn text(report: &Report, wide: bool) -> String {
    let mut rows = vec![HEADER.map(str::to_owned).join("\t")];
    for workload in &report.workloads {
        rows.extend(workload.findings.iter().map(|finding| row(workload, finding).join("\t")));
    }
    let mut table = tabwriter::TabWriter::new(Vec::new()).padding(3);
    let written = std::io::Write::write_all(&mut table, (rows.join("\n") + "\n").as_bytes());
    let mut text = match written.ok().and_then(|()| table.into_inner().ok()) {
        Some(bytes) if !report.workloads.is_empty() => String::from_utf8_lossy(&bytes).into_owned(),
        _ => String::new(),
    };
    for workload in &report.workloads {
        for finding in &workload.findings {
            if finding.cause.loses() || wide {
                explain(&mut text, workload, finding, wide);
            }
        }
    }
    if report.is_clean() && !report.workloads.is_empty() {
        text.push_str("\nEvery application sees its clients: nothing needs doing.\n");
    }
    text
}

const HEADER: [&str; 7] = ["WORKLOAD", "PORT", "CONNECTIONS", "VERDICT", "APPLICATION SEES", "CLIENT", "WHY"];

fn row(workload: &WorkloadReport, finding: &Finding) -> [String; 7] {
    let some = |list: Vec<String>, unknown: &str| match &list[..] {
        [] => unknown.to_owned(),
        [_] | [_, _] => list.join(","),
        [one, rest @ ..] => format!("{one} and {} more", rest.len()),
    };
    let strings =
        |ips: &std::collections::BTreeSet<std::net::IpAddr>| ips.iter().map(ToString::to_string).collect();
    [
        printable(&workload.workload),
        some(finding.ports.iter().map(u16::to_string).collect(), "-"),
        finding.connections.to_string(),
        if finding.cause.loses() { "lost" } else { "preserved" }.to_owned(),
        some(strings(&finding.application_saw), "-"),
        some(strings(&finding.clients), "unknown here"),
        match finding.cause {
            Cause::Preserved { by } => by.name().to_owned(),
            _ => finding.cause.name().to_owned(),
        },
    ]
}

fn explain(text: &mut String, workload: &WorkloadReport, finding: &Finding, wide: bool) {
    let name = workload.pod.as_ref().unwrap_or(&workload.workload);
    // Writing to a String does not fail.
    let _ = writeln!(text, "\n{}: {}.", printable(name), printable(&finding.cure.explanation));
    if wide {
        match workload.interception.mode {
            Some(Mode::Redirect) => text.push_str("  Intercepted by REDIRECT:\n"),
            Some(Mode::Tproxy) => text.push_str("  Intercepted by TPROXY:\n"),
            None => {}
        }
        for rule in &workload.interception.rules {
            let _ = writeln!(text, "    {}", printable(rule));
        }
    }
    if let Some(why) = &workload.interception.unreadable {
        let _ = writeln!(text, "  The rules in its network namespace are not known: {}.", printable(why));
    }
    text.push_str(&steps_text(&finding.cure.steps));
}

/// The steps of a cure, numbered if there are several.
pub(super) fn steps_text(steps: &[Step]) -> String {
    let mut text = String::new();
    for (i, step) in steps.iter().enumerate() {
        let number = if steps.len() > 1 { format!("{}. ", i + 1) } else { String::new() };
        let colon = if step.commands.is_empty() { "." } else { ":" };
        let _ = writeln!(text, "  {number}{}{colon}", printable(&step.what));
        for command in &step.commands {
            let _ = writeln!(text, "       {}", printable(command));
        }
    }
    text
}

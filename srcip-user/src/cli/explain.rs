//! `srcip explain`

use std::{
    net::SocketAddr,
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Result, bail};
use clap::Args;
use serde::Serialize;

use super::{
    audit::{ClusterArgs, steps_text},
    observe::{TargetArgs, parse_duration},
    output::{Format, print, print_data},
};
use crate::{
    audit::{
        cause::Surroundings,
        cluster::Cluster,
        explain::{End, Match, explain, matches},
        frontend::{Way, ways},
        netfilter::Interception,
    },
    dataplane::Dataplane,
    northsouth::dataplane::trace::Reader,
    signals::Ending,
    telemetry::{
        history::history,
        observer::{Observer, POLL_INTERVAL},
        record::{Leg, Record},
    },
    text::printable,
};

/// Explain one connection: its hops, the address at each, and where it changes.
///
/// Of the connections that fit, it takes the last one: one that is open, one that srcip remembers of a
/// steered pod, or the first that comes while it waits.
///
/// If --to names what north-south handles on this node, no connection is needed: it tells the way that packets take
/// from there, as it is programmed. With --from ADDRESS:PORT, to which pod; else the shares of all.
#[derive(Debug, Args)]
pub(super) struct ExplainArgs {
    /// The client: an address, with a port for one connection among several.
    #[arg(long, value_name = "ADDRESS[:PORT]", required_unless_present = "to")]
    from: Option<End>,
    /// The destination: the pod's address, a Service's, or a node's with the node port.
    #[arg(long, value_name = "ADDRESS[:PORT]")]
    to: Option<End>,
    /// How long to wait for one.
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = parse_duration)]
    wait: Duration,
    #[command(flatten)]
    target: TargetArgs,
    #[command(flatten)]
    cluster: ClusterArgs,
    /// How to print it.
    #[arg(short, long, value_enum, default_value = "table")]
    output: Format,
}

/// An upstream leg follows its downstream leg by as much as a proxy takes to connect.
const SECOND_LEG: Duration = Duration::from_millis(500);

/// The ways from a frontend, as JSON.
#[derive(Serialize)]
struct Ways<'a> {
    north_south: &'a [Way],
}

/// The connection that fits best, and among equals the last.
struct Best<'a> {
    from: Option<End>,
    to: Option<End>,
    cluster: &'a Cluster,
    /// With whether all that there is to it is known.
    found: Option<(Match, bool, Record)>,
}

impl Best<'_> {
    fn consider(&mut self, record: Record) {
        let Some(fits) = matches(&record, self.from, self.to, self.cluster) else { return };
        let whole = record.leg == Leg::Direct || record.upstream_local_address.is_some();
        if self.found.as_ref().is_none_or(|(known, was_whole, _)| (*known, *was_whole) <= (fits, whole)) {
            self.found = Some((fits, whole, record));
        }
    }

    /// Whether nothing better can come. What looks direct may be a proxy's that has not connected yet.
    fn is_settled(&self) -> bool {
        matches!(&self.found, Some((Match::Exact, true, record)) if record.leg != Leg::Direct)
    }
}

impl ExplainArgs {
    pub(super) fn run(self, dataplane: &Dataplane) -> Result<()> {
        crate::privileges::require("explain")?;
        let cluster = self.cluster.cluster()?;
        let reader = Reader::open(dataplane.pin_path())?;
        if let (Some(reader), Some(End { ip, port: Some(port) })) = (&reader, self.to) {
            let to = SocketAddr::new(ip, port);
            let ways = ways(reader, self.from, to, &cluster)?;
            if !ways.is_empty() {
                return self.tell(&ways);
            }
            eprintln!("north-south handles nothing at {to} on this node; looking for a connection of a pod");
        }
        let options = self.target.options()?;
        let mut observer = Observer::start(dataplane, &options)?;
        let mut best = Best { from: self.from, to: self.to, cluster: &cluster, found: None };
        history(dataplane, observer.workloads())?.into_iter().for_each(|record| best.consider(record));
        observer.open_records().into_iter().for_each(|record| best.consider(record));
        let ending = Ending::watch()?;
        if best.found.is_none() {
            eprintln!("no connection fits so far; waiting for one for {} s", self.wait.as_secs());
        }
        let mut end = Instant::now() + self.wait;
        let mut waits_for_second_leg = false;
        while !best.is_settled() && Instant::now() < end && !ending.has_come() {
            if best.found.is_some() && !waits_for_second_leg {
                waits_for_second_leg = true;
                end = end.min(Instant::now() + SECOND_LEG);
            }
            observer.poll(|record| best.consider(record))?;
            sleep(POLL_INTERVAL);
        }
        let Some((fits, _, record)) = best.found else {
            let north_south = match reader {
                Some(_) => "",
                None => ". North-south is not set up on this node: that takes `srcip agent --uplink`",
            };
            bail!(
                "no connection of a pod fits within {} s: is the client connecting, and is the pod on this \
                 node? `srcip observe -f` shows all there are{north_south}",
                self.wait.as_secs()
            );
        };
        let Some(workload) = observer.workloads().get(record.netns_cookie) else {
            bail!("the pod {} has gone meanwhile", record.workload);
        };
        let interception = Interception::read_at(&workload.netns);
        let pod = cluster.pod(|ip| workload.addresses.contains(&ip));
        let around = Surroundings { workload, pod, interception: &interception, cluster: &cluster };
        let explanation = explain(&record, self.from, around);
        if matches!(self.output, Format::Json | Format::Yaml) {
            return print_data(&explanation, self.output);
        }
        let mut text = explanation.draw();
        if fits == Match::Behind {
            text.push_str("\nThe pod sees no connection of that client: this one may be it.\n");
        }
        if explanation.inferred {
            text.push_str(
                "\nThe proxy has several connections; which of them serves this one is inferred.\n",
            );
        }
        for finding in &explanation.findings {
            text.push_str(&format!(
                "\n{}: {}.\n",
                finding.cause.name(),
                printable(&finding.cure.explanation)
            ));
            text.push_str(&steps_text(&finding.cure.steps));
        }
        Ok(print(text.as_bytes())?)
    }

    /// Tells what north-south does.
    fn tell(&self, ways: &[Way]) -> Result<()> {
        if matches!(self.output, Format::Json | Format::Yaml) {
            return print_data(&Ways { north_south: ways }, self.output);
        }
        let pictures: Vec<_> = ways.iter().map(Way::draw).collect();
        Ok(print(pictures.join("\n").as_bytes())?)
    }
}

//! `srcip observe`

mod pipe;
mod print;

use std::{
    path::PathBuf,
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use clap::{ArgGroup, Args, ValueEnum};
use ipnet::IpNet;

use self::print::Printer;
use crate::{
    audit::netfilter::find_proxy,
    dataplane::{Dataplane, hooks::resolve_cgroup, record::CgroupChoice},
    netns::Netns,
    signals::Ending,
    telemetry::{
        clock::Clock,
        filter::{Filter, parse_network},
        history::history,
        observer::{Accounting, Observer, Options, POLL_INTERVAL},
        record::{Leg, Record, Timestamp},
        workload::Workloads,
    },
};

/// How often it is said that events have been lost, while that goes on.
const WARNING_INTERVAL: Duration = Duration::from_secs(1);

/// Show connections as they come and go, with the client they come from.
///
/// Without -f, what is remembered of the pods that srcip steers: the last 20 openings and ends, or as many
/// as --last and --since say. With -f, what happens from now on in all pods, steered or not, until Ctrl-C;
/// --last and --since then put what is remembered before it. The end of a connection is told of if its
/// opening was. No agent is needed: with -f the command loads its own watching program, which goes when the
/// command ends.
#[derive(Debug, Args)]
pub(super) struct Observe {
    /// Tell what happens from now on, until Ctrl-C or until nobody reads it any more.
    #[arg(short, long)]
    follow: bool,
    /// Of what is remembered, only what has happened within this time, such as 30s, 5m or 1h.
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    since: Option<Duration>,
    /// Of what is remembered, only the last N [default: 20 without -f, none with it; all with --since].
    #[arg(long, value_name = "N")]
    last: Option<usize>,
    #[command(flatten)]
    filter: FilterArgs,
    #[command(flatten)]
    target: TargetArgs,
    /// How to print it.
    #[arg(short, long, value_enum, default_value = "compact")]
    output: Format,
    /// Leave the header of the table out.
    #[arg(long)]
    no_headers: bool,
}

/// Which connections are wanted. All conditions have to hold; of one that is given several times, one.
#[derive(Debug, Args)]
#[command(group = ArgGroup::new("condition").multiple(true)
          .args(["from", "to", "port", "pod", "leg", "lost"]))]
pub(super) struct FilterArgs {
    #[command(flatten)]
    selection: SelectionArgs,
    /// Only these legs.
    #[arg(long, value_enum)]
    leg: Vec<Leg>,
    /// Only connections whose origin does not reach the application.
    #[arg(long)]
    lost: bool,
    /// All but those that the other conditions describe.
    #[arg(long, requires = "condition")]
    not: bool,
}

/// The conditions that hold for a connection from its beginning to its end.
#[derive(Debug, Args)]
pub(super) struct SelectionArgs {
    /// From clients in this network, or with this address.
    #[arg(long, value_name = "CIDR", value_parser = parse_network)]
    from: Vec<IpNet>,
    /// To destinations in this network, or with this address.
    #[arg(long, value_name = "CIDR", value_parser = parse_network)]
    to: Vec<IpNet>,
    /// To this port.
    #[arg(long, value_name = "PORT")]
    port: Vec<u16>,
    /// Of the pod with this name.
    #[arg(long, value_name = "NAME")]
    pod: Vec<String>,
}

/// What to look at.
#[derive(Debug, Args)]
pub(super) struct TargetArgs {
    /// The network namespace of a pod [default: all but the host's].
    #[arg(long, value_name = "PATH")]
    netns: Vec<PathBuf>,
    /// The cgroup v2 directory whose processes are seen [default: the root].
    #[arg(long, value_name = "PATH")]
    cgroup: Option<PathBuf>,
}

impl TargetArgs {
    pub(super) fn options(&self) -> Result<Options> {
        let choice = self.cgroup.clone().map_or(CgroupChoice::Root, CgroupChoice::Path);
        Ok(Options {
            netns: self.netns.clone(),
            cgroup: resolve_cgroup(&choice)?.ok_or_else(|| {
                anyhow::anyhow!(
                    "no cgroup v2 is mounted, and srcip learns of connections from it; \
                     mount one with `mount -t cgroup2 none /sys/fs/cgroup/unified`"
                )
            })?,
            find_proxy: Some(find_proxy),
        })
    }
}

impl From<SelectionArgs> for Filter {
    fn from(args: SelectionArgs) -> Self {
        let SelectionArgs { from, to, port, pod } = args;
        Self { from, to, ports: port, workloads: pod, ..Self::default() }
    }
}

impl From<FilterArgs> for Filter {
    fn from(args: FilterArgs) -> Self {
        let FilterArgs { selection, leg, lost, not } = args;
        Self { legs: leg, lost, not, ..selection.into() }
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
enum Format {
    /// A line for people.
    Compact,
    /// An object a line; names are stable.
    Json,
    /// Columns.
    Table,
}

impl Observe {
    pub(super) fn run(self, dataplane: &Dataplane) -> Result<()> {
        crate::privileges::require_watching("observe")?;
        let ending = Ending::watch().context("failed to catch signals")?;
        let filter = Filter::from(self.filter);
        let mut printer = Printer::new(self.output, !self.no_headers, ending.clone());
        let past = Past { since: self.since, last: self.last, netns: &self.target.netns };
        if self.follow {
            // Started before the past is read, so that nothing falls in between.
            let observer = Observer::start(dataplane, &self.target.options()?)?;
            // What is before this moment is the past, and not told of again.
            let with_past = self.since.is_some() || self.last.is_some();
            let from = with_past.then(|| observer.started());
            if with_past {
                let records = past.records(dataplane, &filter, observer.workloads(), from)?;
                records.iter().for_each(|record| printer.print(record));
            }
            let wanted =
                |record: &Record| filter.wants(record) && from.is_none_or(|from| record.time >= from);
            follow(observer, wanted, &mut printer, &ending)?;
        } else {
            let workloads = past.workloads(dataplane)?;
            let records = past.records(dataplane, &filter, &workloads, None)?;
            records.iter().for_each(|record| printer.print(record));
            if records.is_empty() {
                eprintln!(
                    "nothing is remembered that fits; `srcip observe -f` shows what happens from now on"
                );
            }
        }
        printer.finish()
    }
}

/// Tells what happens until it is asked to end, or until nobody reads it any more.
fn follow(
    mut observer: Observer,
    wanted: impl Fn(&Record) -> bool,
    printer: &mut Printer,
    ending: &Ending,
) -> Result<()> {
    let mut lost = 0;
    let mut warned: Option<Instant> = None;
    tracing::debug!("watching");
    loop {
        // Once more after the signal: what came before it is told.
        let last = ending.has_come();
        observer.poll(|record| {
            if wanted(&record) {
                printer.print(&record);
            }
        })?;
        printer.flush();
        let now = observer.accounting()?.lost();
        if now != lost && (last || warned.is_none_or(|warned| warned.elapsed() >= WARNING_INTERVAL)) {
            eprintln!("warning: {} events were lost: this reader is too slow", now - lost);
            lost = now;
            warned = Some(Instant::now());
        }
        if last || printer.is_closed() {
            let Accounting { opened, opened_delivered, opened_lost, closed, closed_delivered, closed_lost } =
                observer.accounting()?;
            tracing::debug!(
                "{opened} opened = {opened_delivered} told of + {opened_lost} lost, \
                 {closed} closed = {closed_delivered} told of + {closed_lost} lost"
            );
            return Ok(());
        }
        sleep(POLL_INTERVAL);
    }
}

/// What is wanted of what is remembered.
struct Past<'a> {
    since: Option<Duration>,
    last: Option<usize>,
    netns: &'a [PathBuf],
}

impl Past<'_> {
    /// The pods, for who does not observe.
    fn workloads(&self, dataplane: &Dataplane) -> Result<Workloads> {
        let mut workloads = Workloads::new(None);
        if self.netns.is_empty() {
            workloads.refresh(dataplane);
        }
        for path in self.netns {
            workloads.add(&Netns::open(path)?, dataplane);
        }
        Ok(workloads)
    }

    /// Records, oldest first; only of what happened before `until`.
    fn records(
        &self,
        dataplane: &Dataplane,
        filter: &Filter,
        workloads: &Workloads,
        until: Option<Timestamp>,
    ) -> Result<Vec<Record>> {
        let mut records = history(dataplane, workloads)?;
        // The recorder knows all steered pods of this node.
        records.retain(|record| {
            (self.netns.is_empty() || workloads.get(record.netns_cookie).is_some())
                && until.is_none_or(|until| record.time < until)
                && filter.wants(record)
        });
        if let Some(since) = self.since {
            let now = Clock::now().current();
            records.retain(|record| u128::from(now.0.saturating_sub(record.time.0)) <= since.as_nanos());
        }
        let last = self.last.unwrap_or(if self.since.is_some() { usize::MAX } else { 20 });
        Ok(records.split_off(records.len().saturating_sub(last)))
    }
}

/// `30s`, `5m`, `1h`, `2d`; a bare number is seconds.
pub(super) fn parse_duration(text: &str) -> Result<Duration, String> {
    let (digits, unit) = text.split_at(text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len()));
    let seconds = match unit {
        "" | "s" => 1,
        "m" => 60,
        "h" => 3600,
        "d" => 86_400,
        _ => 0,
    };
    match digits.parse::<u64>().ok().and_then(|number| number.checked_mul(seconds)) {
        Some(seconds) if seconds > 0 => Ok(Duration::from_secs(seconds)),
        _ => Err(format!("{text:?} is not a time: expected a number with s, m, h or d, such as 30s or 5m")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times() {
        for (text, seconds) in [("30", 30), ("30s", 30), ("5m", 300), ("1h", 3600), ("2d", 172_800)] {
            assert_eq!(parse_duration(text), Ok(Duration::from_secs(seconds)), "{text}");
        }
        for bad in ["", "s", "0s", "-1s", "1w", "1.5h", "99999999999999999999s"] {
            assert!(parse_duration(bad).is_err(), "{bad:?}");
        }
    }
}

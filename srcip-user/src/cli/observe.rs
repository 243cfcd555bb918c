//! `srcip observe`

use std::{
    io::{self, Write as _},
    path::PathBuf,
    thread::sleep,
    time::Duration,
};

use anyhow::Result;
use clap::{Args, ValueEnum};
use ipnet::IpNet;

use super::output::colour;
use crate::{
    dataplane::{Dataplane, hooks::cgroup_root},
    telemetry::{
        filter::{Filter, parse_network},
        history::history,
        observer::{Observer, Options, POLL_INTERVAL},
        record::{EventKind, Join, Leg, Record},
    },
};

/// Show connections as they come and go, with the client they come from.
///
/// Without -f, those that are remembered of steered pods; with -f, those of all pods from now on. No agent
/// is needed: the command loads its own watching program, which goes when the command ends.
#[derive(Debug, Args)]
pub(super) struct Observe {
    /// Go on, with what happens from now on.
    #[arg(short, long)]
    follow: bool,
    /// Only what has happened within this time, such as 30s, 5m or 1h.
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    since: Option<Duration>,
    /// Only the last N of what is remembered [default: 20 without -f, 0 with it].
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
pub(super) struct FilterArgs {
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
    /// Only these legs.
    #[arg(long, value_enum)]
    leg: Vec<Leg>,
    /// Only connections whose origin does not reach the application.
    #[arg(long)]
    lost: bool,
    /// All but those.
    #[arg(long)]
    not: bool,
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
        let cgroup = self.cgroup.clone().or_else(cgroup_root);
        Ok(Options {
            netns: self.netns.clone(),
            cgroup: cgroup.ok_or_else(|| {
                anyhow::anyhow!(
                    "no cgroup v2 is mounted, and srcip learns of connections from it; \
                     mount one with `mount -t cgroup2 none /sys/fs/cgroup/unified`"
                )
            })?,
            find_proxy: None,
        })
    }
}

impl From<FilterArgs> for Filter {
    fn from(args: FilterArgs) -> Self {
        let FilterArgs { from, to, port, pod, leg, lost, not } = args;
        Self { from, to, ports: port, workloads: pod, legs: leg, lost, not }
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
        crate::privileges::require("observe")?;
        let filter = Filter::from(self.filter);
        let mut printer = Printer::new(self.output, !self.no_headers);
        // Started before the past is read, so that nothing falls in between.
        let mut observer = Observer::start(dataplane, &self.target.options()?)?;
        let asked_for_past = self.since.is_some() || self.last.is_some();
        if asked_for_past || !self.follow {
            let last = self.last.unwrap_or(if self.since.is_some() { usize::MAX } else { 20 });
            let mut past = history(dataplane, observer.workloads())?;
            past.retain(|record| filter.wants(record));
            if let Some(since) = self.since {
                let now = crate::telemetry::join::Clock::now().current();
                past.retain(|record| now.0.saturating_sub(record.time.0) <= since.as_nanos() as u64);
            }
            for record in &past[past.len().saturating_sub(last)..] {
                printer.print(record);
            }
            if past.is_empty() && !self.follow {
                eprintln!(
                    "nothing is remembered that fits; `srcip observe -f` shows what happens from now on"
                );
            }
        }
        if !self.follow {
            return printer.finish();
        }
        let mut lost = 0;
        while !printer.closed {
            observer.poll(|record| {
                if filter.wants(&record) {
                    printer.print(&record);
                }
            })?;
            printer.flush();
            let now = observer.accounting()?.lost();
            if now != lost {
                eprintln!("warning: {} events were lost: this reader is too slow", now - lost);
                lost = now;
            }
            if !printer.closed {
                printer.check();
                sleep(POLL_INTERVAL);
            }
        }
        printer.finish()
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

/// Prints records to stdout, in whole lines.
struct Printer {
    out: io::BufWriter<io::Stdout>,
    format: Format,
    colour: bool,
    header: bool,
    /// The reader has seen enough (`srcip observe | head`): no error.
    closed: bool,
    error: Option<io::Error>,
}

impl Printer {
    fn new(format: Format, header: bool) -> Self {
        Self {
            out: io::BufWriter::with_capacity(64 * 1024, io::stdout()),
            format,
            colour: colour(&io::stdout()),
            header: header && format == Format::Table,
            closed: false,
            error: None,
        }
    }

    fn print(&mut self, record: &Record) {
        if self.closed {
            return;
        }
        if std::mem::take(&mut self.header) {
            let written = writeln!(self.out, "{}", table_header());
            self.note(written);
        }
        let written = match self.format {
            Format::Json => serde_json::to_writer(&mut self.out, record)
                .map_err(io::Error::from)
                .and_then(|()| self.out.write_all(b"\n")),
            Format::Compact => writeln!(self.out, "{}", compact(record, self.colour)),
            Format::Table => writeln!(self.out, "{}", table_row(record)),
        };
        self.note(written);
    }

    fn flush(&mut self) {
        let flushed = self.out.flush();
        self.note(flushed);
    }

    /// Notices a reader that has gone while there is nothing to write.
    fn check(&mut self) {
        use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
        use std::os::fd::AsFd as _;
        let stdout = io::stdout();
        let mut fds = [PollFd::new(stdout.as_fd(), PollFlags::empty())];
        if poll(&mut fds, PollTimeout::ZERO).is_ok()
            && fds[0]
                .revents()
                .is_some_and(|events| events.intersects(PollFlags::POLLERR | PollFlags::POLLNVAL))
        {
            self.closed = true;
        }
    }

    fn note(&mut self, result: io::Result<()>) {
        if let Err(error) = result {
            self.closed = true;
            if error.kind() != io::ErrorKind::BrokenPipe {
                self.error = Some(error);
            }
        }
    }

    fn finish(mut self) -> Result<()> {
        if !self.closed {
            self.flush();
        }
        // What could not be written is not tried again.
        let (_, _) = self.out.into_parts();
        self.error.map_or(Ok(()), |error| Err(error.into()))
    }
}

fn verdict(record: &Record) -> &'static str {
    match record.preserved {
        Some(true) => "preserved",
        Some(false) => "lost",
        None => "",
    }
}

fn or_dash<T: ToString>(value: Option<T>) -> String {
    value.map_or_else(|| "-".to_owned(), |value| value.to_string())
}

/// `12:00:01.123456 open  httpbin  upstream  10.0.0.1:40000 -> 10.0.0.2:8000  application sees …`
fn compact(record: &Record, colour: bool) -> String {
    let time = record.time.to_string();
    let time = time.split_once('T').map_or(time.as_str(), |(_, time)| time.trim_end_matches('Z'));
    let event = match record.event {
        EventKind::Open => "open ",
        EventKind::Close => "close",
    };
    let mut line = format!(
        "{time} {event} {} {:<10} {} -> {}",
        record.workload,
        record.leg,
        or_dash(record.downstream_remote_address),
        or_dash(record.downstream_local_address),
    );
    if record.leg == Leg::Upstream || record.upstream_local_address.is_some() {
        line.push_str(&format!(
            " => {} -> {}",
            or_dash(record.upstream_local_address),
            or_dash(record.upstream_host)
        ));
    }
    if let Some(totals) = &record.totals {
        line.push_str(&format!(
            " {} B sent, {} B received, {:.1} ms, rtt {} us",
            totals.bytes_sent, totals.bytes_received, totals.duration_ms, totals.rtt_us
        ));
    }
    let verdict = verdict(record);
    if !verdict.is_empty() {
        let code = if verdict == "lost" { "31" } else { "32" };
        line.push_str(&if colour { format!(" \x1b[{code}m{verdict}\x1b[0m") } else { format!(" {verdict}") });
    }
    if record.join == Some(Join::Inferred) {
        line.push_str(" (inferred)");
    }
    line
}

fn table_header() -> String {
    columns(
        ["TIME", "EVENT", "POD", "LEG", "ORIGIN", "DESTINATION", "APPLICATION SEES", "VERDICT"]
            .map(String::from),
    )
}

fn table_row(record: &Record) -> String {
    let time = record.time.to_string();
    let sees = match record.leg {
        Leg::Direct => record.downstream_remote_address.map(|a| a.0),
        _ => record.upstream_local_address.map(|a| a.0),
    };
    columns([
        time.split_once('T').map_or(time.clone(), |(_, time)| time.trim_end_matches('Z').to_owned()),
        format!("{:?}", record.event).to_lowercase(),
        record.workload.to_string(),
        record.leg.to_string(),
        or_dash(record.origin.map(|a| a.0).or(record.downstream_remote_address.map(|a| a.0))),
        or_dash(record.downstream_local_address.map(|a| a.0).or(record.upstream_host.map(|a| a.0))),
        or_dash(sees),
        match (verdict(record), record.join) {
            (verdict, Some(Join::Inferred)) => format!("{verdict} (inferred)"),
            (verdict, _) => verdict.to_owned(),
        },
    ])
}

/// Lines come one at a time, so the columns have fixed widths; what is longer pushes the rest along.
fn columns([time, event, pod, leg, origin, destination, sees, verdict]: [String; 8]) -> String {
    let line = format!(
        "{time:<15} {event:<5} {pod:<16} {leg:<10} {origin:<21} {destination:<21} {sees:<21} {verdict}"
    );
    line.trim_end().to_owned()
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

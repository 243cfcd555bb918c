//! Records as lines.

use std::io::{self, BufWriter, Write};

use anyhow::Result;
use serde::Serialize as _;
use serde_json::ser::Formatter;

use super::{Format, pipe::Pipe};
use crate::{
    cli::output::colour,
    signals::Ending,
    telemetry::record::{EventKind, Join, Leg, Record},
    text::{elide, is_unprintable, left, printable, width},
};

/// What a column may grow to. What is longer is shortened in the middle; in JSON it is whole.
const WIDEST: usize = 47;

/// Prints records to stdout, in whole lines.
pub(super) struct Printer {
    out: BufWriter<Pipe>,
    format: Format,
    colour: bool,
    header: bool,
    columns: Columns,
    /// The reader has seen enough (`srcip observe | head`): no error.
    closed: bool,
    error: Option<io::Error>,
}

impl Printer {
    pub(super) fn new(format: Format, header: bool, ending: Ending) -> Self {
        Self {
            out: BufWriter::with_capacity(64 * 1024, Pipe::new(ending)),
            format,
            colour: colour(&io::stdout()),
            header: header && format == Format::Table,
            columns: Columns::default(),
            closed: false,
            error: None,
        }
    }

    /// Prints one; it is out after [`Self::flush`].
    pub(super) fn print(&mut self, record: &Record) {
        if self.closed {
            return;
        }
        // With the first line below it, so that the header is as wide.
        let line = match self.format {
            Format::Json => json(record),
            Format::Compact => Ok(self.columns.compact(record, self.colour)),
            Format::Table => Ok(self.columns.row(record, self.colour)),
        };
        let header = std::mem::take(&mut self.header).then(|| self.columns.header() + "\n");
        let written = line.and_then(|line| writeln!(self.out, "{}{line}", header.unwrap_or_default()));
        self.note(written);
    }

    /// Hands over what has been printed.
    pub(super) fn flush(&mut self) {
        if !self.closed {
            let flushed = self.out.flush();
            self.note(flushed);
        }
    }

    /// Whether there is no sense in printing more.
    pub(super) fn is_closed(&mut self) -> bool {
        self.closed |= self.out.get_ref().is_closed();
        self.closed
    }

    fn note(&mut self, result: io::Result<()>) {
        if let Err(error) = result {
            self.closed = true;
            if error.kind() != io::ErrorKind::BrokenPipe {
                self.error = Some(error);
            }
        }
    }

    /// Hands over the rest.
    pub(super) fn finish(mut self) -> Result<()> {
        self.flush();
        // What could not be written is not tried again.
        let (_, _) = self.out.into_parts();
        self.error.map_or(Ok(()), |error| Err(anyhow::Error::new(error).context("failed to write")))
    }
}

/// A line of JSON. What a terminal would obey is escaped, also where JSON does not ask for it.
fn json(record: &Record) -> io::Result<String> {
    let mut line = Vec::with_capacity(512);
    record.serialize(&mut serde_json::Serializer::with_formatter(&mut line, Escaping))?;
    String::from_utf8(line).map_err(io::Error::other)
}

struct Escaping;

impl Formatter for Escaping {
    fn write_string_fragment<W: ?Sized + Write>(&mut self, writer: &mut W, fragment: &str) -> io::Result<()> {
        let mut rest = fragment;
        while let Some(at) = rest.find(is_unprintable) {
            writer.write_all(&rest.as_bytes()[..at])?;
            let mut after = rest[at..].chars();
            // All of them are in the basic plane: one unit of UTF-16.
            write!(writer, "\\u{:04x}", after.next().map_or(0xfffd, u32::from))?;
            rest = after.as_str();
        }
        writer.write_all(rest.as_bytes())
    }
}

/// Widths of columns. Lines come one at a time: when one has a longer text than those before, its column
/// stays wider from then on.
#[derive(Debug)]
struct Columns {
    widths: [usize; 7],
}

impl Default for Columns {
    fn default() -> Self {
        Self { widths: [15, 5, 12, 10, 21, 21, 21] }
    }
}

const TITLES: [&str; 8] =
    ["TIME", "EVENT", "POD", "LEG", "ORIGIN", "DESTINATION", "APPLICATION SEES", "VERDICT"];

/// Which of the columns has the name of the pod.
const POD: usize = 2;

impl Columns {
    fn header(&self) -> String {
        self.join(TITLES.map(str::to_owned))
    }

    fn row(&mut self, record: &Record, colour: bool) -> String {
        let sees = match record.leg {
            Leg::Direct => record.downstream_remote_address.map(|a| a.0),
            _ => record.upstream_local_address.map(|a| a.0),
        };
        let cells = [
            time(record),
            event(record).to_owned(),
            printable(&record.workload),
            record.leg.to_string(),
            or_dash(record.origin.map(|a| a.0).or(record.downstream_remote_address.map(|a| a.0))),
            or_dash(record.downstream_local_address.map(|a| a.0).or(record.upstream_host.map(|a| a.0))),
            or_dash(sees),
            verdict(record, colour),
        ];
        for (has, cell) in self.widths.iter_mut().zip(&cells) {
            *has = width(cell).clamp(*has, WIDEST);
        }
        self.join(cells)
    }

    fn join(&self, cells: [String; 8]) -> String {
        let [columns @ .., verdict] = &cells;
        let mut line = String::new();
        for (cell, width) in columns.iter().zip(self.widths) {
            line += &left(cell, width);
            line.push(' ');
        }
        line += verdict;
        line.trim_end().to_owned()
    }

    /// `12:00:01.123456 open  httpbin  upstream  10.0.0.1:40000 -> 10.0.0.2:8000 => …`
    fn compact(&mut self, record: &Record, colour: bool) -> String {
        let pod = elide(&printable(&record.workload), WIDEST);
        self.widths[POD] = self.widths[POD].max(width(&pod));
        let mut line = format!(
            "{} {:<5} {} {:<10} {} -> {}",
            time(record),
            event(record),
            left(&pod, self.widths[POD]),
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
        let verdict = verdict(record, colour);
        if !verdict.is_empty() {
            line.push(' ');
            line.push_str(&verdict);
        }
        line
    }
}

fn verdict(record: &Record, colour: bool) -> String {
    let (text, code) = match record.preserved {
        Some(true) => ("preserved", "32"),
        Some(false) => ("lost", "31"),
        None => return String::new(),
    };
    let inferred = if record.join == Some(Join::Inferred) { " (inferred)" } else { "" };
    if colour { format!("\x1b[{code}m{text}\x1b[0m{inferred}") } else { format!("{text}{inferred}") }
}

/// The time of day.
fn time(record: &Record) -> String {
    let time = record.time.to_string();
    time.split_once('T').map_or(time.clone(), |(_, time)| time.trim_end_matches('Z').to_owned())
}

fn event(record: &Record) -> &'static str {
    match record.event {
        EventKind::Open => "open",
        EventKind::Close => "close",
    }
}

fn or_dash<T: ToString>(value: Option<T>) -> String {
    value.map_or_else(|| "-".to_owned(), |value| value.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        netns::NetnsCookie,
        telemetry::record::{DownstreamLocal, DownstreamRemote, Origin, Timestamp},
    };

    fn record(workload: &str) -> Record {
        let client = "[2001:db8:1111:2222:3333:4444:5555:6666]:54321".parse().unwrap();
        Record {
            time: Timestamp(1_700_000_000_123_456_789),
            event: EventKind::Open,
            workload: workload.into(),
            netns_cookie: NetnsCookie(7),
            leg: Leg::Direct,
            downstream_remote_address: Some(DownstreamRemote(client)),
            downstream_local_address: Some(DownstreamLocal("[fd00::1]:8000".parse().unwrap())),
            upstream_local_address: None,
            upstream_host: None,
            origin: Some(Origin(client)),
            preserved: Some(true),
            join: None,
            rule: None,
            mark: 0,
            totals: None,
        }
    }

    #[test]
    fn columns_stay_aligned() {
        let mut columns = Columns::default();
        let long = columns.row(&record(&"x".repeat(200)), false);
        let header = columns.header();
        let short = columns.row(&record("web"), false);
        for (title, text) in [("LEG", "direct"), ("ORIGIN", "[2001:db8"), ("VERDICT", "preserved")] {
            let at = header.find(title).unwrap();
            for line in [&long, &short] {
                let column: String = line.chars().skip(at).collect();
                assert!(column.starts_with(text), "{title} at {at}:\n{header}\n{line}");
            }
        }
    }

    #[test]
    fn names_do_not_reach_the_terminal() {
        let evil = record("a\x1b[31m\u{9b}2J\n\u{7f}\u{202e}b");
        let mut columns = Columns::default();
        let json = json(&evil).unwrap();
        for line in [columns.row(&evil, false), columns.compact(&evil, false), json.clone()] {
            assert!(!line.contains(is_unprintable), "{line:?}");
        }
        let value: serde_json::Value = serde_json::from_str(&json).unwrap();
        assert_eq!(value["workload"], &*evil.workload);
    }
}

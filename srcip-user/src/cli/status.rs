//! `srcip status`

use anyhow::Result;
use clap::Args;

use super::output::{Format, or_none, print_data, print_table};
use crate::dataplane::{
    Dataplane,
    record::{OnProxyDown, State},
    status::{AttachmentStatus, Status},
};

/// Show what is attached, its listeners and counters.
#[derive(Debug, Args)]
pub(super) struct StatusArgs {
    /// How to print it.
    #[arg(short, long, value_enum, default_value = "table")]
    output: Format,
    /// Leave the header of the table out.
    #[arg(long)]
    no_headers: bool,
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

impl StatusArgs {
    pub(super) fn run(self, dataplane: &Dataplane) -> Result<()> {
        crate::privileges::require("status")?;
        let status = dataplane.status()?;
        match self.output {
            Format::Json | Format::Yaml => return print_data(&status, self.output),
            Format::Table | Format::Wide => {}
        }
        let wide = self.output == Format::Wide;
        let Status { attachments } = status;
        if attachments.is_empty() {
            eprintln!("nothing is attached");
            return Ok(());
        }
        let rows: Vec<_> = attachments.iter().map(|attachment| row(attachment, wide)).collect();
        let header = if wide { [&HEADER[..], &WIDE[..]].concat() } else { HEADER.to_vec() };
        print_table(&header, &rows, !self.no_headers)?;
        for attachment in &attachments {
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

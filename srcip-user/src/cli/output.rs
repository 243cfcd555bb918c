//! Printing as kubectl does it.

use std::io::{self, IsTerminal, Write as _};

use serde::Serialize;

/// How to print data.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, clap::ValueEnum)]
pub(super) enum Format {
    /// Columns for people.
    #[default]
    Table,
    /// More columns.
    Wide,
    /// For programs; names are stable.
    Json,
    /// The same as YAML.
    Yaml,
}

/// Writes to stdout. A reader that has seen enough (`srcip status | head -1`) is no error.
pub(super) fn print(bytes: &[u8]) -> io::Result<()> {
    let mut stdout = io::stdout().lock();
    match stdout.write_all(bytes).and_then(|()| stdout.flush()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        result => result,
    }
}

/// Prints a value for programs.
pub(super) fn print_data(value: &impl Serialize, format: Format) -> anyhow::Result<()> {
    let text = match format {
        Format::Yaml => serde_saphyr::to_string(value)?,
        Format::Table | Format::Wide | Format::Json => {
            format!("{}\n", serde_json::to_string_pretty(value)?)
        }
    };
    Ok(print(text.as_bytes())?)
}

/// Prints rows in columns, three spaces apart, with a header unless that is not wanted.
pub(super) fn print_table(header: &[&str], rows: &[Vec<String>], headers: bool) -> io::Result<()> {
    let mut table = tabwriter::TabWriter::new(Vec::new()).padding(3);
    if headers {
        writeln!(table, "{}", header.join("\t"))?;
    }
    for row in rows {
        writeln!(table, "{}", row.join("\t"))?;
    }
    table.flush()?;
    let bytes = table.into_inner().map_err(|error| io::Error::other(error.to_string()))?;
    print(&bytes)
}

/// Whether to use colour: only on a terminal, and not if `NO_COLOR` is set (<https://no-color.org>).
pub(super) fn colour(stream: &impl IsTerminal) -> bool {
    stream.is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
}

/// `none` for an empty list of ports.
pub(super) fn or_none(text: &str) -> String {
    if text.is_empty() { "<none>".to_owned() } else { text.to_owned() }
}

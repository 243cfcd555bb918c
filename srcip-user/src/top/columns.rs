//! What is shown of a line, and where it goes when there is little room.

use super::{
    app::Kind,
    model::Sees,
    snapshot::{Key, Line},
};

/// A column, in the order in which they are shown.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Column {
    /// The client or the workload.
    Name,
    /// The client's workload, or the workload's client: the last one.
    Peer,
    /// Open connections.
    Open,
    /// New connections per second.
    New,
    /// Connections.
    Total,
    /// Bytes per second from the client.
    RateIn,
    /// Bytes per second to the client.
    RateOut,
    /// Bytes from the client.
    BytesIn,
    /// Bytes to the client.
    BytesOut,
    /// The last round-trip time.
    Rtt,
    /// The average.
    AverageRtt,
    /// Connections that are preserved.
    Preserved,
    /// Connections that are lost.
    Lost,
    /// Connections of which neither is known.
    Unknown,
    /// Preserved, lost, or how much is lost.
    Verdict,
    /// What the application sees.
    Sees,
}

/// Columns with the least width they need and the most they can use; those that matter most first. Headings
/// have room for the mark of the order.
const BY_IMPORTANCE: [(Column, usize, usize); 16] = [
    (Column::Name, 10, 39),
    (Column::Verdict, 9, 9),
    (Column::New, 6, 6),
    (Column::Open, 5, 5),
    (Column::Sees, 10, 39),
    (Column::Total, 6, 6),
    (Column::RateIn, 5, 5),
    (Column::RateOut, 6, 6),
    (Column::Rtt, 6, 6),
    (Column::Peer, 12, 39),
    (Column::Lost, 5, 5),
    (Column::BytesIn, 6, 6),
    (Column::BytesOut, 6, 6),
    (Column::AverageRtt, 8, 8),
    (Column::Preserved, 5, 5),
    (Column::Unknown, 8, 8),
];

/// How many of them go before a name that is written out.
const ESSENTIAL: usize = 9;

/// The columns that fit into `width`, with their own widths and a blank between them, if the longest name
/// takes `name`.
pub fn fitting(width: usize, name: usize) -> Vec<(Column, usize)> {
    let mut left = width + 1;
    let mut chosen = Vec::new();
    let grow = |chosen: &mut [(Column, usize, usize)], left: &mut usize, goal: usize| {
        for (_, has, most) in chosen {
            let more = goal.min(*most).saturating_sub(*has).min(*left);
            *has += more;
            *left -= more;
        }
    };
    for (i, (column, least, most)) in BY_IMPORTANCE.into_iter().enumerate() {
        if i == ESSENTIAL {
            // So that addresses of IPv4 fit, then those of IPv6.
            grow(&mut chosen, &mut left, 15);
            grow(&mut chosen[..1], &mut left, name);
        }
        // What matters less does not take the place of what matters more.
        let Some(rest) = left.checked_sub(least + 1) else { break };
        left = rest;
        chosen.push((column, least, most));
    }
    if chosen.is_empty() {
        return vec![(Column::Name, width)];
    }
    [15, 39].into_iter().for_each(|goal| grow(&mut chosen, &mut left, goal));
    chosen.sort_by_key(|(column, ..)| *column);
    chosen.into_iter().map(|(column, width, _)| (column, width)).collect()
}

impl Column {
    /// Its heading.
    pub fn title(self, kind: Kind) -> &'static str {
        match (self, kind) {
            (Self::Name, Kind::Clients) | (Self::Peer, Kind::Workloads) => "CLIENT",
            (Self::Name, Kind::Workloads) | (Self::Peer, Kind::Clients) => "WORKLOAD",
            (Self::Open, _) => "OPEN",
            (Self::New, _) => "NEW/s",
            (Self::Total, _) => "TOTAL",
            (Self::RateIn, _) => "IN/s",
            (Self::RateOut, _) => "OUT/s",
            (Self::BytesIn, _) => "IN",
            (Self::BytesOut, _) => "OUT",
            (Self::Rtt, _) => "RTT",
            (Self::AverageRtt, _) => "AVG-RTT",
            (Self::Preserved, _) => "KEPT",
            (Self::Lost, _) => "LOST",
            (Self::Unknown, _) => "UNKNOWN",
            (Self::Verdict, _) => "ORIGIN",
            (Self::Sees, _) => "APP SEES",
        }
    }

    /// Whether it is text, which goes to the left.
    pub fn is_text(self) -> bool {
        matches!(self, Self::Name | Self::Peer | Self::Verdict | Self::Sees)
    }

    /// Whether the most comes first: so with numbers, and with what is lost.
    pub fn descends(self) -> bool {
        !matches!(self, Self::Name | Self::Peer)
    }

    /// What it says of a line.
    pub fn cell(self, line: &Line) -> String {
        match self {
            Self::Name => line.name.to_string(),
            Self::Peer => match &line.peers[..] {
                [] => "-".to_owned(),
                [only] => only.to_string(),
                [last, others @ ..] => format!("{last} +{}", others.len()),
            },
            Self::Open => count(line.open as f64),
            Self::New => rate(line.new),
            Self::Total => count(line.total as f64),
            Self::RateIn => count(line.rate_in),
            Self::RateOut => count(line.rate_out),
            Self::BytesIn => count(line.bytes_in as f64),
            Self::BytesOut => count(line.bytes_out as f64),
            Self::Rtt => time(line.rtt_us),
            Self::AverageRtt => time(line.average_rtt_us),
            Self::Preserved => count(line.preserved as f64),
            Self::Lost => count(line.lost as f64),
            Self::Unknown => count(line.unknown() as f64),
            Self::Verdict => verdict(line),
            Self::Sees => match (line.sees, line.key) {
                (None, _) => "-".to_owned(),
                (Some(Sees::Client), Key::Client(ip)) => ip.to_string(),
                (Some(Sees::Client), Key::Workload(_)) => "the client".to_owned(),
                (Some(Sees::Other(ip)), _) => ip.to_string(),
            },
        }
    }
}

fn verdict(line: &Line) -> String {
    match line.lost_share() {
        None => "unknown".to_owned(),
        Some(_) if line.lost == 0 => "preserved".to_owned(),
        Some(_) if line.preserved == 0 => "lost".to_owned(),
        // Neither nothing nor all is what it would be rounded to.
        Some(share) => format!("lost {:.0}%", (share * 100.0).clamp(1.0, 99.0)),
    }
}

/// A number in no more than five characters: `999`, `1.2k`, `12k`, `3.4M`.
pub fn count(number: f64) -> String {
    let mut number = number;
    for unit in ["", "k", "M", "G", "T", "P"] {
        if unit.is_empty() && number < 9_999.5 {
            return format!("{number:.0}");
        }
        if !unit.is_empty() && number < 9.95 {
            return format!("{number:.1}{unit}");
        }
        if !unit.is_empty() && number < 999.5 {
            return format!("{number:.0}{unit}");
        }
        number /= 1000.0;
    }
    "much".to_owned()
}

/// The same with a digit more where little is much.
fn rate(number: f64) -> String {
    if number > 0.0 && number < 99.95 { format!("{number:.1}") } else { count(number) }
}

/// Microseconds in no more than six characters: `85us`, `1.2ms`, `340ms`, `2.0s`.
fn time(microseconds: Option<u32>) -> String {
    match microseconds.map(f64::from) {
        None => "-".to_owned(),
        Some(us) if us < 1000.0 => format!("{us:.0}us"),
        Some(us) if us < 99_950.0 => format!("{:.1}ms", us / 1e3),
        Some(us) if us < 999_500.0 => format!("{:.0}ms", us / 1e3),
        Some(us) => format!("{:.1}s", us / 1e6),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_short() {
        for (number, text) in [
            (0.0, "0"),
            (999.0, "999"),
            (9_999.0, "9999"),
            (10_000.0, "10k"),
            (12_345.0, "12k"),
            (999_600.0, "1.0M"),
            (3_440_000.0, "3.4M"),
            (1e30, "much"),
        ] {
            assert_eq!(count(number), text);
        }
        for exponent in 0..60 {
            let number = 1.97_f64 * 2_f64.powi(exponent);
            assert!(count(number).len() <= 5, "{number}");
            assert!(rate(number).len() <= 5, "{number}");
        }
        let times = [None, Some(85), Some(1234), Some(99_960), Some(2_000_000), Some(u32::MAX)];
        let texts = times.map(time);
        assert_eq!(texts, ["-", "85us", "1.2ms", "100ms", "2.0s", "4295.0s"].map(String::from));
    }

    #[test]
    fn what_matters_most_stays() {
        let columns = |width| fitting(width, 8).into_iter().map(|(column, _)| column).collect::<Vec<_>>();
        use Column::{Name, New, Open, RateIn, RateOut, Rtt, Sees, Total, Verdict};
        assert_eq!(columns(20), [Name, Verdict]);
        assert_eq!(columns(80), [Name, Open, New, Total, RateIn, RateOut, Rtt, Verdict, Sees]);
        assert_eq!(columns(250).len(), BY_IMPORTANCE.len());
        for width in 0..300 {
            let columns = fitting(width, width / 2);
            let used: usize = columns.iter().map(|(_, width)| width + 1).sum();
            assert!(used <= width + 1, "{width}: {columns:?}");
        }
        // IPv4 fits in the usual window, IPv6 in one that is a little wider.
        assert!(fitting(80, 15)[0].1 >= 15);
        assert_eq!(fitting(105, 39)[0], (Name, 39));
    }
}

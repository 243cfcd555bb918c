//! Port lists as they stand in annotations and on the command line.

use std::{fmt, ops::RangeInclusive, str::FromStr};

use serde::{Deserialize, Serialize};
use srcip_common::ports::{PortRange, PortSet, UpstreamPorts, UpstreamPortsError};

/// Why a list of ports was not understood.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PortsError {
    /// Not a number, or one out of range.
    #[error("{0:?} is not a TCP port: expected a number from 1 to 65535")]
    NotAPort(String),
    /// A range that ends before it starts.
    #[error("port range {0}-{1} ends before it starts; did you mean {1}-{0}?")]
    Backwards(u16, u16),
    /// Nothing where at least one port is needed.
    #[error("the list of ports is empty; give ports such as 8080,9000-9010, or leave the option out")]
    Empty,
    /// Ranges for upstream ports that cannot be used together.
    #[error("upstream ports: {0}")]
    Upstream(String),
}

/// Parses one port.
pub fn parse_port(text: &str) -> Result<u16, PortsError> {
    match text.trim().parse() {
        Ok(port) if port != 0 => Ok(port),
        _ => Err(PortsError::NotAPort(text.trim().to_owned())),
    }
}

fn parse_range(text: &str) -> Result<RangeInclusive<u16>, PortsError> {
    let (first, last) = match text.split_once('-') {
        Some((first, last)) => (parse_port(first)?, parse_port(last)?),
        None => {
            let port = parse_port(text)?;
            (port, port)
        }
    };
    if first > last {
        return Err(PortsError::Backwards(first, last));
    }
    Ok(first..=last)
}

/// A list of ports and ranges, kept as it was written.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct PortList {
    text: String,
    ranges: Vec<RangeInclusive<u16>>,
}

impl PortList {
    /// Every port: `*`, as Istio's annotation has it.
    pub fn all() -> Self {
        Self { text: "*".to_owned(), ranges: vec![1..=u16::MAX] }
    }

    /// No port.
    pub fn none() -> Self {
        Self { text: String::new(), ranges: Vec::new() }
    }

    /// Whether it is every port.
    pub fn is_all(&self) -> bool {
        self.ranges.contains(&(1..=u16::MAX))
    }

    /// The ranges, in the order written.
    pub fn ranges(&self) -> &[RangeInclusive<u16>] {
        &self.ranges
    }
}

impl FromStr for PortList {
    type Err = PortsError;

    fn from_str(text: &str) -> Result<Self, PortsError> {
        let text = text.trim();
        if text == "*" {
            return Ok(Self::all());
        }
        if text.is_empty() {
            return Err(PortsError::Empty);
        }
        let ranges = text.split(',').map(parse_range).collect::<Result<_, _>>()?;
        Ok(Self { text: text.replace(char::is_whitespace, ""), ranges })
    }
}

impl fmt::Display for PortList {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl TryFrom<String> for PortList {
    type Error = PortsError;

    fn try_from(text: String) -> Result<Self, PortsError> {
        text.parse()
    }
}

impl From<PortList> for String {
    fn from(list: PortList) -> Self {
        list.text
    }
}

/// The ports whose connections go to the proxy.
pub fn steered_ports(include: &PortList, exclude: &PortList, proxy_ports: &[u16]) -> PortSet {
    let mut set = PortSet::EMPTY;
    include.ranges().iter().for_each(|ports| set.insert(ports.clone()));
    exclude.ranges().iter().for_each(|ports| set.remove(ports.clone()));
    proxy_ports.iter().for_each(|&port| set.remove(port..=port));
    set
}

/// Source ports for upstream legs, kept as they were written.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct UpstreamPortList {
    text: String,
    /// The ports, checked.
    pub ports: UpstreamPorts,
}

/// What clients do not use with Linux' default ephemeral range, 32768 to 60999: the ports above it, and
/// those below it down to where well-known services sit. 27,056 of them.
pub const DEFAULT_UPSTREAM_PORTS: &str = "61000-65535,10248-32767";

impl FromStr for UpstreamPortList {
    type Err = PortsError;

    fn from_str(text: &str) -> Result<Self, PortsError> {
        let list: PortList = text.parse()?;
        let ranges: Vec<_> = list
            .ranges()
            .iter()
            .map(|range| PortRange { first: *range.start(), last: *range.end() })
            .collect();
        let ports = UpstreamPorts::new(&ranges).map_err(|error| {
            PortsError::Upstream(match error {
                UpstreamPortsError::Empty => "no range given".to_owned(),
                UpstreamPortsError::TooMany => "more than 4 ranges given; join some".to_owned(),
                UpstreamPortsError::Invalid(r) => format!("{}-{} is no range", r.first, r.last),
                UpstreamPortsError::Overlap(a, b) => {
                    format!("{}-{} and {}-{} overlap; join them", a.first, a.last, b.first, b.last)
                }
            })
        })?;
        Ok(Self { text: list.to_string(), ports })
    }
}

impl TryFrom<String> for UpstreamPortList {
    type Error = PortsError;

    fn try_from(text: String) -> Result<Self, PortsError> {
        text.parse()
    }
}

impl From<UpstreamPortList> for String {
    fn from(list: UpstreamPortList) -> Self {
        list.text
    }
}

impl fmt::Display for UpstreamPortList {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn lists_as_people_write_them() {
        let list: PortList = "80, 8000-8002 ,443".parse().unwrap();
        assert_eq!(list.ranges(), [80..=80, 8000..=8002, 443..=443]);
        assert_eq!(list.to_string(), "80,8000-8002,443");
        assert_eq!("*".parse(), Ok(PortList::all()));
    }

    #[test]
    fn mistakes_are_named() {
        let error = |text: &str| text.parse::<PortList>().unwrap_err().to_string();
        assert!(error("0").contains("\"0\" is not a TCP port"));
        assert!(error("70000").contains("\"70000\" is not a TCP port"));
        assert!(error("80,http").contains("\"http\" is not a TCP port"));
        assert!(error("80,,81").contains("\"\" is not a TCP port"));
        assert!(error("-5").contains("is not a TCP port"));
        assert!(error("8000-7000").contains("did you mean 7000-8000?"));
        assert!(error("").contains("the list of ports is empty"));
    }

    #[test]
    fn the_default_upstream_ports_miss_the_ephemeral_range() {
        let list: UpstreamPortList = DEFAULT_UPSTREAM_PORTS.parse().unwrap();
        assert!((32768..=60999).all(|port| !list.ports.contains(port)));
        assert_eq!(list.ports.count(), 27056);
        let error = "10-20,20-30".parse::<UpstreamPortList>().unwrap_err().to_string();
        assert!(error.contains("10-20 and 20-30 overlap"), "{error}");
    }

    proptest! {
        #[test]
        fn any_text_parses_or_is_refused(text in "[0-9,*a -]{0,24}") {
            if let Ok(list) = text.parse::<PortList>() {
                prop_assert_eq!(list.to_string().parse::<PortList>(), Ok(list));
            }
        }

        #[test]
        fn the_proxys_own_ports_are_never_steered(proxy in 1_u16.., exclude in 1_u16.., probe in 1_u16..) {
            let exclude = exclude.to_string().parse().unwrap();
            let set = steered_ports(&PortList::all(), &exclude, &[proxy]);
            prop_assert!(!set.contains(proxy));
            prop_assert_eq!(
                set.contains(probe),
                probe != proxy && !exclude.ranges().iter().any(|r| r.contains(&probe))
            );
        }
    }
}

//! How a pod's connections come to its proxy where srcip does not steer: by the iptables or nftables rules
//! in its network namespace.
//!
//! The rules are read by the very programs that write them, because only they know all of their formats:
//! `iptables-save` and `iptables-legacy-save`, their IPv6 twins, and `nft`.

use std::{collections::HashSet, path::Path, process::Command};

use serde::Serialize;

use crate::{netns::Netns, telemetry::workload::ProxyPorts, text::shell_quoted};

/// A way to take connections to a proxy.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// NAT to a port of the pod; the application's peer is whoever the proxy connects as.
    Redirect,
    /// To a socket of the pod, packets unchanged.
    Tproxy,
}

/// The rules that take a pod's connections to its proxy.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize)]
pub struct Interception {
    /// The first way that was found.
    pub mode: Option<Mode>,
    /// The proxy's port.
    pub proxy_port: Option<u16>,
    /// The rules themselves, as their program prints them.
    pub rules: Vec<String>,
    /// Commands that delete them, to be run in the network namespace. Every word is quoted for a shell: a
    /// pod may write into its rules what it likes.
    pub removal: Vec<String>,
    /// Why the rules could not be read.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub unreadable: Option<String>,
}

/// The programs that print rules, with those that change them.
const PROGRAMS: [(&str, &str); 4] = [
    ("iptables-save", "iptables"),
    ("ip6tables-save", "ip6tables"),
    ("iptables-legacy-save", "iptables-legacy"),
    ("ip6tables-legacy-save", "ip6tables-legacy"),
];

impl Interception {
    /// Reads the rules of a network namespace. They are only read; nothing is created by that.
    pub fn read(netns: &Netns) -> Self {
        let mut found = Self::default();
        let mut any = false;
        for (save, change) in PROGRAMS {
            if save.contains("legacy") && !has_legacy_tables(netns, save) {
                continue;
            }
            if let Some(text) = run(netns, save, &[]) {
                any = true;
                found.merge(parse_iptables(&text, change));
            }
        }
        if let Some(text) = run(netns, "nft", &["--stateless", "--handle", "list", "ruleset"]) {
            any = true;
            found.merge(parse_nft(&text));
        }
        if !any {
            found.unreadable = Some(
                "neither iptables-save nor nft is here: install iptables or nftables to have the rules named"
                    .to_owned(),
            );
        }
        found
    }

    /// The same for one at a path, which may have gone.
    pub fn read_at(path: &Path) -> Self {
        Netns::open(path).map_or_else(
            |error| Self { unreadable: Some(error.to_string()), ..Self::default() },
            |netns| Self::read(&netns),
        )
    }

    fn merge(&mut self, other: Self) {
        self.mode = self.mode.or(other.mode);
        self.proxy_port = self.proxy_port.or(other.proxy_port);
        for (all, new) in [(&mut self.rules, other.rules), (&mut self.removal, other.removal)] {
            for text in new {
                if !all.contains(&text) {
                    all.push(text);
                }
            }
        }
    }

    /// Which of the pod's connections end at the proxy.
    pub fn proxy_ports(&self) -> Option<ProxyPorts> {
        match (self.mode?, self.proxy_port?) {
            (Mode::Redirect, port) => Some(ProxyPorts::Redirected(port)),
            // Which ports the rules leave out is not followed: the proxy's own and those of the mesh are
            // what they always leave out.
            (Mode::Tproxy, port) => {
                let all = crate::ports::PortList::all();
                let own = crate::dataplane::record::never_steered(port);
                let ports = crate::ports::steered_ports(&all, &crate::ports::PortList::none(), &own);
                Some(ProxyPorts::Steered(Box::new(ports)))
            }
        }
    }
}

/// The pod's proxy according to its rules; see [`crate::telemetry::workload::Workloads::new`].
pub fn find_proxy(netns: &Netns) -> Option<ProxyPorts> {
    Interception::read(netns).proxy_ports()
}

/// Whether there are any: the legacy programs make the kernel load its modules if asked in vain.
fn has_legacy_tables(netns: &Netns, program: &str) -> bool {
    let names = if program.starts_with("ip6") { "ip6_tables_names" } else { "ip_tables_names" };
    let path = Path::new("/proc/thread-self/net").join(names);
    netns.run(|| std::fs::read(path)).is_ok_and(|names| names.is_ok_and(|names| !names.is_empty()))
}

/// What a program prints when it runs in the namespace; `None` if it is not here or fails.
fn run(netns: &Netns, program: &str, arguments: &[&str]) -> Option<String> {
    // A child starts in the namespace of the thread that starts it.
    let output = netns.run(|| Command::new(program).args(arguments).output()).ok()?.ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).into_owned())
}

/// A rule of `iptables-save`: `-A CHAIN … -j TARGET …`.
struct Rule<'a> {
    table: &'a str,
    chain: &'a str,
    target: &'a str,
    line: &'a str,
}

impl<'a> Rule<'a> {
    fn parse(table: &'a str, line: &'a str) -> Option<Self> {
        let chain = line.strip_prefix("-A ")?.split(' ').next()?;
        let target = option(line, "-j").or_else(|| option(line, "-g"))?;
        Some(Self { table, chain, target, line })
    }

    /// The port it takes connections to, and how.
    fn takes_to(&self) -> Option<(Mode, u16)> {
        match self.target {
            "REDIRECT" => Some((Mode::Redirect, first_port(option(self.line, "--to-ports")?)?)),
            "TPROXY" => Some((Mode::Tproxy, first_port(option(self.line, "--on-port")?)?)),
            // A mesh may write the same as an address of the pod itself.
            "DNAT" => {
                let to = option(self.line, "--to-destination")?;
                let (ip, port) = to.rsplit_once(':')?;
                let ip: std::net::IpAddr = ip.trim_matches(['[', ']']).parse().ok()?;
                ip.is_loopback().then(|| first_port(port)).flatten().map(|port| (Mode::Redirect, port))
            }
            _ => None,
        }
    }
}

fn option<'a>(line: &'a str, name: &str) -> Option<&'a str> {
    let mut words = line.split(' ');
    words.find(|word| *word == name)?;
    words.next()
}

fn first_port(text: &str) -> Option<u16> {
    text.split('-').next()?.parse().ok()
}

/// Finds the rules that take what comes in to another port, however many chains away from PREROUTING.
fn parse_iptables(text: &str, program: &str) -> Interception {
    let mut table = "";
    let mut rules = Vec::new();
    for line in text.lines() {
        if let Some(name) = line.strip_prefix('*') {
            table = name;
        }
        rules.extend(Rule::parse(table, line));
    }
    let mut found = Interception::default();
    for entry in rules.iter().filter(|rule| rule.chain == "PREROUTING") {
        for last in follow(&rules, entry) {
            let Some((mode, port)) = last.takes_to() else { continue };
            found.mode = found.mode.or(Some(mode));
            found.proxy_port = found.proxy_port.or(Some(port));
            if found.proxy_port != Some(port) {
                continue;
            }
            // The last rule of the way, not the first: whatever else leads there does not any more either,
            // as Istio's rule for what a pod sends to itself.
            let words = words(last.line);
            let delete: Vec<_> = words.iter().skip(1).map(|word| shell_quoted(word)).collect();
            let command = format!("{program} -t {} -D {}", last.table, delete.join(" "));
            if !found.removal.contains(&command) {
                found.rules.push(format!("{program} -t {}: {}", last.table, last.line));
                found.removal.push(command);
            }
        }
    }
    found
}

/// The words of a rule as `iptables-save` writes them: in double quotes where there are blanks, with a
/// backslash before what would end them.
fn words(line: &str) -> Vec<String> {
    let mut words = Vec::new();
    let mut word: Option<String> = None;
    let mut quoted = false;
    let mut characters = line.chars();
    while let Some(c) = characters.next() {
        match c {
            '"' => {
                quoted = !quoted;
                word.get_or_insert_default();
            }
            '\\' if quoted => word.get_or_insert_default().extend(characters.next()),
            ' ' if !quoted => words.extend(word.take()),
            c => word.get_or_insert_default().push(c),
        }
    }
    words.extend(word);
    words
}

/// Follows a rule through the chains it leads to, to those that take connections elsewhere.
fn follow<'a, 'b>(rules: &'b [Rule<'a>], entry: &'b Rule<'a>) -> Vec<&'b Rule<'a>> {
    let mut found = Vec::new();
    let mut seen = HashSet::new();
    let mut next = vec![entry];
    while let Some(rule) = next.pop() {
        if rule.takes_to().is_some() {
            found.push(rule);
        } else if seen.insert(rule.target) {
            next.extend(rules.iter().filter(|r| r.table == entry.table && r.chain == rule.target));
        }
    }
    found
}

/// A rule of `nft --handle list ruleset`.
struct NftRule<'a> {
    /// `inet mesh`.
    table: &'a str,
    chain: &'a str,
    line: &'a str,
    handle: &'a str,
}

/// Finds `redirect to :15006` and `tproxy to :15006` in chains at prerouting, and in those they lead to.
/// Rules that iptables made are left to iptables.
fn parse_nft(text: &str) -> Interception {
    let (mut table, mut chain) = ("", "");
    let mut entries = Vec::new();
    let mut rules = Vec::new();
    for line in text.lines().map(str::trim) {
        let (line, handle) = line.rsplit_once(" # handle ").unwrap_or((line, ""));
        if let Some(rest) = line.strip_prefix("table ") {
            table = rest.trim_end_matches(['{', ' ']);
        } else if let Some(rest) = line.strip_prefix("chain ") {
            chain = rest.trim_end_matches(['{', ' ']);
        } else if line.starts_with("type ") && line.contains("hook prerouting") {
            // Only iptables writes it in capitals.
            entries.extend((chain != "PREROUTING").then_some((table, chain)));
        } else if !handle.is_empty() {
            rules.push(NftRule { table, chain, line, handle });
        }
    }
    let mut found = Interception::default();
    let mut seen = HashSet::new();
    while let Some((table, chain)) = entries.pop() {
        if !seen.insert((table, chain)) {
            continue;
        }
        for rule in rules.iter().filter(|rule| (rule.table, rule.chain) == (table, chain)) {
            for verb in ["jump ", "goto "] {
                if let Some((_, rest)) = rule.line.split_once(verb) {
                    entries.extend(rest.split([' ', ',', '}']).next().map(|to| (table, to)));
                }
            }
            let mode = match rule.line {
                line if line.contains("redirect to ") => Mode::Redirect,
                line if line.contains("tproxy ") => Mode::Tproxy,
                _ => continue,
            };
            let to = rule.line.rsplit_once(" to ").and_then(|(_, to)| to.split(' ').next());
            let Some(port) = to.and_then(|to| first_port(to.rsplit(':').next()?)) else { continue };
            found.mode = found.mode.or(Some(mode));
            found.proxy_port = found.proxy_port.or(Some(port));
            if found.proxy_port == Some(port) {
                found.rules.push(format!("nft {table}: {}", rule.line));
                let words = table.split(' ').chain([chain]).map(shell_quoted).collect::<Vec<_>>().join(" ");
                found.removal.push(format!("nft delete rule {words} handle {}", shell_quoted(rule.handle)));
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plain_redirect() {
        let text = "*nat\n:PREROUTING ACCEPT [0:0]\n\
                    -A PREROUTING -p tcp -m tcp ! --dport 15006 -j REDIRECT --to-ports 15006\nCOMMIT\n";
        let found = parse_iptables(text, "iptables");
        assert_eq!((found.mode, found.proxy_port), (Some(Mode::Redirect), Some(15006)));
        assert_eq!(
            found.removal,
            ["iptables -t nat -D PREROUTING -p tcp -m tcp '!' --dport 15006 -j REDIRECT --to-ports 15006"]
        );
    }

    #[test]
    fn istio_in_both_modes_by_way_of_its_chains() {
        let redirect = "*nat\n-A PREROUTING -p tcp -j ISTIO_INBOUND\n-A OUTPUT -j ISTIO_OUTPUT\n\
                        -A ISTIO_INBOUND -p tcp -m tcp --dport 15008 -j RETURN\n\
                        -A ISTIO_INBOUND -p tcp -j ISTIO_IN_REDIRECT\n\
                        -A ISTIO_IN_REDIRECT -p tcp -j REDIRECT --to-ports 15006\n\
                        -A ISTIO_REDIRECT -p tcp -j REDIRECT --to-ports 15001\nCOMMIT\n";
        let found = parse_iptables(redirect, "iptables");
        assert_eq!((found.mode, found.proxy_port), (Some(Mode::Redirect), Some(15006)));
        assert_eq!(
            found.removal,
            ["iptables -t nat -D ISTIO_IN_REDIRECT -p tcp -j REDIRECT --to-ports 15006"]
        );
        let tproxy = "*mangle\n-A PREROUTING -p tcp -j ISTIO_INBOUND\n\
                      -A ISTIO_INBOUND -p tcp -j ISTIO_TPROXY\n\
                      -A ISTIO_TPROXY ! -d 127.0.0.1/32 -p tcp -j TPROXY --on-port 15006 --on-ip 0.0.0.0 \
                      --tproxy-mark 0x539/0xffffffff\nCOMMIT\n";
        let found = parse_iptables(tproxy, "iptables");
        assert_eq!((found.mode, found.proxy_port), (Some(Mode::Tproxy), Some(15006)));
    }

    #[test]
    fn what_leaves_the_pod_or_goes_elsewhere_does_not_count() {
        for text in [
            "*nat\n-A OUTPUT -p tcp -j REDIRECT --to-ports 15001\n",
            "*nat\n-A PREROUTING -p tcp -j DNAT --to-destination 10.0.0.5:80\n",
            "*filter\n-A PREROUTING -j LOOP\n-A LOOP -j LOOP\n",
            "garbage\n-A\n-A X\n",
        ] {
            assert_eq!(parse_iptables(text, "iptables"), Interception::default(), "{text}");
        }
    }

    #[test]
    fn what_a_pod_writes_into_its_rules_stays_a_word() {
        let text = "*nat\n-A PREROUTING -p tcp -m comment --comment \"$(touch /tmp/x) `id` \\\"a\\\" 'b'; c\" \
                    -j REDIRECT --to-ports 15006\n";
        let found = parse_iptables(text, "iptables");
        assert_eq!(
            found.removal,
            [
                r#"iptables -t nat -D PREROUTING -p tcp -m comment --comment '$(touch /tmp/x) `id` "a" '\''b'\''; c' -j REDIRECT --to-ports 15006"#
            ]
        );
    }

    #[test]
    fn native_nftables() {
        let text = "table inet mesh { # handle 1\n\tchain in { # handle 1\n\
                    \t\ttype nat hook prerouting priority dstnat; policy accept;\n\
                    \t\tmeta l4proto tcp jump inbound # handle 3\n\t}\n\
                    \tchain inbound { # handle 2\n\t\ttcp dport != 15006 redirect to :15006 # handle 5\n\t}\n\
                    \tchain out { # handle 6\n\t\ttype nat hook output priority 100;\n\
                    \t\ttcp dport 1-65535 redirect to :15001 # handle 7\n\t}\n}\n";
        let found = parse_nft(text);
        assert_eq!((found.mode, found.proxy_port), (Some(Mode::Redirect), Some(15006)));
        assert_eq!(found.removal, ["nft delete rule inet mesh inbound handle 5"]);
        let tproxy = "table ip m { # handle 1\n chain c { # handle 1\n type filter hook prerouting priority \
                      mangle;\n meta l4proto tcp tproxy to :15006 meta mark set 0x539 # handle 2\n }\n}\n";
        assert_eq!(parse_nft(tproxy).mode, Some(Mode::Tproxy));
        let iptables = "table ip nat { # handle 1\n chain PREROUTING { # handle 1\n type nat hook prerouting priority \
               dstnat;\n tcp dport 80 redirect to :15006 # handle 2\n }\n}\n";
        assert_eq!(parse_nft(iptables), Interception::default());
    }
}

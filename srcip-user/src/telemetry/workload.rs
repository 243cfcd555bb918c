//! Whose connections these are: the network namespaces of a node, by cookie.

use std::{
    collections::{HashMap, HashSet},
    net::IpAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use crate::{
    dataplane::{Dataplane, record::Record as Attachment},
    netns::{Netns, NetnsCookie},
    routing,
};

/// How soon namespaces are looked for again because of one that is not known.
const REFRESH_INTERVAL: Duration = Duration::from_millis(200);

/// After that, a pod has the rules it will have.
const SETTLED: Duration = Duration::from_secs(60);

/// A pod, as far as srcip can tell.
#[derive(Clone, Debug)]
pub struct Workload {
    /// The attachment's name, or that of the network namespace.
    pub name: Arc<str>,
    /// Where its network namespace can be opened.
    pub netns: PathBuf,
    /// Its addresses.
    pub addresses: HashSet<IpAddr>,
    /// Its proxy, if it is known to have one.
    pub proxy: Option<ProxyPorts>,
    /// Whether srcip steers it.
    pub attached: bool,
    /// The mark of its upstream legs, if srcip steers it; else 0.
    pub mark: u32,
    /// Since when it is known.
    pub since: Instant,
}

/// Which connections end at the proxy.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum ProxyPorts {
    /// Those for these ports, which the proxy takes without changing the destination: `sk_lookup`, TPROXY.
    Steered(Box<srcip_common::ports::PortSet>),
    /// Those that arrive at this port, which NAT has put in place of the one the client asked for.
    Redirected(u16),
}

impl ProxyPorts {
    /// Whether a connection that was accepted at `port` was accepted by the proxy.
    pub fn takes(&self, port: u16) -> bool {
        match self {
            Self::Steered(ports) => ports.contains(port),
            Self::Redirected(to) => *to == port,
        }
    }
}

/// The pods of a node.
#[derive(Debug, Default)]
pub struct Workloads {
    known: HashMap<NetnsCookie, Workload>,
    /// Finds a pod's proxy where srcip does not steer.
    find_proxy: Option<fn(&Netns) -> Option<ProxyPorts>>,
    refreshed: Option<Instant>,
    /// Cookies that have been looked for in vain.
    unresolved: HashSet<NetnsCookie>,
}

impl Workloads {
    /// With a way to find the proxies that others have put in place.
    pub fn new(find_proxy: Option<fn(&Netns) -> Option<ProxyPorts>>) -> Self {
        Self { find_proxy, ..Self::default() }
    }

    /// Looks for all network namespaces of this machine but the host's; returns the cookies of those that
    /// were not known.
    pub fn refresh(&mut self, dataplane: &Dataplane) -> Vec<NetnsCookie> {
        self.refreshed = Some(Instant::now());
        self.unresolved.clear();
        let attachments = dataplane.peek_records().unwrap_or_default();
        let mut found = HashMap::new();
        let mut new = Vec::new();
        for netns in Netns::all().filter(|netns| !netns.is_host()) {
            let Ok(cookie) = netns.cookie() else { continue };
            let attachment = attachments.iter().find(|a| a.netns_cookie == cookie);
            if !self.known.contains_key(&cookie) {
                new.push(cookie);
            }
            found.insert(cookie, self.describe(&netns, cookie, attachment));
        }
        self.known = found;
        new
    }

    /// The same for given namespaces only.
    pub fn add(&mut self, netns: &Netns, dataplane: &Dataplane) -> Option<NetnsCookie> {
        let cookie = netns.cookie().ok()?;
        let attachments = dataplane.peek_records().unwrap_or_default();
        let attachment = attachments.iter().find(|a| a.netns_cookie == cookie);
        let workload = self.describe(netns, cookie, attachment);
        self.known.insert(cookie, workload);
        Some(cookie)
    }

    /// A pod that is nowhere.
    #[cfg(test)]
    pub(super) fn insert_for_tests(
        &mut self,
        cookie: NetnsCookie,
        name: &str,
        addresses: impl IntoIterator<Item = IpAddr>,
        proxy: Option<ProxyPorts>,
    ) {
        let workload = Workload {
            name: name.into(),
            netns: PathBuf::new(),
            addresses: addresses.into_iter().collect(),
            proxy,
            attached: false,
            mark: 0,
            since: Instant::now(),
        };
        self.known.insert(cookie, workload);
    }

    /// Whether to look again because a namespace is not known.
    pub fn should_refresh(&self, cookie: NetnsCookie) -> bool {
        !self.known.contains_key(&cookie)
            && !self.unresolved.contains(&cookie)
            && self.refreshed.is_none_or(|last| last.elapsed() >= REFRESH_INTERVAL)
    }

    /// Looks again because of one namespace; if that is in vain, not again for it until the next refresh.
    pub fn look_for(&mut self, cookie: NetnsCookie, dataplane: &Dataplane) {
        self.refresh(dataplane);
        if !self.known.contains_key(&cookie) {
            self.unresolved.insert(cookie);
        }
    }

    /// A pod.
    pub fn get(&self, cookie: NetnsCookie) -> Option<&Workload> {
        self.known.get(&cookie)
    }

    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = (NetnsCookie, &Workload)> {
        self.known.iter().map(|(cookie, workload)| (*cookie, workload))
    }

    fn describe(&self, netns: &Netns, cookie: NetnsCookie, attachment: Option<&Attachment>) -> Workload {
        let mut addresses: HashSet<IpAddr> =
            netns.run(routing::addresses).ok().and_then(Result::ok).unwrap_or_default().into_iter().collect();
        // An address that has been removed may still have connections.
        addresses.extend(self.known.get(&cookie).into_iter().flat_map(|known| &known.addresses));
        let steered = attachment.and_then(|attachment| attachment.steered_ports());
        let proxy = match steered {
            Some(ports) => Some(ProxyPorts::Steered(Box::new(ports))),
            None => match self.known.get(&cookie) {
                // Rules do not change every second, and reading them starts processes. A pod that is just
                // being set up may not have them yet.
                Some(known)
                    if !known.attached && (known.proxy.is_some() || known.since.elapsed() > SETTLED) =>
                {
                    known.proxy.clone()
                }
                _ => self.find_proxy.and_then(|find| find(netns)),
            },
        };
        Workload {
            name: attachment.map_or_else(|| netns_name(netns.path()), |a| a.name.as_str().into()),
            netns: netns.path().to_owned(),
            addresses,
            proxy,
            attached: attachment.is_some(),
            mark: attachment.map_or(0, |attachment| attachment.mark),
            since: self.known.get(&cookie).map_or_else(Instant::now, |known| known.since),
        }
    }
}

/// `/run/netns/NAME` -> `NAME`, `/proc/PID/ns/net` -> `pid-PID`.
pub(crate) fn netns_name(path: &Path) -> Arc<str> {
    let parts: Vec<_> = path.iter().map(|part| part.to_string_lossy()).collect();
    match &parts[..] {
        [_, proc, pid, ns, net] if proc == "proc" && ns == "ns" && net == "net" => {
            format!("pid-{pid}").into()
        }
        [.., last] => last.as_ref().into(),
        [] => "".into(),
    }
}

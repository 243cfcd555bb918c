//! A watch with everything around it: events in, records out.

use std::{
    collections::HashSet,
    net::SocketAddr,
    path::PathBuf,
    thread::JoinHandle,
    time::{Duration, Instant},
};

use srcip_common::telemetry::{ACTIVE, Event, NOBODY, OPEN, PASSIVE, WatchCounters};

use super::{
    clock::Clock,
    join::Joiner,
    record::{Record, Timestamp},
    watch::{Scope, Watch},
    workload::{ProxyPorts, Workloads},
};
use crate::{
    dataplane::{Dataplane, error::Result},
    netns::{Netns, NetnsCookie},
    sockets::{TcpSocket, tcp_sockets},
};

/// How often the ring buffer is looked at. It is never waited on, so that no connection ever has to wake a
/// reader.
pub const POLL_INTERVAL: Duration = Duration::from_millis(20);

/// How often connections whose end was not told of are looked for, if there may be any.
const SWEEP_INTERVAL: Duration = Duration::from_secs(10);

/// How often otherwise: a foreign program may have switched the telling off for a socket.
const RARE_SWEEP_INTERVAL: Duration = Duration::from_secs(300);

/// How often pods are looked for: names, addresses, attachments and proxies change.
const REFRESH_INTERVAL: Duration = Duration::from_secs(10);

/// What to observe.
#[derive(Clone, Debug)]
pub struct Options {
    /// Network namespaces; all but the host's if empty.
    pub netns: Vec<PathBuf>,
    /// The cgroup v2 directory whose processes are seen.
    pub cgroup: PathBuf,
    /// Finds a pod's proxy where srcip does not steer.
    pub find_proxy: Option<fn(&Netns) -> Option<ProxyPorts>>,
}

/// How many events there were, and what became of them: `opened` = `opened_delivered` + `opened_lost` +
/// those still in the ring buffer.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, serde::Serialize)]
pub struct Accounting {
    /// Connections opened, as the kernel counted.
    pub opened: u64,
    /// Of those, the ones read.
    pub opened_delivered: u64,
    /// Of those, the ones whose event did not fit into the ring buffer.
    pub opened_lost: u64,
    /// Connections closed, as the kernel counted.
    pub closed: u64,
    /// Of those, the ones read.
    pub closed_delivered: u64,
    /// Of those, the ones whose event did not fit into the ring buffer.
    pub closed_lost: u64,
}

impl Accounting {
    /// Events that were lost.
    pub fn lost(&self) -> u64 {
        self.opened_lost + self.closed_lost
    }
}

/// A running observation.
#[derive(Debug)]
pub struct Observer {
    watch: Watch,
    started: Timestamp,
    workloads: Workloads,
    joiner: Joiner,
    dataplane: Dataplane,
    /// Whether pods come and go in what is observed.
    all: bool,
    delivered: (u64, u64),
    lost: u64,
    /// Events have been lost since the last sweep.
    lost_since_sweep: bool,
    swept: Instant,
    listing: Option<JoinHandle<Listed>>,
    refreshed: Instant,
}

impl Observer {
    /// Starts to observe. Connections that are open already are known, but their end is not told of.
    pub fn start(dataplane: &Dataplane, options: &Options) -> Result<Self> {
        let mut workloads = Workloads::new(options.find_proxy);
        let scope = if options.netns.is_empty() {
            let host = Netns::host().and_then(|host| host.cookie().ok());
            Scope::AllBut(host.unwrap_or(NetnsCookie(0)))
        } else {
            let opened = options.netns.iter().map(|path| Netns::open(path));
            let opened = opened.collect::<Result<Vec<_>, _>>()?;
            Scope::Only(opened.iter().filter_map(|netns| workloads.add(netns, dataplane)).collect())
        };
        // First the watch, then the look around: what opens in between is seen twice rather than not at all.
        let watch = Watch::start(&scope, &options.cgroup)?;
        let started = Clock::now().current();
        let all = options.netns.is_empty();
        if all {
            workloads.refresh(dataplane);
        }
        let mut observer = Self {
            watch,
            started,
            workloads,
            joiner: Joiner::default(),
            dataplane: dataplane.clone(),
            all,
            delivered: (0, 0),
            lost: 0,
            lost_since_sweep: false,
            swept: Instant::now(),
            listing: None,
            refreshed: Instant::now(),
        };
        mark_upstream_legs(&mut observer.watch, &observer.workloads)?;
        observer.take_in_what_is_open();
        Ok(observer)
    }

    /// Hands over what has happened since the last time; returns how many events that were. To be called
    /// every [`POLL_INTERVAL`].
    pub fn poll(&mut self, mut each: impl FnMut(Record)) -> Result<usize> {
        if self.all && self.refreshed.elapsed() >= REFRESH_INTERVAL {
            self.refresh();
        }
        // Listed before the events are read: a connection that ends in between is told of, not forgotten.
        let listed = self.listed();
        let Self { watch, workloads, joiner, dataplane, all, delivered, .. } = self;
        let clock = Clock::now();
        let count = watch.read(|event| {
            if event.kind == OPEN {
                delivered.0 += 1;
                if *all && workloads.should_refresh(NetnsCookie(event.netns)) {
                    workloads.look_for(NetnsCookie(event.netns), dataplane);
                }
            } else {
                delivered.1 += 1;
            }
            if let Some(record) = joiner.event(event, clock, workloads) {
                each(record);
            }
        });
        if let Some((listed_ns, sockets)) = listed {
            self.joiner.retain(listed_ns, |cookie, local, remote| sockets.contains(&(cookie, local, remote)));
        }
        if count > 0 {
            let lost = self.accounting()?.lost();
            if lost != self.lost {
                self.lost = lost;
                self.lost_since_sweep = true;
                self.joiner.note_loss();
            }
        }
        Ok(count)
    }

    /// What became of the events.
    pub fn accounting(&self) -> Result<Accounting> {
        let WatchCounters { opened, opened_lost, closed, closed_lost } = self.watch.counters()?;
        let (opened_delivered, closed_delivered) = self.delivered;
        Ok(Accounting { opened, opened_delivered, opened_lost, closed, closed_delivered, closed_lost })
    }

    /// Connections that opened after this are told of.
    pub fn started(&self) -> Timestamp {
        self.started
    }

    /// The pods.
    pub fn workloads(&self) -> &Workloads {
        &self.workloads
    }

    /// What there is to tell of the connections that are open now.
    pub fn open_records(&self) -> Vec<Record> {
        self.joiner.open_records(Clock::now()).collect()
    }

    /// How many connections are known to be open.
    pub fn open_connections(&self) -> usize {
        self.joiner.len()
    }

    /// Looks for pods again: names, addresses and attachments may have changed.
    pub fn refresh(&mut self) {
        if self.all {
            self.refreshed = Instant::now();
            self.workloads.refresh(&self.dataplane);
            // Without it, more is told than needs to be, and nothing goes wrong.
            let _ = mark_upstream_legs(&mut self.watch, &self.workloads);
        }
    }

    /// The records of what is open now, as far as it was open before this began; and takes it in.
    fn take_in_what_is_open(&mut self) {
        let clock = Clock::now();
        let pods: Vec<_> = self.workloads.iter().map(|(cookie, w)| (cookie, w.netns.clone())).collect();
        let mut number = u64::MAX;
        for (cookie, path) in pods {
            let sockets = sockets_of(&path);
            let listening: HashSet<u16> =
                sockets.iter().filter(|s| s.is_listener()).map(|s| s.local.port()).collect();
            let mut events: Vec<_> = sockets
                .iter()
                .filter(|s| s.is_connection())
                .map(|s| {
                    // Numbers from the other end of the range than the kernel's.
                    number -= 1;
                    let role = if listening.contains(&s.local.port()) { PASSIVE } else { ACTIVE };
                    open_event(cookie, number, s, role)
                })
                .collect();
            // Clients' connections first: the proxy's are joined with them.
            events.sort_by_key(|event| event.role != PASSIVE);
            let inside: HashSet<_> = events
                .iter()
                .filter(|event| event.role == ACTIVE)
                .map(|event| (event.remote, event.remote_port, event.local, event.local_port))
                .collect();
            for event in events {
                let ends = (event.local, event.local_port, event.remote, event.remote_port);
                if event.role == PASSIVE && inside.contains(&ends) {
                    continue;
                }
                self.joiner.was_open(&event, clock, &self.workloads);
            }
        }
    }

    /// The connections that there are, once they have been listed. That may take its time: a thread does it,
    /// and the events are read meanwhile.
    fn listed(&mut self) -> Option<Listed> {
        if let Some(thread) = self.listing.take_if(|thread| thread.is_finished()) {
            return thread.join().ok();
        }
        let soon = self.lost_since_sweep || self.joiner.has_unwatched();
        let interval = if soon { SWEEP_INTERVAL } else { RARE_SWEEP_INTERVAL };
        if self.listing.is_none() && self.swept.elapsed() >= interval {
            self.swept = Instant::now();
            self.lost_since_sweep = false;
            let pods: Vec<_> = self.workloads.iter().map(|(cookie, w)| (cookie, w.netns.clone())).collect();
            self.listing = Some(std::thread::spawn(move || list(&pods)));
        }
        None
    }
}

/// A time in nanoseconds since boot, and the connections that were open then and still were later.
type Listed = (u64, HashSet<(NetnsCookie, SocketAddr, SocketAddr)>);

fn list(pods: &[(NetnsCookie, PathBuf)]) -> Listed {
    let listed_ns = Clock::boot_ns();
    let mut open = HashSet::new();
    for (cookie, netns) in pods {
        let sockets = sockets_of(netns);
        open.extend(sockets.iter().filter(|s| s.is_connection()).map(|s| (*cookie, s.local, s.remote)));
    }
    (listed_ns, open)
}

/// Of an upstream leg that srcip has marked, one end is enough.
fn mark_upstream_legs(watch: &mut Watch, workloads: &Workloads) -> Result<()> {
    let steered = workloads.iter().filter(|(_, workload)| workload.attached);
    steered.into_iter().try_for_each(|(cookie, workload)| watch.watch(cookie, workload.mark))
}

fn sockets_of(netns: &std::path::Path) -> Vec<TcpSocket> {
    let sockets = Netns::open(netns).ok().and_then(|netns| netns.run(tcp_sockets).ok());
    sockets.and_then(Result::ok).unwrap_or_default()
}

fn open_event(netns: NetnsCookie, socket: u64, of: &TcpSocket, role: u8) -> Event {
    Event {
        netns: netns.0,
        socket,
        time_ns: 0,
        bytes_sent: 0,
        bytes_received: 0,
        local: of.local.ip().into(),
        remote: of.remote.ip().into(),
        local_port: of.local.port(),
        remote_port: of.remote.port(),
        srtt_us: 0,
        retransmits: 0,
        mark: 0,
        kind: OPEN,
        role,
        closed_by: NOBODY,
        padding: 0,
        padding2: 0,
    }
}

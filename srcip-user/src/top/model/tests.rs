use super::{
    super::{
        columns::Column,
        snapshot::{Line, Order, Snapshot, select},
    },
    *,
};
use crate::telemetry::record::{
    ClosedBy, DownstreamLocal, DownstreamRemote, Origin, Timestamp, Totals as RecordTotals, UpstreamHost,
    UpstreamLocal,
};

/// Records of one client's connections to one workload.
#[derive(Clone, Copy)]
pub(crate) struct Maker {
    pub(crate) workload: (&'static str, u64),
    pub(crate) client: &'static str,
}

pub(crate) const WEB: Maker = Maker { workload: ("web", 1), client: "10.0.0.1" };

impl Maker {
    fn record(self, leg: Leg, event: EventKind, port: u16) -> Record {
        let client = SocketAddr::new(self.client.parse().unwrap(), port);
        Record {
            time: Timestamp(0),
            event,
            workload: self.workload.0.into(),
            netns_cookie: NetnsCookie(self.workload.1),
            leg,
            downstream_remote_address: Some(DownstreamRemote(client)),
            downstream_local_address: Some(DownstreamLocal("10.0.0.9:8000".parse().unwrap())),
            upstream_local_address: None,
            upstream_host: None,
            origin: Some(Origin(client)),
            preserved: None,
            join: None,
            rule: None,
            mark: 0,
            totals: None,
        }
    }

    pub(crate) fn open(self, port: u16) -> Record {
        self.record(Leg::Downstream, EventKind::Open, port)
    }

    pub(crate) fn upstream(self, port: u16, seen: &str) -> Record {
        let mut record = self.record(Leg::Upstream, EventKind::Open, port);
        let seen = SocketAddr::new(seen.parse().unwrap(), 61_000);
        record.upstream_local_address = Some(UpstreamLocal(seen));
        record.upstream_host = Some(UpstreamHost("10.0.0.9:8000".parse().unwrap()));
        record.preserved = Some(seen.ip() == self.client.parse::<IpAddr>().unwrap());
        record
    }

    pub(crate) fn close(self, port: u16, bytes: (u64, u64), rtt_us: u32) -> Record {
        let mut record = self.record(Leg::Downstream, EventKind::Close, port);
        record.totals = Some(RecordTotals {
            bytes_sent: bytes.1,
            bytes_received: bytes.0,
            duration_ms: 1.0,
            rtt_us,
            retransmits: 0,
            closed_by: ClosedBy::Remote,
        });
        record
    }
}

const NOW: Duration = Duration::from_secs(10);

fn only(lines: &[Line]) -> &Line {
    let [line] = lines else { panic!("{lines:?}") };
    line
}

#[test]
fn a_connection_from_beginning_to_end() {
    let mut model = Model::default();
    model.record(&WEB.open(1000), NOW);
    let snapshot = Snapshot::take(&model, NOW);
    for line in [only(&snapshot.clients), only(&snapshot.workloads)] {
        assert_eq!((line.open, line.total, line.unknown(), line.rtt_us), (1, 1, 1, None));
        assert_eq!((line.new, line.sees), (0.2, None));
    }
    model.record(&WEB.upstream(1000, WEB.client), NOW);
    model.record(&WEB.close(1000, (500, 1500), 80), NOW);
    let snapshot = Snapshot::take(&model, NOW);
    for line in [only(&snapshot.clients), only(&snapshot.workloads)] {
        assert_eq!((line.open, line.total, line.preserved, line.lost, line.unknown()), (0, 1, 1, 0, 0));
        assert_eq!((line.bytes_in, line.bytes_out), (500, 1500));
        assert_eq!((line.rate_in, line.rate_out), (100.0, 300.0));
        assert_eq!((line.rtt_us, line.sees), (Some(80), Some(Sees::Client)));
    }
    assert_eq!(&*snapshot.clients[0].name, "10.0.0.1");
    assert_eq!(snapshot.clients[0].peers, ["web".into()]);
    assert_eq!(&*snapshot.workloads[0].name, "web");
    assert_eq!((snapshot.head.open, snapshot.head.preserved, snapshot.head.unknown()), (0, 1, 0));
    // Later nothing happens any more.
    let later = Snapshot::take(&model, NOW + Duration::from_secs(6));
    assert_eq!((later.clients[0].new, later.clients[0].rate_in, later.head.new), (0.0, 0.0, 0.0));
}

#[test]
fn lost_once_is_lost() {
    let mut model = Model::default();
    model.record(&WEB.open(1000), NOW);
    model.record(&WEB.upstream(1000, WEB.client), NOW);
    model.record(&WEB.upstream(1000, "127.0.0.6"), NOW);
    model.record(&WEB.upstream(1000, WEB.client), NOW);
    let snapshot = Snapshot::take(&model, NOW);
    let line = only(&snapshot.clients);
    assert_eq!((line.preserved, line.lost, line.unknown()), (0, 1, 0));
    assert_eq!(line.sees, Some(Sees::Other("127.0.0.6".parse().unwrap())));
    assert_eq!((snapshot.head.preserved, snapshot.head.lost), (0, 1));
    assert_eq!(line.lost_share(), Some(1.0));
}

#[test]
fn what_is_told_out_of_order_or_not_at_all() {
    let mut model = Model::default();
    // From before the start: neither opening is known.
    model.record(&WEB.upstream(1, WEB.client), NOW);
    model.record(&WEB.close(1, (1, 1), 1), NOW);
    assert!(model.clients.is_empty());
    // The end was lost, and the same client comes from the same port again.
    model.record(&WEB.open(2), NOW);
    model.record(&WEB.open(2), NOW);
    model.record(&WEB.close(2, (1, 1), 0), NOW);
    model.record(&WEB.close(2, (1, 1), 0), NOW);
    let snapshot = Snapshot::take(&model, NOW);
    let line = only(&snapshot.clients);
    assert_eq!((line.open, line.total, line.bytes_in, line.rtt_us), (0, 2, 1, None));
    assert_eq!(model.open(), 0);
}

#[test]
fn memory_is_bounded() {
    const CLIENTS: [&str; 30] = [
        "10.1.0.0", "10.1.0.1", "10.1.0.2", "10.1.0.3", "10.1.0.4", "10.1.0.5", "10.1.0.6", "10.1.0.7",
        "10.1.0.8", "10.1.0.9", "10.1.1.0", "10.1.1.1", "10.1.1.2", "10.1.1.3", "10.1.1.4", "10.1.1.5",
        "10.1.1.6", "10.1.1.7", "10.1.1.8", "10.1.1.9", "10.1.2.0", "10.1.2.1", "10.1.2.2", "10.1.2.3",
        "10.1.2.4", "10.1.2.5", "10.1.2.6", "10.1.2.7", "10.1.2.8", "10.1.2.9",
    ];
    let mut model = Model::with_limits(10, 25);
    for (i, client) in CLIENTS.into_iter().enumerate() {
        let at = Duration::from_secs(i as u64);
        model.record(&Maker { client, ..WEB }.open(1), at);
        // The first client stays at it, so it stays.
        model.record(&Maker { client: CLIENTS[0], ..WEB }.upstream(1, CLIENTS[0]), at);
        assert!(model.clients.len() <= 10);
    }
    let has = |model: &Model, client: &str| {
        model.clients.iter().any(|(ip, _)| *ip == client.parse::<IpAddr>().unwrap())
    };
    assert!(has(&model, CLIENTS[0]) && has(&model, CLIENTS[29]) && !has(&model, CLIENTS[1]));
    assert_eq!(model.clients.dropped, 20);
    assert_eq!((model.open(), model.totals.connections, model.totals.unfollowed), (25, 30, 5));
    // One that has been dropped and has come back is not charged for what it had before.
    let back = Maker { client: CLIENTS[1], ..WEB };
    model.record(&WEB.close(9, (0, 0), 0), NOW);
    model.record(&back.close(1, (7, 7), 1), NOW);
    assert!(!has(&model, CLIENTS[1]));
}

#[test]
fn names_are_printable_and_peers_are_few() {
    let mut model = Model::default();
    const NAMES: [&str; 10] = ["a\x1b[2J", "b", "c", "d", "e", "f", "g", "h", "i", "j"];
    for (i, name) in NAMES.into_iter().enumerate() {
        model.record(&Maker { workload: (name, i as u64), ..WEB }.open(i as u16), NOW);
    }
    let snapshot = Snapshot::take(&model, NOW);
    assert!(snapshot.workloads.iter().any(|line| &*line.name == "a\u{fffd}[2J"));
    let peers: Vec<_> = only(&snapshot.clients).peers.iter().map(|peer| peer.to_string()).collect();
    assert_eq!(peers, ["j", "i", "h", "g", "f", "e", "d", "c"]);
}

#[test]
fn order_and_filter() {
    let mut model = Model::default();
    for (client, connections, rtt) in [("10.0.0.2", 3, 50), ("10.0.0.10", 1, 70), ("fd00::1", 2, 60)] {
        let maker = Maker { client, workload: if client == "fd00::1" { ("db", 2) } else { ("web", 1) } };
        for port in 1..=connections {
            model.record(&maker.open(port), NOW);
            model.record(&maker.close(port, (port.into(), 0), rtt), NOW);
        }
    }
    let lines = Snapshot::take(&model, NOW).clients;
    let names = |filter: &str, by, reversed| -> Vec<String> {
        let lines = select(&lines, filter, Order { by, reversed });
        lines.iter().map(|line| line.name.to_string()).collect()
    };
    assert_eq!(names("", Column::Name, false), ["10.0.0.2", "10.0.0.10", "fd00::1"]);
    assert_eq!(names("", Column::Name, true), ["fd00::1", "10.0.0.10", "10.0.0.2"]);
    assert_eq!(names("", Column::Total, false), ["10.0.0.2", "fd00::1", "10.0.0.10"]);
    assert_eq!(names("", Column::Total, true), ["10.0.0.10", "fd00::1", "10.0.0.2"]);
    assert_eq!(names("", Column::Rtt, false), ["10.0.0.10", "fd00::1", "10.0.0.2"]);
    // Equals: more connections first, whichever way round.
    assert_eq!(names("", Column::Open, false), ["10.0.0.2", "fd00::1", "10.0.0.10"]);
    assert_eq!(names("10.0", Column::Total, false), ["10.0.0.2", "10.0.0.10"]);
    assert_eq!(names("DB", Column::Total, false), ["fd00::1"]);
    assert!(names("nobody", Column::Total, false).is_empty());
}

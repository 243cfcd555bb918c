//! Adds connections up to a report: per workload, how many keep their client, and why the others do not.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::IpAddr,
    path::PathBuf,
};

use serde::Serialize;

use super::{
    cause::{Cause, Surroundings, causes},
    cluster::{Cluster, full_name},
    cure::{Cure, Patient},
    netfilter::Interception,
};
use crate::{
    netns::NetnsCookie,
    telemetry::{
        record::{EventKind, Leg, Record},
        workload::{Workload, Workloads},
    },
};

/// How many different addresses of a kind are remembered of one finding.
const MAX_ADDRESSES: usize = 16;

/// An audit in progress.
#[derive(Debug)]
pub struct Audit {
    cluster: Cluster,
    subjects: HashMap<NetnsCookie, Subject>,
}

/// What is gathered of one workload.
#[derive(Debug)]
struct Subject {
    workload: Workload,
    interception: Interception,
    connections: u64,
    preserved: u64,
    /// Clients of its proxy. One connection of that to the application may serve many.
    downstream_clients: BTreeSet<IpAddr>,
    findings: BTreeMap<Cause, Gathered>,
}

#[derive(Debug, Default)]
struct Gathered {
    connections: u64,
    ports: BTreeSet<u16>,
    application_saw: BTreeSet<IpAddr>,
    clients: BTreeSet<IpAddr>,
}

/// The whole report; its names in JSON are stable.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Report {
    /// All workloads that had connections, by name.
    pub workloads: Vec<WorkloadReport>,
}

/// What was found of one workload.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct WorkloadReport {
    /// Its name.
    pub workload: String,
    /// Namespace and name of the pod, if it is in the manifests.
    pub pod: Option<String>,
    /// Its network namespace.
    pub netns: PathBuf,
    /// Whether srcip steers it.
    pub attached: bool,
    /// The rules that take its connections to a proxy.
    pub interception: Interception,
    /// Connections that reached its applications.
    pub connections: u64,
    /// Of those, the ones whose application saw the client.
    pub preserved: u64,
    /// Why, most connections first.
    pub findings: Vec<Finding>,
}

/// One reason why applications of a workload see what they see.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Finding {
    /// The reason.
    #[serde(flatten)]
    pub cause: Cause,
    /// Connections it holds for.
    pub connections: u64,
    /// The application's ports.
    pub ports: BTreeSet<u16>,
    /// What the application saw; not all if there are many.
    pub application_saw: BTreeSet<IpAddr>,
    /// Who the client really was, where that can be known; not all if there are many.
    pub clients: BTreeSet<IpAddr>,
    /// What to do.
    #[serde(flatten)]
    pub cure: Cure,
}

impl Audit {
    /// Begins.
    pub fn new(cluster: Cluster) -> Self {
        Self { cluster, subjects: HashMap::new() }
    }

    /// Takes a record in. A connection counts when it ends, and not again before.
    pub fn record(&mut self, record: &Record, workloads: &Workloads) {
        if record.event == EventKind::Close {
            self.count(record, workloads);
        }
    }

    /// Counts a connection that is still open at the end.
    pub fn still_open(&mut self, record: &Record, workloads: &Workloads) {
        self.count(record, workloads);
    }

    fn count(&mut self, record: &Record, workloads: &Workloads) {
        if !matches!(record.leg, Leg::Direct | Leg::Upstream | Leg::Downstream) {
            return;
        }
        let Some(workload) = workloads.get(record.netns_cookie) else { return };
        let subject = self.subjects.entry(record.netns_cookie).or_insert_with(|| Subject {
            workload: workload.clone(),
            interception: Interception::read_at(&workload.netns),
            connections: 0,
            preserved: 0,
            downstream_clients: BTreeSet::new(),
            findings: BTreeMap::new(),
        });
        if record.leg == Leg::Downstream {
            note(&mut subject.downstream_clients, record.origin.map(|origin| origin.ip()));
            return;
        }
        let pod = self.cluster.pod(|ip| workload.addresses.contains(&ip));
        let around =
            Surroundings { workload, pod, interception: &subject.interception, cluster: &self.cluster };
        let causes = causes(record, around);
        if causes.is_empty() {
            return;
        }
        subject.connections += 1;
        if !causes.iter().any(Cause::loses) {
            subject.preserved += 1;
        }
        let port = match record.leg {
            Leg::Direct => record.downstream_local_address.map(|address| address.0.port()),
            _ => record.upstream_host.map(|address| address.0.port()),
        };
        for cause in causes {
            let client_is_known = !cause.is_before_the_pod();
            let gathered = subject.findings.entry(cause).or_default();
            gathered.connections += 1;
            gathered.ports.extend(port);
            note(&mut gathered.application_saw, record.seen_by_application());
            let client = record.origin.map(|origin| origin.ip());
            note(&mut gathered.clients, client.filter(|_| client_is_known));
        }
    }

    /// Ends, and tells.
    pub fn report(self) -> Report {
        let Self { cluster, subjects } = self;
        let mut workloads: Vec<_> = subjects
            .into_values()
            .filter(|subject| !subject.findings.is_empty())
            .map(|subject| {
                let Subject { workload, interception, connections, preserved, .. } = subject;
                let (downstream_clients, findings) = (subject.downstream_clients, subject.findings);
                let pod = cluster.pod(|ip| workload.addresses.contains(&ip));
                let mut findings: Vec<_> = findings
                    .into_iter()
                    .map(|(cause, gathered)| {
                        let Gathered { connections, ports, application_saw, mut clients } = gathered;
                        if cause.is_inside_the_pod() {
                            downstream_clients.iter().for_each(|client| note(&mut clients, Some(*client)));
                        }
                        let patient = Patient {
                            netns: &workload.netns,
                            pod,
                            interception: &interception,
                            ports: &ports,
                        };
                        let cure = cause.cure(patient);
                        Finding { cause, connections, ports, application_saw, clients, cure }
                    })
                    .collect();
                findings.sort_by_key(|finding| std::cmp::Reverse(finding.connections));
                WorkloadReport {
                    workload: workload.name.to_string(),
                    pod: pod.map(|pod| full_name(&pod.metadata)),
                    netns: workload.netns,
                    attached: workload.attached,
                    interception,
                    connections,
                    preserved,
                    findings,
                }
            })
            .collect();
        workloads.sort_by(|a, b| a.workload.cmp(&b.workload));
        Report { workloads }
    }
}

impl Report {
    /// Whether no workload loses a client's address.
    pub fn is_clean(&self) -> bool {
        self.workloads.iter().all(|workload| workload.connections == workload.preserved)
    }
}

fn note(all: &mut BTreeSet<IpAddr>, one: Option<IpAddr>) {
    if all.len() < MAX_ADDRESSES {
        all.extend(one);
    }
}

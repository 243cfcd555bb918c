//! Many pods in one process, as the node agent has them: what attaching costs.
//!
//! A process of its own, whose memory, descriptors and threads are nobody else's. Pods are network namespaces
//! that live as long as this holds them open: nothing is left of them when it is killed.

use std::{
    fs::{self, File},
    net::TcpListener,
    os::fd::AsRawFd as _,
    path::PathBuf,
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use clap::Parser;
use nix::{
    sched::{CloneFlags, unshare},
    time::{ClockId, clock_gettime},
};
use serde_json::json;
use srcip_tests::processor;
use srcip_user::{
    dataplane::{
        Dataplane,
        record::{AttachSpec, CgroupChoice, EngineKind, OnProxyDown, PodRef, Settings, UpstreamPortAt},
    },
    netns::Netns,
    ports::{DEFAULT_UPSTREAM_PORTS, PortList},
    routing::ReturnRoute,
};

#[derive(Parser)]
struct Arguments {
    #[arg(long)]
    pin_path: PathBuf,
    #[arg(long)]
    cgroup: PathBuf,
    #[arg(long)]
    tc: bool,
    /// How many.
    count: usize,
}

/// A pod with a proxy and an application that listen.
struct Pod {
    namespace: File,
    _listeners: [TcpListener; 2],
}

impl Pod {
    fn make() -> Result<Self> {
        let made = std::thread::spawn(|| -> Result<Self> {
            unshare(CloneFlags::CLONE_NEWNET)?;
            ensure!(Command::new("ip").args(["link", "set", "lo", "up"]).status()?.success(), "lo is not up");
            let listeners = [TcpListener::bind("0.0.0.0:15006")?, TcpListener::bind("0.0.0.0:8000")?];
            Ok(Self { namespace: File::open("/proc/thread-self/ns/net")?, _listeners: listeners })
        });
        made.join().ok().context("the thread that made a pod has panicked")?
    }

    fn netns(&self) -> Result<Netns> {
        Ok(Netns::open(&PathBuf::from(format!("/proc/self/fd/{}", self.namespace.as_raw_fd())))?)
    }
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let dataplane = Dataplane::new(arguments.pin_path.clone());
    let report = attach_all(&arguments, &dataplane);
    dataplane.cleanup()?;
    println!("{}", report?);
    Ok(())
}

fn attach(arguments: &Arguments, dataplane: &Dataplane, pod: &Pod, number: usize) -> Result<()> {
    let name = format!("pod-{number}");
    let spec = AttachSpec {
        netns: pod.netns()?,
        name: Some(format!("test/{name}")),
        pod: Some(PodRef { namespace: "test".to_owned(), name, uid: format!("uid-{number}") }),
        settings: Settings {
            proxy_port: 15006,
            include: "*".parse()?,
            exclude: PortList::none(),
            on_proxy_down: OnProxyDown::Drop,
            route: ReturnRoute { mark: 1337, table: 133 },
            upstream_ports: DEFAULT_UPSTREAM_PORTS.parse()?,
            upstream_port_at: UpstreamPortAt::Connect,
        },
        engine: Some(if arguments.tc { EngineKind::Tc } else { EngineKind::SkLookup }),
        tc_hook: None,
        cgroup: CgroupChoice::Path(arguments.cgroup.clone()),
        host_netns: false,
    };
    dataplane.attach(spec)?;
    Ok(())
}

/// Kilobytes.
fn resident() -> Result<u64> {
    let status = fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
    Ok(line.trim().trim_end_matches(" kB").parse()?)
}

/// Processor time of this process: what an attach takes where nobody else wants the processors.
fn cpu_time() -> Result<Duration> {
    Ok(Duration::from(clock_gettime(ClockId::CLOCK_PROCESS_CPUTIME_ID)?))
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}

fn attach_all(arguments: &Arguments, dataplane: &Dataplane) -> Result<serde_json::Value> {
    let pods = (0..arguments.count).map(|_| Pod::make()).collect::<Result<Vec<_>>>()?;
    let (machine, cpu, start) = (processor::of_machine()?, cpu_time()?, Instant::now());
    let (mut times, mut cpu_times) = (Vec::new(), Vec::new());
    for (number, pod) in pods.iter().enumerate() {
        let (cpu, start) = (cpu_time()?, Instant::now());
        attach(arguments, dataplane, pod, number)?;
        times.push(start.elapsed());
        cpu_times.push(cpu_time()? - cpu);
    }
    let (total, total_cpu) = (start.elapsed(), cpu_time()? - cpu);
    let others = processor::of_machine()?.saturating_sub(machine).saturating_sub(total_cpu);
    let first = times[0];
    times.sort();
    cpu_times.sort();
    let p99 = |times: &[Duration]| milliseconds(times[(times.len() * 99).div_ceil(100) - 1]);
    let start = Instant::now();
    let status = dataplane.status()?.attachments;
    let status_took = start.elapsed();
    let complete = status.iter().filter(|pod| pod.problems.is_empty() && pod.listeners.len() == 1).count();
    let start = Instant::now();
    let records = dataplane.records()?;
    let mut common = dataplane.common();
    for record in &records {
        ensure!(
            !dataplane.is_gone(record)? && dataplane.health(record, &mut common).is_empty(),
            "{record:?}"
        );
    }
    Ok(json!({
        "total_ms": milliseconds(total),
        "first_ms": milliseconds(first),
        "median_ms": milliseconds(times[times.len() / 2]),
        "p99_ms": p99(&times),
        "total_cpu_ms": milliseconds(total_cpu),
        "p99_cpu_ms": p99(&cpu_times),
        "others_cpu_ms": milliseconds(others),
        "status_ms": milliseconds(status_took),
        "all_healthy_ms": milliseconds(start.elapsed()),
        "resident_kb": resident()?,
        "complete": complete,
        "registered": status.iter().filter(|pod| pod.registered_listeners == 1).count(),
    }))
}

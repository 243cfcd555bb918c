//! `srcip export`: the access log, Prometheus, OpenTelemetry.

mod access_log;
mod hostile;
mod metrics;
mod otlp;
mod prometheus;

use std::{
    net::SocketAddr,
    process::{Command, ExitStatus},
    sync::atomic::{AtomicU32, Ordering},
    time::{Duration, Instant},
};

use nix::sys::signal::Signal;
use srcip_tests::{
    Family, PATIENCE, client, host::Host, peer::Clients, process::Process, srcip::binary, wait_for,
};

use crate::scenario::{PORT, Scenario};

/// Where exporters serve, each in a node's namespace of its own.
const METRICS: &str = "127.0.0.1:9464";

/// Tells logs apart.
static NUMBER: AtomicU32 = AtomicU32::new(0);

/// An exporter on the node of a scenario, which looks at the scenario's pod alone.
struct Export {
    process: Process,
}

impl Export {
    fn start(scenario: &Scenario, options: &str) -> Self {
        Self::start_for(scenario, &[&scenario.pod], options)
    }

    fn start_for(scenario: &Scenario, pods: &[&Host], options: &str) -> Self {
        let command = command(scenario, pods, options);
        // A log of its own: what an earlier one said is not this one's.
        let name = format!("export-{}", NUMBER.fetch_add(1, Ordering::Relaxed));
        let mut process = scenario.world.node().start(&name, command).unwrap();
        process.wait_until("exports", |process| process.log().contains("exporting")).unwrap();
        Self { process }
    }

    /// Ends it as an init system does.
    fn stop(mut self) -> String {
        self.process.signal(Signal::SIGTERM).unwrap();
        let status = self.process.wait(PATIENCE).unwrap();
        assert_clean(status, &self.process.log());
        self.process.log()
    }
}

fn assert_clean(status: ExitStatus, log: &str) {
    assert!(status.success(), "{status}\n{log}");
    assert!(!log.contains("panicked"), "{log}");
}

fn command(scenario: &Scenario, pods: &[&Host], options: &str) -> Command {
    let mut command = scenario.world.node().command(&binary("srcip").display().to_string()).unwrap();
    command.arg("export").args(options.split_whitespace());
    command.arg("--pin-path").arg(scenario.srcip.pin_path());
    command.arg("--cgroup").arg(scenario.world.cgroup());
    for pod in pods {
        command.arg("--netns").arg(pod.path());
    }
    command
}

/// Connections to the pod's application, one after the other; each has been greeted by it.
fn visit(scenario: &Scenario, count: usize) {
    let to = scenario.pod.socket(Family::V4, PORT);
    let opened = Clients::new(to, count, 1).visit(&scenario.client).unwrap();
    assert_eq!((opened.good, opened.errors), (count, Vec::new()));
}

fn metrics_address() -> SocketAddr {
    METRICS.parse().unwrap()
}

/// The metrics, as a scraper on the node gets them.
fn scrape(scenario: &Scenario) -> String {
    let mut stream = client::connect(scenario.world.node(), metrics_address()).unwrap();
    client::http_get(&mut stream, "/metrics").unwrap().body
}

/// The value of a series whose line starts with `series`, which has all of its labels.
fn value(page: &str, series: &str) -> Option<f64> {
    let value = page.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' '))?;
    Some(value.parse().unwrap_or_else(|error| panic!("{series} {value}: {error}")))
}

/// Scrapes until a series has a value, and fails with the page if it never does.
fn wait_for_value(scenario: &Scenario, series: &str, wanted: f64) -> String {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let page = scrape(scenario);
        if value(&page, series) == Some(wanted) {
            return page;
        }
        assert!(Instant::now() < deadline, "{series} does not become {wanted}:\n{page}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Connections of a leg, by whether the client was preserved.
fn connections(pod: &str, leg: &str, preserved: &str) -> String {
    format!(r#"srcip_connections_total{{workload="{pod}",leg="{leg}",preserved="{preserved}"}}"#)
}

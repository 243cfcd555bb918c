//! What telemetry costs: new connections per second with it on, divided by those with it off.
//!
//! Both are measured in turn, many times, on hosts made of network namespaces, and each pair gives one
//! ratio: whatever else the machine is doing, it does to both.

use std::{
    collections::HashMap,
    io::Write as _,
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use clap::{Parser, ValueEnum};
use srcip_tests::{
    Family,
    host::Host,
    peer::{self, APPLICATION_PORT},
    process::Process,
    proxy::{Kind, Proxy},
    srcip::Srcip,
    world::World,
};
use srcip_user::{
    dataplane::Dataplane,
    telemetry::{
        observer::{Accounting, Observer, Options, POLL_INTERVAL},
        record::EventKind,
    },
};

/// Measures what telemetry costs, as a ratio of connection rates.
#[derive(Debug, Parser)]
#[command(name = "srcip-bench", version)]
struct Arguments {
    /// How many pairs.
    #[arg(long, default_value_t = 20)]
    rounds: usize,
    /// How long each measurement takes.
    #[arg(long, default_value_t = 1500)]
    milliseconds: u64,
    /// Connections at a time.
    #[arg(long, default_value_t = 16)]
    threads: usize,
    /// What becomes of the records.
    #[arg(long, value_enum, default_value = "count")]
    records: Records,
    /// The set-ups.
    #[arg(long, value_enum, default_values = ["direct", "sidecar"])]
    setup: Vec<Setup>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
enum Records {
    /// They are joined and counted, as for metrics.
    Count,
    /// The same, and each connection's end is written as JSON, as for the access log.
    Log,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
enum Setup {
    /// A client and an application: one end in the pod for each connection.
    Direct,
    /// With HAProxy as a sidecar, steered by srcip: three ends.
    Sidecar,
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Hosts for a measurement; dropped in this order.
struct Stage {
    _proxy: Option<Proxy>,
    _application: Process,
    client: Host,
    pod: Host,
    srcip: Srcip,
    world: World,
    setup: Setup,
}

impl Stage {
    fn new(setup: Setup) -> Result<Self> {
        let mut world = World::new()?;
        let client = world.host("client")?;
        let pod = world.host("pod")?;
        let srcip = world.srcip();
        let application = peer::echo(&pod, &[&format!("[::]:{APPLICATION_PORT}")])?;
        let proxy = (setup == Setup::Sidecar).then(|| Proxy::start(&pod, Kind::HaproxyTcp)).transpose()?;
        if proxy.is_some() {
            srcip.attach(&pod, "")?;
        }
        Ok(Self { _proxy: proxy, _application: application, client, pod, srcip, world, setup })
    }

    /// Connections in one measurement, and what became of the events if telemetry was on.
    fn measure(&self, arguments: &Arguments, on: bool) -> Result<(usize, Option<Accounting>)> {
        let telemetry = on.then(|| Telemetry::start(self, arguments.records)).transpose()?;
        let to = self.pod.socket(Family::V4, APPLICATION_PORT);
        let time = Duration::from_millis(arguments.milliseconds);
        let count = peer::hammer(&self.client, to, arguments.threads, time)?;
        let accounting = telemetry.map(|telemetry| telemetry.stop()).transpose()?;
        Ok((count, accounting))
    }
}

/// All there is to telemetry: the recorder, an observer that joins legs, and an access log.
struct Telemetry {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Result<Accounting>>,
    recorder: Option<std::path::PathBuf>,
}

impl Telemetry {
    fn start(stage: &Stage, records: Records) -> Result<Self> {
        // Attaching again puts the recorder back.
        let recorder = (stage.setup == Setup::Sidecar).then(|| recorder_pin(&stage.srcip));
        if recorder.is_some() {
            stage.srcip.attach(&stage.pod, "")?;
        }
        let options = Options {
            netns: vec![stage.pod.path()],
            cgroup: stage.world.cgroup().to_owned(),
            find_proxy: None,
        };
        let mut observer = Observer::start(&Dataplane::new(stage.srcip.pin_path().to_owned()), &options)?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            let mut log = std::io::BufWriter::new(std::fs::File::create("/dev/null")?);
            let mut last = false;
            let mut seen = HashMap::new();
            loop {
                let mut written = Ok(());
                observer.poll(|record| {
                    *seen.entry((record.leg, record.preserved)).or_insert(0_u64) += 1;
                    if records == Records::Log && record.event == EventKind::Close {
                        written = serde_json::to_writer(&mut log, &record).map_err(Into::into);
                        let _ = log.write_all(b"\n");
                    }
                })?;
                written.map_err(|error: anyhow::Error| error)?;
                if last {
                    return Ok(observer.accounting()?);
                }
                std::thread::sleep(POLL_INTERVAL);
                last = stopped.load(Ordering::Relaxed);
            }
        });
        Ok(Self { stop, thread, recorder })
    }

    fn stop(self) -> Result<Accounting> {
        // The last connections' ends are on their way.
        std::thread::sleep(Duration::from_millis(100));
        self.stop.store(true, Ordering::Relaxed);
        let accounting = self.thread.join().ok().context("the observer panicked")??;
        if let Some(pin) = self.recorder {
            std::fs::remove_file(&pin).with_context(|| pin.display().to_string())?;
        }
        Ok(accounting)
    }
}

/// Without its pin the recorder goes.
fn recorder_pin(srcip: &Srcip) -> std::path::PathBuf {
    srcip.pin_path().join("node/srcip_watch")
}

fn run(arguments: &Arguments) -> Result<()> {
    ensure!(arguments.rounds > 0, "--rounds 0 measures nothing");
    for &setup in &arguments.setup {
        let stage = Stage::new(setup)?;
        if setup == Setup::Sidecar {
            std::fs::remove_file(recorder_pin(&stage.srcip))?;
        }
        for on in [false, true] {
            stage.measure(arguments, on).context("warming up")?;
        }
        let mut ratios = Vec::new();
        let mut rates = [Vec::new(), Vec::new()];
        let (mut events, mut lost) = (0, 0);
        for round in 0..arguments.rounds {
            // The order alternates: neither always has the machine that the other has warmed up.
            let order = if round % 2 == 0 { [false, true] } else { [true, false] };
            let mut counts = [0.0; 2];
            for on in order {
                let (count, accounting) = stage.measure(arguments, on)?;
                counts[usize::from(on)] = count as f64;
                rates[usize::from(on)].push(count as f64 * 1000.0 / arguments.milliseconds as f64);
                if let Some(accounting) = accounting {
                    events += accounting.opened + accounting.closed;
                    lost += accounting.lost();
                    let delivered = accounting.opened_delivered + accounting.closed_delivered;
                    ensure!(
                        accounting.opened + accounting.closed == delivered + accounting.lost(),
                        "events are missing: {accounting:?}"
                    );
                }
            }
            ratios.push(counts[1] / counts[0]);
            eprintln!("{setup:?} {}/{}: {:.3}", round + 1, arguments.rounds, ratios[round]);
        }
        let name = format!("{setup:?}").to_lowercase();
        let [off, on] = rates.map(|mut rates| quantile(&mut rates, 0.5));
        println!(
            "{name:<8} telemetry on/off: median {:.3}, middle half {:.3} to {:.3} of {} pairs; \
             {on:.0} and {off:.0} connections/s; {events} events, {lost} lost",
            quantile(&mut ratios, 0.5),
            quantile(&mut ratios, 0.25),
            quantile(&mut ratios, 0.75),
            arguments.rounds,
        );
    }
    Ok(())
}

fn quantile(values: &mut [f64], q: f64) -> f64 {
    values.sort_by(f64::total_cmp);
    values[((values.len() - 1) as f64 * q).round() as usize]
}

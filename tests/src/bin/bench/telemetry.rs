//! What telemetry costs: new connections per second with it on, divided by those with it off.

use std::{
    collections::HashMap,
    io::Write as _,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use clap::ValueEnum;
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

use crate::{Arguments, quantile};

#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum Records {
    /// They are joined and counted, as for metrics.
    Count,
    /// The same, and each connection's end is written as JSON, as for the access log.
    Log,
}

/// What is measured against what.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Contestant {
    /// No telemetry at all, not even the recorder that comes with an attachment.
    Off,
    /// The recorder alone: an attachment that nobody looks at.
    Recorder,
    /// The recorder and an observer.
    On,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum Setup {
    /// A client and an application: one end in the pod for each connection.
    Direct,
    /// With HAProxy as a sidecar, steered by srcip: three ends.
    Sidecar,
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

    /// Connections in one measurement, and what became of the events if somebody looked.
    fn measure(&self, arguments: &Arguments, contestant: Contestant) -> Result<(usize, Option<Accounting>)> {
        if self.setup == Setup::Sidecar {
            match contestant {
                // Without its pin it goes.
                Contestant::Off if self.recorder().exists() => std::fs::remove_file(self.recorder())?,
                Contestant::Off => {}
                // Attaching again puts it back.
                Contestant::Recorder | Contestant::On => drop(self.srcip.attach(&self.pod, "")?),
            }
        }
        let on = contestant == Contestant::On;
        let telemetry = on.then(|| Telemetry::start(self, arguments.records)).transpose()?;
        let to = self.pod.socket(Family::V4, APPLICATION_PORT);
        let time = Duration::from_millis(arguments.milliseconds);
        let count = peer::hammer(&self.client, to, arguments.threads, time)?.count;
        let accounting = telemetry.map(|telemetry| telemetry.stop()).transpose()?;
        Ok((count, accounting))
    }

    fn recorder(&self) -> std::path::PathBuf {
        self.srcip.pin_path().join("node/srcip_watch")
    }

    fn contestants(&self) -> &'static [Contestant] {
        match self.setup {
            Setup::Direct => &[Contestant::Off, Contestant::On],
            Setup::Sidecar => &[Contestant::Off, Contestant::Recorder, Contestant::On],
        }
    }
}

/// An observer that joins legs, and what becomes of its records.
struct Telemetry {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Result<Accounting>>,
}

impl Telemetry {
    fn start(stage: &Stage, records: Records) -> Result<Self> {
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
        Ok(Self { stop, thread })
    }

    fn stop(self) -> Result<Accounting> {
        // The last connections' ends are on their way.
        std::thread::sleep(Duration::from_millis(100));
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().ok().context("the observer panicked")?
    }
}

/// Measures all set-ups.
pub fn run(arguments: &Arguments) -> Result<()> {
    let mut too_slow = Vec::new();
    for &setup in &arguments.setup {
        measure_setup(arguments, setup, &mut too_slow)?;
    }
    ensure!(too_slow.is_empty(), "slower than --at-least: {}", too_slow.join(", "));
    Ok(())
}

fn measure_setup(arguments: &Arguments, setup: Setup, too_slow: &mut Vec<String>) -> Result<()> {
    let stage = Stage::new(setup)?;
    let contestants = stage.contestants();
    for &contestant in contestants {
        stage.measure(arguments, contestant).context("warming up")?;
    }
    let mut rates: Vec<Vec<f64>> = vec![Vec::new(); contestants.len()];
    let (mut events, mut lost) = (0, 0);
    for round in 0..arguments.rounds {
        // Another one begins each time: none always has the machine that another has warmed up.
        for i in (0..contestants.len()).map(|i| (i + round) % contestants.len()) {
            let (count, accounting) = stage.measure(arguments, contestants[i])?;
            rates[i].push(count as f64 * 1000.0 / arguments.milliseconds as f64);
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
        eprintln!("{setup:?} {}/{}", round + 1, arguments.rounds);
    }
    let setup = format!("{setup:?}").to_lowercase();
    for (contestant, own) in contestants.iter().zip(&rates).skip(1) {
        let mut ratios: Vec<_> = own.iter().zip(&rates[0]).map(|(own, off)| own / off).collect();
        let median = quantile(&mut ratios, 0.5);
        let contestant = format!("{contestant:?}").to_lowercase();
        println!(
            "{setup:<8} {contestant:<8} / off: median {median:.3}, middle half {:.3} to {:.3} of {} rounds; \
             {:.0} and {:.0} connections/s",
            quantile(&mut ratios, 0.25),
            quantile(&mut ratios, 0.75),
            arguments.rounds,
            quantile(&mut own.clone(), 0.5),
            quantile(&mut rates[0].clone(), 0.5),
        );
        if arguments.at_least.is_some_and(|least| median < least) {
            too_slow.push(format!("{setup} {contestant} {median:.3}"));
        }
    }
    println!("{setup:<8} {events} events, {lost} lost");
    ensure!(lost == 0, "{lost} events were lost");
    Ok(())
}

//! A steady load of new connections, one after the other, for as long as something else goes on.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use srcip_user::netns::Netns;

use crate::{
    client::{ask, connect_here},
    host::Host,
};

/// A running load.
#[derive(Debug)]
pub struct Load {
    stop: Arc<AtomicBool>,
    done: Arc<AtomicUsize>,
    threads: Vec<JoinHandle<Report>>,
}

/// What became of the connections.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Report {
    /// How many there were.
    pub total: usize,
    /// The errors of those that failed.
    pub failures: Vec<String>,
    /// How many reached the application without the proxy.
    pub bypassed: usize,
    /// How many reached it without the client's address.
    pub lost: usize,
}

impl Load {
    /// Starts `threads` clients on `host` that ask the HTTP application at `to`.
    pub fn start(host: &Host, to: SocketAddr, threads: usize) -> Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let done = Arc::new(AtomicUsize::new(0));
        let own = host.addresses(if to.is_ipv4() { crate::Family::V4 } else { crate::Family::V6 });
        let threads = (0..threads)
            .map(|_| {
                let netns = Netns::open(&host.path())?;
                let (stop, done, own) = (Arc::clone(&stop), Arc::clone(&done), own.clone());
                Ok(std::thread::spawn(move || {
                    let work = || {
                        let mut report = Report::default();
                        while !stop.load(Ordering::Relaxed) {
                            report.total += 1;
                            match connect_here(None, to).and_then(|mut stream| ask(&mut stream)) {
                                Ok(seen) => {
                                    report.bypassed += usize::from(!seen.proxied);
                                    report.lost += usize::from(!own.contains(&seen.peer.ip()));
                                }
                                Err(error) => report.failures.push(format!("{error:#}")),
                            }
                            done.fetch_add(1, Ordering::Relaxed);
                            std::thread::sleep(Duration::from_millis(1));
                        }
                        report
                    };
                    netns.run(work).expect("a namespace that exists can be entered")
                }))
            })
            .collect::<Result<_>>()?;
        Ok(Self { stop, done, threads })
    }

    /// Waits until `count` more connections have been tried.
    pub fn wait_for(&self, count: usize) {
        let goal = self.done.load(Ordering::Relaxed) + count;
        let deadline = Instant::now() + Duration::from_secs(120);
        while self.done.load(Ordering::Relaxed) < goal {
            assert!(Instant::now() < deadline, "{count} connections take longer than two minutes");
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Ends it and adds up.
    pub fn stop(self) -> Result<Report> {
        self.stop.store(true, Ordering::Relaxed);
        let mut sum = Report::default();
        for thread in self.threads {
            let report = thread.join().ok().context("a client panicked")?;
            sum.total += report.total;
            sum.failures.extend(report.failures);
            sum.bypassed += report.bypassed;
            sum.lost += report.lost;
        }
        Ok(sum)
    }
}

//! Pods of a container runtime are steered before their first packet.

use std::{
    net::{IpAddr, SocketAddr, TcpStream},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use serde_json::json;
use srcip_tests::{
    PATIENCE,
    agent::{NODE, Setup, Source},
    client,
    host::Host,
    image::{ENVOY, PEER},
    pod::{Pod, PodSpec},
    process::sh,
};
use srcip_user::netns::Netns;

use crate::cluster::{Cluster, conflist, sidecar_containers};

/// A pod that stays, and has clients.
const CLIENT: &str = "10.134.0.8";
/// All others get this address, one after the other: there is no third.
const ADDRESS: &str = "10.134.0.9";
const STARTS: usize = 50;
/// How long an application is alone in its pod: it listens, its proxy does not.
const ALONE: Duration = Duration::from_millis(100);
const LIMIT: Duration = PATIENCE;

/// Clients that try an address again and again, whether or not anybody is there.
struct Hammer {
    stop: Arc<AtomicBool>,
    seen: Arc<Seen>,
    threads: Vec<JoinHandle<()>>,
}

#[derive(Default)]
struct Seen {
    attempts: AtomicUsize,
    proxied: AtomicUsize,
    direct: AtomicUsize,
    /// Answers in which the application saw another address than the client's.
    lost: AtomicUsize,
}

impl Hammer {
    fn start(host: &Host, to: SocketAddr, threads: usize) -> Self {
        Self::inside(&host.path(), host.addresses(srcip_tests::Family::V4), to, threads)
    }

    /// From a network namespace with these addresses.
    fn inside(netns: &Path, own: Vec<IpAddr>, to: SocketAddr, threads: usize) -> Self {
        let (stop, seen) = (Arc::new(AtomicBool::new(false)), Arc::new(Seen::default()));
        let threads = (0..threads).map(|_| {
            let netns = Netns::open(netns).unwrap();
            let (stop, seen, own) = (Arc::clone(&stop), Arc::clone(&seen), own.clone());
            std::thread::spawn(move || {
                let work = || {
                    while !stop.load(Ordering::Relaxed) {
                        seen.attempts.fetch_add(1, Ordering::Relaxed);
                        // Not longer: what comes after the pod is there has to be tried at once.
                        let stream = TcpStream::connect_timeout(&to, Duration::from_millis(20));
                        let answer = stream.ok().and_then(|mut stream| {
                            stream.set_read_timeout(Some(Duration::from_secs(2))).ok()?;
                            client::ask(&mut stream).ok()
                        });
                        let Some(answer) = answer else {
                            // A refusal comes at once, and the pod needs the processor, too.
                            std::thread::sleep(Duration::from_micros(500));
                            continue;
                        };
                        let count = if answer.proxied { &seen.proxied } else { &seen.direct };
                        count.fetch_add(1, Ordering::Relaxed);
                        seen.lost.fetch_add(usize::from(!own.contains(&answer.peer.ip())), Ordering::Relaxed);
                    }
                };
                netns.run(work).unwrap();
            })
        });
        Self { threads: threads.collect(), stop, seen }
    }

    /// Waits until a count has grown.
    fn wait_for(&self, what: &str, count: fn(&Seen) -> &AtomicUsize) {
        let (before, deadline) = (count(&self.seen).load(Ordering::Relaxed), Instant::now() + LIMIT);
        while count(&self.seen).load(Ordering::Relaxed) == before {
            assert!(Instant::now() < deadline, "no {what} within {LIMIT:?}");
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    fn stop(self) -> Arc<Seen> {
        self.stop.store(true, Ordering::Relaxed);
        self.threads.into_iter().for_each(|thread| thread.join().unwrap());
        self.seen
    }
}

/// Those that dial the pods' one address without a router between.
///
/// The address gets another device with every pod. A neighbour believes in the last one for half a minute, as long
/// as something is tried; nothing would reach the new pod in the moments that count. (Without a second pod on the
/// bridge nobody would notice: a bridge whose last port goes has no carrier, and the kernel forgets its neighbours.)
struct Neighbours([PathBuf; 2]);

impl Neighbours {
    fn of(cluster: &Cluster, client: &Pod) -> Self {
        let neighbours = [(cluster.node.path(), "cni0"), (client.netns(), "eth0")];
        for (netns, device) in &neighbours {
            // A second between two questions is long when pods start in half a second.
            let setting = format!("/proc/sys/net/ipv4/neigh/{device}/retrans_time_ms");
            Netns::open(netns).unwrap().run(|| std::fs::write(setting, "10")).unwrap().unwrap();
        }
        let neighbours = Self(neighbours.map(|(netns, _)| netns));
        neighbours.forget();
        neighbours
    }

    fn forget(&self) {
        for netns in &self.0 {
            sh(&format!("nsenter --net={} ip neigh flush to 10.134.0.0/24", netns.display())).unwrap();
        }
    }
}

/// A client hammers the address of a pod while the pod starts: network, application, proxy, in the order that
/// is worst. Not one of its connections reaches an application directly, in any of 50 starts.
#[test]
fn no_connection_reaches_an_application_before_its_proxy() {
    let range = format!(r#", "rangeStart": "{CLIENT}", "rangeEnd": "{ADDRESS}""#);
    let cluster = Cluster::with_conflist(&conflist(&range, ""));
    for name in [PEER, ENVOY] {
        cluster.containerd.provide(name).unwrap();
    }
    let containers = sidecar_containers(cluster.world.directory());
    let [application, envoy] = &containers;
    let to = SocketAddr::new(ADDRESS.parse().unwrap(), 8000);
    let hammer = Hammer::start(&cluster.other_node, to, 4);
    let client = cluster.containerd.run_pod(PodSpec::new("client")).unwrap();
    let own: IpAddr = CLIENT.parse().unwrap();
    assert_eq!(client.socket(srcip_tests::Family::V4, 0).unwrap().ip(), own);

    // Before there is an agent: what reaches an application directly is noticed.
    let pod = cluster.containerd.run_pod(PodSpec::new("before")).unwrap();
    cluster.containerd.start_container(&pod, application).unwrap();
    hammer.wait_for("direct answer", |seen| &seen.direct);
    cluster.containerd.remove_pod(&pod).unwrap();
    assert_eq!(hammer.stop().proxied.load(Ordering::Relaxed), 0);

    let (plugins, networks) = (cluster.containerd.plugins(), cluster.containerd.networks());
    let cni = format!("--cni-conf-dir {} --cni-bin-dir {}", networks.display(), plugins.display());
    let setup = Setup::new(&cluster.world, Source::Manifests).unwrap().with(&cni);
    let mut agent = setup.start().unwrap();
    cluster.containerd.wait_chained("srcip-cni").unwrap();

    let neighbours = Neighbours::of(&cluster, &client);
    // From another node, and from a pod of the same.
    let hammers =
        [Hammer::start(&cluster.other_node, to, 3), Hammer::inside(&client.netns(), vec![own], to, 2)];
    let mut starts = Vec::new();
    for number in 0..STARTS {
        let name = format!("web-{number}");
        let spec = PodSpec::new(&name).annotated("sidecar.istio.io/interceptionMode", "TPROXY");
        let manifest = json!({
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {
                "name": name, "namespace": spec.namespace, "uid": spec.uid, "annotations": spec.annotations,
            },
            "spec": { "nodeName": NODE, "containers": [{ "name": "application" }] },
        });
        // The agent hears of a pod now and then before the runtime starts it, and now and then after.
        if number % 2 == 0 {
            setup.put(&name, &manifest).unwrap();
        }
        let start = Instant::now();
        let pod = cluster.containerd.run_pod(spec).unwrap();
        starts.push(start.elapsed());
        if number % 2 == 1 {
            setup.put(&name, &manifest).unwrap();
        }
        cluster.containerd.start_container(&pod, application).unwrap();
        pod.wait_open(8000).unwrap();
        std::thread::sleep(ALONE);
        cluster.containerd.start_container(&pod, envoy).unwrap();
        hammers.iter().for_each(|hammer| hammer.wait_for("answer through the proxy", |seen| &seen.proxied));
        cluster.containerd.remove_pod(&pod).unwrap();
        setup.put(&name, &json!(null)).unwrap();
        neighbours.forget();
    }
    starts.sort_unstable();
    println!("{STARTS} starts of {:?} (median)", starts[STARTS / 2]);
    for (from, hammer) in ["another node", "the same node"].into_iter().zip(hammers) {
        let seen = hammer.stop();
        let count = |count: &AtomicUsize| count.load(Ordering::Relaxed);
        println!(
            "from {from}: {} attempts, {} answers through the proxy, {} directly",
            count(&seen.attempts),
            count(&seen.proxied),
            count(&seen.direct)
        );
        assert_eq!((count(&seen.direct), count(&seen.lost)), (0, 0), "{from}");
        assert!(count(&seen.proxied) >= STARTS, "{from}");
    }
    cluster.containerd.remove_pod(&client).unwrap();

    // Of pods that are gone nothing stays attached.
    agent
        .wait("all pods are gone", |agent| {
            agent.status().is_ok_and(|status| status["attachments"].as_array().is_some_and(Vec::is_empty))
        })
        .unwrap();
    agent.stop().unwrap();
}

//! A Kubernetes API server for tests, on loopback: as much of the protocol as the agent and `kubectl get`
//! need, and every way in which it can fail.
//!
//! - [`store`]: objects, their versions, lists in pages, what a watch can still be told.
//! - `serve`: connections. `answer`: requests. `watch`: watches.
//! - [`faults`]: what goes wrong on purpose.
//! - `discovery`, `table`: what kubectl asks beyond that.
//! - `event`: what an Event has to be like.
//!
//! Versions are numbers that count changes; pods may be anything that has a name.

mod answer;
mod discovery;
mod event;
pub mod faults;
mod serve;
pub mod store;
mod table;
mod watch;

use std::{
    collections::BTreeMap,
    fs,
    net::{SocketAddr, TcpStream},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use serde_json::{Value, json};
use tokio::sync::watch as channel;

use crate::PATIENCE;
pub use faults::Faults;
use store::{Resource, Store};

/// Requests that are remembered.
const MAX_REQUESTS: usize = 10_000;

/// The token of the kubeconfig.
const TOKEN: &str = "srcip-tests";

/// A request that has come.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Asked {
    /// As RBAC has it: `get`, `list`, `watch`, `create`; `discover` for what is not about objects.
    pub verb: &'static str,
    /// As RBAC has it: `pods`, `events.events.k8s.io`; the path for what is not about objects.
    pub resource: String,
    /// The namespace, if it was in one.
    pub namespace: Option<String>,
    /// The object, if it was about one.
    pub name: Option<String>,
    /// Whether it came with the token of the kubeconfig. kubectl does not send one without TLS.
    pub token: bool,
    /// What came after the `?`.
    pub query: BTreeMap<String, String>,
}

/// What its threads and its tests have in common.
struct Shared {
    store: Mutex<Store>,
    asked: Mutex<Vec<Asked>>,
    faults: channel::Sender<Faults>,
    /// Counts changes of the store.
    changes: channel::Sender<u64>,
    /// Counts how often all connections were cut.
    cuts: channel::Sender<u64>,
}

impl Shared {
    fn store(&self) -> MutexGuard<'_, Store> {
        self.store.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn faults(&self) -> Faults {
        self.faults.borrow().clone()
    }

    /// Changes the store, and wakes the watches.
    fn change<T>(&self, change: impl FnOnce(&mut Store) -> T) -> T {
        let result = change(&mut self.store());
        self.changes.send_modify(|count| *count += 1);
        result
    }

    fn remember(&self, asked: Asked) {
        let mut all = self.asked.lock().unwrap_or_else(PoisonError::into_inner);
        if all.len() < MAX_REQUESTS {
            all.push(asked);
        }
    }
}

/// The server; ends when dropped.
pub struct ApiServer {
    address: SocketAddr,
    shared: Arc<Shared>,
    stop: Option<channel::Sender<()>>,
    thread: Option<thread::JoinHandle<()>>,
}

impl ApiServer {
    /// Starts it, on a free port of 127.0.0.1.
    pub fn start() -> Result<Self> {
        let shared = Arc::new(Shared {
            store: Mutex::default(),
            asked: Mutex::default(),
            faults: channel::Sender::default(),
            changes: channel::Sender::default(),
            cuts: channel::Sender::default(),
        });
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let door = serve::Door::open()?;
        let address = door.address();
        let (stop, stopped) = channel::channel(());
        let serving = Arc::clone(&shared);
        let thread = thread::Builder::new().name("apiserver".to_owned()).spawn(move || {
            runtime.block_on(serve::run(door, serving, stopped));
            // Watches that are still told something end here.
            runtime.shutdown_background();
        })?;
        Ok(Self { address, shared, stop: Some(stop), thread: Some(thread) })
    }

    /// Makes a pod, or changes it. Returns its version.
    pub fn put_pod(&self, pod: Value) -> u64 {
        self.put(Resource::Pods, pod)
    }

    /// Makes an object of any kind, or changes it. Returns its version.
    pub fn put(&self, resource: Resource, object: Value) -> u64 {
        self.shared.change(|store| store.put(resource, object))
    }

    /// Removes an object, if it is there.
    pub fn delete(&self, resource: Resource, namespace: &str, name: &str) {
        self.shared.change(|store| store.delete(resource, namespace, name));
    }

    /// Removes a pod, if it is there.
    pub fn delete_pod(&self, namespace: &str, name: &str) {
        self.delete(Resource::Pods, namespace, name);
    }

    /// The Events that were made, in their order.
    pub fn events(&self) -> Vec<Value> {
        let mut events = self.shared.store().all(Resource::Events);
        events.sort_by_key(|event| store::version_of(event));
        events.iter().map(|event| (**event).clone()).collect()
    }

    /// All requests that have come.
    pub fn requests(&self) -> Vec<Asked> {
        self.shared.asked.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The requests with this verb about this resource.
    pub fn asked(&self, verb: &str, resource: &str) -> Vec<Asked> {
        let mut requests = self.requests();
        requests.retain(|asked| asked.verb == verb && asked.resource == resource);
        requests
    }

    /// Sets what goes wrong from now on; also for watches that have begun.
    pub fn set(&self, faults: Faults) {
        let refuse = faults.refuse;
        self.shared.faults.send_replace(faults);
        // Its thread opens and closes the door.
        let deadline = Instant::now() + PATIENCE;
        while TcpStream::connect(self.address).is_ok() == refuse {
            assert!(Instant::now() < deadline, "the API server of the tests does not react");
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// Cuts all connections, in the midst of what they bring.
    pub fn cut(&self) {
        self.shared.cuts.send_modify(|count| *count += 1);
    }

    /// Forgets what has happened, and lists that are not at their end: who goes on from there is told that
    /// it is gone.
    pub fn expire(&self) {
        self.shared.change(Store::expire);
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Writes a kubeconfig for it into a directory.
    pub fn kubeconfig(&self, directory: &Path) -> Result<PathBuf> {
        let path = directory.join("kubeconfig");
        let config = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "test",
            "clusters": [{"name": "test", "cluster": {"server": format!("http://{}", self.address)}}],
            "users": [{"name": "test", "user": {"token": TOKEN}}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
        });
        fs::write(&path, config.to_string()).with_context(|| path.display().to_string())?;
        Ok(path)
    }
}

impl Drop for ApiServer {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

//! A running `srcip agent`, and pods where the kubelet would have them.

use std::{
    fs,
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    path::{Path, PathBuf},
    process::Command,
    sync::atomic::{AtomicU32, Ordering},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::{Value, json};

use crate::{PATIENCE, process::Process, srcip::Srcip, world::World};

/// The node that the agents of tests are on.
pub const NODE: &str = "node-a";

static NUMBER: AtomicU32 = AtomicU32::new(0);

/// Where an agent learns of pods.
#[derive(Clone, Debug)]
pub enum Source {
    /// From the directory that [`Agent::manifests`] is.
    Manifests,
    /// From an API server.
    Kubeconfig(PathBuf),
}

/// What an agent runs with; it can be started again with the same.
#[derive(Clone, Debug)]
pub struct Setup {
    directory: PathBuf,
    source: Source,
    srcip: Srcip,
    arguments: Vec<String>,
    environment: Vec<(String, String)>,
}

impl Setup {
    /// In a world, with an instance and a directory of its own.
    pub fn new(world: &World, source: Source) -> Result<Self> {
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let directory = world.directory().join(format!("agent{number}"));
        fs::create_dir_all(directory.join("manifests"))?;
        let config = json!({"cgroup": world.cgroup(), "resyncSeconds": 5, "drainSeconds": 10});
        fs::write(directory.join("config.yaml"), config.to_string())?;
        let srcip = world.srcip_instance(&format!("agent{number}"));
        Ok(Self { directory, source, srcip, arguments: Vec::new(), environment: Vec::new() })
    }

    /// Changes the configuration.
    pub fn configure(&self, change: impl FnOnce(&mut Value)) -> Result<()> {
        let path = self.directory.join("config.yaml");
        let mut config: Value = serde_json::from_str(&fs::read_to_string(&path)?)?;
        change(&mut config);
        Ok(fs::write(path, config.to_string())?)
    }

    /// Adds arguments, separated by blanks.
    #[must_use]
    pub fn with(mut self, arguments: &str) -> Self {
        self.arguments.extend(arguments.split_whitespace().map(str::to_owned));
        self
    }

    /// Sets a variable for the agent.
    #[must_use]
    pub fn with_variable(mut self, name: &str, value: &str) -> Self {
        self.environment.retain(|(other, _)| other != name);
        self.environment.push((name.to_owned(), value.to_owned()));
        self
    }

    /// The instance it acts on.
    pub fn srcip(&self) -> &Srcip {
        &self.srcip
    }

    /// Where its files are.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Its socket.
    pub fn socket(&self) -> PathBuf {
        self.directory.join("run/agent.sock")
    }

    /// Writes a manifest, as a whole or not at all; takes it away if it is null.
    pub fn put(&self, name: &str, object: &Value) -> Result<()> {
        let path = self.directory.join("manifests").join(format!("{name}.yaml"));
        if object.is_null() {
            return fs::remove_file(&path).with_context(|| path.display().to_string());
        }
        let new = path.with_extension("new");
        fs::write(&new, object.to_string())?;
        Ok(fs::rename(new, path)?)
    }

    /// The command that runs an agent.
    pub fn command(&self) -> Command {
        let mut command = self.srcip.command("agent");
        command.arg("--config").arg(self.directory.join("config.yaml"));
        command.arg("--socket").arg(self.socket()).args(["--node-name", NODE]);
        match &self.source {
            Source::Manifests => command.arg("--manifests").arg(self.directory.join("manifests")),
            Source::Kubeconfig(path) => command.arg("--kubeconfig").arg(path),
        };
        for page in ["health", "metrics", "config"] {
            command.args([format!("--{page}-address"), "127.0.0.1:0".to_owned()]);
        }
        command.args(&self.arguments).envs(self.environment.iter().map(|(name, value)| (name, value)));
        command
    }

    /// Starts an agent and waits until it runs.
    pub fn start(&self) -> Result<Agent> {
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let log = self.directory.join(format!("agent-{number}.log"));
        let mut process = Process::start("srcip agent", self.command(), &log)?;
        process.wait_until("runs", |process| process.log().contains("running"))?;
        Ok(Agent { setup: self.clone(), process })
    }
}

/// A running agent.
#[derive(Debug)]
pub struct Agent {
    /// What it was started with.
    pub setup: Setup,
    /// Its process.
    pub process: Process,
}

impl Agent {
    /// `srcip status -o json`, the agent's words included.
    pub fn status(&self) -> Result<Value> {
        let arguments = format!("status -o json --socket {}", self.setup.socket().display());
        Ok(serde_json::from_str(&self.setup.srcip.run(&arguments)?)?)
    }

    /// The attachment of a pod, if it is attached.
    pub fn attachment(&self, pod: &str) -> Result<Option<Value>> {
        let status = self.status()?;
        let all = status["attachments"].as_array().context("no attachments")?;
        Ok(all.iter().find(|attachment| attachment["name"] == pod).cloned())
    }

    /// Whether a pod is attached, and steers.
    pub fn steers(&self, pod: &str) -> bool {
        self.attachment(pod).ok().flatten().is_some_and(|attachment| attachment["state"] == "attached")
    }

    /// Why a pod is not steered, as reason and note.
    pub fn problem(&self, pod: &str) -> Result<Option<(String, String)>> {
        let status = self.status()?;
        let problems = status["agent"]["problems"].as_array().context("no word of the agent")?;
        let name = |problem: &Value| {
            let part = |key: &str| problem["pod"][key].as_str().unwrap_or_default().to_owned();
            format!("{}/{}", part("namespace"), part("name"))
        };
        let found = problems.iter().find(|problem| name(problem) == pod);
        let text = |problem: &Value, key: &str| problem[key].as_str().unwrap_or_default().to_owned();
        Ok(found.map(|problem| (text(problem, "reason"), text(problem, "note"))))
    }

    /// Waits until something holds.
    pub fn wait(&mut self, what: &str, mut done: impl FnMut(&Self) -> bool) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        while !done(self) {
            ensure!(self.process.is_running(), "the agent has ended without: {what}\n{}", self.process.log());
            ensure!(Instant::now() < deadline, "never: {what}\n{}", self.process.log());
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    /// Waits until a pod is steered.
    pub fn wait_steered(&mut self, pod: &str) -> Result<()> {
        self.wait(&format!("{pod} is steered"), |agent| agent.steers(pod))
    }

    /// Waits until a pod is not attached.
    pub fn wait_gone(&mut self, pod: &str) -> Result<()> {
        self.wait(&format!("{pod} is gone"), |agent| matches!(agent.attachment(pod), Ok(None)))
    }

    /// Gets one of its pages: the status code and the text.
    pub fn get(&self, path: &str) -> Result<(u16, String)> {
        let log = self.process.log();
        let page = path.split('?').next().unwrap_or(path);
        let served = if page == "/livez" { "/readyz" } else { page };
        let find = |line: &str| line.split_once("http://")?.1.strip_suffix(served)?.parse().ok();
        let address: SocketAddr =
            log.lines().find_map(find).with_context(|| format!("{served} is not served:\n{log}"))?;
        get(address, path)
    }

    /// The value of a metric's series.
    pub fn metric(&self, series: &str) -> Result<f64> {
        let (code, page) = self.get("/metrics")?;
        ensure!(code == 200, "{code}: {page}");
        let value = page.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
        value.with_context(|| format!("no series {series}:\n{page}"))?.parse().context("not a number")
    }

    /// Ends it by SIGTERM and waits.
    pub fn stop(mut self) -> Result<String> {
        self.process.signal(nix::sys::signal::Signal::SIGTERM)?;
        let status = self.process.wait(PATIENCE)?;
        if !status.success() {
            bail!("the agent ended with {status}:\n{}", self.process.log());
        }
        Ok(self.process.log())
    }
}

/// Gets a page over HTTP.
pub fn get(address: SocketAddr, path: &str) -> Result<(u16, String)> {
    let mut stream = TcpStream::connect_timeout(&address, PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    write!(stream, "GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n")?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    let (head, body) = text.split_once("\r\n\r\n").context("no end of the head")?;
    let code = head.split(' ').nth(1).context("no status")?.parse()?;
    Ok((code, body.to_owned()))
}

/// A pod's object, bound to [`NODE`].
pub fn pod(namespace: &str, name: &str, uid: &str, annotations: &[(&str, &str)]) -> Value {
    let annotations: serde_json::Map<String, Value> =
        annotations.iter().map(|(key, value)| ((*key).to_owned(), (*value).into())).collect();
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"namespace": namespace, "name": name, "uid": uid, "annotations": annotations},
        "spec": {"nodeName": NODE, "containers": [{"name": "app", "image": "app"}]},
        "status": {"phase": "Running"},
    })
}

/// A UID that no other pod of this machine has.
pub fn uid() -> String {
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    // A container runtime's pods have others (`PodSpec`).
    format!("{:08x}-{number:04x}-4000-9000-000000000000", std::process::id())
}

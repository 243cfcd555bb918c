//! `srcip agent` on every node, fed with manifests; or on one, fed by an API server.

use std::{
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use nix::sys::signal::Signal;

use super::{
    Cluster,
    service::{Service, objects, write_manifests},
};
use crate::{
    PATIENCE,
    apiserver::{ApiServer, store::Resource},
    process::Process,
    srcip::{Srcip, binary},
};

/// The agents of a cluster, one for each node.
#[derive(Debug)]
pub struct Agents {
    manifests: PathBuf,
    options: String,
    /// The object with the programs, if not the one built in.
    object: Option<PathBuf>,
    processes: Vec<Process>,
}

impl Agents {
    /// Starts one on each node, and waits until they have done what the Services want; `options` are further ones.
    pub fn start(cluster: &Cluster, services: &[&Service], options: &str) -> Result<Self> {
        let mut agents = Self::begin(cluster, services, "auto", options)?;
        for process in &mut agents.processes {
            process.wait_until("programs the data plane", |process| changes(process) > 0)?;
        }
        Ok(agents)
    }

    /// The same with another uplink, and without waiting.
    pub fn begin(cluster: &Cluster, services: &[&Service], uplink: &str, options: &str) -> Result<Self> {
        let manifests = cluster.world.directory().join("manifests");
        write_manifests(cluster, services, &manifests)?;
        write_config(cluster)?;
        let options = format!("--uplink {uplink} {options}");
        let mut agents = Self { manifests, options, object: None, processes: Vec::new() };
        for node in &cluster.nodes {
            agents.processes.push(agents.launch(cluster, node.number)?);
        }
        Ok(agents)
    }

    /// The instance on a node.
    pub fn srcip(cluster: &Cluster, node: u8) -> Srcip {
        cluster.world.srcip_instance(&format!("n{node}"))
    }

    /// Where the objects are that they know.
    pub fn manifests(&self) -> &Path {
        &self.manifests
    }

    /// Where the agent of a node is asked.
    pub fn socket(cluster: &Cluster, node: u8) -> PathBuf {
        cluster.world.directory().join(format!("n{node}/agent.sock"))
    }

    fn launch(&self, cluster: &Cluster, number: u8) -> Result<Process> {
        let mut command = command(cluster, number, "--manifests", &self.manifests, &self.options)?;
        if let Some(object) = &self.object {
            command.env("SRCIP_NORTH_SOUTH_OBJECT", object);
        }
        cluster.node(number).host.start("agent", command)
    }

    /// Changes the Services, and waits until all nodes do what they want.
    pub fn update(&mut self, cluster: &Cluster, services: &[&Service]) -> Result<()> {
        let before: Vec<_> = self.processes.iter().map(changes).collect();
        write_manifests(cluster, services, &self.manifests)?;
        for (process, before) in self.processes.iter_mut().zip(before) {
            process.wait_until("programs the change", |process| changes(process) > before)?;
        }
        Ok(())
    }

    /// Changes the Services in a way that leaves nothing to program, and waits until all nodes have said why.
    pub fn update_in_vain(&mut self, cluster: &Cluster, services: &[&Service], why: &str) -> Result<()> {
        write_manifests(cluster, services, &self.manifests)?;
        for process in &mut self.processes {
            process.wait_until("says why", |process| process.log().contains(why))?;
        }
        Ok(())
    }

    /// Kills a node's agent, and starts it again.
    pub fn kill_and_restart(&mut self, cluster: &Cluster, number: u8) -> Result<()> {
        let index = usize::from(number) - 1;
        self.processes[index].kill();
        // The log goes on in the same file.
        let before = changes(&self.processes[index]);
        self.processes[index] = self.launch(cluster, number)?;
        self.processes[index].wait_until("programs again", |process| changes(process) > before)
    }

    /// The agents that are started from now on have these options, among them the uplinks.
    pub fn set_options(&mut self, options: &str) {
        options.clone_into(&mut self.options);
    }

    /// The agents that are started from now on have the programs of this object file.
    pub fn set_object(&mut self, object: Option<PathBuf>) {
        self.object = object;
    }

    /// Kills a node's agent, starts it again, and waits until it logs something.
    pub fn restart_until(&mut self, cluster: &Cluster, number: u8, logged: &str) -> Result<()> {
        let index = usize::from(number) - 1;
        self.processes[index].kill();
        let before = self.log(number).len();
        self.processes[index] = self.launch(cluster, number)?;
        self.processes[index]
            .wait_until(logged, |process| process.log().get(before..).is_some_and(|log| log.contains(logged)))
    }

    /// Waits until a page of a node's agent has this text.
    pub fn wait_for(&self, cluster: &Cluster, number: u8, page: &str, text: &str) -> Result<String> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let shown = self.probe(cluster, number, page).unwrap_or_default();
            if shown.contains(text) {
                return Ok(shown);
            }
            ensure!(Instant::now() < deadline, "no {text:?}: {shown}\n{}", self.log(number));
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Ends a node's agent as its owner would.
    pub fn stop(&mut self, number: u8) -> Result<()> {
        let process = &mut self.processes[usize::from(number) - 1];
        process.signal(Signal::SIGTERM)?;
        process.wait(PATIENCE).map(drop)
    }

    /// What a node's agent says of itself at a page of its health address, and whether that is good.
    pub fn probe(&self, cluster: &Cluster, number: u8, page: &str) -> Result<String> {
        let url = format!("http://127.0.0.1:9878/{page}?verbose");
        cluster.node(number).host.sh(&format!("curl --silent --max-time {} {url}", PATIENCE.as_secs()))
    }

    /// What a node's agent has logged.
    pub fn log(&self, number: u8) -> String {
        self.processes[usize::from(number) - 1].log()
    }
}

/// An API server on a node, and an agent there that asks it.
pub struct OfApi {
    /// The agent.
    pub process: Process,
    /// The API server, which knows the cluster's nodes.
    pub server: ApiServer,
}

impl OfApi {
    /// Starts both on a node, with these objects.
    pub fn start(cluster: &Cluster, number: u8, services: &[&Service]) -> Result<Self> {
        // Its thread is where it was started.
        let server = cluster.node(number).host.netns().run(ApiServer::start)??;
        objects(cluster, services).into_iter().for_each(|object| put(&server, object));
        write_config(cluster)?;
        let config = server.kubeconfig(cluster.world.directory())?;
        let command = command(cluster, number, "--kubeconfig", &config, "--uplink eth0")?;
        let mut process = cluster.node(number).host.start("agent", command)?;
        process.wait_until("programs the data plane", |process| changes(process) > 0)?;
        Ok(Self { process, server })
    }

    /// Changes what an API server knows of a Service.
    pub fn put(&self, service: &Service) {
        service.objects().into_iter().for_each(|object| put(&self.server, object));
    }
}

fn put(server: &ApiServer, object: serde_json::Value) {
    let resource = match object["kind"].as_str() {
        Some("Node") => Resource::Nodes,
        Some("Service") => Resource::Services,
        _ => Resource::EndpointSlices,
    };
    server.put(resource, object);
}

/// Nothing of this may touch the machine's own connections.
fn write_config(cluster: &Cluster) -> Result<()> {
    let config = cluster.world.directory().join("agent.yaml");
    Ok(std::fs::write(config, format!("cgroup: {}\n", cluster.world.cgroup().display()))?)
}

/// A node's agent, which learns of Services at `place`.
fn command(cluster: &Cluster, number: u8, source: &str, place: &Path, options: &str) -> Result<Command> {
    let node = cluster.node(number);
    let mut command = node.host.command(&binary("srcip").display().to_string())?;
    command.args(["agent", "--node-name", &node.name(), source]).arg(place);
    command.arg("--socket").arg(Agents::socket(cluster, number));
    command.arg("--config").arg(cluster.world.directory().join("agent.yaml"));
    command.args(["--health-address", "127.0.0.1:9878", "--metrics-address", "none"]);
    command.args(["--config-address", "none", "--log", "info,srcip_user::northsouth=debug"]);
    command.args(options.split_whitespace());
    command.arg("--pin-path").arg(Agents::srcip(cluster, number).pin_path());
    command.env_remove("SRCIP_PIN_PATH");
    Ok(command)
}

/// How often the data plane was changed.
fn changes(process: &Process) -> usize {
    process.log().matches("the data plane: ").count()
}

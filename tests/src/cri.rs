//! A client of the container runtime interface: what a kubelet asks its runtime for.

pub mod messages;

use std::{cell::RefCell, path::Path, time::Duration};

use anyhow::{Context as _, Result};
use prost::Message;
use tokio::runtime::{self, Runtime};
use tonic::{
    client::Grpc,
    codegen::http::uri::PathAndQuery,
    transport::{Channel, Endpoint},
};
use tonic_prost::ProstCodec;

use crate::PATIENCE;
use messages as m;

/// A connection to a runtime.
#[derive(Debug)]
pub struct Cri {
    runtime: Runtime,
    grpc: RefCell<Grpc<Channel>>,
}

impl Cri {
    /// Connects to the socket at `path`.
    pub fn connect(path: &Path) -> Result<Self> {
        let runtime = runtime::Builder::new_current_thread().enable_all().build()?;
        let endpoint = Endpoint::from_shared(format!("unix:{}", path.display()))?.timeout(PATIENCE);
        let channel = runtime.block_on(endpoint.connect()).with_context(|| path.display().to_string())?;
        Ok(Self { runtime, grpc: RefCell::new(Grpc::new(channel)) })
    }

    fn call<Q, A>(&self, service: &str, method: &str, request: Q) -> Result<A>
    where
        Q: Message + 'static,
        A: Message + Default + 'static,
    {
        let path = PathAndQuery::try_from(format!("/runtime.v1.{service}/{method}"))?;
        let mut grpc = self.grpc.borrow_mut();
        let call = async {
            grpc.ready().await?;
            let codec = ProstCodec::default();
            let answer = grpc.unary(tonic::Request::new(request), path, codec).await;
            answer.map_err(|status| anyhow::anyhow!("{:?}: {}", status.code(), status.message()))
        };
        let answer = self.runtime.block_on(async { tokio::time::timeout(PATIENCE, call).await });
        let answer = answer.context("no answer").flatten();
        Ok(answer.with_context(|| format!("{method} failed"))?.into_inner())
    }

    /// Whether runtime and network are ready; what is not, as an error.
    pub fn ready(&self) -> Result<()> {
        let request = m::StatusRequest { verbose: false };
        let answer: m::StatusResponse = self.call("RuntimeService", "Status", request)?;
        let conditions = answer.status.context("no status")?.conditions;
        let not_yet = conditions.iter().find(|condition| !condition.status);
        not_yet.map_or(Ok(()), |c| anyhow::bail!("not yet: {} ({})", c.r#type, c.message))
    }

    /// The CNI configuration that the runtime goes by now, as JSON.
    pub fn network(&self) -> Result<String> {
        let request = m::StatusRequest { verbose: true };
        let mut answer: m::StatusResponse = self.call("RuntimeService", "Status", request)?;
        answer.info.remove("cniconfig").context("the runtime tells no CNI configuration")
    }

    /// The ID of an image, if the runtime has it.
    pub fn image(&self, name: &str) -> Result<Option<String>> {
        let request = m::ImageStatusRequest { image: Some(m::ImageSpec { image: name.to_owned() }) };
        let answer: m::ImageStatusResponse = self.call("ImageService", "ImageStatus", request)?;
        Ok(answer.image.map(|image| image.id))
    }

    /// Makes a pod: its namespaces, its network. Returns its ID.
    pub fn run_pod(&self, config: m::PodSandboxConfig) -> Result<String> {
        let request = m::RunPodSandboxRequest { config: Some(config) };
        let answer: m::RunPodSandboxResponse = self.call("RuntimeService", "RunPodSandbox", request)?;
        Ok(answer.pod_sandbox_id)
    }

    /// What the runtime knows of a pod.
    pub fn pod_status(&self, id: &str) -> Result<m::PodSandboxStatusResponse> {
        let request = m::PodSandboxStatusRequest { pod_sandbox_id: id.to_owned(), verbose: true };
        self.call("RuntimeService", "PodSandboxStatus", request)
    }

    /// Ends a pod's containers and takes its network away.
    pub fn stop_pod(&self, id: &str) -> Result<()> {
        let request = m::PodSandboxRequest { pod_sandbox_id: id.to_owned() };
        self.call("RuntimeService", "StopPodSandbox", request)
    }

    /// Removes a pod and its containers.
    pub fn remove_pod(&self, id: &str) -> Result<()> {
        let request = m::PodSandboxRequest { pod_sandbox_id: id.to_owned() };
        self.call("RuntimeService", "RemovePodSandbox", request)
    }

    /// Makes a container in a pod. Returns its ID.
    pub fn create_container(
        &self,
        pod: &str,
        sandbox_config: m::PodSandboxConfig,
        config: m::ContainerConfig,
    ) -> Result<String> {
        let request = m::CreateContainerRequest {
            pod_sandbox_id: pod.to_owned(),
            config: Some(config),
            sandbox_config: Some(sandbox_config),
        };
        let answer: m::CreateContainerResponse = self.call("RuntimeService", "CreateContainer", request)?;
        Ok(answer.container_id)
    }

    /// Starts a container that has been made.
    pub fn start_container(&self, id: &str) -> Result<()> {
        let request = m::ContainerRequest { container_id: id.to_owned() };
        self.call("RuntimeService", "StartContainer", request)
    }

    /// What the runtime knows of a container.
    pub fn container_status(&self, id: &str) -> Result<m::ContainerStatusResponse> {
        let request = m::ContainerStatusRequest { container_id: id.to_owned(), verbose: true };
        self.call("RuntimeService", "ContainerStatus", request)
    }

    /// Sends a container its stop signal, and SIGKILL after `grace`.
    pub fn stop_container(&self, id: &str, grace: Duration) -> Result<()> {
        let timeout = grace.as_secs().try_into()?;
        let request = m::StopContainerRequest { container_id: id.to_owned(), timeout };
        self.call("RuntimeService", "StopContainer", request)
    }

    /// Removes a container that has ended.
    pub fn remove_container(&self, id: &str) -> Result<()> {
        let request = m::ContainerRequest { container_id: id.to_owned() };
        self.call("RuntimeService", "RemoveContainer", request)
    }
}

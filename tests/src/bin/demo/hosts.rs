//! A client, a node and a pod with an application, made of network namespaces.

use anyhow::Result;
use srcip_tests::{
    Family,
    host::Host,
    peer::{self, APPLICATION_PORT},
    process::Process,
    proxy::PROXY_PORT,
    world::World,
};

use crate::{
    screen::Screen,
    sidecar::{Choice, Sidecar},
};

/// The hosts. Dropped in this order: the world, which removes them all, comes last.
#[derive(Debug)]
pub struct Hosts {
    /// The application in the pod.
    pub application: Process,
    /// The client.
    pub client: Host,
    /// The pod.
    pub pod: Host,
    /// All of them.
    pub world: World,
}

impl Hosts {
    /// Adds a client and a pod to a world with a node, and starts the application.
    pub fn create(mut world: World) -> Result<Self> {
        let client = world.host("sleep")?;
        let pod = world.host("httpbin")?;
        let application = peer::application(&pod, &[&format!("[::]:{APPLICATION_PORT}")])?;
        Ok(Self { application, client, pod, world })
    }

    /// A picture of them.
    pub fn draw(&self, screen: Screen, sidecar: Sidecar, choice: Choice) -> Result<()> {
        match (sidecar, choice) {
            (Sidecar::Haproxy, Choice::Auto) => screen.show(format_args!(
                "There is no Envoy here (`cargo xtask setup` installs it): HAProxy stands in for it."
            ))?,
            (Sidecar::Haproxy, _) => screen.show(format_args!("HAProxy stands in for Envoy."))?,
            (Sidecar::Envoy, _) => {}
        }
        let [client_v4, client_v6] = Family::BOTH.map(|family| self.client.address(family).to_string());
        let [pod_v4, pod_v6] = Family::BOTH.map(|family| self.pod.address(family).to_string());
        let sidecar = sidecar.name();
        // Padded before it is coloured.
        let client_v4 = screen.good(&format!("{client_v4:<14}"));
        let client_v6 = screen.good(&format!("{client_v6:<14}"));
        let node = self.world.node().name();
        let lines = [
            String::new(),
            format!("  {:<30}{:<20}{}", "client: sleep", "node", "pod: httpbin"),
            "  ┌────────────────┐          ┌───────┐           ┌────────────────────────────┐".to_owned(),
            format!("  │ {client_v4} │          │       │           │ {pod_v4:<26} │"),
            format!("  │ {client_v6} ├──────────┤  br0  ├───────────┤ {pod_v6:<26} │"),
            format!(
                "  └────────────────┘          └───────┘           │  {:<26}│",
                format!("{sidecar} on port {PROXY_PORT}")
            ),
            format!("  {:<48}│  {:<26}│", "", format!("application on port {APPLICATION_PORT}")),
            format!("  {:<48}└────────────────────────────┘", ""),
            format!("  network namespaces: {}, {node}, {}", self.client.name(), self.pod.name()),
            String::new(),
        ];
        lines.iter().try_for_each(|line| Ok(screen.show(format_args!("{line}"))?))
    }
}

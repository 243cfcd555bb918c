//! Puts the parts together: a thread that programs, a task that answers load balancers.

use std::{collections::BTreeMap, io, net::IpAddr, sync::Arc, thread};

use anyhow::{Context as _, Result, anyhow, ensure};
use tokio::{
    sync::{oneshot, watch},
    task::JoinHandle,
};

use super::{
    controller::{Board, Controller, Node, Standing},
    desired::ReturnPath,
    health_check::{self, Blocked, Checks},
    model::Here,
    objects::{ObjectName, Objects},
};
use crate::{agent::pod::PodUid, routing};

/// In place of a device: those that the default routes lead to.
pub const AUTO: &str = "auto";

impl Here {
    /// This node, with these uplinks, by their names, or [`AUTO`] for those of the default routes; in the calling thread's network namespace. What it has
    /// on the uplinks counts as its own, whether or not its Node object is known.
    pub fn find(node: &str, uplinks: &[String], return_path: ReturnPath) -> Result<Self> {
        let devices = routing::devices()?;
        let find = |name: &String| {
            let device = devices.iter().find(|device| device.name == *name).cloned();
            device.with_context(|| {
                let names: Vec<_> = devices.iter().map(|device| device.name.as_str()).collect();
                format!("there is no device {name} to be an uplink; there are {}", names.join(", "))
            })
        };
        let uplinks = if uplinks.iter().any(|name| name == AUTO) {
            let default = routing::default_devices()?;
            devices.iter().filter(|device| default.contains(&device.index)).cloned().collect()
        } else {
            uplinks.iter().map(find).collect::<Result<Vec<_>>>()?
        };
        ensure!(
            !uplinks.is_empty(),
            "this node has no default route, so nobody can tell by which device traffic enters: name it with --uplink"
        );
        let mut addresses = Vec::new();
        for device in &uplinks {
            let on_device = routing::addresses_of(device)?;
            addresses.extend(on_device.into_iter().filter(|address| !is_link_local(*address)));
        }
        Ok(Self { node: node.into(), addresses, uplinks, return_path })
    }
}

/// Whether an address means a host only to those on its link.
fn is_link_local(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => v4.is_link_local(),
        IpAddr::V6(v6) => v6.is_unicast_link_local(),
    }
}

/// How north-south stands, for those who ask.
#[derive(Clone, Debug)]
pub struct View {
    board: Board,
    blocked: Blocked,
    objects: watch::Receiver<Arc<Objects>>,
}

impl View {
    /// How it stands now.
    pub fn standing(&self) -> Standing {
        self.board.standing()
    }

    /// What tells a Service from a later one of its name, if it is known.
    pub fn uid(&self, service: &ObjectName) -> Option<PodUid> {
        self.objects.borrow().uid(service).cloned()
    }

    /// Health check ports that cannot be listened on, and why.
    pub fn blocked_health_checks(&self) -> BTreeMap<u16, String> {
        self.blocked.all()
    }
}

/// North-south as it runs. What is programmed outlives it.
#[derive(Debug)]
pub struct NorthSouth {
    view: View,
    answering: JoinHandle<()>,
    stop: oneshot::Sender<()>,
    controller: thread::JoinHandle<io::Result<()>>,
}

impl NorthSouth {
    /// Begins to do what the objects want. Inside a tokio runtime, in the node's network namespace.
    pub fn start<N>(node: N, objects: watch::Receiver<Arc<Objects>>) -> io::Result<Self>
    where
        N: Node<Programmer: Send> + Send + 'static,
    {
        let (stop, stopped) = oneshot::channel();
        let (checks, wanted) = watch::channel(Checks::default());
        let (board, blocked) = (Board::default(), Blocked::default());
        let view = View { board: board.clone(), blocked: blocked.clone(), objects: objects.clone() };
        let controller = Controller::new(node, checks, board);
        let thread = thread::Builder::new().name("srcip-ns".to_owned());
        let controller = thread.spawn(move || controller.run(objects, stopped))?;
        let answering = tokio::spawn(health_check::serve(wanted, blocked));
        Ok(Self { view, answering, stop, controller })
    }

    /// How it stands, now and from now on.
    pub fn view(&self) -> View {
        self.view.clone()
    }

    /// Ends it, once what is being programmed is. What is programmed stays.
    pub fn end(self) -> Result<()> {
        self.answering.abort();
        drop(self.stop);
        let ended = self.controller.join();
        ended.map_err(|_| anyhow!("it panicked"))?.context("it could not wait")
    }
}

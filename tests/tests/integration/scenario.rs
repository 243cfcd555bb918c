//! What most tests start from: a client, and a pod with an application, a proxy and srcip.

use srcip_tests::{
    Family, client,
    client::Seen,
    host::Host,
    peer,
    process::Process,
    proxy::{Kind, Proxy},
    srcip::Srcip,
    wait_until,
    world::World,
};
use srcip_user::sockets::TcpSocket;

/// The engine a test asks for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Engine {
    SkLookup,
    Tc,
}

impl Engine {
    pub fn option(self) -> &'static str {
        match self {
            Self::SkLookup => "--engine sk-lookup",
            Self::Tc => "--engine tc",
        }
    }
}

pub const PORT: u16 = peer::APPLICATION_PORT;

pub struct Scenario {
    pub proxy: Option<Proxy>,
    pub application: Option<Process>,
    pub client: Host,
    pub pod: Host,
    pub srcip: Srcip,
    pub engine: Engine,
    /// Last, so that it goes last.
    pub world: World,
}

impl Drop for Scenario {
    fn drop(&mut self) {
        // While the processes still run: the world's own drop comes after theirs.
        if std::thread::panicking() {
            self.world.diagnose();
        }
    }
}

impl Scenario {
    /// A client and an empty pod.
    pub fn empty(engine: Engine) -> Self {
        let mut world = World::new().unwrap();
        let client = world.host("client").unwrap();
        let pod = world.host("pod").unwrap();
        let srcip = world.srcip();
        Self { proxy: None, application: None, client, pod, srcip, engine, world }
    }

    /// With an HTTP application and a proxy that is there before srcip attaches.
    pub fn http(engine: Engine, kind: Kind) -> Self {
        let mut scenario = Self::empty(engine);
        scenario.application = Some(peer::application(&scenario.pod, &["[::]:8000"]).unwrap());
        scenario.proxy = Some(Proxy::start(&scenario.pod, kind).unwrap());
        scenario.attach("");
        scenario
    }

    /// The same with a TCP application.
    pub fn tcp(engine: Engine, kind: Kind) -> Self {
        let mut scenario = Self::empty(engine);
        scenario.application = Some(peer::echo(&scenario.pod, &["[::]:8000"]).unwrap());
        scenario.proxy = Some(Proxy::start(&scenario.pod, kind).unwrap());
        scenario.attach("");
        scenario
    }

    pub fn attach(&self, options: &str) -> String {
        self.srcip.attach(&self.pod, &format!("{} {options}", self.engine.option())).unwrap()
    }

    /// Asks the application once, on its usual port.
    pub fn ask(&self, family: Family) -> Seen {
        self.ask_port(family, PORT)
    }

    pub fn ask_port(&self, family: Family, port: u16) -> Seen {
        client::ask_once(&self.client, self.pod.socket(family, port))
            .unwrap_or_else(|error| panic!("{family:?} port {port}: {error:#}"))
    }

    /// The application saw the client's address, through the proxy.
    pub fn assert_kept(&self, family: Family) {
        let seen = self.ask(family);
        assert_eq!(seen.peer.ip(), self.client.address(family));
        assert_eq!(seen.local, self.pod.socket(family, PORT));
        assert!(seen.proxied, "{family:?}: {seen:?}");
    }

    /// The application was reached directly.
    pub fn assert_direct(&self, family: Family) {
        let seen = self.ask(family);
        assert_eq!(seen.peer.ip(), self.client.address(family));
        assert!(!seen.proxied, "{family:?}: {seen:?}");
    }

    /// Another HTTP application, once the proxy has taken note of the end of the one before: the proxy has no
    /// connection to it yet.
    pub fn restart_application(&mut self) {
        self.application = None;
        let upstream = |socket: &TcpSocket| socket.is_connection() && socket.remote.port() == PORT;
        wait_until("the proxy has no connection to an application that is gone", || {
            !self.pod.tcp_sockets().unwrap().iter().any(upstream)
        });
        self.application = Some(peer::application(&self.pod, &["[::]:8000"]).unwrap());
    }

    /// Waits until the proxy's port has this many listeners.
    pub fn wait_for_listeners(&self, count: usize) {
        wait_until(&format!("there are {count} listeners"), || {
            let sockets = self.pod.tcp_sockets().unwrap();
            sockets.iter().filter(|s| s.is_listener() && s.local.port() == 15006).count() == count
        });
    }

    pub fn counter(&self, name: &str) -> u64 {
        self.srcip.counter(&self.pod, name).unwrap()
    }
}

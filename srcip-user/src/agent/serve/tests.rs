//! Tests over loopback.

use std::time::Duration;

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

use super::*;

struct Agent {
    health: Arc<Health>,
    addresses: [SocketAddr; 3],
}

impl Agent {
    /// With ports of the kernel's choice.
    fn start(patience: Duration) -> Self {
        let any: Address = "127.0.0.1:0".parse().unwrap();
        let servers = Servers::bind(&Addresses { health: any, metrics: any, config: any }).unwrap();
        let addresses = [&servers.health, &servers.metrics, &servers.config]
            .map(|server| server.as_ref().unwrap().address().unwrap());
        let health = Arc::new(Health::new(patience));
        let directory = tempfile::tempdir().unwrap();
        tokio::spawn(servers.run(Shown {
            health: Arc::clone(&health),
            metrics: Arc::new(AgentMetrics::new(10)),
            config: Arc::default(),
            log: Arc::new(LogControl::for_test("info")),
            dataplane: Dataplane::new(directory.path().join("none")),
        }));
        Self { health, addresses }
    }

    async fn ask(&self, server: usize, request: &str) -> (u16, String) {
        let mut stream = TcpStream::connect(self.addresses[server]).await.unwrap();
        stream.write_all(format!("{request} HTTP/1.1\r\nhost: a\r\n\r\n").as_bytes()).await.unwrap();
        let mut answer = String::new();
        let reading = stream.read_to_string(&mut answer);
        tokio::time::timeout(Duration::from_secs(60), reading).await.unwrap().unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        (head[9..12].parse().unwrap(), body.to_owned())
    }
}

fn block_on<F: Future>(future: F) -> F::Output {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(future)
}

#[test]
fn each_kind_of_page_has_its_address() {
    block_on(async {
        let agent = Agent::start(Duration::from_secs(60));
        let (status, page) = agent.ask(1, "GET /metrics").await;
        assert!(status == 200 && page.contains("srcip_agent_pods"), "{status} {page}");
        let (status, page) = agent.ask(2, "GET /config").await;
        let shown: serde_json::Value = serde_json::from_str(&page).unwrap();
        assert_eq!(
            (status, &shown["log"], &shown["config"]["drainSeconds"]),
            (200, &json!("info"), &json!(30))
        );
        for (server, path) in
            [(0, "/metrics"), (0, "/config"), (1, "/config"), (1, "/livez"), (2, "/metrics")]
        {
            assert_eq!(agent.ask(server, &format!("GET {path}")).await.0, 404, "{server} {path}");
        }
        for server in 0..3 {
            assert_eq!(agent.ask(server, "POST /config").await.0, 405);
        }
        assert_eq!(agent.ask(2, "HEAD /config").await, (200, String::new()));
    });
}

#[test]
fn probes_tell_what_is_wrong() {
    block_on(async {
        let agent = Agent::start(Duration::from_secs(60));
        agent.health.beat("waiting");
        assert_eq!(agent.ask(0, "GET /livez").await, (200, "ok".to_owned()));
        let (status, text) = agent.ask(0, "GET /readyz").await;
        assert!(status == 503 && text.contains("[-]synced failed"), "{status} {text}");
        agent.health.set_synced(true);
        agent.health.beat("waiting");
        let (status, text) = agent.ask(0, "GET /readyz?verbose").await;
        assert!(status == 200 && text.contains("[+]attached ok"), "{status} {text}");
        agent.health.age(Duration::from_secs(90));
        let (status, text) = agent.ask(0, "GET /livez").await;
        assert!(status == 503 && text.contains("has been at waiting"), "{status} {text}");
    });
}

#[test]
fn an_address_that_is_taken_is_named_with_its_option() {
    block_on(async {
        let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let none = Address(None);
        let health = Address(Some(taken.local_addr().unwrap()));
        let error = Servers::bind(&Addresses { health, metrics: none, config: none }).unwrap_err();
        let error = format!("{error:#}");
        assert!(error.contains("--health-address") && error.contains("in use"), "{error}");
        let silent = Servers::bind(&Addresses { health: none, metrics: none, config: none }).unwrap();
        assert!(silent.urls().unwrap().is_empty());
    });
}

use std::net::{IpAddr, TcpListener};

use serde_json::json;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    time::{sleep, timeout},
};

use super::*;
use crate::northsouth::objects::ObjectName;

fn check(local_endpoints: usize) -> HealthCheck {
    HealthCheck { service: ObjectName::new("shop", "web").unwrap(), local_endpoints }
}

/// A port that nobody has; for a moment at least.
fn free_port() -> u16 {
    TcpListener::bind("[::]:0").unwrap().local_addr().unwrap().port()
}

/// Asks on loopback; status, head and body, or nothing if nobody listens.
async fn ask(ip: IpAddr, port: u16) -> Option<(u16, String, String)> {
    let mut stream = TcpStream::connect((ip, port)).await.ok()?;
    stream.write_all(b"GET /anything HTTP/1.1\r\nHost: node\r\n\r\n").await.ok()?;
    let mut text = String::new();
    timeout(Duration::from_secs(60), stream.read_to_string(&mut text)).await.ok()?.ok()?;
    let (head, body) = text.split_once("\r\n\r\n")?;
    let status = head.split_whitespace().nth(1)?.parse().ok()?;
    Some((status, head.to_lowercase(), body.to_owned()))
}

/// Asks until the answer has this status, 0 for none.
async fn wait_for(port: u16, status: u16) {
    for _ in 0..6000 {
        if ask(Ipv4Addr::LOCALHOST.into(), port).await.map_or(0, |(status, ..)| status) == status {
            return;
        }
        sleep(Duration::from_millis(10)).await;
    }
    panic!("port {port} never answers {status}");
}

#[test]
fn the_answer_is_kube_proxys_to_the_byte() {
    let yes = answer(&State { check: check(2), healthy: true });
    assert_eq!(yes.status, StatusCode::OK);
    assert_eq!(
        yes.body,
        "{\n\t\"service\": {\n\t\t\"namespace\": \"shop\",\n\t\t\"name\": \"web\"\n\t},\n\
         \t\"localEndpoints\": 2,\n\t\"serviceProxyHealthy\": true\n}"
    );
    assert_eq!(yes.kind, "application/json");
    let no = answer(&State { check: check(0), healthy: true });
    assert_eq!(no.status, StatusCode::SERVICE_UNAVAILABLE);
    let unhealthy = answer(&State { check: check(2), healthy: false });
    assert_eq!(unhealthy.status, StatusCode::SERVICE_UNAVAILABLE);
    let body: Value = serde_json::from_str(&unhealthy.body).unwrap();
    assert_eq!((&body["localEndpoints"], &body["serviceProxyHealthy"]), (&json!(2), &json!(false)));
}

#[tokio::test]
async fn servers_come_change_and_go_with_the_services() {
    let port = free_port();
    let (sender, receiver) = watch::channel(Checks::default());
    let serving = tokio::spawn(serve(receiver, Blocked::default()));
    let set = |count| {
        sender.send_replace(Checks { ports: BTreeMap::from([(port, check(count))]), healthy: true });
    };
    set(3);
    wait_for(port, 200).await;
    for loopback in [Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()] {
        let (_, head, body) = ask(loopback, port).await.unwrap();
        for header in [
            "content-type: application/json",
            "x-content-type-options: nosniff",
            "x-load-balancing-endpoint-weight: 3",
        ] {
            assert!(head.lines().any(|line| line == header), "no {header} in {head}");
        }
        assert!(body.contains("\"localEndpoints\": 3"), "{body}");
    }
    set(0);
    wait_for(port, 503).await;
    sender.send_modify(|checks| checks.ports.clear());
    wait_for(port, 0).await;
    drop(sender);
    timeout(Duration::from_secs(60), serving).await.unwrap().unwrap();
}

/// kube-proxy has the port, and gives it back.
#[tokio::test]
async fn a_port_that_another_program_has_is_told_and_tried_again() {
    let other = TcpListener::bind("[::]:0").unwrap();
    let (port, free) = (other.local_addr().unwrap().port(), free_port());
    let blocked = Blocked::default();
    let wanted = Checks { ports: BTreeMap::from([(port, check(1)), (free, check(1))]), healthy: true };
    let mut servers = BTreeMap::new();
    update(&mut servers, &wanted, &blocked);
    assert_eq!(servers.keys().collect::<Vec<_>>(), [&free], "the other one works");
    let told = blocked.all();
    assert!(told[&port].contains(&format!("healthCheckNodePort {port} of shop/web")), "{told:?}");
    drop(other);
    update(&mut servers, &wanted, &blocked);
    assert_eq!(servers.len(), 2);
    assert!(blocked.all().is_empty());
}

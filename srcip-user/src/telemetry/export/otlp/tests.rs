//! Tests of endpoints and attributes; that a collector gets them is tested with one.

use super::{super::metrics::tests::closed, *};
use crate::telemetry::record::{DownstreamLocal, DownstreamRemote, Origin, UpstreamHost, UpstreamLocal};

#[test]
fn endpoints() {
    for (text, to) in [
        ("http://127.0.0.1:4318", "http://127.0.0.1:4318/v1/logs"),
        ("http://collector:4318/", "http://collector:4318/v1/logs"),
        ("http://[::1]:4318/otlp/v1/logs", "http://[::1]:4318/otlp/v1/logs"),
    ] {
        assert_eq!(text.parse(), Ok(Endpoint(to.to_owned())), "{text}");
    }
    let says = |text: &str, hint: &str| {
        let error = text.parse::<Endpoint>().unwrap_err();
        assert!(error.contains(hint), "{text}: {error}");
    };
    says("https://collector:4318", "https is not spoken here");
    says("collector:4318", "did you mean http://collector:4318?");
    says("", "expected http://HOST:4318");
    says("http://", "expected http://HOST:4318");
}

#[test]
fn the_client_is_the_origin_and_the_peer_is_the_sockets() {
    let address = |text: &str| text.parse::<SocketAddr>().unwrap();
    let mut record = closed("pod", Leg::Upstream, Some(false));
    record.origin = Some(Origin(address("10.0.0.1:40000")));
    record.downstream_remote_address = Some(DownstreamRemote(address("10.0.0.1:40000")));
    record.downstream_local_address = Some(DownstreamLocal(address("10.0.0.2:8000")));
    record.upstream_local_address = Some(UpstreamLocal(address("127.0.0.6:5")));
    record.upstream_host = Some(UpstreamHost(address("10.0.0.2:8080")));
    let all = attributes(&record);
    let get = |name: &str| all.iter().find(|(key, _)| *key == name).map(|(_, value)| value.clone());
    for (name, value) in [
        ("client.address", "10.0.0.1".into()),
        ("client.port", AnyValue::Int(40_000)),
        ("server.address", "10.0.0.2".into()),
        ("server.port", AnyValue::Int(8000)),
        ("network.local.address", "127.0.0.6".into()),
        ("network.peer.port", AnyValue::Int(8080)),
        ("network.transport", "tcp".into()),
        ("network.type", "ipv4".into()),
        ("srcip.upstream_local_address", "127.0.0.6:5".into()),
        ("srcip.preserved", AnyValue::Boolean(false)),
        ("srcip.duration", AnyValue::Double(1.5)),
        ("srcip.closed_by", "local".into()),
    ] {
        assert_eq!(get(name), Some(value), "{name}");
    }
    assert_eq!(get("srcip.join"), None, "unknown is left out");
    let names: std::collections::BTreeSet<_> = all.iter().map(|(name, _)| name).collect();
    assert_eq!(names.len(), all.len(), "each once");
}

/// A collector that nobody runs: nothing waits, and all of it is accounted for.
#[test]
fn a_collector_that_is_down_slows_nothing() {
    let metrics = Arc::new(Metrics::new(1));
    // The port of a listener that has gone.
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let otlp = Otlp::start(&format!("http://127.0.0.1:{port}").parse().unwrap(), &metrics).unwrap();
    let count = QUEUE as u64 + 5000;
    // Had they to wait, none would be dropped.
    for _ in 0..count {
        otlp.export(&closed("pod", Leg::Direct, Some(true)));
    }
    let waiting = Arc::clone(&otlp.waiting);
    otlp.finish();
    let page = metrics.encode(false).unwrap();
    let value = |result: &str| -> u64 {
        let name = format!("srcip_otlp_records_total{{result=\"{result}\"}} ");
        page.lines().find_map(|line| line.strip_prefix(&name)).unwrap().parse().unwrap()
    };
    assert_eq!(value("exported"), 0);
    assert!(value("dropped") > 0, "{page}");
    let accounted = value("failed") + value("dropped") + waiting.load(Ordering::Relaxed);
    assert_eq!(accounted, count, "{page}");
}

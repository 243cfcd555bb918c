//! The real kubectl, and the API server of these tests: what the agent is tested with is no world of its own.

use srcip_tests::{kubectl::ask, scratch::Scratch};

use super::*;

/// A server with two pods, one of which srcip has something to say about, and its kubeconfig.
fn server() -> (ApiServer, Scratch, PathBuf) {
    let scratch = Scratch::new().unwrap();
    let server = ApiServer::start().unwrap();
    server.put_pod(pod("web-0"));
    server.put_pod(pod_with("db-0", "/metadata/namespace", "other"));
    let config = server.kubeconfig(scratch.path()).unwrap();
    let background = Background::start();
    background.wait(async {
        let source = kube_of(&server, &scratch, Counter::default()).await;
        let bad = PodInfo::from_object(&serde_json::from_value(pod("web-0")).unwrap()).unwrap();
        source.warn(&bad, "InvalidAnnotation", "srcip.io/proxy-port is no port");
        let deadline = Instant::now() + SOON;
        while server.events().is_empty() {
            assert!(Instant::now() < deadline, "no Event");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    });
    (server, scratch, config)
}

/// The words of each line.
fn words(text: &str) -> Vec<Vec<&str>> {
    text.lines().map(|line| line.split_whitespace().collect()).collect()
}

#[test]
fn kubectl_shows_pods() {
    let (_server, _scratch, config) = server();
    let table = ask(&config, "get pods -A").unwrap();
    assert_eq!(
        words(&table),
        [
            vec!["NAMESPACE", "NAME", "READY", "STATUS", "RESTARTS"],
            vec!["default", "web-0", "0/1", "Running", "0"],
            vec!["other", "db-0", "0/1", "Running", "0"],
        ]
    );
    let wide = ask(&config, "get pods -o wide").unwrap();
    assert_eq!(words(&wide)[1], ["web-0", "0/1", "Running", "0", "10.0.0.9", NODE]);

    let json: Value = serde_json::from_str(&ask(&config, "get pod web-0 -o json").unwrap()).unwrap();
    assert_eq!((&json["kind"], &json["metadata"]["uid"]), (&json!("Pod"), &json!("uid-web-0")));
    let names =
        ask(&config, "get pods -A --field-selector spec.nodeName=node-1 -o name --chunk-size 1").unwrap();
    assert_eq!(names, "pod/web-0\npod/db-0\n");
    assert_eq!(ask(&config, "get pods -A --field-selector spec.nodeName=node-2 -o name").unwrap(), "");
    let error = ask(&config, "get pod nobody").unwrap_err().to_string();
    assert!(error.contains(r#"pods "nobody" not found"#), "{error}");
}

#[test]
fn kubectl_shows_the_event_where_people_look_for_it() {
    let (_server, _scratch, config) = server();
    let events = ask(&config, "get events").unwrap();
    assert_eq!(words(&events)[0], ["TYPE", "REASON", "OBJECT", "MESSAGE"]);
    assert!(words(&events)[1].starts_with(&["Warning", "InvalidAnnotation", "pod/web-0"]), "{events}");

    let described = ask(&config, "describe pod web-0").unwrap();
    let last = described.lines().last().unwrap();
    assert!(
        last.contains("InvalidAnnotation") && last.contains("srcip.io/proxy-port is no port"),
        "{described}"
    );
    assert!(last.split_whitespace().any(|word| word == "srcip" || word.starts_with("srcip,")), "{described}");
}

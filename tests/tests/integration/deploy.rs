//! What is deployed on clusters: understood by Kubernetes to the last field, and in step with the program.

use std::{collections::BTreeSet, time::Duration};

use clap::Parser as _;
use k8s_openapi::{
    api::{
        apps::v1::DaemonSet,
        core::v1::{ConfigMap, Container, Namespace, PodSpec, Probe, ResourceQuota, ServiceAccount},
        rbac::v1::{ClusterRole, ClusterRoleBinding},
    },
    apimachinery::pkg::util::intstr::IntOrString,
};
use serde::Deserialize;
use serde_json::{Value, json};
use srcip_tests::{
    PATIENCE,
    apiserver::ApiServer,
    manifests::{deploy, object, render, render_with, unknown_fields},
    scratch::Scratch,
};
use srcip_user::{
    agent::{
        config::Config,
        pod::{PodInfo, PodName},
        serve::{HEALTH_ADDRESS, METRICS_ADDRESS},
        source::{Source as _, kube},
    },
    cli::Cli,
    northsouth::select::Selection,
};

const OVERLAYS: [&str; 5] = ["agent", "with-cni", "north-south", "audit-only", "uninstall"];

fn overlay(name: &str) -> Vec<Value> {
    render(&deploy().join("kubernetes/overlays").join(name)).unwrap()
}

/// All there is, with everything switched on.
fn everything() -> Vec<(String, Vec<Value>)> {
    let directory = Scratch::new().unwrap();
    let mut all: Vec<_> = OVERLAYS.map(|name| (name.to_owned(), overlay(name))).into();
    for (i, (name, components)) in
        [("with-cni", &["monitoring"]), ("audit-only", &["monitoring"])].into_iter().enumerate()
    {
        let rendered = render_with(name, components, &directory.path().join(i.to_string())).unwrap();
        all.push((format!("{name} with {components:?}"), rendered));
    }
    all
}

fn daemon_sets() -> Vec<(String, DaemonSet)> {
    let all = everything().into_iter();
    all.flat_map(|(name, objects)| {
        let daemon_sets = objects.into_iter().filter(|object| object["kind"] == "DaemonSet");
        daemon_sets.map(move |object| (name.clone(), serde_json::from_value(object).unwrap()))
    })
    .collect()
}

fn pod(daemon_set: &DaemonSet) -> &PodSpec {
    daemon_set.spec.as_ref().unwrap().template.spec.as_ref().unwrap()
}

fn containers(pod: &PodSpec) -> impl Iterator<Item = &Container> {
    pod.init_containers.iter().flatten().chain(&pod.containers)
}

/// The kind of the Prometheus operator, as far as it is used.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[expect(dead_code, reason = "only what is not here matters")]
struct PodMonitor {
    api_version: String,
    kind: String,
    metadata: k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta,
    spec: PodMonitorSpec,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct PodMonitorSpec {
    selector: k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector,
    pod_metrics_endpoints: Vec<Endpoint>,
    sample_limit: u64,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[expect(dead_code, reason = "only what is not here matters")]
struct Endpoint {
    port: String,
    path: String,
    interval: String,
    relabelings: Vec<Relabeling>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[expect(dead_code, reason = "only what is not here matters")]
struct Relabeling {
    #[serde(default)]
    source_labels: Vec<String>,
    target_label: String,
    replacement: Option<String>,
}

#[test]
fn kubernetes_knows_every_field() {
    for (overlay, objects) in everything() {
        assert!(!objects.is_empty());
        for object in &objects {
            let name = format!("{overlay}: {} {}", object["kind"], object["metadata"]["name"]);
            let unknown = match object["kind"].as_str().unwrap() {
                "Namespace" => unknown_fields::<Namespace>(object),
                "ResourceQuota" => unknown_fields::<ResourceQuota>(object),
                "ServiceAccount" => unknown_fields::<ServiceAccount>(object),
                "ConfigMap" => unknown_fields::<ConfigMap>(object),
                "ClusterRole" => unknown_fields::<ClusterRole>(object),
                "ClusterRoleBinding" => unknown_fields::<ClusterRoleBinding>(object),
                "DaemonSet" => unknown_fields::<DaemonSet>(object),
                "PodMonitor" => {
                    let monitor: PodMonitor = serde_json::from_value(object.clone()).unwrap();
                    let labels = monitor.spec.selector.match_labels.unwrap();
                    let ports: Vec<_> =
                        monitor.spec.pod_metrics_endpoints.iter().map(|e| e.port.as_str()).collect();
                    assert_eq!(labels["app.kubernetes.io/name"], "srcip");
                    assert_eq!((ports, monitor.spec.sample_limit), (vec!["metrics"], 10_000));
                    continue;
                }
                kind => panic!("{name}: a kind that nobody checks: {kind}"),
            };
            assert_eq!(unknown.unwrap(), [""; 0], "{name}");
        }
    }
}

#[test]
fn a_misspelt_field_is_noticed() {
    let objects = overlay("agent");
    let mut daemon_set: Value = object(&objects, "DaemonSet", "srcip-agent").unwrap();
    daemon_set["spec"]["template"]["spec"]["containers"][0]["livenessProb"] = json!({});
    let unknown = unknown_fields::<DaemonSet>(&daemon_set).unwrap();
    assert_eq!(unknown, [".spec.template.spec.containers[0].livenessProb"]);
}

#[test]
fn everything_is_labelled_and_in_its_namespace() {
    for (overlay, objects) in everything() {
        for object in objects {
            let metadata = &object["metadata"];
            let name = format!("{overlay}: {} {}", object["kind"], metadata["name"]);
            assert_eq!(metadata["labels"]["app.kubernetes.io/name"], "srcip", "{name}");
            assert_eq!(metadata["labels"]["app.kubernetes.io/part-of"], "srcip", "{name}");
            let is_global =
                ["Namespace", "ClusterRole", "ClusterRoleBinding"].iter().any(|kind| object["kind"] == *kind);
            if !is_global {
                assert_eq!(metadata["namespace"], "srcip-system", "{name}");
            }
        }
    }
    for (name, daemon_set) in daemon_sets() {
        let spec = daemon_set.spec.as_ref().unwrap();
        let labels = spec.template.metadata.as_ref().unwrap().labels.as_ref().unwrap();
        for (key, value) in spec.selector.match_labels.as_ref().unwrap() {
            assert_eq!(labels.get(key), Some(value), "{name}");
        }
    }
}

#[test]
fn arguments_are_understood() {
    for (name, daemon_set) in daemon_sets() {
        for container in containers(pod(&daemon_set)).filter(|c| c.image.as_deref() == Some("srcip:VERSION"))
        {
            let args = container.args.clone().unwrap();
            // As the kubelet does.
            let args =
                args.iter().map(|arg| arg.replace("$(NODE_NAME)", "n1").replace("$(HOST_IP)", "10.0.0.1"));
            let parsed = Cli::try_parse_from(std::iter::once("srcip".to_owned()).chain(args));
            if let Err(error) = parsed {
                panic!("{name}, {}: {error}", container.name);
            }
        }
    }
}

fn probed(probe: &Option<Probe>) -> (String, String) {
    let get = probe.as_ref().unwrap().http_get.as_ref().unwrap();
    let IntOrString::Int(port) = get.port else { panic!("a port by name") };
    (format!("{}:{port}", get.host.as_deref().unwrap_or_default()), get.path.clone().unwrap())
}

#[test]
fn ports_are_the_agents() {
    let objects = overlay("agent");
    let daemon_set: DaemonSet = object(&objects, "DaemonSet", "srcip-agent").unwrap();
    let container = &pod(&daemon_set).containers[0];
    let probe = |path: &str| (HEALTH_ADDRESS.to_owned(), path.to_owned());
    assert_eq!(probed(&container.startup_probe), probe("/livez"));
    assert_eq!(probed(&container.liveness_probe), probe("/livez"));
    assert_eq!(probed(&container.readiness_probe), probe("/readyz"));
    // The probes are on the host's loopback.
    assert_eq!(pod(&daemon_set).host_network, Some(true));
    let metrics = &container.ports.as_ref().unwrap()[0];
    assert_eq!(metrics.name.as_deref(), Some("metrics"));
    assert!(METRICS_ADDRESS.ends_with(&format!(":{}", metrics.container_port)));
    let args = container.args.as_ref().unwrap().join(" ");
    assert!(args.contains(&format!("--metrics-address=$(HOST_IP):{}", metrics.container_port)), "{args}");
}

/// The file says what is the default anyway, and is found where the agent looks for it.
#[test]
fn the_configuration_is_the_default() {
    let objects = overlay("agent");
    let config_map = objects.iter().find(|object| object["kind"] == "ConfigMap").unwrap();
    let text = config_map["data"]["agent.yaml"].as_str().unwrap();
    let directory = Scratch::new().unwrap();
    let file = directory.path().join("agent.yaml");
    std::fs::write(&file, text).unwrap();
    assert_eq!(Config::read(&file).unwrap(), Config::default());
    let daemon_set: DaemonSet = object(&objects, "DaemonSet", "srcip-agent").unwrap();
    let volumes = pod(&daemon_set).volumes.as_ref().unwrap();
    let named = volumes.iter().find_map(|volume| volume.config_map.as_ref()).unwrap();
    // With the hash that rolls the agents when it changes.
    assert_eq!(config_map["metadata"]["name"].as_str(), Some(named.name.as_str()));
    assert_ne!(named.name, "srcip-agent");
}

#[test]
fn nobody_has_more_than_is_documented() {
    let documented = std::fs::read_to_string(deploy().join("../docs/CAPABILITIES.md")).unwrap();
    let mut added = BTreeSet::new();
    for (name, daemon_set) in daemon_sets() {
        for container in containers(pod(&daemon_set)) {
            let name = format!("{name}, {}", container.name);
            let context = container.security_context.as_ref().unwrap_or_else(|| panic!("{name}"));
            assert_ne!(context.privileged, Some(true), "{name}");
            assert_eq!(context.allow_privilege_escalation, Some(false), "{name}");
            assert_eq!(context.read_only_root_filesystem, Some(true), "{name}");
            assert!(context.seccomp_profile.is_some(), "{name}");
            let capabilities = context.capabilities.as_ref().unwrap_or_else(|| panic!("{name}"));
            assert_eq!(capabilities.drop.as_deref(), Some(&["ALL".to_owned()][..]), "{name}");
            added.extend(capabilities.add.iter().flatten().cloned());
            let limits = container.resources.as_ref().and_then(|r| r.limits.as_ref());
            assert!(limits.is_some_and(|limits| limits.contains_key("memory")), "{name}");
        }
        let pod = pod(&daemon_set);
        assert_eq!(pod.priority_class_name.as_deref(), Some("system-node-critical"), "{name}");
        let everywhere = &pod.tolerations.as_ref().unwrap()[..];
        assert!(
            matches!(everywhere, [t] if t.operator.as_deref() == Some("Exists") && t.key.is_none()),
            "{name}"
        );
    }
    assert!(!added.is_empty());
    for capability in added {
        assert!(documented.contains(&format!("| `CAP_{capability}` |")), "{capability} is not documented");
    }
}

fn rules(objects: &[Value], role: &str) -> BTreeSet<(String, String)> {
    let role: ClusterRole = object(objects, "ClusterRole", role).unwrap();
    let mut allowed = BTreeSet::new();
    for rule in role.rules.unwrap() {
        assert_eq!(rule.non_resource_urls, None);
        for group in rule.api_groups.unwrap() {
            for resource in rule.resources.clone().unwrap() {
                let resource = if group.is_empty() { resource } else { format!("{resource}.{group}") };
                allowed.extend(rule.verbs.iter().map(|verb| (verb.clone(), resource.clone())));
            }
        }
    }
    allowed
}

/// Waits for requests of tasks on this thread.
async fn until(has_asked: impl Fn() -> bool) {
    let wait = async {
        while !has_asked() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(PATIENCE, wait).await.expect("it asks");
}

/// What the agent may do is what it asks for, and the other way round.
#[test]
fn rbac_is_what_the_agent_asks_for() {
    let server = ApiServer::start().unwrap();
    let directory = Scratch::new().unwrap();
    let kubeconfig = server.kubeconfig(directory.path()).unwrap();
    let pod = json!({
        "metadata": {"namespace": "shop", "name": "web", "uid": "4b1c"},
        "spec": {"nodeName": "n1", "containers": []},
    });
    server.put_pod(pod.clone());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let client = kube::connect(Some(&kubeconfig)).await.unwrap();
        let source =
            kube::KubeSource::start(client, "n1", kube::Timing::default(), Default::default()).unwrap();
        let mut snapshot = source.watch();
        snapshot.wait_for(|snapshot| snapshot.synced).await.unwrap();
        source.fetch(&PodName::new("shop", "web").unwrap()).await.unwrap().unwrap();
        let pod = PodInfo::from_object(&serde_json::from_value(pod).unwrap()).unwrap();
        source.warn(&pod, "Invalid", "a value that means nothing");
        until(|| !server.events().is_empty() && !server.asked("watch", "pods").is_empty()).await;
    });
    let asked: BTreeSet<_> =
        server.requests().into_iter().map(|asked| (asked.verb.to_owned(), asked.resource)).collect();
    for overlay in ["agent", "with-cni"].map(overlay) {
        let rules = rules(&overlay, "srcip-agent");
        assert_eq!(rules, asked);
        assert!(rules.iter().all(|(verb, resource)| !verb.contains('*') && !resource.contains('*')));
        // The binding binds them to the account that the agent runs as.
        let binding: ClusterRoleBinding = object(&overlay, "ClusterRoleBinding", "srcip-agent").unwrap();
        assert_eq!(binding.role_ref.name, "srcip-agent");
        let daemon_set: DaemonSet = object(&overlay, "DaemonSet", "srcip-agent").unwrap();
        let subject = &binding.subjects.unwrap()[0];
        assert_eq!(Some(&subject.name), self::pod(&daemon_set).service_account_name.as_ref());
        assert_eq!(subject.namespace.as_deref(), Some("srcip-system"));
    }
    let north_south = overlay("north-south");
    assert_eq!(rules(&north_south, "srcip-agent"), asked);
    // Who only looks on asks for nothing, and has no token to ask with.
    for name in ["audit-only", "uninstall"] {
        let objects = overlay(name);
        assert!(objects.iter().all(|object| object["kind"] != "ClusterRole"));
        let daemon_set = objects.iter().find(|object| object["kind"] == "DaemonSet").unwrap();
        assert_eq!(daemon_set["spec"]["template"]["spec"]["automountServiceAccountToken"], false);
    }
}

/// With north-south, it asks for Services, what stands behind them, and where.
#[test]
fn rbac_of_north_south_is_what_it_asks_for() {
    let server = ApiServer::start().unwrap();
    let directory = Scratch::new().unwrap();
    let kubeconfig = server.kubeconfig(directory.path()).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let client = kube::connect(Some(&kubeconfig)).await.unwrap();
        let timing = kube::Timing::default();
        let source = kube::services::ClusterSource::start(&client, Selection::default(), timing);
        source.watch().wait_for(|objects| objects.is_synced()).await.unwrap();
        until(|| server.requests().iter().filter(|asked| asked.verb == "watch").count() == 3).await;
    });
    let asked: BTreeSet<_> =
        server.requests().into_iter().map(|asked| (asked.verb.to_owned(), asked.resource)).collect();
    assert_eq!(rules(&overlay("north-south"), "srcip-agent-north-south"), asked);
}

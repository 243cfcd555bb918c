//! `srcip audit` names each cause, built for real, and its cure cures.

use std::{
    fs,
    net::{IpAddr, SocketAddr},
};

use serde_json::{Value, json};
use srcip_tests::{
    Family, client,
    host::Host,
    mesh::{NodePort, install_istio_tproxy, istio_redirect},
    peer,
    process::sh,
    proxy::{Kind, Proxy, with_istios_mark},
    srcip::Srcip,
    world::World,
};

use crate::scenario::{Engine, PORT, Scenario};

mod snat;

/// Audits while `traffic` goes on.
pub fn audit(srcip: &Srcip, options: &str, traffic: impl FnOnce()) -> Value {
    let traffic = || {
        traffic();
        Ok(())
    };
    serde_json::from_str(&srcip.audit(&format!("-o json {options}"), traffic).unwrap()).unwrap()
}

/// The only finding of the workload in this namespace.
pub fn only_finding(report: &Value, pod: &Host) -> Value {
    let workload = workload(report, pod);
    let findings = workload["findings"].as_array().unwrap();
    assert_eq!(findings.len(), 1, "{workload:#}");
    findings[0].clone()
}

fn workload(report: &Value, pod: &Host) -> Value {
    let path = pod.path();
    let all = report["workloads"].as_array().unwrap();
    let found = all.iter().find(|workload| workload["netns"].as_str() == path.to_str());
    found.cloned().unwrap_or_else(|| panic!("{} is not in {report:#}", pod.name()))
}

pub fn commands(finding: &Value) -> Vec<String> {
    let steps = finding["steps"].as_array().unwrap().iter();
    let commands = steps.flat_map(|step| step["commands"].as_array().unwrap());
    commands.map(|command| command.as_str().unwrap().to_owned()).collect()
}

/// Runs a command as it was printed.
fn shell(command: &str) {
    let output = std::process::Command::new("sh").args(["-c", command]).output().unwrap();
    assert!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
}

pub fn assert_clean(report: &Value, pod: &Host, by: &str) {
    let finding = only_finding(report, pod);
    assert_eq!(
        (finding["cause"].as_str(), finding["by"].as_str()),
        (Some("preserved"), Some(by)),
        "{finding:#}"
    );
    assert_eq!(commands(&finding), Vec::<String>::new());
    let workload = workload(report, pod);
    assert_eq!(workload["connections"], workload["preserved"]);
}

fn ask_several(scenario: &Scenario, family: Family) {
    for _ in 0..5 {
        scenario.ask(family);
    }
}

/// A sidecar in Istio's default mode; the printed commands, and the proxy's configuration that they name,
/// make the audit clean.
#[test]
fn sidecar_redirect() {
    for family in Family::BOTH {
        let mut scenario = Scenario::empty(Engine::SkLookup);
        scenario.application = Some(peer::application(&scenario.pod, &["[::]:8000"]).unwrap());
        let proxy = Proxy::start(&scenario.pod, Kind::EnvoyRedirect).unwrap();
        let (restore, hidden) = match family {
            Family::V4 => ("iptables-restore", "127.0.0.6"),
            Family::V6 => ("ip6tables-restore", "::6"),
        };
        scenario.pod.ip("-6 addr add ::6/128 dev lo nodad").unwrap();
        scenario.pod.feed(restore, &istio_redirect(family, 0)).unwrap();
        let report = audit(&scenario.srcip, "", || ask_several(&scenario, family));
        let finding = only_finding(&report, &scenario.pod);
        assert_eq!(finding["cause"], "sidecar-redirect", "{finding:#}");
        assert_eq!(finding["proxy_port"], 15006);
        // The sidecar uses one connection for several of its client's.
        let connections = finding["connections"].as_u64().unwrap();
        assert!((1..=5).contains(&connections), "{finding:#}");
        assert_eq!(finding["ports"], json!([8000]));
        assert_eq!(finding["application_saw"], json!([hidden]));
        assert_eq!(finding["clients"], json!([scenario.client.address(family)]));
        let found = workload(&report, &scenario.pod);
        assert_eq!(
            (found["connections"].as_u64(), found["preserved"].as_u64()),
            (Some(connections), Some(0))
        );
        assert_eq!(found["interception"]["mode"], "redirect");

        // The proxy's part, which the first step names, then the commands as they stand.
        proxy.kill();
        scenario.proxy = Some(Proxy::start(&scenario.pod, Kind::Envoy).unwrap());
        let mut attached = false;
        for command in commands(&finding) {
            match command.strip_prefix("srcip ") {
                Some(arguments) => {
                    let cgroup = scenario.world.cgroup().display();
                    scenario.srcip.run(&format!("{arguments} --cgroup {cgroup}")).unwrap();
                    attached = true;
                }
                None => shell(&command),
            }
        }
        assert!(attached, "{finding:#}");
        let report = audit(&scenario.srcip, "", || ask_several(&scenario, family));
        assert_clean(&report, &scenario.pod, "srcip");
    }
}

/// Native nftables rules, and one that the pod has laid as a trap for whoever pastes what is printed.
#[test]
fn sidecar_redirect_by_nftables() {
    let mut scenario = Scenario::empty(Engine::SkLookup);
    scenario.application = Some(peer::application(&scenario.pod, &["[::]:8000"]).unwrap());
    scenario.proxy = Some(Proxy::start(&scenario.pod, Kind::EnvoyRedirect).unwrap());
    let rules = "table inet mesh {\n chain in {\n type nat hook prerouting priority dstnat;\n \
                 meta l4proto tcp jump inbound\n }\n chain inbound {\n tcp dport != 15006 redirect to :15006\n }\n}\n";
    scenario.pod.feed("nft -f -", rules).unwrap();
    let trap = scenario.world.directory().join("trap");
    let comment = format!("$(touch {0}) `touch {0}`", trap.display());
    let rule = ["-t", "nat", "-A", "PREROUTING", "-p", "tcp", "--dport", "9", "-m", "comment", "--comment"];
    let mut command = scenario.pod.command("iptables").unwrap();
    command.args(rule).arg(&comment).args(["-j", "REDIRECT", "--to-ports", "15006"]);
    srcip_tests::process::run(&mut command).unwrap();

    let report = audit(&scenario.srcip, "", || ask_several(&scenario, Family::V4));
    let finding = only_finding(&report, &scenario.pod);
    assert_eq!(finding["cause"], "sidecar-redirect", "{finding:#}");
    for command in commands(&finding).iter().filter(|command| command.starts_with("nsenter ")) {
        shell(command);
    }
    assert!(!trap.exists(), "what the pod wrote was run: {finding:#}");
    let left = scenario.pod.sh("nft list ruleset").unwrap();
    assert!(!left.contains("15006"), "{left}");
}

/// Where Kubernetes is known, the cure is the mesh's own annotation, on what makes the pod.
#[test]
fn sidecar_redirect_of_a_deployment() {
    let mut scenario = Scenario::empty(Engine::SkLookup);
    scenario.application = Some(peer::application(&scenario.pod, &["[::]:8000"]).unwrap());
    scenario.proxy = Some(Proxy::start(&scenario.pod, Kind::EnvoyRedirect).unwrap());
    scenario.pod.feed("iptables-restore", &istio_redirect(Family::V4, 0)).unwrap();
    let mut pod = pod_manifest("httpbin-5d4f-x", &scenario.pod);
    pod["metadata"]["labels"]["pod-template-hash"] = "5d4f".into();
    pod["metadata"]["annotations"] = json!({ "sidecar.istio.io/status": "{}" });
    pod["metadata"]["ownerReferences"] = json!([{
        "apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "httpbin-5d4f", "uid": "1", "controller": true
    }]);
    let manifests = manifests(&scenario.world, &[pod]);
    let report = audit(&scenario.srcip, &manifests, || ask_several(&scenario, Family::V4));
    let commands = commands(&only_finding(&report, &scenario.pod));
    let [command] = &commands[..] else { panic!("{commands:?}") };
    let (kubectl, patch) = command.split_once(" --type merge -p ").unwrap();
    assert_eq!(kubectl, "kubectl -n web patch deployment httpbin");
    let patch: Value = serde_json::from_str(patch.trim_matches('\'')).unwrap();
    let annotations = &patch["spec"]["template"]["metadata"]["annotations"];
    assert_eq!(annotations["sidecar.istio.io/interceptionMode"], "TPROXY");
    assert_eq!(workload(&report, &scenario.pod)["pod"], "web/httpbin-5d4f-x");
}

fn pod_manifest(name: &str, host: &Host) -> Value {
    let ips: Vec<_> = Family::BOTH.iter().map(|family| json!({ "ip": host.address(*family) })).collect();
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": { "namespace": "web", "name": name, "labels": { "app": "httpbin" } },
        "spec": { "containers": [] },
        "status": { "podIP": host.address(Family::V4), "podIPs": ips },
    })
}

fn node_manifest(name: &str, host: &Host) -> Value {
    let addresses: Vec<_> = Family::BOTH
        .iter()
        .map(|family| json!({ "type": "InternalIP", "address": host.address(*family) }))
        .collect();
    json!({
        "apiVersion": "v1", "kind": "Node", "metadata": { "name": name },
        "status": { "addresses": addresses },
    })
}

fn service_manifest() -> Value {
    json!({
        "apiVersion": "v1", "kind": "Service", "metadata": { "namespace": "web", "name": "httpbin" },
        "spec": {
            "type": "NodePort", "selector": { "app": "httpbin" },
            "ports": [{ "port": 80, "targetPort": 8000, "nodePort": 30080 }],
        },
    })
}

/// Writes the manifests as a user would have them; returns the option that names them.
fn manifests(world: &World, objects: &[Value]) -> String {
    let directory = world.directory().join("manifests");
    fs::create_dir_all(&directory).unwrap();
    let documents: Vec<_> = objects.iter().map(|object| format!("---\n{object}\n")).collect();
    fs::write(directory.join("objects.yaml"), documents.concat()).unwrap();
    format!("--manifests {}", directory.display())
}

/// Nothing in between.
#[test]
fn preserved_by_direct_routing() {
    let mut scenario = Scenario::empty(Engine::SkLookup);
    scenario.application = Some(peer::application(&scenario.pod, &["[::]:8000"]).unwrap());
    for family in Family::BOTH {
        let report = audit(&scenario.srcip, "", || ask_several(&scenario, family));
        assert_clean(&report, &scenario.pod, "direct-routing");
        let finding = only_finding(&report, &scenario.pod);
        assert_eq!(finding["clients"], json!([scenario.client.address(family)]));
    }
}

/// Istio's TPROXY mode.
#[test]
fn preserved_by_tproxy() {
    let mut scenario = Scenario::empty(Engine::SkLookup);
    scenario.application = Some(peer::application(&scenario.pod, &["[::]:8000"]).unwrap());
    let proxy = Proxy::start_with(&scenario.pod, Kind::Envoy, with_istios_mark);
    scenario.proxy = Some(proxy.unwrap());
    install_istio_tproxy(&scenario.pod).unwrap();
    let report = audit(&scenario.srcip, "", || ask_several(&scenario, Family::V4));
    assert_clean(&report, &scenario.pod, "tproxy");
    assert_eq!(workload(&report, &scenario.pod)["interception"]["mode"], "tproxy");
}

/// srcip steers, but the proxy dials as itself.
#[test]
fn proxy_not_transparent() {
    let mut scenario = Scenario::empty(Engine::SkLookup);
    scenario.application = Some(peer::application(&scenario.pod, &["[::]:8000"]).unwrap());
    let proxy = Proxy::start_with(&scenario.pod, Kind::Haproxy, |config| {
        config.replace("    source 0.0.0.0 usesrc clientip\n", "")
    });
    scenario.proxy = Some(proxy.unwrap());
    scenario.attach("");
    let report = audit(&scenario.srcip, "", || ask_several(&scenario, Family::V4));
    let finding = only_finding(&report, &scenario.pod);
    assert_eq!(finding["cause"], "proxy-not-transparent", "{finding:#}");
    assert_eq!(finding["application_saw"], json!([scenario.pod.address(Family::V4)]));
    assert_eq!(finding["clients"], json!([scenario.client.address(Family::V4)]));
}

/// A proxy that REDIRECT serves, and that dials from the pod's own address.
#[test]
fn proxy_own_address() {
    let mut scenario = Scenario::empty(Engine::SkLookup);
    let own = scenario.pod.address(Family::V4);
    scenario.application = Some(peer::application(&scenario.pod, &["[::]:8000"]).unwrap());
    let proxy = Proxy::start_with(&scenario.pod, Kind::HaproxyRedirect, |config| {
        config.replace("source 127.0.0.6", &format!("source {own}"))
    });
    scenario.proxy = Some(proxy.unwrap());
    // Not Istio's rules: those would take what the proxy dials from there back to the proxy.
    let rule = "-p tcp ! --dport 15006 -j REDIRECT --to-ports 15006";
    scenario.pod.sh(&format!("iptables -t nat -A PREROUTING {rule}")).unwrap();
    let report = audit(&scenario.srcip, "", || ask_several(&scenario, Family::V4));
    let finding = only_finding(&report, &scenario.pod);
    assert_eq!(finding["cause"], "proxy-own-address", "{finding:#}");
    assert_eq!(finding["application_saw"], json!([own]));
}

/// A proxy on another host, which is a load balancer or a gateway, depending on what is known of it.
#[test]
fn load_balancer_and_gateway() {
    let mut scenario = Scenario::empty(Engine::SkLookup);
    scenario.application = Some(peer::application(&scenario.pod, &["[::]:8000"]).unwrap());
    let middle = scenario.world.host("middle").unwrap();
    let to = scenario.pod.socket(Family::V4, PORT);
    let proxy = Proxy::start_with(&middle, Kind::Haproxy, |config| {
        config.replace("    source 0.0.0.0 usesrc clientip\n", "").replace("0.0.0.0:0", &to.to_string())
    });
    let _proxy = proxy.unwrap();
    let traffic = || {
        let seen = client::ask_once(&scenario.client, middle.socket(Family::V4, 15006)).unwrap();
        assert_eq!(seen.peer.ip(), middle.address(Family::V4));
    };
    let mut service = service_manifest();
    let pod = pod_manifest("httpbin", &scenario.pod);
    let audit = |objects: &[Value], options: &str| {
        let manifests = manifests(&scenario.world, objects);
        let options = format!("{manifests} {options} --netns {}", scenario.pod.path().display());
        only_finding(&audit(&scenario.srcip, &options, traffic), &scenario.pod)
    };
    let flag = format!("--load-balancer {}", middle.address(Family::V4));
    let finding = audit(&[pod.clone(), service.clone()], &flag);
    assert_eq!(finding["cause"], "load-balancer", "{finding:#}");
    assert_eq!(finding["proxy_protocol"], Value::Null);
    assert!(finding["steps"].to_string().contains("X-Forwarded-For"), "{finding:#}");
    let key = "service.beta.kubernetes.io/aws-load-balancer-proxy-protocol";
    service["metadata"]["annotations"] = json!({ key: "*" });
    let finding = audit(&[pod.clone(), service], &flag);
    assert_eq!(finding["proxy_protocol"], json!({ "namespace": "web", "name": "httpbin" }));
    assert!(finding["steps"].to_string().contains("accept-proxy"), "{finding:#}");

    let mut gateway = pod_manifest("gateway", &middle);
    gateway["metadata"]["labels"] = json!({ "istio": "ingressgateway" });
    let mut ingress = service_manifest();
    ingress["metadata"]["name"] = "ingress".into();
    ingress["spec"]["selector"] = json!({ "istio": "ingressgateway" });
    let finding = audit(&[pod, gateway, ingress], "");
    assert_eq!((finding["cause"].as_str(), finding["pod"].as_str()), (Some("gateway"), Some("web/gateway")));
    assert!(finding["steps"].to_string().contains("X-Forwarded-For"), "{finding:#}");
}

/// `srcip explain` draws the hops of one connection, and marks where the address is lost.
#[test]
fn explain_draws_where_it_is_lost() {
    let mut scenario = Scenario::empty(Engine::SkLookup);
    scenario.application = Some(peer::application(&scenario.pod, &["[::]:8000"]).unwrap());
    let proxy = Proxy::start(&scenario.pod, Kind::EnvoyRedirect).unwrap();
    scenario.pod.feed("iptables-restore", &istio_redirect(Family::V4, 0)).unwrap();
    let to = scenario.pod.socket(Family::V4, PORT);
    let explain = |options: &str| {
        let mut connection = client::connect(&scenario.client, to).unwrap();
        let seen = client::ask(&mut connection).unwrap();
        let from = connection.local_addr().unwrap();
        let cgroup = scenario.world.cgroup().display();
        let text = scenario.srcip.run(&format!("explain --cgroup {cgroup} --wait 5s {options}")).unwrap();
        (from, seen, text)
    };
    // The connection is open already.
    let client = scenario.client.address(Family::V4);
    let (from, seen, text) = explain(&format!("--from {client}"));
    let lines: Vec<_> = text.lines().map(str::trim_end).collect();
    assert!(lines[0].contains("client") && lines[0].ends_with(&from.to_string()), "{text}");
    assert!(text.contains("REDIRECT to port 15006"), "{text}");
    assert!(text.contains(&format!("connects from {}", seen.peer)), "{text}");
    assert!(text.contains(&format!("sees {} at {to}", seen.peer)), "{text}");
    assert_eq!(text.matches("is lost here").count(), 1, "{text}");
    assert!(text.contains("sidecar-redirect: "), "{text}");

    proxy.kill();
    scenario.pod.sh("iptables -t nat -F").unwrap();
    let _proxy = Proxy::start(&scenario.pod, Kind::Envoy).unwrap();
    scenario.attach("");
    let (from, seen, text) = explain(&format!("--to {to}"));
    assert!(text.contains(&from.to_string()), "{text}");
    assert!(text.contains("srcip steers to the proxy"), "{text}");
    assert!(text.contains(&format!("sees {} at {to}", seen.peer)), "{text}");
    assert!(!text.contains("is lost here") && text.contains("nothing needs doing"), "{text}");
}

use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::{agent::protocol::MAX_TIMEOUT, cni::config::POD_ANNOTATIONS};

/// Calls the plugin for a pod whose agent is absent.
fn call(command: &str, configuration: &Value) -> Result<String, String> {
    call_with(command, &configuration.to_string(), "shop")
}

fn call_with(command: &str, configuration: &str, namespace: &str) -> Result<String, String> {
    let variable = |name: &str| {
        Some(match name {
            "CNI_COMMAND" => command.to_owned(),
            "CNI_CONTAINERID" => "0f3c".to_owned(),
            "CNI_IFNAME" => "eth0".to_owned(),
            "CNI_NETNS" => "/proc/self/ns/net".to_owned(),
            "CNI_ARGS" => format!("K8S_POD_NAMESPACE={namespace};K8S_POD_NAME=web"),
            _ => return None,
        })
    };
    run(variable, configuration.as_bytes())
}

fn configuration(version: &str) -> Value {
    json!({
        "cniVersion": version, "name": "net", "type": "srcip-cni",
        "socket": "/run/srcip-no-such-agent/agent.sock", "timeoutSeconds": 1,
        "prevResult": {"cniVersion": version, "ips": [], "zz": 1.10, "aa": {"unknown": true}},
    })
}

fn annotated(annotations: Value) -> Value {
    let mut configuration = configuration("1.0.0");
    configuration["runtimeConfig"] = json!({ POD_ANNOTATIONS: annotations });
    configuration["pinPath"] = json!("/run/srcip-no-such-agent/pins");
    configuration
}

fn code(answer: &Result<String, String>) -> Option<u64> {
    let error: Value = serde_json::from_str(answer.as_ref().err()?).unwrap();
    assert!(error["msg"].as_str().unwrap().starts_with("srcip-cni: "), "{error}");
    assert!(error["cniVersion"].is_string());
    error["code"].as_u64()
}

const ISTIO: (&str, &str) = ("sidecar.istio.io/interceptionMode", "TPROXY");

/// Who starts without an agent, by policy and by what is known of the pod.
#[test]
fn without_an_agent() {
    let known = [
        ("asks", json!({ ISTIO.0: ISTIO.1 })),
        ("declines", json!({"srcip.io/steer": "false"})),
        ("is wrong", json!({"srcip.io/steer": "perhaps"})),
        ("is silent", json!({})),
        ("is unknown", Value::Null),
    ];
    for (settings, starts) in [
        (json!({}), [false, true, true, true, false]),
        (json!({"onUnknown": "pass"}), [false, true, true, true, true]),
        (json!({"selectors": true}), [false, true, true, false, false]),
        (json!({"onAgentAbsent": "pass"}), [true; 5]),
        (json!({"onAgentAbsent": "fail"}), [false; 5]),
    ] {
        for ((what, annotations), starts) in known.iter().zip(starts) {
            let mut configuration = annotated(annotations.clone());
            configuration.as_object_mut().unwrap().extend(settings.as_object().unwrap().clone());
            let answer = call("ADD", &configuration);
            let expected = if starts { None } else { Some(11) };
            assert_eq!(code(&answer), expected, "{settings}, a pod that {what}: {answer:?}");
            assert_eq!(call("DEL", &configuration), Ok(String::new()));
            // The pins tell what no agent can.
            let expected = if *what == "asks" { Some(101) } else { None };
            assert_eq!(code(&call("CHECK", &configuration)), expected, "{settings}, a pod that {what}");
        }
    }
    let unknown = configuration("1.0.0").to_string();
    assert!(call_with("ADD", &unknown, "kube-system").is_ok());
    assert_eq!(code(&call_with("ADD", &unknown, "shop")), Some(11));
}

#[test]
fn the_message_says_what_to_do() {
    let error = call("ADD", &annotated(json!({ ISTIO.0: ISTIO.1 }))).unwrap_err();
    let error: Value = serde_json::from_str(&error).unwrap();
    assert_eq!(error["msg"], "srcip-cni: pod shop/web is to be steered, and is not");
    let details = error["details"].as_str().unwrap();
    assert!(details.starts_with("no agent answers at /run/srcip-no-such-agent/agent.sock: "), "{details}");
}

/// Whoever waits for an agent does not, if nothing can come of it.
#[test]
fn who_needs_no_agent_does_not_wait() {
    let started = Instant::now();
    for annotations in [json!({}), json!({"other": "x"}), json!({"srcip.io/steer": "false"})] {
        let mut configuration = annotated(annotations);
        configuration["timeoutSeconds"] = MAX_TIMEOUT.as_secs().into();
        call("ADD", &configuration).unwrap();
    }
    assert!(started.elapsed() < MAX_TIMEOUT, "{:?}", started.elapsed());
    let started = Instant::now();
    call("ADD", &annotated(json!({"srcip.io/steer": "true"}))).unwrap_err();
    assert!(started.elapsed() > Duration::from_millis(300), "{:?}", started.elapsed());
}

#[test]
fn the_result_is_handed_on_letter_by_letter() {
    for version in VERSIONS {
        let text = format!(
            r#"{{"cniVersion":"{version}","onAgentAbsent":"pass","timeoutSeconds":1,"prevResult": {{ "b":1.10,
            "a":"\u00fc" , "cniVersion":"{version}"}}}}"#
        );
        let result = call_with("ADD", &text, "shop").unwrap();
        assert_eq!(
            result,
            format!("{{ \"b\":1.10,\n            \"a\":\"\\u00fc\" , \"cniVersion\":\"{version}\"}}")
        );
        let without = text.replace(&format!(" , \"cniVersion\":\"{version}\"}}}}"), "}}");
        let result: Value = serde_json::from_str(&call_with("ADD", &without, "shop").unwrap()).unwrap();
        assert_eq!(result, json!({"cniVersion": version, "b": 1.10, "a": "ü"}));
    }
}

#[test]
fn mistakes_have_their_codes() {
    let mut unchained = configuration("1.0.0");
    unchained.as_object_mut().unwrap().remove("prevResult");
    assert_eq!(code(&call("ADD", &unchained)), Some(7));
    for (key, value) in [
        ("timeoutSeconds", json!(0)),
        ("timeoutSeconds", json!(121)),
        ("timeoutSeconds", json!("1")),
        ("onAgentAbsent", json!("panic")),
        ("prevResult", json!([])),
        ("runtimeConfig", json!({POD_ANNOTATIONS: {"a": 1}})),
    ] {
        let mut configuration = configuration("1.1.0");
        configuration[key] = value.clone();
        assert_eq!(code(&call("ADD", &configuration)), Some(7), "{key} {value}");
        // A pod that goes is not held back by a mistake.
        assert_eq!(call("DEL", &configuration), Ok(String::new()));
    }
    for command in ["ADD", "DEL", "CHECK", "GC", "STATUS"] {
        assert_eq!(code(&call_with(command, "{", "shop")), Some(6), "{command}");
        assert_eq!(code(&call(command, &configuration("9.9.9"))), Some(1), "{command}");
    }
    assert_eq!(code(&call("GC", &configuration("1.0.0"))), Some(1));
    assert_eq!(code(&call("CHECK", &configuration("0.3.1"))), Some(1));
    assert_eq!(code(&call("SWIM", &configuration("1.0.0"))), Some(4));
    assert_eq!(code(&call_with("ADD", &configuration("1.0.0").to_string(), "../x")), Some(4));
    let long = format!("{{\"cniVersion\":\"1.0.0\"}}{}", " ".repeat(MAX_CONFIGURATION as usize));
    assert_eq!(code(&call_with("ADD", &long, "shop")), Some(6));
}

#[test]
fn status_gc_and_version() {
    assert_eq!(call("STATUS", &configuration("1.1.0")), Ok(String::new()));
    let mut strict = configuration("1.1.0");
    strict["onAgentAbsent"] = json!("fail");
    assert_eq!(code(&call("STATUS", &strict)), Some(50));
    // Nobody reads it, so it may be as long as it likes.
    let many = vec![json!({"containerID": "f".repeat(64), "ifname": "eth0"}); 5000];
    for valid in [json!(null), json!([]), json!(many)] {
        let mut gc = configuration("1.1.0");
        gc["cni.dev/valid-attachments"] = valid;
        assert_eq!(call("GC", &gc), Ok(String::new()));
    }
    let answer: Value =
        serde_json::from_str(&call("VERSION", &json!({"cniVersion": "0.4.0"})).unwrap()).unwrap();
    assert_eq!(answer["cniVersion"], "0.4.0");
    assert_eq!(answer["supportedVersions"].as_array().unwrap().len(), VERSIONS.len());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    /// Whatever comes in, what goes out is a result or an error object.
    #[test]
    fn any_input_is_answered(
        command in prop::sample::select(vec!["ADD", "DEL", "CHECK", "GC", "STATUS", "VERSION", "", "x"]),
        at in 0_usize..400, cut in 0_usize..8, put in "[ -~\u{0}\u{e9}]{0,8}", namespace in "[ -~]{0,12}",
    ) {
        let mut text = annotated(json!({"srcip.io/steer": "false"})).to_string();
        text = text.replace("\"timeoutSeconds\":1", "\"onAgentAbsent\":\"pass\"");
        let start = at.min(text.len());
        text.replace_range(start..(start + cut).min(text.len()), &put);
        let answer = call_with(command, &text, &namespace);
        if let Err(error) = &answer {
            let error: Value = serde_json::from_str(error).unwrap();
            prop_assert!(error["code"].as_u64().is_some_and(|code| code > 0));
        } else if command == "ADD" {
            let result: Value = serde_json::from_str(&answer.unwrap()).unwrap();
            prop_assert!(result.is_object());
        }
    }
}

//! What is deployed on clusters: the manifests of `deploy/kubernetes`, as kubectl renders them.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::Value;

use crate::{kubectl::kubectl, process::run};

/// `deploy`, which the tests take as it is.
pub fn deploy() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy")
}

/// Renders a kustomization.
pub fn render(kustomization: &Path) -> Result<Vec<Value>> {
    let output = run(Command::new(kubectl()?).arg("kustomize").arg(kustomization))?;
    let text = String::from_utf8(output.stdout)?;
    serde_saphyr::from_multiple(&text).with_context(|| format!("{}: {text}", kustomization.display()))
}

/// Renders an overlay, with components switched on.
pub fn render_with(overlay: &str, components: &[&str], directory: &Path) -> Result<Vec<Value>> {
    let kubernetes = deploy().join("kubernetes").canonicalize()?;
    let relative = |path: &str| {
        // kustomize takes directories only relative to its own.
        let up = "../".repeat(directory.components().count() - 1);
        format!("{up}{}", kubernetes.join(path).strip_prefix("/").expect("it is absolute").display())
    };
    let components: Vec<_> = components.iter().map(|name| relative(&format!("components/{name}"))).collect();
    let kustomization = serde_json::json!({
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": [relative(&format!("overlays/{overlay}"))],
        "components": components,
    });
    std::fs::create_dir_all(directory)?;
    std::fs::write(directory.join("kustomization.yaml"), kustomization.to_string())?;
    render(directory)
}

/// The object of a kind and name.
pub fn object<T: DeserializeOwned>(objects: &[Value], kind: &str, name: &str) -> Result<T> {
    let wanted = |object: &&Value| object["kind"] == kind && object["metadata"]["name"] == name;
    let object = objects.iter().find(wanted).with_context(|| format!("no {kind} {name}"))?;
    Ok(serde_json::from_value(object.clone())?)
}

/// The fields of an object that its type does not have.
pub fn unknown_fields<T: DeserializeOwned + Serialize>(object: &Value) -> Result<Vec<String>> {
    let understood = serde_json::to_value(serde_json::from_value::<T>(object.clone())?)?;
    let mut unknown = Vec::new();
    compare(object, &understood, "", &mut unknown);
    Ok(unknown)
}

fn compare(given: &Value, understood: &Value, path: &str, unknown: &mut Vec<String>) {
    match (given, understood) {
        (Value::Object(given), Value::Object(understood)) => {
            for (key, value) in given {
                let path = format!("{path}.{key}");
                match understood.get(key) {
                    Some(understood) => compare(value, understood, &path, unknown),
                    None => unknown.push(path),
                }
            }
        }
        (Value::Array(given), Value::Array(understood)) if given.len() == understood.len() => {
            for (i, (given, understood)) in given.iter().zip(understood).enumerate() {
                compare(given, understood, &format!("{path}[{i}]"), unknown);
            }
        }
        _ if given == understood => {}
        _ => unknown.push(format!("{path}: {given} is read as {understood}")),
    }
}

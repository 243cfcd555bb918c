//! A container runtime's part of the Container Network Interface: calls the plugins of a list one after the
//! other, as libcni does, with the result of each in the configuration of the next.

use std::{
    io::Write as _,
    path::{Path, PathBuf},
    process::{Output, Stdio},
};

use anyhow::{Context as _, Result, bail};
use serde_json::{Value, json};

use crate::{host::Host, srcip::binary};

/// Where Debian has its plugins.
const DISTRIBUTION: &str = "/usr/lib/cni";

/// A sandbox, as the runtime names it to plugins.
#[derive(Clone, Debug)]
pub struct Sandbox {
    /// Its ID.
    pub container_id: String,
    /// The interface.
    pub ifname: String,
    /// Its network namespace.
    pub netns: PathBuf,
    /// `CNI_ARGS`.
    pub arguments: String,
    /// What the runtime adds to the configuration of plugins that have the capability.
    pub capabilities: Value,
}

impl Sandbox {
    /// A Kubernetes pod's.
    pub fn of_pod(host: &Host, namespace: &str, name: &str, annotations: Value) -> Self {
        Self {
            container_id: format!("sandbox-{}", host.name()),
            ifname: "eth0".to_owned(),
            netns: host.path(),
            arguments: format!(
                "IgnoreUnknown=1;K8S_POD_NAMESPACE={namespace};K8S_POD_NAME={name};K8S_POD_UID={}",
                host.name()
            ),
            capabilities: json!({ "io.kubernetes.cri.pod-annotations": annotations }),
        }
    }
}

/// A network and the plugins that make it.
#[derive(Debug)]
pub struct Network<'a> {
    node: &'a Host,
    list: Value,
}

impl<'a> Network<'a> {
    /// A bridge on a node, its addresses given out from a directory of the node, the plugin under test behind
    /// it with these settings.
    pub fn bridged(node: &'a Host, version: &str, settings: &Value) -> Self {
        let mut ours = json!({
            "type": "srcip-cni",
            "capabilities": {"io.kubernetes.cri.pod-annotations": true},
        });
        if let (Some(ours), Some(settings)) = (ours.as_object_mut(), settings.as_object()) {
            ours.extend(settings.clone());
        }
        let list = json!({
            "cniVersion": version,
            "name": "pods",
            "plugins": [
                {
                    "type": "bridge",
                    "bridge": "cni0",
                    "isGateway": true,
                    "ipam": {
                        "type": "host-local",
                        "dataDir": node.directory().join("ipam"),
                        "ranges": [[{"subnet": "10.88.0.0/16"}], [{"subnet": "fd13:88::/64"}]],
                        "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}],
                    },
                },
                {"type": "portmap", "capabilities": {"portMappings": true}},
                ours,
            ],
        });
        Self { node, list }
    }

    /// The list, to be changed.
    pub fn list(&mut self) -> &mut Value {
        &mut self.list
    }

    /// ADD; returns the result of the last plugin.
    pub fn add(&self, sandbox: &Sandbox) -> Result<Value> {
        let mut result = Value::Null;
        for plugin in self.plugins()? {
            let output = self.call("ADD", plugin, Some(sandbox), &result)?;
            result = parse(plugin, output)?;
        }
        Ok(result)
    }

    /// ADD of our plugin alone, behind a result.
    pub fn add_ours(&self, sandbox: &Sandbox, result: &Value) -> Result<Output> {
        let ours = self.plugins()?.last().context("no plugins")?;
        self.call("ADD", ours, Some(sandbox), result)
    }

    /// CHECK with the result of ADD.
    pub fn check(&self, sandbox: &Sandbox, result: &Value) -> Result<()> {
        self.plugins()?
            .iter()
            .try_for_each(|plugin| done(plugin, &self.call("CHECK", plugin, Some(sandbox), result)?))
    }

    /// DEL, from the last plugin to the first.
    pub fn del(&self, sandbox: &Sandbox, result: &Value) -> Result<()> {
        let plugins = self.plugins()?.iter().rev();
        plugins
            .into_iter()
            .try_for_each(|plugin| done(plugin, &self.call("DEL", plugin, Some(sandbox), result)?))
    }

    /// STATUS or GC of our plugin, which Debian's do not have; GC with the attachments that exist.
    pub fn ask_ours(&self, command: &str, valid: &[&Sandbox]) -> Result<()> {
        let mut ours = self.plugins()?.last().context("no plugins")?.clone();
        let valid: Vec<_> = valid
            .iter()
            .map(|sandbox| json!({"containerID": sandbox.container_id, "ifname": sandbox.ifname}))
            .collect();
        ours["cni.dev/valid-attachments"] = valid.into();
        done(&ours, &self.call(command, &ours, None, &Value::Null)?)
    }

    fn plugins(&self) -> Result<&Vec<Value>> {
        self.list["plugins"].as_array().context("no plugins")
    }

    /// Calls a plugin as the runtime does, on the node.
    fn call(
        &self,
        command: &str,
        plugin: &Value,
        sandbox: Option<&Sandbox>,
        previous: &Value,
    ) -> Result<Output> {
        let kind = plugin["type"].as_str().context("a plugin without a type")?;
        let (path, version) = self.find(kind)?;
        let mut configuration = plugin.clone();
        configuration["name"] = self.list["name"].clone();
        configuration["cniVersion"] = version.into();
        if !previous.is_null() {
            configuration["prevResult"] = previous.clone();
            configuration["prevResult"]["cniVersion"] = version.into();
        }
        let capabilities = plugin["capabilities"].as_object();
        for (capability, _) in capabilities.into_iter().flatten() {
            let value = sandbox.map_or(&Value::Null, |sandbox| &sandbox.capabilities[capability]);
            if !value.is_null() {
                configuration["runtimeConfig"][capability] = value.clone();
            }
        }
        let mut process = self.node.command(&path.display().to_string())?;
        process.env_clear().env("CNI_COMMAND", command).env("CNI_PATH", DISTRIBUTION);
        process.env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
        if let Some(sandbox) = sandbox {
            process.env("CNI_CONTAINERID", &sandbox.container_id).env("CNI_IFNAME", &sandbox.ifname);
            process.env("CNI_NETNS", &sandbox.netns).env("CNI_ARGS", &sandbox.arguments);
        }
        process.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = process.spawn().with_context(|| path.display().to_string())?;
        // A plugin may end without having read everything.
        let _ = child.stdin.take().context("a pipe")?.write_all(configuration.to_string().as_bytes());
        Ok(child.wait_with_output()?)
    }

    /// A plugin's binary, and the version that it is called in. Debian's are older than 1.1.0, whose results
    /// are like those of 1.0.0.
    fn find(&self, kind: &str) -> Result<(PathBuf, &str)> {
        let version = self.list["cniVersion"].as_str().context("no version")?;
        if kind == "srcip-cni" {
            return Ok((binary(kind), version));
        }
        Ok((Path::new(DISTRIBUTION).join(kind), if version == "1.1.0" { "1.0.0" } else { version }))
    }
}

/// What a plugin has said, as an error if it has failed.
pub fn parse(plugin: &Value, output: Output) -> Result<Value> {
    let kind = &plugin["type"];
    let text = String::from_utf8(output.stdout)?;
    if !output.status.success() {
        bail!("{kind} failed: {text}{}", String::from_utf8_lossy(&output.stderr));
    }
    serde_json::from_str(&text).with_context(|| format!("{kind} said {text:?}"))
}

fn done(plugin: &Value, output: &Output) -> Result<()> {
    let said = String::from_utf8_lossy(&output.stdout);
    if !output.status.success() || !said.is_empty() {
        bail!("{} said: {said}{}", plugin["type"], String::from_utf8_lossy(&output.stderr));
    }
    Ok(())
}

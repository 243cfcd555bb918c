//! How the API server is found.

use std::{env, path::Path, time::Duration};

use anyhow::{Context as _, Result, bail};
use http_body_util::Limited;
use hyper::Response;
use kube::{
    Client, Config,
    client::{ClientBuilder, DynBody},
    config::{KubeConfigOptions, Kubeconfig},
};
use tower::util::MapResponseLayer;

/// How long a connection may take to be made.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// How large an answer may be, in bytes. A page of pods that are as large as a pod can be is smaller; a
/// watch that has brought so much is begun anew from where it was.
const MAX_ANSWER: usize = 64 << 20;

/// A client for the API server of: this kubeconfig; else those that `KUBECONFIG` names; else the cluster that
/// this process runs in; else `~/.kube/config`. Sends nothing yet.
pub async fn connect(kubeconfig: Option<&Path>) -> Result<Client> {
    let mut config = find(kubeconfig).await?;
    config.connect_timeout = Some(CONNECT_TIMEOUT);
    // Who asks repeats what fails, and says meanwhile what is wrong.
    config.default_retry = false;
    let limit = |answer: Response<Box<DynBody>>| answer.map(|body| Limited::new(body, MAX_ANSWER));
    let client = ClientBuilder::try_from(config).context("cannot make a client for the Kubernetes API")?;
    Ok(client.with_layer(&MapResponseLayer::new(limit)).build::<Limited<Box<DynBody>>>())
}

async fn find(kubeconfig: Option<&Path>) -> Result<Config> {
    let options = KubeConfigOptions::default();
    if let Some(path) = kubeconfig {
        let unusable = || format!("the kubeconfig {} cannot be used", path.display());
        let file = Kubeconfig::read_from(path).with_context(unusable)?;
        return Config::from_custom_kubeconfig(file, &options).await.with_context(unusable);
    }
    if let Some(paths) = env::var_os("KUBECONFIG").filter(|paths| !paths.is_empty()) {
        let unusable = || format!("KUBECONFIG is {}, and that cannot be used", paths.display());
        return Config::from_kubeconfig(&options).await.with_context(unusable);
    }
    if env::var_os("KUBERNETES_SERVICE_HOST").is_some() {
        return Config::incluster().context(
            "this is a pod, but its access to the Kubernetes API cannot be used; its service account's token \
             has to be mounted (`automountServiceAccountToken`)",
        );
    }
    match env::home_dir().map(|home| home.join(".kube/config")).filter(|path| path.exists()) {
        Some(path) => Config::from_kubeconfig(&options)
            .await
            .with_context(|| format!("the kubeconfig {} cannot be used", path.display())),
        None => bail!(
            "no Kubernetes API is known: this is not a pod (KUBERNETES_SERVICE_HOST is not set), and there is \
             no kubeconfig; give one with --kubeconfig FILE or KUBECONFIG, or pods with --manifests DIR"
        ),
    }
}

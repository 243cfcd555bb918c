//! An ingress gateway: a real Envoy with a listener for HTTP and one for HTTPS.

use std::{
    fs,
    net::SocketAddr,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use crate::{
    PATIENCE,
    host::Host,
    proxy::{Kind, Proxy},
};

/// Where it takes HTTP.
pub const HTTP_PORT: u16 = 8080;
/// Where it takes HTTPS.
pub const HTTPS_PORT: u16 = 8443;

/// A running gateway.
#[derive(Debug)]
pub struct Gateway {
    proxy: Proxy,
}

impl Gateway {
    /// Starts one in a pod, before an application; its certificate is made for it.
    pub fn start(pod: &Host, application: SocketAddr) -> Result<Self> {
        let directory = pod.directory().join(format!("{}-tls", pod.name()));
        fs::create_dir_all(&directory)?;
        let certified = rcgen::generate_simple_self_signed(["gateway.shop".to_owned()])?;
        let (certificate, key) = (directory.join("tls.crt"), directory.join("tls.key"));
        fs::write(&certificate, certified.cert.pem())?;
        fs::write(&key, certified.signing_key.serialize_pem())?;
        let proxy = Proxy::start_with(pod, Kind::EnvoyGateway, |config| {
            config
                .replace("/etc/envoy/tls.crt", &certificate.display().to_string())
                .replace("/etc/envoy/tls.key", &key.display().to_string())
                .replace("httpbin.shop", &format!("\"{}\"", application.ip()))
                .replace("port_value: 8000", &format!("port_value: {}", application.port()))
        })?;
        Ok(Self { proxy })
    }

    /// The lines of its access log.
    pub fn log(&self) -> String {
        self.proxy.access_log()
    }

    /// The last line of its access log, once it has this many.
    pub fn logged(&self, count: usize) -> Result<Value> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let log = self.proxy.access_log();
            // Nothing of a line that is half written.
            let log = log.rfind('\n').map_or("", |end| &log[..end]);
            if log.lines().count() >= count {
                return serde_json::from_str(log.lines().last().context("a line")?)
                    .with_context(|| log.to_owned());
            }
            ensure!(Instant::now() < deadline, "the gateway has not logged {count} requests: {log}");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Ends it at once.
    pub fn kill(self) {
        self.proxy.kill();
    }
}

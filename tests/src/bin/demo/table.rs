//! Both set-ups side by side, and whether they show what they should.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Result, ensure};

use crate::{Stage, before_after::Seen, screen::Screen, sidecar::Sidecar, views::Views};

/// Whose address a view tells.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Whose {
    /// The client's, as far as the sidecar knows it; it always does.
    ClientToSidecar,
    /// The client's, as far as the application gets it.
    ClientToApplication,
    /// The pod's: where the client connected to.
    Pod,
}

/// One view of a connection.
#[derive(Clone, Debug)]
struct View {
    name: String,
    shown: String,
    ip: IpAddr,
    expected: IpAddr,
    whose: Whose,
}

impl View {
    fn is_right(&self) -> bool {
        self.ip == self.expected
    }

    /// One word for it.
    fn mark(&self) -> &'static str {
        match (self.whose, self.is_right()) {
            (Whose::Pod, true) => "-",
            (Whose::Pod, false) => "wrong",
            (_, true) => "kept",
            (_, false) => "lost",
        }
    }

    /// Address and word, padded to columns.
    fn cell(&self, screen: Screen, width: usize) -> String {
        let text = format!("{:<width$}  {:<5}", self.shown, self.mark());
        match (self.whose, self.is_right()) {
            (Whose::Pod, true) => text,
            (_, true) => screen.good(&text),
            (_, false) => screen.bad(&text),
        }
    }
}

/// The views of one connection, in the order of the table.
fn list(views: &Views) -> [View; 6] {
    use Whose::{ClientToApplication, ClientToSidecar, Pod};
    let log = &views.log;
    let name = |name: &str| match views.client {
        SocketAddr::V4(_) => name.to_owned(),
        SocketAddr::V6(_) => format!("IPv6 {name}"),
    };
    let socket = |view, address: SocketAddr, whose| View {
        name: name(view),
        shown: address.to_string(),
        ip: address.ip(),
        expected: if whose == Pod { views.destination.ip() } else { views.client.ip() },
        whose,
    };
    let origin = View {
        name: name("application's answer"),
        shown: views.origin.to_string(),
        ip: views.origin,
        expected: views.client.ip(),
        whose: ClientToApplication,
    };
    [
        origin,
        socket("application's socket", views.peer, ClientToApplication),
        socket("downstream_remote_address", log.downstream_remote, ClientToSidecar),
        socket("downstream_local_address", log.downstream_local, Pod),
        socket("upstream_local_address", log.upstream_local, ClientToApplication),
        socket("upstream_host", log.upstream_host, Pod),
    ]
}

/// Prints the views of both set-ups side by side.
pub fn print(stage: &Stage<'_>, before: &Seen, after: &Seen) -> Result<()> {
    let Stage { sidecar, screen, .. } = *stage;
    let none = "(not shown)";
    let mut rows = Vec::new();
    rows.extend(list(&before.v4).map(Some).into_iter().zip(list(&after.v4)));
    if let Some(after) = &after.v6 {
        let before = before.v6.as_ref().map_or([const { None }; 6], |views| list(views).map(Some));
        // One line per witness is enough for the second family.
        let both = before.into_iter().zip(list(after));
        rows.extend(both.filter(|(_, view)| view.whose == Whose::ClientToApplication));
    }
    let names = rows.iter().map(|(_, view)| view.name.len()).max().unwrap_or_default();
    let befores = rows.iter().flat_map(|(before, _)| before).map(|view| view.shown.len());
    let befores = befores.max().unwrap_or_default().max(none.len());
    let afters = rows.iter().map(|(_, view)| view.shown.len()).max().unwrap_or_default();
    let header = format!("{:<names$}  {:<width$}  AFTER", "VIEW", "BEFORE", width = befores + 7);
    screen.show(format_args!("{}", screen.bold(&header)))?;
    for (before, after) in &rows {
        let before = before.as_ref().map_or_else(
            || format!("{none:<width$}", width = befores + 7),
            |view| view.cell(screen, befores),
        );
        let line = format!("{:<names$}  {before}  {}", after.name, after.cell(screen, afters));
        screen.show(format_args!("{}", line.trim_end()))?;
    }
    screen.show(format_args!(""))?;
    screen.show(format_args!("kept: the client's address; lost: another; -: the pod's, as it should be"))?;
    screen.show(format_args!("downstream_… and upstream_…: fields of {}'s access log", sidecar.name()))?;
    if sidecar == Sidecar::Haproxy {
        screen.show(format_args!(
            "HAProxy takes no IPv6 by REDIRECT. Where it connects with the client's address, it logs the\n\
             client's port as well, not the port that the connection has."
        ))?;
    }
    Ok(())
}

/// Fails with the view that does not show what it should: the client's address everywhere after, and
/// nowhere past the sidecar before, or else the comparison means nothing.
pub fn verdict(before: &Seen, after: &Seen) -> Result<()> {
    for view in [Some(&before.v4), before.v6.as_ref()].into_iter().flatten().flat_map(list) {
        ensure!(
            view.whose != Whose::ClientToApplication || !view.is_right(),
            "before: {} already shows the client's address {}, so that there is nothing to compare with",
            view.name,
            view.expected
        );
    }
    for view in [Some(&after.v4), after.v6.as_ref()].into_iter().flatten().flat_map(list) {
        let whose = if view.whose == Whose::Pod { "pod's" } else { "client's" };
        ensure!(
            view.is_right(),
            "after: {} shows {}, not the {whose} address {}",
            view.name,
            view.ip,
            view.expected
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::views::{AccessLog, Evidence};

    const CLIENT: &str = "10.133.1.1:40000";
    const POD: &str = "10.133.2.1:8000";
    const HIDING: &str = "127.0.0.6:40000";

    fn seen(origin: &str, peer: &str, upstream_local: &str) -> Seen {
        let [client, destination] = [CLIENT, POD].map(|address| address.parse().unwrap());
        let log = AccessLog {
            downstream_remote: client,
            downstream_local: destination,
            upstream_local: upstream_local.parse().unwrap(),
            upstream_host: destination,
        };
        let origin = origin.parse().unwrap();
        let peer = peer.parse().unwrap();
        Seen { v4: Views { client, destination, origin, peer, log, evidence: Evidence::default() }, v6: None }
    }

    #[test]
    fn the_verdict_names_the_view_that_fails() {
        let lost = || seen("127.0.0.6", HIDING, HIDING);
        let kept = || seen("10.133.1.1", CLIENT, CLIENT);
        verdict(&lost(), &kept()).unwrap();
        let says = |before: Seen, after: Seen| verdict(&before, &after).unwrap_err().to_string();
        assert_eq!(
            says(lost(), seen("10.133.1.1", HIDING, CLIENT)),
            "after: application's socket shows 127.0.0.6, not the client's address 10.133.1.1"
        );
        assert!(says(lost(), lost()).starts_with("after: application's answer"));
        assert!(
            says(seen("127.0.0.6", HIDING, CLIENT), kept()).starts_with("before: upstream_local_address")
        );
        assert!(says(kept(), kept()).starts_with("before: application's answer"));
    }
}

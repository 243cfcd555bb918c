//! The sidecar without and with srcip, side by side.

use std::net::SocketAddr;

use anyhow::Result;

use crate::{
    Stage,
    before_after::Seen,
    sidecar::Sidecar,
    table::{self, View, Whose},
    views::Views,
};

/// The views of one connection, in the order of the table.
fn list(views: &Views) -> [View; 6] {
    use Whose::{Client, Known, Pod};
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
        whose: Client,
    };
    [
        origin,
        socket("application's socket", views.peer, Client),
        socket("downstream_remote_address", log.downstream_remote, Known),
        socket("downstream_local_address", log.downstream_local, Pod),
        socket("upstream_local_address", log.upstream_local, Client),
        socket("upstream_host", log.upstream_host, Pod),
    ]
}

/// Prints the views of both set-ups side by side.
pub fn print(stage: &Stage<'_>, before: &Seen, after: &Seen) -> Result<()> {
    let Stage { sidecar, screen, .. } = *stage;
    let mut rows = Vec::new();
    rows.extend(list(&before.v4).map(Some).into_iter().zip(list(&after.v4)));
    if let Some(after) = &after.v6 {
        let before = before.v6.as_ref().map_or([const { None }; 6], |views| list(views).map(Some));
        // One line per witness is enough for the second family.
        let both = before.into_iter().zip(list(after));
        rows.extend(both.filter(|(_, view)| view.whose == Whose::Client));
    }
    table::print(screen, &rows)?;
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

/// Fails with the view that does not show what it should.
pub fn verdict(before: &Seen, after: &Seen) -> Result<()> {
    let all = |seen: &Seen| {
        [Some(&seen.v4), seen.v6.as_ref()].into_iter().flatten().flat_map(list).collect::<Vec<_>>()
    };
    table::verdict(&all(before), &all(after))
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

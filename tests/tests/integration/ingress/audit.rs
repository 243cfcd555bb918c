//! What `srcip audit` prints for a Service under `Cluster`, carried out where agents run: the client is there.

use srcip_tests::{Family, cluster::node::PodNetwork};

use super::NorthSouth;
use crate::audit::{assert_clean, audit, commands, only_finding};

#[test]
fn the_cure_of_a_masqueraded_service_cures() {
    for family in Family::BOTH {
        let mut test = NorthSouth::new(PodNetwork::Bridge, &[1], |service| service);
        test.update(|service| service.annotated = false);
        let srcip = test.cluster.world.srcip();
        let options = format!("--manifests {}", test.agents.manifests().display());
        let node = test.cluster.node(2).host.address(family);
        let report = audit(&srcip, &options, || {
            for _ in 0..3 {
                assert_eq!(test.ask_by(2, family).unwrap().peer.ip(), node, "masqueraded");
            }
        });
        let finding = only_finding(&report, &test.pods[0]);
        assert_eq!((finding["cause"].as_str(), finding["node"].as_str()), (Some("snat"), Some("n2")));

        let commands = commands(&finding);
        let annotate =
            commands.iter().find(|command| command.contains(" annotate ")).expect("the second cure");
        assert_eq!(annotate, "kubectl -n shop annotate service web --overwrite srcip.io/north-south=true");
        test.update(|service| service.annotated = true);
        let report = audit(&srcip, &options, || {
            for node in [1, 2, 3] {
                test.assert_kept_by(node, family);
            }
        });
        assert_clean(&report, &test.pods[0], "north-south");
    }
}

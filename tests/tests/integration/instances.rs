//! Two instances on one kernel do not know of each other.

use srcip_tests::{
    Family, client, peer,
    proxy::{Kind, Proxy},
};

use crate::scenario::{Engine, PORT, Scenario};

crate::engines!(do_not_disturb_each_other);

fn do_not_disturb_each_other(engine: Engine) {
    let mut scenario = Scenario::http(engine, Kind::Haproxy);
    let other = scenario.world.host("other").unwrap();
    let _application = peer::application(&other, &["[::]:8000"]).unwrap();
    let _proxy = Proxy::start(&other, Kind::Nginx).unwrap();
    let second = scenario.world.srcip_instance("second");
    second.attach(&other, engine.option()).unwrap();

    let ask_other = || {
        let seen = client::ask_once(&scenario.client, other.socket(Family::V6, PORT)).unwrap();
        assert_eq!(seen.peer.ip(), scenario.client.address(Family::V6));
        seen.proxied
    };
    scenario.assert_kept(Family::V4);
    assert!(ask_other());
    for (srcip, pod) in [(&scenario.srcip, &scenario.pod), (&second, &other)] {
        let status = srcip.run("status -o json").unwrap();
        let status: serde_json::Value = serde_json::from_str(&status).unwrap();
        let attachments = status["attachments"].as_array().unwrap();
        assert_eq!(attachments.len(), 1);
        assert_eq!(attachments[0]["name"], pod.name());
        assert_eq!(attachments[0]["counters"]["steered"], 1);
        assert_eq!(attachments[0]["counters"]["upstream"], 1);
    }
    // One goes altogether, the other does not notice.
    scenario.srcip.run("cleanup").unwrap();
    scenario.assert_direct(Family::V4);
    assert!(ask_other());
    scenario.attach("");
    second.run("detach --all --now").unwrap();
    assert!(!ask_other());
    scenario.assert_kept(Family::V4);
}

use anyhow::Result;
use srcip_tests::{
    Family, client, peer,
    proxy::{Kind, Proxy},
    world::World,
};

#[test]
fn first() -> Result<()> {
    let mut world = World::new()?;
    let client = world.host("client")?;
    let pod = world.host("pod")?;
    let _application = peer::application(&pod, &["[::]:8000"])?;
    for kind in Kind::HTTP {
        for engine in ["sk-lookup", "tc"] {
            let proxy = Proxy::start(&pod, kind)?;
            let srcip = world.srcip();
            srcip.attach(&pod, &format!("--engine {engine}"))?;
            for family in Family::BOTH {
                let seen = client::ask_once(&client, pod.socket(family, 8000));
                eprintln!("{kind:?} {engine} {family:?} {:?}", seen.map_err(|e| format!("{e:#}")));
            }
            srcip.detach(&pod, "--now")?;
            eprintln!("LOG {}", proxy.process().log());
            proxy.kill();
            pod.wait_closed(15006)?;
        }
    }
    Ok(())
}

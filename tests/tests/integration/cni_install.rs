//! The CNI plugin in the configuration of a node: killed while it is installed, and against others.

use std::{
    fs,
    path::PathBuf,
    process::Command,
    time::{Duration, Instant},
};

use serde_json::Value;
use srcip_tests::{process::Process, srcip::binary, wait_until, world::World};
use srcip_user::cni::{
    config::Settings,
    install::Installer,
    keep::{Installation, Keeper},
};

const LIST: &str = r#"{
  "cniVersion": "1.0.0",
  "name": "net",
  "plugins": [ {"type": "bridge"}, {"type": "portmap"} ]
}
"#;

/// A node's directories.
struct Node {
    installer: Installer,
    world: World,
}

impl Node {
    fn new() -> Self {
        let world = World::new().unwrap();
        let [conf_dir, bin_dir] = ["net.d", "bin"].map(|name| world.directory().join(name));
        fs::create_dir(&conf_dir).unwrap();
        let plugin = world.directory().join("plugin");
        // Large enough for a kill to come in between.
        fs::write(&plugin, vec![b'x'; 4 << 20]).unwrap();
        Self { installer: Installer { conf_dir, bin_dir, plugin, settings: Settings::default() }, world }
    }

    fn list(&self) -> PathBuf {
        self.installer.conf_dir.join("10-net.conflist")
    }

    /// As another component does it.
    fn write_list(&self) {
        let temporary = self.world.directory().join("new");
        fs::write(&temporary, LIST).unwrap();
        fs::rename(&temporary, self.list()).unwrap();
    }

    fn is_chained(&self) -> bool {
        let text = fs::read_to_string(self.list()).unwrap();
        let list: Value = serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"));
        let plugins = list["plugins"].as_array().unwrap();
        let ours = plugins.iter().filter(|plugin| plugin["type"] == "srcip-cni").count();
        assert!(ours <= 1 && plugins.len() == 2 + ours, "{text}");
        ours == 1
    }

    fn wait_chained(&self) {
        wait_until("chained", || self.is_chained());
    }

    /// A process that installs and removes without end.
    fn busy(&self) -> Process {
        let mut command = Command::new(binary("srcip-peer"));
        command.arg("install-cni");
        command.args([&self.installer.conf_dir, &self.installer.bin_dir, &self.installer.plugin]);
        Process::start("install", command, &self.world.directory().join("install.log")).unwrap()
    }
}

/// Whoever is killed while he installs or removes leaves a list that can be read, with the plugin or without,
/// and never one whose plugin is missing.
#[test]
fn killed_at_any_point() {
    let node = Node::new();
    node.write_list();
    for round in 0..60_u64 {
        let mut busy = node.busy();
        busy.wait_until("at work", |busy| busy.log().contains("at work")).unwrap();
        std::thread::sleep(Duration::from_micros(round * 977 % 23_000));
        busy.kill();
        let binary = node.installer.binary();
        if node.is_chained() {
            assert_eq!(fs::metadata(&binary).unwrap().len(), 4 << 20);
        } else if let Ok(metadata) = fs::metadata(&binary) {
            assert_eq!(metadata.len(), 4 << 20);
        }
    }
    node.installer.ensure().unwrap();
    assert!(node.is_chained());
    node.installer.remove().unwrap();
    assert_eq!(fs::read_to_string(node.list()).unwrap(), LIST);
    for (directory, count) in [(&node.installer.conf_dir, 1), (&node.installer.bin_dir, 0)] {
        assert_eq!(fs::read_dir(directory).unwrap().count(), count);
    }
}

/// What others do to the list, to the plugin, and to the directory is undone soon; whoever does not stop is
/// not raced.
#[test]
fn kept_against_others() {
    let node = Node::new();
    let keeper = Keeper::start(node.installer.clone()).unwrap();
    let wait = |what: &str, is_it: &dyn Fn(&Installation) -> bool| {
        wait_until(what, || is_it(&keeper.installation()));
    };
    wait("no network yet", &|is| is.words.contains("no network is configured"));
    node.write_list();
    node.wait_chained();
    wait("chained", &|is| is.is_chained && is.repairs == 0);
    let began = Instant::now();
    node.write_list();
    node.wait_chained();
    // Not only when it looks anyway, once a minute.
    assert!(began.elapsed() < Duration::from_secs(30), "{:?}", began.elapsed());
    wait("repaired", &|is| is.repairs == 1);
    // Somebody writes it again and again: each repair waits for longer.
    wait_until("three more repairs", || {
        node.write_list();
        keeper.installation().repairs >= 4
    });
    // One second after the first, two after the second, four after the third.
    assert!(began.elapsed() >= Duration::from_secs(7), "{:?}", began.elapsed());
    // And in the end he has lost.
    node.wait_chained();
    drop(keeper);
    assert!(node.is_chained(), "an agent that ends leaves the plugin");
    node.installer.remove().unwrap();
    assert_eq!(fs::read_to_string(node.list()).unwrap(), LIST);
}

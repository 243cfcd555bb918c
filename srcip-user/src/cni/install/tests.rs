use std::os::unix::fs::symlink;

use serde_json::Value;

use super::*;

const LIST: &str = r#"{
    "cniVersion": "1.0.0",
    "name": "net",
    "plugins": [
        {"type": "bridge", "mtu": 1450},
        {"type": "portmap"}
    ]
}
"#;
const SINGLE: &str = r#"{"cniVersion": "0.4.0", "name": "net", "type": "bridge"}"#;

/// Directories as a node has them.
struct Node {
    root: tempfile::TempDir,
    installer: Installer,
}

impl Node {
    fn new() -> Self {
        let root = tempfile::tempdir().unwrap();
        let [conf_dir, bin_dir] = ["net.d", "bin"].map(|name| root.path().join(name));
        fs::create_dir(&conf_dir).unwrap();
        let plugin = root.path().join("srcip-cni-of-the-image");
        fs::write(&plugin, "the plugin").unwrap();
        let installer = Installer { conf_dir, bin_dir, plugin, settings: Settings::default() };
        Self { root, installer }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.installer.conf_dir.join(name)
    }

    fn write(&self, name: &str, text: &str) {
        fs::write(self.path(name), text).unwrap();
    }

    fn read(&self, name: &str) -> String {
        fs::read_to_string(self.path(name)).unwrap()
    }

    fn names(&self) -> Vec<String> {
        let entries = fs::read_dir(&self.installer.conf_dir).unwrap();
        let mut names: Vec<_> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    fn ensure(&self) -> (String, bool) {
        match self.installer.ensure().unwrap() {
            Outcome::Chained { file, changed } => {
                (file.file_name().unwrap().to_str().unwrap().to_owned(), changed)
            }
            Outcome::Waiting(why) => (why, false),
        }
    }
}

fn types(text: &str) -> Vec<String> {
    let value: Value = serde_json::from_str(text).unwrap();
    let plugins = value["plugins"].as_array().unwrap();
    plugins.iter().map(|plugin| plugin["type"].as_str().unwrap().to_owned()).collect()
}

#[test]
fn installed_once_kept_and_removed_without_a_trace() {
    let node = Node::new();
    node.write("10-net.conflist", LIST);
    fs::set_permissions(node.path("10-net.conflist"), fs::Permissions::from_mode(0o600)).unwrap();
    assert_eq!(node.ensure(), ("10-net.conflist".to_owned(), true));
    assert_eq!(types(&node.read("10-net.conflist")), ["bridge", "portmap", PLUGIN]);
    let metadata = fs::metadata(node.path("10-net.conflist")).unwrap();
    assert_eq!(metadata.mode() & 0o7777, 0o600);
    let binary = node.installer.binary();
    assert_eq!(fs::read_to_string(&binary).unwrap(), "the plugin");
    assert_eq!(fs::metadata(&binary).unwrap().mode() & 0o7777, 0o755);
    // Nothing is written twice.
    assert_eq!(node.ensure(), ("10-net.conflist".to_owned(), false));
    assert_eq!(fs::metadata(node.path("10-net.conflist")).unwrap().ino(), metadata.ino());

    // Another release, of the same length, and other settings.
    fs::write(&node.installer.plugin, "The plugin").unwrap();
    assert!(node.ensure().1);
    assert_eq!(fs::read_to_string(&binary).unwrap(), "The plugin");
    let mut installer = node.installer.clone();
    installer.settings.timeout_seconds = 3;
    assert!(matches!(installer.ensure().unwrap(), Outcome::Chained { changed: true, .. }));
    assert!(node.read("10-net.conflist").contains("\"timeoutSeconds\": 3"));

    assert_eq!(node.installer.remove().unwrap(), [node.path("10-net.conflist"), binary.clone()]);
    assert_eq!(node.read("10-net.conflist"), LIST);
    assert_eq!(fs::metadata(node.path("10-net.conflist")).unwrap().mode() & 0o7777, 0o600);
    assert!(!binary.exists());
    assert_eq!(node.names(), ["10-net.conflist"]);
    assert!(node.installer.remove().unwrap().is_empty());
}

#[test]
fn what_others_do_to_the_file_is_repaired() {
    let node = Node::new();
    assert!(node.ensure().0.contains("no network is configured"));
    node.write("10-net.conflist", LIST);
    node.ensure();
    // Rewritten in place, and replaced by another file.
    node.write("10-net.conflist", LIST);
    assert!(node.ensure().1);
    node.write("10-net.conflist.new", &LIST.replace("1450", "9000"));
    fs::rename(node.path("10-net.conflist.new"), node.path("10-net.conflist")).unwrap();
    assert!(node.ensure().1);
    let text = node.read("10-net.conflist");
    assert!(text.contains("9000") && types(&text).len() == 3);
    // Another network comes before it, with a plugin of its own at the end.
    node.write("05-first.conflist", &LIST.replace("portmap", "istio-cni"));
    assert_eq!(node.ensure(), ("05-first.conflist".to_owned(), true));
    fs::remove_file(node.installer.binary()).unwrap();
    assert!(node.ensure().1 && node.installer.binary().exists());
    node.installer.remove().unwrap();
    assert_eq!(node.read("05-first.conflist"), LIST.replace("portmap", "istio-cni"));
    assert_eq!(node.read("10-net.conflist"), LIST.replace("1450", "9000"));
}

#[test]
fn a_single_plugin_gets_a_list_around_it() {
    for name in ["10-net.conf", "10-net.json"] {
        let node = Node::new();
        node.write("20-other.conflist", LIST);
        node.write(name, SINGLE);
        assert_eq!(node.ensure(), ("10-net-srcip.conflist".to_owned(), true));
        assert_eq!(types(&node.read("10-net-srcip.conflist")), ["bridge", PLUGIN]);
        // The runtime takes the first.
        assert_eq!(node.names(), ["10-net-srcip.conflist", name, "20-other.conflist"]);
        assert!(!node.ensure().1);
        // What it is around changes, gets a list of its own, or goes.
        node.write(name, &SINGLE.replace("bridge", "ptp"));
        assert!(node.ensure().1);
        assert_eq!(types(&node.read("10-net-srcip.conflist")), ["ptp", PLUGIN]);
        node.write("05-first.conflist", LIST);
        assert_eq!(node.ensure().0, "05-first.conflist");
        assert_eq!(node.names(), ["05-first.conflist", name, "20-other.conflist"]);
        fs::remove_file(node.path("05-first.conflist")).unwrap();
        assert_eq!(node.ensure().0, "10-net-srcip.conflist");
        node.installer.remove().unwrap();
        assert_eq!(node.names(), [name, "20-other.conflist"]);
        assert_eq!(node.read("20-other.conflist"), LIST);
        node.ensure();
        fs::remove_file(node.path(name)).unwrap();
        assert_eq!(node.ensure().0, "20-other.conflist");
        assert_eq!(node.names(), ["20-other.conflist"]);
    }
}

#[test]
fn what_cannot_be_read_is_left_alone() {
    let node = Node::new();
    node.write("01-broken.conflist", "{\"plugins\": [{\"type\": \"bridge\"}]");
    node.write("02-long.conflist", &" ".repeat(2 << 20));
    node.write("03-binary.conf", "\u{0}");
    node.write("04-empty.conflist", "");
    fs::create_dir(node.path("05-directory.conflist")).unwrap();
    nix::unistd::mkfifo(&node.path("06-fifo.conf"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    symlink("/nowhere", node.path("07-dangling.conflist")).unwrap();
    fs::write(node.path("08-latin.conflist"), b"{\"plugins\":[{\"type\":\"\xe4\"}]}").unwrap();
    node.write("09-backup.conflist.bak", LIST);
    node.write("10-net.conflist", LIST);
    let before = node.names();
    assert_eq!(node.ensure().0, "10-net.conflist");
    assert_eq!(node.names(), before);
    assert_eq!(node.read("01-broken.conflist"), "{\"plugins\": [{\"type\": \"bridge\"}]");
    node.installer.remove().unwrap();
    assert_eq!((node.names(), node.read("10-net.conflist")), (before, LIST.to_owned()));
}

#[test]
fn what_cannot_be_changed_is_said() {
    let node = Node::new();
    let elsewhere = node.root.path().join("elsewhere.conflist");
    fs::write(&elsewhere, LIST).unwrap();
    symlink(&elsewhere, node.path("10-net.conflist")).unwrap();
    let error = node.installer.ensure().unwrap_err().to_string();
    assert!(error.contains("10-net.conflist is left alone") && error.contains("symbolic link"), "{error}");
    assert_eq!(fs::read_to_string(&elsewhere).unwrap(), LIST);
    fs::remove_file(node.path("10-net.conflist")).unwrap();
    node.write("10-net.conflist", &LIST.replace("1.0.0", "3.0.0"));
    let error = node.installer.ensure().unwrap_err().to_string();
    assert!(error.contains("version \"3.0.0\""), "{error}");

    // Its entry is in a file that cannot be read any more: without the binary no pod would start.
    node.write("10-net.conflist", LIST);
    node.ensure();
    let broken = node.read("10-net.conflist").replace("\"name\"", "name");
    node.write("10-net.conflist", &broken);
    let error = node.installer.remove().unwrap_err().to_string();
    assert!(error.contains("take srcip-cni out of it by hand"), "{error}");
    assert!(node.installer.binary().exists());
    fs::remove_file(&node.installer.plugin).unwrap();
    let error = node.installer.ensure().unwrap_err().to_string();
    assert!(error.contains("the plugin's binary") && error.contains("of-the-image"), "{error}");
}

#[test]
fn what_a_killed_agent_left_goes() {
    let node = Node::new();
    node.write("10-net.conflist", LIST);
    node.write(".srcip-abc.tmp", "half");
    fs::create_dir_all(&node.installer.bin_dir).unwrap();
    fs::write(node.installer.bin_dir.join(".srcip-abc.tmp"), "half").unwrap();
    node.ensure();
    assert_eq!(node.names(), ["10-net.conflist"]);
    assert_eq!(fs::read_dir(&node.installer.bin_dir).unwrap().count(), 1);
}

#[test]
fn many_agents_and_somebody_else_at_once() {
    let node = Node::new();
    node.write("10-net.conflist", LIST);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..25 {
                    // Overtaken is all that may happen.
                    match node.installer.ensure() {
                        Ok(_) | Err(InstallError::Overtaken(_)) => {}
                        Err(error) => panic!("{error}"),
                    }
                }
            });
        }
        for _ in 0..25 {
            let temporary = node.root.path().join("new");
            fs::write(&temporary, LIST).unwrap();
            fs::rename(&temporary, node.path("10-net.conflist")).unwrap();
        }
    });
    node.ensure();
    assert_eq!(types(&node.read("10-net.conflist")), ["bridge", "portmap", PLUGIN]);
    node.installer.remove().unwrap();
    assert_eq!(
        (node.names(), node.read("10-net.conflist")),
        (vec!["10-net.conflist".to_owned()], LIST.to_owned())
    );
}

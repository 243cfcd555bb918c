use std::{
    cell::Cell,
    collections::{BTreeMap, VecDeque},
    sync::atomic::{AtomicUsize, Ordering},
    thread,
};

use serde_json::json;

use super::*;
use crate::{
    dataplane::error::{Error, Result},
    northsouth::{
        Changes,
        desired::ReturnPath,
        objects::{Listed, node::NodeInfo, service::ServiceInfo},
        select::Selection,
    },
};

/// What one attempt comes to.
enum Outcome {
    Done,
    Partly,
    NoUplink,
    Failed,
}

/// A data plane that does as it is told to, and remembers.
#[derive(Default)]
struct Fake {
    outcomes: VecDeque<Outcome>,
    applied: Arc<AtomicUsize>,
}

impl Programmer for Fake {
    fn apply(&mut self, _: &Desired) -> Result<Changes> {
        self.applied.fetch_add(1, Ordering::Relaxed);
        match self.outcomes.pop_front().unwrap_or(Outcome::Done) {
            Outcome::Done => Ok(Changes::default()),
            Outcome::Partly => Ok(Changes { problems: vec!["no device".to_owned()], ..Changes::default() }),
            Outcome::NoUplink => {
                Ok(Changes { missing_uplinks: vec!["no eth0".to_owned()], ..Changes::default() })
            }
            Outcome::Failed => Err(Error::HostNetns("/proc/1/ns/net".into())),
        }
    }

    fn counters(&self) -> Result<BTreeMap<&'static str, u64>> {
        Ok(BTreeMap::new())
    }
}

/// A node where the programs cannot be loaded at first.
struct FakeNode {
    failures: Cell<usize>,
    outcomes: Cell<VecDeque<Outcome>>,
    applied: Arc<AtomicUsize>,
    found: Arc<AtomicUsize>,
}

impl Node for FakeNode {
    type Programmer = Fake;

    fn open(&self) -> anyhow::Result<Fake> {
        if let Some(left) = self.failures.get().checked_sub(1) {
            self.failures.set(left);
            anyhow::bail!("the verifier refuses them");
        }
        Ok(Fake { outcomes: self.outcomes.take(), applied: Arc::clone(&self.applied) })
    }

    fn here(&self) -> anyhow::Result<Here> {
        self.found.fetch_add(1, Ordering::Relaxed);
        let return_path = ReturnPath::Direct;
        Ok(Here { node: "n1".into(), addresses: vec![], uplinks: vec![], return_path })
    }
}

struct Test {
    controller: Controller<FakeNode>,
    checks: watch::Receiver<Checks>,
    board: Board,
    applied: Arc<AtomicUsize>,
    found: Arc<AtomicUsize>,
}

fn test(outcomes: impl IntoIterator<Item = Outcome>) -> Test {
    let (sender, checks) = watch::channel(Checks::default());
    let (board, applied) = (Board::default(), Arc::<AtomicUsize>::default());
    let found = Arc::<AtomicUsize>::default();
    let node = FakeNode {
        failures: Cell::new(0),
        outcomes: Cell::new(outcomes.into_iter().collect()),
        applied: Arc::clone(&applied),
        found: Arc::clone(&found),
    };
    Test { controller: Controller::new(node, sender, board.clone()), checks, board, applied, found }
}

impl Test {
    fn applied(&self) -> usize {
        self.applied.load(Ordering::Relaxed)
    }
}

/// One node, and a Service with this NodePort.
fn objects(node_port: u16) -> Objects {
    let service = json!({
        "metadata": {"namespace": "shop", "name": "web", "annotations": {"srcip.io/north-south": "true"}},
        "spec": {
            "type": "LoadBalancer", "externalTrafficPolicy": "Local", "healthCheckNodePort": 31000,
            "ports": [{"port": 80, "nodePort": node_port}, {"port": 81, "protocol": "SCTP"}],
        },
    });
    let service = serde_json::from_value(service).unwrap();
    let service = ServiceInfo::from_object(&service, &Selection::default()).unwrap().unwrap();
    let node = NodeInfo { name: "n1".into(), internal: vec!["10.0.0.1".parse().unwrap()], external: vec![] };
    Objects {
        listed: Listed::ALL,
        services: [(service.name.clone(), Ok(Arc::new(service)))].into(),
        nodes: [(Arc::clone(&node.name), Arc::new(node))].into(),
        ..Objects::default()
    }
}

#[test]
fn nothing_is_touched_before_all_is_known() {
    let mut test = test([]);
    assert_eq!(
        test.controller.step(&Objects { listed: Listed { nodes: false, ..Listed::ALL }, ..objects(30080) }),
        None
    );
    assert_eq!(test.applied(), 0);
    assert_eq!(*test.checks.borrow(), Checks::default());
}

#[test]
fn only_a_difference_is_programmed() {
    let mut test = test([]);
    for _ in 0..3 {
        assert_eq!(test.controller.step(&objects(30080)), None);
    }
    assert_eq!(test.applied(), 1);
    assert_eq!(test.controller.step(&objects(30081)), None);
    assert_eq!((test.applied(), test.board.standing().applied), (2, 2));
    assert!(test.checks.borrow().healthy && test.checks.borrow().ports.contains_key(&31000));
    let standing = test.board.standing();
    assert_eq!(standing.plan.desired.services.len(), 1);
    assert_eq!(standing.plan.problems.len(), 1, "the port for SCTP is told: {standing:?}");
}

#[test]
fn what_fails_is_tried_again_ever_later_and_load_balancers_are_told() {
    let mut test = test([Outcome::Failed, Outcome::NoUplink, Outcome::Failed]);
    let pauses = [1, 2, 4].map(|seconds| Some(Duration::from_secs(seconds)));
    for pause in pauses {
        assert_eq!(test.controller.step(&objects(30080)), pause);
        assert!(!test.checks.borrow().healthy);
        assert_eq!(test.board.standing().trouble.len(), 1);
    }
    assert_eq!(test.controller.step(&objects(30080)), None);
    assert!(test.checks.borrow().healthy);
    assert_eq!(test.board.standing().trouble, Vec::<String>::new());
    assert_eq!(test.applied(), 4);
    // An uplink that went may have come back as another device.
    assert_eq!(test.found.load(Ordering::Relaxed), 2);

    let programmer = test.controller.programmer.as_mut().unwrap();
    programmer.outcomes.extend((0..10).map(|_| Outcome::Failed));
    let pauses: Vec<_> = (0..10).filter_map(|_| test.controller.step(&objects(30081))).collect();
    assert_eq!((pauses[0], pauses[9]), (FIRST_RETRY, LAST_RETRY));
}

/// Whoever may make a Service could otherwise take all others off the load balancers.
#[test]
fn one_services_trouble_is_not_the_nodes() {
    let mut test = test([Outcome::Partly]);
    assert_eq!(test.controller.step(&objects(30080)), Some(FIRST_RETRY));
    let standing = test.board.standing();
    assert_eq!((standing.trouble.len(), standing.left_out.len()), (0, 1));
    assert!(test.checks.borrow().healthy);
    assert_eq!(test.controller.step(&objects(30080)), None);
    assert_eq!(test.board.standing().left_out, Vec::<String>::new());
}

#[test]
fn programs_that_do_not_load_are_tried_again() {
    let mut test = test([]);
    test.controller.node.failures.set(2);
    for pause in [1, 2] {
        // Also before the objects are known: it is told at once.
        assert_eq!(test.controller.step(&Objects::default()), Some(Duration::from_secs(pause)));
        assert_eq!(test.board.standing().trouble, ["the verifier refuses them"]);
    }
    assert_eq!(test.controller.step(&Objects::default()), None);
    assert_eq!(test.board.standing().trouble, Vec::<String>::new());
    assert_eq!(test.applied(), 0);
    assert_eq!(test.controller.step(&objects(30080)), None);
    assert_eq!(test.applied(), 1);
}

/// Runs it on a thread of its own.
fn run(
    test: Test,
    objects: watch::Receiver<Arc<Objects>>,
    stopped: oneshot::Receiver<()>,
) -> thread::JoinHandle<()> {
    thread::spawn(move || test.controller.run(objects, stopped).unwrap())
}

fn wait_until(what: &str, mut is_so: impl FnMut() -> bool) {
    for _ in 0..1000 {
        if is_so() {
            return;
        }
        thread::sleep(Duration::from_millis(10));
    }
    panic!("not in time: {what}");
}

#[test]
fn it_follows_its_objects_and_ends_with_their_source() {
    let test = test([Outcome::Failed]);
    let applied = Arc::clone(&test.applied);
    let (sender, receiver) = watch::channel(Arc::new(Objects::default()));
    let (_stop, stopped) = oneshot::channel();
    let running = run(test, receiver, stopped);
    sender.send_replace(Arc::new(objects(30080)));
    wait_until("once for the change, once more because that failed", || applied.load(Ordering::Relaxed) == 2);
    sender.send_replace(Arc::new(objects(30081)));
    wait_until("once for the next", || applied.load(Ordering::Relaxed) == 3);
    drop(sender);
    wait_until("its end", || running.is_finished());
    running.join().unwrap();
}

#[test]
fn it_ends_when_told_to() {
    let (_sender, receiver) = watch::channel(Arc::new(objects(30080)));
    let (stop, stopped) = oneshot::channel();
    let running = run(test([]), receiver, stopped);
    drop(stop);
    wait_until("its end", || running.is_finished());
    running.join().unwrap();
}

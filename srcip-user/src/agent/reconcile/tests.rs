//! Against a cluster that knows the truth, and a data plane that fails at times.

use proptest::prelude::*;

use super::*;

/// How to steer, in one byte.
type Wanted = u8;

/// What happens to pods. Pods have numbers, and so do network namespaces, which are never used twice.
#[derive(Clone, Debug)]
enum Event {
    /// A pod appears, or is replaced by another one with the same name; its sandbox comes with it, or later.
    Create { name: u8, wanted: Option<Wanted>, with_sandbox: bool },
    /// The sandbox of a pod is there, or is made anew.
    Sandbox { name: u8 },
    /// Somebody edits the pod.
    Edit { name: u8, wanted: Option<Wanted> },
    /// The object is deleted; the sandbox may stay for a while.
    Delete { name: u8 },
    /// A network namespace goes.
    NetnsGone { nth: u8 },
    /// The plugin attaches a pod of which the source has not told.
    Announce { name: u8 },
    /// Announcements have waited long enough for the source to tell of their pods.
    Expire,
    /// The source tells how things are now. Until then it tells how they were: that is a lost event.
    Tell,
    /// The agent starts anew: it knows nothing until it is told.
    Restart,
    /// Somebody removes a program.
    Break { nth: u8 },
    /// The agent looks, and acts; the actions whose bit is set fail, half-way.
    Act { failing: u16 },
}

#[derive(Clone, Debug)]
struct Pod {
    uid: PodUid,
    wanted: Option<Wanted>,
    netns: Option<NetnsCookie>,
}

/// The truth, what the agent was told of it, and what is in the kernel.
#[derive(Default)]
struct Model {
    pods: BTreeMap<u8, Pod>,
    told: Option<BTreeMap<u8, Pod>>,
    alive: BTreeSet<NetnsCookie>,
    announced: BTreeSet<PodUid>,
    kernel: BTreeMap<NetnsCookie, Attachment<Option<Wanted>>>,
    next: u64,
}

fn name(number: u8) -> PodName {
    PodName::new("default", &format!("web-{number}")).unwrap()
}

impl Model {
    fn fresh(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    fn sandbox(&mut self) -> NetnsCookie {
        let netns = NetnsCookie(self.fresh());
        self.alive.insert(netns);
        netns
    }

    fn happen(&mut self, event: &Event) -> Result<(), TestCaseError> {
        match *event {
            Event::Create { name, wanted, with_sandbox } => {
                let uid = PodUid::new(&format!("uid-{}", self.fresh())).unwrap();
                let netns = with_sandbox.then(|| self.sandbox());
                self.pods.insert(name, Pod { uid, wanted, netns });
            }
            Event::Sandbox { name } => {
                let netns = self.sandbox();
                if let Some(pod) = self.pods.get_mut(&name) {
                    pod.netns = Some(netns);
                }
            }
            Event::Edit { name, wanted } => {
                if let Some(pod) = self.pods.get_mut(&name) {
                    pod.wanted = wanted;
                }
            }
            Event::Delete { name } => drop(self.pods.remove(&name)),
            Event::NetnsGone { nth } => {
                if let Some(&netns) = self.alive.iter().nth(nth.into()) {
                    self.alive.remove(&netns);
                }
            }
            Event::Announce { name: number } => {
                // As the plugin's request does: it is about the pod as it is, whatever the source has told.
                let Some(Pod { uid, wanted: Some(wanted), netns: Some(netns) }) = self.pods.get(&number)
                else {
                    return Ok(());
                };
                let attachment = Attachment {
                    uid: uid.clone(),
                    name: name(number),
                    wanted: Some(*wanted),
                    condition: Condition::Steering,
                };
                self.announced.insert(uid.clone());
                // A name is taken once.
                self.kernel.retain(|_, other| other.name != attachment.name);
                self.kernel.insert(*netns, attachment);
            }
            Event::Expire => self.announced.clear(),
            Event::Tell => {
                self.announced.retain(|uid| !self.pods.values().any(|pod| pod.uid == *uid));
                self.told = Some(self.pods.clone());
            }
            Event::Restart => {
                self.told = None;
                self.announced.clear();
            }
            Event::Break { nth } => {
                if let Some(attachment) = self.kernel.values_mut().nth(nth.into())
                    && attachment.condition == Condition::Steering
                {
                    attachment.condition = Condition::Broken;
                }
            }
            Event::Act { failing } => self.act(failing)?,
        }
        for (netns, attachment) in &mut self.kernel {
            if !self.alive.contains(netns) {
                attachment.condition = Condition::Gone;
            }
        }
        Ok(())
    }

    fn world(&self) -> World<Wanted> {
        let told = self.told.iter().flatten();
        // The network namespaces are not told but found, on the spot; one that is gone is not.
        let find = |uid: &PodUid| {
            let pod = self.pods.values().find(|pod| pod.uid == *uid)?;
            pod.netns.filter(|netns| self.alive.contains(netns))
        };
        let desired = told.filter_map(|(&number, pod)| {
            let desired = Desired { name: name(number), netns: find(&pod.uid), wanted: pod.wanted? };
            Some((pod.uid.clone(), desired))
        });
        World {
            synced: self.told.is_some(),
            desired: desired.collect(),
            announced: self.announced.clone(),
            actual: self.kernel.clone(),
        }
    }

    /// Acts once; every action is checked against what the agent can know.
    fn act(&mut self, failing: u16) -> Result<(), TestCaseError> {
        let world = self.world();
        for (i, action) in plan(&world).into_iter().enumerate() {
            let fails = failing >> (i % 16) & 1 == 1;
            match action {
                Action::Attach { uid, name, netns, wanted, .. } => {
                    let desired = world.desired.get(&uid);
                    prop_assert_eq!(desired.map(|desired| desired.wanted), Some(wanted));
                    let owner = self.pods.values().find(|pod| pod.netns == Some(netns));
                    prop_assert!(owner.is_none_or(|owner| owner.uid == uid), "another pod's namespace");
                    // As the data plane has it. An action before this one may have failed.
                    if self.kernel.iter().any(|(other, a)| *other != netns && a.name == name) {
                        continue;
                    }
                    let condition = if fails { Condition::Broken } else { Condition::Steering };
                    self.kernel.insert(netns, Attachment { uid, name, wanted: Some(wanted), condition });
                }
                _ if fails => {}
                Action::Forget(netns) => {
                    let gone = self.kernel.remove(&netns).map(|attachment| attachment.condition);
                    prop_assert_eq!(gone, Some(Condition::Gone));
                }
                Action::Remove(netns) | Action::Finish(netns) => {
                    prop_assert!(self.may_go(&world, netns), "{netns} was in use");
                    self.kernel.remove(&netns);
                }
                Action::Stop(netns) => {
                    prop_assert!(self.may_go(&world, netns), "{netns} was in use");
                    self.kernel.get_mut(&netns).unwrap().condition = Condition::Draining;
                }
            }
        }
        Ok(())
    }

    /// Nobody whom the agent knows of wants this attachment where it is.
    fn may_go(&self, world: &World<Wanted>, netns: NetnsCookie) -> bool {
        let uid = &self.kernel[&netns].uid;
        let elsewhere = |desired: &Desired<Wanted>| desired.netns.is_some_and(|current| current != netns);
        match world.desired.get(uid) {
            Some(desired) => elsewhere(desired),
            None => world.synced && !world.announced.contains(uid),
        }
    }
}

fn event() -> impl Strategy<Value = Event> {
    let pod = 0_u8..4;
    let wanted = || prop::option::of(0_u8..3);
    prop_oneof![
        3 => (pod.clone(), wanted(), any::<bool>())
            .prop_map(|(name, wanted, with_sandbox)| Event::Create { name, wanted, with_sandbox }),
        2 => pod.clone().prop_map(|name| Event::Sandbox { name }),
        2 => (pod.clone(), wanted()).prop_map(|(name, wanted)| Event::Edit { name, wanted }),
        2 => pod.clone().prop_map(|name| Event::Delete { name }),
        2 => (0_u8..6).prop_map(|nth| Event::NetnsGone { nth }),
        2 => pod.prop_map(|name| Event::Announce { name }),
        1 => Just(Event::Expire),
        4 => Just(Event::Tell),
        1 => Just(Event::Restart),
        1 => (0_u8..4).prop_map(|nth| Event::Break { nth }),
        6 => any::<u16>().prop_map(|failing| Event::Act { failing }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]

    #[test]
    fn it_converges_whatever_happened(events in prop::collection::vec(event(), 0..60)) {
        let mut model = Model::default();
        for event in &events {
            model.happen(event)?;
        }
        // Then nothing happens any more, and nothing fails: stop, finish, and attach what waited for a name.
        model.happen(&Event::Expire)?;
        for _ in 0..4 {
            model.happen(&Event::Tell)?;
            model.happen(&Event::Act { failing: 0 })?;
        }
        prop_assert_eq!(plan(&model.world()), []);
        for pod in model.pods.values() {
            let steered: Vec<_> = model.kernel.iter().filter(|(_, a)| a.uid == pod.uid).collect();
            let all_right =
                |a: &Attachment<Option<Wanted>>| a.wanted == pod.wanted && a.condition == Condition::Steering;
            match pod.netns.filter(|netns| model.alive.contains(netns)) {
                Some(netns) if pod.wanted.is_some() => {
                    prop_assert_eq!(steered.iter().map(|(netns, _)| **netns).collect::<Vec<_>>(), [netns]);
                }
                // Only the sandbox before this one may be left, if that is still there.
                _ => prop_assert!(steered.len() <= 1),
            }
            prop_assert!(steered.iter().all(|(_, attachment)| all_right(attachment)));
        }
        let is_known = |uid: &PodUid| model.pods.values().any(|pod| pod.uid == *uid);
        prop_assert!(model.kernel.values().all(|attachment| is_known(&attachment.uid)));
    }

    #[test]
    fn before_the_source_has_told_nothing_is_taken_away(
        events in prop::collection::vec(event(), 0..40),
    ) {
        let mut model = Model::default();
        for event in &events {
            model.happen(event)?;
        }
        model.happen(&Event::Restart)?;
        let before = model.kernel.clone();
        model.happen(&Event::Act { failing: 0 })?;
        let gone = |attachment: &Attachment<Option<Wanted>>| attachment.condition == Condition::Gone;
        let left: BTreeMap<_, _> = before.into_iter().filter(|(_, attachment)| !gone(attachment)).collect();
        prop_assert_eq!(model.kernel, left);
    }
}

#[test]
fn a_pod_that_takes_anothers_name_does_not_wait_for_it_to_drain() {
    let (old, new) = (PodUid::new("old").unwrap(), PodUid::new("new").unwrap());
    let desired = Desired { name: name(0), netns: Some(NetnsCookie(2)), wanted: 1 };
    let attachment = Attachment { uid: old, name: name(0), wanted: Some(1), condition: Condition::Steering };
    let world = World {
        synced: true,
        desired: BTreeMap::from([(new.clone(), desired)]),
        announced: BTreeSet::new(),
        actual: BTreeMap::from([(NetnsCookie(1), attachment)]),
    };
    let attach = Action::Attach { uid: new, name: name(0), netns: NetnsCookie(2), wanted: 1, why: Why::New };
    assert_eq!(plan(&world), [Action::Remove(NetnsCookie(1)), attach]);
}

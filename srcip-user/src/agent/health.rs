//! Whether the agent lives, and whether it has done what it is there for.
//!
//! The two are apart: an agent that cannot reach the API, or a pod that cannot be attached, is not cured by
//! a restart, which would only take longer to come back.

use std::{
    fmt::Write as _,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use crate::text::printable;

/// How many failures are named.
const MAX_NAMED: usize = 10;

/// A question that has been answered: what it is called, and what is wrong, if anything.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Check {
    /// Its name.
    pub name: &'static str,
    /// What is wrong, in words for people.
    pub problem: Option<String>,
}

/// Several checks, as Kubernetes' own components show theirs.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Report {
    /// What the whole is called.
    pub name: &'static str,
    /// The checks.
    pub checks: Vec<Check>,
}

impl Report {
    /// Whether nothing is wrong.
    pub fn is_good(&self) -> bool {
        self.checks.iter().all(|check| check.problem.is_none())
    }

    /// As text: `ok`, or a line for each check if `verbose`, or if one has failed.
    pub fn text(&self, verbose: bool) -> String {
        let good = self.is_good();
        if good && !verbose {
            return "ok".to_owned();
        }
        let mut text = String::new();
        for Check { name, problem } in &self.checks {
            // Writing to a string does not fail.
            let _ = match problem {
                None => writeln!(text, "[+]{name} ok"),
                Some(problem) => writeln!(text, "[-]{name} failed: {}", printable(problem)),
            };
        }
        let _ = writeln!(text, "{} check {}", self.name, if good { "passed" } else { "failed" });
        text
    }
}

#[derive(Debug)]
struct State {
    beat: Instant,
    doing: &'static str,
    synced: bool,
    troubles: Vec<String>,
    unattached: Vec<String>,
    cni: Option<String>,
    north_south: Vec<String>,
}

/// How the agent is. One loop tells, many ask.
#[derive(Debug)]
pub struct Health {
    state: Mutex<State>,
    patience: Duration,
}

impl Health {
    /// Of an agent that has just started; its loop counts as stalled after `patience` without a beat.
    pub fn new(patience: Duration) -> Self {
        let state = State {
            beat: Instant::now(),
            doing: "its start",
            synced: false,
            troubles: Vec::new(),
            unattached: Vec::new(),
            cni: None,
            north_south: Vec::new(),
        };
        Self { state: Mutex::new(state), patience }
    }

    fn with<T>(&self, use_it: impl FnOnce(&mut State) -> T) -> T {
        use_it(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// The loop is alive, and about to do this.
    pub fn beat(&self, doing: &'static str) {
        self.with(|state| (state.beat, state.doing) = (Instant::now(), doing));
    }

    /// As if the last beat had come so much earlier.
    #[cfg(test)]
    pub(super) fn age(&self, by: Duration) {
        self.with(|state| state.beat -= by);
    }

    /// Whether all pods of this node have been seen once. Stays so: an outage of the API takes nothing away.
    pub fn set_synced(&self, synced: bool) {
        self.with(|state| state.synced = synced);
    }

    /// What keeps the agent from its work; nothing if it is at it.
    pub fn set_troubles(&self, troubles: Vec<String>) {
        self.with(|state| state.troubles = troubles);
    }

    /// The pods that are to be steered and could not be attached, each with the reason.
    pub fn set_unattached(&self, unattached: Vec<String>) {
        self.with(|state| state.unattached = unattached);
    }

    /// Why the CNI plugin is not installed, if it is to be and is not.
    pub fn set_cni(&self, problem: Option<String>) {
        self.with(|state| state.cni = problem);
    }

    /// What keeps north-south from its work; nothing if it is at it, or if there is none.
    pub fn set_north_south(&self, troubles: Vec<String>) {
        self.with(|state| state.north_south = troubles);
    }

    /// Whether the loop goes round.
    pub fn live(&self) -> Report {
        Report { name: "livez", checks: vec![self.with(|state| loop_check(state, self.patience))] }
    }

    /// Whether every pod that is to be steered is.
    pub fn ready(&self) -> Report {
        let checks = self.with(|state| {
            let synced = "the pods of this node are not known yet".to_owned();
            vec![
                loop_check(state, self.patience),
                Check { name: "synced", problem: (!state.synced).then_some(synced) },
                Check { name: "unhindered", problem: list(&state.troubles) },
                Check { name: "attached", problem: list(&state.unattached) },
                Check { name: "cni", problem: state.cni.clone() },
                Check { name: "north-south", problem: list(&state.north_south) },
            ]
        });
        Report { name: "readyz", checks }
    }
}

fn loop_check(state: &State, patience: Duration) -> Check {
    let silence = state.beat.elapsed();
    let problem = (silence > patience)
        .then(|| format!("the loop has been at {} for {} s", state.doing, silence.as_secs()));
    Check { name: "loop", problem }
}

/// The first few, and how many more there are.
fn list(problems: &[String]) -> Option<String> {
    let named = problems.get(..MAX_NAMED).unwrap_or(problems).join("; ");
    match problems.len().saturating_sub(MAX_NAMED) {
        0 if problems.is_empty() => None,
        0 => Some(named),
        more => Some(format!("{named}; and {more} more")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_loop_that_stands_still_is_named() {
        let health = Health::new(Duration::from_secs(60));
        health.beat("attaching shop/web");
        assert_eq!(health.live().text(false), "ok");
        assert_eq!(health.live().text(true), "[+]loop ok\nlivez check passed\n");
        health.age(Duration::from_secs(90));
        let text = health.live().text(false);
        assert!(text.starts_with("[-]loop failed: the loop has been at attaching shop/web for 9"), "{text}");
        assert!(text.ends_with("livez check failed\n") && !health.ready().is_good());
        health.beat("waiting");
        assert!(health.live().is_good());
    }

    #[test]
    fn ready_is_who_knows_all_pods_and_has_attached_them() {
        let health = Health::new(Duration::from_secs(60));
        assert!(health.ready().text(false).contains("[-]synced failed: the pods of this node"));
        health.set_synced(true);
        assert!(health.ready().is_good());
        health.set_unattached((0..12).map(|number| format!("shop/web-{number}: no\u{1b}")).collect());
        let text = health.ready().text(false);
        assert!(text.contains("[+]synced ok\n"), "{text}");
        assert!(text.contains("[-]attached failed: shop/web-0: no\u{fffd}; shop/web-1"), "{text}");
        assert!(text.contains("; and 2 more\n") && !text.contains("web-10"), "{text}");
        health.set_unattached(Vec::new());
        health.set_troubles(vec!["the API cannot be reached".to_owned()]);
        assert!(health.ready().text(false).contains("[-]unhindered failed: the API cannot be reached"));
        health.set_troubles(Vec::new());
        health.set_cni(Some("no network is configured".to_owned()));
        assert!(health.ready().text(false).contains("[-]cni failed: no network is configured"));
        health.set_cni(None);
        health.set_north_south(vec!["there is no device eth7".to_owned()]);
        assert!(health.ready().text(false).contains("[-]north-south failed: there is no device eth7"));
        // None of that is a reason to be restarted.
        assert!(health.live().is_good());
    }
}

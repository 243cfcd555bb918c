//! Where network namespaces were found: the path that an attachment was made by may lead nowhere here, as a
//! runtime's does in an agent's container, and a search goes through all processes of the machine.

use std::{
    collections::HashMap,
    path::PathBuf,
    sync::{Mutex, PoisonError},
};

use crate::netns::{Netns, NetnsCookie};

/// The last path of each namespace that had to be searched for. Nothing is kept open: an open namespace does not go.
#[derive(Debug, Default)]
pub(super) struct Whereabouts(Mutex<HashMap<NetnsCookie, PathBuf>>);

impl Whereabouts {
    /// The namespace, if `is_it` says so of what is where it was last; else what `search` finds.
    pub(super) fn find(
        &self,
        cookie: NetnsCookie,
        is_it: impl Fn(&Netns) -> bool,
        search: impl FnOnce() -> Option<Netns>,
    ) -> Option<Netns> {
        let known = self.0.lock().unwrap_or_else(PoisonError::into_inner).get(&cookie).cloned();
        if let Some(netns) = known.and_then(|path| Netns::open(&path).ok()).filter(is_it) {
            return Some(netns);
        }
        let found = search();
        let mut paths = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match &found {
            Some(netns) => paths.insert(cookie, netns.path().to_owned()),
            None => paths.remove(&cookie),
        };
        found
    }

    /// It is of no interest any more.
    pub(super) fn forget(&self, cookie: NetnsCookie) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(&cookie);
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn who_was_found_is_not_searched_for_again() {
        let places = Whereabouts::default();
        let cookie = NetnsCookie(7);
        let here = || Netns::open(Path::new("/proc/self/ns/net")).ok();
        let never = || -> Option<Netns> { panic!("searched for") };
        assert!(places.find(cookie, |_| true, || None).is_none());
        assert!(places.find(cookie, |_| true, here).is_some());
        assert!(places.find(cookie, |_| true, never).is_some());
        // Another one is there now, and the one wanted nowhere.
        assert!(places.find(cookie, |_| false, || None).is_none());
        assert!(places.0.lock().unwrap().is_empty());
        places.find(cookie, |_| true, here);
        places.forget(cookie);
        assert!(places.find(cookie, |_| true, || None).is_none());
    }
}

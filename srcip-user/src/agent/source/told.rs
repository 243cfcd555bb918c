//! What has been told already, and need not be told again.

use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use crate::agent::pod::PodUid;

/// An API server forgets Events after an hour; what is still so is then told again.
pub(super) const FORGOTTEN: Duration = Duration::from_secs(3600);

/// One pod can be told so many different things for the same reason at once, and from then on one in so much time:
/// who changes a bad value all the time is not to fill the cluster's Events.
const AT_ONCE: u32 = 5;
const EACH: Duration = Duration::from_secs(60);

/// More than this is not remembered: the oldest goes first.
const MAX_TOLD: usize = 1024;

/// The last note told for each pod and reason.
#[derive(Debug, Default)]
pub(super) struct Told(Mutex<HashMap<(PodUid, &'static str), Note>>);

#[derive(Debug)]
struct Note {
    /// `None` if it did not arrive.
    text: Option<String>,
    told: Instant,
    /// What has been told is paid for, each with its time, until then.
    paid: Instant,
}

impl Told {
    /// Whether this is to be told; remembers it as told if so. What is too much for now is news later, if it is still
    /// so then.
    pub(super) fn is_news(&self, uid: &PodUid, reason: &'static str, note: &str) -> bool {
        self.is_news_at(uid, reason, note, Instant::now())
    }

    fn is_news_at(&self, uid: &PodUid, reason: &'static str, note: &str, now: Instant) -> bool {
        let mut told = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let key = (uid.clone(), reason);
        let mut paid = now;
        if let Some(last) = told.get(&key) {
            let is_same = last.text.as_deref() == Some(note) && now.duration_since(last.told) < FORGOTTEN;
            paid = paid.max(last.paid);
            if is_same || paid.duration_since(now) > EACH * (AT_ONCE - 1) {
                return false;
            }
        }
        if told.len() >= MAX_TOLD && !told.contains_key(&key) {
            let oldest = told.iter().min_by_key(|(_, note)| note.told).map(|(key, _)| key.clone());
            oldest.and_then(|key| told.remove(&key));
        }
        told.insert(key, Note { text: Some(note.to_owned()), told: now, paid: paid + EACH });
        true
    }

    /// It did not arrive: the next time it is news again.
    pub(super) fn forget(&self, uid: &PodUid, reason: &'static str) {
        let mut told = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(note) = told.get_mut(&(uid.clone(), reason)) {
            note.text = None;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_is_told_once_an_hour_and_another_note_at_once() {
        let (told, now) = (Told::default(), Instant::now());
        let uid = PodUid::new("1").unwrap();
        assert!(told.is_news_at(&uid, "Bad", "a", now));
        assert!(!told.is_news_at(&uid, "Bad", "a", now + FORGOTTEN / 2));
        assert!(told.is_news_at(&uid, "Other", "a", now));
        assert!(told.is_news_at(&uid, "Bad", "b", now));
        assert!(told.is_news_at(&uid, "Bad", "a", now));
        assert!(told.is_news_at(&uid, "Bad", "a", now + FORGOTTEN));
        assert!(told.is_news_at(&PodUid::new("2").unwrap(), "Bad", "a", now));
        told.forget(&uid, "Other");
        assert!(told.is_news_at(&uid, "Other", "a", now));
    }

    #[test]
    fn a_value_that_changes_all_the_time_is_told_of_at_times() {
        let (told, now) = (Told::default(), Instant::now());
        let uid = PodUid::new("1").unwrap();
        let mut count = 0;
        for second in 0..3600 {
            let at = now + Duration::from_secs(second);
            let is_news = told.is_news_at(&uid, "Bad", &format!("{second}"), at);
            if is_news && second % 7 == 0 {
                // It did not arrive: that makes no difference to how much there is.
                told.forget(&uid, "Bad");
            }
            count += u32::from(is_news);
            assert!(second > 0 || told.is_news_at(&PodUid::new("2").unwrap(), "Bad", "a", at), "others are");
        }
        assert_eq!(count, AT_ONCE - 1 + 60);
        // What it says in the end is told.
        let later = now + Duration::from_secs(3600 + 60);
        assert!(told.is_news_at(&uid, "Bad", "the last", later));
        assert!(!told.is_news_at(&uid, "Bad", "the last", later + EACH));
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let (told, now) = (Told::default(), Instant::now());
        for i in 0..MAX_TOLD as u64 + 10 {
            let uid = PodUid::new(&format!("{i}")).unwrap();
            assert!(told.is_news_at(&uid, "Bad", "a", now + Duration::from_millis(i)));
        }
        assert_eq!(told.0.lock().unwrap().len(), MAX_TOLD);
        let later = now + Duration::from_secs(60);
        assert!(told.is_news_at(&PodUid::new("0").unwrap(), "Bad", "a", later), "the oldest went");
        assert!(!told.is_news_at(&PodUid::new("1000").unwrap(), "Bad", "a", later));
    }
}

//! Text from elsewhere, made fit to be shown: names of pods and namespaces come from whoever made them.

use unicode_width::{UnicodeWidthChar as _, UnicodeWidthStr as _};

/// Stands for what is not printed.
const REPLACEMENT: char = '\u{fffd}';

/// Stands for what has been left out.
const ELLIPSIS: char = '…';

/// Whether a character does something to a terminal other than appear: control characters, and those that
/// change the direction of the text around them or cannot be seen.
pub fn is_unprintable(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{ad}' | '\u{61c}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' |
                       '\u{2060}'..='\u{206f}' | '\u{feff}' | '\u{fff9}'..='\u{fffb}')
}

/// The text without what [`is_unprintable`].
pub fn printable(text: &str) -> String {
    text.chars().map(|c| if is_unprintable(c) { REPLACEMENT } else { c }).collect()
}

/// The beginning of a text from elsewhere, in at most so many characters; `…` stands for the rest.
pub fn beginning(text: &str, characters: usize) -> String {
    let mut rest = text.chars();
    let mut beginning = printable(&rest.by_ref().take(characters).collect::<String>());
    beginning.extend(rest.next().map(|_| ELLIPSIS));
    beginning
}

/// How many columns of a terminal a text takes.
pub fn width(text: &str) -> usize {
    text.width()
}

/// A text in no more than `columns`: what does not fit is left out in the middle, because addresses and
/// the names of pods differ at their ends.
pub fn elide(text: &str, columns: usize) -> String {
    if text.width() <= columns {
        return text.to_owned();
    }
    let room = columns.saturating_sub(1);
    let head = take(text.chars(), room.div_ceil(2));
    let tail: Vec<char> = take(text.chars().rev(), room - room.div_ceil(2));
    let ellipsis = (columns > 0).then_some(ELLIPSIS);
    head.into_iter().chain(ellipsis).chain(tail.into_iter().rev()).collect()
}

/// As many characters as fit into `columns`.
fn take(characters: impl Iterator<Item = char>, columns: usize) -> Vec<char> {
    let mut left = columns;
    characters
        .map_while(|c| {
            left = left.checked_sub(c.width().unwrap_or_default())?;
            Some(c)
        })
        .collect()
}

/// A text in exactly `columns`, on the left.
pub fn left(text: &str, columns: usize) -> String {
    let text = elide(text, columns);
    let padding = columns.saturating_sub(text.width());
    text + &" ".repeat(padding)
}

/// A text in exactly `columns`, on the right.
pub fn right(text: &str, columns: usize) -> String {
    let text = elide(text, columns);
    " ".repeat(columns.saturating_sub(text.width())) + &text
}

/// A word as a shell takes it: unchanged if it is plain, else in single quotes. Rules and names come from
/// pods and manifests, and end up in commands that people paste as root.
pub fn shell_quoted(word: &str) -> String {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "-._/:=,@%+".contains(c);
    if !word.is_empty() && word.chars().all(is_plain) {
        word.to_owned()
    } else {
        format!("'{}'", word.replace('\'', r"'\''"))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_terminals_obey_is_not_printed() {
        assert_eq!(
            printable("web\x1b[2J\r\n\u{9b}31m\u{202e}"),
            "web\u{fffd}[2J\u{fffd}\u{fffd}\u{fffd}31m\u{fffd}"
        );
        assert_eq!(printable("größe-名前"), "größe-名前");
    }

    #[test]
    fn a_beginning_says_that_it_is_one() {
        assert_eq!(beginning("aä\n", 3), "aä\u{fffd}");
        assert_eq!(beginning("aä\nx", 3), "aä\u{fffd}…");
        assert_eq!(beginning("", 0), "");
    }

    #[test]
    fn the_ends_stay() {
        assert_eq!(elide("fd13:37::1:1", 12), "fd13:37::1:1");
        assert_eq!(elide("2001:db8:1:2:3:4:5:6", 11), "2001:…4:5:6");
        assert_eq!(elide("名前名前", 5), "名…前");
        assert_eq!((elide("abc", 1), elide("abc", 0)), ("…".to_owned(), String::new()));
        assert_eq!((left("ab", 4), right("ab", 4)), ("ab  ".to_owned(), "  ab".to_owned()));
    }

    proptest! {
        #[test]
        fn columns_are_kept(text: String, columns in 0_usize..50) {
            let text = printable(&text);
            prop_assert!(width(&elide(&text, columns)) <= columns);
            prop_assert_eq!(width(&left(&text, columns)), columns);
            prop_assert!(!printable(&text).contains(char::is_control));
        }
    }

    #[test]
    fn words_cannot_break_out_of_a_command() {
        assert_eq!(shell_quoted("web-1.a"), "web-1.a");
        assert_eq!(shell_quoted("!"), "'!'");
        assert_eq!(shell_quoted("x; rm -rf /"), "'x; rm -rf /'");
        assert_eq!(shell_quoted("$(id) `id`"), "'$(id) `id`'");
        assert_eq!(shell_quoted("a'b"), r"'a'\''b'");
        assert_eq!(shell_quoted(""), "''");
    }
}

//! What keys do.

use crossterm::event::{KeyCode, KeyEvent, KeyEventKind, KeyModifiers};

use super::app::App;

/// How long a filter may get.
const FILTER: usize = 64;

/// Keys with what they do, for the help.
pub const HELP: [(&str, &str); 10] = [
    ("q Ctrl-C", "quit"),
    ("Esc", "leave this, clear the filter, or quit"),
    ("Tab", "by client, or by workload"),
    ("Up Down PgUp PgDn", "move"),
    ("Home End", "to the first, to the last"),
    ("s > <", "order by the next column, or the one before"),
    ("r", "reverse the order"),
    ("/", "only clients or workloads with a text in their names"),
    ("p Space", "pause, or go on"),
    ("?", "this"),
];

/// Whether to go on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Next {
    /// Yes.
    GoOn,
    /// No.
    Quit,
}

/// Does what a key says.
pub fn press(app: &mut App, key: KeyEvent) -> Next {
    if key.kind == KeyEventKind::Release {
        return Next::GoOn;
    }
    let control = key.modifiers.intersects(KeyModifiers::CONTROL | KeyModifiers::ALT);
    match key.code {
        KeyCode::Char('c') if key.modifiers.contains(KeyModifiers::CONTROL) => return Next::Quit,
        KeyCode::Char(_) if control => {}
        _ if app.help => match key.code {
            KeyCode::Char('q') => return Next::Quit,
            _ => app.help = false,
        },
        code if app.editing => edit(app, code),
        code => return command(app, code),
    }
    Next::GoOn
}

fn edit(app: &mut App, code: KeyCode) {
    match code {
        KeyCode::Enter => app.editing = false,
        KeyCode::Esc => {
            app.editing = false;
            app.filter.clear();
        }
        KeyCode::Backspace => drop(app.filter.pop()),
        KeyCode::Char(c) if app.filter.chars().count() < FILTER && !crate::text::is_unprintable(c) => {
            app.filter.push(c);
        }
        _ => {}
    }
    app.arrange();
}

fn command(app: &mut App, code: KeyCode) -> Next {
    match code {
        KeyCode::Char('q') => return Next::Quit,
        KeyCode::Esc if app.filter.is_empty() => return Next::Quit,
        KeyCode::Esc => {
            app.filter.clear();
            app.arrange();
        }
        KeyCode::Tab | KeyCode::BackTab => app.switch(),
        KeyCode::Up | KeyCode::Char('k') => app.step(-1),
        KeyCode::Down | KeyCode::Char('j') => app.step(1),
        KeyCode::PageUp => app.page(-1),
        KeyCode::PageDown => app.page(1),
        KeyCode::Home => app.home(),
        KeyCode::End => app.end(),
        KeyCode::Char('s' | '>') | KeyCode::Right => app.sort_by_next(true),
        KeyCode::Char('<') | KeyCode::Left => app.sort_by_next(false),
        KeyCode::Char('r') => app.reverse(),
        KeyCode::Char('/') => app.editing = true,
        KeyCode::Char('p' | ' ') => app.pause(),
        KeyCode::Char('?' | 'h') => app.help = true,
        _ => {}
    }
    Next::GoOn
}

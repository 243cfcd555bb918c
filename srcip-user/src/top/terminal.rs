//! Takes the terminal over, and gives it back as it was, however this process ends.

use std::{
    io::{self, IsTerminal as _, Stdout},
    mem::ManuallyDrop,
    panic,
    sync::{
        Once,
        atomic::{AtomicBool, Ordering},
    },
};

use anyhow::{Context as _, Result, bail};
use crossterm::{
    cursor::Show,
    execute,
    terminal::{EnterAlternateScreen, LeaveAlternateScreen, disable_raw_mode, enable_raw_mode},
};
use ratatui::{Frame, Terminal, backend::CrosstermBackend};

/// Whether the terminal is ours.
static TAKEN: AtomicBool = AtomicBool::new(false);
static HOOK: Once = Once::new();

/// The terminal, while it is ours. Dropping it gives it back; so does a panic, before it says anything.
#[derive(Debug)]
pub struct Screen {
    /// Never dropped: it would complain about a terminal that has gone, on that terminal, and panic.
    terminal: ManuallyDrop<Terminal<CrosstermBackend<Stdout>>>,
}

impl Screen {
    /// Fails unless standard input and output are a terminal.
    pub fn check() -> Result<()> {
        for (is_terminal, name, role) in [
            (io::stdout().is_terminal(), "standard output", "draws on"),
            (io::stdin().is_terminal(), "standard input", "reads keys from"),
        ] {
            if !is_terminal {
                bail!(
                    "{name} is not a terminal, which `srcip top` {role}; for files and pipes there is \
                     `srcip observe -f`, also with `-o json`"
                );
            }
        }
        Ok(())
    }

    /// Takes the terminal over.
    pub fn enter() -> Result<Self> {
        Self::check()?;
        HOOK.call_once(|| {
            let previous = panic::take_hook();
            panic::set_hook(Box::new(move |info| {
                give_back();
                previous(info);
            }));
        });
        TAKEN.store(true, Ordering::SeqCst);
        let entered = enable_raw_mode()
            .and_then(|()| execute!(io::stdout(), EnterAlternateScreen))
            .and_then(|()| Terminal::new(CrosstermBackend::new(io::stdout())));
        match entered {
            Ok(terminal) => Ok(Self { terminal: ManuallyDrop::new(terminal) }),
            Err(error) => {
                give_back();
                Err(error).context("failed to take the terminal over; is it gone, or in the background?")
            }
        }
    }

    /// Draws a frame. The terminal may have another size than before.
    pub fn draw(&mut self, draw: impl FnOnce(&mut Frame<'_>)) -> io::Result<()> {
        self.terminal.draw(draw).map(drop)
    }

    /// Draws everything anew: something else may have written to the terminal.
    pub fn clear(&mut self) -> io::Result<()> {
        self.terminal.clear()
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        give_back();
    }
}

/// Once; a terminal that has gone needs nothing back.
fn give_back() {
    if TAKEN.swap(false, Ordering::SeqCst) {
        let _ = execute!(io::stdout(), LeaveAlternateScreen, Show);
        let _ = disable_raw_mode();
    }
}

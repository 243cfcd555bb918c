//! Goes round: events in, keys in, frames out.

use std::{
    io,
    os::fd::AsFd as _,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use crossterm::event::{self, Event, KeyCode, KeyModifiers};
use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
};

use super::{
    app::App,
    keys::{self, Next},
    terminal::Screen,
    view,
};
use crate::{
    signals::Ending,
    telemetry::{
        clock::Clock,
        filter::Filter,
        observer::{Observer, POLL_INTERVAL},
    },
};

/// How often a frame is drawn, if no key is pressed.
const FRAME_INTERVAL: Duration = Duration::from_millis(250);

/// What became of the terminal.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Input {
    /// Nothing was typed.
    None,
    /// There is something to read, or a signal has come.
    Some,
    /// It is gone.
    Gone,
}

/// Shows what the observer tells until a key, a signal or the end of the terminal ends it.
pub fn run(observer: &mut Observer, filter: &Filter, colour: bool, ending: &Ending) -> Result<()> {
    let mut screen = Screen::enter()?;
    let mut app = App::default();
    let start = Instant::now();
    let mut drawn: Option<Instant> = None;
    while !ending.has_come() {
        observer.poll(|record| {
            if filter.wants(&record) {
                app.model.record(&record, start.elapsed());
            }
        })?;
        let mut due = drawn.is_none_or(|drawn| drawn.elapsed() >= FRAME_INTERVAL);
        match wait() {
            Input::Gone => break,
            Input::None => {}
            // Also without anything to read: crossterm learns of a new size by a signal of its own.
            Input::Some => match read(&mut app, &mut screen) {
                Ok(Some(Next::Quit)) => break,
                Ok(Some(Next::GoOn)) => due = true,
                Ok(None) => {}
                Err(_) if is_over(ending) => break,
                Err(error) => return Err(error).context("failed to read from the terminal"),
            },
        }
        if !due {
            continue;
        }
        app.surroundings.lost_events = observer.accounting()?.lost();
        app.surroundings.time = time_of_day();
        app.refresh(start.elapsed());
        match screen.draw(|frame| view::draw(frame, &mut app, colour)) {
            Ok(()) => {}
            Err(_) if is_over(ending) => break,
            Err(error) => return Err(error).context("failed to draw on the terminal"),
        }
        drawn = Some(Instant::now());
    }
    Ok(())
}

/// Waits for a key, but no longer than the observer can.
fn wait() -> Input {
    let stdin = io::stdin();
    let mut fds = [PollFd::new(stdin.as_fd(), PollFlags::POLLIN)];
    let timeout = PollTimeout::try_from(POLL_INTERVAL).unwrap_or(PollTimeout::ZERO);
    match poll(&mut fds, timeout) {
        Ok(0) => Input::None,
        Err(Errno::EINTR) => Input::Some,
        Err(_) => Input::Gone,
        Ok(_) => {
            let gone = PollFlags::POLLHUP | PollFlags::POLLERR | PollFlags::POLLNVAL;
            let events = fds[0].revents().unwrap_or(gone);
            if events.intersects(gone) { Input::Gone } else { Input::Some }
        }
    }
}

/// Whether an error is but the end: the terminal has gone, or is about to.
fn is_over(ending: &Ending) -> bool {
    ending.has_come() || wait() == Input::Gone
}

/// Takes in what has been typed; `None` if that was nothing.
fn read(app: &mut App, screen: &mut Screen) -> io::Result<Option<Next>> {
    let mut next = None;
    // Without any time to wait, crossterm does not even look.
    while event::poll(Duration::from_millis(1))? {
        next = Some(Next::GoOn);
        match event::read()? {
            Event::Key(key)
                if key.code == KeyCode::Char('l') && key.modifiers.contains(KeyModifiers::CONTROL) =>
            {
                screen.clear()?;
            }
            Event::Key(key) if keys::press(app, key) == Next::Quit => return Ok(Some(Next::Quit)),
            _ => {}
        }
    }
    Ok(next)
}

/// `12:34:56 UTC`: the time zone of all that srcip prints.
fn time_of_day() -> String {
    let time = Clock::now().current().to_string();
    let time = time.split_once('T').map_or(time.as_str(), |(_, time)| time);
    format!("{} UTC", time.get(..8).unwrap_or(time))
}

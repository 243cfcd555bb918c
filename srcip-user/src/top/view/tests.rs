use std::time::Duration;

use crossterm::event::{KeyCode, KeyEvent, KeyModifiers};
use ratatui::{Terminal, backend::TestBackend};

use super::{
    super::{
        keys::{Next, press},
        model::tests::{Maker, WEB},
    },
    *,
};

const LOST: Maker = Maker { workload: ("istio", 2), client: "2001:db8:1111:2222:3333:4444:5555:6666" };

/// Two clients: one that the application sees, and one that it does not.
fn app() -> App {
    let mut app = App::default();
    let now = Duration::from_secs(10);
    for port in 0..7 {
        app.model.record(&WEB.open(port), now);
        app.model.record(&WEB.upstream(port, WEB.client), now);
    }
    app.model.record(&WEB.close(0, (1_500_000, 20), 1234), now);
    app.model.record(&LOST.open(1), now);
    app.model.record(&LOST.upstream(1, "127.0.0.6"), now);
    app.surroundings.time = "12:34:56 UTC".to_owned();
    app.refresh(now);
    app
}

fn terminal(app: &mut App, width: u16, height: u16, colour: bool) -> Terminal<TestBackend> {
    let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
    terminal.draw(|frame| draw(frame, app, colour)).unwrap();
    terminal
}

fn screen(app: &mut App, width: u16, height: u16) -> Vec<String> {
    let terminal = terminal(app, width, height, true);
    let buffer = terminal.backend().buffer();
    let line = |y| (0..width).map(|x| buffer[(x, y)].symbol()).collect::<String>();
    (0..height).map(|y| line(y).trim_end().to_owned()).collect()
}

fn type_keys(app: &mut App, keys: &[KeyCode]) {
    for key in keys {
        assert_eq!(press(app, KeyEvent::new(*key, KeyModifiers::NONE)), Next::GoOn, "{key:?}");
    }
}

fn has(lines: &[String], parts: &[&str]) {
    let found = lines.iter().any(|line| parts.iter().all(|part| line.contains(part)));
    assert!(found, "no line has {parts:?}:\n{}", lines.join("\n"));
}

#[test]
fn the_usual_window() {
    let mut app = app();
    let lines = screen(&mut app, 80, 24);
    has(&lines, &["srcip top", "12:34:56 UTC", "clients 2", "workloads 2", "events lost 0"]);
    has(&lines, &["open 7", "new 1.6/s", "total 8", "preserved 7", "lost 1", "unknown 0"]);
    has(&lines, &["[by client]", "by workload", "order NEW/s", "bytes, RTT: as connections end"]);
    has(&lines, &["CLIENT", "OPEN", "NEW/sv", "TOTAL", "IN/s", "OUT/s", "RTT", "ORIGIN", "APP SEES"]);
    has(&lines, &["10.0.0.1 ", " 6 ", "1.4", " 7 ", "300k", "1.2ms", "preserved", " 10.0.0.1"]);
    // In the middle something is left out.
    has(&lines, &["2001:db", "…", "5:6666", "lost", "127.0.0.6"]);
    has(&lines[23..], &["q quit", "? help", "Tab table", "s sort", "/ filter", "1/2"]);
}

#[test]
fn wide_windows_have_more() {
    let lines = screen(&mut app(), 170, 24);
    has(&lines, &["AVG-RTT", "KEPT", "UNKNOWN", "WORKLOAD", " IN ", " OUT "]);
    has(&lines, &["2001:db8:1111:2222:3333:4444:5555:6666", "istio"]);
}

#[test]
fn small_windows() {
    let lines = screen(&mut app(), 40, 10);
    has(&lines, &["srcip top"]);
    has(&lines, &["CLIENT", "NEW/s", "ORIGIN"]);
    has(&lines, &["10.0.0.1", "preserved"]);
    has(&lines, &["lost"]);
    let lines = screen(&mut app(), 20, 5);
    has(&lines, &["CLIENT", "ORIGIN"]);
    has(&lines, &["10.0.0.1", "preserved"]);
    has(&lines[4..], &["q quit"]);
    // Whatever is left of the window, nothing breaks.
    for width in 0..30 {
        for height in 0..14 {
            let mut app = app();
            screen(&mut app, width, height);
            app.help = true;
            screen(&mut app, width, height);
            app.help = false;
            app.editing = true;
            screen(&mut app, width, height);
        }
    }
}

#[test]
fn nothing_yet() {
    has(&screen(&mut App::default(), 80, 24), &["No connection into a pod has opened yet."]);
}

#[test]
fn colours_only_where_wanted() {
    let coloured = terminal(&mut app(), 80, 24, true);
    let cells = coloured.backend().buffer().content();
    assert!(cells.iter().any(|cell| cell.fg == Color::Red));
    assert!(cells.iter().any(|cell| cell.fg == Color::Green));
    let plain = terminal(&mut app(), 80, 24, false);
    assert!(plain.backend().buffer().content().iter().all(|cell| cell.fg == Color::Reset));
}

#[test]
fn keys() {
    let mut app = app();
    let names = |app: &App| app.shown().iter().map(|line| line.name.to_string()).collect::<Vec<_>>();
    screen(&mut app, 80, 24);
    assert_eq!(names(&app), [WEB.client, LOST.client]);
    type_keys(&mut app, &[KeyCode::Char('r')]);
    assert_eq!(names(&app), [LOST.client, WEB.client]);
    // After NEW/s comes TOTAL.
    type_keys(&mut app, &[KeyCode::Char('s')]);
    has(&screen(&mut app, 80, 24), &["order TOTALv"]);
    type_keys(&mut app, &[KeyCode::Char('<'), KeyCode::Char('<')]);
    has(&screen(&mut app, 80, 24), &["order OPENv"]);

    type_keys(&mut app, &[KeyCode::Char('/'), KeyCode::Char('I'), KeyCode::Char('s')]);
    has(&screen(&mut app, 80, 24), &["/Is_", "Esc clears"]);
    assert_eq!(names(&app), [LOST.client]);
    type_keys(&mut app, &[KeyCode::Char('q'), KeyCode::Backspace, KeyCode::Enter]);
    has(&screen(&mut app, 80, 24), &["filter Is"]);
    type_keys(&mut app, &[KeyCode::Esc]);
    assert_eq!(names(&app).len(), 2);

    type_keys(&mut app, &[KeyCode::Tab]);
    let lines = screen(&mut app, 80, 24);
    has(&lines, &["[by workload]"]);
    has(&lines, &["web", "preserved", "the client"]);
    has(&lines, &["istio", "lost", "127.0.0.6"]);

    type_keys(&mut app, &[KeyCode::Char('?')]);
    has(&screen(&mut app, 80, 24), &["p Space", "pause"]);
    type_keys(&mut app, &[KeyCode::Char('x'), KeyCode::Char('p')]);
    app.model.record(&WEB.open(99), Duration::from_secs(11));
    app.refresh(Duration::from_secs(11));
    has(&screen(&mut app, 80, 24), &["PAUSED", "srcip top"]);
    has(&screen(&mut app, 80, 24), &["total 8"]);
    type_keys(&mut app, &[KeyCode::Char(' ')]);
    app.refresh(Duration::from_secs(11));
    has(&screen(&mut app, 80, 24), &["total 9"]);

    for (key, modifiers) in [
        (KeyCode::Char('q'), KeyModifiers::NONE),
        (KeyCode::Esc, KeyModifiers::NONE),
        (KeyCode::Char('c'), KeyModifiers::CONTROL),
    ] {
        assert_eq!(press(&mut app, KeyEvent::new(key, modifiers)), Next::Quit);
    }
}

#[test]
fn moving() {
    const CLIENTS: [&str; 8] =
        ["10.2.0.1", "10.2.0.2", "10.2.0.3", "10.2.0.4", "10.2.0.5", "10.2.0.6", "10.2.0.7", "10.2.0.8"];
    let mut app = App::default();
    for client in CLIENTS {
        app.model.record(&Maker { client, ..WEB }.open(1), Duration::ZERO);
    }
    app.refresh(Duration::ZERO);
    // A line each for head, titles and keys.
    let visible = |app: &mut App| screen(app, 40, 6)[2..5].join(" ");
    assert!(visible(&mut app).contains(CLIENTS[0]));
    let marked = |app: &App| app.window().find(|(_, marked)| *marked).map(|(line, _)| line.name.to_string());
    assert_eq!(marked(&app), None);
    for (keys, first, mark) in [
        (vec![KeyCode::Down], 0, 0),
        (vec![KeyCode::Down, KeyCode::Down, KeyCode::Down], 1, 3),
        (vec![KeyCode::End], 5, 7),
        (vec![KeyCode::Down], 5, 7),
        (vec![KeyCode::PageUp], 4, 4),
        (vec![KeyCode::PageUp, KeyCode::PageUp], 0, 0),
        (vec![KeyCode::PageDown], 1, 3),
    ] {
        type_keys(&mut app, &keys);
        assert!(visible(&mut app).contains(CLIENTS[first]), "{keys:?}");
        assert_eq!(marked(&app).as_deref(), Some(CLIENTS[mark]), "{keys:?}");
    }
    // The mark stays with its line when the order changes.
    type_keys(&mut app, &[KeyCode::Char('r')]);
    assert_eq!(marked(&app).as_deref(), Some(CLIENTS[3]));
    type_keys(&mut app, &[KeyCode::Home]);
    assert_eq!((marked(&app), app.offset()), (None, 0));
}

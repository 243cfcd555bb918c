//! Draws a frame.

use ratatui::{
    Frame,
    layout::{Constraint, Layout, Rect},
    style::{Color, Modifier, Style},
    text::{Line as Text, Span},
    widgets::{Block, Clear, Paragraph},
};

use super::{
    app::{App, Kind},
    columns::{Column, count},
    keys,
    snapshot::{Head, Line},
};
use crate::text::{elide, left, right};

/// From this height on there is room for two lines of totals and one about the table.
const ROOMY: u16 = 10;

/// Draws all there is to see. Nothing is told by colour alone, and without `colour` nothing is coloured.
pub fn draw(frame: &mut Frame<'_>, app: &mut App, colour: bool) {
    let area = frame.area();
    let head = if area.height >= ROOMY { 3 } else { 1 };
    let foot = u16::from(area.height >= 4);
    let [head, titles, table, foot] = Layout::vertical([
        Constraint::Length(head),
        Constraint::Length(u16::from(area.height >= 2)),
        Constraint::Fill(1),
        Constraint::Length(foot),
    ])
    .areas(area);
    app.fit(table.width.into(), table.height.into());
    let style = Styles { colour };
    draw_head(frame, app, head, style);
    draw_titles(frame, app, titles, style);
    draw_table(frame, app, table, style);
    draw_foot(frame, app, foot, style);
    if app.help {
        draw_help(frame, area, style);
    }
}

/// How things look.
#[derive(Clone, Copy)]
struct Styles {
    colour: bool,
}

impl Styles {
    fn fore(self, colour: Color) -> Style {
        if self.colour { Style::new().fg(colour) } else { Style::new() }
    }

    fn lost(self) -> Style {
        self.fore(Color::Red).add_modifier(Modifier::BOLD)
    }

    fn preserved(self) -> Style {
        self.fore(Color::Green)
    }

    fn bold(self) -> Style {
        Style::new().add_modifier(Modifier::BOLD)
    }

    fn reversed(self) -> Style {
        Style::new().add_modifier(Modifier::REVERSED)
    }
}

/// Pieces with a blank between them, the first ones that fit.
fn pieces(pieces: Vec<(String, Style)>, width: u16) -> Text<'static> {
    let mut room = usize::from(width);
    let mut spans = Vec::new();
    for (text, style) in pieces {
        let gap = if spans.is_empty() { 0 } else { 2 };
        let needed = crate::text::width(&text) + gap;
        if needed > room {
            // Of the first, what fits.
            if spans.is_empty() {
                spans.push(Span::styled(elide(&text, room), style));
            }
            break;
        }
        room -= needed;
        spans.push(Span::raw(" ".repeat(gap)));
        spans.push(Span::styled(text, style));
    }
    Text::from(spans)
}

fn draw_head(frame: &mut Frame<'_>, app: &App, area: Rect, style: Styles) {
    let plain = Style::new();
    let Head { open, new, total, preserved, lost, dropped, unfollowed } = app.snapshot().head;
    let snapshot = app.snapshot();
    let number = |number: u64| count(number as f64);
    let events = app.surroundings.lost_events;
    let lost_events =
        (format!("events lost {}", number(events)), if events > 0 { style.lost() } else { plain });
    let state = if app.paused { "PAUSED" } else { "" };
    let time = || (app.surroundings.time.clone(), plain);
    let verdicts = [
        (format!("preserved {}", number(preserved)), style.preserved()),
        (format!("lost {}", number(lost)), if lost > 0 { style.lost() } else { plain }),
        (format!("unknown {}", number(snapshot.head.unknown())), plain),
    ];
    let mut first = vec![("srcip top".to_owned(), style.bold())];
    if !state.is_empty() {
        first.push((state.to_owned(), style.reversed()));
    }
    if area.height < 2 {
        // The most important things in one line.
        first.extend(verdicts);
        first.extend([lost_events, time()]);
        frame.render_widget(pieces(first, area.width), area);
        return;
    }
    first.push(time());
    let clients = snapshot.clients.len() as u64;
    first.push((format!("clients {}", number(clients)), plain));
    first.push((format!("workloads {}", number(snapshot.workloads.len() as u64)), plain));
    first.push(lost_events);
    if dropped > 0 {
        first.push((format!("rows dropped {}", number(dropped)), plain));
    }
    if unfollowed > 0 {
        first.push((format!("not followed {}", number(unfollowed)), plain));
    }
    let mut second = vec![
        (format!("open {}", number(open)), plain),
        (format!("new {new:.1}/s"), plain),
        (format!("total {}", number(total)), plain),
    ];
    second.extend(verdicts);
    let lines = vec![pieces(first, area.width), pieces(second, area.width), about(app, area.width, style)];
    frame.render_widget(Paragraph::new(lines), area);
}

/// What is to be known of the table.
fn about(app: &App, width: u16, style: Styles) -> Text<'static> {
    let tab = |kind, text: &str| {
        if app.kind == kind {
            (format!("[{text}]"), style.bold())
        } else {
            (format!(" {text} "), Style::new())
        }
    };
    let order = app.order();
    let arrow = if order.descends() { "v" } else { "^" };
    let mut parts = vec![
        tab(Kind::Clients, "by client"),
        tab(Kind::Workloads, "by workload"),
        (format!("order {}{arrow}", order.by.title(app.kind)), Style::new()),
    ];
    if !app.filter.is_empty() {
        parts.push((format!("filter {}", elide(&app.filter, 20)), style.reversed()));
    }
    parts.push(("bytes, RTT: as connections end".to_owned(), Style::new()));
    pieces(parts, width)
}

fn draw_titles(frame: &mut Frame<'_>, app: &App, area: Rect, style: Styles) {
    let order = app.order();
    let cells = app.columns().iter().map(|(column, width)| {
        let title = column.title(app.kind);
        let title = if *column == order.by {
            format!("{title}{}", if order.descends() { "v" } else { "^" })
        } else {
            title.to_owned()
        };
        if column.is_text() { left(&title, *width) } else { right(&title, *width) }
    });
    let line = cells.collect::<Vec<_>>().join(" ");
    frame.render_widget(Text::styled(left(&line, area.width.into()), style.reversed()), area);
}

fn draw_table(frame: &mut Frame<'_>, app: &App, area: Rect, style: Styles) {
    if app.shown().is_empty() {
        let text = if app.filter.is_empty() {
            "No connection into a pod has opened yet."
        } else {
            "No name has that text in it."
        };
        frame.render_widget(Paragraph::new(text), area);
        return;
    }
    let lines: Vec<_> = app
        .window()
        .take(area.height.into())
        .map(|(line, marked)| {
            let text = row(line, app.columns(), style);
            if marked { text.style(style.reversed()) } else { text }
        })
        .collect();
    frame.render_widget(Paragraph::new(lines), area);
}

fn row(line: &Line, columns: &[(Column, usize)], style: Styles) -> Text<'static> {
    let mut spans = Vec::new();
    for (column, width) in columns {
        if !spans.is_empty() {
            spans.push(Span::raw(" "));
        }
        let cell = column.cell(line);
        let cell = if column.is_text() { left(&cell, *width) } else { right(&cell, *width) };
        let look = match column {
            Column::Verdict | Column::Sees if line.lost > 0 => style.lost(),
            Column::Verdict | Column::Sees if line.preserved > 0 => style.preserved(),
            Column::Lost if line.lost > 0 => style.lost(),
            _ => Style::new(),
        };
        spans.push(Span::styled(cell, look));
    }
    Text::from(spans)
}

fn draw_foot(frame: &mut Frame<'_>, app: &App, area: Rect, style: Styles) {
    if app.editing {
        let typed = format!("/{}_", app.filter);
        let what = vec![(typed, style.bold()), ("Enter accepts, Esc clears".to_owned(), Style::new())];
        frame.render_widget(pieces(what, area.width), area);
        return;
    }
    let place = format!("{}/{}", (app.offset() + 1).min(app.shown().len()), app.shown().len());
    let keys = ["q quit", "? help", "Tab table", "s sort", "r reverse", "/ filter", "p pause"];
    let mut parts: Vec<_> = keys.iter().map(|text| ((*text).to_owned(), Style::new())).collect();
    parts.extend([(place, Style::new()), ("↑↓ move".to_owned(), Style::new())]);
    frame.render_widget(pieces(parts, area.width), area);
}

fn draw_help(frame: &mut Frame<'_>, area: Rect, style: Styles) {
    let mut lines: Vec<Text<'_>> = keys::HELP
        .iter()
        .map(|(key, what)| Text::from(vec![Span::styled(left(key, 18), style.bold()), Span::raw(*what)]))
        .collect();
    lines.push(Text::default());
    for text in [
        "ORIGIN: whether the application sees the client's address.",
        "KEPT, LOST, UNKNOWN: how many connections it sees so, does not,",
        "and has not been connected to yet. APP SEES: the last address.",
        "IN, OUT: bytes from, to the client. These and RTT are known when",
        "a connection ends. Rates are averages over five seconds.",
        "Only what has opened since the start is counted.",
    ] {
        lines.push(Text::from(text));
    }
    let height = (lines.len() as u16 + 2).min(area.height);
    let width = 70.min(area.width);
    let place =
        Rect { x: area.x + (area.width - width) / 2, y: area.y + (area.height - height) / 2, width, height };
    frame.render_widget(Clear, place);
    // Borders would take what little room there is.
    let block = if height > 8 { Block::bordered().title("srcip top") } else { Block::new() };
    frame.render_widget(Paragraph::new(lines).block(block), place);
}

#[cfg(test)]
mod tests;

//! What the user has chosen to see.

use std::time::Duration;

use super::{
    columns::{Column, fitting},
    model::Model,
    snapshot::{Key, Line, Order, Snapshot, select},
};

/// Which table is shown.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// By client.
    Clients,
    /// By workload.
    Workloads,
}

/// What there is beside the model.
#[derive(Clone, Debug, Default)]
pub struct Surroundings {
    /// The time of day.
    pub time: String,
    /// Events that were lost.
    pub lost_events: u64,
}

/// The state of one table.
#[derive(Clone, Debug)]
struct Place {
    order: Order,
    /// The line that is marked; the first if there is none.
    marked: Option<Key>,
    /// How many lines are above the window.
    offset: usize,
}

/// All that decides what is drawn.
#[derive(Debug)]
pub struct App {
    /// What is added up.
    pub model: Model,
    /// Which table is shown.
    pub kind: Kind,
    /// Only lines with this text.
    pub filter: String,
    /// The filter is being typed.
    pub editing: bool,
    /// The keys are explained.
    pub help: bool,
    /// What is shown does not change.
    pub paused: bool,
    /// What is known beside the model.
    pub surroundings: Surroundings,
    places: [Place; 2],
    snapshot: Snapshot,
    shown: Vec<Line>,
    columns: Vec<(Column, usize)>,
    rows: usize,
}

impl Default for App {
    fn default() -> Self {
        let place = Place { order: Order { by: Column::New, reversed: false }, marked: None, offset: 0 };
        Self {
            model: Model::default(),
            kind: Kind::Clients,
            filter: String::new(),
            editing: false,
            help: false,
            paused: false,
            surroundings: Surroundings::default(),
            places: [place.clone(), place],
            snapshot: Snapshot::default(),
            shown: Vec::new(),
            columns: fitting(80, 15),
            rows: 10,
        }
    }
}

impl App {
    /// Takes a new look at the model, unless paused. `now` is the time since the start.
    pub fn refresh(&mut self, now: Duration) {
        if !self.paused {
            self.snapshot = Snapshot::take(&self.model, now);
        }
        self.arrange();
    }

    /// Chooses and orders the lines once more.
    pub fn arrange(&mut self) {
        let lines = match self.kind {
            Kind::Clients => &self.snapshot.clients,
            Kind::Workloads => &self.snapshot.workloads,
        };
        self.shown = select(lines, &self.filter, self.order());
        self.scroll();
    }

    /// There is room for `rows` lines of `width` columns.
    pub fn fit(&mut self, width: usize, rows: usize) {
        let longest = self.shown.iter().map(|line| crate::text::width(&line.name)).max();
        self.columns = fitting(width, longest.unwrap_or_default());
        self.rows = rows.max(1);
        self.scroll();
    }

    /// The look that is shown.
    pub fn snapshot(&self) -> &Snapshot {
        &self.snapshot
    }

    /// The lines that fit the filter.
    pub fn shown(&self) -> &[Line] {
        &self.shown
    }

    /// The lines in the window; whether one is marked.
    pub fn window(&self) -> impl Iterator<Item = (&Line, bool)> {
        let Place { marked, offset, .. } = self.place();
        self.shown.iter().skip(*offset).take(self.rows).map(|line| (line, Some(line.key) == *marked))
    }

    /// How many lines are above the window.
    pub fn offset(&self) -> usize {
        self.place().offset
    }

    /// The columns, with their widths.
    pub fn columns(&self) -> &[(Column, usize)] {
        &self.columns
    }

    /// The order of the table that is shown.
    pub fn order(&self) -> Order {
        self.place().order
    }

    /// Shows the other table.
    pub fn switch(&mut self) {
        self.kind = match self.kind {
            Kind::Clients => Kind::Workloads,
            Kind::Workloads => Kind::Clients,
        };
        self.arrange();
    }

    /// Orders by the next column, or by the one before.
    pub fn sort_by_next(&mut self, forward: bool) {
        let by = self.order().by;
        let count = self.columns.len();
        let next = match self.columns.iter().position(|(column, _)| *column == by) {
            Some(at) if forward => (at + 1) % count,
            Some(at) => (at + count - 1) % count,
            // Its column does not fit any more.
            None => 0,
        };
        let by = self.columns.get(next).map_or(by, |(column, _)| *column);
        self.place_mut().order = Order { by, reversed: false };
        self.arrange();
    }

    /// Turns the order round.
    pub fn reverse(&mut self) {
        let order = &mut self.place_mut().order;
        order.reversed = !order.reversed;
        self.arrange();
    }

    /// Stops what is shown from changing, or lets it go on.
    pub fn pause(&mut self) {
        self.paused = !self.paused;
    }

    /// Moves the mark by so many lines.
    pub fn step(&mut self, by: isize) {
        let last = self.shown.len().saturating_sub(1);
        let to = match self.marked() {
            Some(at) => at.saturating_add_signed(by).min(last),
            None if by > 1 => (by as usize).min(last),
            None => 0,
        };
        self.mark(to);
    }

    /// Moves the mark by so many windows.
    pub fn page(&mut self, by: isize) {
        self.step(by.saturating_mul(self.rows.cast_signed()));
    }

    /// Marks the first line; nothing is marked then, so that the first stays in sight.
    pub fn home(&mut self) {
        self.place_mut().marked = None;
        self.place_mut().offset = 0;
    }

    /// Marks the last line.
    pub fn end(&mut self) {
        self.mark(self.shown.len().saturating_sub(1));
    }

    fn mark(&mut self, at: usize) {
        self.place_mut().marked = self.shown.get(at).map(|line| line.key);
        self.scroll();
    }

    fn marked(&self) -> Option<usize> {
        let key = self.place().marked?;
        self.shown.iter().position(|line| line.key == key)
    }

    /// Keeps the marked line in the window.
    fn scroll(&mut self) {
        let (rows, marked) = (self.rows, self.marked());
        let most = self.shown.len().saturating_sub(rows);
        let place = self.place_mut();
        match marked {
            Some(at) => {
                place.offset = place.offset.clamp(at.saturating_sub(rows - 1), at).min(most);
            }
            None => place.offset = 0,
        }
    }

    fn place(&self) -> &Place {
        &self.places[self.kind as usize]
    }

    fn place_mut(&mut self) -> &mut Place {
        &mut self.places[self.kind as usize]
    }
}

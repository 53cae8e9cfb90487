//! Data on stdout in the format asked for; everything else goes to stderr.
//!
//! All formats are made from the same JSON, which is the REST schema: a table picks columns from it.

use std::io::{IsTerminal, Write};

use clap::ValueEnum;
use comfy_table::{CellAlignment, Table};
use serde_json::Value;

use crate::units::{show_count, show_size};

/// How data is printed.
#[derive(Copy, Clone, PartialEq, Eq, Debug, Default, ValueEnum)]
pub enum Format {
    /// Columns for people.
    #[default]
    Table,
    /// More columns.
    Wide,
    /// One JSON document.
    Json,
    /// One JSON object per line.
    Jsonl,
    /// Names alone, one per line.
    Name,
}

/// When to use colours.
#[derive(Copy, Clone, PartialEq, Eq, Debug, Default, ValueEnum)]
pub enum Color {
    /// On a terminal, unless `NO_COLOR` is set.
    #[default]
    Auto,
    /// Always.
    Always,
    /// Never.
    Never,
}

/// How a value is shown to people.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub enum Show {
    /// As it is.
    Text,
    /// Bytes, as `10.0 GiB`.
    Size,
    /// A number with separators.
    Count,
    /// A time stamp: the JSON form without fractions.
    Time,
}

/// One column of a table, one line of `show`.
#[derive(Copy, Clone, Debug)]
pub struct Column {
    /// Heading.
    pub title: &'static str,
    /// Where in the object: field names with dots between them.
    pub field: &'static str,
    /// How.
    pub show: Show,
    /// Only with `-o wide` (and in `show`).
    pub wide: bool,
}

/// A column of a plain table.
pub const fn col(title: &'static str, field: &'static str, show: Show) -> Column {
    Column { title, field, show, wide: false }
}

/// A column of `-o wide`.
pub const fn wide(title: &'static str, field: &'static str, show: Show) -> Column {
    Column { title, field, show, wide: true }
}

/// What the global options say about output.
#[derive(Clone, Debug, Default)]
pub struct Output {
    /// Format of data.
    pub format: Format,
    /// Print identities alone.
    pub quiet: bool,
    /// Colours.
    pub color: Color,
    /// No progress lines.
    pub no_progress: bool,
}

impl Output {
    /// Progress is wanted and somebody can see it.
    pub fn progress(&self) -> bool {
        !self.no_progress && !self.quiet && std::io::stderr().is_terminal()
    }

    /// Colours on this stream (`NO_COLOR` is honoured).
    pub fn colored(&self, terminal: bool) -> bool {
        match self.color {
            Color::Always => true,
            Color::Never => false,
            Color::Auto => terminal && std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty()),
        }
    }

    /// Prints a list of objects.
    pub fn list(&self, rows: &[Value], columns: &[Column]) -> std::io::Result<()> {
        emit(&self.render_list(rows, columns))
    }

    /// Prints one object.
    pub fn object(&self, object: &Value, columns: &[Column]) -> std::io::Result<()> {
        emit(&self.render_object(object, columns))
    }

    fn render_list(&self, rows: &[Value], columns: &[Column]) -> String {
        if self.quiet {
            return lines(rows.iter().map(identity));
        }
        match self.format {
            Format::Json => pretty(&Value::Array(rows.to_vec())),
            Format::Jsonl => lines(rows.iter().map(Value::to_string)),
            Format::Name => lines(rows.iter().map(name)),
            Format::Table | Format::Wide => {
                let chosen: Vec<&Column> =
                    columns.iter().filter(|c| !c.wide || self.format == Format::Wide).collect();
                table(rows, &chosen)
            }
        }
    }

    fn render_object(&self, object: &Value, columns: &[Column]) -> String {
        if self.quiet {
            return lines(std::iter::once(identity(object)));
        }
        match self.format {
            Format::Json => pretty(object),
            Format::Jsonl => lines(std::iter::once(object.to_string())),
            Format::Name => lines(std::iter::once(name(object))),
            Format::Table | Format::Wide => {
                let width = columns.iter().map(|c| c.title.len()).max().unwrap_or(0) + 1;
                lines(columns.iter().filter_map(|column| {
                    let text = cell(object, column);
                    let shown = if text.contains('\n') {
                        text.replace('\n', &format!("\n{:width$} ", ""))
                    } else {
                        text
                    };
                    (!shown.is_empty()).then(|| format!("{:width$} {shown}", format!("{}:", column.title)))
                }))
            }
        }
    }
}

fn emit(text: &str) -> std::io::Result<()> {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()
}

fn lines(list: impl Iterator<Item = String>) -> String {
    list.fold(String::new(), |mut all, line| {
        all.push_str(line.trim_end());
        all.push('\n');
        all
    })
}

fn pretty(value: &Value) -> String {
    let mut text = serde_json::to_string_pretty(value).unwrap_or_default(); // a Value always serialises
    text.push('\n');
    text
}

fn field<'a>(object: &'a Value, path: &str) -> &'a Value {
    path.split('.').fold(object, |value, part| value.get(part).unwrap_or(&Value::Null))
}

fn text(value: &Value) -> String {
    match value {
        Value::Null => String::new(),
        Value::String(s) => s.clone(),
        Value::Bool(b) => if *b { "yes" } else { "no" }.to_owned(),
        Value::Number(n) => n.to_string(),
        Value::Array(list) => list.iter().map(text).collect::<Vec<_>>().join("\n"),
        Value::Object(map) => {
            map.iter().map(|(k, v)| format!("{k}={}", text(v))).collect::<Vec<_>>().join(" ")
        }
    }
}

fn identity(object: &Value) -> String {
    let id = field(object, "id");
    if id.is_null() { name(object) } else { text(id) }
}

fn name(object: &Value) -> String {
    let name = field(object, "name");
    if name.is_null() { text(field(object, "id")) } else { text(name) }
}

/// One value for people.
fn cell(object: &Value, column: &Column) -> String {
    let value = field(object, column.field);
    match (column.show, value) {
        (Show::Size, Value::Number(n)) => n.as_u64().map_or_else(|| n.to_string(), show_size),
        (Show::Count, Value::Number(n)) => n.as_u64().map_or_else(|| n.to_string(), show_count),
        (Show::Time, Value::String(s)) => match s.split_once('.') {
            Some((seconds, _)) => format!("{seconds}Z"),
            None => s.clone(),
        },
        _ => text(value),
    }
}

fn table(rows: &[Value], columns: &[&Column]) -> String {
    let mut table = Table::new();
    table.load_style(comfy_table::presets::NOTHING);
    table.force_no_tty();
    table.set_header(columns.iter().map(|c| c.title.to_uppercase()));
    for row in rows {
        table.add_row(columns.iter().map(|c| {
            let shown = cell(row, c).replace('\n', ", ");
            if shown.is_empty() { "-".to_owned() } else { shown }
        }));
    }
    for (index, column) in columns.iter().enumerate() {
        if let Some(c) = table.column_mut(index) {
            c.set_padding((0, 2));
            if matches!(column.show, Show::Size | Show::Count) {
                c.set_cell_alignment(CellAlignment::Right);
            }
        }
    }
    lines(table.lines())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    const COLUMNS: &[Column] = &[
        col("name", "name", Show::Text),
        col("size", "size_bytes", Show::Size),
        wide("made", "created_at", Show::Time),
        wide("pool", "where.pool", Show::Text),
    ];

    fn rows() -> Vec<Value> {
        vec![
            json!({"id": "1", "name": "a", "size_bytes": 10_u64 << 30, "created_at": "2026-01-01T00:00:00.123Z"}),
            json!({"id": "2", "name": "long-name", "size_bytes": 512, "where": {"pool": "p"}}),
        ]
    }

    fn render(format: Format, quiet: bool) -> String {
        Output { format, quiet, ..Output::default() }.render_list(&rows(), COLUMNS)
    }

    #[test]
    fn the_formats() {
        let table = render(Format::Table, false);
        let lines: Vec<&str> = table.lines().collect();
        assert_eq!(lines[0].split_whitespace().collect::<Vec<_>>(), ["NAME", "SIZE"], "{table}");
        assert_eq!(lines[1].split_whitespace().collect::<Vec<_>>(), ["a", "10.0", "GiB"]);
        assert!(render(Format::Wide, false).contains("2026-01-01T00:00:00Z"));
        assert_eq!(render(Format::Name, false), "a\nlong-name\n");
        assert_eq!(render(Format::Table, true), "1\n2\n");
        let json: Value = serde_json::from_str(&render(Format::Json, false)).unwrap();
        assert_eq!(json[1]["size_bytes"], 512);
        assert_eq!(render(Format::Jsonl, false).lines().count(), 2);
    }

    #[test]
    fn one_object_shows_its_fields_below_each_other() {
        let text = Output::default().render_object(&rows()[1], COLUMNS);
        assert_eq!(text, "name: long-name\nsize: 512 B\npool: p\n");
    }
}

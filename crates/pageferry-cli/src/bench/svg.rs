//! Charts as inline SVG: lines over an axis, bars beside a reference. No script, no font, no
//! colour of its own: classes `s0`, `s1`, ... are coloured by the page.

use std::fmt::{self, Write as _};

const WIDTH: f64 = 640.0;
const HEIGHT: f64 = 320.0;
/// Room for axis labels: left, right, top, bottom.
const LEFT: f64 = 58.0;
const RIGHT: f64 = 34.0;
const TOP: f64 = 12.0;
const BOTTOM: f64 = 46.0;

/// How an axis maps values to places.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Scale {
    Linear,
    /// Values must be above 0; others are left out.
    Log,
}

/// A line of a chart.
#[derive(Clone, Debug)]
pub(super) struct Series {
    pub(super) name: String,
    pub(super) points: Vec<(f64, f64)>,
    /// Drawn broken, as controls and references are.
    pub(super) dashed: bool,
}

/// A chart of lines.
#[derive(Clone, Debug)]
pub(super) struct Lines {
    pub(super) title: String,
    pub(super) x_label: String,
    pub(super) y_label: String,
    pub(super) x: Scale,
    pub(super) y: Scale,
    /// Marks on the x axis with their names; the axis spans them.
    pub(super) x_marks: Vec<(f64, String)>,
    pub(super) series: Vec<Series>,
}

/// A value's place on an axis from 0 to 1.
fn place(value: f64, (low, high): (f64, f64), scale: Scale) -> f64 {
    let at = |v: f64| if scale == Scale::Log { v.log10() } else { v };
    if high > low { (at(value) - at(low)) / (at(high) - at(low)) } else { 0.5 }
}

/// Round values that span `high` linearly or `low..high` by powers of ten.
fn marks(low: f64, high: f64, scale: Scale) -> Vec<f64> {
    match scale {
        Scale::Log => {
            let (first, last) = (low.log10().floor(), high.log10().ceil());
            let last = last.max(first + 1.0);
            // Two decades or less are too few marks.
            let steps: &[f64] = if last - first <= 2.0 { &[1.0, 2.0, 5.0] } else { &[1.0] };
            let mut marks = Vec::new();
            let mut power = 10f64.powf(first);
            while power < 10f64.powf(last) * 0.999 && marks.len() < 60 {
                marks.extend(steps.iter().map(|step| step * power));
                power *= 10.0;
            }
            marks.push(power);
            marks
        }
        Scale::Linear => {
            let raw = high.max(1e-9) / 5.0;
            let power = 10f64.powf(raw.log10().floor());
            let step = [1.0, 2.0, 2.5, 5.0, 10.0].map(|m| m * power);
            let step = step.into_iter().find(|&step| step >= raw).unwrap_or(power * 10.0);
            let mut marks = vec![0.0];
            while marks.last().is_some_and(|&mark| mark < high) && marks.len() < 20 {
                marks.push(marks[marks.len() - 1] + step);
            }
            marks
        }
    }
}

/// A number with as many digits as it needs.
pub(super) fn number(value: f64) -> String {
    match value.abs() {
        0.0 => "0".to_owned(),
        v if v >= 100.0 => format!("{value:.0}"),
        v if v >= 1.0 => format!("{}", (value * 100.0).round() / 100.0),
        _ => format!("{}", (value * 1000.0).round() / 1000.0),
    }
}

/// Text that may stand in HTML.
pub(super) fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

impl Lines {
    /// The chart; nothing if there are no points.
    pub(super) fn render(&self) -> Result<String, fmt::Error> {
        let usable = |&(x, y): &(f64, f64)| {
            (self.x != Scale::Log || x > 0.0) && (self.y != Scale::Log || y > 0.0)
        };
        let all: Vec<(f64, f64)> =
            self.series.iter().flat_map(|s| s.points.iter().copied().filter(usable)).collect();
        let mut out = String::new();
        if all.is_empty() {
            return Ok(out);
        }
        let ends = |values: &dyn Fn() -> Vec<f64>| {
            let values = values();
            let low = values.iter().copied().fold(f64::INFINITY, f64::min);
            (low, values.iter().copied().fold(f64::NEG_INFINITY, f64::max))
        };
        let x_ends = ends(&|| {
            let marks = self.x_marks.iter().map(|(x, _)| *x);
            all.iter().map(|(x, _)| *x).chain(marks).collect()
        });
        let (low, high) = ends(&|| all.iter().map(|(_, y)| *y).collect());
        let y_marks = marks(low, high, self.y);
        let y_ends = (y_marks[0], y_marks[y_marks.len() - 1]);
        let x_at = |x: f64| LEFT + place(x, x_ends, self.x) * (WIDTH - LEFT - RIGHT);
        let y_at = |y: f64| HEIGHT - BOTTOM - place(y, y_ends, self.y) * (HEIGHT - TOP - BOTTOM);

        writeln!(out, "<figure><figcaption>{}</figcaption>", escape(&self.title))?;
        writeln!(
            out,
            "<svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\" aria-label=\"{}\">",
            escape(&self.title)
        )?;
        for &mark in &y_marks {
            let y = y_at(mark);
            writeln!(
                out,
                "<line class=\"grid\" x1=\"{LEFT}\" x2=\"{:.1}\" y1=\"{y:.1}\" y2=\"{y:.1}\"/>",
                WIDTH - RIGHT
            )?;
            writeln!(
                out,
                "<text class=\"tick\" text-anchor=\"end\" x=\"{:.1}\" y=\"{:.1}\">{}</text>",
                LEFT - 6.0,
                y + 4.0,
                number(mark)
            )?;
        }
        for (mark, name) in &self.x_marks {
            let x = x_at(*mark);
            writeln!(
                out,
                "<line class=\"grid\" x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"{TOP}\" y2=\"{:.1}\"/>",
                HEIGHT - BOTTOM
            )?;
            writeln!(
                out,
                "<text class=\"tick\" text-anchor=\"middle\" x=\"{x:.1}\" y=\"{:.1}\">{}</text>",
                HEIGHT - BOTTOM + 16.0,
                escape(name)
            )?;
        }
        writeln!(
            out,
            "<text class=\"label\" text-anchor=\"middle\" x=\"{:.1}\" y=\"{:.1}\">{}</text>",
            (LEFT + WIDTH - RIGHT) / 2.0,
            HEIGHT - 8.0,
            escape(&self.x_label)
        )?;
        writeln!(
            out,
            "<text class=\"label\" text-anchor=\"middle\" transform=\"translate(12 {:.1}) rotate(-90)\">{}</text>",
            (TOP + HEIGHT - BOTTOM) / 2.0,
            escape(&self.y_label)
        )?;
        for (index, series) in self.series.iter().enumerate() {
            let places: Vec<String> = series
                .points
                .iter()
                .copied()
                .filter(usable)
                .map(|(x, y)| format!("{:.1},{:.1}", x_at(x), y_at(y)))
                .collect();
            let dashed = if series.dashed { " dashed" } else { "" };
            writeln!(
                out,
                "<polyline class=\"line s{}{dashed}\" points=\"{}\"><title>{}</title></polyline>",
                index % 8,
                places.join(" "),
                escape(&series.name)
            )?;
        }
        out.push_str("</svg>\n<p class=\"legend\">");
        for (index, series) in self.series.iter().enumerate() {
            let dashed = if series.dashed { " dashed" } else { "" };
            write!(
                out,
                "<span><svg class=\"key\" viewBox=\"0 0 24 8\"><line class=\"line s{}{dashed}\" \
                 x1=\"0\" x2=\"24\" y1=\"4\" y2=\"4\"/></svg>{}</span> ",
                index % 8,
                escape(&series.name)
            )?;
        }
        out.push_str("</p></figure>\n");
        Ok(out)
    }
}

/// A bar with the spread of its value.
#[derive(Clone, Debug)]
pub(super) struct Bar {
    pub(super) name: String,
    pub(super) low: f64,
    pub(super) value: f64,
    pub(super) high: f64,
    /// Which colour.
    pub(super) class: usize,
}

/// Bars from left to right, and a broken line at the reference.
pub(super) fn bars(
    title: &str,
    unit: &str,
    bars: &[Bar],
    reference: Option<(f64, &str)>,
) -> Result<String, fmt::Error> {
    const ROW: f64 = 22.0;
    const NAMES: f64 = 290.0;
    let mut out = String::new();
    if bars.is_empty() {
        return Ok(out);
    }
    let top =
        bars.iter().map(|bar| bar.high).chain(reference.map(|(at, _)| at)).fold(0.0, f64::max);
    let scale_marks = marks(0.0, top, Scale::Linear);
    let end = scale_marks[scale_marks.len() - 1];
    let x_at = |value: f64| NAMES + value / end * (WIDTH - NAMES - 48.0);
    let height = bars.len() as f64 * ROW + 50.0;
    let floor = height - 36.0;
    writeln!(out, "<figure><figcaption>{}</figcaption>", escape(title))?;
    writeln!(
        out,
        "<svg viewBox=\"0 0 {WIDTH} {height}\" role=\"img\" aria-label=\"{}\">",
        escape(title)
    )?;
    for mark in scale_marks {
        let x = x_at(mark);
        writeln!(
            out,
            "<line class=\"grid\" x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"4\" y2=\"{floor:.1}\"/>"
        )?;
        writeln!(
            out,
            "<text class=\"tick\" text-anchor=\"middle\" x=\"{x:.1}\" y=\"{:.1}\">{}</text>",
            floor + 14.0,
            number(mark)
        )?;
    }
    for (index, bar) in bars.iter().enumerate() {
        let y = 8.0 + index as f64 * ROW;
        let (x, width) = (x_at(0.0), x_at(bar.value) - x_at(0.0));
        writeln!(
            out,
            "<text class=\"tick\" text-anchor=\"end\" x=\"{:.1}\" y=\"{:.1}\">{}</text>",
            NAMES - 6.0,
            y + 11.0,
            escape(&bar.name)
        )?;
        writeln!(
            out,
            "<rect class=\"bar s{}\" x=\"{x:.1}\" y=\"{y:.1}\" width=\"{width:.1}\" height=\"14\"/>",
            bar.class % 8
        )?;
        writeln!(
            out,
            "<line class=\"whisker\" x1=\"{:.1}\" x2=\"{:.1}\" y1=\"{2:.1}\" y2=\"{2:.1}\"/>",
            x_at(bar.low),
            x_at(bar.high),
            y + 7.0
        )?;
        writeln!(
            out,
            "<text class=\"value\" x=\"{:.1}\" y=\"{:.1}\">{}</text>",
            x_at(bar.high) + 5.0,
            y + 11.0,
            number(bar.value)
        )?;
    }
    if let Some((at, name)) = reference {
        let x = x_at(at);
        writeln!(
            out,
            "<line class=\"reference\" x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"4\" y2=\"{floor:.1}\"><title>{}</title></line>",
            escape(name)
        )?;
    }
    let note = reference
        .map_or_else(String::new, |(at, name)| format!("; broken line: {name}, {}", number(at)));
    writeln!(
        out,
        "<text class=\"label\" text-anchor=\"middle\" x=\"{:.1}\" y=\"{:.1}\">{}</text>",
        (NAMES + WIDTH) / 2.0,
        height - 2.0,
        escape(&format!("{unit}{note}"))
    )?;
    out.push_str("</svg></figure>\n");
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_span_the_values() {
        assert_eq!(marks(0.0, 9.3, Scale::Linear), [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]);
        assert_eq!(marks(0.3, 40.0, Scale::Log), [0.1, 1.0, 10.0, 100.0]);
        assert_eq!(marks(5.0, 5.0, Scale::Log), [1.0, 2.0, 5.0, 10.0]);
    }

    #[test]
    fn a_log_axis_leaves_out_what_it_cannot_show() {
        let chart = Lines {
            title: "a & b".to_owned(),
            x_label: "x".to_owned(),
            y_label: "y".to_owned(),
            x: Scale::Log,
            y: Scale::Log,
            x_marks: vec![(1.0, "1".to_owned()), (10.0, "10".to_owned())],
            series: vec![Series {
                name: "<s>".to_owned(),
                points: vec![(0.0, 1.0), (1.0, 0.0), (1.0, 2.0), (10.0, 20.0)],
                dashed: false,
            }],
        };
        let svg = chart.render().expect("text");
        assert!(svg.contains("a &amp; b") && svg.contains("&lt;s&gt;") && !svg.contains("NaN"));
        let points = svg.split("points=\"").nth(1).and_then(|rest| rest.split('"').next());
        assert_eq!(points.map(|p| p.split(' ').count()), Some(2));
        let empty = Lines { series: Vec::new(), ..chart };
        assert_eq!(empty.render().as_deref(), Ok(""));
    }
}

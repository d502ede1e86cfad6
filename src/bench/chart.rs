//! A chart of series over two axes, as one self-contained SVG.
//!
//! **Invariant:** nothing is drawn outside the frame but text, and no text of the legend lies over a point.

use std::ops::Range;

use plotters::coord::ranged1d::{KeyPointHint, NoDefaultFormatting, Ranged, ValueFormatter};
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

/// Colours that stay apart for colour-blind eyes, on white; series count through them.
pub const PALETTE: [RGBColor; 8] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 140, 100),
    RGBColor(170, 70, 140),
    RGBColor(190, 130, 0),
    RGBColor(60, 160, 220),
    RGBColor(90, 70, 160),
    RGBColor(110, 110, 110),
];

const INK: RGBColor = RGBColor(40, 40, 40);
const FAINT: RGBColor = RGBColor(225, 225, 225);
const FONT: &str = "sans-serif";
const SIZE: (u32, u32) = (1000, 520);
/// Room for the legend.
const LEGEND: u32 = 290;
/// Marks of an axis at most.
const MOST_TICKS: usize = 12;
/// Characters of a line of the legend.
const LEGEND_CHARS: usize = 36;

/// How an axis counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scale {
    /// Equal steps, from 0.
    Linear,
    /// Equal ratios.
    Log,
}

/// How points are joined.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Line {
    /// Not at all.
    None,
    /// A line.
    Solid,
    /// Dashes.
    Dashed,
}

/// How a point looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mark {
    /// Not at all.
    None,
    /// An open circle.
    Ring,
    /// A filled circle.
    Dot,
    /// A filled triangle.
    Triangle,
    /// A cross.
    Cross,
}

/// A point of a series.
#[derive(Clone, Debug, PartialEq)]
pub struct Dot {
    /// Where.
    pub at: (f64, f64),
    /// From where to where it may be, upwards.
    pub spread: Option<(f64, f64)>,
    /// What is written beside it.
    pub label: Option<String>,
}

/// Points that belong together.
#[derive(Clone, Debug, PartialEq)]
pub struct Series {
    /// What the legend says; nothing for a series that needs no entry.
    pub name: Option<String>,
    /// Its colour.
    pub colour: RGBColor,
    /// How points are joined.
    pub line: Line,
    /// How a point looks.
    pub mark: Mark,
    /// The points, from left to right.
    pub dots: Vec<Dot>,
}

/// A chart.
#[derive(Clone, Debug, PartialEq)]
pub struct Chart {
    /// What it shows.
    pub title: String,
    /// What the axis to the right counts, with its unit.
    pub x: (String, Scale),
    /// What the axis upwards counts, with its unit.
    pub y: (String, Scale),
    /// What is drawn, the first below the others.
    pub series: Vec<Series>,
    /// The share by which y may differ from x within a band along the diagonal; axes are equal then.
    pub band: Option<f64>,
}

impl Dot {
    /// A point without more.
    pub fn at(x: f64, y: f64) -> Self {
        Dot { at: (x, y), spread: None, label: None }
    }
}

/// An axis.
#[derive(Clone, Copy, Debug)]
struct Axis {
    from: f64,
    to: f64,
    scale: Scale,
}

impl Axis {
    /// An axis that all values have room on.
    fn of(scale: Scale, values: impl Iterator<Item = f64>) -> Axis {
        let (mut low, mut high) = (f64::INFINITY, f64::NEG_INFINITY);
        for value in values.filter(|value| value.is_finite() && (*value > 0.0 || scale == Scale::Linear)) {
            (low, high) = (low.min(value), high.max(value));
        }
        if low > high {
            (low, high) = (1.0, 10.0);
        }
        match scale {
            Scale::Linear => Axis { from: low.min(0.0), to: if high > 0.0 { 1.08 * high } else { 1.0 }, scale },
            Scale::Log => {
                let room = (high / low).powf(0.06).max(1.15);
                Axis { from: low / room, to: high * room, scale }
            }
        }
    }

    /// Round values along it, a dozen at most.
    fn ticks(&self) -> Vec<f64> {
        let step = |span: f64| {
            let power = 10f64.powf(span.log10().floor());
            [1.0, 2.0, 5.0, 10.0].map(|digit| digit * power).into_iter().find(|step| *step >= span).unwrap_or(span)
        };
        match self.scale {
            Scale::Linear => {
                let step = step((self.to - self.from) / 7.0);
                let first = (self.from / step).ceil() as i64;
                (first..).map(|count| count as f64 * step).take_while(|tick| *tick <= self.to).collect()
            }
            Scale::Log => {
                let (first, last) = (self.from.log10().floor() as i32, self.to.log10().ceil() as i32);
                let ticks = |digits: &[f64], apart: usize| -> Vec<f64> {
                    let powers = (first..=last).step_by(apart);
                    let all = powers.flat_map(|power| digits.iter().map(move |digit| digit * 10f64.powi(power)));
                    all.filter(|tick| (self.from..=self.to).contains(tick)).collect()
                };
                let digits: [&[f64]; 4] = [&[1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0], &[1.0, 2.0, 5.0], &[1.0, 3.0], &[1.0]];
                let close = digits.into_iter().map(|digits| ticks(digits, 1)).find(|ticks| ticks.len() <= MOST_TICKS);
                close.unwrap_or_else(|| ticks(&[1.0], ((last - first) as usize).div_ceil(MOST_TICKS)))
            }
        }
    }
}

impl Ranged for Axis {
    type ValueType = f64;
    type FormatOption = NoDefaultFormatting;

    fn map(&self, value: &f64, limit: (i32, i32)) -> i32 {
        let along = |value: f64| match self.scale {
            Scale::Linear => value,
            Scale::Log => value.max(f64::MIN_POSITIVE).ln(),
        };
        let share = (along(*value) - along(self.from)) / (along(self.to) - along(self.from));
        limit.0 + (share.clamp(0.0, 1.0) * f64::from(limit.1 - limit.0)).round() as i32
    }

    fn key_points<Hint: KeyPointHint>(&self, hint: Hint) -> Vec<f64> {
        // Bold lines have all ticks; there are no light ones between them.
        if hint.weight().allow_light_points() { Vec::new() } else { self.ticks() }
    }

    fn range(&self) -> Range<f64> {
        self.from..self.to
    }
}

impl ValueFormatter<f64> for Axis {
    fn format_ext(&self, value: &f64) -> String {
        short(*value)
    }
}

/// A number in a few characters: 0.05, 12.5, 2000, 20k, 3M.
pub fn short(value: f64) -> String {
    let (scaled, unit) = match value.abs() {
        size if size >= 1e6 => (value / 1e6, "M"),
        size if size >= 1e4 => (value / 1e3, "k"),
        _ => (value, ""),
    };
    if scaled == 0.0 {
        return "0".to_owned();
    }
    let before = scaled.abs().log10().floor() as i32;
    let text = format!("{scaled:.*}", usize::try_from(2 - before).unwrap_or(0));
    let text = if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.') } else { &text };
    format!("{text}{unit}")
}

/// Text in lines of at most as many characters, cut between words.
fn wrapped(text: &str, most: usize) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    for word in text.split(' ') {
        match lines.last_mut() {
            Some(line) if line.chars().count() + 1 + word.chars().count() <= most => {
                line.push(' ');
                line.push_str(word);
            }
            _ => lines.push(word.to_owned()),
        }
    }
    lines
}

type Area<'a> = DrawingArea<SVGBackend<'a>, plotters::coord::Shift>;
type Drawn = Result<(), Box<dyn std::error::Error>>;

impl Chart {
    /// The chart as an `svg` element.
    pub fn svg(&self) -> String {
        let mut text = String::new();
        // Text has nothing that writing could fail at.
        self.draw(&mut text).expect("a string takes what is drawn");
        // Everything scales with the page.
        text.replacen("<svg width=\"1000\" height=\"520\"", "<svg", 1)
    }

    fn draw(&self, text: &mut String) -> Drawn {
        let root = SVGBackend::with_string(text, SIZE).into_drawing_area();
        root.fill(&WHITE)?;
        let style = TextStyle::from((FONT, 17)).color(&INK);
        root.draw(&Text::new(self.title.clone(), (16, 12), style))?;
        let (left, right) = root.margin(36, 6, 0, 0).split_horizontally(SIZE.0 - LEGEND);
        self.draw_plot(&left)?;
        self.draw_legend(&right)?;
        root.present()?;
        Ok(())
    }

    fn draw_plot(&self, area: &Area<'_>) -> Drawn {
        let dots = || self.series.iter().flat_map(|series| &series.dots);
        let upwards = |dot: &Dot| {
            [dot.at.1, dot.spread.map_or(dot.at.1, |(low, _)| low), dot.spread.map_or(dot.at.1, |(_, high)| high)]
        };
        let mut x = Axis::of(self.x.1, dots().map(|dot| dot.at.0));
        let mut y = Axis::of(self.y.1, dots().flat_map(upwards));
        if self.band.is_some() {
            let (from, to) = (x.from.min(y.from), x.to.max(y.to));
            (x, y) = (Axis { from, to, ..x }, Axis { from, to, ..y });
        }
        let mut chart =
            ChartBuilder::on(area).margin(10).x_label_area_size(46).y_label_area_size(66).build_cartesian_2d(x, y)?;
        chart
            .configure_mesh()
            .bold_line_style(FAINT)
            .light_line_style(TRANSPARENT)
            .axis_style(INK)
            .x_desc(&self.x.0)
            .y_desc(&self.y.0)
            .x_labels(MOST_TICKS)
            .y_labels(MOST_TICKS)
            .label_style((FONT, 13).into_font().color(&INK))
            .axis_desc_style((FONT, 14).into_font().color(&INK))
            .draw()?;
        if let Some(band) = self.band {
            let (from, to) = (x.from, x.to);
            // Along the frame where the band leaves it, so that it is cut and not bent.
            let upper = [(from, from * (1.0 + band)), (to / (1.0 + band), to), (to, to)];
            let lower = [(to, to * (1.0 - band)), (from / (1.0 - band), from), (from, from)];
            let fill = FAINT.mix(0.6).filled();
            chart.draw_series([Polygon::new([upper, lower].concat(), fill)])?;
            chart.draw_series([PathElement::new([(from, from), (to, to)], INK.stroke_width(1))])?;
        }
        for series in &self.series {
            let colour = series.colour;
            let points: Vec<(f64, f64)> = series.dots.iter().map(|dot| dot.at).collect();
            match series.line {
                Line::None => {}
                Line::Solid => {
                    chart.draw_series([PathElement::new(points, colour.stroke_width(2))])?;
                }
                Line::Dashed => {
                    chart.draw_series(DashedLineSeries::new(points, 9, 6, colour.stroke_width(2)))?;
                }
            }
            for dot in &series.dots {
                if let Some((low, high)) = dot.spread.filter(|(low, high)| low < high) {
                    chart
                        .draw_series([PathElement::new([(dot.at.0, low), (dot.at.0, high)], colour.stroke_width(1))])?;
                }
                let at = dot.at;
                match series.mark {
                    Mark::None => {}
                    Mark::Ring => {
                        chart.draw_series([
                            Circle::new(at, 4, WHITE.filled()),
                            Circle::new(at, 4, colour.stroke_width(2)),
                        ])?;
                    }
                    Mark::Dot => {
                        chart.draw_series([Circle::new(at, 5, colour.filled())])?;
                    }
                    Mark::Triangle => {
                        chart.draw_series([TriangleMarker::new(at, 7, colour.filled())])?;
                    }
                    Mark::Cross => {
                        chart.draw_series([Cross::new(at, 4, colour.stroke_width(2))])?;
                    }
                }
                if let Some(label) = &dot.label {
                    let style = TextStyle::from((FONT, 12)).color(&colour).pos(Pos::new(HPos::Left, VPos::Bottom));
                    let beside = EmptyElement::at(at) + Text::new(label.clone(), (6, -4), style);
                    chart.draw_series([beside])?;
                }
            }
        }
        Ok(())
    }

    fn draw_legend(&self, area: &Area<'_>) -> Drawn {
        let mut y = 20;
        let style = TextStyle::from((FONT, 13)).color(&INK).pos(Pos::new(HPos::Left, VPos::Center));
        for series in &self.series {
            let Some(name) = &series.name else { continue };
            let colour = series.colour;
            match series.line {
                Line::None => {}
                Line::Solid => area.draw(&PathElement::new([(6, y), (34, y)], colour.stroke_width(2)))?,
                Line::Dashed => {
                    for x in [6, 18, 30] {
                        area.draw(&PathElement::new([(x, y), (x + 7, y)], colour.stroke_width(2)))?;
                    }
                }
            }
            match series.mark {
                Mark::None => {}
                Mark::Ring => {
                    area.draw(&Circle::new((20, y), 4, WHITE.filled()))?;
                    area.draw(&Circle::new((20, y), 4, colour.stroke_width(2)))?;
                }
                Mark::Dot => area.draw(&Circle::new((20, y), 5, colour.filled()))?,
                Mark::Triangle => area.draw(&TriangleMarker::new((20, y), 7, colour.filled()))?,
                Mark::Cross => area.draw(&Cross::new((20, y), 4, colour.stroke_width(2)))?,
            }
            for line in wrapped(name, LEGEND_CHARS) {
                area.draw(&Text::new(line, (44, y), style.clone()))?;
                y += 17;
            }
            y += 7;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_short() {
        let texts = [0.0, 0.05, 0.12345, 1.0, 12.5, 999.4, 2000.0, 20_000.0, 3.25e6].map(short);
        assert_eq!(texts, ["0", "0.05", "0.123", "1", "12.5", "999", "2000", "20k", "3.25M"]);
    }

    #[test]
    fn ticks_are_round_and_within() {
        for (from, to, scale) in
            [(0.0, 7.3, Scale::Linear), (0.9, 70.0, Scale::Log), (1e-3, 1e9, Scale::Log), (3.0, 5.0, Scale::Log)]
        {
            let ticks = Axis { from, to, scale }.ticks();
            assert!((3..=13).contains(&ticks.len()), "{from}..{to}: {ticks:?}");
            assert!(ticks.iter().all(|tick| (from..=to).contains(tick)));
        }
    }

    #[test]
    fn text_is_cut_between_words() {
        assert_eq!(wrapped("one two three", 8), ["one two", "three"]);
    }
}

//! A picture of lanes over time: one self-contained SVG.
//!
//! **Invariant:** what is drawn is the simulated timeline; the size of the file does not grow with the number of
//! steps, for what is too narrow to be seen is drawn together.

use std::fmt::Write as _;

use super::search::Rehearsed;
use crate::schedule::step::{Lane, Op};

const WIDTH: f64 = 1400.0;
const LEFT: f64 = 90.0;
const TOP: f64 = 64.0;
const ROW: f64 = 44.0;
const BAR: f64 = 30.0;
/// Bars closer or narrower than this are drawn as one.
const FINE: f64 = 0.6;

/// What steps do, by colour.
const KINDS: [(&str, &str); 6] = [
    ("weights", "#3b6fb6"),
    ("KV pages", "#d98b2b"),
    ("hidden states", "#8a63b8"),
    ("layers", "#3f9a5f"),
    ("head and samples", "#c0504d"),
    ("decoding planes", "#6b7a86"),
];

fn kind(op: Op) -> usize {
    match op {
        Op::ReadWeights { .. } | Op::LoadWeights { .. } => 0,
        Op::ReadKv | Op::LoadKv | Op::StoreKv | Op::WriteKv => 1,
        Op::ReadHidden | Op::LoadHidden | Op::StoreHidden | Op::WriteHidden | Op::LoadEmbeddings => 2,
        Op::Embed | Op::Layer => 3,
        Op::Gather | Op::Head => 4,
        Op::DecodeWeights { .. } => 5,
    }
}

/// Seconds with a unit that suits them.
pub fn duration(secs: f64) -> String {
    match secs {
        secs if secs >= 100.0 => format!("{secs:.0} s"),
        secs if secs >= 1.0 => format!("{secs:.2} s"),
        secs if secs >= 1e-3 => format!("{:.1} ms", secs * 1e3),
        secs => format!("{:.0} us", secs * 1e6),
    }
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

/// Draws pass `pass` (the passes before and after it run into it where they overlap).
pub fn svg(rehearsed: &Rehearsed, pass: usize, title: &str) -> String {
    let from = if pass == 0 { 0.0 } else { rehearsed.ends[pass - 1] };
    let to = rehearsed.ends[pass];
    let scale = (WIDTH - LEFT - 20.0) / (to - from).max(1e-12);
    let lanes: Vec<Lane> =
        Lane::ALL.into_iter().filter(|lane| rehearsed.timeline.busy_secs[lane.index()] > 0.0).collect();
    let height = TOP + ROW * lanes.len() as f64 + 60.0;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" width=\"{WIDTH}\" \
         height=\"{height}\" font-family=\"sans-serif\" font-size=\"13\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"#ffffff\"/>\n\
         <text x=\"{LEFT}\" y=\"24\" font-size=\"16\">{}</text>\n",
        escape(title)
    );
    legend(&mut svg);
    for (row, lane) in lanes.iter().enumerate() {
        let y = TOP + ROW * row as f64;
        let mut bars: Vec<(f64, f64, usize)> = Vec::new();
        let mut busy = 0.0;
        for (step, span) in rehearsed.steps.iter().zip(&rehearsed.timeline.spans) {
            let (start, end) = (span.start_secs.max(from), span.end_secs.min(to));
            if step.lane != *lane || end <= start {
                continue;
            }
            busy += end - start;
            let (x0, x1, colour) = (LEFT + (start - from) * scale, LEFT + (end - from) * scale, kind(step.op));
            match bars.last_mut() {
                Some(last) if x0 - last.1 < FINE && (last.2 == colour || x1 - x0 < FINE) => last.1 = x1,
                _ => bars.push((x0, x1, colour)),
            }
        }
        let share = 100.0 * busy / (to - from).max(1e-12);
        let base = y + BAR;
        let _ = write!(
            svg,
            "<text x=\"8\" y=\"{:.1}\">{lane}</text><text x=\"8\" y=\"{:.1}\" fill=\"#777\" font-size=\"11\">{share:.0} %</text>\n\
             <line x1=\"{LEFT}\" y1=\"{base:.1}\" x2=\"{:.1}\" y2=\"{base:.1}\" stroke=\"#ddd\"/>\n",
            y + 13.0,
            y + 27.0,
            WIDTH - 20.0
        );
        for (x0, x1, colour) in bars {
            let _ = write!(
                svg,
                "<rect x=\"{x0:.2}\" y=\"{y:.1}\" width=\"{:.2}\" height=\"{BAR}\" fill=\"{}\" stroke=\"#fff\" \
                 stroke-width=\"0.3\"/>\n",
                (x1 - x0).max(0.3),
                KINDS[colour].1
            );
        }
    }
    axis(&mut svg, to - from, scale, TOP + ROW * lanes.len() as f64);
    svg.push_str("</svg>\n");
    svg
}

fn legend(svg: &mut String) {
    let mut x = LEFT;
    for (name, colour) in KINDS {
        let _ = write!(
            svg,
            "<rect x=\"{x}\" y=\"38\" width=\"12\" height=\"12\" fill=\"{colour}\"/><text x=\"{}\" y=\"49\" \
             fill=\"#555\" font-size=\"12\">{name}</text>\n",
            x + 17.0
        );
        x += 45.0 + 7.0 * name.len() as f64;
    }
}

fn axis(svg: &mut String, secs: f64, scale: f64, y: f64) {
    // A round step that makes five to ten marks.
    let rough = secs / 6.0;
    let power = 10f64.powf(rough.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0].map(|digit| digit * power).into_iter().find(|step| *step >= rough);
    let step = step.unwrap_or(rough).max(1e-12);
    let mut at = 0.0;
    while at <= secs * (1.0 + 1e-9) {
        let x = LEFT + at * scale;
        let _ = write!(
            svg,
            "<line x1=\"{x:.1}\" y1=\"{:.1}\" x2=\"{x:.1}\" y2=\"{y:.1}\" stroke=\"#00000018\"/>\
             <text x=\"{x:.1}\" y=\"{:.1}\" text-anchor=\"middle\" fill=\"#555\" font-size=\"12\">{}</text>\n",
            TOP - 6.0,
            y + 18.0,
            if at == 0.0 { "0".to_owned() } else { duration(at) }
        );
        at += step;
    }
}

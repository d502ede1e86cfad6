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

/// A stretch of time and where it is drawn.
struct Panel {
    from: f64,
    to: f64,
    top: f64,
}

/// Draws pass `pass` (the passes before and after it run into it where they overlap), and below it a few stages from
/// its middle, enlarged.
pub fn svg(rehearsed: &Rehearsed, pass: usize, title: &str) -> String {
    let from = if pass == 0 { 0.0 } else { rehearsed.ends[pass - 1] };
    let to = rehearsed.ends[pass].max(from + 1e-12);
    let stages = rehearsed.steps.iter().map(|step| step.stage + 1).max().unwrap_or(1);
    let middle = from + (to - from) / 2.0;
    let enlarged = (to - from) * (3.0 / f64::from(stages)).min(1.0);
    let lanes: Vec<Lane> =
        Lane::ALL.into_iter().filter(|lane| rehearsed.timeline.busy_secs[lane.index()] > 0.0).collect();
    let rows = ROW * lanes.len() as f64;
    let below = TOP + rows + 64.0;
    let height = below + rows + 40.0;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" width=\"{WIDTH}\" \
         height=\"{height}\" font-family=\"sans-serif\" font-size=\"13\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"#ffffff\"/>\n\
         <text x=\"{LEFT}\" y=\"24\" font-size=\"16\">{}</text>\n",
        escape(title)
    );
    legend(&mut svg);
    let _ = writeln!(svg, "<text x=\"{LEFT}\" y=\"{:.1}\" fill=\"#555\">three stages of it</text>", below - 12.0);
    draw_panel(&mut svg, rehearsed, &lanes, &Panel { from, to, top: TOP });
    draw_panel(&mut svg, rehearsed, &lanes, &Panel { from: middle, to: middle + enlarged, top: below });
    svg.push_str("</svg>\n");
    svg
}

fn draw_panel(svg: &mut String, rehearsed: &Rehearsed, lanes: &[Lane], panel: &Panel) {
    let Panel { from, to, top } = *panel;
    let scale = (WIDTH - LEFT - 20.0) / (to - from);
    for (row, lane) in lanes.iter().enumerate() {
        let y = top + ROW * row as f64;
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
        let share = 100.0 * busy / (to - from);
        let base = y + BAR;
        let _ = writeln!(
            svg,
            "<text x=\"8\" y=\"{:.1}\">{lane}</text><text x=\"8\" y=\"{:.1}\" fill=\"#777\" \
             font-size=\"11\">{share:.0} %</text><line x1=\"{LEFT}\" y1=\"{base:.1}\" x2=\"{:.1}\" y2=\"{base:.1}\" \
             stroke=\"#ddd\"/>",
            y + 13.0,
            y + 27.0,
            WIDTH - 20.0
        );
        for (x0, x1, colour) in bars {
            let _ = writeln!(
                svg,
                "<rect x=\"{x0:.2}\" y=\"{y:.1}\" width=\"{:.2}\" height=\"{BAR}\" fill=\"{}\"/>",
                (x1 - x0 - 0.3).max(0.3),
                KINDS[colour].1
            );
        }
    }
    axis(svg, to - from, scale, &Panel { top: top + ROW * lanes.len() as f64, ..*panel }, top);
}

fn legend(svg: &mut String) {
    let mut x = LEFT;
    for (name, colour) in KINDS {
        let _ = writeln!(
            svg,
            "<rect x=\"{x}\" y=\"38\" width=\"12\" height=\"12\" fill=\"{colour}\"/><text x=\"{}\" y=\"49\" \
             fill=\"#555\" font-size=\"12\">{name}</text>",
            x + 17.0
        );
        x += 45.0 + 7.0 * name.len() as f64;
    }
}

/// Marks of time between `top` and the foot of `panel`.
fn axis(svg: &mut String, secs: f64, scale: f64, panel: &Panel, top: f64) {
    let y = panel.top;
    // A round step that makes five to ten marks.
    let rough = secs / 6.0;
    let power = 10f64.powf(rough.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0].map(|digit| digit * power).into_iter().find(|step| *step >= rough);
    let step = step.unwrap_or(rough).max(1e-12);
    let mut at = 0.0;
    while at <= secs * (1.0 + 1e-9) {
        let x = LEFT + at * scale;
        let _ = writeln!(
            svg,
            "<line x1=\"{x:.1}\" y1=\"{:.1}\" x2=\"{x:.1}\" y2=\"{y:.1}\" stroke=\"#000\" stroke-opacity=\"0.12\"/>\
             <text x=\"{x:.1}\" y=\"{:.1}\" text-anchor=\"middle\" fill=\"#555\" font-size=\"12\">{}</text>",
            top - 4.0,
            y + 14.0,
            if at == 0.0 { "0".to_owned() } else { duration(at) }
        );
        at += step;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_have_units() {
        assert_eq!(duration(0.0035), "3.5 ms");
        assert_eq!(duration(2.5), "2.50 s");
        assert_eq!(duration(250.0), "250 s");
        assert_eq!(duration(0.000_012), "12 us");
    }
}

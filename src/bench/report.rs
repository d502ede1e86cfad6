//! A sweep as one page: pictures, then every point in a table.
//!
//! **Invariant:** the page is whole: it loads nothing, runs nothing, and every picture is well-formed XML.

use std::fmt::Write as _;

use super::chart::short;
use super::given::{Published, Quality};
use super::pictures::{accuracy, budgets, groups, roofline, trade_off};
use super::sweep::{Environment, Row};

/// Groups that have a picture of their own.
const ROOFLINES: usize = 6;
/// Points of the table; the others are in the results' file.
const TABLE_ROWS: usize = 400;

const STYLE: &str = "body{font:15px/1.5 sans-serif;color:#222;background:#fff;max-width:1040px;margin:2em auto;\
padding:0 1em}h1{font-size:1.5em}figure{margin:2.2em 0}figure svg{width:100%;height:auto;border:1px solid #ddd}\
figcaption{color:#555;font-size:.9em;margin-top:.4em}table{border-collapse:collapse;font-size:.82em}\
th,td{border-bottom:1px solid #ddd;padding:.2em .7em;text-align:left;vertical-align:top}td.n{text-align:right}\
dl{display:grid;grid-template-columns:max-content 1fr;gap:.1em 1.2em;font-size:.9em}dt{color:#555}dd{margin:0}\
.scroll{overflow-x:auto}";

/// What a page is made from.
pub struct Report<'a> {
    /// Where the rows come from.
    pub environment: &'a Environment,
    /// The rows.
    pub rows: &'a [Row],
    /// What others have published.
    pub published: Option<&'a Published>,
    /// What caches cost.
    pub qualities: &'a [Quality],
    /// A pass of the fastest plan, lane by lane, as SVG, and what it is.
    pub timeline: Option<(String, String)>,
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

impl Report<'_> {
    /// The page.
    pub fn html(&self) -> String {
        let Report { environment, rows, published, qualities, .. } = *self;
        let title = format!("{}: a sweep on {}", environment.model, environment.machine.name);
        let mut html = format!(
            "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\"/>\n<title>{0}</title>\n\
             <style>{STYLE}</style>\n</head>\n<body>\n<h1>{0}</h1>\n",
            escape(&title)
        );
        self.facts(&mut html);
        let groups = groups(rows);
        if groups.is_empty() {
            html.push_str("<p>No point could be had.</p>\n");
        } else {
            let shown =
                if groups.len() > 8 { format!(" The 8 fastest of {} series.", groups.len()) } else { String::new() };
            let how = match environment.measured {
                true => "Lines are predicted, dots measured (medians; bars from the slowest to the fastest run).",
                false => "Predicted.",
            };
            let source = published.map_or(String::new(), |published| format!(" Published: {}.", published.source));
            let caption = format!("{how}{shown} Latency is sequences in flight over sequences per second.{source}");
            figure(&mut html, &trade_off(&groups, environment, published).svg(), &caption);
            for group in groups.iter().take(ROOFLINES) {
                let caption = "Each dashed line is what one lane or one shared resource would allow if it were alone, \
                    in the mean pass of that batch's plan; what binds is the lowest. The hardware's bound is what raw \
                    rates allow any program.";
                figure(&mut html, &roofline(group, environment, published).svg(), caption);
            }
            if let Some(chart) = accuracy(&groups) {
                figure(&mut html, &chart.svg(), &self.error_caption());
            }
            let charts = budgets(rows, qualities);
            if !charts.is_empty() {
                let pictures: String = charts.iter().map(|chart| chart.svg()).collect();
                let caption = match charts.len() {
                    1 => "Quality is drawn below where --quality names a file that has it.",
                    _ => "Quality as in the file that --quality names; it may be another model's.",
                };
                figure(&mut html, &pictures, caption);
            }
        }
        if let Some((svg, caption)) = &self.timeline {
            figure(&mut html, svg, caption);
        }
        self.table(&mut html);
        html.push_str("</body>\n</html>\n");
        html
    }

    /// How far predictions are from measurements.
    fn error_caption(&self) -> String {
        let ratio =
            |row: &Row| Some(row.predicted.as_ref()?.generated_tokens_per_s / row.median?.generated_tokens_per_s);
        let mut errors: Vec<f64> = self.rows.iter().filter_map(ratio).map(|ratio| 100.0 * (ratio - 1.0)).collect();
        errors.sort_by(f64::total_cmp);
        let (Some(low), Some(high)) = (errors.first(), errors.last()) else { return String::new() };
        let within = errors.iter().filter(|error| error.abs() <= 10.0).count();
        format!(
            "{within} of {} predictions are within 10 % of the median; the error is {:+.1} % in the middle, from \
             {low:+.1} % to {high:+.1} %.",
            errors.len(),
            errors[errors.len() / 2],
        )
    }

    fn facts(&self, html: &mut String) {
        let environment = self.environment;
        let machine = &environment.machine;
        let memory = format!("{:.0} GB", machine.memory_bytes as f64 / 1e9);
        let how = match environment.measured {
            true => format!("measured: median of {} runs a point, each a job of its own", environment.repetitions),
            false => "predicted; nothing was run".to_owned(),
        };
        let kernel = machine.kernel.as_ref().map_or(String::new(), |kernel| format!(", Linux {kernel}"));
        let flags: Vec<String> = environment.flags.iter().map(|(name, value)| format!("--{name} {value}")).collect();
        let failed = self.rows.iter().filter(|row| row.error.is_some()).count();
        let weights = if environment.synthetic == Some(true) { " (random weights)" } else { "" };
        let facts = [
            ("model", format!("{}{weights}", environment.model)),
            ("machine", format!("{}: {}, {memory}{kernel}", machine.name, machine.cpu)),
            ("card", machine.gpu.clone().unwrap_or_else(|| "none".to_owned())),
            ("figures", how),
            ("grid", environment.grid.clone()),
            ("flags", if flags.is_empty() { "none".to_owned() } else { flags.join(" ") }),
            ("points", format!("{}, {failed} of them impossible", self.rows.len())),
            (
                "program",
                format!(
                    "tidemill {}, commit {}; seed {}",
                    environment.version,
                    environment.commit.as_deref().unwrap_or("not known"),
                    environment.seed
                ),
            ),
        ];
        html.push_str("<dl>\n");
        for (name, value) in facts {
            let _ = writeln!(html, "<dt>{name}</dt><dd>{}</dd>", escape(&value));
        }
        html.push_str("</dl>\n");
    }

    fn table(&self, html: &mut String) {
        html.push_str(
            "<h2>Points</h2>\n<div class=\"scroll\"><table>\n<tr><th>batch</th><th>prompt</th><th>generated</th>\
             <th>settings</th><th>predicted<br/>tokens/s</th><th>measured<br/>tokens/s</th><th>bound</th>\
             <th>binds</th></tr>\n",
        );
        for row in self.rows.iter().take(TABLE_ROWS) {
            let point = &row.point;
            let settings: Vec<String> = point.settings.iter().map(|(name, value)| format!("{name} {value}")).collect();
            let _ = write!(
                html,
                "<tr><td class=\"n\">{}</td><td class=\"n\">{}</td><td class=\"n\">{}</td><td>{}</td>",
                point.batch,
                point.prompt_len,
                point.gen_len,
                escape(&settings.join(", "))
            );
            let _ = match (&row.error, &row.predicted) {
                (Some(failure), _) => write!(html, "<td colspan=\"4\">{}</td>", escape(&failure.what)),
                (None, Some(predicted)) => write!(
                    html,
                    "<td class=\"n\">{}</td><td class=\"n\">{}</td><td class=\"n\">{}</td><td>{}</td>",
                    short(predicted.generated_tokens_per_s),
                    row.median.map_or("-".into(), |median| short(median.generated_tokens_per_s)),
                    predicted.bound.as_ref().map_or("-".into(), |bound| short(bound.0)),
                    escape(&predicted.binding)
                ),
                (None, None) => write!(html, "<td colspan=\"4\"></td>"),
            };
            html.push_str("</tr>\n");
        }
        html.push_str("</table></div>\n");
        if self.rows.len() > TABLE_ROWS {
            let _ = writeln!(html, "<p>The first {TABLE_ROWS}; results.jsonl has all {}.</p>", self.rows.len());
        }
    }
}

fn figure(html: &mut String, svg: &str, caption: &str) {
    let _ = writeln!(html, "<figure>\n{svg}\n<figcaption>{}</figcaption>\n</figure>", escape(caption));
}

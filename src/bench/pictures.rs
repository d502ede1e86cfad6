//! What a sweep shows: latency against throughput, throughput against batch with what bounds it, prediction against
//! measurement, and what a smaller cache gains and costs.
//!
//! **Invariant:** a picture shows rows and what stands beside them, and computes nothing but latency, which is
//! sequences in flight over sequences per second.

use std::collections::{BTreeMap, BTreeSet};

use plotters::style::RGBColor;

use super::chart::{Chart, Dot, Line, Mark, PALETTE, Scale, Series};
use super::given::{Published, PublishedSeries, Quality};
use super::sweep::{Environment, Point, Row};
use crate::kv::policies;

/// Series of a picture, so that colours stay apart.
const MOST_SERIES: usize = PALETTE.len();
/// What allows so many times what is reached does not bind anywhere near.
const NEAR: f64 = 12.0;
const BLACK: RGBColor = RGBColor(0, 0, 0);

/// What can bind, with a colour of its own in every picture.
const RESOURCES: [(&str, &str, RGBColor); 10] = [
    ("gpu", "computing on the device", PALETTE[2]),
    ("cpu", "computing on the CPU", PALETTE[2]),
    ("h2d", "copies to the device", PALETTE[1]),
    ("d2h", "copies from the device", RGBColor(245, 160, 120)),
    ("link", "the link, both directions", PALETTE[4]),
    ("dram", "main memory", PALETTE[5]),
    ("cores", "the CPU's cores", PALETTE[6]),
    ("disk_read", "reading from the disk", PALETTE[3]),
    ("disk_write", "writing to the disk", RGBColor(220, 160, 205)),
    ("disk", "the disk, both directions", PALETTE[7]),
];

/// Rows that differ in batch alone.
pub struct Group<'a> {
    /// What they have in common and others have not.
    pub name: String,
    /// By batch.
    pub rows: Vec<&'a Row>,
}

/// Settings of a point that are not its batch, by name.
fn settings(point: &Point) -> BTreeMap<&str, String> {
    let mut all: BTreeMap<&str, String> =
        point.settings.iter().map(|(name, value)| (name.as_str(), value.clone())).collect();
    all.insert("prompt-len", point.prompt_len.to_string());
    all.insert("gen-len", point.gen_len.to_string());
    all
}

/// Rows with a rate as groups, the fastest first.
pub fn groups(rows: &[Row]) -> Vec<Group<'_>> {
    let good = || rows.iter().filter(|row| row.error.is_none() && row.generated_tokens_per_s().is_some());
    let mut values: BTreeMap<&str, BTreeSet<String>> = BTreeMap::new();
    for (name, value) in good().flat_map(|row| settings(&row.point)) {
        values.entry(name).or_default().insert(value);
    }
    let mut groups: BTreeMap<BTreeMap<&str, String>, Vec<&Row>> = BTreeMap::new();
    good().for_each(|row| groups.entry(settings(&row.point)).or_default().push(row));
    let mut groups: Vec<Group<'_>> = groups
        .into_iter()
        .map(|(settings, mut rows)| {
            rows.sort_by_key(|row| (row.point.batch, row.point.num_prompts));
            let apart = settings.iter().filter(|(name, _)| values[**name].len() > 1);
            let name: Vec<String> = apart.map(|(name, value)| format!("{name} {value}")).collect();
            Group { name: name.join(", "), rows }
        })
        .collect();
    groups.sort_by(|a, b| b.best().total_cmp(&a.best()));
    groups
}

impl Group<'_> {
    fn best(&self) -> f64 {
        self.rows.iter().filter_map(|row| row.generated_tokens_per_s()).fold(0.0, f64::max)
    }

    fn named(&self) -> String {
        if self.name.is_empty() { "all points".to_owned() } else { self.name.clone() }
    }

    /// Whether published points stand beside this group.
    fn goes_with(&self, series: &PublishedSeries) -> bool {
        let Some(point) = self.rows.first().map(|row| &row.point) else { return false };
        series.settings.iter().all(|(name, value)| point.settings.get(name).is_none_or(|own| own == value))
    }

    /// Predicted and measured rates as two series; `place` says where a rate at a point is drawn.
    fn series(&self, colour: RGBColor, name: Option<String>, place: &dyn Fn(&Point, f64) -> Dot) -> Vec<Series> {
        let predicted = |row: &&Row| Some(place(&row.point, row.predicted.as_ref()?.generated_tokens_per_s));
        let measured = |row: &&Row| {
            let dot = place(&row.point, row.median?.generated_tokens_per_s);
            // Slowest and fastest run, drawn at the median's place.
            Some(Dot { spread: row.spread, ..dot })
        };
        let ran = self.rows.iter().any(|row| row.measured);
        let mark = if ran { Mark::None } else { Mark::Ring };
        let dots = self.rows.iter().filter_map(predicted).collect();
        let mut series = vec![Series { name, colour, line: Line::Solid, mark, dots }];
        if ran {
            let dots = self.rows.iter().filter_map(measured).collect();
            series.push(Series { name: None, colour, line: Line::None, mark: Mark::Dot, dots });
        }
        series
    }
}

/// Published series about the model, each with a mark of its own.
fn beside<'a>(
    published: Option<&'a Published>,
    environment: &'a Environment,
) -> impl Iterator<Item = (&'a PublishedSeries, Mark)> {
    let marks = [Mark::Triangle, Mark::Cross, Mark::Dot, Mark::Ring];
    published.into_iter().flat_map(|all| all.of(&environment.model)).zip(marks.into_iter().cycle())
}

fn latency(batch: f64, gen_len: usize, rate: f64) -> f64 {
    batch * gen_len as f64 / rate
}

/// Latency against throughput, as figure 1 of FlexGen.
pub fn trade_off(groups: &[Group<'_>], environment: &Environment, published: Option<&Published>) -> Chart {
    let mut series = Vec::new();
    for (group, colour) in groups.iter().zip(PALETTE) {
        let mut ends = group.rows.iter().map(|row| row.point.batch);
        let ends = [ends.next(), ends.next_back()];
        let place = |point: &Point, rate: f64| Dot {
            at: (latency(point.batch as f64, point.gen_len, rate), rate),
            spread: None,
            label: ends.contains(&Some(point.batch)).then(|| point.batch.to_string()),
        };
        let mut own = group.series(colour, Some(group.named()), &place);
        // Labels once.
        let last = own.len() - 1;
        own[..last].iter_mut().flat_map(|series| &mut series.dots).for_each(|dot| dot.label = None);
        series.extend(own);
    }
    for (published, mark) in beside(published, environment) {
        let mut dots: Vec<Dot> = published
            .points
            .iter()
            .map(|&(batch, rate)| Dot {
                at: (latency(batch, published.gen_len, rate), rate),
                spread: None,
                label: Some(batch.to_string()),
            })
            .collect();
        dots.sort_by(|a, b| a.at.0.total_cmp(&b.at.0));
        let line = if dots.len() > 1 { Line::Dashed } else { Line::None };
        series.push(Series { name: Some(published.name.clone()), colour: BLACK, line, mark, dots });
    }
    Chart {
        title: "Latency against throughput; numbers are sequences in flight".into(),
        x: ("latency of a sequence (s)".into(), Scale::Log),
        y: ("generated tokens/s".into(), Scale::Log),
        series,
        band: None,
    }
}

/// Throughput of a group against its batch, and what each resource allows.
pub fn roofline(group: &Group<'_>, environment: &Environment, published: Option<&Published>) -> Chart {
    let place = |point: &Point, rate: f64| Dot::at(point.batch as f64, rate);
    let best = group.best();
    let mut series = Vec::new();
    let mut line = |name: &str, colour, line, rate: &dyn Fn(&Row) -> Option<f64>| {
        let near = |row: &&Row| rate(row).filter(|rate| *rate < NEAR * best).map(|rate| place(&row.point, rate));
        let dots: Vec<Dot> = group.rows.iter().filter_map(near).collect();
        // Two things that are one in this plan are drawn once.
        let known = series.iter().any(|series: &Series| series.dots == dots);
        if !dots.is_empty() && !known {
            // A single point is no line.
            let mark = if dots.len() > 1 { Mark::None } else { Mark::Cross };
            series.push(Series { name: Some(name.to_owned()), colour, line, mark, dots });
        }
    };
    for (key, name, colour) in RESOURCES {
        line(name, colour, Line::Dashed, &|row| row.predicted.as_ref()?.limits.get(key).copied());
    }
    line("bound of the hardware", BLACK, Line::Solid, &|row| Some(row.predicted.as_ref()?.bound.as_ref()?.0));
    let mut own = group.series(PALETTE[0], Some("predicted".into()), &place);
    own[1..].iter_mut().for_each(|measured| measured.name = Some("measured, slowest to fastest run".into()));
    series.extend(own);
    for (published, mark) in beside(published, environment) {
        if group.goes_with(published) {
            let dots = published.points.iter().map(|&(batch, rate)| Dot::at(batch, rate)).collect();
            let name = Some(published.name.clone());
            series.push(Series { name, colour: BLACK, line: Line::None, mark, dots });
        }
    }
    let name = if group.name.is_empty() { String::new() } else { format!(": {}", group.name) };
    Chart {
        title: format!("Throughput against batch, and what bounds it{name}"),
        x: ("sequences in flight".into(), Scale::Log),
        y: ("generated tokens/s".into(), Scale::Log),
        series,
        band: None,
    }
}

/// Measured against predicted; none if nothing was measured.
pub fn accuracy(groups: &[Group<'_>]) -> Option<Chart> {
    let mut series = Vec::new();
    for (index, group) in groups.iter().enumerate() {
        let dot = |row: &&Row| {
            let predicted = row.predicted.as_ref()?.generated_tokens_per_s;
            let at = (predicted, row.median?.generated_tokens_per_s);
            Some(Dot { at, spread: row.spread, label: None })
        };
        let dots: Vec<Dot> = group.rows.iter().filter_map(dot).collect();
        let (colour, name) = match index < MOST_SERIES {
            true => (PALETTE[index], Some(group.named())),
            false => (PALETTE[MOST_SERIES - 1], None),
        };
        if !dots.is_empty() {
            series.push(Series { name, colour, line: Line::None, mark: Mark::Dot, dots });
        }
    }
    (!series.is_empty()).then(|| Chart {
        title: "Predicted against measured; the band is 10 % to either side".into(),
        x: ("predicted, generated tokens/s".into(), Scale::Log),
        y: ("measured, generated tokens/s".into(), Scale::Log),
        series,
        band: Some(0.1),
    })
}

/// The share of a sequence's positions that a policy keeps, and the policy without its amounts.
fn kept(kv_policy: &str, prompt_len: usize, gen_len: usize) -> Option<(f64, String)> {
    let len = prompt_len + gen_len;
    let kept = policies::parse(kv_policy).ok()?.kept(prompt_len, gen_len);
    let share = kept.capacity().map_or(1.0, |capacity| capacity.min(len) as f64 / len as f64);
    let (family, amounts) = kv_policy.split_once(':').unwrap_or((kv_policy, ""));
    let start = amounts.split(',').find(|amount| amount.starts_with("start="));
    Some((100.0 * share, start.map_or(family.to_owned(), |start| format!("{family} {start}"))))
}

/// Throughput, and beside it quality, against what the cache keeps; none where fewer than two policies were swept.
pub fn budgets(rows: &[Row], qualities: &[Quality]) -> Vec<Chart> {
    // The fastest batch of each policy, everything else the same.
    let mut best: BTreeMap<(String, String), f64> = BTreeMap::new();
    let mut lengths = None;
    for row in rows.iter().filter(|row| row.error.is_none()) {
        let Some(rate) = row.generated_tokens_per_s() else { continue };
        let (prompt_len, gen_len) = *lengths.get_or_insert((row.point.prompt_len, row.point.gen_len));
        let kv_policy = row.point.settings.get("kv-policy").map_or("full", String::as_str);
        if (prompt_len, gen_len) != (row.point.prompt_len, row.point.gen_len) {
            continue;
        }
        let mut rest = settings(&row.point);
        rest.retain(|name, _| !["kv-policy", "prompt-len", "gen-len"].contains(name));
        let rest: Vec<String> = rest.into_iter().map(|(name, value)| format!("{name} {value}")).collect();
        let entry = best.entry((rest.join(", "), kv_policy.to_owned())).or_insert(0.0);
        *entry = entry.max(rate);
    }
    let Some((prompt_len, gen_len)) = lengths else { return Vec::new() };
    let policies: BTreeSet<&String> = best.keys().map(|(_, policy)| policy).collect();
    if policies.len() < 2 {
        return Vec::new();
    }
    let families: BTreeSet<String> =
        policies.iter().filter_map(|policy| kept(policy, prompt_len, gen_len)).map(|(_, family)| family).collect();
    let colour = |family: &str| PALETTE[families.iter().position(|other| other == family).unwrap_or(0) % MOST_SERIES];
    let x = ("positions that the cache keeps (% of prompt + generated)".to_owned(), Scale::Log);
    let several = best.keys().map(|(rest, _)| rest).collect::<BTreeSet<_>>().len() > 1;
    let mut by_family: BTreeMap<(String, String), Vec<Dot>> = BTreeMap::new();
    for ((rest, policy), rate) in &best {
        let Some((share, family)) = kept(policy, prompt_len, gen_len) else { continue };
        by_family.entry((family, rest.clone())).or_default().push(Dot::at(share, *rate));
    }
    let marks = [Mark::Dot, Mark::Ring, Mark::Triangle, Mark::Cross];
    let rests: BTreeSet<String> = by_family.keys().map(|(_, rest)| rest.clone()).collect();
    let mut throughput = Vec::new();
    for ((family, rest), mut dots) in by_family {
        dots.sort_by(|a, b| a.at.0.total_cmp(&b.at.0));
        let mark = marks[rests.iter().position(|other| *other == rest).unwrap_or(0) % marks.len()];
        let name = if several { format!("{family}, {rest}") } else { family.clone() };
        throughput.push(Series { name: Some(name), colour: colour(&family), line: Line::Solid, mark, dots });
    }
    let ends = throughput.iter().flat_map(|series| &series.dots).map(|dot| dot.at.0);
    let (low, high) = ends.fold((f64::INFINITY, 0.0), |(low, high): (f64, f64), x| (low.min(x), high.max(x)));
    let mut charts = vec![Chart {
        title: "Cache budget against throughput, at each policy's best batch".into(),
        x: x.clone(),
        y: ("generated tokens/s".into(), Scale::Linear),
        series: throughput,
        band: None,
    }];
    let mut figures: BTreeMap<(String, String), Vec<Dot>> = BTreeMap::new();
    for quality in qualities {
        let Some((share, family)) = kept(&quality.kv_policy, prompt_len, gen_len) else { continue };
        if families.contains(&family) && share >= 0.99 * low {
            for (figure, value) in &quality.figures {
                figures.entry((family.clone(), figure.clone())).or_default().push(Dot::at(share, *value));
            }
        }
    }
    let names: BTreeSet<String> = figures.keys().map(|(_, figure)| figure.clone()).collect();
    let mut series: Vec<Series> = Vec::new();
    for ((family, figure), mut dots) in figures {
        dots.sort_by(|a, b| a.at.0.total_cmp(&b.at.0));
        let mark = marks[names.iter().position(|other| *other == figure).unwrap_or(0) % marks.len()];
        let name = Some(format!("{family}, {figure}"));
        series.push(Series { name, colour: colour(&family), line: Line::Solid, mark, dots });
    }
    if !series.is_empty() {
        // As wide as the picture that it stands below.
        let dots = vec![Dot::at(low, 0.0), Dot::at(high, 100.0)];
        series.push(Series { name: None, colour: BLACK, line: Line::None, mark: Mark::None, dots });
        charts.push(Chart {
            title: "Cache budget against quality".into(),
            x,
            y: ("correct (%)".into(), Scale::Linear),
            series,
            band: None,
        });
    }
    charts
}

//! The policies that there are, as `--kv-policy` names them.
//!
//! **Invariant:** what a policy keeps follows from the request's own lengths alone; its text names it wholly, so that
//! reading what was written gives the same policy.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use super::layout::PAGE_POSITIONS;
use super::policy::{Kept, KvPolicy, MAX_POSITIONS, Spread, WHOLE_PROMPT, positions};

/// A number of positions, or a share of a request's prompt length + max_tokens.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Amount {
    Count(usize),
    Share(f64),
}

impl Amount {
    fn of(self, len: usize) -> usize {
        match self {
            Amount::Count(count) => count,
            Amount::Share(share) => (share * len as f64).round() as usize,
        }
    }
}

impl fmt::Display for Amount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Amount::Count(count) => count.fmt(f),
            // With a point, so that it is read back as a share.
            Amount::Share(share) => write!(f, "{share:?}"),
        }
    }
}

impl FromStr for Amount {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("`{text}` is neither a number of positions nor a share such as 0.2");
        if let Ok(count) = text.parse() {
            let most = || format!("`{text}` positions are more than any context has");
            return if count < MAX_POSITIONS { Ok(Amount::Count(count)) } else { Err(most()) };
        }
        let share: f64 = text.parse().map_err(|_| wrong())?;
        if (0.0..=1.0).contains(&share) { Ok(Amount::Share(share)) } else { Err(wrong()) }
    }
}

/// `full`: everything is kept.
#[derive(Clone, Copy, Debug)]
struct Full;

impl KvPolicy for Full {
    fn kept(&self, _: usize, _: usize) -> Kept {
        Kept::All
    }
}

impl fmt::Display for Full {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("full")
    }
}

/// `sink:start=S,recent=R`: the beginning and the latest positions.
#[derive(Clone, Copy, Debug)]
struct Sink {
    start: Amount,
    recent: Amount,
}

impl KvPolicy for Sink {
    fn kept(&self, prompt_len: usize, max_tokens: usize) -> Kept {
        let len = prompt_len + max_tokens;
        let (start, recent) = (self.start.of(len), self.recent.of(len).max(1));
        if positions(prompt_len, max_tokens) <= start + recent { Kept::All } else { Kept::Window { start, recent } }
    }

    fn outgrows_context(&self) -> bool {
        true
    }
}

impl fmt::Display for Sink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sink:start={},recent={}", self.start, self.recent)
    }
}

/// `h2o:heavy=H,recent=R` or `h2o:keep=K,recent=R`: the latest positions, and those that receive most attention;
/// `pyramid` and `per-head` spread them over layers and heads.
#[derive(Clone, Copy, Debug)]
struct HeavyHitters {
    size: Size,
    recent: Amount,
    shape: Shape,
    /// `h2o:...,stretch=S`: so many positions of a prompt are read between two evictions, rounded up to whole pages.
    stretch: Amount,
}

/// What keeps memory smallest.
const SHORTEST_STRETCH: Amount = Amount::Count(PAGE_POSITIONS);

/// How many positions heavy hitters are given.
#[derive(Clone, Copy, Debug)]
enum Size {
    /// So many beside the latest.
    Heavy(Amount),
    /// So many with the latest, which go first. A few of these are often enough, and short requests need as many, so
    /// they are best counted where the whole is a share.
    Keep(Amount),
}

impl Size {
    /// Heavy hitters and latest positions of a request.
    fn of(self, recent: Amount, len: usize) -> (usize, usize) {
        let recent = recent.of(len).max(1);
        match self {
            Size::Heavy(heavy) => (heavy.of(len), recent),
            Size::Keep(keep) => {
                let keep = keep.of(len).max(1);
                (keep.saturating_sub(recent), recent.min(keep))
            }
        }
    }
}

/// What a policy of heavy hitters makes of their number.
#[derive(Clone, Copy, Debug)]
enum Shape {
    /// `h2o`
    Even,
    /// `pyramid:...,slope=S`, in thousandths.
    Pyramid { slope: u16 },
    /// `per-head:...,least=L`, a share of the heavy hitters.
    PerHead { least: f64 },
}

impl Shape {
    fn spread(self, heavy: usize) -> Spread {
        match self {
            Shape::Even => Spread::Even,
            Shape::Pyramid { slope: 0 } => Spread::Even,
            Shape::Pyramid { slope } => Spread::Depth { slope },
            Shape::PerHead { least } => Spread::Heads { least: (least * heavy as f64).round() as usize },
        }
    }
}

impl KvPolicy for HeavyHitters {
    fn kept(&self, prompt_len: usize, max_tokens: usize) -> Kept {
        let len = prompt_len + max_tokens;
        let (heavy, recent) = self.size.of(self.recent, len);
        let stretch = self.stretch.of(len);
        let stretch = match self.shape {
            // Prompts that are not cut are alike.
            Shape::Even if stretch >= prompt_len => WHOLE_PROMPT,
            _ => stretch.max(1).next_multiple_of(PAGE_POSITIONS),
        };
        let kept = Kept::Heavy { heavy, recent, prompt_len, stretch, spread: self.shape.spread(heavy) };
        // The last layer has least.
        let fits = kept.at(1, 2).capacity() >= Some(positions(prompt_len, max_tokens));
        if fits { Kept::All } else { kept }
    }

    fn needs_scores(&self) -> bool {
        true
    }
}

impl fmt::Display for HeavyHitters {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let HeavyHitters { size, recent, shape, stretch } = self;
        let name = match shape {
            Shape::Even => "h2o",
            Shape::Pyramid { .. } => "pyramid",
            Shape::PerHead { .. } => "per-head",
        };
        match size {
            Size::Heavy(heavy) => write!(f, "{name}:heavy={heavy},recent={recent}"),
            Size::Keep(keep) => write!(f, "{name}:keep={keep},recent={recent}"),
        }?;
        match shape {
            Shape::Even if *stretch == SHORTEST_STRETCH => Ok(()),
            Shape::Even => write!(f, ",stretch={stretch}"),
            Shape::Pyramid { slope } => write!(f, ",slope={:?}", f64::from(*slope) / 1000.0),
            Shape::PerHead { least } => write!(f, ",least={least:?}"),
        }
    }
}

/// Everything is kept.
pub fn full() -> Arc<dyn KvPolicy> {
    Arc::new(Full)
}

/// Reads `full`, `sink:start=S,recent=R`, `h2o:heavy=H,recent=R`, `pyramid:heavy=H,recent=R,slope=S` or
/// `per-head:heavy=H,recent=R,least=L`; the last three also with `keep=K` in place of `heavy=H`, and `h2o` with
/// `stretch=S`.
///
/// # Errors
/// What is wrong with it.
pub fn parse(text: &str) -> Result<Arc<dyn KvPolicy>, String> {
    let (name, rest) = text.split_once(':').unwrap_or((text, ""));
    let mut settings: Vec<(&str, Amount)> = Vec::new();
    for part in rest.split(',').filter(|_| !rest.is_empty()) {
        let (key, value) = part.split_once('=').ok_or_else(|| format!("`{part}` is not KEY=VALUE"))?;
        if settings.iter().any(|(known, _)| *known == key) {
            return Err(format!("`{key}` is there twice"));
        }
        settings.push((key, value.parse()?));
    }
    let known: &[&str] = match name {
        "full" => &[],
        "sink" => &["start", "recent"],
        "h2o" => &["heavy", "keep", "recent", "stretch"],
        "pyramid" => &["heavy", "keep", "recent", "slope"],
        "per-head" => &["heavy", "keep", "recent", "least"],
        other => return Err(format!("there is no policy `{other}`")),
    };
    if let Some((key, _)) = settings.iter().find(|(key, _)| !known.contains(key)) {
        return Err(format!("`{name}` has no `{key}`"));
    }
    let setting = |key: &str, default: Option<Amount>| {
        let given = settings.iter().find(|(known, _)| *known == key).map(|&(_, amount)| amount);
        let or = if key == "heavy" { " or `keep`" } else { "" };
        given.or(default).ok_or_else(|| format!("`{name}` needs `{key}`{or}"))
    };
    let share = |key: &str, default: f64| match setting(key, Some(Amount::Share(default)))? {
        Amount::Share(share) => Ok(share),
        Amount::Count(count @ 0..=1) => Ok(count as f64),
        Amount::Count(count) => Err(format!("`{key}={count}` is not a share from 0 to 1")),
    };
    let heavy_hitters = |shape: Shape| -> Result<Arc<dyn KvPolicy>, String> {
        let is_given = |key: &str| settings.iter().any(|(known, _)| *known == key);
        let size = match (is_given("heavy"), is_given("keep")) {
            (true, true) => {
                return Err("`keep` counts what `heavy` and `recent` have together: give one of them".into());
            }
            (_, true) => Size::Keep(setting("keep", None)?),
            _ => Size::Heavy(setting("heavy", None)?),
        };
        let (recent, stretch) = (setting("recent", None)?, setting("stretch", Some(SHORTEST_STRETCH))?);
        if let Amount::Count(count @ 0..=1) = stretch {
            return Err(format!(
                "`stretch={count}` is no number of positions to read: the whole prompt is `stretch=1.0`"
            ));
        }
        Ok(Arc::new(HeavyHitters { size, recent, shape, stretch }))
    };
    Ok(match name {
        "sink" => Arc::new(Sink {
            // The paper's: four are enough, and a cache of 1,024 in all.
            start: setting("start", Some(Amount::Count(4)))?,
            recent: setting("recent", Some(Amount::Count(1020)))?,
        }),
        "h2o" => heavy_hitters(Shape::Even)?,
        "pyramid" => heavy_hitters(Shape::Pyramid { slope: (share("slope", 0.5)? * 1000.0).round() as u16 })?,
        "per-head" => heavy_hitters(Shape::PerHead { least: share("least", 0.2)? })?,
        _ => full(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn policies_are_read_and_written() {
        for text in [
            "full",
            "sink:start=4,recent=1020",
            "h2o:heavy=0.1,recent=0.1",
            "h2o:heavy=100,recent=1.0",
            "h2o:keep=0.2,recent=8",
            "h2o:keep=0.2,recent=8,stretch=1.0",
            "h2o:heavy=60,recent=4,stretch=256",
            "pyramid:heavy=0.1,recent=20,slope=0.75",
            "per-head:keep=300,recent=0.05,least=0.25",
            "per-head:heavy=100,recent=0.1,least=0.25",
        ] {
            assert_eq!(parse(text).unwrap().to_string(), text);
        }
        assert_eq!(parse("pyramid:heavy=9,recent=9").unwrap().to_string(), "pyramid:heavy=9,recent=9,slope=0.5");
        assert_eq!(parse("per-head:heavy=9,recent=9").unwrap().to_string(), "per-head:heavy=9,recent=9,least=0.2");
        assert_eq!(
            parse("pyramid:heavy=9,recent=9,slope=1").unwrap().to_string(),
            "pyramid:heavy=9,recent=9,slope=1.0"
        );
        assert_eq!(parse("sink").unwrap().to_string(), "sink:start=4,recent=1020");
        for (text, what) in [
            ("h2o", "needs `heavy`"),
            ("h2o:heavy=3", "needs `recent`"),
            ("h2o:heavy=1.5,recent=3", "neither"),
            ("h2o:heavy=-1,recent=3", "neither"),
            ("sink:heavy=3", "has no `heavy`"),
            ("sink:start=3,start=4", "twice"),
            ("sink:start", "KEY=VALUE"),
            ("pyramid:heavy=3,recent=3,slope=2", "from 0 to 1"),
            ("per-head:heavy=3,recent=3,slope=0.2", "has no `slope`"),
            ("h2o:heavy=18446744073709551615,recent=1", "more than any context"),
            ("h2o:heavy=5,,recent=5", "KEY=VALUE"),
            ("h2o:heavy=5,keep=9,recent=5", "give one of them"),
            ("sink:keep=5", "has no `keep`"),
            ("pyramid:keep=5,recent=3,stretch=1.0", "has no `stretch`"),
            ("h2o:keep=5,recent=3,stretch=1", "`stretch=1.0`"),
            ("lru", "no policy"),
        ] {
            let error = parse(text).unwrap_err();
            assert!(error.contains(what), "{text}: {error}");
        }
    }

    #[test]
    fn shares_are_of_the_requests_own_length() {
        let policy = parse("h2o:heavy=0.1,recent=0.1").unwrap();
        let heavy = |heavy, spread| Kept::Heavy { heavy, recent: 102, prompt_len: 512, stretch: 64, spread };
        assert_eq!(policy.kept(512, 512), heavy(102, Spread::Even));
        let kept = |text: &str, len| match parse(text).unwrap().kept(len, 8) {
            Kept::Heavy { heavy, recent, .. } => Some((heavy, recent)),
            _ => None,
        };
        assert_eq!(kept("h2o:keep=0.2,recent=8", 392), Some((72, 8)));
        assert_eq!(kept("h2o:keep=0.2,recent=8", 32), Some((0, 8)));
        assert_eq!(kept("h2o:keep=1,recent=8", 32), Some((0, 1)));
        assert_eq!(kept("h2o:keep=0,recent=8", 32), Some((0, 1)));
        assert_eq!(kept("h2o:keep=200,recent=100", 193), None, "all of it fits");
        let stretch = |text: &str, prompt_len| match parse(text).unwrap().kept(prompt_len, 88) {
            Kept::Heavy { stretch, .. } => stretch,
            other => panic!("{other:?}"),
        };
        assert_eq!([64, 65, 300].map(|len| stretch("h2o:keep=9,recent=3", len)), [WHOLE_PROMPT, 64, 64]);
        assert_eq!([2, 65, 200].map(|s| stretch(&format!("h2o:keep=9,recent=3,stretch={s}"), 400)), [64, 128, 256]);
        assert_eq!(stretch("h2o:keep=9,recent=3,stretch=0.5", 400), 256);
        assert_eq!(stretch("h2o:keep=9,recent=3,stretch=1.0", 400), WHOLE_PROMPT);
        assert_eq!(stretch("per-head:keep=9,recent=3", 10), 64);
        let pyramid = parse("pyramid:heavy=0.1,recent=0.1").unwrap().kept(512, 512);
        assert_eq!(pyramid, heavy(102, Spread::Depth { slope: 500 }));
        assert_eq!([0, 1, 2, 3].map(|layer| pyramid.at(layer, 4)), [153, 119, 85, 51].map(|h| heavy(h, Spread::Even)));
        assert_eq!(pyramid.at(0, 1), heavy(102, Spread::Even));
        let slope = |slope: &str| parse(&format!("pyramid:heavy=200,recent=20,slope={slope}")).unwrap();
        assert!(matches!(slope("0").kept(300, 20), Kept::Heavy { spread: Spread::Even, .. }));
        // All is kept where the last layer could, so that no answer depends on how long it may become.
        assert_eq!([20, 21, 22].map(|max| slope("1").kept(0, max)).map(|kept| kept == Kept::All), [true, true, false]);
        let per_head = parse("per-head:heavy=0.1,recent=0.1").unwrap().kept(512, 512);
        assert_eq!(per_head, heavy(102, Spread::Heads { least: 20 }));
        assert_eq!(parse("h2o:heavy=0.5,recent=0.5").unwrap().kept(10, 10), Kept::All);
        assert_eq!(parse("sink").unwrap().kept(1000, 25), Kept::All);
        assert_eq!(parse("sink").unwrap().kept(1000, 26), Kept::Window { start: 4, recent: 1020 });
    }
}

//! Statistics of a metric, as HELM keeps and writes them.
//!
//! **Invariant:** sums are added in order, so equal inputs give equal bits.

use std::collections::HashMap;

use serde_json::{Map, Value, json};

/// Which instances a statistic is about; members as they are written.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Context {
    /// Such as `test`.
    pub split: Option<String>,
    /// A part of it.
    pub sub_split: Option<String>,
    /// What was done to the instances: the JSON text of its description.
    pub perturbation: Option<String>,
}

/// A metric's name and context.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Name {
    /// The metric.
    pub name: String,
    /// Of what.
    pub context: Context,
}

/// Sums over values.
#[derive(Clone, Debug, PartialEq)]
pub struct Stat {
    /// Which metric.
    pub name: Name,
    /// How many values.
    pub count: u64,
    /// Their sum.
    pub sum: f64,
    /// The sum of their squares.
    pub sum_squared: f64,
    /// The least.
    pub min: f64,
    /// The greatest.
    pub max: f64,
}

impl Stat {
    /// One value.
    pub fn new(name: &str, value: f64) -> Self {
        let name = Name { name: name.to_owned(), context: Context::default() };
        Stat { name, count: 1, sum: value, sum_squared: value * value, min: value, max: value }
    }

    /// The same in a context.
    pub fn within(mut self, context: &Context) -> Self {
        self.name.context = context.clone();
        self
    }

    /// Takes another's values in.
    pub fn merge(&mut self, other: &Stat) {
        self.count += other.count;
        self.sum += other.sum;
        self.sum_squared += other.sum_squared;
        self.min = self.min.min(other.min);
        self.max = self.max.max(other.max);
    }

    /// The mean of the values.
    pub fn mean(&self) -> f64 {
        self.sum / self.count as f64
    }

    /// The population variance.
    pub fn variance(&self) -> f64 {
        (self.sum_squared / self.count as f64 - self.mean() * self.mean()).max(0.0)
    }

    /// As HELM writes it.
    pub fn json(&self) -> Value {
        let context = &self.name.context;
        let mut name = Map::from_iter([("name".to_owned(), json!(self.name.name))]);
        for (key, value) in [("split", &context.split), ("sub_split", &context.sub_split)] {
            name.extend(value.as_ref().map(|value| (key.to_owned(), json!(value))));
        }
        name.extend(
            context
                .perturbation
                .as_ref()
                .map(|text| ("perturbation".to_owned(), serde_json::from_str(text).expect("it was written as JSON"))),
        );
        json!({
            "name": name,
            "count": self.count,
            "sum": self.sum,
            "sum_squared": self.sum_squared,
            "min": self.min,
            "max": self.max,
            "mean": self.mean(),
            "variance": self.variance(),
            "stddev": self.variance().sqrt(),
        })
    }
}

/// Statistics by name, in order of their first value.
#[derive(Clone, Debug, Default)]
pub struct Stats {
    stats: Vec<Stat>,
    places: HashMap<Name, usize>,
}

impl Stats {
    /// Adds to the statistic of this name.
    pub fn merge(&mut self, stat: Stat) {
        match self.places.get(&stat.name) {
            Some(&place) => self.stats[place].merge(&stat),
            None => {
                self.places.insert(stat.name.clone(), self.stats.len());
                self.stats.push(stat);
            }
        }
    }

    /// Adds the mean of each of another's statistics: what a trial contributes.
    pub fn merge_means(&mut self, trial: &Stats) {
        for stat in &trial.stats {
            self.merge(Stat { name: stat.name.clone(), ..Stat::new("", stat.mean()) });
        }
    }

    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = &Stat> {
        self.stats.iter()
    }

    /// The statistic of a name.
    pub fn get(&self, name: &str, context: &Context) -> Option<&Stat> {
        let name = Name { name: name.to_owned(), context: context.clone() };
        self.places.get(&name).map(|&place| &self.stats[place])
    }

    /// Contexts in order of appearance.
    pub fn contexts(&self) -> Vec<Context> {
        let mut contexts = Vec::new();
        for stat in &self.stats {
            if !contexts.contains(&stat.name.context) {
                contexts.push(stat.name.context.clone());
            }
        }
        contexts
    }
}

//! A filled scenario state's statistics, with HELM's definitions (formats, section 2.4).
//!
//! **Invariant:** statistics of a trial are sums over its instances in order; across trials their means are merged.
//! Requests that failed are left out.

use std::collections::HashMap;

use serde_json::{Map, Value, json};

use super::results::{Completion, Outcome};
use super::stat::{Context, Stat, Stats};
use super::state::{Adapter, Method, RequestState, ScenarioState};
use super::text::{Score, strip};

/// One of HELM's metrics.
#[derive(Clone, Debug, PartialEq)]
pub enum Metric {
    /// Completions against references, by these scores.
    Generation(Vec<(String, Score)>),
    /// References against each other, by their log-probabilities.
    Reference,
    /// Log-probabilities of texts.
    LanguageModeling,
    /// ROUGE of summaries.
    Summarization,
    /// How many instances there are.
    Instances,
}

/// What is computed, and what is not.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Plan {
    /// What is.
    pub metrics: Vec<Metric>,
    /// Names of what the run asks for and nobody here computes.
    pub left_out: Vec<String>,
}

/// An instance's statistics in a trial.
#[derive(Clone, Debug)]
pub struct PerInstance {
    /// The instance.
    pub id: String,
    /// What was done to it.
    pub context: Context,
    /// The trial.
    pub trial: i64,
    /// Its statistics.
    pub stats: Vec<Stat>,
}

/// What came of all metrics.
#[derive(Debug, Default)]
pub struct Report {
    /// Over all instances.
    pub stats: Vec<Stat>,
    /// By instance.
    pub instances: Vec<PerInstance>,
}

impl Plan {
    /// The metrics that an adapter's method suggests.
    pub fn of_method(method: Method) -> Plan {
        let named = |count: usize| {
            let scores = Score::ALL.into_iter().take(count);
            Metric::Generation(scores.map(|(name, score)| (name.to_owned(), score)).collect())
        };
        let metrics = match method {
            Method::Generation => vec![named(Score::ALL.len()), Metric::Instances],
            Method::Joint => vec![named(4), Metric::Instances],
            Method::Separate | Method::Calibrated => vec![Metric::Reference, Metric::Instances],
            Method::LanguageModeling => vec![Metric::LanguageModeling],
        };
        Plan { metrics, left_out: Vec::new() }
    }

    /// The metrics that a `run_spec.json` names.
    pub fn of_run(run_spec: &Value, method: Method) -> Plan {
        let mut plan = Plan::default();
        for spec in run_spec["metric_specs"].as_array().into_iter().flatten() {
            let class = spec["class_name"].as_str().unwrap_or_default();
            let names = spec["args"]["names"].as_array().into_iter().flatten().filter_map(Value::as_str);
            match class.rsplit('.').next().unwrap_or_default() {
                "BasicGenerationMetric" | "BasicMetric" => {
                    let mut scores = Vec::new();
                    for name in names {
                        match Score::named(name) {
                            Some(score) => scores.push((name.to_owned(), score)),
                            None => plan.left_out.push(name.to_owned()),
                        }
                    }
                    plan.metrics.push(match method {
                        Method::LanguageModeling => Metric::LanguageModeling,
                        _ => Metric::Generation(scores),
                    });
                    // Older versions have one name for both kinds.
                    if class.ends_with(".BasicMetric") && matches!(method, Method::Separate | Method::Calibrated) {
                        plan.metrics.push(Metric::Reference);
                    }
                }
                "BasicReferenceMetric" => plan.metrics.push(Metric::Reference),
                "LanguageModelingMetric" => plan.metrics.push(Metric::LanguageModeling),
                "InstancesPerSplitMetric" => plan.metrics.push(Metric::Instances),
                "SummarizationMetric" => {
                    plan.metrics.push(Metric::Summarization);
                    plan.left_out.push("SummarizationMetric but for ROUGE".to_owned());
                }
                class => plan.left_out.push(class.to_owned()),
            }
        }
        plan
    }
}

/// A state with what came of its requests.
pub struct Evaluation<'a> {
    /// The state.
    pub state: &'a ScenarioState,
    /// By request.
    pub outcomes: &'a [Outcome],
    /// Tokens of a text, without special ones.
    pub count_tokens: &'a dyn Fn(&str) -> usize,
}

/// The requests of an instance in a trial.
struct Group<'a> {
    states: Vec<(&'a RequestState, &'a [Completion])>,
}

impl Evaluation<'_> {
    /// Computes all metrics.
    pub fn report(&self, plan: &Plan) -> Report {
        let mut report = Report::default();
        for metric in &plan.metrics {
            let mut stats = Stats::default();
            for trial in 0..self.state.adapter.num_train_trials {
                let mut of_trial = Stats::default();
                match metric {
                    Metric::Instances => self.count_instances(trial, &mut of_trial),
                    // There is one trial, whatever the adapter says.
                    Metric::LanguageModeling if trial > 0 => continue,
                    metric => self.trial(metric, trial, &mut of_trial, &mut report.instances),
                }
                stats.merge_means(&of_trial);
            }
            report.stats.extend(stats.iter().filter(|stat| !stat.sum.is_nan()).cloned());
        }
        report
    }

    fn count_instances(&self, trial: i64, stats: &mut Stats) {
        let mut counted: Vec<(Context, Vec<&str>)> = Vec::new();
        for state in self.state.states.iter().filter(|state| state.trial == trial) {
            let context = &state.instance.context;
            let at = counted.iter().position(|(known, _)| known == context).unwrap_or_else(|| {
                counted.push((context.clone(), Vec::new()));
                counted.len() - 1
            });
            counted[at].1.push(&state.instance.identity);
        }
        for (context, mut instances) in counted {
            instances.sort_unstable();
            instances.dedup();
            stats.merge(Stat::new("num_instances", instances.len() as f64).within(&context));
        }
    }

    fn trial(&self, metric: &Metric, trial: i64, stats: &mut Stats, instances: &mut Vec<PerInstance>) {
        let adapter = &self.state.adapter;
        let mut of_instances: Vec<(&RequestState, Vec<Stat>)> = Vec::new();
        for group in self.groups(metric, trial) {
            let found = match metric {
                Metric::Generation(scores) => group.generation(adapter, scores),
                Metric::Reference => group.references(adapter, self.count_tokens),
                Metric::LanguageModeling => group.texts(adapter),
                Metric::Summarization => group.summary(),
                Metric::Instances => unreachable!("they are counted elsewhere"),
            };
            let (first, _) = group.states[0];
            let context = &first.instance.context;
            let found: Vec<Stat> = found.into_iter().map(|stat| stat.within(context)).collect();
            found.iter().for_each(|stat| stats.merge(stat.clone()));
            of_instances.push((first, found));
        }
        for context in stats.contexts() {
            if matches!(metric, Metric::Generation(_) | Metric::LanguageModeling) {
                derived(stats, &context).into_iter().for_each(|stat| stats.merge(stat));
            }
            if *metric == Metric::LanguageModeling {
                let here = of_instances.iter().filter(|(state, _)| state.instance.context == context);
                let mut ids: Vec<&str> = here.map(|(state, _)| state.instance.id.as_str()).collect();
                ids.sort_unstable();
                ids.dedup();
                stats.merge(Stat::new("num_instances", ids.len() as f64).within(&context));
            }
        }
        if *metric != Metric::LanguageModeling {
            worst_cases(&of_instances).into_iter().for_each(|stat| stats.merge(stat));
        }
        for (state, stats) in of_instances {
            let (id, context) = (state.instance.id.clone(), state.instance.context.clone());
            instances.push(PerInstance { id, context, trial, stats });
        }
    }

    /// Requests by instance, in order of appearance; those of texts each for itself.
    fn groups(&self, metric: &Metric, trial: i64) -> Vec<Group<'_>> {
        let mut groups: Vec<Group<'_>> = Vec::new();
        let mut places: HashMap<&str, usize> = HashMap::new();
        let alone = *metric == Metric::LanguageModeling;
        let mut failed: Vec<&str> = Vec::new();
        for (state, outcome) in self.state.states.iter().zip(self.outcomes) {
            let identity = state.instance.identity.as_str();
            let Ok(completions) = outcome else {
                failed.push(identity);
                continue;
            };
            // Requests about references are for the metric of references, and the others are not.
            let fits = alone || state.reference.is_some() == (*metric == Metric::Reference);
            if !fits || (state.trial != trial && !alone) {
                continue;
            }
            match places.get(identity).filter(|_| !alone) {
                Some(&place) => groups[place].states.push((state, completions)),
                None => {
                    places.insert(identity, groups.len());
                    groups.push(Group { states: vec![(state, completions)] });
                }
            }
        }
        // An instance with a missing reference cannot be judged.
        groups.retain(|group| alone || !failed.contains(&group.states[0].0.instance.identity.as_str()));
        groups
    }
}

impl Group<'_> {
    /// What is noted of every request.
    fn common(&self, adapter: &Adapter) -> Stats {
        let mut stats = Stats::default();
        for (state, completions) in &self.states {
            let first = &completions[0];
            let mut add = |name: &str, value: f64| stats.merge(Stat::new(name, value));
            add("num_references", state.instance.references.len() as f64);
            add("num_train_trials", adapter.num_train_trials as f64);
            for reason in ["length", "stop", "endoftext", "unknown"] {
                let holds = first.finish_reason == reason;
                add(&format!("finish_reason_{reason}"), f64::from(u8::from(holds)));
            }
            add("num_train_instances", state.num_train_instances as f64);
            add("prompt_truncated", f64::from(u8::from(state.prompt_truncated)));
        }
        stats
    }

    fn generation(&self, adapter: &Adapter, scores: &[(String, Score)]) -> Vec<Stat> {
        let (state, completions) = self.states[0];
        let mut stats: Vec<Stat> = self.common(adapter).iter().cloned().collect();
        if !state.instance.references.is_empty() {
            let mut sorted: Vec<&Completion> = completions.iter().collect();
            sorted.sort_by(|a, b| b.logprob.total_cmp(&a.logprob));
            let answers: Vec<Option<String>> = sorted.iter().map(|one| answer(adapter, state, &one.text)).collect();
            stats.push(Stat::new("max_prob", sorted[0].logprob.exp()));
            let right = state.instance.references.iter().filter(|(_, correct)| *correct);
            let right: Vec<&str> = right.map(|(text, _)| text.as_str()).collect();
            for (name, score) in scores {
                let best = |answers: &[Option<String>]| {
                    let pairs =
                        answers.iter().flatten().flat_map(|answer| right.iter().map(move |gold| (gold, answer)));
                    pairs.map(|(gold, answer)| score.of(gold, answer)).fold(0.0, f64::max)
                };
                stats.push(Stat::new(name, best(&answers[..1])));
                if adapter.num_outputs != 1 {
                    stats.push(Stat::new(&format!("{name}@{}", adapter.num_outputs), best(&answers)));
                }
            }
        }
        stats.extend(likelihood(state, &completions[0]));
        stats
    }

    fn texts(&self, adapter: &Adapter) -> Vec<Stat> {
        let (state, completions) = self.states[0];
        let mut stats: Vec<Stat> = self.common(adapter).iter().cloned().collect();
        stats.extend(likelihood(state, &completions[0]));
        stats
    }

    fn summary(&self) -> Vec<Stat> {
        let (state, completions) = self.states[0];
        let found = without_braces(strip(&completions[0].text));
        let scores = Score::ALL.into_iter().filter(|(_, score)| matches!(score, Score::Rouge(_)));
        let best = |score: Score| {
            let references = state.instance.references.iter();
            references.map(|(text, _)| score.of(without_braces(text), found)).fold(0.0, f64::max)
        };
        scores.map(|(name, score)| Stat::new(name, best(score))).collect()
    }

    /// Which reference is most probable.
    fn references(&self, adapter: &Adapter, count_tokens: &dyn Fn(&str) -> usize) -> Vec<Stat> {
        let mut stats: Vec<Stat> = self.common(adapter).iter().cloned().collect();
        let references = &self.states[0].0.instance.references;
        let mut known = HashMap::new();
        for (state, completions) in &self.states {
            let index = state.reference.expect("the adapter asks about references");
            // There is always a space before the reference.
            let count = count_tokens(&format!(" {}", references[index].0)).max(1);
            let tokens = &completions[0].tokens;
            let tail = &tokens[tokens.len() - count.min(tokens.len())..];
            let logprob: f64 = tail.iter().map(|token| token.logprob).sum();
            known.insert((index, state.calibration), (logprob, count as f64));
        }
        let score = |index: usize| -> Option<f64> {
            let (logprob, count) = known.get(&(index, false))?;
            Some(match adapter.method {
                Method::Calibrated => logprob - known.get(&(index, true))?.0,
                _ => logprob / count,
            })
        };
        let Some(scores) = (0..references.len()).map(score).collect::<Option<Vec<f64>>>() else { return stats };
        let best = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let chosen: Vec<usize> = (0..scores.len()).filter(|&index| scores[index] >= best).collect();
        let Some(&predicted) = chosen.first() else { return stats };
        let right = chosen.iter().filter(|&&index| references[index].1).count();
        let mass: f64 = scores.iter().map(|score| (score - best).exp()).sum();
        stats.push(Stat::new("max_prob", 1.0 / mass));
        stats.push(Stat::new("exact_match", right as f64 / chosen.len() as f64));
        stats.push(Stat::new("predicted_index", predicted as f64));
        stats
    }
}

/// What a completion says: the choice that it names, if it is to name one.
fn answer(adapter: &Adapter, state: &RequestState, text: &str) -> Option<String> {
    let text = strip(text);
    let Some(mapping) = &state.output_mapping else { return Some(text.to_owned()) };
    let named = match &adapter.output_mapping_pattern {
        None => text.to_owned(),
        Some(pattern) => {
            let pattern = fancy_regex::Regex::new(pattern).expect("it was checked");
            let found = pattern.captures(text).ok().flatten();
            let group = found.as_ref().and_then(|found| if found.len() > 1 { found.get(1) } else { found.get(0) });
            group.map_or(String::new(), |group| group.as_str().to_owned())
        }
    };
    mapping.iter().find(|(key, _)| *key == named).map(|(_, choice)| choice.clone())
}

fn likelihood(state: &RequestState, completion: &Completion) -> [Stat; 3] {
    let mut tokens = &completion.tokens[..];
    let skipped = state.num_conditioning_tokens;
    // Some tokenizers begin with an empty token, which is nobody's.
    if skipped > 0 && tokens.first().is_some_and(|token| token.text.is_empty()) {
        tokens = &tokens[1..];
    }
    let tokens = tokens.get(skipped..).unwrap_or_default();
    [
        Stat::new("logprob", tokens.iter().map(|token| token.logprob).sum()),
        Stat::new("num_perplexity_tokens", tokens.len() as f64),
        Stat::new("num_bytes", tokens.iter().map(|token| token.bytes()).sum::<usize>() as f64),
    ]
}

/// Perplexity and its like over all tokens of a context.
fn derived(stats: &Stats, context: &Context) -> Vec<Stat> {
    let sum = |name: &str| stats.get(name, context).map(|stat| stat.sum);
    let Some(logprob) = sum("logprob") else { return Vec::new() };
    let mut found = Vec::new();
    if let Some(tokens) = sum("num_perplexity_tokens").filter(|tokens| *tokens > 0.0) {
        found.push(Stat::new("perplexity", (-logprob / tokens).exp()));
    }
    if let Some(bytes) = sum("num_bytes").filter(|bytes| *bytes > 0.0) {
        found.push(Stat::new("bits_per_byte", -logprob / bytes / std::f64::consts::LN_2));
        found.push(Stat::new("logprob_per_byte", logprob / bytes));
    }
    found.into_iter().map(|stat| stat.within(context)).collect()
}

/// For perturbed instances: the least over perturbations of an instance, the unperturbed one included, by perturbation
/// and over all that test robustness or fairness; and what the unperturbed ones have.
fn worst_cases(instances: &[(&RequestState, Vec<Stat>)]) -> Vec<Stat> {
    let mut order = Vec::new();
    let mut groups: HashMap<_, Vec<(&RequestState, &Stat)>> = HashMap::new();
    for (state, stats) in instances {
        for stat in stats {
            let context = Context { perturbation: None, ..stat.name.context.clone() };
            let key = (stat.name.name.clone(), context, state.instance.id.clone());
            let group = groups.entry(key.clone()).or_default();
            if group.is_empty() {
                order.push(key);
            }
            group.push((state, stat));
        }
    }
    let mut found = Stats::default();
    for key in order {
        let (name, context, _) = &key;
        let group = &groups[&key];
        let original = group.iter().find(|(state, _)| state.instance.context.perturbation.is_none());
        let least = |perturbation: Value, members: Vec<&Stat>| {
            let members = members.into_iter().chain(original.map(|(_, stat)| *stat));
            let least = members.map(|stat| stat.min).reduce(f64::min)?;
            Some(Stat::new(name, least).within(&computed_on(context, perturbation, "worst")))
        };
        let of = |tests: fn(&RequestState) -> bool| -> Vec<&Stat> {
            group.iter().filter(|(state, _)| tests(state)).map(|(_, stat)| *stat).collect()
        };
        let robust = json!({"name": "robustness", "robustness": true, "fairness": false});
        let fair = json!({"name": "fairness", "robustness": false, "fairness": true});
        let robustness = least(robust, of(|state| state.instance.tests.0));
        let fairness = least(fair, of(|state| state.instance.tests.1));
        robustness.into_iter().chain(fairness).for_each(|stat| found.merge(stat));
        for (state, stat) in group {
            let Some(text) = &state.instance.context.perturbation else { continue };
            let perturbation: Value = serde_json::from_str(text).expect("it was JSON");
            least(perturbation.clone(), vec![stat]).into_iter().for_each(|stat| found.merge(stat));
            if let Some((_, original)) = original {
                let context = computed_on(context, perturbation, "original");
                found.merge(Stat { name: (*stat).clone().within(&context).name, ..(*original).clone() });
            }
        }
    }
    found.iter().cloned().collect()
}

fn computed_on(context: &Context, mut perturbation: Value, on: &str) -> Context {
    perturbation["computed_on"] = json!(on);
    Context { perturbation: Some(perturbation.to_string()), ..context.clone() }
}

fn without_braces(text: &str) -> &str {
    let text = text.strip_prefix('{').unwrap_or(text);
    text.strip_suffix('}').unwrap_or(text)
}

impl Report {
    /// `stats.json`.
    pub fn stats_json(&self) -> Value {
        self.stats.iter().map(Stat::json).collect()
    }

    /// `per_instance_stats.json`.
    pub fn instances_json(&self) -> Value {
        let one = |instance: &PerInstance| {
            let mut entry = Map::from_iter([("instance_id".to_owned(), json!(instance.id))]);
            if let Some(text) = &instance.context.perturbation {
                entry.insert("perturbation".to_owned(), serde_json::from_str(text).expect("it was JSON"));
            }
            entry.insert("train_trial_index".to_owned(), json!(instance.trial));
            let stats = instance.stats.iter().filter(|stat| !stat.sum.is_nan());
            entry.insert("stats".to_owned(), stats.map(Stat::json).collect());
            Value::Object(entry)
        };
        self.instances.iter().map(one).collect()
    }
}

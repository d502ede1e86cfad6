//! `--trace`: a run's steps in time, predicted beside measured, for Perfetto and chrome://tracing.
//!
//! The format is the Chrome trace event format: complete events (`ph` X) with microseconds, one process for what was
//! measured and one for what was predicted, one thread per lane in each.
//!
//! **Invariant:** a predicted step stands for the same step of the same pass as its measured twin; the two passes start
//! at the same moment, so that steps can be compared within a pass.

use std::io::{self, Write};

use serde_json::{Value, json};

use crate::executor::{Event, PassRecord};
use crate::schedule::fences::Fences;
use crate::schedule::price::{Resources, step_work};
use crate::schedule::simulate::simulate;
use crate::schedule::step::{Lane, Step};

const MEASURED: u64 = 1;
const PREDICTED: u64 = 2;

/// Writes a trace; predicted times come from `costs`, if there are any.
///
/// # Errors
/// What writing gives.
pub fn write(
    out: &mut dyn Write,
    events: &[Event],
    records: &[PassRecord],
    costs: Option<&crate::cost::Costs<'_>>,
) -> io::Result<()> {
    let mut trace = Trace { out, first: true };
    trace.out.write_all(b"[")?;
    trace.names(MEASURED, "measured", events.iter().map(|event| event.step.lane))?;
    for event in events {
        trace.step(MEASURED, &event.step, event.pass, (event.start, event.end))?;
    }
    if let Some(costs) = costs {
        let lanes = records.iter().flat_map(|record| &record.steps).map(|step| step.lane);
        trace.names(PREDICTED, "predicted", lanes)?;
        for event in predict(events, records, costs) {
            trace.step(PREDICTED, &event.step, event.pass, (event.start, event.end))?;
        }
    }
    trace.out.write_all(b"\n]\n")
}

/// The steps of all passes as the cost model has them, each pass moved to where it began.
fn predict(events: &[Event], records: &[PassRecord], costs: &crate::cost::Costs<'_>) -> Vec<Event> {
    let steps: Vec<Step> = records.iter().flat_map(|record| record.steps.iter().copied()).collect();
    let fences = Fences::new().of(&steps);
    let works: Vec<_> = records
        .iter()
        .flat_map(|record| record.steps.iter().map(|step| step_work(step, &record.blocks, costs)))
        .collect();
    let timeline = simulate(&steps, &fences, &works, &Resources::of(costs.hardware));
    let (mut at, mut predicted) = (0, Vec::with_capacity(steps.len()));
    for record in records {
        let spans = &timeline.spans[at..at + record.steps.len()];
        at += record.steps.len();
        let computes = |step: &Step| step.bytes == 0;
        // The first thing that is computed is what a pass begins with; its weights may have come long before.
        let first = record.steps.iter().zip(spans).find(|(step, _)| computes(step)).map(|(_, span)| span.start_secs);
        let measured = events.iter().find(|event| event.pass == record.pass && computes(&event.step));
        let shift = measured.map_or(0.0, |event| event.start) - first.unwrap_or(0.0);
        predicted.extend(record.steps.iter().zip(spans).map(|(&step, span)| Event {
            pass: record.pass,
            step,
            start: span.start_secs + shift,
            end: span.end_secs + shift,
        }));
    }
    predicted
}

struct Trace<'a> {
    out: &'a mut dyn Write,
    first: bool,
}

impl Trace<'_> {
    fn event(&mut self, value: &Value) -> io::Result<()> {
        let comma = if self.first { "\n" } else { ",\n" };
        self.first = false;
        write!(self.out, "{comma}{value}")
    }

    fn names(&mut self, process: u64, name: &str, lanes: impl Iterator<Item = Lane>) -> io::Result<()> {
        let lanes: std::collections::BTreeSet<Lane> = lanes.collect();
        self.event(&json!({"name": "process_name", "ph": "M", "pid": process, "args": {"name": name}}))?;
        for lane in lanes {
            let thread = lane.index() + 1;
            let args = json!({"name": lane.name()});
            self.event(&json!({"name": "thread_name", "ph": "M", "pid": process, "tid": thread, "args": args}))?;
        }
        Ok(())
    }

    fn step(&mut self, process: u64, step: &Step, pass: u64, (start, end): (f64, f64)) -> io::Result<()> {
        let micros = |secs: f64| (secs * 1e6).round();
        let args = json!({"pass": pass, "layer": step.stage, "block": step.block, "bytes": step.bytes});
        self.event(&json!({
            "name": format!("{} L{} b{}", step.op.name(), step.stage, step.block),
            "cat": step.op.name(),
            "ph": "X",
            "ts": micros(start),
            "dur": micros(end - start).max(0.0),
            "pid": process,
            "tid": step.lane.index() + 1,
            "args": args,
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::schedule::step::{Op, Slots};

    #[test]
    fn events_are_a_json_array_with_a_thread_per_lane() {
        let step =
            |lane, op, bytes| Step { lane, op, stage: 3, block: 1, reads: Slots::none(), writes: Slots::none(), bytes };
        let events = [
            Event { pass: 0, step: step(Lane::H2d, Op::LoadKv, 4096), start: 0.5, end: 0.75 },
            Event { pass: 0, step: step(Lane::Gpu, Op::Layer, 0), start: 0.75, end: 1.0 },
        ];
        let mut text = Vec::new();
        write(&mut text, &events, &[], None).unwrap();
        let value: Value = serde_json::from_slice(&text).unwrap();
        let events = value.as_array().unwrap();
        let names: Vec<&str> = events.iter().filter_map(|event| event["name"].as_str()).collect();
        assert_eq!(names, ["process_name", "thread_name", "thread_name", "load_kv L3 b1", "layer L3 b1"]);
        assert_eq!((events[3]["ts"].as_f64(), events[3]["dur"].as_f64()), (Some(5e5), Some(2.5e5)));
    }
}

//! `tidemill sweep`, through the program.
#![allow(missing_docs)]

mod support;

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use rustix::process::Signal;
use serde_json::Value;
use support::process::{signal, start, wait, wait_for_text};
use support::{Scratch, hint, read_jsonl, refused, tidemill};

const T4: [&str; 4] = ["--predict-only", "--device=auto", "--hardware", "policies/hardware/t4-208gb.toml"];

fn command(model: &str, grid: &str, output: &Path, extra: &[&str]) -> Command {
    let output = output.to_str().expect("UTF-8");
    let mut command = tidemill(&["sweep", "--model", model, "--grid", grid, "--output", output]);
    command.args(extra).current_dir(env!("CARGO_MANIFEST_DIR")).stdin(Stdio::null());
    command
}

fn sweep(model: &str, grid: &str, output: &Path, extra: &[&str]) -> Output {
    command(model, grid, output, extra).output().expect("the binary runs")
}

fn said(output: &Output, code: i32) -> String {
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(code), "{said}");
    assert!(output.stdout.is_empty());
    said
}

/// The environment and the points of a finished sweep.
fn rows(directory: &Path) -> (Value, Vec<Value>) {
    let mut lines = read_jsonl(&directory.join("results.jsonl"));
    let environment = lines.remove(0);
    assert_eq!(environment["type"], "environment");
    assert!(lines.iter().all(|line| line["type"] == "point"));
    (environment, lines)
}

/// The points of rows, as text.
fn points(rows: &[Value]) -> Vec<String> {
    rows.iter().map(|row| row["point"].to_string()).collect()
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or_else(|| panic!("{value} is no number"))
}

#[test]
fn points_are_predicted_for_a_machine_that_is_elsewhere() {
    let scratch = Scratch::new();
    let output = scratch.path("out");
    let grid = "batch=4,32;prompt-len=512;gen-len=32;kv-dtype=f16,int4";
    let first = sweep("policies/models/opt-30b.json", grid, &output, &[&T4[..], &["--weights", "int4"]].concat());
    said(&first, 0);
    let (environment, rows) = rows(&output);
    assert_eq!(environment["measured"], false);
    assert_eq!(environment["machine"]["gpu"], "Tesla T4");
    assert_eq!(environment["grid"], grid);
    assert_eq!(rows.len(), 4);
    assert_eq!(points(&rows).iter().collect::<BTreeSet<_>>().len(), 4);
    for row in &rows {
        assert_eq!((&row["measured"], &row["point"]["weights"]), (&Value::Bool(false), &Value::from("int4")));
        assert!(row.get("error").is_none() && row.get("median").is_none() && row.get("runs").is_none(), "{row}");
        let predicted = &row["predicted"];
        assert_eq!(predicted["policy"]["sequences"], row["point"]["batch"]);
        let rate = number(&predicted["generated_tokens_per_s"]);
        assert!(rate > 0.0 && rate <= 1.001 * number(&predicted["bound"][0]), "{row}");
        // Nothing that a steady pass needs allows less than what binds.
        let limits = predicted["limits"].as_object().unwrap();
        let binding = number(&limits[predicted["binding"].as_str().unwrap()]);
        assert!(limits.values().all(|limit| number(limit) >= binding), "{row}");
    }
    // Twice as much in flight, or a quarter of the bytes, is not slower where copies bind.
    let rate = |row: &Value| number(&row["predicted"]["generated_tokens_per_s"]);
    assert!(rate(&rows[0]) < rate(&rows[2]) && rate(&rows[0]) < rate(&rows[1]));
}

#[test]
fn an_impossible_point_is_a_row_and_the_others_are_there() {
    let scratch = Scratch::new();
    let output = scratch.path("out");
    let grid = "batch=1,4096;prompt-len=16,2040;gen-len=16;gpu-memory=15GB,1GiB;cpu-memory=190GB";
    said(&sweep("policies/models/opt-6.7b.json", grid, &output, &[&T4[..], &["--disk-space", "2GB"]].concat()), 3);
    let (_, rows) = rows(&output);
    assert_eq!(rows.len(), 8);
    let (failed, good): (Vec<Value>, Vec<Value>) = rows.into_iter().partition(|row| row.get("error").is_some());
    assert!(failed.len() >= 5 && !good.is_empty(), "{} {}", failed.len(), good.len());
    for row in &failed {
        assert_eq!((&row["measured"], row.get("predicted")), (&Value::Bool(false), None));
        let what = row["error"]["what"].as_str().unwrap();
        assert!(what.contains("budget is") || what.contains("more than the context, 2048"), "{what}");
        assert!(!row["error"]["hint"].as_str().unwrap().is_empty());
    }
}

#[test]
fn a_sweep_that_is_killed_goes_on_and_ends_with_the_same_points() {
    let scratch = Scratch::new();
    let grid = "batch=1,4;prompt-len=8,70;gen-len=3,9;kv-policy=full,sink:start=4,recent=60";
    let flags = ["--repetitions", "1", "--threads", "1", "--cpu-memory", "300MiB"];
    let output = scratch.path("out");
    let results = output.join("results.jsonl");
    // Killed twice, once while a line is torn.
    let mut child = start(command("demo", grid, &output, &flags), &scratch.path("said"));
    let before = wait_for_text(&results, "\"measured\":true,\"predicted\"", Duration::from_secs(60));
    child.kill().expect("kill");
    child.wait().expect("wait");
    let whole = before.rfind('\n').map_or(0, |end| end + 1);
    let torn = &fs::read(&results).unwrap()[..];
    fs::write(&results, [torn, b"{\"type\":\"point\",\"poi"].concat()).unwrap();
    let mut child = start(command("demo", grid, &output, &flags), &scratch.path("said"));
    let count = |text: &str| text.lines().filter(|line| line.contains("\"median\"")).count();
    let known = count(&before[..whole]);
    let deadline = std::time::Instant::now() + Duration::from_secs(60);
    while count(&fs::read_to_string(&results).unwrap()) <= known && std::time::Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(2));
    }
    // Told to stop, it leaves whole lines.
    signal(&child, Signal::INT);
    let status = wait(&mut child, Duration::from_secs(60)).expect("it stops");
    if status.code() == Some(1) {
        let text = fs::read_to_string(scratch.path("said")).unwrap();
        assert!(text.contains("error: stopped by SIGINT") && text.contains("hint: run the same command"), "{text}");
    }
    let stopped = fs::read(&results).unwrap();
    assert!(stopped.ends_with(b"\n"));
    said(&sweep("demo", grid, &output, &flags), 0);
    let finished = fs::read(&results).unwrap();
    assert!(finished.starts_with(&stopped));
    let (environment, rows) = rows(&output);
    assert_eq!((&environment["measured"], &environment["synthetic"]), (&Value::Bool(true), &Value::Bool(false)));
    assert_eq!(rows.len(), 16);
    assert_eq!(points(&rows).iter().collect::<BTreeSet<_>>().len(), 16);
    for row in &rows {
        assert_eq!(row["measured"], true, "{row}");
        let (runs, median) = (row["runs"].as_array().unwrap(), &row["median"]);
        assert_eq!(runs.len(), 1);
        assert_eq!(runs[0]["generated_tokens_per_s"], median["generated_tokens_per_s"]);
        // What ran is what was asked for: every token, and no other.
        let point = |name: &str| number(&row["point"][name]);
        let tokens = point("num-prompts") * point("gen-len");
        let counted = number(&median["generated_tokens_per_s"]) * number(&median["wall_s"]);
        assert!((counted / tokens - 1.0).abs() < 1e-3, "{counted} of {tokens}");
        assert!(number(&runs[0]["passes"]) >= point("gen-len"));
    }
    // Nothing is left beside the results, and nothing is done again.
    let names: Vec<String> =
        fs::read_dir(&output).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    assert!(names.iter().all(|name| ["results.jsonl", "report.html"].contains(&name.as_str())), "{names:?}");
    assert!(said(&sweep("demo", grid, &output, &flags), 0).contains("16 of 16 points are there already"));
    assert_eq!(fs::read(&results).unwrap(), finished);
}

#[test]
fn another_grid_is_told_and_another_model_is_refused() {
    let scratch = Scratch::new();
    let output = scratch.path("out");
    let model = "policies/models/opt-6.7b.json";
    said(&sweep(model, "batch=1,2;prompt-len=64;gen-len=8", &output, &T4), 0);
    let more = said(&sweep(model, "batch=2,3;prompt-len=64;gen-len=8", &output, &T4), 0);
    assert!(more.contains("1 of 2 points are there already"), "{more}");
    assert!(more.contains("begun with --grid \"batch=1,2;prompt-len=64;gen-len=8\"; 1 points"), "{more}");
    assert_eq!(rows(&output).1.len(), 3);
    let grid = "batch=2,3;prompt-len=64;gen-len=8";
    let before = fs::read(output.join("results.jsonl")).unwrap();
    for (model, extra, differs) in [
        ("policies/models/opt-30b.json", &T4[..], "its model is"),
        (model, &["--predict-only", "--device=auto", "--hardware", "policies/hardware/h200.toml"], "its machine."),
        (model, &[&T4[..], &["--throttle", "h2d=1GB/s"]].concat(), "its flags.throttle is null"),
        (model, &[&T4[..], &["--seed", "3"]].concat(), "its seed is 0"),
    ] {
        let said = refused(&sweep(model, grid, &output, extra), 1);
        assert!(said.contains(differs) && hint(&said).contains("--output"), "{said}");
    }
    assert_eq!(fs::read(output.join("results.jsonl")).unwrap(), before);
    // A file of something else is not touched.
    let other = scratch.path("other");
    fs::create_dir(&other).unwrap();
    fs::write(other.join("results.jsonl"), "{\"custom_id\":\"a\"}\n").unwrap();
    let said = refused(&sweep(model, grid, &other, &T4), 1);
    assert!(said.contains("line 1 cannot be read") && hint(&said).contains("--output"), "{said}");
    assert_eq!(fs::read_to_string(other.join("results.jsonl")).unwrap(), "{\"custom_id\":\"a\"}\n");
}

/// The pictures of a page.
fn pictures(page: &str) -> Vec<&str> {
    page.match_indices("<svg").map(|(at, _)| &page[at..at + page[at..].find("</svg>").expect("it ends") + 6]).collect()
}

/// Holds a text to XML: tags that nest, quoted attributes, known entities; gives the names of all elements.
fn well_formed(text: &str) -> Vec<String> {
    let (mut open, mut seen, mut rest) = (Vec::new(), Vec::new(), text);
    while let Some(at) = rest.find('<') {
        let entities = rest[..at].split('&').skip(1);
        entities.for_each(|entity| {
            assert!(["amp;", "lt;", "gt;", "quot;", "apos;"].iter().any(|known| entity.starts_with(known)))
        });
        let end = at + rest[at..].find('>').expect("a tag ends");
        let tag = &rest[at + 1..end];
        rest = &rest[end + 1..];
        if let Some(name) = tag.strip_prefix('/') {
            assert_eq!(open.pop().as_deref(), Some(name.trim()), "{tag}");
            continue;
        }
        let inside = tag.trim_end_matches('/');
        assert_eq!(inside.matches('"').count() % 2, 0, "{tag}");
        // Outside of quotes there are names and equals signs alone.
        let bare: String = inside.split('"').step_by(2).collect();
        assert!(bare.chars().all(|c| c.is_alphanumeric() || " =-:\n".contains(c)), "{tag}");
        let name = inside.split_whitespace().next().expect("a name").to_owned();
        seen.push(name.clone());
        if !tag.ends_with('/') {
            open.push(name);
        }
    }
    assert!(open.is_empty(), "{open:?}");
    seen
}

#[test]
fn the_report_has_every_picture_and_loads_nothing() {
    let scratch = Scratch::new();
    let output = scratch.path("out");
    let grid = "batch=1,4;prompt-len=8;gen-len=3;cpu-memory=200MiB,1MiB;\
                kv-policy=full,h2o:heavy=0.25,recent=0.25,sink:start=4,recent=0.5";
    let flags = ["--repetitions", "2", "--quality", "bench_results/quality.json"];
    let published = scratch.write(
        "published.json",
        r#"{"source": "a <page> & more", "series": [{"name": "A & B", "gen-len": 3, "points": [[2, 700.5]]}]}"#,
    );
    let flags = [&flags[..], &["--published", published.to_str().unwrap()]].concat();
    said(&sweep("demo", grid, &output, &flags), 3);
    let page = fs::read_to_string(output.join("report.html")).unwrap();
    let pictures = pictures(&page);
    let titles = [
        "Latency against throughput",
        "Throughput against batch",
        "Throughput against batch",
        "Throughput against batch",
        "Predicted against measured",
        "Cache budget against throughput",
        "Cache budget against quality",
        "A pass of the fastest point",
    ];
    assert_eq!(pictures.len(), titles.len());
    for (picture, title) in pictures.iter().zip(titles) {
        assert!(picture.contains(title), "{title}");
        let elements = well_formed(picture);
        assert!(elements.len() > 20, "{title}: {} elements", elements.len());
        assert!(!elements.iter().any(|name| ["image", "script", "use", "style", "a"].contains(&name.as_str())));
    }
    assert!(pictures[0].contains("A &amp; B") && page.contains("a &lt;page&gt; &amp; more"));
    // The only address is the namespace, which is a name.
    let addresses = page.matches("://").count();
    assert_eq!(addresses, page.matches("xmlns=\"http://www.w3.org/2000/svg\"").count());
    for word in ["src=", "href", "@import", "url(", "<script", "<link"] {
        assert!(!page.contains(word), "{word}");
    }
    assert!(page.contains("of 6 predictions are within 10 %") && page.contains("12, 6 of them impossible"));
    for (flag, text, what) in [
        ("--published", "{\"source\": 3}", "invalid type"),
        ("--published", "{\"source\": \"s\", \"series\": [{}]}", "missing field"),
        ("--quality", "{\"A\": [{\"flags\": \"--weights f32\"}]}", "no entry is about"),
    ] {
        let file = scratch.write("wrong.json", text);
        let said = refused(&sweep("demo", grid, &scratch.path("no"), &[flag, file.to_str().unwrap()]), 2);
        assert!(said.contains(what), "{said}");
        hint(&said);
    }
    assert!(!scratch.path("no").exists());
}

#[test]
fn grids_and_flags_that_make_no_sense_are_refused() {
    let scratch = Scratch::new();
    let output = scratch.path("out");
    let lengths = "prompt-len=8;gen-len=2";
    for (grid, extra, what) in [
        ("batch=;prompt-len=8;gen-len=2", &[][..], "batch: `` is empty"),
        ("batch=-1;prompt-len=8;gen-len=2", &[], "batch: `-1` is no number"),
        ("batch=1;prompt-len=8;gen-len=2.5", &[], "gen-len: `2.5` is no number"),
        ("batch=1;prompt-len=8;gen-len=2;kv-dtype=f8", &[], "kv-dtype: `f8` is none of auto, f32"),
        ("batch=1;prompt-len=8;gen-len=2;weights=int4,int5", &[], "weights: `int5` is none of"),
        ("batch=1;prompt-len=8;gen-len=2;kv-policy=h2o", &[], "kv-policy: `h2o`"),
        ("batch=1;prompt-len=8;gen-len=2;cpu-memory=0", &[], "cpu-memory: `0` is no size"),
        ("batch=1;prompt-len=8;gen-len=2;moon=full", &[], "`moon` is no axis"),
        ("prompt-len=8;gen-len=2", &[], "`batch` is missing"),
        ("", &[], "`batch` is missing"),
        (&format!("batch=1;{lengths}"), &["--max-tokens", "3"], "has no --max-tokens"),
        (&format!("batch=1;{lengths}"), &["--policy", "x.toml"], "has no --policy"),
        (&format!("batch=1;{lengths}"), &["--repetitions", "0"], "--repetitions 0"),
        (&format!("batch=1;{lengths}"), &["--threads", "0"], "--threads 0"),
        (&format!("batch=1;{lengths}"), &["--predict-only", "--throttle", "h2d=fast"], "--throttle"),
    ] {
        let said = refused(&sweep("demo", grid, &output, extra), 2);
        assert!(said.contains(what), "{grid}: {said}");
        hint(&said);
        assert!(!output.exists(), "{grid}");
    }
    for extra in [&["--hardware", T4[3]][..], &["--predict-only", "--repetitions", "2"], &["--kv-dtype", "f8"]] {
        let result = sweep("demo", &format!("batch=1;{lengths}"), &output, extra);
        assert_eq!(result.status.code(), Some(2), "{extra:?}");
        assert!(!output.exists());
    }
    let nothing = sweep("no/such/model", &format!("batch=1;{lengths}"), &output, &T4);
    hint(&refused(&nothing, 2));
}

#[test]
fn points_get_numerics_where_the_program_may_choose() {
    let scratch = Scratch::new();
    let output = scratch.path("out");
    let lossy = |grid: &str, code: i32| {
        said(&sweep("policies/models/opt-30b.json", grid, &output, &[&T4[..], &["--allow-lossy"]].concat()), code)
    };
    let grid = "batch=4,64;prompt-len=512;gen-len=32;kv-dtype=f16";
    lossy(grid, 0);
    let there = rows(&output).1;
    for row in &there {
        let point = &row["point"];
        assert_eq!((&point["kv-dtype"], point["weights"] == "native"), (&Value::from("f16"), false), "{point}");
        assert!(point["activations"].is_string(), "{point}");
    }
    // The same choice again, so nothing is left to do.
    assert!(lossy(grid, 0).contains("2 of 2 points are there already"));
    assert_eq!(rows(&output).1, there);
}

//! `tidemill plan`, through the program.
#![allow(missing_docs)]

use std::process::{Command, Output};

use serde_json::Value;

fn plan(arguments: &[&str]) -> Output {
    let root = env!("CARGO_MANIFEST_DIR");
    let mut command = Command::new(env!("CARGO_BIN_EXE_tidemill"));
    command.current_dir(root).arg("plan").args(arguments).output().expect("the program starts")
}

const T4: [&str; 2] = ["--hardware", "policies/hardware/t4-208gb.toml"];

#[test]
fn a_model_bigger_than_memory_is_planned_within_its_budgets() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).display().to_string();
    let (policy, picture) = (path("policy.toml"), path("pass.svg"));
    let job = ["--model", "policies/models/opt-30b.json", "--prompt-len", "512", "--gen-len", "32"];
    let rest = ["--json", "--explain", "--save", &policy, "--draw", &picture];
    let output = plan(&[&job[..], &T4, &rest].concat());
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let value: Value = serde_json::from_slice(&output.stdout).unwrap();
    for tier in ["gpu", "cpu", "disk"] {
        assert!(value["bytes"][tier].as_f64().unwrap() <= value["budget_bytes"][tier].as_f64().unwrap(), "{tier}");
    }
    let number = |value: &Value| value.as_f64().unwrap();
    let predicted = number(&value["predicted"]["total_tokens_per_s"]);
    assert!(predicted > 50.0 && predicted <= number(&value["bound_tokens_per_s"]));
    assert!(number(&value["predicted"]["pass_secs"]) >= number(&value["predicted"]["pass_bound_secs"]));
    assert!(value["would_help"].as_array().unwrap().iter().any(|change| change["lossy"] == true));
    let saved: tidemill::policy::Policy = toml::from_str(&std::fs::read_to_string(policy).unwrap()).unwrap();
    assert_eq!(saved.sequences as u64, value["policy"]["sequences"].as_u64().unwrap());
    let picture = std::fs::read_to_string(picture).unwrap();
    assert!(picture.starts_with("<svg") && picture.ends_with("</svg>\n") && picture.contains("h2d"));
}

/// The file of a job that `generate` runs serves; what was typed goes before it.
#[test]
fn flags_come_from_a_file() {
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str, text: &str| {
        std::fs::write(folder.path().join(name), text).unwrap();
        folder.path().join(name).display().to_string()
    };
    let job = "model = \"policies/models/opt-30b.json\"\nweights = \"int4\"\ngpu-memory = \"12GiB\"\nprompt-len = 512\n\
               gen-len = 32\ntemperature = 0.7\noutput = \"out.jsonl\"\n";
    let known = file("job.toml", job);
    let json = |arguments: &[&str]| -> Value {
        let output = plan(&[&T4[..], &["--json", "--config", &known], arguments].concat());
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        serde_json::from_slice(&output.stdout).unwrap()
    };
    let typed = plan(
        &[
            &T4[..],
            &["--json", "--model", "policies/models/opt-30b.json", "--weights", "int4", "--gpu-memory", "12GiB"],
            &["--prompt-len", "512", "--gen-len", "32"],
        ]
        .concat(),
    );
    let typed: Value = serde_json::from_slice(&typed.stdout).unwrap();
    let from_file = json(&[]);
    assert_eq!(from_file["policy"], typed["policy"]);
    let gibibytes = |plan: &Value| plan["budget_bytes"]["gpu"].as_f64().unwrap() / f64::from(1 << 30);
    assert_eq!(gibibytes(&from_file), 12.0);
    assert_eq!(gibibytes(&json(&["--gpu-memory", "8GiB"])), 8.0);
    for (text, what) in [
        ("wieghts = \"int4\"\n", "wieghts"),
        ("prompt-len = 5\n", "--model is missing"),
        ("model = \"policies/models/opt-30b.json\"\n", "neither --input nor --prompt-len"),
    ] {
        let output = plan(&["--config", &file("wrong.toml", text)]);
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.code() == Some(2) && said.contains(what), "{said}");
    }
}

#[test]
fn what_cannot_fit_is_refused_and_the_hint_works() {
    let job = ["--model", "policies/models/opt-175b.json", "--prompt-len", "512", "--gen-len", "32"];
    let output = plan(&[&job[..], &T4, &["--gpu-memory", "1GiB"]].concat());
    assert_eq!(output.status.code(), Some(1));
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(text.contains("on gpu, budget is 1.0 GiB"), "{text}");
    let hint = text.split("--gpu-memory ").nth(1).unwrap();
    let size = hint.split_whitespace().next().unwrap();
    let output = plan(&[&job[..], &T4, &["--gpu-memory", size]].concat());
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn lines_of_a_file_are_counted() {
    let folder = tempfile::tempdir().unwrap();
    let input = folder.path().join("in.jsonl");
    let lines = ["{\"prompt\": [1, 2, 3, 4], \"max_tokens\": 8}", "{\"prompt\": \"twelve bytes\", \"n\": 3}"];
    std::fs::write(&input, lines.join("\n")).unwrap();
    let model = ["--model", "policies/models/llama-1.1b.json", "--json", "--gen-len", "20"];
    let output = plan(&[&model[..], &T4, &["--input", input.to_str().unwrap()]].concat());
    let value: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(value["job"]["requests"], 4);
    assert_eq!((value["job"]["prompt_len"].as_f64(), value["job"]["gen_len"].as_f64()), (Some(3.25), Some(17.0)));
}

#[test]
fn prompts_that_begin_alike_are_planned_as_what_they_need() {
    let folder = tempfile::tempdir().unwrap();
    let input = folder.path().join("in.jsonl");
    let plan_of = |headers: u32| {
        let prompt =
            |line: u32| -> Vec<u32> { (0..900).map(|at| at * (1 + line % headers)).chain([line; 50]).collect() };
        let lines = (0..1000).map(|line| format!("{{\"prompt\": {:?}, \"max_tokens\": 32}}\n", prompt(line)));
        std::fs::write(&input, lines.collect::<String>()).unwrap();
        let model = ["--model", "policies/models/opt-30b.json", "--json"];
        let output = plan(&[&model[..], &T4, &["--input", input.to_str().unwrap()]].concat());
        serde_json::from_slice::<Value>(&output.stdout).unwrap()
    };
    let number = |value: &Value| value.as_f64().unwrap();
    let (apart, alike) = (plan_of(1000), plan_of(4));
    assert_eq!((number(&apart["job"]["prompt_len"]), number(&apart["job"]["shared_len"])), (950.0, 0.0));
    // Fourteen whole pages of 900 tokens, a fraction less as a text than as tokens.
    assert!((760.0..=896.0).contains(&number(&alike["job"]["shared_len"])), "{}", alike["job"]);
    let sequences = |value: &Value| number(&value["policy"]["sequences"]);
    let rate = |value: &Value| number(&value["predicted"]["generated_tokens_per_s"]);
    assert!(sequences(&alike) > 1.5 * sequences(&apart), "{} {}", sequences(&alike), sequences(&apart));
    assert!(rate(&alike) > 3.0 * rate(&apart), "{} {}", rate(&alike), rate(&apart));
}

#[test]
fn numerics_are_chosen_where_it_is_allowed_and_they_are_not_said() {
    let plan_with = |more: &[&str]| {
        let job = ["--model", "policies/models/opt-30b.json", "--prompt-len", "512", "--gen-len", "32", "--json"];
        let output = plan(&[&job[..], &T4, more].concat());
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{said}");
        (serde_json::from_slice::<Value>(&output.stdout).unwrap(), said)
    };
    let rate = |value: &Value| value["predicted"]["generated_tokens_per_s"].as_f64().unwrap();
    let ((plain, nothing), (chosen, said)) = (plan_with(&[]), plan_with(&["--allow-lossy"]));
    assert!(nothing.is_empty() && said.starts_with("--allow-lossy chose ") && said.contains(" int"), "{said}");
    // The link binds, over which 16 bits go.
    assert!(rate(&chosen) > 1.5 * rate(&plain), "{} {}", rate(&chosen), rate(&plain));
    let words = said.split("chose ").nth(1).unwrap().trim();
    let flags: Vec<&str> = words.split(' ').collect();
    let mut said_so = plan_with(&flags).0;
    said_so["planning_secs"] = chosen["planning_secs"].clone();
    assert_eq!(said_so, chosen);
    let (kept, _) = plan_with(&["--allow-lossy", "--weights", "f16", "--kv-dtype", "f16"]);
    assert_eq!((&kept["numerics"], rate(&kept)), (&plain["numerics"], rate(&plain)));
}

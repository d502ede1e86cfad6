//! Holds the tree to its rules: module graph, unsafe code, headers, sizes, machine paths, licences.
#![allow(missing_docs)]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::process::Command;

use tidemill::hardware::Hardware;
use tidemill::planner::model::{Numerics, PlanModel};
use tidemill::policy::Policy;

/// What each top-level module may import, as paths below `crate`: a module, or a part of one.
///
/// The first rows know nothing of the later ones, so this is also the order from the bottom to the top. A row that
/// the code does not need is an error: the table says what is, not what might be.
const GRAPH: &[(&str, &[&str])] = &[
    ("error", &[]),
    ("durable", &["error"]),
    ("rng", &[]),
    ("quant", &[]),
    ("memory", &["error"]),
    ("model", &["durable", "error", "memory", "quant", "rng"]),
    ("kv", &["model::dtype"]),
    ("policy", &["error::Tier"]),
    ("hardware", &["error", "model::dtype"]),
    ("cost", &["hardware", "model::config", "model::dtype"]),
    ("schedule", &["cost", "error::Tier", "hardware", "kv", "policy"]),
    ("planner", &["cost", "error", "hardware", "kv", "model::config", "model::dtype", "policy", "schedule"]),
    ("job", &["durable", "error"]),
    (
        "device",
        &["error", "kv", "memory::arena", "memory::limits", "model::config", "model::dtype", "model::packed::panels"],
    ),
    ("executor", &["device", "error", "kv", "memory::arena", "memory::disk", "model", "schedule"]),
    (
        "engine",
        &[
            "device::Device",
            "device::sampling",
            "error",
            "executor",
            "job",
            "kv",
            "model",
            "planner::job",
            "policy::Order",
            "rng",
            "schedule",
        ],
    ),
    ("bench", &["cost", "error", "executor", "kv::policies", "policy", "schedule"]),
    ("eval", &["error"]),
    (
        "calibrate",
        &[
            "cost",
            "device",
            "error",
            "hardware",
            "kv",
            "memory",
            "model::config",
            "model::dtype",
            "model::packed::panels",
            "quant::planes",
            "rng",
        ],
    ),
    (
        "cli",
        &[
            "bench",
            "calibrate",
            "device",
            "durable",
            "engine",
            "error",
            "eval",
            "executor",
            "hardware",
            "job",
            "kv",
            "memory",
            "model",
            "planner",
            "policy",
            "rng",
            "schedule",
        ],
    ),
];

/// Modules with unsafe code.
const UNSAFE: &[&str] = &["src/device/", "src/memory/"];

/// Rules that a file breaks for now. A waiver that is no longer needed is an error.
const WAIVERS: &[(&str, Rule)] = &[
    ("scripts/make_goldens.py", Rule::Lines),
    // A chat template under test that is indented with a tab.
    ("scripts/make_goldens.py", Rule::Tab),
    // Texts that rustfmt cannot break.
    ("src/cli/generate.rs", Rule::Columns),
    ("src/job/parse/mod.rs", Rule::Columns),
    ("src/model/python.rs", Rule::Columns),
    ("src/model/tokenizer.rs", Rule::Columns),
    ("tests/generate.rs", Rule::Columns),
    ("tests/generate_shapes.rs", Rule::Columns),
    ("tests/hostile_models.rs", Rule::Columns),
    ("tests/invariance.rs", Rule::Columns),
    ("tests/job_input.rs", Rule::Columns),
    ("tests/job_support/mod.rs", Rule::Columns),
    ("tests/reference.rs", Rule::Columns),
];

const MAX_LINES: usize = 800;
const MAX_COLUMNS: usize = 120;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Rule {
    Import,
    Unsafe,
    Header,
    Invariant,
    Lines,
    Columns,
    Tab,
    TrailingSpace,
    Unfinished,
    MachinePath,
}

/// A rule broken at a place.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Finding {
    file: String,
    line: usize,
    rule: Rule,
    what: String,
}

/// A file of the tree.
struct Source {
    path: String,
    text: String,
}

impl Source {
    fn new(path: &str, text: &str) -> Self {
        Source { path: path.into(), text: text.into() }
    }

    fn is(&self, extensions: &[&str]) -> bool {
        extensions.iter().any(|extension| self.path.ends_with(extension))
    }

    fn is_code(&self) -> bool {
        let roots = ["src/", "tests/", "scripts/"];
        roots.iter().any(|root| self.path.starts_with(root)) && self.is(&[".rs", ".py", ".sh"])
    }

    fn is_program(&self) -> bool {
        self.path.starts_with("src/") && self.is(&[".rs"])
    }

    /// The top-level module; none for the crate's roots.
    fn module(&self) -> Option<&str> {
        let rest = self.path.strip_prefix("src/")?;
        let name = rest.split('/').next()?;
        let name = name.strip_suffix(".rs").unwrap_or(name);
        (name != "lib" && name != "main").then_some(name)
    }

    /// How many modules the file lies below the crate's root.
    fn depth(&self) -> usize {
        let rest = self.path.trim_start_matches("src/").trim_end_matches(".rs").trim_end_matches("/mod");
        rest.split('/').count()
    }

    fn finding(&self, line: usize, rule: Rule, what: impl Into<String>) -> Finding {
        Finding { file: self.path.clone(), line, rule, what: what.into() }
    }
}

// ---------------------------------------------------------------------------------------------------------------
// Reading Rust

/// The source with comments and the insides of literals blanked; lines stay where they are.
fn code_of(source: &str) -> Vec<char> {
    let mut text: Vec<char> = source.chars().collect();
    let mut at = 0;
    while at < text.len() {
        let rest = &text[at..];
        let end = match rest {
            ['/', '/', ..] => at + rest.iter().position(|&c| c == '\n').unwrap_or(rest.len()),
            ['/', '*', ..] => at + block_comment(rest),
            ['\'', '\\', ..] => at + 3 + rest[3..].iter().position(|&c| c == '\'').map_or(0, |end| end + 1),
            // Without a closing quote it is a lifetime.
            ['\'', _, '\'', ..] => at + 3,
            ['"', ..] => at + string(rest),
            ['r', '"' | '#', ..] if !follows_name(&text, at) => at + raw_string(rest).unwrap_or(0),
            _ => at,
        };
        if end == at {
            at += 1;
        } else {
            text[at..end].iter_mut().filter(|c| **c != '\n').for_each(|c| *c = ' ');
            at = end;
        }
    }
    text
}

fn is_name(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

/// Whether a letter is the inside of a name; the `b` of `br"` is none.
fn follows_name(text: &[char], at: usize) -> bool {
    let before = |back: usize| at.checked_sub(back).map(|at| text[at]);
    before(1).is_some_and(|c| is_name(c) && (c != 'b' || before(2).is_some_and(is_name)))
}

fn block_comment(text: &[char]) -> usize {
    let (mut depth, mut at) = (0, 0);
    while at < text.len() {
        match &text[at..] {
            ['/', '*', ..] => (depth, at) = (depth + 1, at + 2),
            ['*', '/', ..] => (depth, at) = (depth - 1, at + 2),
            _ => at += 1,
        }
        if depth == 0 {
            return at;
        }
    }
    at
}

fn string(text: &[char]) -> usize {
    let mut at = 1;
    while at < text.len() && text[at] != '"' {
        at += if text[at] == '\\' { 2 } else { 1 };
    }
    (at + 1).min(text.len())
}

fn raw_string(text: &[char]) -> Option<usize> {
    let hashes = text[1..].iter().take_while(|&&c| c == '#').count();
    if text.get(1 + hashes) != Some(&'"') {
        return None;
    }
    let close: Vec<char> = std::iter::once('"').chain(std::iter::repeat_n('#', hashes)).collect();
    let body = &text[2 + hashes..];
    let end = body.windows(close.len()).position(|window| window == close)?;
    Some(2 + hashes + end + close.len())
}

/// Blanks every item under `#[cfg(test)]`.
fn drop_tests(code: &mut [char]) {
    let mark: Vec<char> = "#[cfg(test)]".chars().collect();
    let mut from = 0;
    while let Some(start) = code[from..].windows(mark.len()).position(|window| window == mark) {
        let start = from + start;
        let mut depth = 0usize;
        let length = code[start..].iter().position(|&c| {
            match c {
                '{' => depth += 1,
                '}' => depth = depth.saturating_sub(1),
                _ => {}
            }
            depth == 0 && (c == '}' || c == ';')
        });
        let end = length.map_or(code.len(), |length| start + length + 1);
        code[start..end].iter_mut().filter(|c| **c != '\n').for_each(|c| *c = ' ');
        from = end;
    }
}

/// Names in code with their offsets.
fn names(code: &[char]) -> Vec<(usize, String)> {
    let mut names = Vec::new();
    let mut at = 0;
    while at < code.len() {
        let len = code[at..].iter().take_while(|&&c| is_name(c)).count();
        if len > 0 {
            names.push((at, code[at..at + len].iter().collect()));
        }
        at += len.max(1);
    }
    names
}

fn line_of(code: &[char], at: usize) -> usize {
    1 + code[..at].iter().filter(|&&c| c == '\n').count()
}

/// Every path of a use tree whose root ends before `at`; gives where the tree ends.
fn use_tree(code: &[char], mut at: usize, prefix: &[String], found: &mut Vec<Vec<String>>) -> usize {
    let skip = |mut at: usize| {
        while code.get(at).is_some_and(|c| c.is_whitespace()) {
            at += 1;
        }
        at
    };
    let mut path = prefix.to_vec();
    loop {
        at = skip(at);
        if code[at..].starts_with(&[':', ':']) {
            at = skip(at + 2);
        } else {
            found.push(path);
            return at;
        }
        if code.get(at) == Some(&'{') {
            at += 1;
            while !matches!(code.get(at), None | Some('}')) {
                at = skip(at);
                let len = code[at..].iter().take_while(|&&c| is_name(c)).count();
                if len == 0 {
                    at += 1;
                    continue;
                }
                let mut branch = path.clone();
                branch.push(code[at..at + len].iter().collect());
                at = use_tree(code, at + len, &branch, found);
                // What is left of the branch is a new name for it.
                at += code[at..].iter().take_while(|&&c| c != ',' && c != '}').count();
            }
            return at + 1;
        }
        let len = code[at..].iter().take_while(|&&c| is_name(c)).count();
        if len == 0 {
            found.push(path);
            return at;
        }
        path.push(code[at..at + len].iter().collect());
        at += len;
    }
}

/// The paths below `crate` that a file's own code (not its tests) names, with their lines.
fn crate_paths(text: &str) -> Vec<(usize, Vec<String>)> {
    let mut code = code_of(text);
    drop_tests(&mut code);
    let mut paths = Vec::new();
    for (at, _) in names(&code).into_iter().filter(|(_, name)| name == "crate") {
        let mut found = Vec::new();
        use_tree(&code, at + "crate".len(), &[], &mut found);
        paths.extend(found.into_iter().filter(|path| !path.is_empty()).map(|path| (line_of(&code, at), path)));
    }
    paths
}

/// The longest chains of `super::` in a file's own code, with their lines.
fn super_chains(text: &str) -> Vec<(usize, usize)> {
    let mut code = code_of(text);
    drop_tests(&mut code);
    let mut chains: Vec<(usize, usize)> = Vec::new();
    let mut last = None;
    for (at, name) in names(&code) {
        if name != "super" {
            continue;
        }
        let joined =
            last.is_some_and(|end: usize| code[end..at].iter().filter(|c| !c.is_whitespace()).eq([':', ':'].iter()));
        match chains.last_mut() {
            Some((_, length)) if joined => *length += 1,
            _ => chains.push((line_of(&code, at), 1)),
        }
        last = Some(at + "super".len());
    }
    chains
}

// ---------------------------------------------------------------------------------------------------------------
// Rules

/// Whether a path lies at or below an entry such as `model::dtype`.
fn covers(entry: &str, path: &[String]) -> bool {
    let parts: Vec<&str> = entry.split("::").collect();
    parts.len() <= path.len() && parts.iter().zip(path).all(|(part, name)| part == name)
}

fn check_imports(sources: &[Source], graph: &[(&str, &[&str])]) -> Vec<Finding> {
    let mut findings = Vec::new();
    let mut used = BTreeSet::new();
    let mut edges: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for source in sources.iter().filter(|source| source.is_program()) {
        let Some(module) = source.module() else { continue };
        let Some((_, allowed)) = graph.iter().find(|(name, _)| *name == module) else {
            findings.push(source.finding(1, Rule::Import, format!("`{module}` is not in the module graph")));
            continue;
        };
        for (line, length) in super_chains(&source.text) {
            if length >= source.depth() {
                findings.push(source.finding(line, Rule::Import, "`super::` leaves the module; write `crate::`"));
            }
        }
        for (line, path) in crate_paths(&source.text) {
            if path[0] == module {
                continue;
            }
            edges.entry(module.to_owned()).or_default().insert(path[0].clone());
            let entries: Vec<&str> = allowed.iter().copied().filter(|entry| covers(entry, &path)).collect();
            if entries.is_empty() {
                let what = format!("`{module}` may not import `{}`", path.join("::"));
                findings.push(source.finding(line, Rule::Import, what));
            }
            used.extend(entries.into_iter().map(|entry| (module.to_owned(), entry.to_owned())));
        }
    }
    for (module, allowed) in graph {
        for entry in allowed.iter().filter(|entry| !used.contains(&(module.to_string(), entry.to_string()))) {
            let what = format!("the graph lets `{module}` import `{entry}`, which it does not do");
            findings.push(Source::new("tests/tidy.rs", "").finding(1, Rule::Import, what));
        }
    }
    if let Some(cycle) = cycle(&edges) {
        findings.push(Source::new("src/lib.rs", "").finding(1, Rule::Import, format!("cycle: {}", cycle.join(" -> "))));
    }
    findings
}

/// A cycle among modules, if there is one.
fn cycle(edges: &BTreeMap<String, BTreeSet<String>>) -> Option<Vec<String>> {
    fn visit(
        node: &str,
        edges: &BTreeMap<String, BTreeSet<String>>,
        trail: &mut Vec<String>,
        done: &mut BTreeSet<String>,
    ) -> Option<Vec<String>> {
        if let Some(start) = trail.iter().position(|name| name == node) {
            return Some(trail[start..].iter().cloned().chain([node.to_owned()]).collect());
        }
        if done.contains(node) {
            return None;
        }
        trail.push(node.to_owned());
        let found = edges.get(node).into_iter().flatten().find_map(|next| visit(next, edges, trail, done));
        trail.pop();
        done.insert(node.to_owned());
        found
    }
    let mut done = BTreeSet::new();
    edges.keys().find_map(|node| visit(node, edges, &mut Vec::new(), &mut done))
}

fn check_unsafe(source: &Source) -> Vec<Finding> {
    if !source.is_program() || UNSAFE.iter().any(|place| source.path.starts_with(place)) {
        return Vec::new();
    }
    let code = code_of(&source.text);
    let found = names(&code).into_iter().filter(|(_, name)| name == "unsafe" || name == "unsafe_code");
    found
        .map(|(at, name)| {
            source.finding(line_of(&code, at), Rule::Unsafe, format!("`{name}` outside device and memory"))
        })
        .collect()
}

fn check_header(source: &Source) -> Vec<Finding> {
    let mut findings = Vec::new();
    if !source.is_program() {
        return findings;
    }
    if !source.text.starts_with("//! ") {
        findings.push(source.finding(1, Rule::Header, "does not open with `//!` and what the module does"));
    }
    let states_invariant = source.text.lines().any(|line| line.starts_with("//! **Invariant:** "));
    if source.module().is_some() && !states_invariant {
        findings.push(source.finding(1, Rule::Invariant, "has no `//! **Invariant:**` line"));
    }
    findings
}

fn check_text(source: &Source) -> Vec<Finding> {
    let mut findings = Vec::new();
    if !source.is_code() {
        return findings;
    }
    let lines = source.text.lines().count();
    if lines > MAX_LINES {
        findings.push(source.finding(lines, Rule::Lines, format!("{lines} lines, at most {MAX_LINES}")));
    }
    // Spelt so that this file does not contain them.
    let unfinished = [concat!("TO", "DO"), concat!("FIX", "ME"), concat!("to", "do!"), concat!("unimple", "mented!")];
    for (line, text) in (1..).zip(source.text.lines()) {
        let columns = text.chars().count();
        if source.is(&[".rs"]) && columns > MAX_COLUMNS {
            findings.push(source.finding(line, Rule::Columns, format!("{columns} columns, at most {MAX_COLUMNS}")));
        }
        if text.contains('\t') {
            findings.push(source.finding(line, Rule::Tab, "a tab"));
        }
        if text.ends_with(char::is_whitespace) {
            findings.push(source.finding(line, Rule::TrailingSpace, "a space at the end"));
        }
        if let Some(word) = unfinished.iter().find(|word| text.contains(**word)) {
            findings.push(source.finding(line, Rule::Unfinished, format!("`{word}`")));
        }
    }
    findings
}

/// Paths of somebody's machine, in any file.
fn check_machine_paths(path: &str, bytes: &[u8]) -> Vec<Finding> {
    let places = [concat!("/wo", "rk/"), concat!("/ro", "ot/"), concat!("/ho", "me/")];
    let found = places.iter().filter_map(|place| {
        let at = bytes.windows(place.len()).position(|window| window == place.as_bytes())?;
        let line = 1 + bytes[..at].iter().filter(|&&byte| byte == b'\n').count();
        Some(Source::new(path, "").finding(line, Rule::MachinePath, format!("names `{place}`")))
    });
    found.collect()
}

/// Findings without waiver, and waivers without finding.
fn unwaived(findings: Vec<Finding>, waivers: &[(&str, Rule)]) -> Vec<String> {
    let waived = |finding: &&Finding| waivers.contains(&(finding.file.as_str(), finding.rule));
    let open = findings.iter().filter(|finding| !waived(finding));
    let mut texts: Vec<String> = open.map(|f| format!("{}:{}: {:?}: {}", f.file, f.line, f.rule, f.what)).collect();
    for (file, rule) in waivers {
        if !findings.iter().any(|finding| finding.file == *file && finding.rule == *rule) {
            texts.push(format!("tests/tidy.rs: the waiver of {rule:?} for {file} is no longer needed"));
        }
    }
    texts
}

/// Whether a licence expression can be met with allowed licences. `/` is the old way to write `OR`.
fn licence_is_allowed(expression: &str, allowed: &[String]) -> bool {
    // `None` is an expression that cannot be read.
    fn any(tokens: &mut &[String], allowed: &[String]) -> Option<bool> {
        let mut result = all(tokens, allowed)?;
        while tokens.first().is_some_and(|token| token == "OR") {
            *tokens = &tokens[1..];
            result |= all(tokens, allowed)?;
        }
        Some(result)
    }
    fn all(tokens: &mut &[String], allowed: &[String]) -> Option<bool> {
        let mut result = one(tokens, allowed)?;
        while tokens.first().is_some_and(|token| token == "AND") {
            *tokens = &tokens[1..];
            result &= one(tokens, allowed)?;
        }
        Some(result)
    }
    fn one(tokens: &mut &[String], allowed: &[String]) -> Option<bool> {
        let (first, rest) = tokens.split_first()?;
        *tokens = rest;
        if first == "(" {
            let result = any(tokens, allowed)?;
            let (closing, rest) = tokens.split_first()?;
            *tokens = rest;
            return (closing == ")").then_some(result);
        }
        // A licence with an exception would have to be allowed as a whole.
        if let [with, exception, rest @ ..] = *tokens
            && with == "WITH"
        {
            *tokens = rest;
            return Some(allowed.contains(&format!("{first} WITH {exception}")));
        }
        Some(allowed.contains(first))
    }
    let spaced = expression.replace('/', " OR ").replace('(', " ( ").replace(')', " ) ");
    let tokens: Vec<String> = spaced.split_whitespace().map(str::to_owned).collect();
    let mut rest = &tokens[..];
    any(&mut rest, allowed) == Some(true) && rest.is_empty()
}

// ---------------------------------------------------------------------------------------------------------------
// The tree

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn output_of(program: &str, arguments: &[&str]) -> Vec<u8> {
    let result = Command::new(program).args(arguments).current_dir(root()).output();
    let result = result.unwrap_or_else(|error| panic!("{program}: {error}"));
    assert!(result.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&result.stderr));
    result.stdout
}

/// Tracked files and what they hold.
fn tracked() -> Vec<(String, Vec<u8>)> {
    let list = String::from_utf8(output_of("git", &["ls-files", "-z"])).expect("UTF-8 names");
    let paths = list.split('\0').filter(|path| !path.is_empty() && root().join(path).is_file());
    let files: Vec<_> =
        paths.map(|path| (path.to_owned(), fs::read(root().join(path)).expect("a readable file"))).collect();
    assert!(files.iter().any(|(path, _)| path == "src/lib.rs"), "git does not list this tree");
    files
}

#[test]
fn the_tree_keeps_its_rules() {
    let mut findings = Vec::new();
    let mut sources = Vec::new();
    for (path, bytes) in tracked() {
        findings.extend(check_machine_paths(&path, &bytes));
        if let Ok(text) = String::from_utf8(bytes) {
            sources.push(Source { path, text });
        }
    }
    findings.extend(check_imports(&sources, GRAPH));
    for source in &sources {
        findings.extend([check_unsafe(source), check_header(source), check_text(source)].concat());
    }
    let texts = unwaived(findings, WAIVERS);
    assert!(texts.is_empty(), "\n{}", texts.join("\n"));
}

#[test]
fn model_policies_are_configurations() {
    let entries = fs::read_dir(root().join("policies/models")).expect("policies/models");
    let mut count = 0;
    for entry in entries {
        let path = entry.expect("an entry").path();
        let value = serde_json::from_slice(&fs::read(&path).expect("a readable file"));
        let value = value.unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        PlanModel::from_json("model", &value, &path, Numerics::default()).unwrap_or_else(|error| panic!("{error}"));
        count += 1;
    }
    assert!(count > 0);
}

#[test]
fn hardware_profiles_and_policies_are_complete() {
    let read = |folder: &str| -> Vec<(String, String)> {
        let entries = fs::read_dir(root().join(folder)).expect("a folder").map(|entry| entry.expect("an entry").path());
        let files = entries.filter(|path| path.extension().is_some_and(|extension| extension == "toml"));
        files.map(|path| (path.display().to_string(), fs::read_to_string(&path).expect("a readable file"))).collect()
    };
    let (profiles, policies) = (read("policies/hardware"), read("policies"));
    for (path, text) in &profiles {
        Hardware::from_toml(text, path).unwrap_or_else(|error| panic!("{error}"));
    }
    for (path, text) in &policies {
        let policy: Policy = toml::from_str(text).unwrap_or_else(|error| panic!("{path}: {error}"));
        assert!(policy.sequences > 0 && policy.pages > 0, "{path}");
    }
    assert!(profiles.len() > 4 && policies.len() > 4);
}

#[test]
fn licences_of_dependencies_are_allowed() {
    let deny: toml::Table = fs::read_to_string(root().join("deny.toml")).expect("deny.toml").parse().expect("TOML");
    let allow = deny["licenses"]["allow"].as_array().expect("a list");
    let allowed: Vec<String> = allow.iter().map(|name| name.as_str().expect("a name").to_owned()).collect();
    let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".into());
    let version = String::from_utf8(output_of(&cargo, &["--version", "--verbose"])).expect("UTF-8");
    let host = version.lines().find_map(|line| line.strip_prefix("host: ")).expect("cargo's host");
    // Without other systems' packages nothing needs to be fetched that the build has not.
    let arguments = ["metadata", "--format-version=1", "--locked", "--offline", "--filter-platform", host];
    let metadata: serde_json::Value = serde_json::from_slice(&output_of(&cargo, &arguments)).expect("JSON");
    let packages = metadata["packages"].as_array().expect("packages");
    assert!(packages.len() > 10, "only {} packages", packages.len());
    let bad = packages.iter().filter(|package| {
        !package["license"].as_str().is_some_and(|expression| licence_is_allowed(expression, &allowed))
    });
    let bad: Vec<String> = bad.map(|package| format!("{}: {}", package["name"], package["license"])).collect();
    assert!(bad.is_empty(), "not allowed by deny.toml:\n{}", bad.join("\n"));
}

// ---------------------------------------------------------------------------------------------------------------
// The checker itself

#[cfg(test)]
mod checker {
    use super::*;

    fn whats(findings: &[Finding]) -> Vec<&str> {
        findings.iter().map(|finding| finding.what.as_str()).collect()
    }

    const SMALL: &[(&str, &[&str])] = &[("low", &[]), ("high", &["low::part"])];

    fn imports(files: &[(&str, &str)]) -> Vec<Finding> {
        let sources: Vec<Source> = files.iter().map(|(path, text)| Source::new(path, text)).collect();
        check_imports(&sources, SMALL)
    }

    #[test]
    fn allowed_imports_pass() {
        let high = "use crate::low::part::{A, deep::B};\n#[cfg(test)]\nmod tests { use crate::other::X; }\n";
        assert_eq!(imports(&[("src/low.rs", "use crate::low::own;"), ("src/high/mod.rs", high)]), []);
    }

    #[test]
    fn every_way_to_import_is_seen() {
        let ways = [
            ("use crate::low::secret;", "`high` may not import `low::secret`"),
            ("use crate::{low::{part::A, secret::*}};", "`high` may not import `low::secret`"),
            ("fn f() -> u8 { crate :: low::secret() }", "`high` may not import `low::secret`"),
            ("use crate::{\n    up as down,\n};", "`high` may not import `up`"),
            ("use super::low::part;", "`super::` leaves the module; write `crate::`"),
            ("#[cfg(test)]\nuse x::y;\nuse crate::up;", "`high` may not import `up`"),
            ("const Q: char = '\"'; use crate::up; // \"", "`high` may not import `up`"),
        ];
        for (code, expected) in ways {
            let text = format!("use crate::low::part::A;\n{code}\n");
            assert_eq!(whats(&imports(&[("src/high.rs", &text)])), [expected], "{code}");
        }
    }

    #[test]
    fn what_is_no_import_is_not_seen() {
        let text = "use crate::low::part;\n// crate::up\n/* crate::up /* */ crate::up */\n\
                    const A: &str = \"crate::up \\\" crate::up\";\nconst B: &str = r#\"crate::up\"#;\n";
        assert_eq!(imports(&[("src/high/deep.rs", text)]), []);
        assert_eq!(whats(&imports(&[("src/high/deep.rs", "use super::super::low;")])).len(), 2);
    }

    #[test]
    fn unknown_modules_idle_entries_and_cycles_are_found() {
        let idle = "the graph lets `high` import `low::part`, which it does not do";
        assert_eq!(whats(&imports(&[("src/high.rs", "")])), [idle]);
        let unknown = imports(&[("src/high.rs", "use crate::low::part;"), ("src/new.rs", "")]);
        assert_eq!(whats(&unknown), ["`new` is not in the module graph"]);
        let circular = imports(&[("src/high.rs", "use crate::low::part;"), ("src/low.rs", "use crate::high;")]);
        assert!(whats(&circular).contains(&"cycle: high -> low -> high"), "{circular:?}");
    }

    #[test]
    fn the_graph_is_in_order() {
        for (index, (module, allowed)) in GRAPH.iter().enumerate() {
            for entry in *allowed {
                let top = entry.split("::").next().unwrap();
                assert!(GRAPH[..index].iter().any(|(name, _)| *name == top), "{module} -> {entry}");
            }
        }
    }

    #[test]
    fn unsafe_is_found_outside_its_places() {
        let text = "//! unsafe\nfn f() {\n    unsafe { g() }\n}\n";
        let findings = check_unsafe(&Source::new("src/job/x.rs", text));
        assert_eq!(findings.iter().map(|finding| finding.line).collect::<Vec<_>>(), [3]);
        assert_eq!(check_unsafe(&Source::new("src/engine/x.rs", "#![allow(unsafe_code)]")).len(), 1);
        assert_eq!(check_unsafe(&Source::new("src/memory/x.rs", text)), []);
    }

    #[test]
    fn headers_are_missed() {
        let rules = |path: &str, text: &str| -> Vec<Rule> {
            check_header(&Source::new(path, text)).iter().map(|finding| finding.rule).collect()
        };
        assert_eq!(rules("src/job/x.rs", "use std::fs;"), [Rule::Header, Rule::Invariant]);
        assert_eq!(rules("src/job/x.rs", "//! Job.\n"), [Rule::Invariant]);
        assert_eq!(rules("src/job/x.rs", "//! Job.\n//!\n//! **Invariant:** it holds.\n"), []);
        assert_eq!(rules("src/main.rs", "//! Start.\n"), []);
    }

    #[test]
    fn bad_text_is_found() {
        let rules = |path: &str, text: &str| -> Vec<Rule> {
            check_text(&Source::new(path, text)).iter().map(|finding| finding.rule).collect()
        };
        assert_eq!(rules("tests/x.rs", &"x\n".repeat(MAX_LINES + 1)), [Rule::Lines]);
        assert_eq!(rules("tests/x.rs", &"x\n".repeat(MAX_LINES)), []);
        assert_eq!(rules("src/x.rs", &"é".repeat(MAX_COLUMNS + 1)), [Rule::Columns]);
        assert_eq!(rules("src/x.rs", &"é".repeat(MAX_COLUMNS)), []);
        assert_eq!(rules("scripts/x.py", "\tx\ny \n"), [Rule::Tab, Rule::TrailingSpace]);
        assert_eq!(rules("scripts/x.sh", concat!("# TO", "DO: more\n")), [Rule::Unfinished]);
        assert_eq!(rules("src/x.rs", concat!("unimple", "mented!()\n")), [Rule::Unfinished]);
        assert_eq!(rules("examples/x.jsonl", "\tx \n"), []);
    }

    #[test]
    fn machine_paths_are_found() {
        let text = concat!("first\nsee /ho", "me/somebody/file\n");
        let findings = check_machine_paths("README.md", text.as_bytes());
        assert_eq!(findings.iter().map(|finding| finding.line).collect::<Vec<_>>(), [2]);
        assert_eq!(check_machine_paths("README.md", b"at home/"), []);
    }

    #[test]
    fn waivers_cover_their_rule_alone_and_end() {
        let finding = |rule| Source::new("a.rs", "").finding(1, rule, "x");
        let both = vec![finding(Rule::Tab), finding(Rule::Lines)];
        assert_eq!(unwaived(both, &[("a.rs", Rule::Tab)]), ["a.rs:1: Lines: x"]);
        let idle = unwaived(Vec::new(), &[("a.rs", Rule::Tab)]);
        assert_eq!(idle, ["tests/tidy.rs: the waiver of Tab for a.rs is no longer needed"]);
    }

    #[test]
    fn licence_expressions() {
        let allowed = ["MIT".to_owned(), "Zlib".to_owned()];
        let good =
            ["MIT", "GPL-3.0 OR MIT", "GPL-3.0/MIT", "MIT AND Zlib", "(GPL-3.0 OR MIT) AND Zlib", "A WITH B OR MIT"];
        for expression in good {
            assert!(licence_is_allowed(expression, &allowed), "{expression}");
        }
        for expression in ["", "GPL-3.0", "MIT AND GPL-3.0", "MIT WITH B", "(MIT", "MIT GPL-3.0", "MIT OR"] {
            assert!(!licence_is_allowed(expression, &allowed), "{expression}");
        }
    }
}

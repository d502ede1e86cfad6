//! Python's ways of writing values, which chat templates rely on: `str`, `json.dumps`, `strftime`.
//!
//! **Invariant:** the same characters as CPython writes, for every value that JSON can hold.

use minijinja::value::ValueKind;
use minijinja::{Error, Output, Value as Jinja};
use serde_json::Value;

/// Writes `value` as `{{ value }}` does in Jinja2: `str(value)`, nothing for undefined.
pub(super) fn write_text(out: &mut Output<'_>, value: &Jinja) -> Result<(), Error> {
    match value.as_str() {
        Some(text) => out.write_str(text)?,
        None => out.write_str(&text(value))?,
    }
    Ok(())
}

/// `str(value)`.
pub(super) fn text(value: &Jinja) -> String {
    match value.kind() {
        ValueKind::Undefined => String::new(),
        ValueKind::String => value.as_str().unwrap_or_default().to_owned(),
        ValueKind::None | ValueKind::Bool | ValueKind::Number | ValueKind::Map | ValueKind::Seq => {
            // Objects of the engine (macros, namespaces) have no JSON form.
            serde_json::to_value(value).map_or_else(|_| value.to_string(), |json| repr(&json))
        }
        _ => value.to_string(),
    }
}

/// `repr(value)`.
fn repr(value: &Value) -> String {
    match value {
        Value::Null => "None".into(),
        Value::Bool(true) => "True".into(),
        Value::Bool(false) => "False".into(),
        Value::Number(number) => number_text(number),
        Value::String(text) => quoted(text),
        Value::Array(items) => format!("[{}]", items.iter().map(repr).collect::<Vec<_>>().join(", ")),
        Value::Object(map) => {
            let pairs = map.iter().map(|(key, value)| format!("{}: {}", quoted(key), repr(value)));
            format!("{{{}}}", pairs.collect::<Vec<_>>().join(", "))
        }
    }
}

/// A text in Python's quotes: single ones unless only they occur inside.
fn quoted(text: &str) -> String {
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    let mut result = String::from(quote);
    for character in text.chars() {
        match character {
            '\n' => result.push_str("\\n"),
            '\r' => result.push_str("\\r"),
            '\t' => result.push_str("\\t"),
            '\\' => result.push_str("\\\\"),
            other if other == quote => result.extend(['\\', quote]),
            other if other.is_control() => result.push_str(&format!("\\x{:02x}", u32::from(other))),
            other => result.push(other),
        }
    }
    result.push(quote);
    result
}

/// A number as Python writes it: floats with a point or an exponent of at least two digits.
fn number_text(number: &serde_json::Number) -> String {
    match number.as_f64() {
        Some(float) if number.is_f64() => float_text(float),
        _ => number.to_string(),
    }
}

fn float_text(float: f64) -> String {
    if float == 0.0 || (1e-4..1e16).contains(&float.abs()) {
        return format!("{float:?}");
    }
    // Rust writes 1e16 and 1.5e-7 where Python writes 1e+16 and 1.5e-07.
    let text = format!("{float:e}");
    let (digits, exponent) = text.split_once('e').unwrap_or((&text, "0"));
    let (sign, exponent) = exponent.strip_prefix('-').map_or(('+', exponent), |exponent| ('-', exponent));
    format!("{digits}e{sign}{exponent:0>2}")
}

/// The options of `json.dumps`.
pub(super) struct JsonStyle {
    pub ensure_ascii: bool,
    pub sort_keys: bool,
    pub indent: Option<String>,
    pub item_separator: String,
    pub key_separator: String,
}

impl JsonStyle {
    /// `json.dumps(value, ...)`.
    pub fn dumps(&self, value: &Value) -> String {
        let mut out = String::new();
        self.write(&mut out, value, 0);
        out
    }

    fn write(&self, out: &mut String, value: &Value, depth: usize) {
        match value {
            Value::Null => out.push_str("null"),
            Value::Bool(flag) => out.push_str(if *flag { "true" } else { "false" }),
            Value::Number(number) => out.push_str(&number_text(number)),
            Value::String(text) => self.write_string(out, text),
            Value::Array(items) if items.is_empty() => out.push_str("[]"),
            Value::Object(map) if map.is_empty() => out.push_str("{}"),
            Value::Array(items) => {
                out.push('[');
                for (i, item) in items.iter().enumerate() {
                    self.separate(out, i, depth);
                    self.write(out, item, depth + 1);
                }
                self.close(out, ']', depth);
            }
            Value::Object(map) => {
                out.push('{');
                let mut pairs: Vec<_> = map.iter().collect();
                if self.sort_keys {
                    pairs.sort_by_key(|(key, _)| *key);
                }
                for (i, (key, item)) in pairs.into_iter().enumerate() {
                    self.separate(out, i, depth);
                    self.write_string(out, key);
                    out.push_str(&self.key_separator);
                    self.write(out, item, depth + 1);
                }
                self.close(out, '}', depth);
            }
        }
    }

    fn separate(&self, out: &mut String, index: usize, depth: usize) {
        if index > 0 {
            out.push_str(&self.item_separator);
        }
        self.new_line(out, depth + 1);
    }

    fn close(&self, out: &mut String, bracket: char, depth: usize) {
        self.new_line(out, depth);
        out.push(bracket);
    }

    fn new_line(&self, out: &mut String, depth: usize) {
        if let Some(indent) = &self.indent {
            out.push('\n');
            out.extend(std::iter::repeat_n(indent.as_str(), depth));
        }
    }

    fn write_string(&self, out: &mut String, text: &str) {
        out.push('"');
        for character in text.chars() {
            match character {
                '"' => out.push_str("\\\""),
                '\\' => out.push_str("\\\\"),
                '\n' => out.push_str("\\n"),
                '\r' => out.push_str("\\r"),
                '\t' => out.push_str("\\t"),
                '\u{8}' => out.push_str("\\b"),
                '\u{c}' => out.push_str("\\f"),
                '\0'..='\u{1f}' => out.push_str(&format!("\\u{:04x}", u32::from(character))),
                '\u{7f}'.. if self.ensure_ascii && character != '\u{7f}' => {
                    let mut units = [0; 2];
                    for unit in character.encode_utf16(&mut units) {
                        out.push_str(&format!("\\u{unit:04x}"));
                    }
                }
                other => out.push(other),
            }
        }
        out.push('"');
    }
}

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const DAYS: [&str; 7] = ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];

/// `strftime` of the C locale, in UTC. Unknown directives stay as they are.
pub(super) fn strftime(format: &str, unix_secs: i64) -> String {
    let (days, second) = (unix_secs.div_euclid(86_400), unix_secs.rem_euclid(86_400));
    let (year, month, day) = civil_date(days);
    let weekday = (days + 4).rem_euclid(7);
    let day_of_year = days - days_before_year(year) + 1;
    let (hour, minute) = (second / 3600, second / 60 % 60);
    let hour12 = (hour + 11) % 12 + 1;
    let mut out = String::new();
    let mut rest = format.chars().peekable();
    while let Some(character) = rest.next() {
        if character != '%' {
            out.push(character);
            continue;
        }
        let bare = rest.next_if_eq(&'-').is_some();
        let two = |number: i64| if bare { number.to_string() } else { format!("{number:02}") };
        let Some(directive) = rest.next() else { return out + "%" };
        match directive {
            'Y' => out.push_str(&year.to_string()),
            'y' => out.push_str(&two(year.rem_euclid(100))),
            'm' => out.push_str(&two(month)),
            'd' => out.push_str(&two(day)),
            'e' => out.push_str(&format!("{day:2}")),
            'B' => out.push_str(MONTHS[month as usize - 1]),
            'b' | 'h' => out.push_str(&MONTHS[month as usize - 1][..3]),
            'A' => out.push_str(DAYS[weekday as usize]),
            'a' => out.push_str(&DAYS[weekday as usize][..3]),
            'w' => out.push_str(&weekday.to_string()),
            'j' => out.push_str(&if bare { day_of_year.to_string() } else { format!("{day_of_year:03}") }),
            'H' => out.push_str(&two(hour)),
            'I' => out.push_str(&two(hour12)),
            'M' => out.push_str(&two(minute)),
            'S' => out.push_str(&two(second % 60)),
            'p' => out.push_str(if hour < 12 { "AM" } else { "PM" }),
            'F' => out.push_str(&format!("{year}-{month:02}-{day:02}")),
            'T' | 'X' => out.push_str(&format!("{hour:02}:{minute:02}:{:02}", second % 60)),
            'D' | 'x' => out.push_str(&format!("{month:02}/{day:02}/{:02}", year.rem_euclid(100))),
            'R' => out.push_str(&format!("{hour:02}:{minute:02}")),
            'Z' => out.push_str("UTC"),
            'z' => out.push_str("+0000"),
            's' => out.push_str(&unix_secs.to_string()),
            'f' => out.push_str("000000"),
            'n' => out.push('\n'),
            't' => out.push('\t'),
            '%' => out.push('%'),
            other => out.extend(['%', other]),
        }
    }
    out
}

/// Year, month and day of a day counted from 1970-01-01 (Howard Hinnant's algorithm).
fn civil_date(days: i64) -> (i64, i64, i64) {
    let shifted = days + 719_468;
    let era = shifted.div_euclid(146_097);
    let day_of_era = shifted.rem_euclid(146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    (year_of_era + era * 400 + i64::from(month <= 2), month, day)
}

/// Days from 1970-01-01 to the first day of `year`.
fn days_before_year(year: i64) -> i64 {
    let before = year - 1;
    365 * before + before.div_euclid(4) - before.div_euclid(100) + before.div_euclid(400) - 719_162
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn values_read_as_in_python() {
        let value = json!({"a": [1, 2.0, true, null, "it's"], "b": {"c": "q\"", "d": 1e-7}, "e": 1e16, "f": 123456.5});
        assert_eq!(
            repr(&value),
            r#"{'a': [1, 2.0, True, None, "it's"], 'b': {'c': 'q"', 'd': 1e-07}, 'e': 1e+16, 'f': 123456.5}"#
        );
    }

    #[test]
    fn json_as_in_python() {
        let mut style = JsonStyle {
            ensure_ascii: false,
            sort_keys: false,
            indent: None,
            item_separator: ", ".into(),
            key_separator: ": ".into(),
        };
        let value = json!({"b": ["<é>", 1.0, "\u{1}\u{7f}😀"], "a": {}, "c": []});
        assert_eq!(style.dumps(&value), "{\"b\": [\"<é>\", 1.0, \"\\u0001\u{7f}😀\"], \"a\": {}, \"c\": []}");
        (style.ensure_ascii, style.sort_keys) = (true, true);
        (style.indent, style.item_separator) = (Some("  ".into()), ",".into());
        let expected = "{\n  \"a\": {},\n  \"b\": [\n    \"<\\u00e9>\",\n    1.0,\n    \"\\u0001\u{7f}\\ud83d\\ude00\"\n  ],\n  \"c\": []\n}";
        assert_eq!(style.dumps(&value), expected);
    }

    #[test]
    fn dates() {
        assert_eq!(strftime("%d %b %Y, %A %H:%M:%S %j %-d%%", 0), "01 Jan 1970, Thursday 00:00:00 001 1%");
        assert_eq!(strftime("%F %T %I %p %B", 951_827_696), "2000-02-29 12:34:56 12 PM February");
        assert_eq!(strftime("%Y-%m-%d %j %a", 1_735_603_200), "2024-12-31 366 Tue");
        assert_eq!(strftime("%F", -1), "1969-12-31");
    }
}

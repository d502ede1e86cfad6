//! What a token's spelling in the vocabulary means as bytes, and text that grows token by token.
//!
//! **Invariant:** what a [`Detokenizer`] has given out never changes; all of it together, with
//! [`Detokenizer::finish`], is the text that decoding all tokens at once gives.

use serde_json::Value;

use super::tokenizer::Tokenizer;
use crate::error::Result;

/// How a tokenizer's vocabulary spells bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum TextForm {
    /// Each character of a token is a byte (GPT-2's table).
    ByteLevel,
    /// `▁` is a space and `<0xNN>` a byte; up to `strip` spaces at the start of a text vanish.
    ByteFallback { space: String, strip: usize },
    /// Something else: the tokenizers crate decides.
    Other,
}

impl TextForm {
    /// Reads the decoder of a tokenizer.json.
    pub fn of_decoder(decoder: &Value) -> TextForm {
        let kind = |part: &Value| part.get("type").and_then(Value::as_str).unwrap_or("").to_owned();
        match kind(decoder).as_str() {
            "ByteLevel" => return TextForm::ByteLevel,
            "Sequence" => {}
            _ => return TextForm::Other,
        }
        let parts = decoder.get("decoders").and_then(Value::as_array).map_or(&[][..], |parts| &parts[..]);
        let kinds: Vec<String> = parts.iter().map(kind).collect();
        let kinds: Vec<&str> = kinds.iter().map(String::as_str).collect();
        match kinds[..] {
            ["ByteLevel"] => TextForm::ByteLevel,
            ["Replace", "ByteFallback", "Fuse"] | ["Replace", "ByteFallback", "Fuse", "Strip"] => {
                let number = |key: &str| parts.get(3).and_then(|strip| strip.get(key)?.as_u64()).unwrap_or(0);
                let is_space = |value: Option<&Value>| value.and_then(Value::as_str) == Some(" ");
                let strips_spaces = parts.get(3).is_none_or(|strip| is_space(strip.get("content")));
                match parts[0].pointer("/pattern/String").and_then(Value::as_str) {
                    Some(space) if is_space(parts[0].get("content")) && strips_spaces && number("stop") == 0 => {
                        TextForm::ByteFallback { space: space.to_owned(), strip: number("start") as usize }
                    }
                    _ => TextForm::Other,
                }
            }
            _ => TextForm::Other,
        }
    }

    /// The bytes that a token's spelling stands for.
    pub fn bytes(&self, token: &str) -> Vec<u8> {
        match self {
            TextForm::ByteLevel => {
                token.chars().map(byte_of).collect::<Option<_>>().unwrap_or_else(|| token.as_bytes().to_vec())
            }
            TextForm::ByteFallback { space, .. } => {
                let text = token.replace(space, " ");
                fallback_byte(&text).map_or_else(|| text.into_bytes(), |byte| vec![byte])
            }
            TextForm::Other => token.replace('▁', " ").into_bytes(),
        }
    }
}

/// The byte that GPT-2's table writes as `character`.
fn byte_of(character: char) -> Option<u8> {
    let code = u32::from(character);
    match code {
        0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF => Some(code as u8),
        // The other 68 bytes follow each other from U+0100.
        0x100..=0x120 => Some((code - 0x100) as u8),
        0x121..=0x142 => Some((code - 0x121 + 0x7F) as u8),
        0x143 => Some(0xAD),
        _ => None,
    }
}

/// How GPT-2's table writes `byte`.
pub(super) fn character_of(byte: u8) -> char {
    let code = match byte {
        0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF => u32::from(byte),
        0..=0x20 => 0x100 + u32::from(byte),
        0x7F..=0xA0 => 0x121 + u32::from(byte) - 0x7F,
        0xAD => 0x143,
    };
    char::from_u32(code).expect("below the surrogates")
}

/// The byte of `<0xNN>`, read as the ByteFallback decoder reads it.
fn fallback_byte(token: &str) -> Option<u8> {
    let inner = token.strip_prefix("<0x")?.strip_suffix('>')?;
    if inner.len() == 2 { u8::from_str_radix(inner, 16).ok() } else { None }
}

/// Text of one sequence, growing with each token.
///
/// Costs a constant number of steps per token. Text is held back while later tokens could still change it: an
/// incomplete UTF-8 character, or a run of `<0xNN>` tokens, which becomes replacement characters as a whole if it
/// turns out to be no UTF-8.
#[derive(Clone, Debug)]
pub struct Detokenizer {
    skip_special: bool,
    /// Whether the start of the text has been given out, so that no more spaces are stripped.
    started: bool,
    /// Spaces stripped from the start so far.
    stripped: usize,
    /// Bytes held back.
    pending: Vec<u8>,
    /// Tokens whose text may depend on their neighbours, for [`TextForm::Other`]: `window[..settled]` are given out.
    window: Vec<u32>,
    settled: usize,
}

/// Tokens of context beyond which [`TextForm::Other`] gives out what it has.
const MAX_WINDOW: usize = 24;

impl Detokenizer {
    /// A text of its own: equal to decoding its tokens alone.
    pub fn new(skip_special: bool) -> Self {
        let (pending, window) = (Vec::new(), Vec::new());
        Detokenizer { skip_special, started: false, stripped: 0, pending, window, settled: 0 }
    }

    /// The continuation of the text of `prompt`: a space at its start stays.
    pub fn continuing(tokenizer: &Tokenizer, prompt: &[u32], skip_special: bool) -> Self {
        let mut text = Detokenizer::new(skip_special);
        text.started = !prompt.is_empty();
        if *tokenizer.form() == TextForm::Other {
            text.window = prompt[prompt.len().saturating_sub(5)..].to_vec();
            text.settled = text.window.len();
        }
        text
    }

    /// Adds a token and gives the text that has become final.
    ///
    /// # Errors
    /// As [`Tokenizer::decode`].
    pub fn push(&mut self, tokenizer: &Tokenizer, id: u32) -> Result<String> {
        if self.skip_special && tokenizer.is_special(id) {
            return Ok(String::new());
        }
        match tokenizer.form() {
            TextForm::ByteLevel => {
                self.pending.extend(tokenizer.token_bytes(id));
                Ok(self.take_complete())
            }
            TextForm::ByteFallback { space, strip } => {
                let Some(token) = tokenizer.token(id) else { return Ok(String::new()) };
                let token = token.replace(space, " ");
                if let Some(byte) = fallback_byte(&token) {
                    self.pending.push(byte);
                    return Ok(String::new());
                }
                let text = self.take_run() + &token;
                Ok(self.strip_start(text, *strip))
            }
            TextForm::Other => {
                self.window.push(id);
                self.take_window(tokenizer, false)
            }
        }
    }

    /// Gives what was held back.
    ///
    /// # Errors
    /// As [`Tokenizer::decode`].
    pub fn finish(&mut self, tokenizer: &Tokenizer) -> Result<String> {
        match tokenizer.form() {
            TextForm::ByteLevel => Ok(String::from_utf8_lossy(&std::mem::take(&mut self.pending)).into_owned()),
            TextForm::ByteFallback { strip, .. } => {
                let text = self.take_run();
                Ok(self.strip_start(text, *strip))
            }
            TextForm::Other => self.take_window(tokenizer, true),
        }
    }

    /// Everything pending except a UTF-8 character that the next bytes may complete.
    fn take_complete(&mut self) -> String {
        let mut text = String::new();
        let mut rest = &self.pending[..];
        loop {
            match std::str::from_utf8(rest) {
                Ok(valid) => {
                    text.push_str(valid);
                    rest = &[];
                    break;
                }
                Err(error) => {
                    let (valid, after) = rest.split_at(error.valid_up_to());
                    text.push_str(&String::from_utf8_lossy(valid));
                    let Some(invalid) = error.error_len() else {
                        rest = after;
                        break;
                    };
                    text.push('\u{FFFD}');
                    rest = &after[invalid..];
                }
            }
        }
        self.pending = rest.to_vec();
        text
    }

    /// The finished run of byte tokens: its text, or a replacement character per byte.
    fn take_run(&mut self) -> String {
        let bytes = std::mem::take(&mut self.pending);
        let len = bytes.len();
        String::from_utf8(bytes).unwrap_or_else(|_| "\u{FFFD}".repeat(len))
    }

    fn strip_start(&mut self, text: String, strip: usize) -> String {
        if self.started || text.is_empty() {
            return text;
        }
        let spaces = text.bytes().take(strip - self.stripped).take_while(|&byte| byte == b' ').count();
        self.stripped += spaces;
        self.started = self.stripped == strip || spaces < text.len();
        text[spaces..].to_owned()
    }

    /// The prefix-offset method: the text that the newest tokens add to the text of the tokens before them.
    fn take_window(&mut self, tokenizer: &Tokenizer, last: bool) -> Result<String> {
        let before = tokenizer.decode(&self.window[..self.settled], self.skip_special)?;
        let all = tokenizer.decode(&self.window, self.skip_special)?;
        let unfinished = all.len() <= before.len() || all.ends_with('\u{FFFD}');
        if unfinished && !last && self.window.len() < MAX_WINDOW {
            return Ok(String::new());
        }
        let fresh = all.strip_prefix(before.as_str()).unwrap_or("").to_owned();
        self.window.drain(..self.settled);
        self.settled = self.window.len();
        Ok(fresh)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_byte_table_is_a_bijection() {
        let mut characters: Vec<char> = (0..=255).map(character_of).collect();
        assert!((0..=255).all(|byte| byte_of(character_of(byte)) == Some(byte)));
        characters.sort();
        characters.dedup();
        assert_eq!(characters.len(), 256);
        assert_eq!((character_of(b' '), character_of(b'\n'), byte_of('字')), ('Ġ', 'Ċ', None));
    }

    #[test]
    fn incomplete_characters_wait() {
        let mut text = Detokenizer::new(false);
        text.pending = "aé".as_bytes()[..2].to_vec();
        assert_eq!(text.take_complete(), "a");
        text.pending.push(0xA9);
        assert_eq!(text.take_complete(), "é");
        text.pending = vec![0xFF, b'x', 0xE5];
        assert_eq!((text.take_complete().as_str(), text.pending.len()), ("\u{FFFD}x", 1));
    }
}

//! Results to the output: in input order through the journal, or as they come to standard output.
//!
//! **Invariant:** after a failed write nothing more is written.

use std::fs::File;
use std::io::Write;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use super::files::Files;
use super::ids::InFlight;
use super::options::Summary;
use super::render::Names;
use super::request::{Answer, ItemHeader, LineError, SampledToken};
use crate::error::{Error, Result};

/// Longest output line: records of the journal count their bytes in 32 bits.
const MAX_LINE_BYTES: usize = u32::MAX as usize - 64;

/// Takes tokens and finished lines in any order.
pub struct Writer {
    names: Names,
    sink: Sink,
    /// A write failed: what is in memory may be ahead of the files, so nothing more is written.
    broken: bool,
}

enum Sink {
    Stream(Stream),
    Files(Box<Files>),
}

impl Writer {
    pub(crate) fn to_files(names: Names, files: Files) -> Self {
        Writer { names, sink: Sink::Files(Box::new(files)), broken: false }
    }

    pub(crate) fn to_stream(names: Names, output: Box<dyn Write + Send>, errors: Option<(PathBuf, File)>) -> Self {
        let stream = Stream { output, errors, client: None, summary: Summary::default() };
        Writer { names, sink: Sink::Stream(stream), broken: false }
    }

    /// Answers the lines in flight; `hung_up` becomes true when nobody takes answers any more.
    pub(crate) fn to_client(
        names: Names,
        output: Box<dyn Write + Send>,
        lines: InFlight,
        hung_up: Arc<AtomicBool>,
    ) -> Self {
        let stream = Stream { output, errors: None, client: Some((lines, hung_up)), summary: Summary::default() };
        Writer { names, sink: Sink::Stream(stream), broken: false }
    }

    /// Keeps tokens of a sample that is not finished; `start` is the position of the first among those generated.
    pub fn tokens(&mut self, index: u64, prompt: u32, sample: u32, start: u32, tokens: &[SampledToken]) -> Result<()> {
        self.write(|_, sink| match sink {
            Sink::Stream(_) => Ok(()),
            Sink::Files(files) => files.tokens(index, prompt, sample, start, tokens),
        })
    }

    /// Takes what came of a line. Each line is finished once.
    ///
    /// # Panics
    /// If the line was finished before.
    pub fn finish(&mut self, header: &ItemHeader, outcome: Result<&Answer, &LineError>) -> Result<()> {
        self.write(|names, sink| {
            let (mut line, mut failed) = (names.line(header, outcome), outcome.is_err());
            if line.len() > MAX_LINE_BYTES {
                let error = LineError::new("answer_too_long", format!("the answer has {} bytes", line.len()));
                (line, failed) = (names.line(header, Err(&error)), true);
            }
            match sink {
                Sink::Stream(stream) => stream.finish(header, &line, failed),
                Sink::Files(files) => files.finish(header.index, &line, failed),
            }
        })
    }

    /// To be called often, as after each pass: hands what is finished to the system and once a second to the disk.
    pub fn tick(&mut self, now: Instant) -> Result<()> {
        self.write(|_, sink| match sink {
            Sink::Stream(_) => Ok(()),
            Sink::Files(files) => files.tick(now),
        })
    }

    /// Whether a write has failed: all that is left to do is [`Writer::close`].
    pub fn is_broken(&self) -> bool {
        self.broken
    }

    #[cfg(test)]
    pub(crate) fn files(&mut self) -> &mut Files {
        match &mut self.sink {
            Sink::Files(files) => files,
            Sink::Stream(_) => panic!("the test has an output file"),
        }
    }

    /// Does something that may fail to write, and nothing ever again once it has failed.
    fn write(&mut self, work: impl FnOnce(&Names, &mut Sink) -> Result<()>) -> Result<()> {
        assert!(!self.broken, "a writer is not used after it failed");
        let result = work(&self.names, &mut self.sink);
        self.broken = result.is_err();
        result
    }

    /// Ends the job if it is `complete`, else leaves it for the same command to go on with. May be called after an
    /// error, but not as `complete`.
    ///
    /// # Panics
    /// If `complete` is claimed with lines missing.
    pub fn close(self, complete: bool) -> Result<Summary> {
        assert!(!(complete && self.broken), "a job whose output failed is not complete");
        match self.sink {
            Sink::Stream(stream) => Ok(stream.summary),
            Sink::Files(files) if self.broken => files.leave(),
            Sink::Files(files) => files.close(complete),
        }
    }
}

/// Standard output: lines as they come.
struct Stream {
    output: Box<dyn Write + Send>,
    errors: Option<(PathBuf, File)>,
    /// Of a worker: the lines in flight, and whether nobody takes answers any more.
    client: Option<(InFlight, Arc<AtomicBool>)>,
    summary: Summary,
}

impl Stream {
    fn finish(&mut self, header: &ItemHeader, line: &[u8], failed: bool) -> Result<()> {
        // Whoever has the answer may use its name again.
        if let Some((lines, _)) = &self.client {
            lines.release(&header.custom_id);
        }
        match &mut self.errors {
            Some((path, errors)) if failed => errors.write_all(line).map_err(Error::io("write", path))?,
            _ => {
                let written = self.output.write_all(line).and_then(|()| self.output.flush());
                if let (Err(_), Some((_, hung_up))) = (&written, &self.client) {
                    hung_up.store(true, Ordering::Relaxed);
                }
                written.map_err(Error::io("write", "standard output"))?;
            }
        }
        self.summary.succeeded += u64::from(!failed);
        self.summary.failed += u64::from(failed);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;
    use crate::job::Fingerprint;
    use crate::job::request::{Choice, Endpoint, FinishReason, PromptAnswer};

    fn header(index: u64) -> ItemHeader {
        ItemHeader {
            index,
            line: index + 1,
            custom_id: format!("line-{}", index + 1).into(),
            endpoint: Endpoint::Plain,
            metadata: None,
            model: None,
            return_token_ids: false,
            return_prompt_logprobs: false,
        }
    }

    #[test]
    fn a_stream_gets_lines_at_once_and_a_closed_one_is_an_error() {
        #[derive(Clone, Default)]
        struct Pipe(Arc<Mutex<(Vec<u8>, bool)>>);
        impl Write for Pipe {
            fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
                let mut pipe = self.0.lock().unwrap();
                if pipe.1 {
                    return Err(std::io::ErrorKind::BrokenPipe.into());
                }
                pipe.0.extend_from_slice(bytes);
                Ok(bytes.len())
            }
            fn flush(&mut self) -> std::io::Result<()> {
                Ok(())
            }
        }
        let pipe = Pipe::default();
        let names = Names::new(&Fingerprint::new(), "m");
        let mut writer = Writer::to_stream(names.clone(), Box::new(pipe.clone()), None);
        let empty = Answer {
            prompts: vec![PromptAnswer {
                prompt_token_ids: vec![1],
                prompt_text: None,
                cut_tokens: 0,
                prompt_logprobs: None,
                choices: vec![Choice {
                    text: String::new(),
                    token_ids: Vec::new(),
                    finish_reason: FinishReason::Stop,
                    stop_reason: None,
                    logprobs: None,
                }],
            }],
        };
        for (index, outcome) in [(5, Ok(&empty)), (2, Err(&LineError::new("test", "failed")))] {
            writer.finish(&header(index), outcome).unwrap();
            assert!(pipe.0.lock().unwrap().0.ends_with(&names.line(&header(index), outcome)));
        }
        pipe.0.lock().unwrap().1 = true;
        let error = writer.finish(&header(1), Ok(&empty)).unwrap_err();
        assert!(error.to_string().starts_with("write standard output: "), "{error}");
        assert_eq!(writer.close(false).unwrap(), Summary { succeeded: 1, failed: 1, resumed: 0 });
    }
}

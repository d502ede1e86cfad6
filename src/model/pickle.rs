//! A pickle machine that builds tensor descriptions and runs nothing.
//!
//! Only what `torch.save` of a state dict needs is understood: dictionaries, tuples, lists, texts, numbers, storages
//! by persistent id, and three callables. Anything else is refused by name.
//!
//! **Invariant:** work and memory are bounded by the length of the stream and a limit on operations; values live in
//! flat tables, so that nesting or cycles cost no stack.

use std::collections::HashMap;

/// What is wrong with a stream.
pub type Problem = String;

/// A tensor as the pickle describes it; nothing is checked against the storage yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PickledTensor<'a> {
    /// The storage's class, such as `HalfStorage`.
    pub storage_type: &'a str,
    /// The storage's name: `data/<key>` in the archive.
    pub storage_key: &'a str,
    /// Elements of the storage.
    pub storage_len: u64,
    /// First element.
    pub offset: u64,
    /// Dimensions.
    pub shape: Vec<u64>,
    /// Elements from one index to the next, per dimension.
    pub strides: Vec<u64>,
}

/// The tensors of the pickled dictionary, in order.
///
/// # Errors
/// The stream is malformed, too long, asks for anything but tensors, or is no dictionary.
pub fn state_dict(stream: &[u8]) -> Result<Vec<(&str, PickledTensor<'_>)>, Problem> {
    let mut machine = Machine { stream, at: 0, ..Machine::default() };
    let Value::Dict(result) = machine.run()? else { return Err("the pickle is not a dictionary of tensors".into()) };
    let pairs = &machine.dicts[result];
    let tensors = pairs.iter().filter_map(|&(key, value)| match (key, value) {
        (Value::Text(name), Value::Tensor(id)) => Some((name, machine.tensors[id].clone())),
        _ => None,
    });
    Ok(tensors.collect())
}

const MAX_OPERATIONS: usize = 8_000_000;
const MAX_DIMENSIONS: usize = 16;

/// A value: small, with containers by index into the machine's tables.
#[derive(Clone, Copy, Debug)]
enum Value<'a> {
    Nothing,
    Flag,
    Int(i64),
    Float,
    Text(&'a str),
    Tuple(usize),
    List(usize),
    Dict(usize),
    Callable(Callable),
    StorageType(&'a str),
    Storage(usize),
    Tensor(usize),
}

#[derive(Clone, Copy, Debug)]
enum Callable {
    OrderedDict,
    RebuildTensor,
    RebuildParameter,
}

struct Storage<'a> {
    kind: &'a str,
    key: &'a str,
    len: u64,
}

#[derive(Default)]
struct Machine<'a> {
    stream: &'a [u8],
    at: usize,
    stack: Vec<Value<'a>>,
    marks: Vec<usize>,
    memo: HashMap<u32, Value<'a>>,
    tuples: Vec<Vec<Value<'a>>>,
    lists: Vec<Vec<Value<'a>>>,
    dicts: Vec<Vec<(Value<'a>, Value<'a>)>>,
    storages: Vec<Storage<'a>>,
    tensors: Vec<PickledTensor<'a>>,
}

impl<'a> Machine<'a> {
    fn run(&mut self) -> Result<Value<'a>, Problem> {
        for _ in 0..MAX_OPERATIONS {
            let operation = self.byte()?;
            if operation == b'.' {
                return self.pop();
            }
            self.step(operation)?;
        }
        Err(format!("the pickle has more than {MAX_OPERATIONS} operations"))
    }

    fn step(&mut self, operation: u8) -> Result<(), Problem> {
        match operation {
            0x80 => match self.byte()? {
                2..=5 => Ok(()),
                other => Err(format!("pickle protocol {other} is not supported")),
            },
            0x95 => self.take(8).map(drop),
            b'(' => {
                self.marks.push(self.stack.len());
                Ok(())
            }
            b'0' => self.pop().map(drop),
            b'N' => self.push(Value::Nothing),
            0x88 | 0x89 => self.push(Value::Flag),
            b'K' | b'M' | b'J' | 0x8a => self.integer(operation),
            b'G' => self.take(8).and_then(|_| self.push(Value::Float)),
            b'X' | 0x8c | 0x8d => self.text(operation),
            b'c' | 0x93 => self.global(operation),
            b'q' | b'r' | 0x94 | b'h' | b'j' => self.memory(operation),
            b'}' | b']' | b')' | b't' | 0x85..=0x87 => self.container(operation),
            b'a' | b'e' | b's' | b'u' => self.fill(operation),
            b'Q' => self.persistent(),
            b'R' => self.reduce(),
            // The state of an object (the `_metadata` of a state dict) says nothing about tensors.
            b'b' => self.pop().map(drop),
            other => Err(format!("pickle operation {other:#04x} is not supported")),
        }
    }

    fn integer(&mut self, operation: u8) -> Result<(), Problem> {
        let value = match operation {
            b'K' => i64::from(self.byte()?),
            b'M' => i64::from(u16::from_le_bytes(self.array()?)),
            b'J' => i64::from(i32::from_le_bytes(self.array()?)),
            _ => {
                let len = usize::from(self.byte()?);
                let bytes = self.take(len)?;
                if len > 8 {
                    return Err("a pickled number exceeds 64 bits".into());
                }
                let fill = if bytes.last().is_some_and(|&last| last >= 0x80) { 0xFF } else { 0 };
                i64::from_le_bytes(std::array::from_fn(|i| bytes.get(i).copied().unwrap_or(fill)))
            }
        };
        self.push(Value::Int(value))
    }

    fn text(&mut self, operation: u8) -> Result<(), Problem> {
        let len = match operation {
            b'X' => u64::from(u32::from_le_bytes(self.array()?)),
            0x8c => u64::from(self.byte()?),
            _ => u64::from_le_bytes(self.array()?),
        };
        let bytes = self.take(usize::try_from(len).map_err(|_| cut_short())?)?;
        let text = std::str::from_utf8(bytes).map_err(|_| "a pickled text is not UTF-8")?;
        self.push(Value::Text(text))
    }

    fn global(&mut self, operation: u8) -> Result<(), Problem> {
        let (module, name) = if operation == b'c' {
            (self.line()?, self.line()?)
        } else {
            let (name, module) = (self.pop()?, self.pop()?);
            match (module, name) {
                (Value::Text(module), Value::Text(name)) => (module, name),
                _ => return Err("the pickle names a global by something else than texts".into()),
            }
        };
        let value = match (module, name) {
            ("collections", "OrderedDict") => Value::Callable(Callable::OrderedDict),
            ("torch._utils", "_rebuild_tensor_v2") => Value::Callable(Callable::RebuildTensor),
            ("torch._utils", "_rebuild_parameter") => Value::Callable(Callable::RebuildParameter),
            ("torch", kind) if element_size(kind).is_some() => Value::StorageType(kind),
            _ => return Err(format!("the pickle asks for `{module}.{name}`, which is not allowed")),
        };
        self.push(value)
    }

    fn memory(&mut self, operation: u8) -> Result<(), Problem> {
        let key = match operation {
            b'q' | b'h' => u32::from(self.byte()?),
            b'r' | b'j' => u32::from_le_bytes(self.array()?),
            _ => self.memo.len() as u32,
        };
        if matches!(operation, b'h' | b'j') {
            let value = *self.memo.get(&key).ok_or("the pickle reads a memo that was never written")?;
            return self.push(value);
        }
        let value = *self.stack.last().ok_or_else(underflow)?;
        self.memo.insert(key, value);
        Ok(())
    }

    fn container(&mut self, operation: u8) -> Result<(), Problem> {
        let items = match operation {
            b't' => self.pop_to_mark()?,
            0x85..=0x87 => {
                let count = usize::from(operation - 0x84);
                let start = self.above_mark(count)?;
                self.stack.split_off(start)
            }
            _ => Vec::new(),
        };
        let value = match operation {
            b'}' => Value::Dict(add(&mut self.dicts, Vec::new())),
            b']' => Value::List(add(&mut self.lists, items)),
            _ => Value::Tuple(add(&mut self.tuples, items)),
        };
        self.push(value)
    }

    /// Adds items to the list or dictionary below them.
    fn fill(&mut self, operation: u8) -> Result<(), Problem> {
        let items = match operation {
            b'a' | b's' => {
                let start = self.above_mark(if operation == b'a' { 1 } else { 2 })?;
                self.stack.split_off(start)
            }
            _ => self.pop_to_mark()?,
        };
        match (operation, self.stack.last()) {
            (b'a' | b'e', Some(&Value::List(id))) => self.lists[id].extend(items),
            (b's' | b'u', Some(&Value::Dict(id))) if items.len() % 2 == 0 => {
                self.dicts[id].extend(items.chunks_exact(2).map(|pair| (pair[0], pair[1])));
            }
            _ => return Err("the pickle adds items to something else than a list or dictionary".into()),
        }
        Ok(())
    }

    /// `('storage', type, key, location, elements)`.
    fn persistent(&mut self) -> Result<(), Problem> {
        let wrong = "the pickle refers to something else than a storage";
        let Value::Tuple(id) = self.pop()? else { return Err(wrong.into()) };
        match self.tuples[id][..] {
            [Value::Text("storage"), Value::StorageType(kind), Value::Text(key), Value::Text(_), Value::Int(len)] => {
                let len = u64::try_from(len).map_err(|_| wrong)?;
                let id = add(&mut self.storages, Storage { kind, key, len });
                self.push(Value::Storage(id))
            }
            _ => Err(wrong.into()),
        }
    }

    fn reduce(&mut self) -> Result<(), Problem> {
        let (arguments, callable) = (self.pop()?, self.pop()?);
        let (Value::Tuple(arguments), Value::Callable(callable)) = (arguments, callable) else {
            return Err("the pickle calls something that cannot be called".into());
        };
        let value = match (callable, &self.tuples[arguments][..]) {
            (Callable::OrderedDict, []) => Value::Dict(add(&mut self.dicts, Vec::new())),
            (Callable::RebuildParameter, [tensor @ Value::Tensor(_), ..]) => *tensor,
            (Callable::RebuildTensor, &[Value::Storage(storage), Value::Int(offset), shape, strides, ..]) => {
                let tensor = self.tensor(storage, offset, shape, strides)?;
                Value::Tensor(add(&mut self.tensors, tensor))
            }
            (callable, _) => return Err(format!("the pickle calls {callable:?} with unexpected arguments")),
        };
        self.push(value)
    }

    fn tensor(
        &self,
        storage: usize,
        offset: i64,
        shape: Value<'a>,
        strides: Value<'a>,
    ) -> Result<PickledTensor<'a>, Problem> {
        let wrong = || "the pickle describes a tensor with unusable dimensions".to_owned();
        let sizes = |value| {
            let Value::Tuple(id) = value else { return Err(wrong()) };
            let size = |value: &Value<'_>| match value {
                Value::Int(size) => u64::try_from(*size).map_err(|_| wrong()),
                _ => Err(wrong()),
            };
            self.tuples[id].iter().map(size).collect::<Result<Vec<u64>, Problem>>()
        };
        let (shape, strides) = (sizes(shape)?, sizes(strides)?);
        if shape.len() != strides.len() || shape.len() > MAX_DIMENSIONS {
            return Err(wrong());
        }
        let Storage { kind, key, len } = self.storages[storage];
        let offset = u64::try_from(offset).map_err(|_| wrong())?;
        Ok(PickledTensor { storage_type: kind, storage_key: key, storage_len: len, offset, shape, strides })
    }

    fn push(&mut self, value: Value<'a>) -> Result<(), Problem> {
        self.stack.push(value);
        Ok(())
    }

    fn pop(&mut self) -> Result<Value<'a>, Problem> {
        self.above_mark(1)?;
        self.stack.pop().ok_or_else(underflow)
    }

    /// Where the top `count` values begin; they must lie above the last mark.
    fn above_mark(&self, count: usize) -> Result<usize, Problem> {
        let floor = self.marks.last().copied().unwrap_or(0);
        self.stack.len().checked_sub(count).filter(|&start| start >= floor).ok_or_else(underflow)
    }

    fn pop_to_mark(&mut self) -> Result<Vec<Value<'a>>, Problem> {
        let mark = self.marks.pop().ok_or_else(underflow)?;
        Ok(self.stack.split_off(mark))
    }

    fn take(&mut self, len: usize) -> Result<&'a [u8], Problem> {
        let end = self.at.checked_add(len).ok_or_else(cut_short)?;
        let bytes = self.stream.get(self.at..end).ok_or_else(cut_short)?;
        self.at = end;
        Ok(bytes)
    }

    fn byte(&mut self) -> Result<u8, Problem> {
        self.take(1).map(|bytes| bytes[0])
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Problem> {
        let bytes = self.take(N)?;
        Ok(std::array::from_fn(|i| bytes[i]))
    }

    fn line(&mut self) -> Result<&'a str, Problem> {
        let rest = &self.stream[self.at..];
        let len = rest.iter().take(1000).position(|&byte| byte == b'\n').ok_or_else(cut_short)?;
        let line = self.take(len + 1)?;
        std::str::from_utf8(&line[..len]).map_err(|_| "a pickled name is not UTF-8".to_owned())
    }
}

/// Bytes per element of a storage class of torch.
pub fn element_size(storage_type: &str) -> Option<u64> {
    Some(match storage_type {
        "ByteStorage" | "CharStorage" | "BoolStorage" => 1,
        "HalfStorage" | "BFloat16Storage" | "ShortStorage" => 2,
        "FloatStorage" | "IntStorage" => 4,
        "DoubleStorage" | "LongStorage" => 8,
        _ => return None,
    })
}

fn add<T>(table: &mut Vec<T>, item: T) -> usize {
    table.push(item);
    table.len() - 1
}

fn underflow() -> Problem {
    "the pickle takes a value that is not there".into()
}

fn cut_short() -> Problem {
    "the pickle is cut short".into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nesting_and_cycles_cost_no_stack() {
        // A million lists, each inside the one before, and the innermost holding the outermost.
        let mut stream = b"\x80\x02}(X\x01\0\0\0a]q\x00".to_vec();
        stream.extend(b"]".repeat(1_000_000));
        stream.extend(b"h\x00a");
        stream.extend(b"a".repeat(1_000_000));
        stream.extend(b"u.");
        assert_eq!(state_dict(&stream), Ok(Vec::new()));
        let tuples = [&b"\x80\x02)"[..], &b"\x85".repeat(1_000_000), b"."].concat();
        assert!(state_dict(&tuples).unwrap_err().contains("not a dictionary"));
    }

    #[test]
    fn work_is_bounded() {
        let stream = b"]0".repeat(MAX_OPERATIONS);
        assert!(state_dict(&stream).unwrap_err().contains("operations"));
    }

    #[test]
    fn broken_streams_are_errors() {
        let broken: [&[u8]; 14] = [
            b"",
            b".",
            b"\x80\x09}.",
            b"(.",
            b"}(K\x01u.",
            b"}(a.",
            b"h\x07.",
            b"q\x00.",
            b"X\xff\xff\xff\xffabc.",
            b"\x8d\xff\xff\xff\xff\xff\xff\xff\xffabc.",
            b"\x8a\xff.",
            b"K\x01Q.",
            b")K\x01R.",
            b"ccollections\nOrderedDict\nK\x01\x85R.",
        ];
        for stream in broken {
            assert!(state_dict(stream).is_err(), "{stream:?}");
        }
    }
}

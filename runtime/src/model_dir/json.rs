//! Reading small JSON files that nobody has vouched for: bounded size, typed fields, and errors that name the
//! file and the field. Knows nothing of what the fields mean.

use super::ModelError;
use rustc_hash::FxHashSet;
use serde_json::{Map, Value};
use std::{
    cell::RefCell,
    fs::File,
    io::Read,
    path::{Path, PathBuf},
};

/// No configuration, index or template comes near this; it keeps a hostile file from filling the memory.
pub(super) const MAX_TEXT_BYTES: u64 = 64 << 20;

/// Opens a regular file; `None` when there is none. A pipe or a device would block or never end.
pub(crate) fn open_regular(path: &Path) -> Result<Option<(File, u64)>, ModelError> {
    let io = |source| ModelError::Io { path: path.to_owned(), source };
    let metadata = match path.metadata() {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(io(error)),
    };
    if !metadata.is_file() {
        return Err(invalid(path, "it is not a regular file".to_owned()));
    }
    let file = File::open(path).map_err(io)?;
    Ok(Some((file, metadata.len())))
}

/// Reads a whole file of at most `limit` bytes; `None` when there is none.
pub(crate) fn read_bounded(path: &Path, limit: u64) -> Result<Option<Vec<u8>>, ModelError> {
    let Some((file, length)) = open_regular(path)? else { return Ok(None) };
    if length > limit {
        return Err(invalid(path, format!("it has {length} bytes, more than the {limit} that are accepted")));
    }
    let mut bytes = Vec::new();
    file.take(limit)
        .read_to_end(&mut bytes)
        .map_err(|source| ModelError::Io { path: path.to_owned(), source })?;
    if bytes.is_empty() {
        return Err(invalid(path, "it is empty".to_owned()));
    }
    Ok(Some(bytes))
}

/// Reads a whole text file; `None` when there is none.
pub(crate) fn read_text(path: &Path) -> Result<Option<String>, ModelError> {
    let Some(bytes) = read_bounded(path, MAX_TEXT_BYTES)? else { return Ok(None) };
    match String::from_utf8(bytes) {
        Ok(text) => Ok(Some(text)),
        Err(error) => {
            let at = error.utf8_error().valid_up_to();
            Err(invalid(path, format!("it is not UTF-8 text (byte {at})")))
        }
    }
}

/// Reads a JSON object; `None` when there is no such file.
pub(crate) fn read_object(path: &Path) -> Result<Option<Object>, ModelError> {
    let Some(text) = read_text(path)? else { return Ok(None) };
    let value: Value = serde_json::from_str(&text)
        .map_err(|error| invalid(path, format!("it is not valid JSON: {error}")))?;
    match value {
        Value::Object(fields) => Ok(Some(Object::new(path, String::new(), fields))),
        other => Err(invalid(path, format!("it must hold a JSON object, not {}", kind(&other)))),
    }
}

/// The file is not what it should be.
pub(crate) fn invalid(path: &Path, problem: String) -> ModelError {
    ModelError::Invalid { path: path.to_owned(), problem }
}

/// A JSON object and where it came from. A field that is `null` counts as absent.
#[derive(Clone, Debug)]
pub(crate) struct Object {
    pub(crate) path: PathBuf,
    /// What stands before a field's name in messages: `rope_scaling.` inside of that object.
    prefix: String,
    fields: Map<String, Value>,
    /// Names that somebody has asked for.
    asked: RefCell<FxHashSet<String>>,
}

impl Object {
    fn new(path: &Path, prefix: String, fields: Map<String, Value>) -> Self {
        Self { path: path.to_owned(), prefix, fields, asked: RefCell::default() }
    }

    fn ask(&self, name: &str) {
        if let Ok(mut asked) = self.asked.try_borrow_mut()
            && !asked.contains(name)
        {
            asked.insert(name.to_owned());
        }
    }

    /// Names of the fields that are not null and that nobody has asked for.
    pub(crate) fn unasked(&self) -> impl Iterator<Item = &str> {
        self.names().filter(|name| self.asked.try_borrow().is_ok_and(|asked| !asked.contains(*name)))
    }

    /// The value of a field, if it is there and not null.
    pub(crate) fn get(&self, name: &str) -> Option<&Value> {
        self.ask(name);
        self.fields.get(name).filter(|value| !value.is_null())
    }

    /// Whether the field is there, be it null.
    pub(crate) fn has(&self, name: &str) -> bool {
        self.ask(name);
        self.fields.contains_key(name)
    }

    /// Names of the fields that are not null.
    pub(crate) fn names(&self) -> impl Iterator<Item = &str> {
        self.fields.iter().filter(|(_, value)| !value.is_null()).map(|(name, _)| name.as_str())
    }

    /// `'rope_scaling.factor'`
    pub(crate) fn field(&self, name: &str) -> String {
        format!("'{}{name}'", self.prefix)
    }

    /// The field is not what it should be: `field` says which, `rule` what it must be.
    pub(crate) fn invalid(&self, name: &str, rule: &str) -> ModelError {
        let found = self
            .fields
            .get(name)
            .map_or_else(|| "it is missing".to_owned(), |v| format!("found {}", show(v)));
        invalid(&self.path, format!("{} must be {rule}; {found}", self.field(name)))
    }

    /// What the field asks for is not supported.
    pub(crate) fn unsupported(&self, name: &str, hint: &str) -> ModelError {
        let scalar = self.fields.get(name).filter(|value| !value.is_array() && !value.is_object());
        let value = scalar.map(|value| format!(" = {}", show(value))).unwrap_or_default();
        ModelError::Unsupported {
            path: self.path.clone(),
            feature: format!("{}{value}", self.field(name)),
            hint: hint.to_owned(),
        }
    }

    /// A whole number from `least` to `most`.
    pub(crate) fn integer(&self, name: &str, least: u64, most: u64) -> Result<Option<u64>, ModelError> {
        let Some(value) = self.get(name) else { return Ok(None) };
        match value.as_u64() {
            Some(number) if (least..=most).contains(&number) => Ok(Some(number)),
            _ => Err(self.invalid(name, &format!("a whole number from {least} to {most}"))),
        }
    }

    /// A size from 1 to `most`.
    pub(crate) fn size(&self, name: &str, most: usize) -> Result<Option<usize>, ModelError> {
        Ok(self.integer(name, 1, most as u64)?.map(|number| number as usize))
    }

    /// A size that has to be there.
    pub(crate) fn required_size(&self, name: &str, most: usize) -> Result<usize, ModelError> {
        self.size(name, most)?.ok_or_else(|| self.invalid(name, &format!("a whole number from 1 to {most}")))
    }

    /// A finite number for which `accept` holds; `rule` says in words what that is.
    pub(crate) fn number(
        &self,
        name: &str,
        rule: &str,
        accept: impl Fn(f64) -> bool,
    ) -> Result<Option<f64>, ModelError> {
        let Some(value) = self.get(name) else { return Ok(None) };
        match value.as_f64() {
            Some(number) if number.is_finite() && accept(number) => Ok(Some(number)),
            _ => Err(self.invalid(name, rule)),
        }
    }

    /// `true` or `false`.
    pub(crate) fn boolean(&self, name: &str) -> Result<Option<bool>, ModelError> {
        self.get(name)
            .map(|value| value.as_bool().ok_or_else(|| self.invalid(name, "true or false")))
            .transpose()
    }

    /// A string.
    pub(crate) fn string(&self, name: &str) -> Result<Option<&str>, ModelError> {
        self.get(name).map(|value| value.as_str().ok_or_else(|| self.invalid(name, "a string"))).transpose()
    }

    /// A token: a string, or an object with its content.
    pub(crate) fn special_token(&self, name: &str) -> Result<Option<&str>, ModelError> {
        let Some(value) = self.get(name) else { return Ok(None) };
        match value.as_str().or_else(|| value.get("content")?.as_str()) {
            Some(token) => Ok(Some(token)),
            None => Err(self.invalid(name, "a string or an object with a string 'content'")),
        }
    }

    /// The object itself.
    pub(crate) fn to_value(&self) -> Value {
        Value::Object(self.fields.clone())
    }

    /// A list of strings.
    pub(crate) fn strings(&self, name: &str) -> Result<Option<Vec<&str>>, ModelError> {
        let Some(value) = self.get(name) else { return Ok(None) };
        let strings =
            value.as_array().and_then(|list| list.iter().map(Value::as_str).collect::<Option<Vec<_>>>());
        strings.ok_or_else(|| self.invalid(name, "a list of strings")).map(Some)
    }

    /// A list of finite numbers for each of which `accept` holds; `rule` says in words what they are.
    pub(crate) fn numbers(
        &self,
        name: &str,
        rule: &str,
        accept: impl Fn(f64) -> bool,
    ) -> Result<Option<Vec<f64>>, ModelError> {
        let Some(value) = self.get(name) else { return Ok(None) };
        let number = |value: &Value| value.as_f64().filter(|number| number.is_finite() && accept(*number));
        let numbers = value.as_array().and_then(|list| list.iter().map(number).collect::<Option<Vec<_>>>());
        numbers.ok_or_else(|| self.invalid(name, rule)).map(Some)
    }

    /// One token id or a list of them, each below `vocab_size`.
    pub(crate) fn token_ids(&self, name: &str, vocab_size: usize) -> Result<Option<Vec<u32>>, ModelError> {
        let Some(value) = self.get(name) else { return Ok(None) };
        let id = |value: &Value| {
            value.as_u64().filter(|id| *id < vocab_size as u64).and_then(|id| u32::try_from(id).ok())
        };
        let ids = match value {
            Value::Array(list) => list.iter().map(id).collect::<Option<Vec<_>>>(),
            one => id(one).map(|id| vec![id]),
        };
        ids.map(Some).ok_or_else(|| {
            self.invalid(
                name,
                &format!("a token id below the vocabulary's size {vocab_size}, or a list of them"),
            )
        })
    }

    /// An object inside of this one.
    pub(crate) fn object(&self, name: &str) -> Result<Option<Self>, ModelError> {
        match self.get(name) {
            None => Ok(None),
            Some(Value::Object(fields)) => {
                Ok(Some(Self::new(&self.path, format!("{}{name}.", self.prefix), fields.clone())))
            }
            Some(_) => Err(self.invalid(name, "an object")),
        }
    }
}

/// What a value is, with its article.
pub(crate) fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

/// A value short enough for a message.
fn show(value: &Value) -> String {
    match value {
        Value::Array(list) => format!("a list of {}", list.len()),
        Value::Object(_) => kind(value).to_owned(),
        Value::String(text) if text.chars().count() > 60 => "a long string".to_owned(),
        scalar => scalar.to_string(),
    }
}

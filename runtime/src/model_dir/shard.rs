//! One safetensors file: mapped into memory, its header read strictly. Whatever the header says is checked
//! against the file before any of it is used.
//!
//! ```text
//! [8 bytes: length n][n bytes: JSON {name: {dtype, shape, data_offsets}}][data]
//! ```
//!
//! The format demands that the tensors cover the data without holes or overlaps. The `safetensors` crate checks
//! that too, but lets a name occur twice and does not say which tensor is wrong, so only its types are used here.

use super::{
    ModelError,
    json::{invalid, open_regular},
};
use memmap2::Mmap;
use rustc_hash::FxHashMap;
use safetensors::Dtype;
use serde::{
    Deserialize,
    de::{DeserializeSeed, Error as _, IgnoredAny, MapAccess, Visitor, value::StrDeserializer},
};
use std::{
    fmt,
    ops::Range,
    path::{Path, PathBuf},
    sync::Arc,
};

const LENGTH_BYTES: usize = 8;
/// The format's own limit.
const MAX_HEADER_BYTES: u64 = 100_000_000;

/// A mapped file and what its header says.
#[derive(Debug)]
pub(super) struct Shard {
    pub(super) path: PathBuf,
    pub(super) map: Arc<Mmap>,
    pub(super) tensors: FxHashMap<String, Entry>,
}

/// A tensor of a shard. `bytes` lies inside of the file and has the length that dtype and shape ask for.
#[derive(Clone, Debug)]
pub(super) struct Entry {
    pub(super) dtype: Dtype,
    pub(super) shape: Vec<usize>,
    pub(super) bytes: Range<usize>,
}

impl Shard {
    /// Maps a file and reads its header; `None` when there is no such file.
    pub(super) fn open(path: &Path) -> Result<Option<Self>, ModelError> {
        let Some((file, length)) = open_regular(path)? else { return Ok(None) };
        if length == 0 {
            return Err(invalid(path, "it is empty".to_owned()));
        }
        if length < LENGTH_BYTES as u64 {
            return Err(invalid(path, format!("it has {length} bytes and cannot be a safetensors file")));
        }
        // SAFETY: the map is only ever read. Another process that changes the file while it is mapped can change
        // the numbers that are read, and one that truncates it can end this process, as with every memory-mapped
        // model; all offsets are checked against the mapping's own length.
        let map =
            unsafe { Mmap::map(&file) }.map_err(|source| ModelError::Io { path: path.to_owned(), source })?;
        let tensors = read_header(path, &map)?;
        Ok(Some(Self { path: path.to_owned(), map: Arc::new(map), tensors }))
    }
}

fn read_header(path: &Path, file: &[u8]) -> Result<FxHashMap<String, Entry>, ModelError> {
    let truncated = || invalid(path, format!("it has {} bytes and cannot be a safetensors file", file.len()));
    let (length, rest) = file.split_first_chunk::<LENGTH_BYTES>().ok_or_else(truncated)?;
    let length = u64::from_le_bytes(*length);
    if length > MAX_HEADER_BYTES {
        let problem =
            format!("its header claims {length} bytes, more than the format's limit {MAX_HEADER_BYTES}");
        return Err(invalid(path, problem));
    }
    let header_bytes = length as usize;
    let Some((header, data)) = rest.split_at_checked(header_bytes) else {
        let problem =
            format!("its header claims {length} bytes but only {} follow: the file is truncated", rest.len());
        return Err(invalid(path, problem));
    };
    let header =
        std::str::from_utf8(header).map_err(|_| invalid(path, "its header is not UTF-8 text".to_owned()))?;
    let Header(mut raw) = serde_json::from_str(header)
        .map_err(|error| invalid(path, format!("its header is not valid: {error}")))?;

    raw.sort_by_key(|(_, tensor)| tensor.data_offsets);
    let mut tensors = FxHashMap::default();
    tensors.reserve(raw.len());
    let mut end_of_last = 0;
    for (name, tensor) in raw {
        let wrong = |problem: String| invalid(path, format!("tensor '{}' {problem}", shorten(&name)));
        let dtype = Dtype::deserialize(StrDeserializer::<serde::de::value::Error>::new(&tensor.dtype))
            .map_err(|_| wrong(format!("has the unknown dtype '{}'", shorten(&tensor.dtype))))?;
        let (begin, end) = tensor.data_offsets;
        if begin > end {
            return Err(wrong(format!("ends at byte {end}, before it begins at byte {begin}")));
        }
        if end > data.len() as u64 {
            let stored = data.len();
            return Err(wrong(format!(
                "ends at byte {end} of {stored} bytes of data: the file is truncated"
            )));
        }
        if begin != end_of_last {
            let how =
                if begin < end_of_last { "overlaps the tensor before it" } else { "leaves a hole before it" };
            return Err(wrong(format!("{how}: it begins at byte {begin} and should begin at {end_of_last}")));
        }
        end_of_last = end;
        let bits = tensor
            .shape
            .iter()
            .try_fold(dtype.bitsize() as u64, |product, extent| product.checked_mul(*extent))
            .ok_or_else(|| wrong(format!("has the shape {:?}, which is absurd", tensor.shape)))?;
        if bits != (end - begin) * 8 {
            let problem = format!(
                "is {dtype} of shape {:?}, {} bytes, but {} bytes are stored",
                tensor.shape,
                bits.div_ceil(8),
                end - begin
            );
            return Err(wrong(problem));
        }
        // All three are bounded by the file's length, which is an address range of this process.
        let data_begin = LENGTH_BYTES + header_bytes;
        let entry = Entry {
            dtype,
            shape: tensor.shape.iter().map(|extent| *extent as usize).collect(),
            bytes: data_begin + begin as usize..data_begin + end as usize,
        };
        tensors.insert(name, entry);
    }
    if end_of_last != data.len() as u64 {
        let problem =
            format!("its tensors end at byte {end_of_last} but {} bytes of data are stored", data.len());
        return Err(invalid(path, problem));
    }
    Ok(tensors)
}

/// A name that fits in a message.
pub(super) fn shorten(name: &str) -> String {
    const MOST: usize = 100;
    if name.chars().count() <= MOST {
        return name.to_owned();
    }
    name.chars().take(MOST).chain("…".chars()).collect()
}

/// A tensor as the header describes it.
#[derive(Deserialize)]
struct RawTensor {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: (u64, u64),
}

/// The header's entries in file order, without `__metadata__`.
struct Header(Vec<(String, RawTensor)>);

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries;

        impl<'de> Visitor<'de> for Entries {
            type Value = Header;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object with one entry a tensor")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Header, A::Error> {
                let mut seen = rustc_hash::FxHashSet::default();
                let mut tensors = Vec::new();
                while let Some(name) = map.next_key::<String>()? {
                    if !seen.insert(name.clone()) {
                        return Err(A::Error::custom(format!("tensor '{}' occurs twice", shorten(&name))));
                    }
                    if name == "__metadata__" {
                        map.next_value::<IgnoredAny>()?;
                    } else {
                        let tensor = map.next_value_seed(Named(&name))?;
                        tensors.push((name, tensor));
                    }
                }
                Ok(Header(tensors))
            }
        }

        deserializer.deserialize_map(Entries)
    }
}

/// Puts the tensor's name in front of what is wrong with it.
struct Named<'a>(&'a str);

impl<'de> DeserializeSeed<'de> for Named<'_> {
    type Value = RawTensor;

    fn deserialize<D: serde::Deserializer<'de>>(self, deserializer: D) -> Result<RawTensor, D::Error> {
        RawTensor::deserialize(deserializer)
            .map_err(|error| D::Error::custom(format!("tensor '{}': {error}", shorten(self.0))))
    }
}

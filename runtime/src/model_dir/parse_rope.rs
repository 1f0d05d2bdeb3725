//! The rotary embedding's part of `config.json`: `rope_theta` with `rope_scaling`, or `rope_parameters`.

use super::{
    ModelError, RopeConfig, RopeScaling,
    families::Family,
    json::{Object, invalid},
    parse_config::MAX_POSITIONS,
};
use serde_json::Value;

const DEFAULT_THETA: f64 = 10_000.0;
const POSITIVE: &str = "a number above 0";
const TYPES: &str = "supported are default, linear, llama3 and longrope";
const PARTIAL: &str = "partial_rotary_factor";
const ORIGINAL: &str = "original_max_position_embeddings";
/// That of Phi-3's class in `transformers`.
const DEFAULT_ORIGINAL: usize = 4096;

/// What a configuration says of rotation.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Rotary {
    pub(super) config: RopeConfig,
    /// Where longer sequences would need another stretching: the longest that do not.
    pub(super) trained_positions: Option<usize>,
}

/// What the stretching depends on and stands elsewhere in the file.
#[derive(Clone, Copy)]
struct Around {
    max_positions: usize,
    /// `original_max_position_embeddings` beside the rotary embedding's own fields.
    original: Option<usize>,
    head_dim: usize,
    /// Part of a head that is rotated.
    partial: Option<f64>,
    partial_supported: bool,
}

/// Reads the rotary embedding in whichever spelling the file has; where it has both, they must agree.
pub(super) fn parse_rope(
    file: &Object,
    family: &Family,
    head_dim: usize,
    max_positions: usize,
) -> Result<Rotary, ModelError> {
    let outer_theta = file.number("rope_theta", POSITIVE, is_positive)?;
    let around = Around {
        max_positions,
        original: file.size(ORIGINAL, MAX_POSITIONS)?,
        head_dim,
        partial: partial(file)?,
        partial_supported: family.has.contains(&PARTIAL),
    };
    let mut found: Option<Rotary> = None;
    for name in ["rope_parameters", "rope_scaling"] {
        let Some(parameters) = file.object(name)? else { continue };
        let inner_theta = parameters.number("rope_theta", POSITIVE, is_positive)?;
        if let (Some(inner), Some(outer)) = (inner_theta, outer_theta)
            && inner != outer
        {
            return Err(parameters.invalid("rope_theta", &format!("equal to 'rope_theta' = {outer}")));
        }
        let earlier = found.as_ref().map(|rotary| rotary.config.theta);
        let theta = inner_theta.or(outer_theta).or(earlier).unwrap_or(DEFAULT_THETA);
        let rotary = parse_parameters(&parameters, theta, around)?;
        if found.as_ref().is_some_and(|other| *other != rotary) {
            let problem = "'rope_parameters' and 'rope_scaling' are both given and do not agree".to_owned();
            return Err(invalid(&file.path, problem));
        }
        found = Some(rotary);
    }
    match found {
        Some(rotary) => Ok(rotary),
        None => {
            let rotary_dim = rotary_dim(file, around.partial, head_dim)?;
            let theta = outer_theta.unwrap_or(DEFAULT_THETA);
            let config = RopeConfig { rotary_dim, theta, scaling: RopeScaling::None };
            Ok(Rotary { config, trained_positions: None })
        }
    }
}

fn partial(object: &Object) -> Result<Option<f64>, ModelError> {
    object.number(PARTIAL, "a number above 0 and at most 1", |part| part > 0.0 && part <= 1.0)
}

fn rotary_dim(object: &Object, partial: Option<f64>, head_dim: usize) -> Result<usize, ModelError> {
    let dim = (head_dim as f64 * partial.unwrap_or(1.0)) as usize;
    if dim == 0 || !dim.is_multiple_of(2) {
        let rule = format!("such that it makes an even number of a head's {head_dim} elements");
        return Err(object.invalid(PARTIAL, &rule));
    }
    Ok(dim)
}

fn parse_parameters(parameters: &Object, theta: f64, around: Around) -> Result<Rotary, ModelError> {
    if let Some(name) = parameters.names().find(|name| matches!(parameters.get(name), Some(Value::Object(_))))
    {
        return Err(parameters.unsupported(name, "all layers have to share one rotary embedding"));
    }
    // "type" is the older name of "rope_type".
    let (new, old) = (parameters.string("rope_type")?, parameters.string("type")?);
    if let (Some(new), Some(old)) = (new, old)
        && new != old
    {
        return Err(
            parameters.invalid("type", &format!("equal to {} = \"{new}\"", parameters.field("rope_type")))
        );
    }
    let rope_type = match new.or(old) {
        Some(name) => name,
        // A bare theta; anything else would leave open what is meant.
        None if parameters.names().all(|name| matches!(name, "rope_theta" | PARTIAL)) => "default",
        None => {
            let rule = "\"default\", \"linear\", \"llama3\" or \"longrope\"";
            return Err(parameters.invalid("rope_type", rule));
        }
    };
    let part = match (partial(parameters)?, around.partial) {
        (Some(part), _) if part != 1.0 && !around.partial_supported => {
            return Err(parameters.unsupported(PARTIAL, "only rotary embeddings of the whole head are"));
        }
        (Some(part), Some(outer)) if part != outer => {
            return Err(parameters.invalid(PARTIAL, &format!("equal to '{PARTIAL}' = {outer}")));
        }
        (inner, outer) => inner.or(outer),
    };
    let rotary_dim = rotary_dim(parameters, part, around.head_dim)?;

    let known: &[&str] = match rope_type {
        "default" => &[],
        "linear" => &["factor"],
        "llama3" => &["factor", "low_freq_factor", "high_freq_factor", ORIGINAL],
        // "su" is its older name.
        "longrope" | "su" => &["short_factor", "long_factor", "factor", "attention_factor", ORIGINAL],
        _ => {
            let name = if new.is_some() { "rope_type" } else { "type" };
            return Err(parameters.unsupported(name, TYPES));
        }
    };
    let common = ["rope_type", "type", "rope_theta", PARTIAL];
    if let Some(name) = parameters.names().find(|name| !common.contains(name) && !known.contains(name)) {
        return Err(parameters.unsupported(name, &format!("rope type {rope_type} has no such parameter")));
    }

    let positive = |name: &str| {
        parameters.number(name, POSITIVE, is_positive)?.ok_or_else(|| parameters.invalid(name, POSITIVE))
    };
    let mut trained_positions = None;
    let scaling = match rope_type {
        "linear" => RopeScaling::Linear { factor: positive("factor")? },
        "llama3" => {
            let low_freq_factor = positive("low_freq_factor")?;
            let high_freq_factor = positive("high_freq_factor")?;
            if high_freq_factor <= low_freq_factor {
                let rule = format!("above {} = {low_freq_factor}", parameters.field("low_freq_factor"));
                return Err(parameters.invalid("high_freq_factor", &rule));
            }
            RopeScaling::Llama3 {
                factor: positive("factor")?,
                low_freq_factor,
                high_freq_factor,
                original_max_positions: parameters.required_size(ORIGINAL, MAX_POSITIONS)?,
            }
        }
        "longrope" | "su" => {
            let (scaling, original) = long_rope(parameters, rotary_dim, around)?;
            trained_positions = Some(original);
            scaling
        }
        _ => RopeScaling::None,
    };
    Ok(Rotary { config: RopeConfig { rotary_dim, theta, scaling }, trained_positions })
}

/// LongRoPE within the context of the training, and how long that was.
fn long_rope(
    parameters: &Object,
    rotary_dim: usize,
    around: Around,
) -> Result<(RopeScaling, usize), ModelError> {
    let factors = |name: &str| {
        let rule = format!("a list of {} numbers above 0", rotary_dim / 2);
        let factors = parameters.numbers(name, &rule, is_positive)?;
        factors.filter(|list| list.len() == rotary_dim / 2).ok_or_else(|| parameters.invalid(name, &rule))
    };
    let short_factors = factors("short_factor")?;
    factors("long_factor")?;
    let original = match (parameters.size(ORIGINAL, MAX_POSITIONS)?, around.original) {
        (Some(inner), Some(outer)) if inner != outer => {
            return Err(parameters.invalid(ORIGINAL, &format!("equal to '{ORIGINAL}' = {outer}")));
        }
        (inner, outer) => inner.or(outer).unwrap_or(DEFAULT_ORIGINAL),
    };
    let factor = parameters.number("factor", POSITIVE, is_positive)?;
    let factor = factor.unwrap_or(around.max_positions as f64 / original as f64);
    let attention_factor = match parameters.number("attention_factor", POSITIVE, is_positive)? {
        Some(given) => given,
        None if factor <= 1.0 => 1.0,
        // Of one position the logarithm is 0.
        None if original < 2 => return Err(parameters.invalid(ORIGINAL, "at least 2")),
        None => (1.0 + factor.ln() / (original as f64).ln()).sqrt(),
    };
    Ok((RopeScaling::LongRope { short_factors, attention_factor }, original))
}

fn is_positive(number: f64) -> bool {
    number > 0.0
}

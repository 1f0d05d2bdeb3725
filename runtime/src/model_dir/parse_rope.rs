//! The rotary embedding's part of `config.json`: `rope_theta` with `rope_scaling`, or `rope_parameters`.

use super::{
    ModelError, RopeConfig, RopeScaling,
    json::{Object, invalid},
};
use serde_json::Value;

const DEFAULT_THETA: f64 = 10_000.0;
const POSITIVE: &str = "a number above 0";
const TYPES: &str = "supported are default, linear and llama3";

/// Reads the rotary embedding in whichever spelling the file has; where it has both, they must agree.
pub(super) fn parse_rope(file: &Object) -> Result<RopeConfig, ModelError> {
    let outer_theta = file.number("rope_theta", POSITIVE, is_positive)?;
    let mut found: Option<RopeConfig> = None;
    for name in ["rope_parameters", "rope_scaling"] {
        let Some(parameters) = file.object(name)? else { continue };
        let inner_theta = parameters.number("rope_theta", POSITIVE, is_positive)?;
        if let (Some(inner), Some(outer)) = (inner_theta, outer_theta)
            && inner != outer
        {
            return Err(parameters.invalid("rope_theta", &format!("equal to 'rope_theta' = {outer}")));
        }
        let theta = inner_theta.or(outer_theta).or(found.map(|rope| rope.theta)).unwrap_or(DEFAULT_THETA);
        let rope = RopeConfig { theta, scaling: parse_scaling(&parameters)? };
        if found.is_some_and(|other| other != rope) {
            let problem = "'rope_parameters' and 'rope_scaling' are both given and do not agree".to_owned();
            return Err(invalid(&file.path, problem));
        }
        found = Some(rope);
    }
    Ok(found
        .unwrap_or(RopeConfig { theta: outer_theta.unwrap_or(DEFAULT_THETA), scaling: RopeScaling::None }))
}

fn parse_scaling(parameters: &Object) -> Result<RopeScaling, ModelError> {
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
        None if parameters.names().all(|name| matches!(name, "rope_theta" | "partial_rotary_factor")) => {
            "default"
        }
        None => return Err(parameters.invalid("rope_type", "\"default\", \"linear\" or \"llama3\"")),
    };
    if parameters.get("partial_rotary_factor").is_some_and(|factor| factor.as_f64() != Some(1.0)) {
        let hint = "only rotary embeddings of the whole head are";
        return Err(parameters.unsupported("partial_rotary_factor", hint));
    }

    let known: &[&str] = match rope_type {
        "default" => &[],
        "linear" => &["factor"],
        "llama3" => &["factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"],
        _ => {
            let name = if new.is_some() { "rope_type" } else { "type" };
            return Err(parameters.unsupported(name, TYPES));
        }
    };
    let common = ["rope_type", "type", "rope_theta", "partial_rotary_factor"];
    if let Some(name) = parameters.names().find(|name| !common.contains(name) && !known.contains(name)) {
        return Err(parameters.unsupported(name, &format!("rope type {rope_type} has no such parameter")));
    }

    let positive = |name: &str| {
        parameters.number(name, POSITIVE, is_positive)?.ok_or_else(|| parameters.invalid(name, POSITIVE))
    };
    match rope_type {
        "linear" => Ok(RopeScaling::Linear { factor: positive("factor")? }),
        "llama3" => {
            let low_freq_factor = positive("low_freq_factor")?;
            let high_freq_factor = positive("high_freq_factor")?;
            if high_freq_factor <= low_freq_factor {
                let rule = format!("above {} = {low_freq_factor}", parameters.field("low_freq_factor"));
                return Err(parameters.invalid("high_freq_factor", &rule));
            }
            Ok(RopeScaling::Llama3 {
                factor: positive("factor")?,
                low_freq_factor,
                high_freq_factor,
                original_max_positions: parameters
                    .required_size("original_max_position_embeddings", super::parse_config::MAX_POSITIONS)?,
            })
        }
        _ => Ok(RopeScaling::None),
    }
}

fn is_positive(number: f64) -> bool {
    number > 0.0
}

//! Which keys the layers of a model see: `sliding_window`, `layer_types` and what goes with them.

use super::{Architecture, ModelError, families::Family, json::Object, parse_config::MAX_POSITIONS};

const DEFAULT_WINDOW: usize = 4096;

/// One entry a layer: how many keys, its own included, a query sees.
pub(super) fn layer_windows(
    file: &Object,
    family: &Family,
    num_layers: usize,
) -> Result<Vec<Option<usize>>, ModelError> {
    let window = file.size("sliding_window", MAX_POSITIONS)?;
    // Present but null is "none"; absent is the default of the class.
    let default = Some(DEFAULT_WINDOW).filter(|_| family.architecture != Architecture::Phi3);
    let window = if file.has("sliding_window") { window } else { default };
    let slides = file.boolean("use_sliding_window")?;
    let first = file.integer("max_window_layers", 0, u64::MAX)?;
    let layer_types = layer_types(file, num_layers)?;

    match family.architecture {
        Architecture::Llama | Architecture::Opt | Architecture::Gpt2 => {
            let hint = format!("{} attends to all positions", family.class);
            if file.get("sliding_window").is_some() && slides != Some(false) {
                return Err(file.unsupported("sliding_window", &hint));
            }
            if slides == Some(true) {
                return Err(file.unsupported("use_sliding_window", &hint));
            }
            check_layer_types(file, layer_types, false)?;
            Ok(vec![None; num_layers])
        }
        Architecture::Mistral | Architecture::Phi3 => {
            if slides == Some(false) && window.is_some() {
                return Err(file.unsupported("use_sliding_window", "set 'sliding_window' to null instead"));
            }
            check_layer_types(file, layer_types, window.is_some())?;
            Ok(vec![window; num_layers])
        }
        Architecture::Qwen2 | Architecture::Qwen3 => {
            let window = window.filter(|_| slides.unwrap_or(false));
            let Some(layer_types) = layer_types else {
                let first = first.unwrap_or(28);
                return Ok((0..num_layers as u64).map(|layer| window.filter(|_| layer >= first)).collect());
            };
            if window.is_none() && layer_types.contains(&true) {
                let rule = "\"full_attention\" everywhere unless 'use_sliding_window' is true and 'sliding_window' is set";
                return Err(file.invalid("layer_types", rule));
            }
            Ok(layer_types.into_iter().map(|slides| window.filter(|_| slides)).collect())
        }
        Architecture::Gemma2 => {
            if slides == Some(false) && window.is_some() {
                return Err(file.unsupported("use_sliding_window", "set 'sliding_window' to null instead"));
            }
            let alternating = || (0..num_layers).map(|layer| layer.is_multiple_of(2)).collect();
            let layer_types = layer_types.unwrap_or_else(alternating);
            Ok(layer_types.into_iter().map(|slides| window.filter(|_| slides)).collect())
        }
    }
}

/// One entry a layer: whether it has a sliding window.
fn layer_types(file: &Object, num_layers: usize) -> Result<Option<Vec<bool>>, ModelError> {
    let Some(names) = file.strings("layer_types")? else { return Ok(None) };
    if names.len() != num_layers {
        let rule = format!("a list of 'num_hidden_layers' = {num_layers} entries");
        return Err(file.invalid("layer_types", &rule));
    }
    let slides = |name: &&str| match *name {
        "full_attention" => Ok(false),
        "sliding_attention" => Ok(true),
        other => Err(ModelError::Unsupported {
            path: file.path.clone(),
            feature: format!("layer type '{other}'"),
            hint: "supported are full_attention and sliding_attention".to_owned(),
        }),
    };
    names.iter().map(slides).collect::<Result<_, _>>().map(Some)
}

/// Families whose layers are all alike do not read `layer_types`; it must not say otherwise.
fn check_layer_types(file: &Object, layer_types: Option<Vec<bool>>, slides: bool) -> Result<(), ModelError> {
    match layer_types {
        Some(types) if types.iter().any(|layer| *layer != slides) => {
            Err(file.unsupported("layer_types", "all layers of this architecture have to be alike"))
        }
        _ => Ok(()),
    }
}

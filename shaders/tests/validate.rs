//! Every variant parses, validates, and translates to what Vulkan, Metal, DirectX 12 and browsers take; and
//! what it declares is what its descriptor says.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use std::collections::{BTreeMap, HashSet};

use naga::valid::{Capabilities, ModuleInfo, ValidationFlags, Validator};
use naga::{AddressSpace, Module, StorageAccess, back};
use pagewise_shaders::{Binding, BindingKind, Shader, all_shaders};

fn validated(shader: &Shader) -> (Module, ModuleInfo) {
    let name = shader.name();
    let module = naga::front::wgsl::parse_str(shader.text())
        .unwrap_or_else(|error| panic!("{name}: {}", error.emit_to_string(shader.text())));
    // Nothing beyond plain WebGPU, which has pack2x16float, but f16 where the descriptor says so.
    let mut capabilities = Capabilities::SHADER_FLOAT16_IN_FLOAT32;
    capabilities.set(Capabilities::SHADER_FLOAT16, shader.needs_f16());
    capabilities.set(Capabilities::SUBGROUP, shader.needs_subgroups());
    capabilities.set(Capabilities::COOPERATIVE_MATRIX, shader.needs_matrices());
    let info = Validator::new(ValidationFlags::all(), capabilities)
        .validate(&module)
        .unwrap_or_else(|error| panic!("{name}: {}", error.emit_to_string(shader.text())));
    (module, info)
}

#[test]
fn every_variant_translates_for_every_backend() {
    let shaders = all_shaders().unwrap();
    for shader in &shaders {
        let name = shader.name();
        let (module, info) = validated(shader);
        let failed =
            |language: &str, error: &dyn std::fmt::Display| -> ! { panic!("{name} to {language}: {error}") };

        let spirv = back::spv::write_vec(
            &module,
            &info,
            &back::spv::Options { lang_version: (1, 3), ..Default::default() },
            None,
        );
        spirv.unwrap_or_else(|error| failed("SPIR-V", &error));
        let options =
            back::msl::Options { lang_version: (2, 4), fake_missing_bindings: true, ..Default::default() };
        let metal = back::msl::write_string(&module, &info, &options, &Default::default());
        metal.unwrap_or_else(|error| failed("MSL", &error));
        let options = back::hlsl::Options {
            shader_model: back::hlsl::ShaderModel::V6_2,
            fake_missing_bindings: true,
            ..Default::default()
        };
        let mut text = String::new();
        let pipeline_options = Default::default();
        let hlsl =
            back::hlsl::Writer::new(&mut text, &options, &pipeline_options).write(&module, &info, None);
        // HLSL has no cooperative matrices in naga, so no device has them through DirectX 12.
        match hlsl {
            Err(_) if shader.needs_matrices() => {}
            hlsl => drop(hlsl.unwrap_or_else(|error| failed("HLSL", &error))),
        }
        let wgsl = back::wgsl::write_string(&module, &info, back::wgsl::WriterFlags::empty());
        let wgsl = wgsl.unwrap_or_else(|error| failed("WGSL", &error));
        naga::front::wgsl::parse_str(&wgsl).unwrap_or_else(|error| failed("WGSL and back", &error));
    }
    eprintln!("{} variants translated to SPIR-V, MSL, HLSL and WGSL", shaders.len());
}

#[test]
fn the_text_declares_what_the_descriptor_says() {
    let mut names = HashSet::new();
    for shader in all_shaders().unwrap() {
        let name = shader.name();
        assert!(names.insert(name.to_string()), "{name} is there twice");
        let (module, _) = validated(&shader);
        let mut layouter = naga::proc::Layouter::default();
        layouter.update(module.to_ctx()).unwrap();

        let declared: BTreeMap<u32, Binding> = module
            .global_variables
            .iter()
            .filter_map(|(_, variable)| {
                let place = variable.binding?;
                assert_eq!(place.group, 0, "{name}");
                let size = layouter[variable.ty].size;
                let element_size = match module.types[variable.ty].inner {
                    naga::TypeInner::Array { stride, .. } => stride,
                    _ => 4,
                };
                let kind = match variable.space {
                    AddressSpace::Uniform => BindingKind::Uniform { size },
                    AddressSpace::Storage { access } if access.contains(StorageAccess::STORE) => {
                        BindingKind::ReadWrite
                    }
                    AddressSpace::Storage { .. } => BindingKind::ReadOnly,
                    space => panic!("{name}: binding in {space:?}"),
                };
                let described =
                    shader.bindings().iter().find(|binding| binding.index == place.binding).unwrap();
                assert_eq!(variable.name.as_deref(), Some(described.name), "{name}");
                Some((
                    place.binding,
                    Binding { index: place.binding, name: described.name, kind, element_size },
                ))
            })
            .collect();
        assert_eq!(declared.into_values().collect::<Vec<_>>(), shader.bindings(), "{name}");

        // WebGPU's default limits: every device has them.
        let storage =
            shader.bindings().iter().filter(|binding| !matches!(binding.kind, BindingKind::Uniform { .. }));
        assert!(storage.count() <= 8, "{name}");
        assert!(shader.workgroup_size() <= 256, "{name}");
        let [entry] = module.entry_points.as_slice() else { panic!("{name} has not one entry point") };
        assert_eq!(
            (entry.name.as_str(), entry.workgroup_size),
            (shader.entry(), [shader.workgroup_size(), 1, 1])
        );
    }
}

/// Matrices are read from workgroup memory at multiples of 16 bytes, and a driver lays variables out as it likes.
#[test]
fn workgroup_variables_beside_matrices_are_multiples_of_16_bytes() {
    for shader in all_shaders().unwrap().iter().filter(|shader| shader.needs_matrices()) {
        let (module, _) = validated(shader);
        let mut layouter = naga::proc::Layouter::default();
        layouter.update(module.to_ctx()).unwrap();
        for (_, variable) in module.global_variables.iter() {
            let size = layouter[variable.ty].size;
            let aligned = variable.space != AddressSpace::WorkGroup || size.is_multiple_of(16);
            assert!(aligned, "{}: {:?} has {size} bytes", shader.name(), variable.name);
        }
    }
}

#[test]
fn the_text_reads_well() {
    for shader in all_shaders().unwrap() {
        let name = shader.name();
        assert!(shader.text().starts_with(&format!("// {name}: ")), "{name} opens with what it does");
        assert!(shader.text().is_ascii() && shader.text().ends_with("}\n"), "{name}");
        for (number, line) in shader.text().lines().enumerate() {
            let place = format!("{name}:{}", number + 1);
            assert!(line.len() <= 130, "{place} is too long: {line}");
            assert_eq!(line, line.trim_end(), "{place} ends in blanks");
            for leftover in ["${", "<%", "//%", "//#", "\t"] {
                assert!(!line.contains(leftover), "{place} holds {leftover}: {line}");
            }
        }
    }
}

//! Which kernel variant computes attention for a configuration on this adapter.

use ::wgpu::Features;
use pagewise_shaders::decode::{DecodeArgs, DecodeNeeds, DecodeSpec, DecodeTuning, Unit};
use pagewise_shaders::prefill::{MatrixNeeds, MatrixSpec, PrefillKernel, PrefillNeeds, PrefillSpec};

use super::dtype::shader_type;
use super::{Context, PrefillChoice, WgpuError};
use crate::{AttentionConfig, DType, Mask};

impl Context {
    /// The smallest subgroup, where kernels may use subgroup operations.
    fn subgroup(&self) -> Option<u32> {
        self.features().contains(Features::SUBGROUP).then(|| self.device().adapter_info().subgroup_min_size)
    }

    fn needs(&self, config: &AttentionConfig, unit: Unit) -> Result<DecodeNeeds, WgpuError> {
        Ok(DecodeNeeds {
            q: shader_type("queries", config.q_dtype)?,
            kv: shader_type("the cache", config.kv_dtype)?,
            unit,
            head_dim: small("head_dim", config.head_dim_qk.max(config.head_dim_v))?,
            group: small("the group", config.group())?,
            subgroup: self.subgroup(),
            bits: config.mask == Mask::Bits,
        })
    }

    /// The variant for a configuration whose buffers are aligned to 16 bytes. Others read other units, but have as
    /// many queries.
    pub(super) fn usual_spec(&self, config: &AttentionConfig) -> Result<DecodeSpec, WgpuError> {
        let needs = self.needs(config, Unit::Vec4)?;
        DecodeSpec::for_needs(needs).ok_or(WgpuError::NoVariant { kernel: "decode" })
    }

    /// The prefill kernel for a configuration. All of them read caches by four elements.
    ///
    /// # Errors
    /// [`WgpuError::UnsupportedDType`]; [`WgpuError::NoVariant`] where matrix units are asked for that are not there or do
    /// not take the types or heads; [`WgpuError::Limit`] where a tuning takes too much workgroup memory.
    pub fn prefill_kernel(
        &self,
        config: &AttentionConfig,
        choice: PrefillChoice,
    ) -> Result<PrefillKernel, WgpuError> {
        let matrix = || self.matrix_spec(config).map(|spec| spec.map(PrefillKernel::Matrix));
        let kernel = match choice {
            PrefillChoice::Fastest => match matrix()? {
                Some(kernel) => kernel,
                None => PrefillKernel::Tiled(self.tiled_spec(config)?),
            },
            PrefillChoice::Tiled(tuning) => {
                let spec = self.tiled_spec(config)?;
                PrefillKernel::Tiled(PrefillSpec { tuning: tuning.unwrap_or(spec.tuning), ..spec })
            }
            PrefillChoice::Matrix(tuning) => {
                let spec = self.matrix_spec(config)?;
                let spec = spec.ok_or(WgpuError::NoVariant { kernel: "prefill_matrix" })?;
                PrefillKernel::Matrix(MatrixSpec { tuning: tuning.unwrap_or(spec.tuning), ..spec })
            }
        };
        let needed = kernel.workgroup_memory();
        let found = self.limits().max_compute_workgroup_storage_size;
        if needed > found {
            let (limit, what) = ("max_compute_workgroup_storage_size", kernel.name());
            return Err(WgpuError::Limit { limit, what, found: found.into(), needed: needed.into() });
        }
        Ok(kernel)
    }

    fn tiled_spec(&self, config: &AttentionConfig) -> Result<PrefillSpec, WgpuError> {
        Ok(PrefillSpec::for_needs(PrefillNeeds {
            q: shader_type("queries", config.q_dtype)?,
            kv: shader_type("the cache", config.kv_dtype)?,
            head_dim_v: small("head_dim_v", config.head_dim_v)?,
            bits: config.mask == Mask::Bits,
            half: self.features().contains(Features::SHADER_F16),
            workgroup_memory: self.limits().max_compute_workgroup_storage_size,
        }))
    }

    /// Matrix units take f16 alone: others would be rounded to it, or leave its range.
    fn matrix_spec(&self, config: &AttentionConfig) -> Result<Option<MatrixSpec>, WgpuError> {
        let Some(shape) = self.matrices() else { return Ok(None) };
        if (config.q_dtype, config.kv_dtype) != (DType::F16, DType::F16) {
            return Ok(None);
        }
        Ok(MatrixSpec::for_needs(MatrixNeeds {
            shape,
            head_dim_k: small("head_dim_qk", config.head_dim_qk)?,
            head_dim_v: small("head_dim_v", config.head_dim_v)?,
            bits: config.mask == Mask::Bits,
            workgroup_memory: self.limits().max_compute_workgroup_storage_size,
        }))
    }

    /// The variant with the largest units that divide every offset, stride and head dimension.
    pub(super) fn choose_decode(
        &self,
        config: &AttentionConfig,
        args: &DecodeArgs,
        tuning: Option<DecodeTuning>,
    ) -> Result<DecodeSpec, WgpuError> {
        let usual = self.usual_spec(config)?;
        let mut refusal = None;
        for unit in Unit::ALL {
            let Some(spec) = DecodeSpec::for_needs(self.needs(config, unit)?) else { continue };
            // The plan counts on the usual number of queries.
            let spec = DecodeSpec { queries: usual.queries, tuning: tuning.unwrap_or(spec.tuning), ..spec };
            if spec.tuning.half && !self.features().contains(Features::SHADER_F16) {
                continue;
            }
            match args.uniform(spec) {
                Ok(_) if spec.exists() => return Ok(spec),
                Ok(_) => {}
                Err(error) => refusal = Some(error),
            }
        }
        match refusal {
            Some(reason @ pagewise_shaders::Error::NotDivisible { .. }) => Err(WgpuError::Alignment {
                reason,
                advice: "head dimensions must be multiples of 4 elements; offsets and strides of the caches multiples of 4 elements, those of 16-bit queries and outputs even",
            }),
            Some(error) => Err(error.into()),
            None => Err(WgpuError::NoVariant { kernel: "decode" }),
        }
    }
}

pub(super) fn small(field: &'static str, value: usize) -> Result<u32, WgpuError> {
    u32::try_from(value).map_err(|_| {
        pagewise_shaders::Error::TooLarge { kernel: "decode", field, value: value as u64 }.into()
    })
}

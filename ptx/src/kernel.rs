//! What every rendered kernel has: text, entry point, parameters, target, and how it is launched.

use std::fmt;

use minijinja::{Value, context};

use crate::{Error, template};

/// The GPU and driver that a kernel needs at least.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Target {
    /// Lowest compute capability, as in `sm_80`: 80.
    pub sm: u32,
    /// Lowest PTX version, `(major, minor)`: decides how new the driver must be.
    pub ptx: (u32, u32),
    /// Whether it runs on that generation alone, for instructions that no other has: `sm_90a`.
    pub only: bool,
}

impl Target {
    /// A generation and all after it.
    pub const fn from(sm: u32, ptx: (u32, u32)) -> Self {
        Self { sm, ptx, only: false }
    }

    /// One generation alone.
    pub const fn only(sm: u32, ptx: (u32, u32)) -> Self {
        Self { sm, ptx, only: true }
    }

    /// Whether a GPU of a generation runs it.
    pub const fn runs_on(self, sm: u32) -> bool {
        if self.only { self.sm == sm } else { self.sm <= sm }
    }

    /// The generation as PTX spells it: `sm_90a`.
    pub fn name(self) -> String {
        format!("sm_{}{}", self.sm, if self.only { "a" } else { "" })
    }

    /// The CUDA version whose driver first understood this PTX version, as `cuDriverGetVersion`
    /// counts: 12040 for CUDA 12.4.
    pub const fn cuda_version(self) -> u32 {
        let (major, minor) = self.ptx;
        // PTX 7.x came with CUDA 11.x, PTX 8.x with CUDA 12.x, PTX 9.x with CUDA 13.x.
        (major + 4) * 1000 + minor * 10
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (PTX {}.{})", self.name(), self.ptx.0, self.ptx.1)
    }
}

/// The type of a kernel parameter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ParamType {
    /// A device address.
    Pointer,
    /// A 64-bit unsigned integer.
    U64,
    /// A 32-bit unsigned integer.
    U32,
    /// An IEEE binary32.
    F32,
    /// A tensor map (`CUtensorMap`) by value, which the copy engine reads; made by the host's driver.
    TensorMap,
}

impl ParamType {
    /// Bytes that the parameter takes, which is also its alignment; but a tensor map's is 64.
    pub const fn size(self) -> usize {
        match self {
            Self::Pointer | Self::U64 => 8,
            Self::U32 | Self::F32 => 4,
            Self::TensorMap => 128,
        }
    }

    /// The type as PTX spells it.
    pub const fn ptx(self) -> &'static str {
        match self {
            Self::Pointer | Self::U64 => ".u64",
            Self::U32 => ".u32",
            Self::F32 => ".f32",
            Self::TensorMap => ".align 64 .b8",
        }
    }
}

/// One parameter of a kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Param {
    /// Its name in the text, without the `p_` that marks parameters there.
    pub name: &'static str,
    /// Its type.
    pub ty: ParamType,
}

/// The value of one parameter, in a cell that the driver can read it from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Arg {
    cell: u64,
    ty: ParamType,
}

impl Arg {
    /// A device address.
    pub const fn pointer(address: u64) -> Self {
        Self { cell: address, ty: ParamType::Pointer }
    }

    /// A 64-bit unsigned integer.
    pub const fn u64(value: u64) -> Self {
        Self { cell: value, ty: ParamType::U64 }
    }

    /// A 32-bit unsigned integer. The cell holds it in the lower half, which on a little-endian
    /// host (CUDA has no other) is where the driver reads it.
    pub const fn u32(value: u32) -> Self {
        Self { cell: value as u64, ty: ParamType::U32 }
    }

    /// An IEEE binary32.
    pub const fn f32(value: f32) -> Self {
        Self { cell: value.to_bits() as u64, ty: ParamType::F32 }
    }

    /// Its type.
    pub const fn ty(&self) -> ParamType {
        self.ty
    }

    /// The address of the value, for the driver's array of parameter addresses. Valid while `self`
    /// stays where it is.
    pub const fn as_ptr(&self) -> *const u64 {
        &raw const self.cell
    }
}

/// A kernel's parameters in launch order, in one list of `name: Type = value`: makes of it the constant of their
/// descriptions and the function of a launch's values.
macro_rules! parameters {
    (@arg Pointer $value:expr) => { $crate::Arg::pointer($value) };
    (@arg U64 $value:expr) => { $crate::Arg::u64($value) };
    (@arg U32 $value:expr) => { $crate::Arg::u32($value) };
    (@arg F32 $value:expr) => { $crate::Arg::f32($value) };
    (
        $(#[$about:meta])*
        const $PARAMS:ident of $vis:vis fn $Args:ident::$values:ident(&$this:ident $(, $more:ident: $More:ty)*);
        $($name:ident: $ty:ident = $value:expr,)+
    ) => {
        $(#[$about])*
        const $PARAMS: [$crate::Param; [$(stringify!($name)),+].len()] =
            [$($crate::Param { name: stringify!($name), ty: $crate::ParamType::$ty }),+];

        impl $Args {
            /// The values of the parameters, in launch order.
            $vis fn $values(&$this $(, $more: $More)*) -> [$crate::Arg; $PARAMS.len()] {
                [$($crate::kernel::parameters!(@arg $ty $value)),+]
            }
        }
    };
}
pub(crate) use parameters;

/// How a kernel is launched for one shape.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Launch {
    /// Thread blocks along x, y and z.
    pub grid: [u32; 3],
    /// Threads of a block along x, y and z.
    pub block: [u32; 3],
    /// Bytes of dynamic shared memory.
    pub dynamic_shared: u32,
}

/// One variant of a kernel: its text, and what a host must know to load it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kernel {
    pub(crate) family: &'static str,
    pub(crate) entry: String,
    pub(crate) text: String,
    pub(crate) target: Target,
    pub(crate) params: Vec<Param>,
    pub(crate) max_threads: u32,
    pub(crate) static_shared: u32,
    pub(crate) dynamic_shared: u32,
}

impl Kernel {
    /// The family, which is also the name of the template: `write_kv`.
    pub fn family(&self) -> &'static str {
        self.family
    }

    /// The entry point, which names the variant and is unique among all kernels.
    pub fn entry(&self) -> &str {
        &self.entry
    }

    /// The PTX text, a whole module with one entry point.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// The GPU and driver that it needs at least.
    pub fn target(&self) -> Target {
        self.target
    }

    /// The parameters, in launch order.
    pub fn params(&self) -> &[Param] {
        &self.params
    }

    /// The most threads that a block may have (`.maxntid`).
    pub fn max_threads(&self) -> u32 {
        self.max_threads
    }

    /// Bytes of shared memory that the text declares itself.
    pub fn static_shared(&self) -> u32 {
        self.static_shared
    }

    /// Bytes of shared memory that a launch adds to that, at most. Beyond 48 KiB together a host must allow it
    /// when it loads the kernel (`CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES`).
    pub fn dynamic_shared(&self) -> u32 {
        self.dynamic_shared
    }

    /// The text as the assembler sees it: without comments, blank lines and indentation. Two
    /// kernels with the same code have the same machine code.
    pub fn code(&self) -> String {
        let mut code = String::with_capacity(self.text.len());
        for line in self.text.lines() {
            let line = line.split_once("//").map_or(line, |(code, _)| code).trim();
            if !line.is_empty() {
                code.push_str(line);
                code.push('\n');
            }
        }
        code
    }

    /// The descriptor as one line of text: everything but the code. Changes when a host would have
    /// to launch the kernel differently.
    pub fn description(&self) -> String {
        let params: Vec<String> =
            self.params.iter().map(|param| format!("{} {}", param.ty.ptx(), param.name)).collect();
        format!(
            "{} on {}, at most {} threads, {} + {} bytes of shared memory, ({})",
            self.entry,
            self.target,
            self.max_threads,
            self.static_shared,
            self.dynamic_shared,
            params.join(", ")
        )
    }
}

/// What the variants of a family are rendered from.
pub(crate) struct Source {
    /// Family and template name.
    pub(crate) family: &'static str,
    pub(crate) text: &'static str,
    pub(crate) params: &'static [Param],
    pub(crate) max_threads: u32,
    pub(crate) static_shared: u32,
    pub(crate) dynamic_shared: u32,
}

impl Source {
    /// Renders a variant. Beside `variables` the template is told `entry`, `sm`, `ptx_version` and `max_threads`.
    pub(crate) fn render(&self, entry: String, target: Target, variables: Value) -> Result<Kernel, Error> {
        let text = template::render(
            self.family,
            self.text,
            context! {
                entry => &entry,
                sm => target.sm,
                ptx_version => format!("{}.{}", target.ptx.0, target.ptx.1),
                max_threads => self.max_threads,
                ..variables
            },
        )?;
        Ok(Kernel {
            family: self.family,
            entry,
            text,
            target,
            params: self.params.to_vec(),
            max_threads: self.max_threads,
            static_shared: self.static_shared,
            dynamic_shared: self.dynamic_shared,
        })
    }
}

/// A descriptor: a variant and what was rendered for it.
macro_rules! descriptor {
    ($(#[$about:meta])* $name:ident of $spec:ident) => {
        $(#[$about])*
        #[derive(Clone, Debug, PartialEq, Eq)]
        pub struct $name {
            spec: $spec,
            kernel: $crate::Kernel,
        }

        impl $name {
            /// The variant.
            pub fn spec(&self) -> $spec {
                self.spec
            }

            /// The rendered kernel.
            pub fn kernel(&self) -> &$crate::Kernel {
                &self.kernel
            }

            /// The rendered kernel, by value.
            pub fn into_kernel(self) -> $crate::Kernel {
                self.kernel
            }
        }
    };
}
pub(crate) use descriptor;

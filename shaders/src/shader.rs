//! What every rendered kernel has: text, bindings, features, and the size of its workgroups.

/// How a kernel uses a binding.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum BindingKind {
    /// A uniform buffer of so many bytes.
    Uniform {
        /// Bytes.
        size: u32,
    },
    /// A storage buffer that is only read.
    ReadOnly,
    /// A storage buffer that is written.
    ReadWrite,
}

/// One binding of group 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Binding {
    /// Its number.
    pub index: u32,
    /// Its name in the text.
    pub name: &'static str,
    /// How the kernel uses it.
    pub kind: BindingKind,
    /// Bytes of an element of a storage buffer, which its size must be a multiple of.
    pub element_size: u32,
}

/// One variant of a kernel: its text, and what a host must know to compile and bind it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shader {
    pub(crate) family: &'static str,
    pub(crate) name: String,
    pub(crate) text: String,
    pub(crate) bindings: Vec<Binding>,
    pub(crate) workgroup_size: u32,
    pub(crate) needs_f16: bool,
    pub(crate) needs_subgroups: bool,
    pub(crate) needs_matrices: bool,
}

impl Shader {
    /// The family, which is also the name of the template and of the entry point: `write_kv`.
    pub fn family(&self) -> &'static str {
        self.family
    }

    /// The variant's name, unique among all kernels.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The WGSL text, a whole module with one entry point.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// The entry point.
    pub fn entry(&self) -> &str {
        self.family
    }

    /// The bindings, all in group 0.
    pub fn bindings(&self) -> &[Binding] {
        &self.bindings
    }

    /// Invocations of a workgroup, all along x.
    pub fn workgroup_size(&self) -> u32 {
        self.workgroup_size
    }

    /// Whether the device must have the feature `shader-f16`.
    pub fn needs_f16(&self) -> bool {
        self.needs_f16
    }

    /// Whether the device must have subgroup operations.
    pub fn needs_subgroups(&self) -> bool {
        self.needs_subgroups
    }

    /// Whether the device must have cooperative matrices, of the variant's shape. naga translates such a kernel to SPIR-V
    /// and MSL only.
    pub fn needs_matrices(&self) -> bool {
        self.needs_matrices
    }
}

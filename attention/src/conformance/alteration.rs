//! What a test makes of kernels' texts before they are loaded: planted faults and delays. Owns none of them.

use std::fmt;

/// Gets a kernel's entry point and text, gives the text to load.
pub(crate) struct Alteration(Box<AlterText>);

type AlterText = dyn Fn(&str, &str) -> String + Send + Sync;

impl Alteration {
    pub(crate) fn new(alter: impl Fn(&str, &str) -> String + Send + Sync + 'static) -> Self {
        Self(Box::new(alter))
    }

    /// The text to load.
    pub(crate) fn text(&self, entry: &str, text: &str) -> String {
        (self.0)(entry, text)
    }
}

impl fmt::Debug for Alteration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Alteration")
    }
}

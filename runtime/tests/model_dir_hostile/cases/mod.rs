//! The table: what is done to a copy of a fixture, and the message. DIR stands for the directory.

mod configuration;
mod families;
mod files;
mod weights;

use crate::spoil::Spoil;

/// A name, what is done, and the message.
pub(crate) type Case = (&'static str, Spoil, &'static str);

/// Each with its fixture.
pub(crate) fn cases() -> Vec<(&'static str, Case)> {
    let llama = [files::cases(), configuration::cases(), weights::cases()];
    llama.into_iter().flatten().map(|case| ("llama_gqa", case)).chain(families::cases()).collect()
}

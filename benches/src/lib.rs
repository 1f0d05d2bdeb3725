//! Nothing of its own: this package holds the benches under `benches/` and the figures of others under `peers/`.

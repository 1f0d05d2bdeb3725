//! Two samples of one prompt: they share its blocks until one of them writes into a shared one.
//!
//! ```sh
//! cargo run -p pagewise-kvcache --example 02-fork-and-write
//! ```

use pagewise_kvcache::{CacheConfig, CacheError, CacheManager, KvCacheManager, KvGroup, Prompt, SequenceId};

fn main() -> Result<(), CacheError> {
    let mut cache = KvCacheManager::new(CacheConfig {
        block_size: 4,
        device_blocks: 8,
        host_blocks: 0,
        groups: vec![KvGroup { window: None }],
        watermark: 0.0,
        prefix_cache: true,
    })?;
    let (first, second) = (SequenceId(1), SequenceId(2));
    let tokens = [1, 2, 3, 4, 5, 6];
    cache.allocate(first, Prompt { tokens: &tokens, salt: 0, use_prefix_cache: true })?;
    cache.mark_computed(first, &tokens)?;

    // A fork takes no block.
    cache.fork(first, second)?;
    println!("first  {:?}", cache.block_table(first, 0));
    println!("second {:?}, {} blocks used", cache.block_table(second, 0), cache.device_usage().used);

    // Both get a slot for their own next token. The first writer's copy of the last block appears in the
    // step's block ops; the second is then alone with the original and writes in place.
    cache.append(first, 1)?;
    cache.append(second, 1)?;
    let ops = cache.take_block_ops();
    println!("copies before the step: {:?}", ops.copy);

    // The backend has copied, the model has run: report both. Until then the two blocks were pending.
    println!("pending {}", cache.device_usage().pending);
    cache.confirm_block_ops()?;
    cache.mark_computed(first, &[7])?;
    cache.mark_computed(second, &[8])?;
    println!("first  {:?}", cache.block_table(first, 0));
    println!("second {:?}, {:?}", cache.block_table(second, 0), cache.device_usage());
    Ok(())
}

//! A group that has to make room goes to the host and returns, with its sharing.
//!
//! ```sh
//! cargo run -p pagewise-kvcache --example 04-swap
//! ```

use pagewise_kvcache::{CacheConfig, CacheError, CacheManager, KvCacheManager, KvGroup, Prompt, SequenceId};

fn main() -> Result<(), CacheError> {
    let mut cache = KvCacheManager::new(CacheConfig {
        block_size: 4,
        device_blocks: 6,
        host_blocks: 6,
        groups: vec![KvGroup { window: None }],
        watermark: 0.0,
        prefix_cache: false,
    })?;
    let group = [SequenceId(1), SequenceId(2)];
    let tokens: Vec<u32> = (0..8).collect();
    cache.allocate(group[0], Prompt { tokens: &tokens, salt: 0, use_prefix_cache: true })?;
    cache.mark_computed(group[0], &tokens)?;
    cache.fork(group[0], group[1])?;
    for sequence in group {
        cache.append(sequence, 1)?;
        cache.mark_computed(sequence, &[100])?;
    }
    println!("running: {:?}", cache.device_usage());

    // Out: four distinct blocks, though the two tables have six entries.
    cache.swap_out(&group)?;
    let ops = cache.take_block_ops();
    println!("swap out {:?}", ops.swap_out);
    println!("under way: device {:?}, host {:?}", cache.device_usage(), cache.host_usage());
    cache.confirm_block_ops()?;
    println!("done: device {:?}, host {:?}", cache.device_usage(), cache.host_usage());

    // In again, as soon as there is room; the first two blocks are shared as before.
    println!("may it return? {:?}", cache.can_swap_in(&group));
    cache.swap_in(&group)?;
    println!("swap in {:?}", cache.take_block_ops().swap_in);
    cache.confirm_block_ops()?;
    for sequence in group {
        println!("{:?}: {:?}", sequence, cache.block_table(sequence, 0));
    }
    Ok(())
}

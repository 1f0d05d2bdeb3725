//! A prompt gets its blocks, and every generated token a slot.
//!
//! ```sh
//! cargo run -p pagewise-kvcache --example 01-allocate-and-append
//! ```

use pagewise_kvcache::{
    Admission, CacheConfig, CacheError, CacheManager, KvCacheManager, KvGroup, Prompt, SequenceId,
};

fn main() -> Result<(), CacheError> {
    let mut cache = KvCacheManager::new(CacheConfig {
        block_size: 4,
        device_blocks: 8,
        host_blocks: 0,
        groups: vec![KvGroup { window: None }],
        watermark: 0.0,
        prefix_cache: false,
    })?;
    let sequence = SequenceId(1);
    let tokens = [101, 102, 103, 104, 105, 106];
    let prompt = Prompt { tokens: &tokens, salt: 0, use_prefix_cache: true };

    // Ask, then take: six tokens need two blocks of four.
    assert_eq!(cache.can_allocate(&[prompt]), Admission::Now);
    cache.allocate(sequence, prompt)?;
    cache.mark_computed(sequence, &tokens)?;
    println!("prompt of 6 tokens: blocks {:?}", cache.block_table(sequence, 0));

    // The 7th and 8th token fit into the second block, the 9th needs a third one.
    for token in [107, 108, 109] {
        cache.append(sequence, 1)?;
        cache.mark_computed(sequence, &[token])?;
        println!("{} tokens: blocks {:?}", cache.len(sequence).unwrap_or(0), cache.block_table(sequence, 0));
    }

    // Where a kernel writes the key and value of token 8.
    if let Some(table) = cache.block_table(sequence, 0) {
        let position = 8;
        println!("token {position} is in slot {}", table[position / 4] as usize * 4 + position % 4);
    }

    // What cannot be had is refused with the reason, and nothing changes.
    let refused = cache.append(sequence, 1000);
    println!("1000 more: {}", refused.err().map_or(String::new(), |error| error.to_string()));

    cache.free(sequence)?;
    println!("after free: {:?}", cache.device_usage());
    Ok(())
}

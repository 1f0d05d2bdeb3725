//! A system prompt that many requests begin with is computed once.
//!
//! ```sh
//! cargo run -p pagewise-kvcache --example 03-prefix-hits
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
    let system: Vec<u32> = (1..=8).collect();

    // Each request computes what is not cached, and leaves its own blocks behind.
    for (request, question) in [[50, 51, 52], [60, 61, 62]].iter().enumerate() {
        let tokens = [system.as_slice(), question].concat();
        let sequence = SequenceId(request as u64);
        let found = cache.allocate(sequence, Prompt { tokens: &tokens, salt: 0, use_prefix_cache: true })?;
        println!("request {request}: {} of {} tokens cached", found.cached_tokens, tokens.len());
        cache.mark_computed(sequence, &tokens[found.cached_tokens..])?;
        cache.free(sequence)?;
    }

    // Another tenant's salt sees nothing of it, and prompt logprobs look away on purpose.
    let salted = Prompt { tokens: &system, salt: 42, use_prefix_cache: true };
    let bypass = Prompt { tokens: &system, salt: 0, use_prefix_cache: false };
    println!(
        "other salt: {} cached; bypass: {} cached",
        cache.cached_tokens(&salted),
        cache.cached_tokens(&bypass)
    );

    // A pinned prefix stays, whatever comes.
    let prefix = Prompt { tokens: &system, salt: 0, use_prefix_cache: true };
    let pin = cache.pin_prefix(prefix)?;
    println!("{} tokens pinned", pin.tokens);
    let long: Vec<u32> = (1000..1024).collect();
    cache.allocate(SequenceId(9), Prompt { tokens: &long, salt: 0, use_prefix_cache: true })?;
    cache.free(SequenceId(9))?;
    let again = [system.as_slice(), &[70]].concat();
    let prompt = Prompt { tokens: &again, salt: 0, use_prefix_cache: true };
    println!("after a flood: {} tokens cached", cache.cached_tokens(&prompt));
    cache.unpin_prefix(pin.id)?;

    // New weights: everything cached is worthless.
    println!("reset forgot {} blocks", cache.reset_prefix_cache()?);
    println!("{:?}", cache.stats());
    Ok(())
}

//! The other way to make room: drop a group at once, and rebuild it later from its tokens.
//!
//! ```sh
//! cargo run -p pagewise-kvcache --example 05-recompute
//! ```

use pagewise_kvcache::{
    Admission, CacheConfig, CacheError, CacheManager, KvCacheManager, KvGroup, Prompt, RebuildStep,
    SequenceId,
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
    let group = [SequenceId(0), SequenceId(1)];
    // The engine keeps the tokens; the cache only knows where they live.
    let mut texts = vec![(0..8).collect::<Vec<u32>>(); 2];
    cache.allocate(group[0], Prompt { tokens: &texts[0], salt: 0, use_prefix_cache: true })?;
    cache.mark_computed(group[0], &texts[0])?;
    cache.fork(group[0], group[1])?;
    for (sequence, text) in group.into_iter().zip(&mut texts) {
        let token = 100 + sequence.0 as u32;
        cache.append(sequence, 1)?;
        cache.mark_computed(sequence, &[token])?;
        text.push(token);
    }
    let before = cache.device_usage().used;

    let plan = cache.drop_for_recompute(&group)?;
    println!("{} blocks free again at once", plan.freed_blocks);

    // Later: is there room, and which steps restore it?
    assert_eq!(cache.can_rebuild(&plan), Admission::Now);
    for step in plan.steps {
        println!("{step:?}");
        match step {
            RebuildStep::Grow { sequence, len, computed } => {
                let text = &texts[sequence.0 as usize];
                match cache.len(sequence) {
                    Some(has) => cache.append(sequence, len - has)?,
                    None => {
                        let prompt = Prompt { tokens: &text[..len], salt: 0, use_prefix_cache: true };
                        cache.allocate(sequence, prompt)?;
                    }
                }
                // Here the model runs over the tokens that are not computed yet.
                let has = cache.computed(sequence).unwrap_or(0);
                cache.mark_computed(sequence, text.get(has..computed).unwrap_or(&[]))?;
            }
            RebuildStep::Fork { parent, child } => cache.fork(parent, child)?,
            RebuildStep::Truncate { sequence, len } => cache.truncate(sequence, len)?,
        }
    }
    println!("{before} blocks before, {} after", cache.device_usage().used);
    Ok(())
}

//! Delays of random length before a kernel draws its merge ticket, so that thread blocks finish in any order.

/// The comment on the line that must come late.
pub const MARK: &str = "// ticket";

/// Up to 16 us for half of the warps, none for the others; by thread block and clock, so that no two runs are alike.
const DELAY: &str = "    {
    .reg .b32 %r_delay, %r_delay_x;
    .reg .pred %p_delay;
    mov.u32 %r_delay, %clock;
    mov.u32 %r_delay_x, %ctaid.x;
    mad.lo.u32 %r_delay, %r_delay_x, 0x9e3779b9, %r_delay;
    mov.u32 %r_delay_x, %ctaid.y;
    mad.lo.u32 %r_delay, %r_delay_x, 0x85ebca6b, %r_delay;
    mov.u32 %r_delay_x, %ctaid.z;
    mad.lo.u32 %r_delay, %r_delay_x, 0xc2b2ae35, %r_delay;
    shr.u32 %r_delay_x, %r_delay, 16;
    xor.b32 %r_delay, %r_delay, %r_delay_x;
    mul.lo.u32 %r_delay, %r_delay, 0x7feb352d;
    shr.u32 %r_delay_x, %r_delay, 15;
    xor.b32 %r_delay, %r_delay, %r_delay_x;
    and.b32 %r_delay_x, %r_delay, 0x10000;
    setp.ne.u32 %p_delay, %r_delay_x, 0;
    and.b32 %r_delay, %r_delay, 0x3fff;
    @%p_delay nanosleep.u32 %r_delay;
    }
";

/// The text with a delay before each marked line, and how many there are.
pub fn with_delays(text: &str) -> (String, usize) {
    let mut delayed = String::with_capacity(text.len());
    let mut count = 0;
    for line in text.split_inclusive('\n') {
        if line.trim_end().ends_with(MARK) || line.contains(&format!("{MARK}:")) {
            delayed.push_str(DELAY);
            count += 1;
        }
        delayed.push_str(line);
    }
    (delayed, count)
}

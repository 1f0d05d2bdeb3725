//! Calls into code that may panic on hostile input, turned into errors, without a word on stderr.

use std::{
    cell::Cell,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Once,
};

thread_local! {
    static QUIET: Cell<bool> = const { Cell::new(false) };
}

/// Runs `call`; a panic inside of it becomes `Err` with the panic's message. Panics of other threads are reported
/// as ever: the hook that is put in front of the present one steps aside for them. `call` must not leave shared
/// state half changed when it panics.
pub(crate) fn catch<T>(call: impl FnOnce() -> T) -> Result<T, String> {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let previous = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            if !QUIET.with(Cell::get) {
                previous(info);
            }
        }));
    });
    let outer = QUIET.replace(true);
    let result = catch_unwind(AssertUnwindSafe(call));
    QUIET.set(outer);
    result.map_err(|payload| {
        let text = payload.downcast_ref::<String>().map(String::as_str);
        text.or_else(|| payload.downcast_ref::<&str>().copied()).unwrap_or("no message").to_owned()
    })
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_panic_becomes_its_message() {
        assert_eq!(super::catch(|| 3), Ok(3));
        assert_eq!(super::catch(|| panic!("at {}", 7)), Err::<(), _>("at 7".to_owned()));
        assert_eq!(super::catch(|| std::panic::panic_any(7)), Err::<(), _>("no message".to_owned()));
    }
}

//! Stop strings in a stream of text: finds them across token boundaries and holds back what may become one.
//!
//! Each stop string is a Knuth–Morris–Pratt automaton over bytes, so a byte costs O(1) amortised per stop
//! string. A stop string begins with a whole character, hence so does everything that is held back: what is
//! released always ends between characters.

/// Matches the stop strings of one completion.
#[derive(Clone, Debug)]
pub(super) struct StopMatcher {
    automata: Vec<Automaton>,
    /// Text that was pushed and not released.
    held: String,
}

#[derive(Clone, Debug)]
struct Automaton {
    pattern: Vec<u8>,
    /// `border[i]`: length of the longest proper prefix of `pattern[..=i]` that is also its suffix.
    border: Vec<usize>,
    /// Length of the longest prefix of the pattern that the text so far ends with.
    matched: usize,
}

/// What a push releases.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Released {
    /// Text that can be shown.
    pub(super) text: String,
    /// A stop string is complete; the text ends before it and nothing may follow.
    pub(super) stopped: bool,
}

impl StopMatcher {
    /// A matcher of these strings, none of them empty.
    pub(super) fn new(stops: &[String]) -> Self {
        Self { automata: stops.iter().map(|stop| Automaton::new(stop)).collect(), held: String::new() }
    }

    /// Adds text. Of several stop strings the one that is complete first ends the text, the longest of those
    /// that are complete at the same character: the result does not depend on how the text is cut into pieces.
    pub(super) fn push(&mut self, piece: &str) -> Released {
        if self.automata.is_empty() {
            return Released { text: piece.to_owned(), stopped: false };
        }
        let already = self.held.len();
        self.held.push_str(piece);
        for (offset, &byte) in piece.as_bytes().iter().enumerate() {
            let complete = self.automata.iter_mut().filter_map(|automaton| automaton.advance(byte)).max();
            if let Some(length) = complete {
                // A match lies within what is held: its beginning was held back as a partial match.
                let begin = (already + offset + 1).saturating_sub(length);
                self.held.truncate(begin);
                return Released { text: std::mem::take(&mut self.held), stopped: true };
            }
        }
        let partial = self.automata.iter().map(|automaton| automaton.matched).max().unwrap_or(0);
        let rest = self.held.split_off(self.held.len().saturating_sub(partial));
        Released { text: std::mem::replace(&mut self.held, rest), stopped: false }
    }

    /// Releases what is held: no stop string came.
    pub(super) fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

impl Automaton {
    fn new(pattern: &str) -> Self {
        let pattern = pattern.as_bytes().to_vec();
        let mut border = Vec::with_capacity(pattern.len());
        let mut length = 0;
        for (index, &byte) in pattern.iter().enumerate() {
            if index > 0 {
                length = extend(&pattern, &border, length, byte);
            }
            border.push(length);
        }
        Self { pattern, border, matched: 0 }
    }

    /// The pattern's length, if this byte completes it.
    fn advance(&mut self, byte: u8) -> Option<usize> {
        self.matched = extend(&self.pattern, &self.border, self.matched, byte);
        (self.matched == self.pattern.len()).then_some(self.matched)
    }
}

/// The longest prefix of the pattern that ends a text which ended with the prefix of length `matched`, a proper
/// one, and now has one byte more.
fn extend(pattern: &[u8], border: &[usize], mut matched: usize, byte: u8) -> usize {
    loop {
        if pattern.get(matched) == Some(&byte) {
            return matched + 1;
        }
        match matched.checked_sub(1).and_then(|last| border.get(last)) {
            Some(&shorter) => matched = shorter,
            None => return 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sampling::Draw;

    /// The text up to the stop string that is complete first (the longest of those), by trying all places.
    fn plain(text: &str, stops: &[String]) -> Option<String> {
        (1..=text.len()).find_map(|end| {
            let ending = stops.iter().filter(|stop| text.as_bytes()[..end].ends_with(stop.as_bytes()));
            ending.map(|stop| text[..end - stop.len()].to_owned()).min_by_key(String::len)
        })
    }

    #[test]
    fn agrees_with_plain_search_however_the_text_is_cut() {
        let alphabet = ["a", "b", "é", "🙂"];
        for case in 0..3000u64 {
            let mut position = 0;
            let mut below = |n: u64| {
                position += 1;
                (Draw { seed: case, sample: 0, position }.uniform() * n as f64) as u64
            };
            let mut word = |longest: u64| {
                let letters = 1 + below(longest);
                (0..letters).map(|_| alphabet[below(4) as usize]).collect::<String>()
            };
            let stops: Vec<String> = (0..case % 4).map(|_| word(4)).collect();
            let pieces: Vec<String> = (0..20).map(|_| word(3)).collect();
            let text = pieces.concat();
            let expected = plain(&text, &stops);

            let mut matcher = StopMatcher::new(&stops);
            let (mut pushed, mut shown, mut stopped) = (String::new(), String::new(), false);
            for piece in &pieces {
                let released = matcher.push(piece);
                shown.push_str(&released.text);
                if released.stopped {
                    stopped = true;
                    break;
                }
                // What may become a stop string is not shown, and all else is.
                pushed.push_str(piece);
                let partial = stops
                    .iter()
                    .flat_map(|stop| stop.char_indices().map(|(cut, _)| &stop[..cut]))
                    .filter(|beginning| pushed.ends_with(beginning))
                    .map(str::len)
                    .max();
                assert_eq!(shown, pushed[..pushed.len() - partial.unwrap_or(0)], "case {case}: {stops:?}");
            }
            if !stopped {
                shown.push_str(&matcher.finish());
            }
            assert_eq!(stopped, expected.is_some(), "case {case}: {text:?}, {stops:?}");
            assert_eq!(shown, expected.unwrap_or(text), "case {case}: {stops:?}");
        }
    }

    #[test]
    fn without_stop_strings_everything_passes() {
        let mut matcher = StopMatcher::new(&[]);
        assert_eq!(matcher.push("abc"), Released { text: "abc".into(), stopped: false });
        assert_eq!(matcher.finish(), "");
    }
}

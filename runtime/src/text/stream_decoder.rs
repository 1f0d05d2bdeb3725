//! Text of a growing sequence of tokens, piece by piece.
//!
//! A token's text depends on its neighbours: characters are split over tokens, and many decoders treat the first
//! token of a sequence apart. So a window of recent tokens is decoded with and without the new one, and what the
//! new one adds is the difference. The window moves on at the ends of characters, so that the work a token costs
//! does not grow with the text.

use super::{Tokenizer, tokenizer::TokenRole};

const REPLACEMENT: char = char::REPLACEMENT_CHARACTER;
/// Invalid bytes can go on for ever without an end of a character. After this many tokens the window moves all
/// the same; more than a character has bytes, and each token has at least one.
const MAX_UNFINISHED: usize = 16;

/// Decodes a stream of tokens. The pieces joined are what [`Tokenizer::decode`] makes of all tokens at once,
/// special tokens skipped; no piece holds a part of a character.
///
/// Where the tokenizer spells unknown characters in byte tokens (`<0xE5>`), a run of these is given out when it
/// has ended: its decoder makes the whole run invalid if one byte of it is.
#[derive(Clone, Debug)]
pub struct StreamDecoder {
    tokenizer: Tokenizer,
    /// Tokens whose text the next one's may depend on, none of them special.
    window: Vec<u32>,
    /// So many tokens of the window have been there when it last ended with a whole character.
    settled: usize,
    /// Bytes of the window's text that have been given out.
    given: usize,
}

impl StreamDecoder {
    /// At the beginning of a text.
    pub fn new(tokenizer: &Tokenizer) -> Self {
        Self { tokenizer: tokenizer.clone(), window: Vec::new(), settled: 0, given: 0 }
    }

    /// Takes the next token and gives out what is now certain; empty in the midst of a character.
    pub fn push(&mut self, id: u32) -> String {
        let role = self.tokenizer.role(id);
        if role == TokenRole::None {
            return String::new();
        }
        self.window.push(id);
        if role == TokenRole::Byte {
            return String::new();
        }
        let text = self.decode(0);
        // One replacement character at the end may be the beginning of a character; those before it are final.
        let whole = text.strip_suffix(REPLACEMENT).unwrap_or(&text).len();
        let piece = text.get(self.given..whole).unwrap_or_default().to_owned();
        self.given = self.given.max(whole);
        if whole == text.len() {
            self.advance(self.settled, 0);
        } else if self.window.len().saturating_sub(self.settled) > MAX_UNFINISHED {
            self.advance(self.window.len() - MAX_UNFINISHED / 2, REPLACEMENT.len_utf8());
        }
        piece
    }

    /// Gives out what was held back: the text has ended.
    pub fn finish(&mut self) -> String {
        let text = self.decode(0);
        let piece = text.get(self.given..).unwrap_or_default().to_owned();
        *self = Self::new(&self.tokenizer);
        piece
    }

    /// Lets the window begin at `first`, where `held_back` bytes at its end have not been given out.
    fn advance(&mut self, first: usize, held_back: usize) {
        let text = self.decode(first);
        // A beginning without text would pass for the beginning of the whole text.
        if first > 0 && text.len() > held_back {
            self.window.drain(..first);
            self.settled = self.settled.saturating_sub(first);
            self.given = text.len() - held_back;
        }
        if held_back == 0 {
            self.settled = self.window.len();
        }
    }

    /// Tokens that cannot be decoded have no text: what a stream has begun it goes on with.
    fn decode(&self, first: usize) -> String {
        let tokens = self.window.get(first..).unwrap_or_default();
        self.tokenizer.decode(tokens, true).unwrap_or_default()
    }
}

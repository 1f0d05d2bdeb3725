//! Asks for the memory of keys and values before they are used, in the order in which the loops use them.
//!
//! A processor follows a stream of reads by itself only as far as the end of a page, and blocks lie anywhere; so
//! the loops ask for each row a strip ahead, a few cache lines at a time.

use super::kernel::RowPointers;
use super::lanes::Lanes;
use std::ops::Range;

/// Rows of a chunk's keys or values that will be read.
pub(super) struct Coming<'a, T> {
    /// A token's row of the first head.
    pub(super) pointers: &'a RowPointers<T>,
    /// The tokens, as places in their chunk.
    pub(super) tokens: Range<usize>,
    /// Elements of a row.
    pub(super) dim: usize,
    /// Elements from a head to the next.
    pub(super) head_stride: usize,
}

/// What a group reads of a chunk, and of the next one's keys.
pub(super) struct Ahead<'a, T> {
    /// Keys, values, and the next chunk's keys.
    streams: [Coming<'a, T>; 3],
    heads: usize,
    /// Tokens of a strip.
    strip: usize,
    /// Whether a head's tokens lie side by side, rather than a token's heads.
    head_major: bool,
    /// The stream, strip, token and head of the row that is asked for next, or no stream if there is none.
    stream: usize,
    tokens: Range<usize>,
    token: usize,
    head: usize,
    /// Parts of a row that have been used and not yet made up for.
    credit: usize,
}

impl<'a, T> Ahead<'a, T> {
    /// Begins with the keys.
    pub(super) fn new(streams: [Coming<'a, T>; 3], heads: usize, strip: usize, head_major: bool) -> Self {
        let (stream, tokens, token, head, credit) = (0, 0..0, 0, 0, 0);
        let mut ahead = Self { streams, heads, strip, head_major, stream, tokens, token, head, credit };
        ahead.enter(0, None);
        ahead
    }

    /// Moves to the strip of a stream that begins at a token, or to the stream's first; and on to the next
    /// stream if there is none.
    #[inline(always)]
    fn enter(&mut self, stream: usize, token: Option<usize>) {
        (self.stream, self.head) = (stream, 0);
        let mut token = token;
        while let Some(coming) = self.streams.get(self.stream) {
            let start = token.unwrap_or(coming.tokens.start);
            if start < coming.tokens.end {
                let end = coming.tokens.end.min((start / self.strip + 1) * self.strip);
                (self.tokens, self.token) = (start..end, start);
                return;
            }
            (self.stream, token) = (self.stream + 1, None);
        }
    }

    /// Passes over the first strip, which has been asked for, or asks for it at once.
    #[inline(always)]
    pub(super) fn first_strip<L: Lanes>(&mut self, was_asked_for: bool) {
        match was_asked_for {
            true => self.enter(self.stream, Some(self.tokens.end)),
            false => self.used::<L>(self.tokens.len() * self.heads, 1),
        }
    }

    /// Asks for as many rows as are being used: `parts` of which `whole` make one.
    #[inline(always)]
    pub(super) fn used<L: Lanes>(&mut self, parts: usize, whole: usize) {
        self.credit += parts;
        while self.credit >= whole {
            self.credit -= whole;
            self.row::<L>();
        }
    }

    #[inline(always)]
    fn row<L: Lanes>(&mut self) {
        const LINE: usize = 64;
        let Some(coming) = self.streams.get(self.stream) else { return };
        let Some(row) = coming.pointers.get(self.token) else { return };
        let row = row.wrapping_add(self.head * coming.head_stride).cast::<u8>();
        let mut at = 0;
        while at < coming.dim * size_of::<T>() {
            L::prefetch(row.wrapping_add(at));
            at += LINE;
        }
        let (first, end) = (self.tokens.start, self.tokens.end);
        (self.token, self.head) = match self.head_major {
            true if self.token + 1 < end => (self.token + 1, self.head),
            true if self.head + 1 < self.heads => (first, self.head + 1),
            false if self.head + 1 < self.heads => (self.token, self.head + 1),
            false if self.token + 1 < end => (self.token + 1, 0),
            _ => return self.enter(self.stream, Some(end)),
        };
    }
}

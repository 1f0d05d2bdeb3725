//! Asks for the memory of keys and values before they are used, in the order in which the loops use them.
//!
//! A processor follows a stream of reads by itself only as far as the end of a page, and blocks lie anywhere; so
//! the loops ask for each row a strip ahead, a few cache lines at a time.

use super::kernel::RowPointers;
use super::lanes::Lanes;
use std::ops::Range;

const LINE: usize = 64;

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

impl<T> Coming<'_, T> {
    fn lines(&self) -> usize {
        (self.dim * size_of::<T>()).div_ceil(LINE)
    }
}

/// What a group reads of a chunk, and of the next one's keys.
pub(super) struct Ahead<'a, T> {
    /// Keys, values, and the next chunk's keys.
    pub(super) streams: [Coming<'a, T>; 3],
    pub(super) heads: usize,
    /// Tokens of a strip.
    pub(super) strip: usize,
    /// Whether a head's tokens lie side by side, rather than a token's heads.
    pub(super) head_major: bool,
    cursor: Cursor,
}

/// The line that is asked for next.
#[derive(Clone, Copy, Default)]
struct Cursor {
    stream: usize,
    strip: (usize, usize),
    token: usize,
    head: usize,
    line: usize,
}

impl<'a, T> Ahead<'a, T> {
    /// Begins with the keys.
    pub(super) fn new(streams: [Coming<'a, T>; 3], heads: usize, strip: usize, head_major: bool) -> Self {
        let mut ahead = Self { streams, heads, strip, head_major, cursor: Cursor::default() };
        ahead.enter(0, None);
        ahead
    }

    /// Moves to the strip of a stream that begins at `token`, or to the stream's first; and on to the next
    /// stream if there is none.
    #[inline(always)]
    fn enter(&mut self, stream: usize, token: Option<usize>) {
        let mut at = (stream, token);
        while let Some(coming) = self.streams.get(at.0) {
            let start = at.1.unwrap_or(coming.tokens.start);
            if start < coming.tokens.end {
                let end = coming.tokens.end.min((start / self.strip + 1) * self.strip);
                self.cursor = Cursor { stream: at.0, strip: (start, end), token: start, head: 0, line: 0 };
                return;
            }
            at = (at.0 + 1, None);
        }
        self.cursor.stream = self.streams.len();
    }

    /// Passes over the first strip, which has been asked for, or asks for it at once.
    #[inline(always)]
    pub(super) fn first_strip<L: Lanes>(&mut self, was_asked_for: bool) {
        let (start, end) = self.cursor.strip;
        match was_asked_for {
            true => self.enter(self.cursor.stream, Some(end)),
            false => self.rows::<L>((end - start) * self.heads, 1),
        }
    }

    /// Asks for the lines of `rows / parts` rows.
    #[inline(always)]
    pub(super) fn rows<L: Lanes>(&mut self, rows: usize, parts: usize) {
        let Some(coming) = self.streams.get(self.cursor.stream) else { return };
        for _ in 0..(rows * coming.lines()).div_ceil(parts) {
            self.line::<L>();
        }
    }

    #[inline(always)]
    fn line<L: Lanes>(&mut self) {
        let Some(coming) = self.streams.get(self.cursor.stream) else { return };
        let Cursor { stream, strip: (start, end), token, head, line } = self.cursor;
        let Some(row) = coming.pointers.get(token) else { return };
        let row = row.wrapping_add(head * coming.head_stride).cast::<u8>();
        L::prefetch(row.wrapping_add(line * LINE));
        if line + 1 < coming.lines() {
            self.cursor.line += 1;
            return;
        }
        let (token, head) = match self.head_major {
            true if token + 1 < end => (token + 1, head),
            true if head + 1 < self.heads => (start, head + 1),
            false if head + 1 < self.heads => (token, head + 1),
            false if token + 1 < end => (token + 1, 0),
            _ => return self.enter(stream, Some(end)),
        };
        self.cursor = Cursor { token, head, line: 0, ..self.cursor };
    }
}

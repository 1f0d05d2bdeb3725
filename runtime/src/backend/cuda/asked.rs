//! What a step's rows ask for, as the lists that the kernels read, and what came back as the rows' answers.
//!
//! Owns the arithmetic and the layout of both; memory and launches are `choose.rs`'s.

use pagewise_attention::cuda::ptx::model::argmax::NO_TOKEN;
use pagewise_attention::cuda::ptx::model::penalize::NOT_HELD;
use pagewise_attention::cuda::ptx::model::sample::RowDraw;
use pagewise_attention::cuda::ptx::model::top_candidates::MOST;

use crate::executor::{
    CandidatesOutput, CandidatesWanted, LogitChanges, RowOutput, RowWanted, TokenOutput, TokenWanted,
};
use crate::request::{PositionLogprobs, TokenLogprob};
use crate::sampling::Normaliser;
use crate::sampling::beam::Candidate;

/// Whether the kernels can answer this.
pub(super) fn answers(wanted: &RowWanted) -> bool {
    let fits = |count: usize| count <= MOST as usize;
    match wanted {
        RowWanted::Logits | RowWanted::Nothing => true,
        RowWanted::Token(token) => fits(token.logprobs.unwrap_or(0)),
        RowWanted::Logprobs { top, .. } => fits(*top),
        // With bias and penalties a beam's candidates are those of log-probabilities that were changed, which is the
        // host's to do.
        RowWanted::Candidates(beam) => {
            fits(beam.count) && beam.count > 0 && fits(beam.logprobs.unwrap_or(0)) && beam.changes.is_empty()
        }
    }
}

/// What is read of a row.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Reading {
    Logits,
    Nothing,
    /// The token; with log-probabilities and so many of the likeliest.
    Token(Option<Top>),
    /// A token that was known, and the likeliest.
    Known(Top),
    /// Candidates, how many of them, and whether log-probabilities are wanted: how many.
    Beam {
        list: usize,
        count: usize,
        top: Option<usize>,
    },
}

/// The likeliest tokens of a row: which list, and how many of it.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Top {
    list: Option<usize>,
    count: usize,
}

/// What all rows of a step ask for.
#[derive(Debug, Default)]
pub(super) struct Asked {
    readings: Vec<Reading>,
    /// Whether a row takes its likeliest token.
    pub(super) greedy: bool,
    pub(super) draws: Vec<RowDraw>,
    /// (row, token, bias, times)
    pub(super) changes: Vec<[u32; 4]>,
    /// Penalties of each row; empty without changes.
    pub(super) factors: Vec<[f32; 3]>,
    /// Whether a row with changes wants log-probabilities as well, which are those of the logits before.
    pub(super) keeps_logits: bool,
    /// (row, token)
    pub(super) known: Vec<(usize, u32)>,
    /// (row, how many of the likeliest)
    pub(super) lists: Vec<[u32; 2]>,
    /// Whether log-probabilities are wanted at all.
    pub(super) logprobs: bool,
}

impl Asked {
    /// Of so many rows; those beyond `wanted` are logits.
    pub(super) fn new(wanted: &[RowWanted], rows: usize) -> Self {
        let mut asked = Self::default();
        for row in 0..rows {
            let wanted = wanted.get(row).filter(|&wanted| answers(wanted)).unwrap_or(&RowWanted::Logits);
            let reading = asked.ask(row, wanted, rows);
            asked.readings.push(reading);
        }
        asked
    }

    fn ask(&mut self, row: usize, wanted: &RowWanted, rows: usize) -> Reading {
        match wanted {
            RowWanted::Logits => Reading::Logits,
            RowWanted::Nothing => Reading::Nothing,
            RowWanted::Token(TokenWanted { sampling, changes, logprobs }) => {
                if sampling.is_greedy() {
                    self.greedy = true;
                } else {
                    self.draws.push(RowDraw {
                        row: row as u32,
                        temperature: sampling.temperature,
                        top_k: u32::try_from(sampling.top_k).unwrap_or(0),
                        top_p: sampling.top_p,
                        min_p: sampling.min_p,
                        uniform: sampling.draw.uniform(),
                    });
                }
                if !changes.is_empty() {
                    self.change(row, changes, rows);
                    self.keeps_logits |= logprobs.is_some();
                }
                Reading::Token(logprobs.map(|count| self.top(row, count)))
            }
            RowWanted::Logprobs { token_id, top } => {
                self.known.push((row, *token_id));
                Reading::Known(self.top(row, *top))
            }
            RowWanted::Candidates(CandidatesWanted { count, logprobs, .. }) => {
                let both = (*count).max(logprobs.unwrap_or(0));
                let Top { list, .. } = self.top(row, both);
                match list {
                    Some(list) => Reading::Beam { list, count: *count, top: *logprobs },
                    None => Reading::Logits,
                }
            }
        }
    }

    fn change(&mut self, row: usize, changes: &LogitChanges, rows: usize) {
        self.factors.resize(rows, [1.0, 0.0, 0.0]);
        if let Some(factors) = self.factors.get_mut(row) {
            *factors = [changes.repetition_penalty, changes.presence_penalty, changes.frequency_penalty];
        }
        self.changes.extend(changes.tokens.iter().map(|change| {
            [row as u32, change.token_id, change.bias.to_bits(), change.held.unwrap_or(NOT_HELD)]
        }));
    }

    fn top(&mut self, row: usize, count: usize) -> Top {
        self.logprobs = true;
        if count == 0 {
            return Top { list: None, count };
        }
        self.lists.push([row as u32, count as u32]);
        Top { list: Some(self.lists.len() - 1), count }
    }

    /// Whether the device has anything to choose or to find.
    pub(super) fn is_empty(&self) -> bool {
        !self.greedy && self.draws.is_empty() && !self.logprobs
    }

    /// Whether a row is wanted as it is.
    pub(super) fn wants_logits(&self) -> bool {
        self.readings.contains(&Reading::Logits)
    }

    /// Tokens of a list.
    pub(super) fn most(&self) -> usize {
        self.lists.iter().map(|&[_, count]| count as usize).max().unwrap_or(0)
    }

    /// Where the answers lie.
    pub(super) fn layout(&self) -> AnswerLayout {
        AnswerLayout::new(self.readings.len(), self.logprobs, self.lists.len() * self.most())
    }

    /// The answers, from what the device wrote.
    pub(super) fn read(&self, bytes: &[u8]) -> Vec<RowOutput> {
        let answers = Answers { words: bytes.as_chunks().0, layout: self.layout(), most: self.most() };
        let row = |(row, &reading): (usize, &Reading)| match reading {
            // Where one row is wanted as it is, all come to the host.
            Reading::Logits => RowOutput::Logits(row),
            Reading::Nothing => RowOutput::Nothing,
            Reading::Token(top) => RowOutput::Token(answers.token(row).map(|token_id| TokenOutput {
                token_id,
                logprobs: top.map(|top| answers.position(row, token_id, top)),
            })),
            Reading::Known(top) => {
                let token_id = self.known.iter().find(|(known, _)| *known == row).map_or(0, |(_, id)| *id);
                RowOutput::Logprobs(answers.position(row, token_id, top))
            }
            Reading::Beam { list, count, top } => {
                let found = answers.list(row, list);
                let candidates: Vec<TokenLogprob> = found.iter().take(count).copied().collect();
                let output = CandidatesOutput {
                    candidates: candidates
                        .iter()
                        .map(|&TokenLogprob { token_id, logprob }| Candidate {
                            token_id,
                            logprob: f64::from(logprob),
                        })
                        .collect(),
                    own: match top {
                        Some(_) => candidates.iter().map(|candidate| candidate.logprob).collect(),
                        None => Vec::new(),
                    },
                    top: found.into_iter().take(top.unwrap_or(0)).collect(),
                };
                RowOutput::Candidates((!candidates.is_empty()).then_some(output))
            }
        };
        self.readings.iter().enumerate().map(row).collect()
    }
}

/// Words from the beginning, each part of 4 bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct AnswerLayout {
    /// u32 `[rows]`, from 0 on.
    pub(super) tokens: usize,
    /// f32 `[rows]`: their log-probabilities.
    pub(super) logprobs: usize,
    /// f32 `[rows, 2]`: maximum and log-sum.
    pub(super) stats: usize,
    /// u32 `[lists, most]`
    pub(super) list_tokens: usize,
    /// f32 `[lists, most]`
    pub(super) list_values: usize,
    /// All of them.
    pub(super) words: usize,
}

impl AnswerLayout {
    fn new(rows: usize, logprobs: bool, listed: usize) -> Self {
        let of_rows = if logprobs { rows } else { 0 };
        let stats = rows + of_rows;
        let list_tokens = stats + 2 * of_rows;
        let list_values = list_tokens + listed;
        Self { tokens: 0, logprobs: rows, stats, list_tokens, list_values, words: list_values + listed }
    }
}

/// What the device wrote.
struct Answers<'a> {
    words: &'a [[u8; 4]],
    layout: AnswerLayout,
    most: usize,
}

impl Answers<'_> {
    fn word(&self, at: usize) -> u32 {
        self.words.get(at).map_or(NO_TOKEN, |&bytes| u32::from_ne_bytes(bytes))
    }

    fn number(&self, at: usize) -> f32 {
        f32::from_bits(self.word(at))
    }

    fn token(&self, row: usize) -> Option<u32> {
        Some(self.word(self.layout.tokens + row)).filter(|&token| token != NO_TOKEN)
    }

    fn position(&self, row: usize, token_id: u32, top: Top) -> PositionLogprobs {
        let token = TokenLogprob { token_id, logprob: self.number(self.layout.logprobs + row) };
        let list = top.list.map_or_else(Vec::new, |list| self.list(row, list));
        PositionLogprobs { token, top: list.into_iter().take(top.count).collect() }
    }

    /// The tokens of a list with their log-probabilities.
    fn list(&self, row: usize, list: usize) -> Vec<TokenLogprob> {
        let stats = self.layout.stats + 2 * row;
        let normaliser = Normaliser::of_log_sum(self.number(stats), self.number(stats + 1));
        let places = (list * self.most)..((list + 1) * self.most);
        let token = |place: usize| {
            let token_id = self.word(self.layout.list_tokens + place);
            let logprob = normaliser.of_logit(self.number(self.layout.list_values + place));
            (token_id != NO_TOKEN).then_some(TokenLogprob { token_id, logprob })
        };
        places.map_while(token).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::executor::{Sampling, TokenChange};
    use crate::sampling::Draw;

    fn token(temperature: f32, logprobs: Option<usize>, changes: LogitChanges) -> RowWanted {
        let draw = Draw { seed: 3, sample: 0, position: 9 };
        let sampling = Sampling { temperature, top_k: 0, top_p: 0.5, min_p: 0.0, draw };
        RowWanted::Token(TokenWanted { sampling, changes, logprobs })
    }

    #[test]
    fn rows_become_lists_and_answers_rows() {
        let beam = |logprobs| {
            RowWanted::Candidates(CandidatesWanted { count: 1, changes: LogitChanges::default(), logprobs })
        };
        let tokens = vec![TokenChange { token_id: 4, bias: 1.0, held: None }];
        let biased = LogitChanges { tokens, ..LogitChanges::default() };
        let wanted = [
            token(0.0, None, LogitChanges::default()),
            RowWanted::Nothing,
            token(1.0, Some(1), biased),
            RowWanted::Logprobs { token_id: 6, top: 0 },
            beam(Some(2)),
        ];
        let asked = Asked::new(&wanted, 6);
        assert!(asked.greedy && asked.keeps_logits && asked.logprobs && asked.wants_logits());
        assert_eq!((asked.draws.len(), asked.known.as_slice()), (1, &[(3, 6)][..]));
        assert_eq!(asked.changes, [[2, 4, 1f32.to_bits(), NOT_HELD]]);
        assert_eq!(asked.lists, [[2, 1], [4, 2]]);
        let layout = asked.layout();
        assert_eq!((layout.list_tokens, layout.words), (24, 32));

        let mut words = vec![0u32; layout.words];
        words[..6].copy_from_slice(&[7, 0, 4, 6, 0, 0]);
        words[layout.logprobs + 2] = (-1.5f32).to_bits();
        words[layout.logprobs + 3] = (-2.5f32).to_bits();
        for row in 0..6 {
            words[layout.stats + 2 * row] = 3f32.to_bits();
            words[layout.stats + 2 * row + 1] = 0.5f32.to_bits();
        }
        words[layout.list_tokens..layout.list_values].copy_from_slice(&[5, NO_TOKEN, 8, 9]);
        let values = [3.0f32, f32::NEG_INFINITY, 3.0, 2.0].map(f32::to_bits);
        words[layout.list_values..].copy_from_slice(&values);
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
        let of = |token_id, logprob| TokenLogprob { token_id, logprob };
        let expected = [
            RowOutput::Token(Some(TokenOutput::new(7))),
            RowOutput::Nothing,
            RowOutput::Token(Some(TokenOutput {
                token_id: 4,
                logprobs: Some(PositionLogprobs { token: of(4, -1.5), top: vec![of(5, -0.5)] }),
            })),
            RowOutput::Logprobs(PositionLogprobs { token: of(6, -2.5), top: vec![] }),
            RowOutput::Candidates(Some(CandidatesOutput {
                candidates: vec![Candidate { token_id: 8, logprob: -0.5 }],
                own: vec![-0.5],
                top: vec![of(8, -0.5), of(9, -1.5)],
            })),
            RowOutput::Logits(5),
        ];
        assert_eq!(asked.read(&bytes), expected);
    }

    #[test]
    fn a_row_without_a_usable_logit_has_no_answer() {
        let wanted = [
            token(1.0, Some(0), LogitChanges::default()),
            RowWanted::Candidates(CandidatesWanted {
                count: 2,
                changes: LogitChanges::default(),
                logprobs: None,
            }),
        ];
        let asked = Asked::new(&wanted, 2);
        let bytes: Vec<u8> = vec![0xff; 4 * asked.layout().words];
        assert_eq!(asked.read(&bytes), [RowOutput::Token(None), RowOutput::Candidates(None)]);
    }

    #[test]
    fn what_the_kernels_cannot_do_is_the_hosts() {
        let most = MOST as usize;
        assert!(answers(&token(1.0, Some(most), LogitChanges::default())));
        assert!(!answers(&token(1.0, Some(most + 1), LogitChanges::default())));
        assert!(!answers(&RowWanted::Logprobs { token_id: 0, top: most + 1 }));
        let asked = Asked::new(&[RowWanted::Logprobs { token_id: 0, top: most + 1 }], 1);
        assert!(asked.is_empty() && asked.wants_logits());
    }
}

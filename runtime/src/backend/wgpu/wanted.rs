//! What is wanted of a step's logits as jobs for the kernels, and what the kernels wrote as answers. Plain data: the device
//! is `logits`'s.
//!
//! The kernels leave what log-probabilities follow from: logits, the largest one, and the sum of all weights as a whole
//! number. The logarithm and the last subtraction are the host's, in f64, as where the host reads the whole row.

use crate::executor::{
    CandidatesOutput, CandidatesWanted, LogitChanges, RowOutput, RowWanted, TokenOutput, TokenWanted,
};
use crate::request::{PositionLogprobs, TokenLogprob};
use crate::sampling::Normaliser;
use crate::sampling::beam::Candidate;
use pagewise_shaders::model::candidates::{self, CandidatesJob};
use pagewise_shaders::model::log_softmax::{self, LogSoftmaxJob, LogSoftmaxOut};
use pagewise_shaders::model::penalties::{CHANGE_WORDS, Change, RULE_WORDS, Rule};
use pagewise_shaders::model::sample::{Changed, NO_TOKEN, SampleJob};

/// What is to be done for the rows of a step, in this order, and where the answers will be.
#[derive(Debug, Default)]
pub(super) struct Jobs {
    /// What log-probabilities follow from, of logits as they are.
    pub(super) sums: Vec<LogSoftmaxJob>,
    /// The likeliest of logits as they are.
    pub(super) plain: Vec<CandidatesJob>,
    rules: Vec<Rule>,
    /// Biases and penalties.
    pub(super) changes: Vec<Change>,
    /// The likeliest of changed log-probabilities.
    pub(super) changed: Vec<CandidatesJob>,
    /// Tokens that are chosen.
    pub(super) tokens: Vec<SampleJob>,
    /// Whether all tokens are the likeliest of rows as they are, and nothing else is wanted of these.
    pub(super) only_likeliest: bool,
    /// Words that the kernels write, chosen tokens left out.
    pub(super) out_words: u32,
    rows: Vec<Answer>,
}

/// All jobs in one buffer: its words, and where each kind begins.
#[derive(Debug, Default)]
pub(super) struct Listed {
    pub(super) words: Vec<u32>,
    pub(super) changes: u32,
    pub(super) sums: u32,
    pub(super) plain: u32,
    pub(super) changed: u32,
    pub(super) tokens: u32,
}

/// Where a row's answer is.
#[derive(Clone, Debug)]
enum Answer {
    Logits,
    Nothing,
    Token(Option<Logprobs>),
    Logprobs { token_id: u32, logprobs: Logprobs },
    Candidates { sums: u32, found: u32, own: bool, top: Option<u32> },
}

/// Where the log-probabilities of a token are: the row's sums, the token's logit, the likeliest.
#[derive(Clone, Copy, Debug)]
struct Logprobs {
    sums: u32,
    logit: u32,
    top: Option<u32>,
}

/// Place of the token's logit within what `log_softmax` writes.
const TOKEN_LOGIT: u32 = 3;

impl Jobs {
    /// Of rows beyond the end of `wanted` the logits are.
    pub(super) fn new(wanted: &[RowWanted], rows: usize) -> Self {
        let mut jobs = Self { only_likeliest: true, ..Self::default() };
        for row in 0..rows {
            let answer = jobs.add(row as u32, wanted.get(row).unwrap_or(&RowWanted::Logits));
            jobs.rows.push(answer);
        }
        jobs
    }

    fn add(&mut self, row: u32, wanted: &RowWanted) -> Answer {
        match wanted {
            RowWanted::Logits => Answer::Logits,
            RowWanted::Nothing => Answer::Nothing,
            RowWanted::Token(wanted) => self.token(row, wanted),
            &RowWanted::Logprobs { token_id, top } => {
                let sums = self.sums(row, Some(token_id));
                let top = self.top(row, top);
                Answer::Logprobs { token_id, logprobs: Logprobs { sums, logit: sums + TOKEN_LOGIT, top } }
            }
            RowWanted::Candidates(CandidatesWanted { count, changes, logprobs }) => {
                let sums = self.sums(row, None);
                let changed = self.change(row, changes, Some(sums));
                let found = self.candidates(row, *count, changed);
                let top = logprobs.and_then(|top| self.top(row, top));
                Answer::Candidates { sums, found, own: logprobs.is_some(), top }
            }
        }
    }

    fn token(&mut self, row: u32, wanted: &TokenWanted) -> Answer {
        let TokenWanted { sampling, changes, logprobs } = wanted;
        self.only_likeliest &= sampling.is_greedy() && changes.is_empty() && logprobs.is_none();
        let logprobs = logprobs.map(|top| {
            let (sums, logit) = (self.sums(row, None), self.room(1));
            Logprobs { sums, logit, top: self.top(row, top) }
        });
        let changed = self.change(row, changes, None);
        self.tokens.push(SampleJob {
            row,
            temperature: sampling.temperature,
            top_k: u32::try_from(sampling.top_k).unwrap_or(u32::MAX),
            top_p: sampling.top_p,
            min_p: sampling.min_p,
            seed: sampling.draw.seed,
            sample: sampling.draw.sample,
            position: sampling.draw.position,
            changed,
            out: logprobs.map(|logprobs| logprobs.logit),
        });
        Answer::Token(logprobs)
    }

    /// Words of the output.
    fn room(&mut self, words: usize) -> u32 {
        let place = self.out_words;
        self.out_words += words as u32;
        place
    }

    fn sums(&mut self, row: u32, token: Option<u32>) -> u32 {
        let out = self.room(log_softmax::OUT_WORDS);
        self.sums.push(LogSoftmaxJob { row, token, out });
        out
    }

    fn top(&mut self, row: u32, count: usize) -> Option<u32> {
        (count > 0).then(|| self.candidates(row, count, Changed::default()))
    }

    fn candidates(&mut self, row: u32, count: usize, changed: Changed) -> u32 {
        let count = u32::try_from(count).unwrap_or(u32::MAX);
        let out = self.room(candidates::out_words(count));
        let jobs = if changed.count > 0 { &mut self.changed } else { &mut self.plain };
        jobs.push(CandidatesJob { row, count, changed, out });
        out
    }

    /// Lists a row's changes: where they are is counted in changes until all are known.
    fn change(&mut self, row: u32, changes: &LogitChanges, sums: Option<u32>) -> Changed {
        let start = self.changes.len() as u32;
        if changes.is_empty() {
            return Changed::default();
        }
        let rule = (self.rules.len() * RULE_WORDS) as u32;
        self.rules.push(Rule {
            row,
            repetition: changes.repetition_penalty,
            frequency: changes.frequency_penalty,
            presence: changes.presence_penalty,
            sums,
        });
        self.changes.extend(changes.tokens.iter().map(|change| Change {
            rule,
            token: change.token_id,
            bias: change.bias,
            times: change.held,
        }));
        Changed { start, count: changes.tokens.len() as u32, saved: start }
    }

    /// As the kernels read them.
    pub(super) fn list(&self) -> Listed {
        let mut words: Vec<u32> = self.rules.iter().flat_map(Rule::words).collect();
        let changes = words.len() as u32;
        words.extend(self.changes.iter().flat_map(Change::words));
        let placed =
            |changed: Changed| Changed { start: changes + CHANGE_WORDS as u32 * changed.start, ..changed };
        let sums = words.len() as u32;
        words.extend(self.sums.iter().flat_map(LogSoftmaxJob::words));
        let plain = words.len() as u32;
        words.extend(self.plain.iter().flat_map(CandidatesJob::words));
        let changed = words.len() as u32;
        let placed_candidates = |job: &CandidatesJob| CandidatesJob { changed: placed(job.changed), ..*job };
        words.extend(self.changed.iter().flat_map(|job| placed_candidates(job).words()));
        let tokens = words.len() as u32;
        let placed_token = |job: &SampleJob| SampleJob { changed: placed(job.changed), ..*job };
        words.extend(self.tokens.iter().flat_map(|job| placed_token(job).words()));
        Listed { words, changes, sums, plain, changed, tokens }
    }

    /// Whether a token is chosen from each row.
    pub(super) fn chosen(&self) -> impl Iterator<Item = bool> {
        self.rows.iter().map(|row| matches!(row, Answer::Token(_)))
    }

    /// Rows that go to the host as they are.
    pub(super) fn whole_rows(&self) -> impl Iterator<Item = usize> {
        let whole = |(_, answer): &(usize, &Answer)| matches!(answer, Answer::Logits);
        self.rows.iter().enumerate().filter(whole).map(|(row, _)| row)
    }

    /// What each row gave, from the chosen tokens of all rows and what else the kernels wrote.
    pub(super) fn answers(&self, ids: &[u32], out: &[u32]) -> Vec<RowOutput> {
        let mut whole = 0;
        let answer = |(row, answer): (usize, &Answer)| match *answer {
            Answer::Logits => {
                whole += 1;
                RowOutput::Logits(whole - 1)
            }
            Answer::Nothing => RowOutput::Nothing,
            Answer::Token(logprobs) => {
                let token = ids.get(row).copied().filter(|&id| id != NO_TOKEN);
                RowOutput::Token(token.map(|token_id| TokenOutput {
                    token_id,
                    logprobs: logprobs.map(|logprobs| logprobs.of(token_id, out)),
                }))
            }
            Answer::Logprobs { token_id, logprobs } => RowOutput::Logprobs(logprobs.of(token_id, out)),
            Answer::Candidates { sums, found, own, top } => {
                let (normaliser, found) = (normaliser(sums, out), ranked(found, out));
                let candidate = |found: &candidates::Candidate| Candidate {
                    token_id: found.id,
                    logprob: normaliser.of_logit(found.logit).into(),
                };
                let own = found.iter().filter(|_| own).map(|found| normaliser.of_logit(found.before));
                RowOutput::Candidates((!found.is_empty()).then(|| CandidatesOutput {
                    candidates: found.iter().map(candidate).collect(),
                    own: own.collect(),
                    top: top.map(|place| likeliest(place, normaliser, out)).unwrap_or_default(),
                }))
            }
        };
        self.rows.iter().enumerate().map(answer).collect()
    }
}

impl Logprobs {
    fn of(self, token_id: u32, out: &[u32]) -> PositionLogprobs {
        let normaliser = normaliser(self.sums, out);
        let logit = out.get(self.logit as usize).map_or(f32::NAN, |&bits| f32::from_bits(bits));
        let token = TokenLogprob { token_id, logprob: normaliser.of_logit(logit) };
        let top = self.top.map(|place| likeliest(place, normaliser, out)).unwrap_or_default();
        PositionLogprobs { token, top }
    }
}

fn normaliser(place: u32, out: &[u32]) -> Normaliser {
    let words = out.get(place as usize..).and_then(|out| out.first_chunk());
    let LogSoftmaxOut { max, sum, .. } = LogSoftmaxOut::from_words(words.copied().unwrap_or_default());
    Normaliser::new(max, sum)
}

/// Candidates by their logits, the likeliest first, lower ids first among equals.
fn ranked(place: u32, out: &[u32]) -> Vec<candidates::Candidate> {
    let mut found = candidates::found(out.get(place as usize..).unwrap_or_default());
    // Adding zero makes the two zeros equal.
    found.sort_unstable_by(|a, b| (b.logit + 0.0).total_cmp(&(a.logit + 0.0)).then(a.id.cmp(&b.id)));
    found
}

fn likeliest(place: u32, normaliser: Normaliser, out: &[u32]) -> Vec<TokenLogprob> {
    let entry = |found: candidates::Candidate| TokenLogprob {
        token_id: found.id,
        logprob: normaliser.of_logit(found.logit),
    };
    ranked(place, out).into_iter().map(entry).collect()
}

//! Fetching a model from the hub with `hf-hub`, into the cache that all of Hugging Face's tools share
//! (`HF_HOME`, else `~/.cache/huggingface`). The library sets no timeouts, so it works in a thread of its own and
//! is given up when nothing comes any more.

use super::{FetchProgress, ModelError, index, index::Index, quiet};
use hf_hub::{
    Cache, CacheRepo, Repo, RepoType,
    api::{
        Progress,
        sync::{ApiBuilder, ApiRepo},
    },
};
use std::{
    path::{Path, PathBuf},
    sync::mpsc::{RecvTimeoutError, Sender, channel},
    time::Duration,
};

/// For the first answer: is there a network, is there such a model.
const FIRST_ANSWER: Duration = Duration::from_secs(10);
/// For anything at all while files come in.
const STALL: Duration = Duration::from_secs(60);
const WHAT_TO_DO: &str = "download it elsewhere and give its directory";

/// All files but the weights, which come last: who finds weights in the cache finds these as well.
const SMALL_FILES: [&str; 6] = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
];
const SINGLE: &str = "model.safetensors";

/// What the thread has to say.
enum Message {
    /// The hub has answered.
    Reached,
    Progress(FetchProgress),
    Done(Result<PathBuf, String>),
}

/// The directory of a model of the hub: the cached one if it is whole, else a fetched one, else (no network) a
/// cached one that has all but the tokenizer.
pub(super) fn from_hub(id: &str, progress: &mut dyn FnMut(FetchProgress)) -> Result<PathBuf, ModelError> {
    let cache = Cache::from_env();
    let cached = cached_snapshot(&cache, id);
    if let Some(snapshot) = cached.clone().filter(|snapshot| snapshot.join("tokenizer.json").exists()) {
        return Ok(snapshot);
    }
    let fetched = if std::env::var_os("HF_HUB_OFFLINE").is_some_and(|value| value != "0" && !value.is_empty())
    {
        Err("HF_HUB_OFFLINE is set".to_owned())
    } else {
        fetch(id, &cache, ApiBuilder::from_env(), progress)
    };
    fetched.or_else(|problem| {
        cached
            .ok_or_else(|| ModelError::Hub { id: id.to_owned(), problem: format!("{problem}; {WHAT_TO_DO}") })
    })
}

fn repository(id: &str) -> Repo {
    Repo::new(id.to_owned(), RepoType::Model)
}

/// A snapshot in the cache that has configuration and weights.
fn cached_snapshot(cache: &Cache, id: &str) -> Option<PathBuf> {
    let snapshot = cache.repo(repository(id)).get("config.json")?.parent()?.to_owned();
    let whole = snapshot.join(SINGLE).exists()
        || Index::open(&snapshot)
            .ok()
            .flatten()
            .is_some_and(|index| index.shards.iter().all(|shard| snapshot.join(shard).exists()));
    whole.then_some(snapshot)
}

/// Runs the download in a thread and passes on what it says.
fn fetch(
    id: &str,
    cache: &Cache,
    api: ApiBuilder,
    progress: &mut dyn FnMut(FetchProgress),
) -> Result<PathBuf, String> {
    let (sender, receiver) = channel();
    let repository = repository(id);
    let cached = cache.repo(repository.clone());
    let work = move || {
        let download = || {
            let api = api.with_progress(false).build().map_err(|error| error.to_string())?;
            download(&api.repo(repository), &cached, &sender)
        };
        let result = quiet::catch(download).and_then(|result| result);
        // Nobody listens any more when it took too long.
        let _ = sender.send(Message::Done(result));
    };
    // Not joined: a thread that waits for a dead connection would keep us waiting too.
    std::thread::Builder::new().name("hub".to_owned()).spawn(work).map_err(|error| error.to_string())?;

    let mut patience = FIRST_ANSWER;
    loop {
        match receiver.recv_timeout(patience) {
            Ok(Message::Reached) => patience = STALL,
            Ok(Message::Progress(update)) => progress(update),
            Ok(Message::Done(result)) => return result,
            Err(RecvTimeoutError::Timeout) => {
                return Err(format!("it did not answer within {} seconds", patience.as_secs()));
            }
            Err(RecvTimeoutError::Disconnected) => {
                return Err("the download ended without a result".to_owned());
            }
        }
    }
}

fn download(repository: &ApiRepo, cache: &CacheRepo, sender: &Sender<Message>) -> Result<PathBuf, String> {
    let info = repository.info().map_err(|error| error.to_string())?;
    let _ = sender.send(Message::Reached);
    let has = |name: &str| info.siblings.iter().any(|file| file.rfilename == name);
    let get = |name: &str| {
        if let Some(path) = cache.get(name) {
            return Ok(path);
        }
        let reporter = Reporter { sender: sender.clone(), progress: FetchProgress::of(name) };
        repository.download_with_progress(name, reporter).map_err(|error| format!("{name}: {error}"))
    };

    if !has("config.json") {
        return Err("it has no config.json".to_owned());
    }
    let mut snapshot = PathBuf::new();
    for name in SMALL_FILES.into_iter().filter(|name| has(name)) {
        let file = get(name)?;
        snapshot = file.parent().map(Path::to_owned).unwrap_or_default();
    }
    if has(SINGLE) {
        get(SINGLE)?;
    } else if has(index::INDEX) {
        get(index::INDEX)?;
        let index = Index::open(&snapshot).map_err(|error| error.to_string())?;
        for shard in index.into_iter().flat_map(|index| index.shards) {
            get(&shard)?;
        }
    } else {
        return Err(format!("it has neither {SINGLE} nor {}", index::INDEX));
    }
    Ok(snapshot)
}

impl FetchProgress {
    fn of(file: &str) -> Self {
        Self { file: file.to_owned(), bytes: 0, total: 0 }
    }
}

/// Passes on how far a file is.
struct Reporter {
    sender: Sender<Message>,
    progress: FetchProgress,
}

impl Reporter {
    fn send(&self) {
        let _ = self.sender.send(Message::Progress(self.progress.clone()));
    }
}

impl Progress for Reporter {
    fn init(&mut self, size: usize, _: &str) {
        // A resumed download reports what is already there as its first update.
        self.progress.total = size as u64;
        self.progress.bytes = 0;
        self.send();
    }

    fn update(&mut self, size: usize) {
        self.progress.bytes += size as u64;
        self.send();
    }

    fn finish(&mut self) {}
}

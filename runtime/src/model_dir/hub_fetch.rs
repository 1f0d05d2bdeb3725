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

/// How long to wait for a sign of life.
#[derive(Clone, Copy)]
struct Patience {
    /// For the first answer: is there a network, is there such a model.
    first_answer: Duration,
    /// For anything at all while files come in.
    stall: Duration,
}

const PATIENCE: Patience = Patience { first_answer: Duration::from_secs(10), stall: Duration::from_secs(60) };
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
/// What stands for `tokenizer.json` in older models.
const OLDER_TOKENIZER: [&str; 2] = ["vocab.json", "merges.txt"];
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
    let has_tokenizer = |snapshot: &PathBuf| {
        ["tokenizer.json", "merges.txt"].into_iter().any(|name| snapshot.join(name).exists())
    };
    if let Some(snapshot) = cached.clone().filter(has_tokenizer) {
        return Ok(snapshot);
    }
    let fetched = if std::env::var_os("HF_HUB_OFFLINE").is_some_and(|value| value != "0" && !value.is_empty())
    {
        Err("HF_HUB_OFFLINE is set".to_owned())
    } else {
        fetch(id, &cache, ApiBuilder::from_env(), PATIENCE, progress)
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
    patience: Patience,
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

    let mut wait = patience.first_answer;
    loop {
        match receiver.recv_timeout(wait) {
            Ok(Message::Reached) => wait = patience.stall,
            Ok(Message::Progress(update)) => progress(update),
            Ok(Message::Done(result)) => return result,
            Err(RecvTimeoutError::Timeout) => {
                return Err(format!("it did not answer within {} seconds", wait.as_secs_f32()));
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
    let older: &[&str] = if has("tokenizer.json") { &[] } else { &OLDER_TOKENIZER };
    for name in SMALL_FILES.iter().chain(older).filter(|name| has(name)) {
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
        let pickled = match has("pytorch_model.bin") || has("pytorch_model.bin.index.json") {
            true => {
                ", only weights in .bin files, which are not read: convert it with transformers' save_pretrained"
            }
            false => "",
        };
        return Err(format!("it has neither {SINGLE} nor {}{pickled}", index::INDEX));
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::{
        io::{BufRead, BufReader, Write},
        net::{TcpListener, TcpStream},
    };

    const FILES: [(&str, &str); 5] = [
        ("config.json", "{}"),
        ("tokenizer.json", "tokens"),
        (
            "model.safetensors.index.json",
            r#"{"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}"#,
        ),
        ("one.safetensors", "first shard"),
        ("two.safetensors", "second shard"),
    ];

    /// Answers one request as the hub does.
    fn answer(stream: TcpStream) -> std::io::Result<()> {
        let mut lines = BufReader::new(&stream).lines();
        let request = lines.next().unwrap_or_else(|| Ok(String::new()))?;
        let mut range = None;
        for line in lines {
            let line = line?.to_lowercase();
            if line.is_empty() {
                break;
            }
            range = line.strip_prefix("range: bytes=").map(str::to_owned).or(range);
        }
        let path = request.split(' ').nth(1).unwrap_or_default();
        let file = path.strip_prefix("/org/name/resolve/main/");
        let contents = file.and_then(|file| FILES.iter().find(|(name, _)| *name == file));
        let (status, headers, body) = if path.starts_with("/api/models/org/name") {
            let names: Vec<_> =
                FILES.iter().map(|(name, _)| serde_json::json!({"rfilename": name})).collect();
            let info = serde_json::json!({"sha": "c0ffee", "siblings": names});
            ("200 OK", "content-type: application/json\r\n".to_owned(), info.to_string())
        } else if let Some((name, contents)) = contents {
            let end = if range.as_deref() == Some("0-0") { 1 } else { contents.len() };
            let total = contents.len();
            let headers = format!(
                "etag: \"{name}-tag\"\r\nx-repo-commit: c0ffee\r\ncontent-range: bytes 0-{}/{total}\r\n",
                end - 1
            );
            ("206 Partial Content", headers, contents[..end].to_owned())
        } else {
            ("404 Not Found", String::new(), String::new())
        };
        write!(
            &stream,
            "HTTP/1.1 {status}\r\n{headers}content-length: {}\r\nconnection: close\r\n\r\n{body}",
            body.len()
        )
    }

    /// A server that answers everything, or nothing.
    fn serve(answers: bool) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        std::thread::spawn(move || {
            let mut silent = Vec::new();
            for stream in listener.incoming().flatten() {
                if answers {
                    let _ = answer(stream);
                } else {
                    silent.push(stream);
                }
            }
        });
        endpoint
    }

    fn fetch_from(
        endpoint: String,
        id: &str,
        cache: &Cache,
    ) -> Result<(PathBuf, Vec<FetchProgress>), String> {
        let api = ApiBuilder::from_cache(cache.clone()).with_endpoint(endpoint).with_token(None);
        let patience = Patience { first_answer: Duration::from_secs(2), stall: Duration::from_secs(20) };
        let mut seen = Vec::new();
        fetch(id, cache, api, patience, &mut |progress| seen.push(progress)).map(|path| (path, seen))
    }

    #[test]
    fn a_sharded_model_is_fetched_whole_and_then_found_in_the_cache() {
        let directory = tempfile::tempdir().unwrap();
        let cache = Cache::new(directory.path().to_owned());
        assert_eq!(cached_snapshot(&cache, "org/name"), None);
        let (snapshot, seen) = fetch_from(serve(true), "org/name", &cache).unwrap();
        for (name, contents) in FILES {
            assert_eq!(std::fs::read_to_string(snapshot.join(name)).unwrap(), contents);
            let total = contents.len() as u64;
            assert!(seen.contains(&FetchProgress { file: name.to_owned(), bytes: total, total }), "{name}");
        }
        assert_eq!(cached_snapshot(&cache, "org/name"), Some(snapshot.clone()));
        // Shards are links into the cache's blobs, which is where they may point.
        index::check_inside(&snapshot, &snapshot.join("one.safetensors")).unwrap();
        std::fs::remove_file(snapshot.join("two.safetensors")).unwrap();
        assert_eq!(cached_snapshot(&cache, "org/name"), None);
    }

    #[test]
    fn what_the_hub_does_not_have_and_silence_are_errors() {
        let directory = tempfile::tempdir().unwrap();
        let cache = Cache::new(directory.path().to_owned());
        let missing = fetch_from(serve(true), "org/other", &cache).unwrap_err();
        assert_eq!(missing, "request error: http status: 404");
        let silent = fetch_from(serve(false), "org/name", &cache).unwrap_err();
        assert_eq!(silent, "it did not answer within 2 seconds");
        // Nobody listens on the reserved port.
        let refused = fetch_from("http://127.0.0.1:1".to_owned(), "org/name", &cache).unwrap_err();
        assert!(refused.contains("refused"), "{refused}");
    }
}
